"""Faults in the middle of a run: nothing is lost, nothing is doubled, and no number is wrong without a word.

Kills and full disks while sampling are in test_sampling_run.py, reloads in test_engine_reload.py, servers in
test_server.py.
"""

from __future__ import annotations

import json
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from helpers.children import run_two_ranks, wait_until
from helpers.engines import Oracle, request, start
from helpers.models import make_model
from helpers.oracle import check_rollout
from helpers.paths import PROCESSES, python_path
from helpers.training import Watch, load, make_trainer, make_untrained_pair, reward
from optimal_sampling_trl import Mixture, OptimalSamplingV1, Sampling, UnsolvedError, load_rollouts, sample_to_folder
from optimal_sampling_trl.backends.transformers import TransformersBackend, decoding
from optimal_sampling_trl.rollouts.folder import Key, RolloutFolder

PROMPTS = ["fine", "a z", "fine too", "zz", "ok", "the end"]
BROKEN = (1, 3)
"""Those of `PROMPTS` with the letter that the teacher cannot read."""


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A pair whose teacher returns NaN for what holds the letter z."""
    root = tmp_path_factory.mktemp("broken")
    teacher, theta = make_model(root / "teacher", "qwen2", 0), make_model(root / "theta", "qwen2", 1, tied=True)
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    with torch.no_grad():
        model.model.embed_tokens.weight[request("z").prompt_ids[0]] = torch.nan
        model.lm_head.weight[request("z").prompt_ids[0]] = 0.0
    model.save_pretrained(teacher)
    return teacher, theta


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return make_untrained_pair(tmp_path_factory.mktemp("pair"))


# A model that returns NaN for one request of many.


def test_the_others_come_with_the_error(broken: tuple[str, str]) -> None:
    """Two of six prompts fail, by name; the other rollouts are those of a call without the two."""
    sampler = OptimalSamplingV1(*broken, backend="transformers", device="cpu", theta_system_prompt=None)
    settings: dict[str, Any] = {"max_tokens": 6, "temperature": 0.7}
    words = r"in 2 request\(s\): request 1, token 0: the teacher returned NaN; request 3, token 0"
    with pytest.raises(UnsolvedError, match=words) as error:
        sampler.generate(PROMPTS, seed=0, **settings)
    caught = error.value
    assert tuple(caught.failed) == BROKEN
    assert [index for index, rollout in enumerate(caught.rollouts) if rollout is None] == list(BROKEN)
    theta, teacher = load(broken[1]), load(broken[0])
    for index, rollout in enumerate(caught.rollouts):
        if rollout is not None:
            check_rollout(rollout, teacher, theta)
            alone = sampler.generate([PROMPTS[index]], seed=index, **settings).rollouts[0]
            assert (alone.completion_ids, alone.text) == (rollout.completion_ids, rollout.text)
    back = pickle.loads(pickle.dumps(caught))  # as it goes from a process to another
    assert (str(back), back.failed) == (str(caught), caught.failed)


def test_a_run_leaves_them_out_and_names_them(
    broken: tuple[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Rollouts are kept in the same shard as the names of those that failed; a second run samples nothing."""
    sampler = OptimalSamplingV1(*broken, backend="transformers", device="cpu")
    run: dict[str, Any] = {"n": 2, "batch_size": 4, "sampling": Sampling(max_tokens=6), "use_tqdm": False}
    folder = sample_to_folder(sampler, PROMPTS, tmp_path / "run", **run)
    store = RolloutFolder(folder)
    wanted = [Key(prompt, sample) for prompt in range(6) for sample in range(2)]
    assert [key for path in store.shards() for key in store.keys(path)] == [k for k in wanted if k[0] not in BROKEN]
    failed = {key: reason for path in store.shards() for key, reason in store.failed(path).items()}
    assert failed == {key: "token 0: the teacher returned NaN" for key in wanted if key[0] in BROKEN}
    assert len(load_rollouts(folder)) == 8
    assert "4 rollouts could not be sampled" in caplog.text
    assert "sample 1 of prompt 3, token 0: the teacher returned NaN" in caplog.text
    assert "rollouts-000000.parquet, rollouts-000001.parquet" in caplog.text
    assert "| missing | 4, for which a model returned NaN |" in (folder / "README.md").read_text()
    before = {path: path.read_bytes() for path in store.shards()}
    sampler.backend.generate = None  # type: ignore[assignment, method-assign]
    sample_to_folder(sampler, PROMPTS, folder, **run)
    assert {path: path.read_bytes() for path in store.shards()} == before


