"""The card of a trained model says what sampled its rollouts."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import trl
from huggingface_hub import ModelCard

from helpers.training import KINDS, PROMPTS, TEACHER_PROMPTS, make_trainer
from optimal_sampling_trl import Mixture, OptimalSamplingGenerator, __version__
from optimal_sampling_trl.mixture import FIELDS
from optimal_sampling_trl.trainers.card import LOSS_FIELDS, OF_TRL, UNWRITTEN, card_facts, model_name, own_fields
from optimal_sampling_trl.trainers.checkpoints import SAME_ROLLOUTS

TERM = {"dense_coefficient": 1.0}
SYSTEM = {"teacher_system_prompt": "sort"}
IN_LOSS: dict[str, tuple[str, dict[str, Any], Any]] = {
    "accept": ("raft", {}, 0.5),
    "baseline": ("grpo", {}, "own"),
    "beta": ("dense", {}, 0.5),
    "completion_weight": ("raft", {}, "reward"),
    "correction": ("rloo", {}, "sequence_mask"),
    "correction_clip_max": ("grpo", {"correction": "token_mask"}, 2.0),
    "correction_clip_min": ("grpo", {"correction": "token_mask"}, 0.5),
    "correction_gamma": ("grpo", {"correction": "token_luffy"}, 0.2),
    "correction_self_normalise": ("grpo", {"correction": "token_mask"}, True),
    "correction_window": ("divergence", {"correction": "prefix_truncate"}, 3),
    "credit": ("grpo", TERM, "routed"),
    "denominator": ("raft", {}, "accepted"),
    "dense_coefficient": ("rloo", {}, 0.3),
    "dense_divergence": ("raft", TERM, "js"),
    "dense_fade": ("raft", TERM, 0.5),
    "dense_top_k": ("dense", {}, 8),
    "distillation_clip": ("grpo", {"distillation_coefficient": 0.1}, None),
    "distillation_coefficient": ("grpo", {}, 0.1),
    "loss": ("divergence", {}, "dense"),
    "mixture_weight_steps": ("grpo", {}, 3),
    "num_generations": ("raft", {}, 8),
    "positive_only": ("rloo", {}, "none"),
    "preset": ("grpo", {"num_generations": 12, "per_device_train_batch_size": 6}, "mentor"),
    "sampled_token_centre": ("sampled_token", {}, True),
    "sampled_token_clip": ("sampled_token", {}, None),
    "vllm_importance_sampling_correction": ("grpo", {}, True),
}
"""A trainer whose loss reads a field of its configuration, with what the field needs, and another value of it."""
IN_GENERATOR: dict[str, tuple[str, dict[str, Any], Any]] = {
    "alpha_by_success": ("grpo", {}, 0.5),
    "entropy_quantile": ("raft", {"mixture": Mixture("entropy_gate")}, 0.95),
    "mixture": ("dense", {}, Mixture("fixed")),
    "mixture_below": ("rloo", {}, 0.5),
    "schedule": ("dense", {}, 0.5),
    "system_message": ("raft", SYSTEM, "append"),
    "teacher": ("dense", SYSTEM, "student"),
    "teacher_adapter": ("raft", SYSTEM | {"teacher": "student"}, False),
    "teacher_refresh": ("raft", SYSTEM | {"teacher": "student"}, "never"),
    "teacher_system_prompt": ("dense", {}, "sort"),
    "theta_fraction": ("grpo", {}, 0.25),
    "theta_system_prompt": ("dense", {}, "sort"),
}
"""Likewise a field of the generator."""
IN_MIXTURE: dict[str, tuple[dict[str, Any], Any]] = {
    "alpha_max": ({}, 0.75),
    "alpha_min": ({}, 0.25),
    "entropy_scale": ({"method": "entropy_gate"}, 1.5),
    "epsilon": ({"method": "trust_region"}, 0.1),
    "fixed_alpha": ({"method": "fixed"}, 0.25),
    "form": ({}, "arithmetic"),
    "method": ({}, "ess_balance"),
    "swap_top_k": ({"method": "top_k_swap"}, 7),
}
"""A method that reads a field of the mixture, and another value of the field."""


def changed_rows(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """The rows of the second card that the first lacks or has otherwise."""
    return {name: value for name, value in other.items() if one.get(name) != value}


@pytest.mark.parametrize("name", IN_LOSS)
def test_a_card_tells_every_setting_of_the_loss(pair: tuple[str, str], tmp_path: Path, name: str) -> None:
    kind, needed, value = IN_LOSS[name]
    rows = [
        card_facts(make_trainer(kind, pair, tmp_path, **needed | settings))["loss"] for settings in ({}, {name: value})
    ]
    assert f"{name}={value!r}" in rows[1].split(", ")
    assert f"{name}={value!r}" not in rows[0].split(", ")
    assert name in LOSS_FIELDS or f"{name}=" not in rows[0], "a detail is told where it is not at its default"


@pytest.mark.parametrize("name", IN_GENERATOR)
def test_a_card_tells_every_setting_of_the_generator(pair: tuple[str, str], tmp_path: Path, name: str) -> None:
    kind, generator, value = IN_GENERATOR[name]
    adapter: dict[str, Any] = {}
    if name == "teacher_adapter":
        adapter["peft_config"] = pytest.importorskip("peft").LoraConfig(r=4, target_modules="all-linear")
    before, after = (
        card_facts(make_trainer(kind, pair, tmp_path, generator=generator | one, trainer=adapter))
        for one in ({}, {name: value})
    )
    assert changed_rows(before, after)


@pytest.mark.parametrize("name", IN_MIXTURE)
def test_a_card_tells_every_setting_of_the_mixture(pair: tuple[str, str], tmp_path: Path, name: str) -> None:
    needed, value = IN_MIXTURE[name]
    before, after = (
        card_facts(make_trainer("dense", pair, tmp_path, generator={"mixture": Mixture(**needed | one)}))
        for one in ({}, {name: value})
    )
    assert changed_rows(before, after)


def test_no_setting_is_forgotten() -> None:
    """The tests above change every field there is; one that they leave out is named, with why it stays untold."""
    ours = {name for _, config, _ in KINDS.values() for name in (*own_fields(config), *OF_TRL)}
    for whose, there, told in (
        ("our configurations", ours, {*IN_LOSS, *UNWRITTEN}),
        ("the generator", {one.name for one in fields(OptimalSamplingGenerator)}, {*IN_GENERATOR, *SAME_ROLLOUTS}),
        ("the mixture", set(FIELDS), set(IN_MIXTURE)),
    ):
        assert not (new := there - told), (
            f"Fields of {whose} that no test looks for on the card: {sorted(new)}. A reader who repeats the run needs "
            "them: add a case above, and a row in `card_facts` if it fails, or name the field in `UNWRITTEN`."
        )
        assert told == there, f"no longer fields of {whose}: {sorted(told - there)}"


def test_what_nothing_reads_is_not_told(pair: tuple[str, str], tmp_path: Path) -> None:
    """The clip of a pull that has no coefficient, and settings by which no loss is computed."""
    plain = card_facts(make_trainer("grpo", pair, tmp_path))
    with pytest.warns(UserWarning, match="`distillation_clip` is 1.0 and does nothing here"):
        trainer = make_trainer("grpo", pair, tmp_path, distillation_clip=1.0)
    assert card_facts(trainer) == plain
    quiet = {"log_theta_tolerance": 1.0, "evaluate_teacher": False}
    assert quiet.keys() == UNWRITTEN.keys()
    assert card_facts(make_trainer("grpo", pair, tmp_path, **quiet)) == plain


def test_a_card_tells_which_student_is_the_teacher(pair: tuple[str, str], tmp_path: Path) -> None:
    """`teacher` is the word 'student' in all of them."""
    peft = pytest.importorskip("peft")
    adapter = {"peft_config": peft.LoraConfig(r=4, target_modules="all-linear")}
    for given, trainer, words in (
        (SYSTEM, {}, "the student itself"),
        ({"teacher_refresh": "never"}, {}, "the student as it was before training"),
        ({"teacher_adapter": False}, adapter, "the student below its adapter"),
    ):
        facts = card_facts(
            make_trainer("raft", pair, tmp_path, generator={"teacher": "student", **given}, trainer=trainer)
        )
        assert facts["teacher"] == words
        assert facts["student"] == Path(pair[1]).name


def test_a_card_tells_of_prompts_and_files_that_are_the_teachers_own(pair: tuple[str, str], tmp_path: Path) -> None:
    from datasets import Dataset

    data = {"train_dataset": Dataset.from_dict({"prompt": PROMPTS, "teacher_prompt": TEACHER_PROMPTS})}
    facts = card_facts(make_trainer("raft", pair, tmp_path, generator={"teacher": "student"}, trainer=data))
    assert facts["teacher's prompts"] == "the column teacher_prompt of the data set"
    trainer = make_trainer("raft", pair, tmp_path, generator={"engine_arguments": {"revision": "main"}})
    assert card_facts(trainer)["teacher's revision"] == "main"


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
