"""RAFT: which completions are imitated, the gradient against float64, its metrics, its configuration, its refusals."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import trl
from datasets import Dataset
from transformers import TrainingArguments

from helpers.models import make_model
from helpers.training import (
    TEXTS,
    Watch,
    digits,
    load,
    make_trainer,
    make_untrained_pair,
    one_batch,
    rows_of,
)
from optimal_sampling_trl import GRPOConfig, RAFTConfig, RLOOConfig
from optimal_sampling_trl.trainers.raft import UNREAD


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return make_untrained_pair(tmp_path_factory.mktemp("pair"))


def config(**settings: Any) -> RAFTConfig:
    return RAFTConfig("output", use_cpu=True, bf16=False, report_to="none", **settings)


# Which completions are imitated.


@pytest.mark.parametrize("settings", [{}, {"num_generations": 4}, {"steps_per_generation": 4}], ids=str)
def test_weights_belong_to_their_rows(pair: tuple[str, str], tmp_path: Path, settings: dict[str, Any]) -> None:
    """Through shuffle and split: each row's weight is the acceptance of its own completion."""
    trainer = make_trainer("raft", pair, tmp_path, mixin=Watch, accept=0.3, **settings)
    trainer.train()
    decode, seen = trainer.processing_class.decode, []
    for inputs in trainer.micro_batches:
        for (_, ids, _), weight in zip(rows_of(inputs), inputs["imitation_weights"].tolist(), strict=True):
            assert weight == float(np.float32(digits(decode(ids, skip_special_tokens=True))) >= np.float32(0.3))
            seen.append(weight)
    assert set(seen) == {0.0, 1.0}


def test_prompts_of_a_batch_have_one_completion_each(pair: tuple[str, str], tmp_path: Path) -> None:
    for number, settings in ((1, {}), (2, {"num_generations": 2})):
        trainer = make_trainer("raft", pair, tmp_path, mixin=Watch, max_steps=1, **settings)
        trainer.train()
        counts: dict[tuple[int, ...], int] = defaultdict(int)
        for inputs in trainer.micro_batches:
            for prompt, _, _ in rows_of(inputs):
                counts[tuple(prompt)] += 1
        assert len(counts) == 8 // number
        assert set(counts.values()) == {number}


def test_a_completion_that_nobody_scores_is_not_imitated(pair: tuple[str, str], tmp_path: Path) -> None:
    def some(completions: list[str], **columns: Any) -> list[float | None]:
        return [None if row % 2 else 1.0 for row in range(len(completions))]

    trainer = make_trainer("raft", pair, tmp_path, trainer={"reward_funcs": some}, completion_weight="reward")
    batch = one_batch(trainer, TEXTS[:4])
    assert batch["imitation_weights"].tolist() == [1.0, 0.0, 1.0, 0.0]
    log = trainer._metrics["train"]
    assert [log[name] for name in ("accepted/mixture", "accepted/prompts")] == [[1.0], [0.5]]


def test_nothing_accepted_is_no_error_and_moves_nothing(pair: tuple[str, str], tmp_path: Path) -> None:
    def never(completions: list[str], **columns: Any) -> list[float]:
        return [0.0] * len(completions)

    for denominator in ("all", "accepted"):
        trainer = make_trainer("raft", pair, tmp_path, trainer={"reward_funcs": never}, denominator=denominator)
        before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
        trainer.train()
        assert trainer.state.global_step == 3
        for name, parameter in trainer.model.named_parameters():
            assert torch.equal(parameter, before[name]), name
        logs = [entry for entry in trainer.state.log_history if "loss" in entry]
        assert [(log["loss"], log["accepted/mixture"], log["accepted/prompts"]) for log in logs] == [(0, 0, 0)] * 3


def right(completions: list[str], **columns: Any) -> list[float]:
    return [1.0] * len(completions)


SHY, OVER = [0.35, 0.45, 0.2], [0.1, 0.6, 0.1, 0.2]
"""Weights that sum to 1, and in float32 to a bit less and a bit more."""


