"""The wheel builds, holds what the package needs and nothing else, and works from where it was installed.

It is installed alone into a folder that goes before the checkout; `make wheel` does the same in a bare environment.
"""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

import pytest

import optimal_sampling_trl
from helpers.children import run as run_to_its_end
from helpers.paths import ROOT, TESTS

PACKAGE = ROOT / "optimal_sampling_trl"


def run(*command: object, cwd: Path, path: str = "") -> str:
    settings = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = run_to_its_end([sys.executable, *command], cwd=cwd, environment=settings)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("wheel")
    run("-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, ROOT, cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


def test_it_holds_the_package_alone(wheel: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    files = {path for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert names == {str(path.relative_to(ROOT)) for path in files}
    assert wheel.name == f"optimal_sampling_trl-{optimal_sampling_trl.__version__}-py3-none-any.whl"


def test_the_version_stands_in_one_place() -> None:
    version = f'"{optimal_sampling_trl.__version__}"'
    text = {path: path.read_text() for path in (ROOT / "pyproject.toml", *PACKAGE.rglob("*.py"))}
    assert [path.name for path, content in text.items() if version in content] == ["__init__.py"]
    newest = (ROOT / "CHANGELOG.md").read_text().split("\n## ")[1].splitlines()[0]
    assert newest.startswith(optimal_sampling_trl.__version__)


def test_it_works_where_it_is_installed(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "installed"
    run("-m", "pip", "install", "-q", "--no-deps", "--target", target, wheel, cwd=tmp_path)
    assert f"works: {target}" in run(TESTS / "checks" / "smoke.py", cwd=tmp_path, path=str(target))
