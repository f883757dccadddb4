"""A trainer's `output_dir`: one trainer at a time, and the last checkpoint that a kill left whole."""

from __future__ import annotations

import json
import logging
import re
from contextlib import ExitStack
from pathlib import Path

from ..files import Lock

logger = logging.getLogger(__name__)

CHECKPOINT = re.compile(r"checkpoint-(\d+)")
LOCK = "_training.lock"
"""Held in `output_dir` while a trainer trains. Its name begins with an underscore, so the Hub is not sent the file."""


def lock_folder(folder: Path, stack: ExitStack) -> None:
    """Hold the lock of an `output_dir` until `stack` ends; warn where the system has no locks.

    Raises:
        RuntimeError: where another trainer holds it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        stack.enter_context(Lock(folder / LOCK, f"the trainer's `output_dir` {str(folder)!r}"))
    except (ImportError, OSError) as error:
        logger.warning("The folder %s is not locked against a second trainer: %s", folder, error)


def last_whole_checkpoint(output_dir: str | None) -> str:
    """Find the last checkpoint whose state, which is written last, is there.

    Returns:
        its folder.

    Raises:
        ValueError: where there is none.
    """
    found = {path: CHECKPOINT.fullmatch(path.name) for path in Path(output_dir or ".").glob("checkpoint-*")}
    numbers = {path: int(name[1]) for path, name in found.items() if name}
    for path in sorted(numbers, key=lambda path: numbers[path], reverse=True):
        try:
            json.loads((path / "trainer_state.json").read_text())
            return str(path)
        except (OSError, ValueError):
            logger.warning(
                "The checkpoint %s is not whole, since a kill came while it was written; it is skipped.", path
            )
    raise ValueError(
        f"`resume_from_checkpoint` is True, but {str(output_dir)!r} has no whole checkpoint. Name one, or train anew."
    )