def test_a_shard_whose_rollouts_all_failed_is_a_shard(broken: tuple[str, str], tmp_path: Path) -> None:
    """After good ones it is the prompts that are to blame; at the start it is the models, and the run stops."""
    sampler = OptimalSamplingV1(*broken, backend="transformers", device="cpu")
    run: dict[str, Any] = {"batch_size": 2, "sampling": Sampling(max_tokens=2), "use_tqdm": False}
    folder = sample_to_folder(sampler, ["a", "b", "z", "zz", "c"], tmp_path / "run", **run)
    store = RolloutFolder(folder)
    assert [len(store.keys(path)) for path in store.shards()] == [2, 0, 1]
    assert len(load_rollouts(folder)) == 3
    from datasets import load_dataset

    assert load_dataset(str(folder), split="train", cache_dir=str(tmp_path))["prompt_index"][:] == [0, 1, 4]
    with pytest.raises(UnsolvedError, match=r"in 2 request\(s\)"):
        sample_to_folder(sampler, ["z", "zz", "a"], tmp_path / "other", **run)


@pytest.mark.engine
def test_the_engine_loses_none_of_the_others(broken: tuple[str, str]) -> None:
    backend, oracle = start(*broken), Oracle(*broken)
    try:
        asked = [request(text, seed=index, max_tokens=6) for index, text in enumerate(PROMPTS)]
        with pytest.raises(UnsolvedError) as error:
            backend.generate(asked)
        assert tuple(error.value.failed) == BROKEN
        good = [index for index in range(6) if index not in BROKEN]
        oracle.check([error.value.rollouts[index] for index in good], [asked[index] for index in good])
    finally:
        backend.close()


