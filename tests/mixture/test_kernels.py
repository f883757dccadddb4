"""Runs `kernel_cases.py` in a process of its own: whether Triton interprets its kernels is settled when it is
imported, and vLLM on a CPU puts a placeholder in its place."""

from __future__ import annotations

import sys

import pytest
import torch

from helpers.children import run
from helpers.paths import PROCESSES, ROOT, python_path

CASES = PROCESSES / "kernel_cases.py"


def test_the_kernels_compiled_or_interpreted() -> None:
    pytest.importorskip("triton", reason="no build of Triton for this system")
    environment = {"PYTHONPATH": python_path()} | ({} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"})
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(CASES)]
    done = run(command, cwd=ROOT, environment=environment)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
