"""The benchmarks: each runs on the smallest models that it takes, and prints the table that its README shows."""

from __future__ import annotations

import json
import re
import socket
from pathlib import Path

import pytest
import torch

import decoding
import memory
import scaling
import tables
import training_tables
import updating
from helpers.paths import ROOT
from helpers.recipes import PYTHON, need_vllm, run, run_failing, start
from random_pair import SHAPES

SIZES = [(*pair, tokens) for pair in (("3b", "0.5b"), ("7b", "1.5b")) for tokens in (256, 2048)]
"""Teacher, student and tokens of the training steps in docs/performance.md."""
TINY = "--batches 2 --tokens 2 --rounds 1 --teacher 64 1 --theta 64 1 --vocabulary 300".split()  # noqa: SIM905


def check_benchmark(script: str, columns: int, launcher: tuple[str, ...] | None = None) -> None:
    output = run(script, *TINY, launcher=launcher)
    (row,) = re.findall(r"^\| +2 \|.*$", output, re.MULTILINE)
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert len(cells) == columns, row
    assert all(float(cell) > 0 for cell in cells[:5])
    assert re.search(r"torch [\d.]+\S*, 1 thread\(s\), \w+", output)


def test_transformers_backend() -> None:
    check_benchmark("benchmarks/transformers_backend.py", columns=5)


def test_dense_error() -> None:
    """On the embedded pair: less than the whole at k = 1, the whole and no error at k = V."""
    output = run("benchmarks/dense_error.py", "--rounds", "1", "--top-k", "1", "4", "100")
    rows = [[float(cell) for cell in line.strip("|").split("|")] for line in re.findall(r"^\| \d.*$", output, re.M)]
    assert [int(row[0]) for row in rows] == [1, 4, 40]
    shares, errors = ([row[first::2] for row in rows] for first in (2, 3))
    assert all(fewer < more for fewer, more in zip(shares[0], shares[2]))
    assert shares[2] == pytest.approx([1.0] * 3, abs=1e-3)
    assert errors[2] == pytest.approx([0.0] * 3, abs=1e-3)
    assert min(errors[0]) > 0.01


HOST = ("--completions", "2", "--tokens", "50", "--vocabulary", "300", "--rounds", "1")


def seconds(output: str, rows: int) -> dict[str, float]:
    """The table of the host's work: microseconds a token by name."""
    return {cells[1].strip(): float(cells[2]) for cells in (line.split("|") for line in output.splitlines()[-rows:])}


@pytest.mark.engine
def test_host_cost() -> None:
    need_vllm()
    rows = seconds(run("benchmarks/host_cost.py", *HOST, launcher=PYTHON), 8)
    assert len(rows) == 8
    parts = ("JSON of a server's answer", "rollouts of the answer")
    both = rows["log θ for TRL, and its reading"] + rows["records beside TRL's batch"]
    assert rows["server path"] == pytest.approx(sum(rows[name] for name in parts) + both, abs=0.03)
    assert rows["colocated path"] == pytest.approx(rows["records of vLLM's outputs"] + both, abs=0.03)


@pytest.mark.engine
def test_host_cost_dense() -> None:
    need_vllm()
    rows = seconds(run("benchmarks/host_cost_dense.py", *HOST, "--top_k", "0", "2", launcher=PYTHON), 6)
    assert rows.keys() == {f"k = {k}, {way}" for k in (0, 2) for way in ("rows", "lists", "JSON")}
    assert all(value > 0 for value in rows.values())


def test_memory() -> None:
    """The page of settings shows the table; 7B has 7.6e9 parameters and 57 344 bytes of cache a token."""
    assert memory.table() in (ROOT / "docs" / "gpus.md").read_text(), (
        "Put the table that `python recipes/benchmarks/memory.py` prints into docs/gpus.md"
    )
    large, small = SHAPES["7b"], SHAPES["1.5b"]
    one = memory.fit(memory.Card(80, 3350), large, small, 16)
    assert memory.stored(large) == pytest.approx(7.62e9, rel=0.01)
    assert 2 * large.cached == 57344
    assert one.share * 80 + one.trainer <= 80 * (1 - memory.ACTIVATIONS)
    held = one.weights + memory.ENGINE_GB + one.tokens * 2 * (large.cached + small.cached) / 1e9
    assert held == pytest.approx(one.share * 80, abs=1e-3)


