"""Runs `kernel_cases.py` and `dense_cases.py` in a process of their own: whether Triton interprets its kernels is
settled when it is imported, and vLLM on a CPU puts a placeholder in its place."""

from __future__ import annotations

import sys

import pytest
import torch

from helpers.children import run
from helpers.paths import PROCESSES, ROOT, python_path

CASES = [str(PROCESSES / name) for name in ("kernel_cases.py", "dense_cases.py")]


KEYS = """
import importlib
import triton.language as tl
from optimal_sampling_trl.mixture.kernels import blend, layout, nodes, steps

def keys():
    return [nodes.begin.cache_key, steps.step.cache_key, blend.blend.cache_key]

before = keys()
layout.ROW_ALPHA = tl.constexpr(31)
for module in (nodes, steps, blend):
    importlib.reload(module)
print([old != new for old, new in zip(before, keys())])
"""


def test_a_kernel_compiled_for_other_slots_is_not_loaded() -> None:
    """The key of Triton's cache on disk holds the globals that a kernel names, and no attribute of a module."""
    pytest.importorskip("triton", reason="no build of Triton for this system")
    environment = {"PYTHONPATH": python_path(), "TRITON_INTERPRET": "0"}
    done = run([sys.executable, "-c", KEYS], cwd=ROOT, environment=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split("\n")[-2] == "[True, True, True]"


def test_the_kernels_compiled_or_interpreted() -> None:
    pytest.importorskip("triton", reason="no build of Triton for this system")
    environment = {"PYTHONPATH": python_path()} | ({} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"})
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *CASES]
    done = run(command, cwd=ROOT, environment=environment)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
