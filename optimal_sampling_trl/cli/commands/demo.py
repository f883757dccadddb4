"""Train a tiny student that sorts digits in three ways, side by side on a CPU, and draw what it learned."""

from __future__ import annotations

from collections.abc import Sequence

from ...demo.run import main


def run(words: Sequence[str]) -> None:
    """Run the demo."""
    main(words, prog="optimal-sampling demo")
