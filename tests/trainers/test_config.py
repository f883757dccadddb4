"""The configurations: TRL's with our fields, and what is left to the trainer."""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import trl

from helpers.training import (
    KINDS,
    TEXTS,
    Watch,
    make_trainer,
    one_batch,
    reward,
)
from optimal_sampling_trl import DistillationConfig, GRPOConfig, GRPOTrainer, RLOOConfig

RL = ("grpo", "rloo")


@pytest.mark.parametrize("config", [GRPOConfig, RLOOConfig])
def test_positive_only_names_completions(tmp_path: Path, config: Any) -> None:
    for got in (True, False, None, 0, "mixtures"):
        wanted = rf"^Unknown value of `positive_only` {got!r}\. Known: all, mixture, none\."
        with pytest.raises(ValueError, match=wanted):
            config(str(tmp_path), use_cpu=True, bf16=False, positive_only=got)


@pytest.mark.parametrize(
    ("config", "name", "value", "wanted"),
    [
        (GRPOConfig, "distillation_clip", -1.0, "a finite number above 0. Pass one, in nats, or None"),
        (GRPOConfig, "distillation_clip", 0.0, "a finite number above 0. Pass one, in nats, or None"),
        (GRPOConfig, "distillation_coefficient", float("nan"), "a finite number"),
        (DistillationConfig, "sampled_token_clip", -1.0, "a finite number above 0. Pass one, in nats, or None"),
        (DistillationConfig, "sampled_token_clip", float("nan"), "a finite number above 0"),
    ],
)
def test_limits_of_the_teachers_pull(tmp_path: Path, config: Any, name: str, value: float, wanted: str) -> None:
    """Below 0 torch would take the upper limit for every token, and 0 would leave no pull."""
    loss = {"loss": "sampled_token"} if config is DistillationConfig else {"distillation_coefficient": 1.0}
    with pytest.raises(ValueError, match=rf"`{name}` is {value}; wanted {wanted}"):
        config(str(tmp_path), use_cpu=True, bf16=False, **loss | {name: value})
    config(str(tmp_path), use_cpu=True, bf16=False, **loss, **{name.replace("coefficient", "clip"): None})


def test_a_text_is_no_flag_of_the_sampled_tokens(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`sampled_token_centre` is 'false'; wanted True or False"):
        DistillationConfig(str(tmp_path), use_cpu=True, bf16=False, loss="sampled_token", sampled_token_centre="false")


@pytest.mark.parametrize("kind", ["grpo", "rloo", "divergence"])
def test_trls_own_config_gets_our_defaults(pair: tuple[str, str], tmp_path: Path, kind: str) -> None:
    plain = {"grpo": trl.GRPOConfig, "rloo": trl.RLOOConfig, "divergence": trl.DistillationConfig}[kind]
    prompts = [text for text in TEXTS[:4] for _ in range(4)]
    theirs = make_trainer(kind, pair, tmp_path, config=plain, mixin=Watch)
    ours = make_trainer(kind, pair, tmp_path)
    batches = [one_batch(trainer, prompts) for trainer in (theirs, ours)]
    assert batches[0].keys() == batches[1].keys()
    for name, value in batches[0].items():
        assert torch.equal(value, batches[1][name]), name
    assert theirs.args.use_vllm  # TRL's word for any engine
    theirs.train()
    assert theirs.state.global_step == 3


def test_engine_arguments_stand_over_trls_settings(pair: tuple[str, str], tmp_path: Path) -> None:
    """As in vLLM's engine, see `colocated.pair_arguments`."""
    for arguments, context in (({}, 60), ({"max_model_len": 40}, 40)):
        generator = {"engine_arguments": arguments}
        trainer = make_trainer("grpo", pair, tmp_path, generator=generator, vllm_max_model_length=60)
        assert trainer.vllm_generation.pair.context == context


@pytest.mark.parametrize("kind", ["grpo", "divergence"])
def test_a_context_that_is_short_is_named_by_its_flag(pair: tuple[str, str], tmp_path: Path, kind: str) -> None:
    """It cuts completions, of which a trainer warns once, or leaves no room for one."""
    longest = max(map(len, TEXTS))
    with pytest.raises(ValueError, match=r"raise `max_model_len` \(of a trainer `vllm_max_model_length`, of a server"):
        make_trainer(kind, pair, tmp_path, vllm_max_model_length=longest)
    trainer = make_trainer(kind, pair, tmp_path, vllm_max_model_length=longest + 3, max_completion_length=10)
    words = rf"before they have the 10 tokens that `max_completion_length` leaves .* of {longest + 3} tokens"
    prompts = [max(TEXTS, key=len)] * 8
    with pytest.warns(UserWarning, match=words):
        one_batch(trainer, prompts)
    assert len(trainer.rollouts) == 8
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one_batch(trainer, prompts)


@pytest.mark.parametrize("kind", ["grpo", "rloo", "raft", "sampled_token"])
def test_another_trainers_configuration_is_refused(pair: tuple[str, str], tmp_path: Path, kind: str) -> None:
    """By both names, where a missing field was named before."""
    wanted = KINDS[kind][1].__name__
    given = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False}
    other = RLOOConfig if kind != "rloo" else GRPOConfig
    for args in (transformers.TrainingArguments(**given), other(**given), given):
        words = rf"^`args` is a `{type(args).__name__}`, which lacks fields .*; wanted a `{wanted}`\. Pass one"
        with pytest.raises(ValueError, match=words):
            make_trainer(kind, pair, tmp_path, trainer={"args": args})


def test_the_users_config_is_left_as_it_was(pair: tuple[str, str], tmp_path: Path) -> None:
    trainer = make_trainer("grpo", pair, tmp_path)
    args = GRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    GRPOTrainer(pair[1], reward, args=args, generator=trainer.generator, train_dataset=trainer.train_dataset)
    assert args.use_vllm is False


@pytest.mark.parametrize("kind", ["grpo", "rloo", "divergence"])
def test_arguments_by_position_are_trls(pair: tuple[str, str], tmp_path: Path, kind: str) -> None:
    like = make_trainer(kind, pair, tmp_path)
    second = reward if kind in RL else None
    trainer = KINDS[kind][0](pair[1], second, like.args, like.train_dataset, generator=like.generator)
    assert trainer.args.max_completion_length == 10
    assert trainer.train_dataset is like.train_dataset
    one_batch(trainer, TEXTS[:1] * 4)


def test_no_config_at_all(pair: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Our configuration, under TRL's name; on a CPU it has to be told so, or TRL's own default bf16 refuses it."""
    monkeypatch.chdir(tmp_path)  # where the folder of that name is made
    for kind, name in (("grpo", "student-GRPO"), ("rloo", "student-RLOO"), ("divergence", "student-Distillation")):
        trainer_class, config, _ = KINDS[kind]
        assert trainer_class.config_class is config

        class OnCPU:
            config_class = staticmethod(partial(config, use_cpu=True, bf16=False))

        trainer = make_trainer(kind, pair, tmp_path, mixin=OnCPU, trainer={"args": None})
        assert type(trainer.args) is config
        assert trainer.args.output_dir == name