@pytest.mark.parametrize(("weights", "weight"), [(SHY, "accepted"), (SHY, "reward"), (OVER, "reward")])
def test_full_marks_in_several_functions_are_accepted(
    pair: tuple[str, str], tmp_path: Path, weights: list[float], weight: str
) -> None:
    """Though their weighted sum is rounded; in the loss a weight is 1 at most."""
    given = {"reward_funcs": [right] * len(weights)}
    settings = {"reward_weights": weights, "accept": 1.0, "completion_weight": weight, "max_steps": 1}
    trainer = make_trainer("raft", pair, tmp_path, mixin=Watch, trainer=given, **settings)
    trainer.train()
    assert float(trainer.rewards[0]) != 1, "the test means nothing"
    log = next(entry for entry in trainer.state.log_history if "accepted/mixture" in entry)
    assert log["accepted/mixture"] == 1
    assert log["loss"] > 0
    found = torch.cat([inputs["imitation_weights"] for inputs in trainer.micro_batches])
    assert found.tolist() == pytest.approx([1.0] * 8, abs=1e-6)
    assert found.max() <= 1


def test_a_total_of_zero_is_not_accepted(pair: tuple[str, str], tmp_path: Path) -> None:
    """Though float32 leaves 1.5e-8 of a sum that cancels."""
    weights = torch.tensor(cancel := [0.3, -0.1, -0.2])
    assert float(weights.sum()) > 0, "the test means nothing"
    trainer = make_trainer("raft", pair, tmp_path, trainer={"reward_funcs": [right] * 3}, reward_weights=cancel)
    assert one_batch(trainer, TEXTS[:4])["imitation_weights"].tolist() == [0.0] * 4


# The gradient.


@pytest.mark.parametrize(
    "settings",
    [
        {"max_completion_length": 4},
        {"accept": 0.4},
        {"accept": 0.4, "denominator": "accepted"},
        {"completion_weight": "reward"},
        {"completion_weight": "reward", "accept": 0.3, "denominator": "accepted", "temperature": 0.8},
        {"num_generations": 4, "accept": 0.3, "temperature": 1.3},
    ],
    ids=lambda value: "-".join(f"{k}={v}" for k, v in value.items()),
)
def test_gradients_against_float64(pair: tuple[str, str], tmp_path: Path, settings: dict[str, Any]) -> None:
    """−Σ w·log θ over all tokens, or over the weighted tokens, with a student that reads each row alone."""
    single = {"gradient_accumulation_steps": 1, "per_device_train_batch_size": 12}
    trainer = make_trainer("raft", pair, tmp_path, generator={"theta_fraction": 0.5}, **single | settings)
    batch = one_batch(trainer, [text for text in TEXTS[:3] for _ in range(4)])
    assert len(set(batch["mixture_rows"].tolist())) == 2
    trainer.current_gradient_accumulation_steps = 1  # which `train()` would set
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()

    theta, total, divisor, weights = load(pair[1]).double(), 0.0, 0.0, []
    for prompt, ids, _ in rows_of(batch):
        score = digits(trainer.processing_class.decode(ids, skip_special_tokens=True))
        counts = score >= settings["accept"] - 1e-6 if "accept" in settings else score > 0
        weight = counts * (score if "completion_weight" in settings else 1.0)
        logits = theta(input_ids=torch.tensor([[*prompt, *ids]]), use_cache=False).logits[0, len(prompt) - 1 : -1]
        log_theta = (logits / trainer.args.temperature).log_softmax(-1).gather(1, torch.tensor(ids)[:, None])
        total = total - weight * log_theta.sum()
        divisor += len(ids) * (weight if settings.get("denominator") == "accepted" else 1.0)
        weights.append(weight)
    assert len(set(weights)) > 1  # the test means something
    wanted = total / divisor
    wanted.backward()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-4)
    exact = dict(theta.named_parameters())
    largest = max(float(parameter.grad.abs().max()) for parameter in exact.values())
    assert largest > 1e-3
    for name, parameter in trainer.model.named_parameters():
        assert float((parameter.grad.double() - exact[name].grad).abs().max()) < 1e-4 * largest, name


@pytest.mark.parametrize("denominator", ["all", "accepted"])
def test_micro_batches_add_up_to_the_batch(pair: tuple[str, str], tmp_path: Path, denominator: str) -> None:
    trainer = make_trainer("raft", pair, tmp_path, denominator=denominator, accept=0.3)
    trainer.current_gradient_accumulation_steps = 2
    batch = one_batch(trainer, TEXTS[:8])
    whole = trainer.compute_loss(trainer.model, batch).item()
    halves = [{name: x[part] if x.ndim else x for name, x in batch.items()} for part in (slice(2), slice(2, None))]
    assert halves[0]["completion_mask"].sum() != halves[1]["completion_mask"].sum()
    parts = [trainer.compute_loss(trainer.model, half).item() for half in halves]
    assert sum(parts) == pytest.approx(whole, rel=1e-5)
    assert min(parts) > 1e-3


