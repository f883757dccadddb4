"""The import line tells the room: each part of the package is imported, and used, without the others' libraries.

They are hidden from every finder of Python in a fresh process: to it, and to all that looks before it imports, they
are not installed.
"""

from __future__ import annotations

import json
import sys
from functools import cache
from importlib.util import find_spec

import pytest

from helpers.children import run as run_to_its_end
from helpers.paths import ROOT, SEARCHED

PACKAGE = ROOT / "optimal_sampling_trl"

HIDE = """
import importlib, sys
from importlib.util import find_spec

HIDDEN = set({hidden!r})

class Filter:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in HIDDEN else self.finder.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = [Filter(finder) for finder in sys.meta_path]
for name in HIDDEN:
    assert find_spec(name) is None and name not in sys.modules, name
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        continue
    raise AssertionError(name + " is not hidden")
"""
HEAVY = ("accelerate", "datasets", "matplotlib", "transformers", "triton", "trl", "vllm")
MODELS = tuple(name for name in HEAVY if name != "transformers")
"""Libraries that a room which reads models does without."""
BARE = (*HEAVY, "torch", "jaxtyping")
ROOMS = {
    "": HEAVY,
    "__init__": BARE,
    "options": BARE,
    "user_warnings": BARE,
    "backends.vllm.plugin": BARE,
    "generate": MODELS,
    "output": HEAVY,
    "sampling_run": MODELS,
    "pairing": MODELS,
    "backends.transformers": MODELS,
    "backends.vllm": MODELS,
    "mixture.kernels.": tuple(name for name in HEAVY if name != "triton"),
    "backends.vllm.worker.": ("accelerate", "datasets", "matplotlib", "trl"),
    "trainers": ("matplotlib", "triton", "vllm"),
    "demo": ("matplotlib", "triton", "vllm"),
    "cli": ("matplotlib", "triton", "vllm"),
    "cli.main": BARE,
}
"""The libraries that a folder's modules, or one module, must do without: the longest entry that a module's name opens
with decides. With a dot at its end an entry is for the files in a folder, not for the folder's own `__init__`."""
NEEDED = {"mixture.kernels.": "triton", "backends.vllm.worker.": "vllm"}
"""The library that a machine must have to import a room at all."""
FIRST = {
    "torch": ("torch",),
    "transformers": ("transformers.models.auto.modeling_auto",),
    "trl": ("transformers.trainer", "trl.trainer.grpo_trainer"),
    "vllm": ("vllm.model_executor.models",),
}
"""Modules that take long to import, loaded once for all modules of a room that may use them."""
MODULES = sorted(
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
    for path in PACKAGE.rglob("*.py")
)
"""Every module of the package, by its name within."""

IMPORT_EACH = """
import json, os, traceback

for name in {first!r}:
    importlib.import_module(name)
failed = {{}}
for module in {modules!r}:
    reads, writes = os.pipe()
    if not (process := os.fork()):
        try:
            importlib.import_module(module)
        except BaseException:
            os.write(writes, traceback.format_exc()[-3000:].encode())
        os._exit(0)
    os.close(writes)
    with open(reads) as pipe:
        failed[module] = pipe.read()
    _, status = os.waitpid(process, 0)
    failed[module] = failed[module] or (f"ended with status {{status}}" if status else "")
print(json.dumps(failed))
"""
"""Imports each module alone, in a process of its own that is forked off one that has the libraries."""

TRAIN = """
import tempfile
from pathlib import Path
import torch
from optimal_sampling_trl.backends import why_not_vllm
from helpers.training import make_trainer, make_untrained_pair

torch.set_num_threads(1)
assert why_not_vllm("teacher", "student") == "vLLM is not installed"
folder = Path(tempfile.mkdtemp())
pair = make_untrained_pair(folder)
for kind in ("grpo", "rloo", "divergence"):
    trainer = make_trainer(kind, pair, folder, generator={"backend": "auto"}, max_steps=1)
    trainer.train()
    assert trainer.state.global_step == 1
    assert type(trainer.vllm_generation).__name__ == "LiveGeneration"
try:
    make_trainer("grpo", pair, folder, generator={"backend": "vllm"})
except Exception as error:
    print("REFUSED", type(error).__name__, error)
"""


def run(code: str, hidden: tuple[str, ...]) -> str:
    """Run code in a fresh process where the libraries are hidden; its output."""
    head = f"import sys\nsys.path[:0] = {[str(folder) for folder in SEARCHED]!r}\n"
    process = run_to_its_end([sys.executable, "-c", head + HIDE.format(hidden=sorted(hidden)) + code])
    assert process.returncode == 0, process.stderr[-3000:]
    return process.stdout


def room_of(module: str) -> str:
    """The entry of `ROOMS` that holds for a module."""
    return max((room for room in ROOMS if module.startswith(room)), key=len)


@cache
def failures(room: str) -> dict[str, str]:
    """Of each module of a room, what its import raised where the room's libraries are hidden; "" where nothing."""
    hidden = ROOMS[room]
    usable = [name for name in FIRST if name not in hidden and find_spec(name)]
    first = [module for name in usable for module in FIRST[name]]
    modules = [full_name(module) for module in MODULES if room_of(module) == room]
    failed: dict[str, str] = json.loads(run(IMPORT_EACH.format(first=first, modules=modules), hidden).splitlines()[-1])
    return failed


def full_name(module: str) -> str:
    return "optimal_sampling_trl" if module == "__init__" else f"optimal_sampling_trl.{module}"


@pytest.mark.parametrize("module", MODULES)
def test_a_module_is_imported_alone(module: str) -> None:
    room = room_of(module)
    if room in NEEDED and find_spec(NEEDED[room]) is None:
        pytest.skip(f"{NEEDED[room]} is not installed")
    told = failures(room)[full_name(module)]
    assert not told, f"{module} must do without {', '.join(ROOMS[room])} (entry {room!r} of ROOMS):\n{told}"


def test_every_entry_decides_about_a_module() -> None:
    unused = set(ROOMS) - {room_of(module) for module in MODULES}
    assert not unused, f"Delete or rename these entries of ROOMS, no module's name opens with them: {sorted(unused)}"


def test_the_package_loads_a_room_when_a_name_is_first_used() -> None:
    run(
        "import optimal_sampling_trl as package\n"
        "assert 'torch' not in sys.modules\n"
        "assert {*package.__all__, 'page', 'plots', '__version__'} == set(dir(package))\n"
        "package.Mixture\n"
        "assert 'torch' in sys.modules\n"
        "package.page.write_page, package.plots.plot_training\n"
        "try:\n    package.GRPOTrainer\nexcept ModuleNotFoundError as error:\n    assert error.name == 'trl', error\n"
        "else:\n    raise AssertionError('trl is not hidden')\n"
        "try:\n    package.Mixtur\nexcept AttributeError as error:\n    assert 'Mixtur' in str(error)\n"
        "else:\n    raise AssertionError('no such name')\n",
        ("matplotlib", "triton", "trl", "vllm"),
    )


def test_the_trainers_train_without_vllm() -> None:
    """`backend="auto"` takes transformers, although TRL asks for vLLM; `"vllm"` is refused with words."""
    output = run(TRAIN, ("matplotlib", "vllm"))
    assert "REFUSED ValueError `backend` is 'vllm', but vLLM is not installed. Use backend='transformers'" in output
