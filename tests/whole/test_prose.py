"""The form of the package and the recipes: docstrings open with a verb or a thing, and what is read fits a screen."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.paths import RECIPES, ROOT

PACKAGE = ROOT / "optimal_sampling_trl"
FILES = sorted(PACKAGE.rglob("*.py"))
READ = [*FILES, *sorted(RECIPES.rglob("*.py"))]
QUESTIONS = {"What", "Whether", "Where", "Why", "How", "Which", "When", "Who"}
REPORTS = {"Returns", "Tells"}
"""Verbs that report what a function does, where a docstring commands it: Return, Tell."""
VAGUE = {"own", "theirs", "said", "left", "apart", "tails"}
"""Words that say nothing as the name of a variable."""
LONGEST_FILE, LONGEST_FUNCTION = 400, 80


def short(path: Path) -> str:
    return str(path.relative_to(ROOT))


def docstrings(path: Path) -> Iterator[tuple[int, str]]:
    """Line and text of each docstring: of modules, classes and functions, and those below a constant or a field."""
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        for each in node.body:
            match each:
                case ast.Expr(value=ast.Constant(value=str(text))):
                    yield each.lineno, text.strip()


def names(path: Path) -> Iterator[tuple[int, str]]:
    """Line and name of each variable that is assigned, and of each parameter."""
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.Name(id=name, ctx=ast.Store()) | ast.arg(arg=name):
                yield node.lineno, name


@pytest.mark.parametrize("path", READ, ids=short)
def test_a_docstring_opens_with_a_verb_or_a_thing(path: Path) -> None:
    other = [
        f"{short(path)}:{line}: {text.splitlines()[0]}"
        for line, text in docstrings(path)
        if text and text.split()[0].strip(",:") in QUESTIONS | REPORTS
    ]
    assert not other, "Begin these with a command, or with the thing that is returned:\n" + "\n".join(other)


@pytest.mark.parametrize("path", READ, ids=short)
def test_a_variable_is_named_for_what_it_holds(path: Path) -> None:
    vague = [f"{short(path)}:{line}: {name}" for line, name in names(path) if name in VAGUE]
    assert not vague, "Name these for what they hold:\n" + "\n".join(vague)


@pytest.mark.parametrize("path", FILES, ids=short)
def test_a_file_and_its_functions_fit(path: Path) -> None:
    text = path.read_text()
    lines = len(text.splitlines())
    assert lines <= LONGEST_FILE, f"{short(path)} has {lines} lines, wanted {LONGEST_FILE} at most: split it by noun"
    lengths = {
        f"{short(path)}:{node.lineno}: {node.name}": (node.end_lineno or 0) - node.lineno + 1
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    long = {name: length for name, length in lengths.items() if length > LONGEST_FUNCTION}
    assert not long, f"Functions of more than {LONGEST_FUNCTION} lines do more than one thing: {long}"