def test_an_evaluation_imitates_what_the_student_had_accepted(pair: tuple[str, str], tmp_path: Path) -> None:
    """Its loss is −log θ of the accepted completions over all tokens, by recomputation; three of each prompt."""
    data = Dataset.from_dict({"prompt": TEXTS[:4]})
    settings = {"per_device_eval_batch_size": 12, "num_generations_eval": 3, "accept": 0.3}
    trainer = make_trainer("raft", pair, tmp_path, mixin=Watch, trainer={"eval_dataset": data}, **settings)
    logged = trainer.evaluate()
    ((training, output, _),) = trainer.generations
    assert not training
    rows = [
        (digits(trainer.processing_class.decode(ids, skip_special_tokens=True)), r) for _, ids, r in rows_of(output)
    ]
    accepted = np.array([score >= 0.3 - 1e-6 for score, _ in rows]).reshape(4, 3)
    assert 0 < accepted.sum() < 12
    total = sum(float(record["log_theta"].sum()) for (_, record), counts in zip(rows, accepted.flatten()) if counts)
    wanted = {
        "eval_loss": -total / sum(len(record["log_theta"]) for _, record in rows),
        "eval_accepted/theta": accepted.mean(),
        "eval_accepted/prompts": accepted.any(1).mean(),
    }
    assert {name: logged[name] for name in wanted} == pytest.approx(wanted, rel=1e-4)
    assert "eval_accepted/mixture" not in logged


# Metrics.


@pytest.mark.parametrize("number", [1, 4])
def test_acceptance_by_recomputation(pair: tuple[str, str], tmp_path: Path, number: int) -> None:
    settings: dict[str, Any] = {"generator": {"theta_fraction": 0.25}, "num_generations": number, "accept": 0.3}
    trainer = make_trainer("raft", pair, tmp_path, mixin=Watch, **settings)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "alpha/mean" in entry]
    assert len(logs) == len(trainer.generations) == 3
    for log, (_, _, rollouts) in zip(logs, trainer.generations, strict=True):
        scores = np.array([digits(rollout.text) for rollout in rollouts])
        alone = np.array([rollout.mixture.is_theta_only for rollout in rollouts])
        assert alone.sum() == 2
        accepted = scores >= 0.3 - 1e-6
        wanted = {
            "accepted/theta": accepted[alone].mean(),
            "accepted/mixture": accepted[~alone].mean(),
            "accepted/prompts": accepted.reshape(-1, number).any(1).mean(),
            "mixture/reward_theta": scores[alone].mean(),
            "mixture/reward_mixture": scores[~alone].mean(),
            "reward": scores.mean(),
        }
        assert {name: log[name] for name in wanted} == pytest.approx(wanted, rel=1e-4, abs=1e-5)
        assert 0 <= log["engine/log_theta_difference"] < 1e-5
        assert log["entropy"] > 0
        assert "mixture/groups_with_signal" not in log


# The configuration.


def test_one_completion_for_each_prompt_is_the_default() -> None:
    for made, number in ((config(), 1), (config(per_device_train_batch_size=3, num_generations=3), 3)):
        assert (made.num_generations, type(made.num_generations)) == (number, int)


@pytest.mark.parametrize(
    "settings",
    [{}, {"gradient_accumulation_steps": 3}, {"steps_per_generation": 5}, {"generation_batch_size": 24}],
    ids=str,
)
def test_what_trl_derives_is_derived(settings: dict[str, Any]) -> None:
    """Beside the check for two completions, TRL's configuration is as it would be with two of each prompt."""
    for number in (1, 2):
        ours, upstream = (
            each("output", use_cpu=True, bf16=False, per_device_train_batch_size=4, num_generations=n, **settings)
            for each, n in ((RAFTConfig, number), (trl.GRPOConfig, 2))
        )
        differ = [
            field.name
            for field in fields(trl.GRPOConfig)
            if getattr(ours, field.name) != getattr(upstream, field.name) and field.name != "num_generations"
        ]
        assert differ in ([], ["logging_dir"])
    assert config(per_device_train_batch_size=1, gradient_accumulation_steps=1).generation_batch_size == 1


