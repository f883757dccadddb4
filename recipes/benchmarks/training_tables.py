# /// script
# dependencies = ["optimal-sampling-trl"]
# ///
"""Keep what `training.py --json` wrote among the stored measurements, each file as a table of its own.

    python recipes/benchmarks/training_tables.py '7b, 2 048 tokens=output/7b.json'

`tables.py` then draws it with the others. A measurement of another card than the stored ones is refused. What
`--profile` recorded is kept in a file beside theirs.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from decoding import MEASURED

STORED, PROFILES = (MEASURED.with_name(name) for name in ("training.json", "training_profile.json"))
PARTS = ("rollout", "sync", "update", "other", "step")
"""The seconds of a training step, in the order of the columns."""
ARMS = (
    "TRL, GRPO", "GRPO, half mixture", "RAFT, mixture", "TRL, distillation", "dense, own", "dense, mixture",
    "sampled token, own", "sampled token, mixture", "divergence, own", "divergence, mixture",
)  # fmt: skip
"""The arms of `training.py` without drafts."""
HERE = ("--json", "--folder", "--pair", "--limit", "--budget")
"""Flags of a command that change nothing that is measured."""


class Size(NamedTuple):
    """The sizes of a training step: teacher, student, and tokens of a completion."""

    teacher: str
    student: str
    tokens: int


def size_of(command: str) -> tuple[Size, int]:
    """Return the size of the step that a command measures, and its completions of a forward pass."""
    flags = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    flags.add_argument("--shapes", nargs=2)
    flags.add_argument("--tokens", type=int, default=256)
    flags.add_argument("--micro-batch", type=int, default=8)
    found, _ = flags.parse_known_args(shlex.split(command))
    return Size(*found.shapes, found.tokens), found.micro_batch


def steps(arms: Mapping[str, Any]) -> Iterator[str]:
    """Lines of a table of docs/performance.md: parts of a training step, their ratios to TRL's trainer, each step.

    Args:
        arms: what a call measured, by the arm's name, each of TRL's before those that are compared with it.
    """
    base: dict[str, Any] = {}
    for name, found in arms.items():
        base = found if name.startswith("TRL") else base
        yield f"{line(name, found, base)} {', '.join(f'{seconds:.1f}' for seconds in found['steps'])} |"


def line(name: str, found: Mapping[str, Any], base: Mapping[str, Any]) -> str:
    """The line of a trainer: seconds of each part, GiB, and step and GiB over those of `base`, if there is one."""
    ratios = [f"{found[column] / base[column]:.2f}" if base else "" for column in ("step", "GiB")]
    return "| " + " | ".join([name, *(f"{found[part]:.2f}" for part in PARTS), f"{found['GiB']:.1f}", *ratios]) + " |"


def profiled(name: str, profile: Mapping[str, Any]) -> Iterator[str]:
    """Lines of two tables: seconds of the parts of an arm's step and of the GPU in them, and of groups of kernels."""
    yield "| arm | part | s | the GPU works, s | share |\n|---|---|--:|--:|--:|"
    for part, took in profile["parts"].items():
        share = f"{took['busy'] / took['seconds']:.0%}".replace("%", " %")
        yield f"| {name} | {part} | {took['seconds']:.3f} | {took['busy']:.3f} | {share} |"
    yield "\n| arm | kernels | s | share |\n|---|---|--:|--:|"
    whole = sum(profile["kernels"].values())
    for group, seconds in profile["kernels"].items():
        yield f"| {name} | {group} | {seconds:.3f} | {seconds / whole:.0%} |".replace("%", " %")


def rounded(found: Any) -> Any:
    """Return numbers of four places in place of all."""
    if isinstance(found, dict):
        return {name: rounded(each) for name, each in found.items()}
    if isinstance(found, list):
        return [rounded(each) for each in found]
    return round(found, 4) if isinstance(found, float) else found


def kept(measured: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a call wrote as it is stored: its command, and the arms in the order of `ARMS`."""
    words = list(measured["command"])
    for flag in HERE:
        if flag in words:
            del words[words.index(flag) : words.index(flag) + 2]
    arms = {name: measured["arms"][name] for name in (*ARMS, *measured["arms"]) if name in measured["arms"]}
    return {"command": shlex.join(["python", *words]), "arms": rounded(arms)}


def as_text(found: Any) -> str:
    """Return JSON with a line for each list of numbers."""
    lists = re.compile(r"\[\s+([^][{}]*?)\s+\]")
    return lists.sub(lambda each: f"[{' '.join(each[1].split())}]", json.dumps(found, indent=1)) + "\n"


def keep(name: str, file: Path) -> None:
    """Store a file of `training.py`; what it recorded of kernels goes into the other file.

    Raises:
        ValueError: where it is of another card than those that are stored.
    """
    measured, stored = json.loads(file.read_text()), json.loads(STORED.read_text())
    if measured["device"] != stored["device"]:
        raise ValueError(f"{file} is of {measured['device']!r}; wanted {stored['device']!r}, whose tables are stored")
    table = kept(measured)
    if any("profile" in found for found in table["arms"].values()):
        PROFILES.write_text(as_text({"device": measured["device"]} | table))
        return
    stored["tables"][name] = table
    STORED.write_text(as_text(stored))


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("tables", nargs="+", metavar="NAME=FILE", help="a table's name, and what --json wrote")
    for each in flags.parse_args().tables:
        name, _, file = each.rpartition("=")
        keep(name, Path(file))


if __name__ == "__main__":
    main()
