"""A trainer's `output_dir`: one trainer at a time, the last checkpoint that a kill left whole, and what it keeps."""

from __future__ import annotations

import json
import logging
import os
import re
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..files import Lock, write_atomically
from ..user_warnings import warn_user
from .generator import OptimalSamplingGenerator

logger = logging.getLogger(__name__)

CHECKPOINT = re.compile(r"checkpoint-(\d+)")
LOCK = "_training.lock"
"""Held in `output_dir` while a trainer trains. Its name begins with an underscore, so the Hub is not sent the file."""
SETTINGS = "optimal_sampling.json"
"""The file of a checkpoint that keeps the generator's settings."""
SAME_ROLLOUTS = ("backend", "dense", "engine_arguments")
"""Fields of the generator that say how rollouts are computed and what they carry: a resumed run may change them."""


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


def keep_settings(checkpoint: Path, generator: OptimalSamplingGenerator) -> None:
    """Write into a checkpoint's folder what its rollouts are sampled from."""
    write_atomically(checkpoint / SETTINGS, json.dumps(_settings(generator), indent=2).encode())


def warn_of_other_settings(checkpoint: Path, generator: OptimalSamplingGenerator) -> None:
    """Warn where a checkpoint's rollouts were sampled from something else; be silent where it does not say."""
    try:
        kept = json.loads((checkpoint / SETTINGS).read_text())
    except (OSError, ValueError):
        return
    now = _settings(generator)
    changed = [
        f"`{name}` was {kept[name]!r}, is {value!r}"
        for name, value in now.items()
        if kept.get(name, value) != value and not (name == "teacher" and _one_folder(kept[name], value))
    ]
    if changed:
        warn_user(
            f"The checkpoint {str(checkpoint)!r} was trained with other settings of `generator`: {'; '.join(changed)}."
            " Training goes on with the new ones. Pass the old ones to go on as it began."
        )


def _one_folder(first: Any, second: Any) -> bool:
    """Return True for two spellings of one folder."""
    return all(isinstance(path, str) and os.path.isdir(path) for path in (first, second)) and os.path.samefile(
        first, second
    )


def _settings(generator: OptimalSamplingGenerator) -> dict[str, Any]:
    """Return what a generator samples from, in JSON's types, by the words that set it."""
    others = ("teacher", "mixture", *SAME_ROLLOUTS)
    settings = {each.name: getattr(generator, each.name) for each in fields(generator) if each.name not in others}
    teacher = generator.named_teacher
    return {
        "teacher": getattr(teacher, "name_or_path", teacher),
        "engine_arguments.revision": (generator.engine_arguments or {}).get("revision"),
        **{f"mixture.{name}": value for name, value in generator.mixture.to_dict().items()},
        **settings,
    }