def test_scaling(tmp_path: Path) -> None:
    """The page has the tables; the fit misses no step by more than 6 %, one that it did not see by 15 %."""
    page, rows, updates = (ROOT / "docs" / "scaling.md").read_text(), decoding.measured(), updating.measured()
    speed, rate = decoding.fit(rows), updating.fit(updates)
    drawn = decoding.check_table(speed, rows), updating.update_table(rate, updates), scaling.pair_table(speed, rate)
    for table in drawn:
        assert "\n".join(table) in page, "Put what `recipes/benchmarks/scaling.py` prints into docs/scaling.md"
    for row in rows:
        assert decoding.computed(row, speed) == pytest.approx(row.step_ms, rel=0.06 if row.fitted else 0.15)
    errors = [updating.computed(row, rate) / row.seconds - 1 for row in updates]
    assert (f"{min(errors):+.0%}", f"{max(errors):+.0%}") == ("-26%", "+19%"), "docs/scaling.md says this"
    small = updating.fit([row for row in updates if row.student == "0.5b"])
    unseen = [updating.computed(row, small) / row.seconds - 1 for row in updates if row.student == "1.5b"]
    assert (f"{min(unseen):+.0%}", f"{max(unseen):+.0%}") == ("-15%", "+14%"), "docs/scaling.md says this, too"
    assert -3.85 < min(updating.memory(row.pair) - row.gib for row in updates) < -3.75, "and this"
    pair = decoding.pair_of("7b", "1.5b")
    twice = scaling.rollout(pair, 1, speed) / scaling.rollout(pair, 2, speed)
    assert 1 < twice < 2, "half the rows still read all weights"
    engines, seconds = scaling.best_split(pair, 8, speed, rate)
    assert 0 < engines < 8
    assert seconds > scaling.rollout(pair, 8, speed) + scaling.update(pair, 8, rate), "a server's cards wait"
    assert scaling.best_split(decoding.pair_of("70b", "8b"), 4, speed, rate)[0] == 0, "all four hold the engine"
    scaling.draw(tmp_path / "scaling.png", speed, rate)
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")


def test_tables() -> None:
    """The pages show the stored numbers, and no step is another one than its tokens/s say."""
    assert "\n".join(tables.speeds()) in (ROOT / "docs" / "gpus.md").read_text()
    readme = (ROOT / "recipes" / "benchmarks" / "README.md").read_text()
    lines = [line for line in tables.rollouts() if f"\n{line}" not in readme]
    assert not lines, "Put what `python recipes/benchmarks/tables.py` prints into recipes/benchmarks/README.md"
    recorded = tables.stored("training_profile")["arms"]
    drafted, trained = tables.stored("speculation")["tables"], tables.stored("training")["tables"]
    for page, table in (
        ("docs/dense.md", tables.dense()),
        ("docs/dense.md", tables.dense_parts()),
        ("docs/dense.md", tables.dense_kernels()),
        *(("docs/performance.md", tables.steps(table["arms"])) for table in trained.values()),
        *(("docs/performance.md", tables.profiled(name, arm["profile"])) for name, arm in recorded.items()),
        ("docs/performance.md", tables.evaluation()),
        *(("docs/speculative.md", tables.speculation(table["rows"])) for table in drafted.values()),
        ("recipes/benchmarks/README.md", tables.cards()),
    ):
        stored = "\n".join(table)
        assert stored in (ROOT / page).read_text(), f"Put what tables.py prints into {page}:\n{stored}"
    measured = {
        (training_tables.size_of(table["command"])[0], arm) for table in trained.values() for arm in table["arms"]
    }
    wanted = {(size, arm) for size in SIZES for arm in training_tables.ARMS}
    assert not wanted - measured, "docs/performance.md says that each arm was measured at each size"
    for page, table in tables.printed():
        assert table in (ROOT / page).read_text(), f"printed.json and {page} differ:\n{table}"
    kept = {"\n".join(tables.cards()), *(table for _, table in tables.printed())}
    _, *shown = re.findall(r"(?:^\|.*\n)+", readme, re.MULTILINE)  # without that of the scripts
    assert {table.strip() for table in shown} <= kept, "Store each table of recipes/benchmarks/README.md"
    for row in tables.stored_rows():
        assert 1e3 * row["batch"] / row["mixture"] == pytest.approx(row["step_ms"], rel=1e-3)


