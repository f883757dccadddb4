"""The scale of the entropy gate: the quantile by hand, the search where α does not tell, and a run that is resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.training import load, make_trainer
from optimal_sampling_trl import Mixture
from optimal_sampling_trl.trainers.entropy_scale import next_scale

GATE = {"mixture": Mixture("entropy_gate", entropy_scale=0.25, form="arithmetic"), "entropy_quantile": 0.9}


def test_the_next_scale_is_the_quantile_of_the_entropies() -> None:
    entropies = torch.linspace(0.0, 2.0, 101)
    assert next_scale(entropies / 2.5, 2.5, 0.95, 0.5) == pytest.approx(1.9)
    assert next_scale(entropies / 2.5, 2.5, 0.1, 0.5) == 0.5  # not below the least
    assert next_scale(torch.zeros(0), 2.5, 0.95, 0.5) == 2.5  # a batch of the student alone says nothing


def test_a_scale_below_the_quantile_grows_until_it_is_found_and_stays() -> None:
    """From 0.3 it doubles; at 1.9, where 6 of 101 tokens are open and 5 % are to be, it moves by the rest of that."""
    entropies, scale, seen = torch.linspace(0.0, 2.0, 101), 0.3, []
    for _ in range(8):
        scale = next_scale((entropies / scale).clamp(max=1.0), scale, 0.95, 0.1)
        seen.append(scale)
    assert seen[:4] == pytest.approx([0.6, 1.2, 2.4, 1.9], abs=1e-5)
    assert all(abs(scale / 1.9 - 1) < 0.2 for scale in seen[3:])


class Scales:
    """Goes before a trainer's class: the scale that each batch's mixture was asked for, and what came next."""

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        output = super()._generate_and_score_completions(inputs)
        (asked,) = {one.mixture for one in self.rollouts if not one.mixture.is_theta_only}
        self.scales = [*getattr(self, "scales", []), asked.entropy_scale]
        return output


def test_each_batch_has_the_quantile_of_the_last_one(pair: tuple[str, str], tmp_path: Path) -> None:
    """Against the entropies of the student itself; a resumed run goes on with the scale that was logged."""
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 4, "learning_rate": 0.0}
    trainer = make_trainer("divergence", pair, tmp_path, generator=GATE, mixin=Scales, **settings)
    trainer.train()
    assert trainer.scales[0] == 0.25
    logged = [log["mixture/entropy_scale"] for log in trainer.state.log_history if "mixture/entropy_scale" in log]
    assert logged == pytest.approx(trainer.scales)
    theta, entropies = load(pair[1]), []
    for one in trainer.rollouts:
        ids = torch.tensor([one.theta_prompt_ids + one.completion_ids])
        rows = theta(ids).logits[0, len(one.theta_prompt_ids) - 1 : -1].detach().double().log_softmax(-1)
        entropies += (-(rows.exp() * rows).sum(-1)).tolist()
    alpha = torch.cat([one.alpha for one in trainer.rollouts])
    last = trainer.scales[-1]
    assert alpha.tolist() == pytest.approx([min(1.0, entropy / last) for entropy in entropies], abs=1e-4)
    wanted = float(torch.tensor(entropies).quantile(0.9))
    if wanted < last:
        assert trainer._scale == pytest.approx(max(wanted, 0.25), rel=1e-4)
    else:
        assert last <= trainer._scale <= 2 * last
    resumed = make_trainer("divergence", pair, tmp_path, generator=GATE, mixin=Scales, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert resumed.scales[0] == pytest.approx(trainer.scales[3])
