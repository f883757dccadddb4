"""The arms that horizon.py compares, and the places along the axes where they are run."""

from __future__ import annotations

from dataclasses import replace

from optimal_sampling_trl import Mixture
from stacks import Setting
from stage import Arm

RL, KL, TOKENS = {"reward": 1.0}, {"divergence": 1.0}, {"sampled": 1.0}
DEFAULT = {**RL, "positives": 1.0}
TRUST = Mixture("trust_region", epsilon=0.05)
ALONE = Mixture.theta_only()
MAIN = {
    "GRPO": Arm(RL, ALONE),
    "GRPO, half mixture": Arm(RL),
    "GRPO, half mixture, positive only": Arm(DEFAULT),
    "GRPO + sampled tokens, 0.1": Arm({**RL, "sampled": 0.1}, ALONE),
    "GRPO, half mixture + sampled tokens, 0.1": Arm({**RL, "sampled": 0.1}),
    "Distillation": Arm(KL, ALONE),
    "Distillation, mixture": Arm(KL, theta_fraction=0.0),
    "Distillation, trust region, annealed": Arm(KL, TRUST, theta_fraction=0.0, schedule=0.5),
    "Sampled tokens": Arm(TOKENS, ALONE),
    "Sampled tokens, mixture": Arm(TOKENS, theta_fraction=0.0),
    "SFT on the teacher's samples": Arm({"imitation": 1.0}, Mixture.teacher_only(), theta_fraction=0.0),
    "SFT on the mixture's samples": Arm({"imitation": 1.0}, theta_fraction=0.0),
}
IDEAS = {
    "GRPO, positive only": Arm(DEFAULT, ALONE),
    "GRPO + sampled tokens, 0.3": Arm({**RL, "sampled": 0.3}, ALONE),
    "GRPO + sampled tokens, 1": Arm({**RL, "sampled": 1.0}, ALONE),
    "GRPO, half mixture + sampled tokens, 0.3": Arm({**RL, "sampled": 0.3}),
    "GRPO, half mixture + sampled tokens, 1": Arm({**RL, "sampled": 1.0}),
    "GRPO, half mixture + divergence, 0.1": Arm({**RL, "divergence": 0.1}),
    "GRPO, half mixture + divergence, 1": Arm({**RL, "divergence": 1.0}),
    "GRPO + divergence, 1": Arm({**RL, "divergence": 1.0}, ALONE),
    "GRPO, own share by success": Arm(RL, theta_fraction=None),
    "GRPO, half mixture, α annealed by success": Arm(RL, schedule="success"),
    "GRPO, half trust region, ε annealed by success": Arm(RL, TRUST, schedule="success"),
    "GRPO, half mixture, first half": Arm(RL, prefix=0.5),
    "GRPO, half mixture, random prefix": Arm(RL, prefix="random"),
    "GRPO, all random prefix": Arm(RL, theta_fraction=0.0, prefix="random"),
    "GRPO, half mixture, random prefix + sampled tokens, 0.1": Arm({**RL, "sampled": 0.1}, prefix="random"),
    "Distillation, random prefix": Arm(KL, theta_fraction=0.0, prefix="random"),
}
VARIANTS = {
    "GRPO, half mixture, with negatives": Arm({**RL, "negatives": 1.0}),
    "GRPO, default, annealed": Arm(DEFAULT, schedule=0.5),
    **{f"GRPO, default, {share:g} own": Arm(DEFAULT, theta_fraction=share) for share in (0.0, 0.25, 0.75)},
    "GRPO, default, ess_balance": Arm(DEFAULT, Mixture("ess_balance")),
    "GRPO, default, entropy": Arm(DEFAULT, Mixture("entropy")),
    "GRPO, default, trust region 0.05": Arm(DEFAULT, TRUST),
    "GRPO, default, trust region 0.5": Arm(DEFAULT, replace(TRUST, epsilon=0.5)),
    "GRPO, default, fixed 0.5": Arm(DEFAULT, Mixture("fixed")),
    "GRPO, default, α ≥ 0.5": Arm(DEFAULT, Mixture(alpha_min=0.5)),
    "GRPO, default, α ≤ 0.5": Arm(DEFAULT, Mixture(alpha_max=0.5)),
    "GRPO, default, teacher": Arm(DEFAULT, Mixture.teacher_only()),
    "Distillation, teacher": Arm(KL, Mixture.teacher_only(), theta_fraction=0.0),
    "Distillation, α ≤ 0.5": Arm(KL, Mixture(alpha_max=0.5), theta_fraction=0.0),
    "Distillation, half mixture": Arm(KL, theta_fraction=0.5),
    "Distillation, mixture, annealed": Arm(KL, theta_fraction=0.0, schedule=0.5),
    "Sampled tokens, trust region, annealed": Arm(TOKENS, TRUST, theta_fraction=0.0, schedule=0.5),
}
ARMS = MAIN | IDEAS | VARIANTS
FEW = tuple(name for name in MAIN if name not in ("GRPO + sampled tokens, 0.1", "SFT on the mixture's samples"))
FEW += ("GRPO, half mixture + divergence, 1", "GRPO, half mixture, random prefix", "GRPO + divergence, 1")


def settings(task: str, others: list[str], seeds: int) -> list[Setting]:
    """The most important first: all arms at one place, then fewer along each axis from there."""
    place = Setting(task, "teacher", "student-2", tuple(MAIN), seeds)
    few = place._replace(arms=FEW)
    return [
        place,
        place._replace(arms=tuple(IDEAS)),
        *(few._replace(student=name) for name in ("student-0", "student-10", "student-40")),
        *(few._replace(teacher=name) for name in ("teacher-50", "teacher-80")),
        *(few._replace(task=name) for name in others),
        place._replace(arms=tuple(VARIANTS)),
    ]
