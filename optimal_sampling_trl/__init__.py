"""Rollouts for TRL, sampled token by token from a solved mixture of a student θ and its teacher.

The names below load what they need when they are first used, so that vLLM's worker processes, which import this
package as a plugin, load neither TRL nor datasets.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import page as page
    from . import plots as plots
    from .generate import OptimalSamplingV1
    from .mixture import Mixture, mix
    from .output import OptimalSamplingOutput
    from .rollouts.dataset import from_dataset, to_dataset
    from .rollouts.dense import Dense, DenseRecords
    from .rollouts.folder import iterate_rollouts, load_rollouts
    from .rollouts.request import Sampling
    from .rollouts.rollout import Rollout, UnsolvedError
    from .sampling_run import sample_to_folder
    from .trainers import (
        DistillationConfig,
        DistillationTrainer,
        GRPOConfig,
        GRPOTrainer,
        OptimalSamplingGenerator,
        RAFTConfig,
        RAFTTrainer,
        RLOOConfig,
        RLOOTrainer,
    )

__version__ = "0.1.0"

_HOME = {
    "Dense": "rollouts.dense",
    "DenseRecords": "rollouts.dense",
    "DistillationConfig": "trainers",
    "DistillationTrainer": "trainers",
    "GRPOConfig": "trainers",
    "GRPOTrainer": "trainers",
    "Mixture": "mixture",
    "OptimalSamplingGenerator": "trainers",
    "OptimalSamplingOutput": "output",
    "OptimalSamplingV1": "generate",
    "RAFTConfig": "trainers",
    "RAFTTrainer": "trainers",
    "RLOOConfig": "trainers",
    "RLOOTrainer": "trainers",
    "Rollout": "rollouts.rollout",
    "Sampling": "rollouts.request",
    "UnsolvedError": "rollouts.rollout",
    "from_dataset": "rollouts.dataset",
    "iterate_rollouts": "rollouts.folder",
    "load_rollouts": "rollouts.folder",
    "mix": "mixture",
    "sample_to_folder": "sampling_run",
    "to_dataset": "rollouts.dataset",
}
__all__ = [
    "Dense",
    "DenseRecords",
    "DistillationConfig",
    "DistillationTrainer",
    "GRPOConfig",
    "GRPOTrainer",
    "Mixture",
    "OptimalSamplingGenerator",
    "OptimalSamplingOutput",
    "OptimalSamplingV1",
    "RAFTConfig",
    "RAFTTrainer",
    "RLOOConfig",
    "RLOOTrainer",
    "Rollout",
    "Sampling",
    "UnsolvedError",
    "from_dataset",
    "iterate_rollouts",
    "load_rollouts",
    "mix",
    "sample_to_folder",
    "to_dataset",
]


_SUBMODULES = ("page", "plots")


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return import_module(f".{name}", __name__)
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*__all__, *_SUBMODULES, "__version__"])