def test_trls_other_refusals_stay() -> None:
    with pytest.raises(ValueError, match="must be divisible by num_generations"):
        config(per_device_train_batch_size=4, num_generations=3)
    with pytest.raises(ValueError, match="divisible by the number of generations used for evaluation"):
        config(eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=4, num_generations_eval=3)


def test_trls_own_config_gets_our_defaults(pair: tuple[str, str], tmp_path: Path) -> None:
    trainer = make_trainer("raft", pair, tmp_path, config=trl.GRPOConfig, num_generations=2)
    batch = one_batch(trainer, [text for text in TEXTS[:2] for _ in range(2)])
    assert bool(batch["mixture_rows"].all())
    assert set(batch["imitation_weights"].tolist()) <= {0.0, 1.0}
    trainer.train()
    assert trainer.state.global_step == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_generations": 0}, "RAFTConfig: `num_generations` is 0; wanted a whole number of at least 1"),
        ({"num_generations": None}, "`num_generations` is None; wanted a whole number of at least 1"),
        ({"accept": float("nan")}, "RAFTConfig: `accept` is nan; wanted a finite number. Pass one."),
        ({"accept": "yes"}, "RAFTConfig: `accept` is 'yes'; wanted a finite number"),
        (
            {"completion_weight": "rewards"},
            r"Unknown value of `completion_weight` 'rewards'\. Known: accepted, reward\. Did you mean 'reward'\?",
        ),
        ({"denominator": "acepted"}, r"Unknown value of `denominator` 'acepted'\..* Did you mean 'accepted'\?"),
    ],
)
def test_refusals_of_the_configuration(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**settings)
    assert config(accept=-1.5).accept == -1.5


CHANGED = {
    "beta": 0.1, "epsilon": 0.3, "epsilon_high": 0.3, "delta": 2.0, "importance_sampling_level": "sequence",
    "loss_type": "grpo", "scale_rewards": "none", "multi_objective_aggregation": "normalize_then_sum",
    "sync_ref_model": True, "ref_model_mixup_alpha": 0.5, "ref_model_sync_steps": 5, "sapo_temperature_neg": 1.0,
    "sapo_temperature_pos": 2.0, "vespo_k_pos": 1.0, "vespo_lambda_pos": 1.0, "vespo_k_neg": 1.0,
    "vespo_lambda_neg": 1.0, "top_entropy_quantile": 0.5, "entropy_coef": 0.1, "use_adaptive_entropy": True,
    "entropy_coef_min": 0.1, "entropy_coef_max": 0.5, "entropy_coef_delta": 0.1, "entropy_target": 0.5,
    "off_policy_mask_threshold": 1.0, "use_bias_correction_kl": False,
    "vllm_importance_sampling_mode": "token_mask", "vllm_importance_sampling_clip_max": 2.0,
    "vllm_importance_sampling_clip_min": 0.1, "vllm_importance_sampling_cap": 2.0,
}  # fmt: skip
"""Another value than the default of each field that RAFT refuses."""
READ = {
    *("model_init_kwargs", "trust_remote_code", "router_aux_loss_coef", "disable_dropout", "cast_lm_head_to_fp32"),
    *("num_generations", "num_generations_eval", "max_completion_length", "ds3_gather_for_generation"),
    *("shuffle_dataset", "pad_to_multiple_of", "generation_batch_size", "steps_per_generation", "temperature"),
    *("top_p", "top_k", "min_p", "generation_kwargs", "chat_template_kwargs", "repetition_penalty"),
    *("cache_implementation", "use_vllm", "vllm_mode", "vllm_model_impl", "vllm_enable_sleep_mode"),
    *("vllm_structured_outputs_regex", "vllm_server_base_url", "vllm_server_host", "vllm_server_port"),
    *("vllm_server_timeout", "vllm_group_port", "vllm_gpu_memory_utilization", "vllm_max_model_length"),
    *("vllm_tensor_parallel_size", "num_iterations", "reward_weights", "mask_truncated_completions"),
    *("max_tool_calling_iterations", "vllm_importance_sampling_correction", "log_completions", "log_multimodal"),
    *("num_completions_to_print", "log_unique_prompts", "log_completions_hub_repo"),
    *("use_transformers_continuous_batching", "transformers_continuous_batching_config"),
    *("use_transformers_paged",),
}
"""The fields that do in RAFT what they do in TRL's GRPO, or that all of our trainers treat alike."""


