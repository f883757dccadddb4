"""The guard of the weights: what it lets pass, what stops training, and what it says; on trained students as well."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import AutoModelForCausalLM

from helpers.models import make_model
from helpers.training import KINDS, TEXTS, load, make_trainer
from optimal_sampling_trl import GRPOConfig
from optimal_sampling_trl.trainers.guard import BOUNDS, CPU_BOUND, WeightGuard, bound_of, dropout_of, log_theta_of

CPU, GPU = torch.device("cpu"), torch.device("cuda")
LOG_THETA = torch.linspace(-3, -1, 9)


def test_the_coarsest_type_sets_the_bound() -> None:
    assert bound_of([torch.float32], CPU) == CPU_BOUND
    assert bound_of([torch.float32], GPU) == BOUNDS[torch.float32]
    assert bound_of([torch.float32, torch.bfloat16], CPU) == BOUNDS[torch.bfloat16]
    assert bound_of([torch.float16, torch.float32], GPU) == BOUNDS[torch.float16]


@pytest.mark.parametrize("shift", [0.0, 0.009, -0.009])
def test_rounding_passes(shift: float, caplog: pytest.LogCaptureFixture) -> None:
    WeightGuard(0.01).check(LOG_THETA, LOG_THETA + shift)
    WeightGuard(0.01).check(LOG_THETA[:0], LOG_THETA[:0])
    assert not caplog.messages


@pytest.mark.parametrize("shift", [0.03, -0.03, torch.nan])
def test_more_stops_training_with_both_numbers(shift: float) -> None:
    """The mean counts: differences that cancel do not."""
    signs = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, -1.0, 1.0, -1.0, 1.0])
    words = r"differ by (0.03|nan) nats a token in the mean over 9 tokens \(engine -2, trainer (-1.997|-2.003|nan)\); "
    with pytest.raises(
        RuntimeError, match=words + "rounding explains up to 0.01, and 0.02 stops.*Check: dropout; was the student"
    ):
        WeightGuard(0.01).check(LOG_THETA, LOG_THETA + shift * signs, ["dropout"])


def test_improbable_tokens_may_differ_by_more() -> None:
    """The weights of a student in bfloat16 lag behind the trainer's; what a user sets is taken as it is."""
    far = LOG_THETA - 8  # -10 in the mean
    WeightGuard(0.15).check(far, far - 0.59)
    with pytest.raises(RuntimeError, match=r"differ by 0\.61 nats .* rounding explains up to 0\.3, and 0\.6 stops"):
        WeightGuard(0.15).check(far, far - 0.61)
    with pytest.raises(RuntimeError, match=r"differ by 8 nats .* rounding explains up to 0\.15, and 0\.3 stops"):
        WeightGuard(0.15).check(LOG_THETA, far)
    with pytest.raises(RuntimeError, match=r"differ by 0\.29 nats"):
        WeightGuard(0.15, 0.2).check(far, far - 0.29)


def test_a_batch_above_the_bound_warns_once(caplog: pytest.LogCaptureFixture) -> None:
    guard = WeightGuard(0.15)
    for _ in range(3):
        guard.check(LOG_THETA, LOG_THETA + 0.17)
    assert len(caplog.messages) == 1
    assert "differ by 0.17 nats" in caplog.text


@pytest.mark.parametrize("tolerance", [0.5, torch.inf])
def test_a_larger_tolerance_warns(tolerance: float, caplog: pytest.LogCaptureFixture) -> None:
    WeightGuard(0.01, tolerance).check(LOG_THETA, LOG_THETA + 0.2)
    assert "differ by 0.2 nats" in caplog.text
    with pytest.raises(RuntimeError, match=r"differ by 0\.002 nats"):
        WeightGuard(0.01, 0.001).check(LOG_THETA, LOG_THETA + 0.002)