def test_the_ranges_of_a_training_step() -> None:
    """The pages say between what a step's ratios to TRL's lie, over all sizes and calls."""

    def ends(column: str, *arms: str) -> str:
        ratios = []
        for table in tables.stored("training")["tables"].values():
            for arm in table["arms"].keys() & arms:
                base = table["arms"].get(f"TRL, {'GRPO' if arm.startswith(('GRPO', 'RAFT')) else 'distillation'}")
                ratios += [table["arms"][arm][column] / base[column]] if base else []
        return f"{min(ratios):.2f} to {max(ratios):.2f}"

    def both(loss: str) -> tuple[str, str]:
        return f"{loss}, own", f"{loss}, mixture"

    grpo, dense = ends("step", "GRPO, half mixture"), ends("step", *both("dense"))
    divergence = both("divergence")
    page, readme = ((ROOT / name).read_text() for name in ("docs/performance.md", "README.md"))
    for words in (
        f"GRPO on half a mixture ÷ TRL's GRPO | {grpo} |",
        f"RAFT on a mixture | {ends('step', 'RAFT, mixture')} |",
        f"distillation from dense records ÷ TRL's distillation | {dense} |",
        f"its memory is {ends('GiB', *both('dense'))} of TRL's",
        f"costs {ends('step', *divergence)} of TRL's step and {ends('GiB', *divergence)} of its memory",
    ):
        assert words in page
    assert f"GRPO on half a mixture ÷ TRL's GRPO | {grpo} |" in readme
    assert f"distillation from dense records ÷ TRL's distillation | {dense} |" in readme


def test_triton_kernels() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    output = run("benchmarks/triton_kernels.py", "--batches", "4", "--rounds", "3", "--checked", "1", launcher=PYTHON)
    rows = re.findall(r"^\| +4 \|.*$", output, re.MULTILINE)
    assert len(rows) == 3
    assert all(float(row.split("|")[-2]) < 1e-4 for row in rows), output
    flags = ("--dense", "--batches", "4", "--rounds", "3", "--top-k", "8")
    output = run("benchmarks/triton_kernels.py", *flags, launcher=PYTHON)
    assert len(re.findall(r"^\| +4 \|.*$", output, re.MULTILINE)) == 2, output


@pytest.mark.engine
def test_engine() -> None:
    need_vllm()
    check_benchmark("benchmarks/engine.py", columns=10, launcher=PYTHON)


@pytest.mark.engine
def test_dense_engine() -> None:
    need_vllm()
    output = run(
        "benchmarks/dense_engine.py",
        *TINY,
        *["--batches", "2", "--tokens", "3", "--rounds", "1", "--top-k", "2", "--divide", "2"],
    )
    *_, head, _, cells, _, parts, _, divided = (line.strip("| ").split(" | ") for line in output.splitlines())
    assert head == ["batch", "step", "scalars", "k = 2", "GiB"]
    assert parts == ["batch", "step", "kernels", "packing", "copy", "host", "reading"]
    assert cells[0] == divided[0] == "2"
    assert all(float(row[1].removesuffix(" ms")) > 0 for row in (cells, divided))


@pytest.mark.engine
def test_evaluation() -> None:
    """The student alone draws the tokens that it draws beside the teacher."""
    need_vllm()
    output = run("benchmarks/evaluation.py", *TINY, "--batches", "4", "--tokens", "3", "--rounds", "1")
    *_, head, _, cells = (line.strip("| ").split(" | ") for line in output.splitlines())
    assert head == ["batch", "beside", "alone", "share", "equal"]
    assert cells[0] == cells[-1] == "4"


@pytest.mark.engine
def test_two_versions() -> None:
    """This version beside itself: each engine has the package of its folder."""
    need_vllm()
    output = run("benchmarks/two_versions.py", *TINY, "--before", str(ROOT), launcher=PYTHON)
    (cells,) = (line.strip("| ").split(" | ") for line in re.findall(r"^\| 2 \|.*$", output, re.MULTILINE))
    assert all(float(cell) > 0 for cell in cells[:4])
    assert f"before: {ROOT / 'optimal_sampling_trl'}" in output