def test_a_trainer_stops_by_name_and_its_checkpoint_is_whole(pair: tuple[str, str], tmp_path: Path) -> None:
    """The student turns NaN in the second step: the third step's rollouts stop the run, and step 1 is there."""

    class Breaks:
        def training_step(self, *positional: Any) -> Any:
            if self.state.global_step == 2:  # type: ignore[attr-defined]
                with torch.no_grad():
                    next(self.model.parameters()).fill_(torch.nan)  # type: ignore[attr-defined]
            return super().training_step(*positional)  # type: ignore[misc]

    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 5}
    trainer = make_trainer("grpo", pair, tmp_path, mixin=Breaks, **settings)
    with pytest.raises(UnsolvedError, match="the student returned NaN"):
        trainer.train()
    trainer.close()
    weights = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    assert all(bool(weight.isfinite().all()) for weight in weights.values())
    resumed = make_trainer("grpo", pair, tmp_path, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.state.global_step == 5


def test_a_failure_of_one_process_stops_both(pair: tuple[str, str], tmp_path: Path) -> None:
    """One of two ranks meets a NaN, and later one of two raises in its engine: neither waits in a collective."""
    process = run_two_ranks("one_rank_fails.py", *pair, tmp_path)
    files = [tmp_path / f"{rank}.json" for rank in (0, 1)]
    assert all(file.exists() for file in files), process.stderr[-3000:]
    other, failed = (json.loads(file.read_text()) for file in files)
    assert failed["nan"].startswith("UnsolvedError: The mixture has no solution in 6 request(s): request 0, token 0")
    assert other["nan"].startswith("RuntimeError: Process 1 could not do its part, and all stop: UnsolvedError: The")
    assert "RuntimeError: Another writer (process" in other["folder"]
    assert failed["folder"].startswith(
        "RuntimeError: Process 0 could not do its part, and all stop: RuntimeError: Ano"
    )


# Checkpoints.


@pytest.mark.parametrize("backend", ["transformers", pytest.param("vllm", marks=pytest.mark.engine)])
@pytest.mark.parametrize("damage", ["cut", "header", "empty", "missing shard", "index"])
def test_a_truncated_checkpoint_is_named(tmp_path: Path, backend: str, damage: str) -> None:
    if backend == "vllm":
        pytest.importorskip("vllm")
    teacher, theta = make_model(tmp_path / "teacher", "qwen2", 0), make_model(tmp_path / "theta", "qwen2", 1)
    file = Path(theta) / "model.safetensors"
    whole = file.read_bytes()
    if damage in ("missing shard", "index"):
        load(theta).save_pretrained(theta, max_shard_size="50KB")
        file.unlink(missing_ok=True)
        if damage == "index":
            (index,) = Path(theta).glob("*.index.json")
            index.write_text(index.read_text()[:50])
        else:
            next(Path(theta).glob("model-00002*")).unlink()
    else:
        file.write_bytes({"cut": whole[: len(whole) // 2], "header": whole[:20], "empty": b""}[damage])
    arguments = {} if backend == "vllm" else {"device": "cpu"}
    with pytest.raises(
        ValueError, match=r"The student '.*' cannot be loaded: .* is missing or was cut short \(.*\)\. Wanted"
    ):
        OptimalSamplingV1(teacher, theta, backend=backend, **arguments)


def test_a_checkpoint_that_a_kill_cut_is_not_resumed_from(
    pair: tuple[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3}
    make_trainer("grpo", pair, tmp_path, **settings).train()
    (tmp_path / "checkpoint-3" / "trainer_state.json").unlink()
    state = tmp_path / "checkpoint-2" / "trainer_state.json"
    state.write_text(state.read_text()[:100])
    resumed = make_trainer("grpo", pair, tmp_path, mixin=Watch, **settings)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 3
    assert len(resumed.generations) == 2, "it went on from the first"
    assert "checkpoint-3 is not whole" in caplog.text
    assert "checkpoint-2 is not whole" in caplog.text
    with pytest.raises(ValueError, match="has no whole checkpoint"):
        make_trainer("grpo", pair, tmp_path / "none", **settings).train(resume_from_checkpoint=True)


# Trainers.


@pytest.mark.parametrize(
    ("kind", "term"), [("grpo", {}), ("raft", {"dense_coefficient": 1.0, "dense_fade": 0.9})], ids=["grpo", "raft"]
)
def test_a_reward_that_raises_costs_no_step(
    pair: tuple[str, str], tmp_path: Path, kind: str, term: dict[str, float]
) -> None:
    """It fails in the third step; a run resumed from the second ends with the weights of one that nothing stopped.

    RAFT's dense term fades over both, and is not gone where the run goes on.
    """
    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 4, **term}
    calls = 0

    def fails(completions: Any, **columns: Any) -> list[float]:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise ZeroDivisionError("the user's own")
        return reward(completions, **columns)

    trainer = make_trainer(kind, pair, tmp_path / "run", trainer={"reward_funcs": fails}, **settings)
    with pytest.raises(ZeroDivisionError, match="the user's own"):
        trainer.train()
    trainer.close()
    resumed = make_trainer(kind, pair, tmp_path / "run", **settings)
    resumed.train(resume_from_checkpoint=True)
    whole = make_trainer(kind, pair, tmp_path / "whole", **settings)
    whole.train()
    assert_same_weights(resumed.model, whole.model)


def assert_same_weights(one: Any, other: Any) -> None:
    for (name, weight), wanted in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.allclose(weight, wanted, atol=1e-6), name


def test_two_trainers_in_one_folder(pair: tuple[str, str], tmp_path: Path) -> None:
    """The second is refused while the first trains, and may train after it; the first notices nothing."""
    second = make_trainer("rloo", pair, tmp_path, max_steps=1)

    def meanwhile(completions: Any, **columns: Any) -> list[float]:
        with pytest.raises(
            RuntimeError, match=rf"process {os.getpid()} on .* has the trainer's `output_dir` '.*' open"
        ):
            second.train()
        return reward(completions, **columns)

    first = make_trainer("grpo", pair, tmp_path, trainer={"reward_funcs": meanwhile}, max_steps=2)
    first.train()
    assert first.state.global_step == 2
    second.train()
    assert second.state.global_step == 1


def train_in_a_process(pair: tuple[str, str], folder: Path) -> subprocess.Popen[bytes]:
    with (folder.parent / "log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, str(PROCESSES / "train_and_resume.py"), *pair, str(folder)],
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": python_path()},
            stdout=log,
            stderr=log,
        )


def test_a_trainer_killed_at_any_moment(pair: tuple[str, str], tmp_path: Path) -> None:
    """kill -9 twice, some milliseconds after the next checkpoint's folder appeared, which may cut it: in the end
    the weights are those of a run that nothing interrupted."""
    chance, folder = random.Random(1), tmp_path / "run"
    for step in (3, 7):
        process = train_in_a_process(pair, folder)
        checkpoint = folder / f"checkpoint-{step}"
        wait_until(lambda: checkpoint.exists() or process.poll() is not None, process.pid, pause=0.001)  # noqa: B023
        assert checkpoint.exists(), (tmp_path / "log").read_text()[-3000:]
        time.sleep(chance.uniform(0, 0.03))
        process.send_signal(signal.SIGKILL)
        process.wait()
    process = train_in_a_process(pair, folder)
    wait_until(lambda: process.poll() is not None, process.pid, tmp_path / "log")
    assert process.returncode == 0, (tmp_path / "log").read_text()[-3000:]
    whole = make_trainer("grpo", pair, tmp_path / "whole", max_steps=10)
    whole.train()
    weights = load_file(folder / "checkpoint-10" / "model.safetensors")
    for name, weight in whole.model.named_parameters():
        assert name not in weights or torch.allclose(weights[name], weight, atol=1e-6), name
    assert len(weights) > 10


# Memory, clocks.


def test_out_of_memory_leaves_a_backend_that_samples(broken: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    backend = TransformersBackend(*broken, device="cpu")
    asked = [request(text, seed=index) for index, text in enumerate(("fine", "fine too", "ok"))]
    wanted = [rollout.completion_ids for rollout in backend.generate(asked)]
    calls, forward = iter(range(100)), decoding.Reader._forward

    def full(*arguments: Any) -> None:
        if next(calls) == 7:
            raise torch.OutOfMemoryError("CUDA out of memory")
        forward(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(decoding.Reader, "_forward", full)
        with pytest.raises(torch.OutOfMemoryError):
            backend.generate(asked)
    assert [rollout.completion_ids for rollout in backend.generate(asked)] == wanted


@pytest.fixture
def engine(broken: tuple[str, str]) -> Iterator[Any]:
    backend = start(*broken)
    yield backend
    backend.close()


@pytest.mark.engine
def test_out_of_memory_leaves_an_engine_that_samples(
    broken: tuple[str, str], engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that runs out of memory in the middle of a batch: the call fails, and the next one is right."""
    asked = [request(text, seed=index) for index, text in enumerate(("fine", "fine too", "ok"))]
    model = engine.llm.llm_engine.model_executor.driver_worker.worker.model_runner.model
    calls, forward = iter(range(100)), model.theta.forward

    def full(*arguments: Any, **keywords: Any) -> Any:
        if next(calls) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(*arguments, **keywords)

    with monkeypatch.context() as patched:
        patched.setattr(model.theta, "forward", full)
        with pytest.raises(torch.OutOfMemoryError):
            engine.generate(asked)
    assert not engine.llm.llm_engine.has_unfinished_requests()
    Oracle(*broken).check(engine.generate(asked), asked)


@pytest.mark.engine
@pytest.mark.skipif(not torch.cuda.is_available(), reason="the memory of a GPU, which an allocator hands out")
def test_memory_of_a_gpu_that_ends(broken: tuple[str, str], engine: Any) -> None:
    """Nothing is left of the share that this process may take: torch refuses in the middle of a step."""
    asked = [request(text, seed=index) for index, text in enumerate(("fine", "fine too", "ok"))]
    engine.generate(asked)
    ballast, size = [], 1 << 20
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(torch.cuda.memory_reserved() / torch.cuda.mem_get_info()[1])
    try:
        while size >= 512:
            try:
                ballast.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
            except torch.OutOfMemoryError:
                size //= 2
        with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
            engine.generate(asked)
    finally:
        ballast.clear()
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert not engine.llm.llm_engine.has_unfinished_requests()
    Oracle(*broken).check(engine.generate(asked), asked)


def backwards(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """The wall clock jumps to and fro by up to a day at each look; returns how often it was looked at."""
    chance, true, looks = random.Random(0), time.time, []

    def jumps() -> float:
        looks.append(None)
        return true() + chance.uniform(-86400, 86400)

    monkeypatch.setattr(time, "time", jumps)
    return lambda: len(looks)


def test_a_clock_that_jumps(pair: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the folder of a sampled run nor a trained model depends on the time of day; rates stay positive."""
    sampler = OptimalSamplingV1(*pair, backend="transformers", device="cpu")
    run: dict[str, Any] = {"n": 3, "batch_size": 4, "sampling": Sampling(max_tokens=6), "seed": 1}
    texts = ["1=", "22=", "31="]
    steady = sample_to_folder(sampler, texts, tmp_path / "steady", use_tqdm=False, **run)
    trainers = [make_trainer("grpo", pair, tmp_path / "a", max_steps=2)]
    trainers[0].train()
    looks = backwards(monkeypatch)
    jumping = sample_to_folder(sampler, texts, tmp_path / "jumping", use_tqdm=True, **run)
    trainers.append(make_trainer("grpo", pair, tmp_path / "b", max_steps=2))
    trainers[1].train()
    assert looks() > 0
    for path in RolloutFolder(steady).shards():
        assert path.read_bytes() == (jumping / "data" / path.name).read_bytes()
    assert_same_weights(*(trainer.model for trainer in trainers))
    rates = [log["mixture/tokens_per_second"] for log in trainers[1].state.log_history if "alpha/mean" in log]
    assert len(rates) == 2
    assert all(0 < rate < 1e6 for rate in rates)


def test_mixture_of_the_failed_ones_is_theirs(broken: tuple[str, str]) -> None:
    """With the student alone a request is named, too: its record of the teacher is no number."""
    backend = TransformersBackend(*broken, device="cpu")
    with pytest.raises(UnsolvedError) as error:
        backend.generate([request("ok"), request("z", Mixture.theta_only())])
    assert error.value.failed == {1: "token 0: the teacher returned NaN"}
