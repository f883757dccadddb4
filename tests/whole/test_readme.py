"""The README's tree is the folders' own, and its commands and names exist."""

from __future__ import annotations

import re
import subprocess

import pytest

import optimal_sampling_trl
from helpers.paths import ROOT

README = (ROOT / "README.md").read_text()
GENERATED = {"__pycache__", ".venv", "output"}


def read_tree() -> dict[str, str]:
    """Each path of the README's tree with its clause; a folder's name ends with a slash."""
    block = README.split("## The tree")[1].split("```")[1]
    folders: list[str] = []
    tree = {}
    for line in block.strip().splitlines():
        indent, name, clause = re.match(r"( *)(\S+) *(.*)", line).groups()  # type: ignore[union-attr]
        del folders[len(indent) // 2 :]
        tree["".join(folders) + name] = clause
        if name.endswith("/"):
            folders.append(name)
    return tree


def tracked() -> set[str]:
    """The files of the checkout, without what git ignores."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode:  # a copy that is no checkout
        files = [path.relative_to(ROOT) for path in ROOT.rglob("*") if path.is_file()]
        return {str(path) for path in files if not GENERATED & set(path.parts)}
    return {path for path in listed.stdout.splitlines() if (ROOT / path).exists()}


def test_the_tree_is_the_folders_own() -> None:
    files = {path for path in read_tree() if not path.endswith("/")}
    assert files - tracked() == set(), "the README's tree names files that are not there"
    assert tracked() - files == set(), "files that the README's tree does not name"


def test_every_file_has_a_clause() -> None:
    assert [path for path, clause in read_tree().items() if not (clause or path.endswith("/"))] == []


def test_the_commands_name_files_and_targets_that_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"\bmake ([a-z]+)", README)) <= targets
    for path in re.findall(r"(?:recipes|tests)/[\w/]+\.\w+", README):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize(
    "name", sorted(set(re.findall(r"^[+ ]?from optimal_sampling_trl import (.*)$", README, re.M)))
)
def test_the_imports_of_the_examples_work(name: str) -> None:
    for item in name.split(","):
        assert hasattr(optimal_sampling_trl, item.strip())


def test_the_tests_that_the_documents_name_exist() -> None:
    named = re.findall(r"`(tests/\w+\.py)(?:::(\w+))?`", (ROOT / "docs" / "robustness.md").read_text())
    assert len(named) > 40
    for path, function in named:
        assert f"def {function}" in (ROOT / path).read_text(), f"{path} has no {function}"
