"""The arms that presets.py compares, and where: published mixtures, our defaults, and what needs no mixture."""

from __future__ import annotations

from typing import Any

from optimal_sampling_trl import Mixture
from optimal_sampling_trl.trainers.presets import PRESETS
from past_the_teacher_arms import ALONE, DEFAULT, KL, LARGE, MAIN, MIDDLE, OWN, RAFT, SMALL, TEACHER
from stacks import Setting
from stage import Arm

BATCH = 72
"""Completions of an update: whole groups of 8 and of 12."""
IGNORED = {"scale_rewards": "group", "loss_type": "dapo", "importance_sampling_level": "token", "beta": 0.0}
"""Settings of a reward that are the stack's own."""
CLIP = ("epsilon", "epsilon_high", "delta")
"""Bounds of the ratio of new to old policy, which is 1 where one update follows each batch."""
MEANINGS: dict[tuple[str, Any], dict[str, float]] = {
    ("positive_only", "none"): {"negatives": 1.0},
    ("positive_only", "mixture"): {},
    ("baseline", "own"): {"own_baseline": 1.0},
    ("correction", "none"): {},
    ("correction", "token_truncate"): {"ratios": 1.0},
    ("correction_clip_max", 3.0): {},
    **{pair: {} for pair in IGNORED.items()},
}
"""The terms of the stack's loss for each setting of a preset with a reward."""
DISTILLED: dict[tuple[str, Any], dict[str, float]] = {
    ("loss", "divergence"): {},
    ("correction", "none"): {},
    ("beta", 1.0): KL,
    ("beta", 0.0): {"forward": 1.0},
}
"""The same of a preset that distils, which has to set all three."""
SIZES = {"mentor": 12}
NAMES = {"mentor": "MENTOR", "logit-fusion": "Logit Fusion", "trb": "TRB", "minillm": "MiniLLM", "skd": "SKD"}
"""The presets that are compared."""


def arm_of(name: str, steps: int) -> Arm:
    """The preset as an arm of the stack, in a training of `steps` updates.

    Raises:
        ValueError: on a setting that the stack does not know.
    """
    preset, generator = PRESETS[name], dict(PRESETS[name].generator)
    settings = {key: value for key, value in preset.settings.items() if key not in CLIP}
    withdraw = settings.pop("mixture_weight_steps", None)
    shared: dict[str, Any] = {
        "mixture": Mixture.preset(name),
        "theta_fraction": generator.pop("theta_fraction"),
        "schedule": generator.pop("schedule", None),
        "quantile": generator.pop("entropy_quantile", None),
        "withdraw": None if withdraw is None else withdraw / steps,
    }
    distils = preset.trainer == "DistillationConfig"
    meanings = DISTILLED if distils else MEANINGS
    unknown = settings.items() - meanings.keys()
    if generator or unknown:
        raise ValueError(f"The stack has no {generator or unknown} of preset {name!r}; add it there.")
    if distils and (missing := {field for field, _ in DISTILLED} - settings.keys()):
        raise ValueError(f"Preset {name!r} leaves {sorted(missing)} to the configuration's defaults; set them.")
    terms = {} if distils else dict(OWN)
    for setting in settings.items():
        terms |= meanings[setting]
    if distils:
        return Arm(terms, tries=LARGE, **shared)
    return Arm(terms, size=SIZES.get(name), tries=MIDDLE, **shared)


def arms_of(steps: int) -> dict[str, Arm]:
    """Every arm of the stack in a training of `steps` updates: the presets, our defaults, and the rest."""
    return {
        **{NAMES[name]: arm_of(name, steps) for name in NAMES},
        "RAFT, mixture (default)": Arm(RAFT, theta_fraction=0.0, tries=LARGE),
        "GRPO, half mixture (default)": Arm(DEFAULT, tries=MIDDLE),
        "Distillation, mixture": Arm(KL, theta_fraction=0.0, tries=LARGE),
        "Distillation, student's rollouts": Arm(KL, ALONE, 1.0, tries=LARGE),
        "SFT on the teacher's samples": Arm({"imitation": 1.0}, TEACHER, 0.0, tries=LARGE),
        "GRPO": Arm(OWN, ALONE, tries=SMALL),
        **{
            f"RAFT, {NAMES[name]}'s mixture": Arm(RAFT, arm_of(name, steps).mixture, 0.0, tries=LARGE)
            for name in NAMES
        },
    }


PAIR = {
    "MENTOR": SMALL,
    "Logit Fusion": SMALL,
    "TRB": MIDDLE,
    "MiniLLM": MIDDLE,
    "SKD": MIDDLE,
    "RAFT, mixture (default)": MIDDLE,
    "GRPO, half mixture (default)": SMALL,
    "Distillation, mixture": MIDDLE,
    "Distillation, student's rollouts": SMALL,
    "SFT on the teacher's samples": MIDDLE,
    "GRPO": (3e-5, 1e-4, 3e-4),
}
"""Learning rates of the arms on the pair, which are those of `losses.py`."""
REST = tuple(f"RAFT, {name}'s mixture" for name in NAMES.values())
"""The mixtures of the presets under one loss."""
WITH_TEACHER = tuple(arm for arm in PAIR if arm != "GRPO")
TASKS = ("sums-40", "sums-10")


def settings_of(task: str) -> tuple[Setting, ...]:
    """Teachers right in about .5 and 1.0 of their samples, starts of .06 and .001; then the mixtures with one loss."""
    place = MAIN._replace(task=task, arms=tuple(PAIR), batch=BATCH)
    return (
        place,
        place._replace(student="student-0"),
        place._replace(teacher="teacher", arms=WITH_TEACHER),
        place._replace(teacher="teacher", student="student-0", arms=WITH_TEACHER),
        place._replace(arms=REST),
    )
