"""One line at the start of a training: the models, the engine, the share of the mixture, the loss and the memory."""

from __future__ import annotations

import logging
import resource
import sys
from typing import Any

import torch

from ..mixture import SWAP, Mixture

POSITIVE = {
    "all": "completions with a positive advantage alone count",
    "mixture": "the mixture's completions count where their advantage is positive",
    "none": "all completions count",
}
"""Meaning of each value of `positive_only`."""

LETTERS = {"fixed_alpha": "α", "epsilon": "ε", "entropy_scale": "γ", "swap_top_k": "K"}
"""Letter of each field of a mixture that one method alone reads."""


def print_summary(trainer: Any) -> None:
    """Print the line of a trainer, in one process, unless its `log_level` asks for errors alone."""
    if trainer.args.get_process_log_level() < logging.ERROR:
        trainer.accelerator.print(describe(trainer))


def describe(trainer: Any) -> str:
    """Describe a trainer in one line."""
    teacher = getattr(trainer.generator.teacher, "name_or_path", trainer.generator.teacher)
    student = trainer.model.config._name_or_path
    return (
        f"{type(trainer).__name__}: student {student!r}, teacher {str(teacher)!r}, sampled by "
        f"{trainer.vllm_generation.engine}; {_share(trainer)}; {_loss(trainer)}{_terms(trainer)}; {_memory()}."
    )


def _share(trainer: Any) -> str:
    generator = trainer.generator
    share = 1 - trainer._theta_count() / trainer._group_size()
    annealed = "" if generator.schedule is None else f", annealed over {generator.schedule:g} of training"
    annealed += "" if generator.alpha_by_success is None else ", annealed by the student's successes"
    most = "up to " if generator.two_rounds else ""
    return f"{most}{share:.0%} of the completions from the mixture ({_words(generator.mixture)}{annealed})"


def _words(mixture: Mixture) -> str:
    own = [f"{LETTERS[name]} = {value:g}" for name, value in mixture.own().items()]
    if mixture.method == "fixed":
        return own[0]
    bounds = [] if mixture.method == SWAP else [f"α in [{mixture.alpha_min:g}, {mixture.alpha_max:g}]"]
    return ", ".join([mixture.method, *own, *bounds])


def _loss(trainer: Any) -> str:
    """Describe the loss."""
    config, weights = trainer.config_class, trainer.correction.name
    corrected = "" if weights == "none" else f", weighted by {weights}"
    if hasattr(config, "accept"):
        return "completions that the reward accepts are imitated"
    if hasattr(config, "loss"):
        return f"loss {trainer.loss!r}{corrected}"
    return POSITIVE[trainer._setting("positive_only")] + corrected


def _terms(trainer: Any) -> str:
    """Describe what changes the loss of a reward or stands beside it; say nothing where nothing does."""
    args, words = trainer.args, ""
    if (credit := getattr(args, "credit", "completion")) != "completion":
        words += f", credit {credit!r}"
    if coefficient := getattr(args, "dense_coefficient", 0.0):
        words += f", plus {coefficient:g} × the {args.dense_divergence!r} divergence from the teacher"
        words += "" if args.dense_fade is None else f", faded over {args.dense_fade:g} of training"
    if coefficient := getattr(args, "distillation_coefficient", 0.0):
        words += f", plus {coefficient:g} × (log t - log θ) of the sampled tokens"
    return words


def _memory() -> str:
    """Return the memory that is taken when training starts: of this process's GPU, or of the process."""
    if torch.cuda.is_available():
        return f"{torch.cuda.memory_reserved() / 1e9:.1f} GB of the GPU taken"
    unit = 1 if sys.platform == "darwin" else 1024
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9:.1f} GB of memory taken"
