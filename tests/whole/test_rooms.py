"""The import line tells the room: each part of the package is imported, and used, without the others' libraries.

They are hidden from every finder of Python in a fresh process: to it, and to all that looks before it imports, they
are not installed.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

from helpers.paths import SEARCHED

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
ROOMS = {
    "package": ("optimal_sampling_trl", (*HEAVY, "torch", "jaxtyping")),
    "plugin": ("optimal_sampling_trl.backends.vllm.plugin", (*HEAVY, "torch", "jaxtyping")),
    "options": ("optimal_sampling_trl.options", (*HEAVY, "torch", "jaxtyping")),
    **{
        name: (f"optimal_sampling_trl.{name}", HEAVY)
        for name in (
            "mixture",
            "solver",
            "reference",
            "losses",
            "request",
            "rollout",
            "page",
            "plots",
            "backends",
            "progress",
            "folder",
            "card",
            "sampling_run",
        )
    },
    **{
        name: (f"optimal_sampling_trl.{name}", ("accelerate", "datasets", "matplotlib", "triton", "trl", "vllm"))
        for name in ("pairing", "generate", "backends.transformers")
    },
    "trainers": ("optimal_sampling_trl.trainers", ("matplotlib", "triton", "vllm")),
}
"""Of each room: the module, and the libraries that it must do without."""

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
    process = subprocess.run(
        [sys.executable, "-c", head + HIDE.format(hidden=sorted(hidden)) + code],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    return process.stdout


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_is_imported_alone(room: str) -> None:
    module, hidden = ROOMS[room]
    run(f"importlib.import_module({module!r})\n", hidden)


def test_the_package_loads_a_room_when_a_name_is_first_used() -> None:
    run(
        "import optimal_sampling_trl as package\n"
        "assert 'torch' not in sys.modules\n"
        "assert sorted(package.__all__) == dir(package)\n"
        "package.Mixture\n"
        "assert 'torch' in sys.modules\n"
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
