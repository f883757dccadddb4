"""The generator: its schedules over a training, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from helpers.training import (
    KINDS,
    make_trainer,
)
from optimal_sampling_trl import Mixture, OptimalSamplingGenerator


class Mixtures:
    """Goes before a trainer's class: which mixture each generation's mixture rows were sampled from."""

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        output = super()._generate_and_score_completions(inputs)
        asked = {rollout.mixture for rollout in self.rollouts}
        self.asked = [*getattr(self, "asked", []), asked]
        return output


def test_schedule_ends_at_the_student(pair: tuple[str, str], tmp_path: Path) -> None:
    """Half of 8 steps from alpha_max 1 to 0, then the student alone; α's mean falls with it."""
    trainer = make_trainer(
        "divergence", pair, tmp_path, generator={"schedule": 0.5}, mixin=Mixtures, max_steps=8, learning_rate=0.0
    )
    trainer.train()
    limits = [1.0, 0.75, 0.5, 0.25]
    assert [mixture.alpha_max for (mixture,) in trainer.asked] == limits + [0.0] * 4
    assert [mixture.is_theta_only for (mixture,) in trainer.asked] == [False] * 4 + [True] * 4
    means = [log.get("alpha/mean") for log in trainer.state.log_history if "entropy" in log]
    assert means[4:] == [None] * 4  # no token came from the mixture
    assert means[0] > 0.4
    assert means[3] == pytest.approx(0.25, abs=1e-4)
    assert means[0] >= means[1] - 0.05
    assert means[2] > means[3]


def test_schedule_of_a_trust_region_shrinks_epsilon(pair: tuple[str, str], tmp_path: Path) -> None:
    generator = {"schedule": 1.0, "mixture": Mixture("trust_region", epsilon=0.2)}
    trainer = make_trainer("grpo", pair, tmp_path, generator=generator, mixin=Mixtures, max_steps=4)
    trainer.train()
    used = [{mixture.epsilon for mixture in asked if not mixture.is_theta_only} for asked in trainer.asked]
    assert [epsilon for (epsilon,) in used] == pytest.approx([0.2, 0.15, 0.1, 0.05])
    means = [log["alpha/mean"] for log in trainer.state.log_history if "alpha/mean" in log]
    assert means == sorted(means, reverse=True)
    assert means[3] < 0.7 * means[0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_goes_on_where_it_was(pair: tuple[str, str], tmp_path: Path, kind: str) -> None:
    """Four steps at once, against two, saved, and two more in a new trainer: same mixtures, same metrics."""
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"}
    build = {"generator": {"schedule": 1.0}, "mixin": Mixtures, **settings}
    whole = make_trainer(kind, pair, tmp_path, **build)
    whole.train()
    resumed = make_trainer(kind, pair, tmp_path, **build)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    used = [{mixture.alpha_max for mixture in asked if not mixture.is_theta_only} for asked in whole.asked]
    assert used == [{1.0}, {0.75}, {0.5}, {0.25}]
    assert resumed.asked == whole.asked[2:]
    logs = [
        {log["step"]: log for log in trainer.state.log_history if "alpha/mean" in log} for trainer in (whole, resumed)
    ]
    for step in (3, 4):
        for name in ("alpha/mean", "alpha/q90", "mixture/kl_theta", "mixture/ess", "loss"):
            assert logs[1][step][name] == pytest.approx(logs[0][step][name], rel=1e-4), (step, name)


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"teacher": "t", "mixture": "kl_symmetry"}, r"`mixture` is 'kl_symmetry'; wanted a `Mixture`"),
        ({"teacher": "t", "theta_fraction": 1.5}, r"`theta_fraction` is 1\.5; wanted a number in \[0, 1\]"),
        (
            {"teacher": "t", "mixture": Mixture(epsilon=0.01)},
            r"^OptimalSamplingGenerator: `epsilon` is 0\.01, and the method 'kl_symmetry' does not read it; wanted it",
        ),
        ({"teacher": "t", "schedule": 2}, r"`schedule` is 2; wanted a number in \(0, 1\]"),
        (
            {"teacher": "t", "schedule": 0},
            r"OptimalSamplingGenerator: `schedule` is 0; wanted a number in \(0, 1\]\. .*, or None",
        ),
        (
            {"teacher": "t", "schedule": 0.5, "mixture": Mixture("top_k_swap")},
            r"`schedule` is 0\.5 with the method 'top_k_swap', whose α has no range to shrink; wanted None.*Drop",
        ),
        (
            {"teacher": "t", "alpha_by_success": 0.5, "mixture": Mixture("top_k_swap")},
            r"`alpha_by_success` is 0\.5 with the method 'top_k_swap', .*Drop `alpha_by_success`",
        ),
        ({"teacher": "t", "dense": ("overlap",)}, r"`dense` is \('overlap',\); wanted None or a `Dense`"),
        ({"teacher": "t", "entropy_quantile": 1.5}, r"`entropy_quantile` is 1\.5; wanted a number in \(0, 1\)"),
        ({"teacher": "t", "entropy_quantile": 1}, r"`entropy_quantile` is 1; wanted a number in \(0, 1\).*, or None"),
        (
            {"teacher": "t", "entropy_quantile": 0.9},
            r"`entropy_quantile` is 0\.9 with Mixture\(method='kl_symmetry'.*Drop",
        ),
        (
            {"teacher": "t", "entropy_quantile": 0.9, "mixture": Mixture("entropy_gate"), "schedule": 0.5},
            r"and `schedule` 0\.5; wanted the method 'entropy_gate' with α in \[0, 1\] and no schedule",
        ),
        ({"teacher": "t", "backend": "vlm"}, r"Unknown backend 'vlm'\..*Did you mean 'vllm'\?"),
    ],
)
def test_refusals_of_the_generator(settings: dict[str, Any], wanted: str) -> None:
    with pytest.raises(ValueError, match=wanted):
        OptimalSamplingGenerator(**settings)


def test_the_teachers_folder_may_be_a_path(pair: tuple[str, str], tmp_path: Path) -> None:
    for kind in ("grpo", "divergence"):
        trainer = make_trainer(kind, pair, tmp_path, generator={"teacher": Path(pair[0])})
        assert trainer.generator.named_teacher == pair[0]
