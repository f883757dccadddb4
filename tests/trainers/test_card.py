"""The card of a trained model says what sampled its rollouts."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import trl
from huggingface_hub import ModelCard

from helpers.training import make_trainer
from optimal_sampling_trl import Mixture, __version__
from optimal_sampling_trl.trainers.card import card_facts, model_name


def test_a_card_tells_teacher_mixture_halves_and_version(pair: tuple[str, str], tmp_path: Path) -> None:
    generator = {
        "mixture": Mixture("trust_region", epsilon=0.1),
        "schedule": 0.5,
        "teacher_system_prompt": "Be | `x`\ny",
    }
    trainer = make_trainer("grpo", pair, tmp_path, generator=generator)
    trainer.create_model_card(model_name="student")
    card = ModelCard.load(tmp_path / "README.md")
    assert {"trl", "grpo", "optimal-sampling-trl"} <= set(card.data.tags)
    rows = dict(re.findall(r"^\| (.+?) \| (.+) \|$", card.text, re.MULTILINE))
    assert rows["teacher"] == f"`{Path(pair[0]).name}`"
    assert rows["mixture"] == "`trust_region, geometric`"
    assert rows["budget of KL(q‖θ), nats a token"] == "`0.1`"
    assert rows["annealed to the student over"] == "`0.5 of training`"
    assert rows["completions of the student alone"] == f"`{trainer._theta_count()} of {trainer.args.num_generations}`"
    assert rows["teacher's system prompt"] == "`Be / x y`"
    assert rows["engine"] == "`transformers`"
    assert "positive_only='all', correction='none'" in rows["loss"]
    assert f"optimal-sampling-trl {__version__}" in card.text
    assert "@software{optimal_sampling_trl," in card.text
    assert "None" not in card.text
    assert str(Path(pair[0]).parent) not in card.text, "it tells a path of the machine"


def test_a_card_tells_the_gate_and_the_share_that_training_began_with(pair: tuple[str, str], tmp_path: Path) -> None:
    """At the end of `mixture_weight_steps` the student samples all; the card says what the run was set to."""
    generator = {
        "mixture": Mixture("entropy_gate", form="arithmetic", entropy_scale=1.5),
        "entropy_quantile": 0.95,
        "mixture_below": 1.0,
    }
    trainer = make_trainer("grpo", pair, tmp_path, generator=generator, mixture_weight_steps=3, baseline="own")
    trainer.state.global_step = 3
    facts, group = card_facts(trainer), trainer.args.num_generations
    assert trainer._theta_count() == group
    assert facts["completions of the student alone"] == f"{group // 2} of {group}"
    assert facts["entropy of the student where α is 1, nats"] == 1.5
    assert facts["quantile of the entropies that sets it"] == 0.95
    assert facts["mixture only where none of these has a reward of"] == 1.0
    assert "baseline='own', mixture_weight_steps=3" in facts["loss"]


def test_a_card_tells_what_alpha_follows(pair: tuple[str, str], tmp_path: Path) -> None:
    facts = card_facts(make_trainer("rloo", pair, tmp_path, generator={"alpha_by_success": 0.5}))
    assert facts["mixture annealed by the share of these with a reward of"] == 0.5


def test_a_card_tells_how_many_likeliest_tokens_are_kept(pair: tuple[str, str], tmp_path: Path) -> None:
    trainer = make_trainer("divergence", pair, tmp_path, generator={"mixture": Mixture("top_k_swap", swap_top_k=7)})
    facts = card_facts(trainer)
    assert facts["mixture"] == "top_k_swap"
    assert facts["likeliest tokens of the teacher that the student may draw"] == 7
    assert "likeliest tokens of the teacher that the student may draw" not in card_facts(
        make_trainer("divergence", pair, tmp_path)
    )


def test_a_configuration_of_trls_gets_our_default_named(pair: tuple[str, str], tmp_path: Path) -> None:
    for kind, loss in (("grpo", "positive_only='all', correction='none'"), ("raft", "completion_weight='accepted'")):
        trainer = make_trainer(kind, pair, tmp_path, config=trl.GRPOConfig, num_generations=4)
        assert loss in card_facts(trainer)["loss"]


@pytest.mark.parametrize("kind", ["rloo", "raft", "divergence", "sampled_token"])
def test_every_trainer_has_its_facts(kind: str, pair: tuple[str, str], tmp_path: Path) -> None:
    facts = card_facts(make_trainer(kind, pair, tmp_path))
    assert facts["trainer"].lower() in (kind, "distillation")
    own = {"rloo": "positive_only='all'", "raft": "completion_weight='accepted'"}
    assert own.get(kind, f"loss={kind!r}") in facts["loss"]


def test_a_model_id_is_kept_and_a_folder_is_cut(tmp_path: Path) -> None:
    assert model_name("Qwen/Qwen2.5-3B-Instruct") == "Qwen/Qwen2.5-3B-Instruct"
    assert model_name(tmp_path) == tmp_path.name
