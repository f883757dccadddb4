"""The student alone in the fused engine, for calls that need no teacher: the teacher's layers, head and caches rest.

It is a switch of the whole engine between calls, because a step's CUDA graph runs either both models or one. What the
steps in between leave in the prefix cache lacks the teacher's keys and values: the caller drops it
(`VLLMBackend.sample`).
"""

from __future__ import annotations

import copy
from typing import Any


def set_alone(runner: Any, alone: bool) -> None:
    """Let the steps from now on run the student alone, or both models again. No request may be unfinished.

    Args:
        runner: vLLM's model runner, V1 or V2.
        alone: whether the teacher rests.
    """
    runner.model.theta_alone = alone
    manager = getattr(runner, "cudagraph_manager", None)  # V2's; Model Runner V1 is the CPU's
    if manager is not None and manager.needs_capture():
        _use_graphs(runner, alone)


def _use_graphs(runner: Any, alone: bool) -> None:
    """Let a step replay the whole graphs of what runs, captured the first time.

    The pieces of piecewise graphs belong to one model each, and are not captured again.
    """
    graphs = runner.model.graphs
    graphs.setdefault(False, runner.cudagraph_manager)
    if alone not in graphs:
        runner.cudagraph_manager = copy.copy(graphs[False])
        runner.cudagraph_manager.graphs = {}
        try:
            runner.capture_model()
        except BaseException:
            runner.model.theta_alone, runner.cudagraph_manager = False, graphs[False]
            raise
        graphs[alone] = runner.cudagraph_manager
    runner.cudagraph_manager = graphs[alone]
