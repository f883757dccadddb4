"""The end of a command that refuses what it is asked for: one line, and the exit status of argparse."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from traceback import walk_tb

STATUS = 2
"""The exit status with which argparse ends a command, too."""


@contextmanager
def refusals(command: str) -> Iterator[None]:
    """End the process with one line where the block raises a `ValueError` of this package's own lines.

    Such an error is a refusal. One that other lines raise, such as a user's reward, keeps its traceback.

    Args:
        command: the words that begin the line.
    """
    try:
        yield
    except ValueError as error:
        innermost = [frame for frame, _ in walk_tb(error.__traceback__)][-1]
        if str(innermost.f_globals.get("__name__")).split(".")[0] != __name__.split(".")[0]:
            raise
        print(f"{command}: {error}", file=sys.stderr)
        raise SystemExit(STATUS) from error
