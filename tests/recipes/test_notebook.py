"""The notebook runs from top to bottom, teaches the student, and shows the page and the figures inline."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest

from helpers.paths import RECIPES, ROOT

NOTEBOOK = RECIPES / "quickstart.ipynb"
nbformat = pytest.importorskip("nbformat", reason="a package of the extra `dev` is missing: nbformat")
nbclient = pytest.importorskip("nbclient", reason="a package of the extra `dev` is missing: nbclient")


def outputs(notebook: Any, kind: str) -> list[str]:
    """Contents of one kind, such as `image/png`, among the outputs of all cells; `stdout` is what was printed."""
    every = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    if kind == "stdout":
        return [output.text for output in every if output.get("name") == kind]
    return [output.data[kind] for output in every if kind in output.get("data", {})]


def check(notebook: Any) -> None:
    """Both figures and the page are there, and the student's exact match has risen by more than luck explains.

    512 prompts at 0.02 have a standard error of 0.006: 0.2 more is out of its reach.
    """
    assert len(outputs(notebook, "image/png")) == 2
    (page,) = outputs(notebook, "text/html")
    assert page.startswith("<iframe srcdoc=")
    assert "Content-Security-Policy" in page
    (before, after) = re.findall(r"([\d.]+)% (?:before|after)", outputs(notebook, "stdout")[-1])
    assert float(after) > float(before) + 20


def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(RECIPES)]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    nbclient.NotebookClient(
        notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    check(notebook)


def test_the_outputs_in_the_repository_are_those_of_a_run() -> None:
    check(nbformat.read(NOTEBOOK, as_version=4))
