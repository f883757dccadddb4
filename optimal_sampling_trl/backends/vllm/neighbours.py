"""An engine among others in its process: what vLLM keeps once per process, and a shutdown would take from all of them.

Engines of this package may live side by side, and in a training job whose process group came first.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any, ClassVar
from unittest.mock import patch
from weakref import WeakSet

import torch.distributed as dist

PARALLEL_STATE = "vllm.distributed.parallel_state"
"""The module whose globals are the groups of the ranks of all engines."""
WORKSPACE = "vllm.v1.worker.workspace"
"""The module whose global is the scratch memory of the engine that was started last."""


class Neighbour:
    """One engine's part of what all engines of a process share. Make it before the engine starts.

    Attributes:
        group: torch's default process group from before the first of the open engines; None where there was none.
        workspace: the engine's scratch memory; None on a CPU.
    """

    _open: ClassVar[WeakSet[Neighbour]] = WeakSet()

    def __init__(self) -> None:
        first = next(iter(self._open), None)
        self.group: Any = process_group() if first is None else first.group
        self.workspace: Any = None
        forget_dead_groups()
        start_new_graph_pool()

    def enter(self) -> None:
        """Take the place of an engine that has just started."""
        self.workspace = _current_workspace()
        self._open.add(self)

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """Give the engine its own scratch memory inside the block."""
        with use_workspace(self.workspace):
            yield

    @contextmanager
    def leaving(self) -> Iterator[None]:
        """Let the engine shut down inside the block without taking anything from the others."""
        self._open.discard(self)
        forget_dead_groups()
        with protect_default_group(self.group), keep_parallel_groups(bool(self._open)), use_workspace(self.workspace):
            yield
        if _current_workspace() is self.workspace:
            import_module(WORKSPACE).reset_workspace_manager()
        self.workspace = None


def process_group() -> Any:
    """Return torch's default process group, or None where there is none yet."""
    return dist.group.WORLD if dist.is_available() and dist.is_initialized() else None


@contextmanager
def protect_default_group(group: Any) -> Iterator[None]:
    """Keep torch's default process group from being destroyed inside the block, if it is `group`.

    Symptom: after an engine in a training job is closed, the job's next collective fails: no process group.
    Cause: the shutdown of vLLM's core destroys torch's default group, whoever made it.
    Safe: a group from before the engine is kept from it; the groups that vLLM made are destroyed as usual.
    Upstream: none found.
    Delete when: test_a_group_from_before_the_engine_stays passes without this function.
    """
    if group is None or process_group() is not group:
        yield
        return
    destroy = dist.destroy_process_group

    def all_but(which: Any = None) -> None:
        if which is not None and which is not group:
            destroy(which)

    with patch.object(dist, "destroy_process_group", all_but):
        yield


@contextmanager
def keep_parallel_groups(has_others: bool) -> Iterator[None]:
    """Let a core that shuts down inside the block leave the groups of other engines alone, if there are any.

    Symptom: on a GPU, closing one of two engines in a process breaks the other: no pipeline group.
    Cause: the groups of the parallel ranks are the process's, and each core's shutdown destroys them.
    Safe: they stay until the last of this package's engines in the process is closed.
    Upstream: none found.
    Delete when: test_one_of_two_engines_is_closed passes on a GPU without this function.
    """
    if not has_others:
        yield
        return
    from vllm.v1.engine import core

    with patch.object(core, "cleanup_dist_env_and_memory", lambda *_, **__: None):
        yield


@contextmanager
def use_workspace(workspace: Any) -> Iterator[None]:
    """Make `workspace` the scratch memory that an engine writes to inside the block.

    Symptom: on a GPU, closing one of two engines breaks the other if it has experts: no workspace.
    Cause: experts write to one workspace of the process, which a start replaces and a shutdown drops.
    Safe: each engine keeps the one in its graphs, and has it back while it samples and shuts down.
    Upstream: none found.
    Delete when: vLLM's workspace belongs to the engine.
    """
    with patch.object(import_module(WORKSPACE), "_manager", workspace):
        yield


def forget_dead_groups() -> None:
    """Let vLLM forget the groups of its ranks that somebody destroyed.

    Symptom: beside an open engine a training job ends, and the next engine fails: no such process group.
    Cause: `destroy_process_group()` ends the groups that vLLM made, too, and vLLM goes on holding them.
    Safe: groups that are alive stay; an open engine of one rank never talks to its own.
    Upstream: none found.
    Delete when: test_groups_that_a_training_job_destroyed passes without this function.
    """
    state = import_module(PARALLEL_STATE)
    for name, value in list(vars(state).items()):
        if isinstance(value, state.GroupCoordinator) and _is_dead(value):
            setattr(state, name, None)


def _is_dead(group: Any) -> bool:
    try:
        dist.get_backend(group.device_group)
    except ValueError:
        return True
    return False


def _current_workspace() -> Any:
    return import_module(WORKSPACE)._manager


def start_new_graph_pool() -> None:
    """Let the next engine capture its graphs into a new pool.

    Symptom: an engine that is started after another was closed fails: `use_count > 0 INTERNAL ASSERT FAILED`.
    Cause: all engines of a process capture graphs into one pool, which torch frees with the last graph in it.
    Safe: each engine begins a pool of its own.
    Upstream: none found.
    Delete when: tests/backends/vllm/test_gpu.py passes in one process without this function.
    """
    from vllm.platforms import current_platform

    type(current_platform)._global_graph_pool = None