@pytest.mark.engine
def test_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two arms, one of each kind; the parts of a step are the whole. TRL's own take a GPU.

    The port of the environment is another process's, as TRL's first choice is where several calls begin at once.
    """
    need_vllm()
    arms = ("RAFT, mixture", "sampled token, own")
    sizes = "--completions 2 --micro-batch 2 --group 2 --tokens 3 --steps 2 --prompt 4".split()  # noqa: SIM905
    models = "--teacher 64 1 --theta 64 1 --vocabulary 300".split()  # noqa: SIM905
    with socket.create_server(("localhost", 0)) as taken:
        monkeypatch.setenv("MASTER_PORT", str(taken.getsockname()[1]))
        output = run("benchmarks/training.py", *sizes, *models, "--arms", *arms, launcher=PYTHON)
    rows = {cells[1].strip(): cells[2:] for cells in (line.split("|") for line in output.splitlines()[-2:])}
    assert rows.keys() == set(arms)
    for cells in rows.values():
        rollout, sync, update, other, step, memory = map(float, cells[:6])
        assert rollout + sync + update + other == pytest.approx(step, abs=0.03)
        assert rollout > 0
        assert memory > 0


@pytest.mark.engine
def test_training_profile(tmp_path: Path) -> None:
    """The parts of an update after a short first step; the GPU, here the processor, works within each of them."""
    need_vllm()
    sizes = "--completions 2 --micro-batch 2 --group 2 --tokens 12 --first 3 --steps 2 --prompt 4".split()  # noqa: SIM905
    models = "--teacher 64 1 --theta 64 1 --vocabulary 300 --arms".split()  # noqa: SIM905
    numbers = tmp_path / "numbers.json"
    flags = [*sizes, *models, "dense, own", "--profile", "--limit", "500", "--json", numbers]
    output = run("benchmarks/training.py", *flags, launcher=PYTHON)
    found = json.loads(numbers.read_text())["arms"]["dense, own"]
    assert len(found["steps"]) == 2
    parts = found["profile"]["parts"]
    assert parts.keys() == {"sync", "loss", "divergences, within the loss", "backward", "optimizer", "all else"}
    assert all(part["busy"] > 0 and part["seconds"] > 0 for part in parts.values()), parts
    assert parts["divergences, within the loss"]["busy"] < parts["loss"]["busy"]
    whole = sum(parts[part]["seconds"] for part in ("loss", "backward", "optimizer", "all else"))
    assert whole == pytest.approx(found["update"] + found["other"])
    assert found["profile"]["kernels"]["matrix products"] > 0
    assert "_TiledLogProbabilitiesBackward" in found["profile"]["backward"], "our own backward pass"
    assert "| dense, own | backward | " in output


@pytest.mark.engine
def test_an_arm_that_takes_too_long_is_ended() -> None:
    """It fails with what it said, and the next one begins unless the call has no time left."""
    need_vllm()
    sizes = "--completions 2 --micro-batch 2 --group 2 --tokens 3 --steps 2 --prompt 4 --budget 1".split()  # noqa: SIM905
    arms = ("RAFT, mixture", "sampled token, own")
    ended = start("benchmarks/training.py", *sizes, "--arms", *arms, launcher=PYTHON)
    assert ended.returncode == 1
    for arm in arms:
        assert re.search(rf"^{arm}: (.*\n)*?ended after -?\d+ s$", ended.stderr, re.MULTILINE), ended.stderr


def test_training_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of `training.py` becomes a table; another card's is refused."""
    old = tables.stored("training")
    files = {name: tmp_path / f"{name}.json" for name in ("STORED", "PROFILES")}
    for name, file in files.items():
        monkeypatch.setattr(training_tables, name, file)
    files["STORED"].write_text(json.dumps(old))
    row = old["tables"]["256"]["arms"]["dense, own"]
    command = [*"recipes/benchmarks/training.py --shapes 7b 1.5b --tokens 2048 --micro-batch 4".split(), "--json", "x"]  # noqa: SIM905
    measured = {"device": old["device"], "command": command, "arms": {"dense, own": row, "TRL, distillation": row}}
    made = tmp_path / "made.json"
    made.write_text(json.dumps(measured))
    training_tables.keep("large", made)
    new = json.loads(files["STORED"].read_text())["tables"]
    assert new.pop("large") == {
        "command": f"python {' '.join(command[:-2])}",
        "arms": {"TRL, distillation": row, "dense, own": row},
    }
    assert new == old["tables"]
    made.write_text(json.dumps(measured | {"arms": {"dense, own": row | {"profile": {}}}}))
    training_tables.keep("", made)
    assert "profile" in json.loads(files["PROFILES"].read_text())["arms"]["dense, own"]
    made.write_text(json.dumps(measured | {"device": "NVIDIA H100"}))
    with pytest.raises(ValueError, match="wanted 'NVIDIA H200'"):
        training_tables.keep("large", made)