@pytest.mark.parametrize("tolerance", [-1.0, torch.nan])
def test_a_tolerance_that_is_none_is_refused(tmp_path: Path, tolerance: float) -> None:
    with pytest.raises(ValueError, match=r"`log_theta_tolerance` is .*; wanted a number of at least 0"):
        GRPOConfig(str(tmp_path), use_cpu=True, bf16=False, log_theta_tolerance=tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_each_trainer_compares_on_the_first_batch_after_each_change(
    pair: tuple[str, str], tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared = []
    check = WeightGuard.check

    def counted(self: Any, engine: Any, trainer: Any, hints: Any = ()) -> None:
        compared.append((len(engine), float((engine - trainer).abs().max())))
        check(self, engine, trainer, hints)

    monkeypatch.setattr(WeightGuard, "check", counted)
    trainer = make_trainer(
        kind, pair, tmp_path, max_steps=2, trainer={"eval_dataset": Dataset.from_dict({"prompt": TEXTS[:8]})}
    )
    trainer.train()
    trainer.evaluate()  # two batches of one student
    assert len(compared) == 3
    assert all(tokens > 0 and worst < 1e-4 for tokens, worst in compared)


@pytest.mark.parametrize("kind", ["grpo", "divergence"])
def test_an_evaluation_in_bfloat16_is_held_to_its_bound(pair: tuple[str, str], tmp_path: Path, kind: str) -> None:
    """transformers casts the model for an evaluation outside training, and leaves it so."""
    trainer = make_trainer(
        kind, pair, tmp_path, bf16_full_eval=True, trainer={"eval_dataset": Dataset.from_dict({"prompt": TEXTS[:4]})}
    )
    trainer.train()
    assert trainer.guard.bound == CPU_BOUND
    trainer.evaluate()
    assert trainer.guard.bound == BOUNDS[torch.bfloat16]


@pytest.mark.parametrize("kind", KINDS)
def test_a_record_of_another_student_stops_training(pair: tuple[str, str], tmp_path: Path, kind: str) -> None:
    """The rollouts come from a copy that is not trained: fine at first, not after a step."""
    trainer = make_trainer(kind, pair, tmp_path, learning_rate=0.05)
    trainer.vllm_generation.backend.theta = load(pair[1])
    with pytest.raises(RuntimeError, match=r"differ by \d\.\d+ nats a token .* rounding explains up to 0\.001"):
        trainer.train()
    assert trainer.state.global_step == 1


def test_dropout_is_named_and_no_other_student(pair: tuple[str, str], tmp_path: Path) -> None:
    """The guard compares without dropout, the metric shows what the ratio has."""
    model = AutoModelForCausalLM.from_pretrained(pair[1], dtype=torch.float32, attention_dropout=0.5)
    with pytest.warns(UserWarning, match=r"The student has dropout or noise \(attention_dropout 0\.5\)") as caught:
        trainer = make_trainer("grpo", pair, tmp_path, trainer={"model": model}, max_steps=2)
    named = [Path(one.filename).name for one in caught if "dropout" in str(one.message)]
    assert named == ["training.py"]  # the line that builds the trainer
    trainer.train()
    assert trainer.state.log_history[0]["engine/log_theta_difference"] > 0.01
    other = make_trainer("grpo", pair, tmp_path / "other", trainer={"model": model}, learning_rate=0.05)
    other.vllm_generation.backend.theta = load(pair[1])
    with pytest.raises(RuntimeError, match=r"Check: the student has dropout or noise \(attention_dropout 0\.5\); was"):
        other.train()


def test_noise_in_the_embeddings_is_named_and_compared_without(pair: tuple[str, str], tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"The student has dropout or noise \(neftune_noise_alpha 5\)"):
        trainer = make_trainer("raft", pair, tmp_path, neftune_noise_alpha=5.0, max_steps=2)
    trainer.train()
    assert trainer.state.global_step == 2


def test_dropout_of_every_kind_is_found(pair: tuple[str, str]) -> None:
    peft = pytest.importorskip("peft")
    assert not dropout_of(load(pair[1]))
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_dropout=0.1)
    assert dropout_of(peft.get_peft_model(load(pair[1]), config)) == ["lora_dropout 0.1"]
    assert dropout_of(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.25))) == ["1 0.25"]


def test_log_theta_of_rows_is_that_of_a_batch(pair: tuple[str, str], tmp_path: Path) -> None:
    """At the temperature, and in the state that the module was in."""
    trainer = make_trainer("grpo", pair, tmp_path, temperature=0.7)
    trainer.model.train()
    output = trainer._generate_and_score_completions([{"prompt": text} for text in TEXTS[:4]])
    prompts = [rollout.theta_prompt_ids for rollout in trainer.rollouts]
    mine = log_theta_of(trainer.model, prompts, trainer.rollouts, 0.7)
    assert torch.allclose(mine, output["old_per_token_logps"][output["completion_mask"].bool()], atol=1e-5)
    assert trainer.model.training


def test_padding_that_turns_the_angles_of_longrope(tmp_path: Path) -> None:
    """Each prompt has room beside its completion; the longest of both, to which a batch is padded, have not."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 16, "long_factor": [2.0] * 16}
    long = {"rope_parameters": rope, "original_max_position_embeddings": 32}
    pair = make_model(tmp_path / "t", "phi3", 0, **long), make_model(tmp_path / "s", "phi3", 1, **long)
    data = Dataset.from_dict({"prompt": ["1", "2" * 25]})
    settings = {"per_device_train_batch_size": 8, "num_generations": 4, "gradient_accumulation_steps": 1}
    fitting = Dataset.from_dict({"prompt": ["1", "2" * 22]})
    make_trainer("grpo", pair, tmp_path / "fits", trainer={"train_dataset": fitting}, **settings).train()
    trainer = make_trainer("grpo", pair, tmp_path / "run", trainer={"train_dataset": data}, **settings)
    with pytest.raises(
        ValueError, match=r"LongRoPE, .* behind 32 tokens, .* is padded to 35: .*max_completion_length"
    ):
        trainer.train()
