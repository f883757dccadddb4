"""`preset=` of a configuration: what it sets, what it refuses beside it, and the table in the documents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import optimal_sampling_trl
from helpers.paths import ROOT
from helpers.training import make_trainer
from optimal_sampling_trl import DistillationConfig, GRPOConfig, Mixture, OptimalSamplingGenerator
from optimal_sampling_trl.mixture.presets import PUBLISHED
from optimal_sampling_trl.trainers.presets import PRESETS, preset_settings, preset_table, with_preset

CPU: dict[str, Any] = {"use_cpu": True, "bf16": False}
KIND = {"GRPOConfig": "grpo", "DistillationConfig": "divergence"}


def test_every_published_mixture_has_the_rest_of_its_preset() -> None:
    assert PRESETS.keys() == PUBLISHED.keys()


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_reaches_the_trainer_and_its_rollouts(pair: tuple[str, str], tmp_path: Path, name: str) -> None:
    """The configuration alone names it: the generator has the mixture, share and schedule, and a step works."""
    preset = PRESETS[name]
    group = {"num_generations": 4} if preset.trainer == "GRPOConfig" else {}
    trainer = make_trainer(KIND[preset.trainer], pair, tmp_path, preset=name, max_steps=1, **group)
    for setting, value in preset.settings.items():
        assert getattr(trainer.args, setting) == value, setting
    assert trainer.generator.mixture == Mixture.preset(name)
    for setting, value in preset.generator.items():
        assert getattr(trainer.generator, setting) == value, setting
    trainer.train()
    mixed = [rollout.mixture for rollout in trainer.rollouts if not rollout.mixture.is_theta_only]
    assert {mixture.method for mixture in mixed} == {Mixture.preset(name).method}
    share = preset.generator["theta_fraction"]
    assert len(mixed) == len(trainer.rollouts) * (4 - round(4 * share)) // 4


@pytest.mark.parametrize("name", PRESETS)
def test_the_same_by_hand_is_the_same_config(tmp_path: Path, name: str) -> None:
    config = getattr(optimal_sampling_trl, PRESETS[name].trainer)
    by_name, by_hand = (
        config(str(tmp_path), **CPU, **settings) for settings in ({"preset": name}, preset_settings(name))
    )
    again = config(str(tmp_path), **CPU, preset=name, **preset_settings(name))  # as a saved configuration is read
    wanted = by_name.to_dict() | {"preset": None}
    assert by_hand.to_dict() == wanted
    assert again.to_dict() == by_name.to_dict()


def test_a_setting_beside_a_preset_is_refused_unless_it_is_the_same(tmp_path: Path) -> None:
    GRPOConfig(str(tmp_path), **CPU, preset="mentor", epsilon_high=0.28, learning_rate=1e-3)
    with pytest.raises(ValueError, match=r"`epsilon_high` is 0\.3 beside `preset='mentor'`, which sets 0\.28: .*Drop"):
        GRPOConfig(str(tmp_path), **CPU, preset="mentor", epsilon_high=0.3)
    generator = OptimalSamplingGenerator("large", Mixture("fixed"), theta_fraction=0.25)
    with pytest.raises(ValueError, match=r"`mixture` is Mixture\(method='fixed'.* beside `preset='trb'`"):
        with_preset(generator, "trb")
    assert with_preset(generator, None) is generator


def test_names_and_trainers_that_do_not_go_together_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`preset` is 'trb' in a `GRPOConfig`; wanted it in a `DistillationConfig`"):
        GRPOConfig(str(tmp_path), **CPU, preset="trb")
    with pytest.raises(ValueError, match=r"Unknown preset 'minilm'\. .*Did you mean 'minillm'\?"):
        DistillationConfig(str(tmp_path), **CPU, preset="minilm")


def test_the_document_has_the_table_and_each_source() -> None:
    text = (ROOT / "docs" / "presets.md").read_text()
    assert preset_table() in text
    for preset in PRESETS.values():
        assert preset.source in text, preset.title
        assert preset.differs in text, preset.title