@pytest.mark.engine
def test_http_server() -> None:
    need_vllm()
    output = run("benchmarks/http_server.py", "--requests", "4", "--tokens", "3", "--rounds", "1", launcher=PYTHON)
    rows = [line.split("|")[1:-1] for line in output.splitlines() if re.match(r"\| (plain|mixture)", line)]
    assert [row[0].strip() for row in rows] == ["plain", "mixture, no records", "mixture"], output
    assert all(float(cell) > 0 for row in rows for cell in row[1:])


@pytest.mark.engine
def test_many_gpus() -> None:
    need_vllm()
    output = run("benchmarks/many_gpus.py", *TINY, "--processes", "2", launcher=PYTHON)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in re.findall(r"^\| \d.*", output, re.MULTILINE)]
    assert [row[0] for row in rows] == ["1", "2"], output
    assert all(float(row[1]) > 0 for row in rows)


@pytest.mark.engine
def test_weight_sync() -> None:
    need_vllm()
    if torch.cuda.device_count() < 2:
        assert "here are fewer than 2" in run_failing("benchmarks/weight_sync.py")
        return
    assert "over NCCL" in run("benchmarks/weight_sync.py", *TINY, launcher=PYTHON)


def test_engine_noise() -> None:
    """A line for each trainer and half: what rounding makes of 6 tokens, measured and small."""
    flags = [*TINY[6:], "--lengths", "6", "--rows", "2", "--backend", "transformers"]
    output = run("benchmarks/engine_noise.py", *flags)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in output.splitlines() if "| 6 |" in line]
    assert [row[:2] for row in rows] == [
        [trainer, half] for trainer in ("bfloat16", "float32 under autocast") for half in ("student", "mixture")
    ], output
    assert all(0 < float(row[3]) < 0.1 for row in rows[2:]), output  # the other two compute the same, bit by bit


def test_soak() -> None:
    flags = "--backend transformers --cycles 20 --warmup 2 --looks 2 --batch 2 --tokens 2".split()  # noqa: SIM905
    output = run("benchmarks/soak.py", *flags)
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in output.splitlines() if re.match(r"\| \d", line)
    ]
    assert [row[0] for row in rows] == ["0", "10", "20"], output
    assert all(len(row) == 8 for row in rows)
    assert len({row[2] for row in rows}) == 1, "open files"
    assert len(re.findall(r"first tenth .* tokens, last tenth .*%", output)) == 3


@pytest.mark.engine
def test_speculation(tmp_path: Path) -> None:
    """A line for each engine; the student drafts on a GPU alone, and an engine that could not start stops no other."""
    need_vllm()
    counts, numbers = ["0", "2"], tmp_path / "numbers.json"
    flags = [*TINY, "--dtype", "float32", "--k", *counts, "--epsilon", "0.05", "--json", numbers]
    ended = start("benchmarks/speculation.py", *flags, launcher=PYTHON)
    rows = json.loads(numbers.read_text())["rows"]
    assert [row["k"] for row in rows] == counts
    assert rows[0]["speed"] > 0
    assert "\n| 2 | 0.05 | " in ended.stdout.split("| k = 2 ÷ k = 0 |\n")[1], "the table of ratios"
    if torch.cuda.is_available():
        assert ended.returncode == 0
    else:
        assert "wanted a GPU" in ended.stderr
        assert ended.stderr.endswith("These engines have ended before: k = 2. What they said is above.\n")
