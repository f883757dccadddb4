"""Serve the fused engine over HTTP with vLLM: `--teacher`, `--theta`, and all flags of `vllm serve`."""

from __future__ import annotations

from collections.abc import Sequence


def run(words: Sequence[str]) -> None:
    """Serve until the process is told to stop."""
    from ...backends.vllm.server.serve import main

    main(words)
