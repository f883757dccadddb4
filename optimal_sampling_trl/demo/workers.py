"""Work that runs side by side: a process and one thread for each core."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any, TypeVar

import torch
from tqdm import tqdm

T = TypeVar("T")


def side_by_side(work: Callable[..., T], jobs: Sequence[tuple[Any, ...]]) -> list[T]:
    """Return what `work` returns for each job, in their order; as many run at once as there are cores.

    Args:
        work: a function of a module, called in a process of its own, where torch has one thread.
        jobs: its arguments; what takes longest should stand first. A single job is done in this process.

    Raises:
        Exception: what `work` raised first.
    """
    if len(jobs) == 1:
        return [work(*jobs[0])]
    context = get_context("spawn")  # a fork would share torch's threads, and locks that they hold
    count = min(len(jobs), os.cpu_count() or 1)
    with ProcessPoolExecutor(count, context, initializer=_begin, initargs=(context.RLock(),)) as pool:
        return list(pool.map(work, *zip(*jobs, strict=True)))


def _begin(lock: Any) -> None:
    """Set up a process: a second thread on a busy machine makes small models slower, and two bars share a terminal."""
    torch.set_num_threads(1)
    tqdm.set_lock(lock)
