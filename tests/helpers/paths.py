"""Paths in a checkout, and the path that a program started by a test needs to find them."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).parents[2]
RECIPES, TESTS = ROOT / "recipes", ROOT / "tests"
PROCESSES = TESTS / "processes"
SEARCHED = [ROOT, TESTS, RECIPES, RECIPES / "benchmarks", RECIPES / "studies"]
"""The folders that the tests import from: the package's, the helpers', the recipes'."""


def python_path() -> str:
    """`PYTHONPATH` for a child process: `SEARCHED`, then the path of this one."""
    return os.pathsep.join([*map(str, SEARCHED), *filter(None, [os.environ.get("PYTHONPATH")])])
