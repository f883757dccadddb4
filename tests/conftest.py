"""Holds for every test: no network, one thread, an environment that no other file has changed, and the shapes in
annotations are checked at each call."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch
import transformers
from beartype import BeartypeConf, beartype
from hypothesis import settings
from jaxtyping import install_import_hook

torch.set_num_threads(1)
# The same examples at every run, so that a red is reproducible; `--hypothesis-profile=default` draws new ones.
settings.register_profile("reproducible", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("reproducible")


def check_shapes(function: Callable) -> Callable:
    """beartype on a function's tensors alone: other types are mypy's, and what a user may get wrong is refused with
    words, which the tests read. A dataclass checks its own fields."""
    if function.__name__ == "__init__":
        return function
    shapes = {name: hint for name, hint in function.__annotations__.items() if "Tensor" in repr(hint)}
    function.__annotations__ = shapes
    return beartype(conf=BeartypeConf(is_pep484_tower=True))(function)


# Before the package is imported. Processes that vLLM spawns import it unchecked.
SHAPED = [
    f"optimal_sampling_trl.{room}"
    for room in (
        "mixture.settings",
        "mixture.mixing",
        "mixture.arithmetic",
        "mixture.folding",
        "mixture.swap",
        "mixture.solver",
        "mixture.reference",
        "rollouts.rollout",
        "losses",
    )
]
install_import_hook(SHAPED, f"{__name__}.check_shapes")

FIRST = (
    "recipes/test_starters.py",
    "backends/vllm/server/test_server.py",
    "mixture/test_kernels.py",
    "recipes/test_studies.py",
    "backends/vllm/test_families.py",
    "recipes/test_benchmarks.py",
    "whole/test_faults.py",
    "trainers/engines/test_colocated.py",
    "trainers/test_training.py",
    "recipes/test_learning.py",
    "backends/vllm/worker/test_hybrid.py",
    "trainers/test_several_turns.py",
)
"""Files that take a minute or more: dealt last, one would leave a process of two without work. The first of them makes
the embedded pair where no cache has it, which takes minutes, and the second does without."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Deal the files of `FIRST` first; the order within a file stays."""
    places = {Path(__file__).parent / name: place for place, name in enumerate(FIRST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


@pytest.fixture(scope="module", autouse=True)
def _own_environment() -> Iterator[None]:
    """A process that has trained on an engine is a rank by its variables, and so would be all that it starts. Each
    trainer sets the level of the logs for the whole process."""
    before, level = dict(os.environ), transformers.logging.get_verbosity()
    yield
    os.environ.clear()
    os.environ.update(before)
    transformers.logging.set_verbosity(level)