def test_every_field_of_trl_is_read_or_refused() -> None:
    """A new one has to be thought about: a setting that does nothing misleads."""
    inherited = {field.name for field in fields(TrainingArguments)}
    known = {field.name for field in fields(trl.GRPOConfig)} - inherited
    advice = f"TRL {trl.__version__}: read it in trainers/raft.py, or refuse it by UNREAD there"
    assert known - READ - set(UNREAD) == set(), advice
    assert READ | set(UNREAD) <= known, f"TRL {trl.__version__} has dropped fields: take them off the lists"
    assert set(CHANGED) == set(UNREAD)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", UNREAD)
def test_machinery_of_a_policy_gradient_is_refused_by_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=rf"`{name}` is .*, and RAFT does not read it: .* Leave it at .*GRPOTrainer"):
        make_trainer("raft", ("no-such-teacher", "no-such-student"), tmp_path, **{name: CHANGED[name]})


@pytest.mark.parametrize("other", [GRPOConfig, RLOOConfig])
def test_the_configuration_of_a_policy_gradient_is_refused(tmp_path: Path, other: type) -> None:
    with pytest.raises(ValueError, match=rf"`args` is a `{other.__name__}`, .*; wanted a `RAFTConfig`. Pass one"):
        make_trainer("raft", ("no-such-teacher", "no-such-student"), tmp_path, config=other, num_generations=2)


def test_a_reward_that_is_no_weight_is_refused(pair: tuple[str, str], tmp_path: Path) -> None:
    def large(completions: list[str], **columns: Any) -> list[float]:
        return [3.0] * len(completions)

    trainer = make_trainer("raft", pair, tmp_path, trainer={"reward_funcs": large}, completion_weight="reward")
    with pytest.raises(
        ValueError, match=r"a reward is 3; wanted all in \[0, 1\]\. Scale .*completion_weight='accepted'"
    ):
        one_batch(trainer, TEXTS[:4])
    trainer = make_trainer(
        "raft", pair, tmp_path, trainer={"reward_funcs": right}, reward_weights=[1.00001], completion_weight="reward"
    )
    with pytest.raises(ValueError, match=r"a reward is 1\.00001; wanted"):
        one_batch(trainer, TEXTS[:4])


def test_a_share_of_the_student_is_of_a_process_s_batch(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"`theta_fraction` is 0\.01 of a group of 8, .*has one completion, a process's"
    ):
        make_trainer("raft", ("no-such", "no-such"), tmp_path, generator={"theta_fraction": 0.01})


def test_the_log_probabilities_of_the_trainer_may_be_left_out(pair: tuple[str, str], tmp_path: Path) -> None:
    """Without TRL's correction a batch costs a forward pass less, and there is no difference to log."""
    trainer = make_trainer("raft", pair, tmp_path, vllm_importance_sampling_correction=False)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "accepted/mixture" in entry]
    assert len(logs) == 3
    assert not [log for log in logs if "engine/log_theta_difference" in log]


def test_the_model_card_names_raft(pair: tuple[str, str], tmp_path: Path) -> None:
    trainer = make_trainer("raft", pair, tmp_path)
    trainer.create_model_card(model_name="student")
    card = (tmp_path / "README.md").read_text()
    assert "2304.06767" in card
    assert "RAFT" in card
    assert "DeepSeekMath" not in card


def test_a_mixture_of_experts_keeps_its_balance(tmp_path: Path) -> None:
    """The router's loss is added as TRL adds it to GRPO's: the coefficient times what the model returns."""
    teacher, student = (make_model(tmp_path / name, "qwen3_moe", seed) for seed, name in enumerate(("large", "small")))
    losses = []
    for coefficient in (0.0, 0.5):
        trainer = make_trainer("raft", (teacher, student), tmp_path, router_aux_loss_coef=coefficient, accept=-1.0)
        batch = one_batch(trainer, TEXTS[:4])
        trainer.current_gradient_accumulation_steps = 1
        losses.append(trainer.compute_loss(trainer.model, batch).item())
    ids, mask = (torch.cat([batch[f"prompt_{name}"], batch[f"completion_{name}"]], dim=1) for name in ("ids", "mask"))
    with torch.no_grad():
        output = trainer.model(input_ids=ids, attention_mask=mask, output_router_logits=True)
    assert losses[1] - losses[0] == pytest.approx(0.5 * float(output.aux_loss), rel=1e-4)
    assert float(output.aux_loss) > 0.1
