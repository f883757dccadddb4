"""The graph of imports: no circle, arrows between folders that go one way, and libraries that stay in their room.

All imports count, those in functions and for types, too. The package's own `__init__.py` hands names on when they are
first used, so that what it names is no arrow of its own.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pytest

from helpers.paths import ROOT

NAME = "optimal_sampling_trl"
PACKAGE = ROOT / NAME

FLOORS = (
    "options",
    "user_warnings",
    "files",
    "mixture.presets",
    "mixture.settings",
    "mixture.folding",
    "mixture.arithmetic",
    "mixture.swap",
    "mixture.solver",
    "mixture.kernels",
    "mixture",
    "losses",
    "divergences",
    "metrics",
    "pairing",
    "rollouts",
    "viewer",
    "page",
    "panels",
    "plots",
    "backends.transformers",
    "backends.vllm",
    "backends.vllm.worker",
    "backends.vllm.server",
    "backends",
    "output",
    "generate",
    "sampling_run",
    "probe",
    "trainers.generator",
    "trainers.engines",
    "trainers",
    "demo",
    "cli",
    "cli.commands",
)
"""The folders, and modules that stand alone, from the ground up: each imports from those before it. The longest entry
that a module's name begins with is its own."""
TRL = ("trainers", "demo", "cli")
"""Rooms that are made of TRL's trainers and its parser."""
AT_THE_TOP = {"vllm": ("backends.vllm.worker",), "triton": ("mixture.kernels",), "trl": TRL}
"""Where a library may be imported at the top of a file, which makes it needed as soon as the file is read."""
ANYWHERE = {"vllm": ("backends.vllm",), "triton": ("mixture.kernels",), "trl": TRL}
"""Where it may be imported at all, in a function or for types."""


class Arrow(NamedTuple):
    """An import of `target`, a module's dotted name, in a line of `source`."""

    source: str
    line: int
    target: str
    is_at_the_top: bool

    def __str__(self) -> str:
        return f"{path_of(self.source).relative_to(ROOT)}:{self.line} imports {self.target or NAME}"


def path_of(module: str) -> Path:
    """The file of one of the package's modules, whose name is written without the package's."""
    place = PACKAGE.joinpath(*filter(None, module.split(".")))
    return place / "__init__.py" if place.is_dir() else place.with_suffix(".py")


MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").removesuffix(".")
    for path in PACKAGE.rglob("*.py")
}


def imports(module: str) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    """Each import in a module, and whether it is carried out when the module is read."""
    tree = ast.parse(path_of(module).read_text())
    later = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        or (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node, id(node) not in later


def targets(module: str, node: ast.Import | ast.ImportFrom) -> list[str]:
    """What an import names, in full; a name that is a module counts as that module."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not node.level:
        return [str(node.module)]
    folder = [NAME, *path_of(module).relative_to(PACKAGE).parent.parts]
    home = [*folder[: len(folder) - node.level + 1], *(node.module or "").split(".")]
    place = ".".join(filter(None, home))
    inside = {alias.name: f"{place}.{alias.name}" for alias in node.names}
    return sorted({full if full.removeprefix(f"{NAME}.") in MODULES else place for full in inside.values()})


def arrows() -> list[Arrow]:
    """Every import of the package but for those of its `__init__.py`."""
    return [
        Arrow(module, node.lineno, target, at_the_top)
        for module in sorted(MODULES - {""})
        for node, at_the_top in imports(module)
        for target in targets(module, node)
    ]


ARROWS = arrows()
INNER = [
    arrow._replace(target=arrow.target.removeprefix(NAME).removeprefix("."))
    for arrow in ARROWS
    if arrow.target.split(".")[0] == NAME
]


def circle(graph: dict[str, set[str]]) -> list[str]:
    """The modules of one circle in their order, the first again at the end; empty where there is none."""
    done: set[str] = set()

    def search(module: str, way: list[str]) -> list[str]:
        if module in way:
            return [*way[way.index(module) :], module]
        if module in done:
            return []
        for target in sorted(graph.get(module, ())):
            if found := search(target, [*way, module]):
                return found
        done.add(module)
        return []

    return next((found for module in sorted(graph) if (found := search(module, []))), [])


def floor_of(module: str) -> str:
    """The entry of `FLOORS` that a module belongs to."""
    homes = [floor for floor in FLOORS if module == floor or module.startswith(f"{floor}.")]
    assert homes, f"{path_of(module).relative_to(ROOT)} is on no floor. Add it to FLOORS in {Path(__file__).name}."
    return max(homes, key=len)


def test_a_circle_is_found() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_there_is_no_circle() -> None:
    graph: dict[str, set[str]] = {}
    for arrow in INNER:
        if arrow.target:  # the package's own `__init__.py` is asked for the version
            graph.setdefault(arrow.source, set()).add(arrow.target)
    found = circle(graph)
    lines = [str(arrow) for arrow in INNER for step in pairwise(found) if (arrow.source, arrow.target) == step]
    assert not found, f"{' -> '.join(found)}. Open one of these and take its import out: {lines}"


def test_arrows_between_folders_go_down() -> None:
    wrong = [
        str(arrow)
        for arrow in INNER
        if arrow.target and FLOORS.index(floor_of(arrow.source)) < FLOORS.index(floor_of(arrow.target))
    ]
    assert not wrong, f"These import from above. Open each, and move what it needs down, or itself up: {wrong}"


def test_every_floor_is_there() -> None:
    gone = [floor for floor in FLOORS if not path_of(floor).exists()]
    assert not gone, f"FLOORS names what is not in the package any more: {gone}"


@pytest.mark.parametrize("library", AT_THE_TOP)
def test_a_library_stays_in_its_room(library: str) -> None:
    for rooms, only_top in ((AT_THE_TOP, True), (ANYWHERE, False)):
        inside = rooms[library]
        wrong = [
            str(arrow)
            for arrow in ARROWS
            if arrow.target.split(".")[0] == library
            and (arrow.is_at_the_top or not only_top)
            and not any(arrow.source == room or arrow.source.startswith(f"{room}.") for room in inside)
        ]
        how = "at the top of a file " if only_top else ""
        assert not wrong, f"{library} is imported {how}outside of {inside}. Open each and move the import: {wrong}"


def test_no_private_name_crosses_a_file() -> None:
    wrong = [
        f"{path_of(module).relative_to(ROOT)}:{node.lineno} imports {alias.name}"
        for module in sorted(MODULES)
        for node, _ in imports(module)
        if isinstance(node, ast.ImportFrom) and node.level
        for alias in node.names
        if alias.name.startswith("_") and not alias.name.startswith("__")
    ]
    assert not wrong, f"Make these public where they are defined, or move their user there: {wrong}"
