"""The documents name what exists: folders, files, commands, tests and links; the tree names every folder."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import yaml

from helpers.bad_inputs import CASES
from helpers.paths import ROOT
from optimal_sampling_trl import __version__
from optimal_sampling_trl.trainers.card import CITATION
from optimal_sampling_trl.trainers.presets import PRESETS

DOCUMENTS = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "recipes").rglob("*.md")],
    key=lambda path: str(path.relative_to(ROOT)),
)
GENERATED = {"__pycache__", ".venv", "output"}


def read_tree() -> dict[str, str]:
    """Each path of CONTRIBUTING.md's tree with its clause; a folder's name ends with a slash."""
    block = (ROOT / "CONTRIBUTING.md").read_text().split("## Where things are")[1].split("```")[1]
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


def mirrors(folder: str) -> bool:
    """Return True for a folder of tests that the tree's line for `tests/` stands for."""
    inside = folder.removeprefix("tests/")
    return inside != folder and ((ROOT / "optimal_sampling_trl" / inside).is_dir() or inside == "recipes/")


def test_the_tree_names_every_folder() -> None:
    folders = {f"{parent}/" for path in tracked() for parent in list(Path(path).parents)[:-1]}
    missing = sorted(folder for folder in folders - set(read_tree()) if not mirrors(folder))
    assert not missing, f"Give these folders a line with one clause in CONTRIBUTING.md's tree: {missing}"


def test_the_tree_names_nothing_that_is_gone() -> None:
    gone = [path for path in read_tree() if not (ROOT / path).exists()]
    assert not gone, f"CONTRIBUTING.md's tree names what is not there: move or delete the lines of {gone}"


def test_every_line_of_the_tree_has_a_clause() -> None:
    assert [path for path, clause in read_tree().items() if not clause] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_document_names_files_and_targets_that_exist(document: Path) -> None:
    text = document.read_text()
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"`make ([a-z]+)|^make ([a-z]+)", text, re.MULTILINE)) <= {
        pair for name in targets for pair in ((name, ""), ("", name))
    }
    if document.name == "CHANGELOG.md":  # it names files of older versions
        return
    named = re.findall(r"\b(?:recipes|tests|docs|optimal_sampling_trl)/[\w/]+\.\w+", text)
    links = [link for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text)]
    gone = [name for name in named if not (ROOT / name).exists()]
    gone += [link for link in links if not (document.parent / link).exists()]
    assert not gone, f"{document.relative_to(ROOT)} names {gone}"


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SHELL = re.compile(r"^```bash\n(.*?)^```", re.MULTILINE | re.DOTALL)
SERVER = "tests/backends/vllm/server/test_server.py"
RUN_BY = {
    "make demo": "tests/recipes/test_starters.py::test_demo",
    "make setup": "not run: needs the network, and is what sets the tests up",
    "make test": "the tests themselves",
    "make docs": "not run by a test: `make test` builds the site before it",
    "pip install": "not run: needs the network",
    "PYTHONPATH=recipes python first.py": "tests/whole/test_examples.py::test_it_has_an_example_that_runs",
    "python recipes/": "tests/recipes/test_recipes.py::test_every_script_is_run",
    "accelerate launch recipes/": "tests/recipes/test_recipes.py::test_every_script_is_run",
    "optimal-sampling ": "tests/cli/test_main.py::test_a_command_is_one_file",
    "curl ": f"{SERVER}::test_200_requests_at_once_with_strangers_among_them",
    "optimal-sampling-serve": f"{SERVER}::test_the_command_listens_on_loopback_unless_told",
}
"""The commands of README.md and docs/ by their beginnings: the test that runs each, or the reason why none does."""


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_a_command_is_run_by_a_test(page: Path) -> None:
    text = page.read_text()
    indented = "\n".join(
        re.findall(r"^ {4}((?:make|pip|python|accelerate|optimal-sampling\S*) .*)", text, re.MULTILINE)
    )
    for line in "".join([*SHELL.findall(text), indented]).replace("\\\n", "").splitlines():
        assert line.startswith((*RUN_BY, "#")), (
            f"{page.name}: say in RUN_BY which test runs `{line}`, or why none does"
        )


def test_the_tests_that_run_the_commands_exist() -> None:
    for place in RUN_BY.values():
        if place.startswith("tests/"):
            path, function = place.split("::")
            assert f"def {function}(" in (ROOT / path).read_text(), place


def test_the_version_is_the_same_wherever_one_cites_it() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors", "license", "references"} <= set(citation)
    assert citation["version"] == __version__
    cited = {work["url"] for work in citation["references"]}
    assert {preset.url for preset in PRESETS.values()} <= cited, "CITATION.cff lists the work behind each preset"
    (block,) = re.findall(r"```bibtex\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert block.strip() == CITATION.split("```bibtex\n")[1].split("```")[0].strip(), "a model's card cites otherwise"


def test_each_page_stands_in_the_navigation() -> None:
    listed = re.findall(r"^- \[[^]]+\]\(([^)#]+)\)", (ROOT / "docs" / "README.md").read_text(), re.MULTILINE)
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert pages - set(listed) == set(), "Give these pages a line in docs/README.md, the navigation of the site"


def test_the_tests_that_the_documents_name_exist() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", (ROOT / "docs" / "robustness.md").read_text())
    assert len(named) > 40
    for path, function in named:
        assert not function or f"def {function}(" in (ROOT / path).read_text(), f"{path} has no {function}"


def test_the_bad_inputs_of_the_document_are_those_that_are_tried() -> None:
    text = (ROOT / "docs" / "robustness.md").read_text()
    table = text.split("<details>")[1].split("</details>")[0]
    shown = re.findall(r"^\| (.+?) \| (?:\w*Error): ", table, re.MULTILINE)
    assert shown == list(CASES), (
        "Put the table that `python tests/helpers/bad_inputs.py` prints into docs/robustness.md"
    )
    counts = re.findall(r"(\d+) inputs", text)
    assert counts == [str(len(CASES))] * 2, counts


def test_the_examples_of_the_document_are_as_many_as_are_tried() -> None:
    """A number before a test of hypothesis is the number of its examples."""
    text = (ROOT / "docs" / "robustness.md").read_text()
    rows = re.findall(r"^\| .*?, (\d+)(?: examples| requests)? \| `(tests/[\w/]+\.py)::(\w+)` \|", text, re.MULTILINE)
    assert len(rows) >= 5
    for number, path, function in rows:
        decorators = (ROOT / path).read_text().split(f"def {function}(")[0].rsplit("\n\n", 1)[1]
        assert f"max_examples={number}" in decorators, f"{path}::{function} does not try {number} examples"
