"""The three trainers on the transformers backend: records in their rows, corrections, metrics, schedules, refusals."""

from __future__ import annotations

import copy
import inspect
import json
import re
import shutil
import warnings
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import trl
from torch import Tensor
from transformers import AutoTokenizer

import pair as embedded
from helpers.children import run_two_ranks
from helpers.oracle import check_rollout
from helpers.training import (
    KINDS,
    TEXTS,
    Watch,
    check_batch,
    digits,
    load,
    make_trainer,
    make_untrained_pair,
    one_batch,
    reward,
    rows_of,
)
from optimal_sampling_trl import GRPOConfig, GRPOTrainer, Mixture, OptimalSamplingGenerator, RLOOConfig
from optimal_sampling_trl.losses import CORRECTIONS, Correction
from optimal_sampling_trl.rollouts.rollout import RECORDS
from optimal_sampling_trl.trainers.engines.base import MixturePlan
from optimal_sampling_trl.trainers.records import stack_records

RL = ("grpo", "rloo")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return make_untrained_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def teacher(pair: tuple[str, str]) -> Any:
    return load(pair[0])


# Training: every parameter moves, and each record stays with its row.


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("grpo", {}),
        ("grpo", {"num_iterations": 2}),
        ("grpo", {"steps_per_generation": 4}),
        ("grpo", {"num_iterations": 2, "steps_per_generation": 1}),
        ("rloo", {"num_iterations": 2}),
        ("rloo", {"steps_per_generation": 4}),
        ("divergence", {}),
        ("divergence", {"correction": "prefix_truncate", "correction_window": 3}),
        ("sampled_token", {}),
        ("raft", {}),
        ("raft", {"num_iterations": 2}),
        ("raft", {"steps_per_generation": 4, "num_generations": 2}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(f"{k}={v}" for k, v in value.items()),
)
def test_three_steps(pair: tuple[str, str], teacher: Any, tmp_path: Path, kind: str, settings: dict[str, Any]) -> None:
    """Through shuffle, split, accumulation and repeated use of a batch: each micro-batch is held against the oracle,
    which reads each row alone, with the weights of the moment of sampling."""
    trainer = make_trainer(kind, pair, tmp_path, mixin=Watch, **settings)
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    for name, parameter in trainer.model.named_parameters():
        assert not torch.equal(parameter, before[name]), f"{name} did not move"

    steps, accumulation = trainer.args.max_steps, trainer.args.gradient_accumulation_steps
    per_generation = getattr(trainer.args, "steps_per_generation", accumulation)
    repeats = getattr(trainer, "num_iterations", 1)
    assert len(trainer.micro_batches) == steps * accumulation
    assert len(trainer.generations) == -(-steps * accumulation // (per_generation * repeats))
    theta = load(pair[1])
    shuffled = 0
    for index, inputs in enumerate(trainer.micro_batches):
        generation = index // (per_generation * repeats)
        training, output, _ = trainer.generations[generation]
        assert training
        theta.load_state_dict(trainer.weights[generation], strict=False)
        theta.tie_weights()
        check_batch(inputs, teacher, theta, Mixture(), tolerance=2e-5)
        micro = index % per_generation
        rows = slice(micro * 4, micro * 4 + 4)
        shuffled += not torch.equal(inputs["log_teacher"], output["log_teacher"][rows])
    assert shuffled  # the test means something: TRL did change the order of rows
    lengths = {int(n) for inputs in trainer.micro_batches for n in inputs["completion_mask"].sum(1)}
    assert len(lengths) > 1  # and padding was there to be got wrong


@pytest.mark.parametrize("kind", RL)
def test_advantages_belong_to_their_rows(pair: tuple[str, str], tmp_path: Path, kind: str) -> None:
    """From the micro-batches alone: rewards from the completions, groups from the prompts, advantages by hand."""
    settings = {"positive_only": "mixture"} | ({"beta": 0.0} if kind == "rloo" else {})
    trainer = make_trainer(kind, pair, tmp_path, mixin=Watch, max_steps=2, **settings)
    trainer.train()
    decode = trainer.processing_class.decode
    for step in range(2):
        groups: dict[tuple[int, ...], list[tuple[float, bool, float]]] = defaultdict(list)
        for inputs in trainer.micro_batches[2 * step : 2 * step + 2]:
            for row, (prompt, completion, _) in enumerate(rows_of(inputs)):
                scored = digits(decode(completion, skip_special_tokens=True))
                groups[tuple(prompt)].append(
                    (scored, bool(inputs["mixture_rows"][row]), float(inputs["advantages"][row]))
                )
        assert len(groups) == 2
        for rows in groups.values():
            assert [mixed for _, mixed, _ in rows].count(True) == 2
            rewards = np.array([scored for scored, _, _ in rows])
            if kind == "grpo":
                wanted = (rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-4)
            else:
                wanted = rewards - (rewards.sum() - rewards) / 3
            mixed = np.array([mixed for _, mixed, _ in rows])
            wanted = np.where(mixed, np.maximum(wanted, 0.0), wanted)
            assert [advantage for _, _, advantage in rows] == pytest.approx(wanted.tolist(), abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_samples_from_the_student_alone(pair: tuple[str, str], tmp_path: Path, kind: str) -> None:
    from datasets import Dataset

    trainer = make_trainer(
        kind, pair, tmp_path, mixin=Watch, trainer={"eval_dataset": Dataset.from_dict({"prompt": TEXTS[:4]})}
    )
    metrics = trainer.evaluate()
    assert metrics["eval_mixture/tokens_per_second"] > 0
    assert not [name for name in metrics if "alpha" in name or "mixture/kl" in name]
    assert trainer.generations
    theta = load(pair[1])
    for training, output, rollouts in trainer.generations:
        assert not training
        assert bool((output["alpha"] == 0).all())
        assert not output["mixture_rows"].any()
        assert torch.allclose(output["log_q"], output["log_theta"], atol=1e-5)
        for rollout in rollouts:
            check_rollout(rollout, load(pair[0]), theta, tolerance=2e-5)
    one_batch(trainer, TEXTS[:1] * 4)  # and training goes on with the mixture
    assert trainer.generations[-1][1]["mixture_rows"].any()


# Which completions come from the mixture.


@pytest.mark.parametrize("fraction", [0.0, 0.25, 0.5, 0.75, 1.0])
@pytest.mark.parametrize(("processes", "rows"), [(1, 24), (2, 12), (3, 8), (4, 6), (8, 3), (24, 1)])
def test_a_group_may_span_processes(fraction: float, processes: int, rows: int) -> None:
    generator, group = OptimalSamplingGenerator(teacher="t", theta_fraction=fraction), 4
    plan = MixturePlan(generator, lambda: group, lambda: generator.theta_count(group, 0.5), lambda: True, lambda: 0.0)
    drawn = [mixture for rank in range(processes) for mixture in plan.mixtures(rows, rank * rows)]
    alone = round(4 * fraction)
    assert [mixture.is_theta_only for mixture in drawn] == ([True] * alone + [False] * (4 - alone)) * 6


@pytest.mark.parametrize("fraction", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_theta_fraction_of_each_group(pair: tuple[str, str], tmp_path: Path, kind: str, fraction: float) -> None:
    trainer = make_trainer(kind, pair, tmp_path, generator={"theta_fraction": fraction})
    prompts = [text for text in TEXTS[:4] for _ in range(4)]
    batch = one_batch(trainer, prompts)
    group = 4 if kind in RL else 8
    alone = int(group * fraction)
    assert batch["mixture_rows"].tolist() == ([False] * alone + [True] * (group - alone)) * (16 // group)
    tokens = batch["completion_mask"].bool()
    own = tokens & ~batch["mixture_rows"][:, None]
    assert bool((batch["alpha"][own] == 0).all())
    assert bool((batch["alpha"][tokens & batch["mixture_rows"][:, None]] > 0).all())
    assert torch.allclose(batch["log_q"][own], batch["log_theta"][own], atol=1e-5)


def test_default_shares(pair: tuple[str, str], tmp_path: Path) -> None:
    for kind, share in (("grpo", 0.5), ("rloo", 0.5), ("divergence", 0.0)):
        trainer = make_trainer(kind, pair, tmp_path)
        batch = one_batch(trainer, TEXTS[:1] * 8)
        assert float((~batch["mixture_rows"]).float().mean()) == share


# Metrics.


@pytest.mark.parametrize("kind", KINDS)
def test_metrics_by_recomputation(pair: tuple[str, str], tmp_path: Path, kind: str) -> None:
    trainer = make_trainer(kind, pair, tmp_path, mixin=Watch)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "alpha/mean" in entry]
    assert len(logs) == len(trainer.generations) == 3
    for log, (_, output, rollouts) in zip(logs, trainer.generations, strict=True):
        mixed = [r for r, chosen in zip(rollouts, output["mixture_rows"].tolist(), strict=True) if chosen]
        assert len(mixed) == (4 if kind in RL else 8)
        alpha, log_q, log_theta, log_teacher = (
            np.concatenate([getattr(r, name).double().numpy() for r in mixed]) for name in RECORDS
        )
        weights = np.exp(log_theta - log_q)
        wanted = {
            "alpha/mean": alpha.mean(),
            "alpha/q10": np.quantile(alpha, 0.1),
            "alpha/q50": np.quantile(alpha, 0.5),
            "alpha/q90": np.quantile(alpha, 0.9),
            "mixture/kl_theta": (log_q - log_theta).mean(),
            "mixture/kl_teacher": (log_q - log_teacher).mean(),
            "mixture/ess": weights.sum() ** 2 / (weights**2).sum() / len(weights),
        }
        if kind in RL:
            scores = np.array([digits(rollout.text) for rollout in rollouts]).reshape(-1, 4)
            wanted |= {
                "mixture/reward_theta": scores[:, :2].mean(),
                "mixture/reward_mixture": scores[:, 2:].mean(),
                "mixture/groups_with_signal": (scores.max(1) > scores.min(1)).mean(),
                "reward": scores.mean(),
            }
        assert {name: log[name] for name in wanted} == pytest.approx(wanted, rel=1e-4, abs=1e-5)
        assert log["mixture/tokens_per_second"] > 0
        if kind == "grpo":
            assert 0 <= log["engine/log_theta_difference"] < 1e-5
            assert log["sampling/importance_sampling_ratio/mean"] == pytest.approx(1, abs=1e-4)


def test_the_engines_difference_is_measured_against_the_trainer(pair: tuple[str, str], tmp_path: Path) -> None:
    """A log θ that is 0.01 off in the engine's record shows as 0.01."""
    trainer = make_trainer("grpo", pair, tmp_path)
    take = trainer.vllm_generation.pop_rollouts

    def off() -> Any:
        rollouts = take()
        for rollout in rollouts:
            rollout.log_theta.add_(0.01)
        return rollouts

    trainer.vllm_generation.pop_rollouts = off
    one_batch(trainer, TEXTS[:1] * 4)
    assert trainer._metrics["train"]["engine/log_theta_difference"] == pytest.approx([0.01], abs=1e-5)


# Corrections.


@pytest.mark.parametrize("name", CORRECTIONS)
def test_grpo_multiplies_trls_ratio_on_mixture_rows(pair: tuple[str, str], tmp_path: Path, name: str) -> None:
    level, _, shape = name.partition("_")
    settings: dict[str, Any] = {"truncate": {"clip_max": 1.3}, "mask": {"clip_max": 1.3, "clip_min": 0.2}}.get(
        shape, {}
    )
    settings |= ({"gamma": 0.5} if shape == "luffy" else {}) | ({"window": 2} if level == "prefix" else {})
    details = {f"correction_{detail}": value for detail, value in settings.items()}
    trainer = make_trainer("grpo", pair, tmp_path, correction=name, **details)
    batch = one_batch(trainer, [text for text in TEXTS[:4] for _ in range(4)])
    for row, (_, _, records) in enumerate(rows_of(batch)):
        ratios = (records["log_theta"].double() - records["log_q"].double()).exp().tolist()
        for i in range(len(ratios)):
            product = {"token": ratios[i], "prefix": np.prod(ratios[max(0, i - 1) : i + 1]), "none": 1.0}
            w = product.get(level, np.prod(ratios))
            w = {"truncate": min(w, 1.3), "mask": w * (0.2 <= w <= 1.3), "luffy": w / (w + 0.5)}.get(shape, w)
            wanted = w if batch["mixture_rows"][row] else 1.0
            assert float(batch["importance_sampling_ratio"][row, -1 if level == "none" else i]) == pytest.approx(
                wanted, rel=1e-3, abs=1e-4
            )
    if name != "none":
        mixed = batch["importance_sampling_ratio"][batch["mixture_rows"]]
        assert float((mixed - 1).abs().max()) > 0.05


@pytest.mark.parametrize("settings", [{"top_k": 5}, {"top_p": 0.8}, {"repetition_penalty": 1.3}])
def test_a_truncation_is_no_defect_of_the_engine(pair: tuple[str, str], tmp_path: Path, settings: Any) -> None:
    """TRL's ratio is of the trainer against the engine; of the truncated q it would drop the student's rows."""
    trainer = make_trainer("grpo", pair, tmp_path, **settings)
    batch = one_batch(trainer, [text for text in TEXTS[:4] for _ in range(4)])
    assert set(batch["mixture_rows"].tolist()) == {True, False}
    assert float((batch["importance_sampling_ratio"] - 1).abs().max()) < 1e-4


def test_completions_that_no_function_scores_count_for_nothing(pair: tuple[str, str], tmp_path: Path) -> None:
    def some(completions: list[str], **columns: Any) -> list[float | None]:
        return [None if row % 4 in (0, 3) else 1.0 + row // 4 for row in range(len(completions))]

    def none(completions: list[str], **columns: Any) -> list[None]:
        return [None] * len(completions)

    for rewards, wanted in ((some, [1.5, 1.5, 0.0]), (none, [np.nan, np.nan, 0.0])):
        trainer = make_trainer("grpo", pair, tmp_path, trainer={"reward_funcs": rewards})
        one_batch(trainer, [text for text in TEXTS[:2] for _ in range(4)])
        log = trainer._metrics["train"]
        names = ("mixture/reward_theta", "mixture/reward_mixture", "mixture/groups_with_signal")
        assert [log[name][0] for name in names] == pytest.approx(wanted, nan_ok=True)


@pytest.mark.parametrize("kind", RL)
def test_positive_only(pair: tuple[str, str], tmp_path: Path, kind: str) -> None:
    """The same rollouts: "none", TRL's advantages; "mixture", its negatives are 0; the default, all are."""
    prompts = [text for text in TEXTS[:4] for _ in range(4)]
    off = one_batch(make_trainer(kind, pair, tmp_path, positive_only="none"), prompts)
    on, everywhere = (
        one_batch(make_trainer(kind, pair, tmp_path, **settings), prompts)
        for settings in ({"positive_only": "mixture"}, {})
    )
    assert torch.equal(on["completion_ids"], off["completion_ids"])
    assert torch.equal(everywhere["completion_ids"], off["completion_ids"])
    mixed = off["mixture_rows"]
    assert bool((off["advantages"][mixed] < 0).any())
    assert bool((off["advantages"][~mixed] < 0).any())
    wanted = torch.where(mixed & (off["advantages"] < 0), 0.0, off["advantages"])
    assert torch.equal(on["advantages"], wanted)
    assert torch.equal(everywhere["advantages"], off["advantages"].clamp(min=0))


@pytest.mark.parametrize("config", [GRPOConfig, RLOOConfig])
def test_positive_only_names_completions(tmp_path: Path, config: Any) -> None:
    for got in (True, False, None, 0, "mixtures"):
        wanted = rf"^Unknown value of `positive_only` {got!r}\. Known: all, mixture, none\."
        with pytest.raises(ValueError, match=wanted):
            config(str(tmp_path), use_cpu=True, bf16=False, positive_only=got)


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


def test_no_config_at_all(pair: tuple[str, str], tmp_path: Path) -> None:
    """Our configuration, under TRL's name; on a CPU it has to be told so, or TRL's own default bf16 refuses it."""
    for kind, name in (("grpo", "student-GRPO"), ("rloo", "student-RLOO"), ("divergence", "student-Distillation")):
        trainer_class, config, _ = KINDS[kind]
        assert trainer_class.config_class is config

        class OnCPU:
            config_class = staticmethod(partial(config, use_cpu=True, bf16=False))

        trainer = make_trainer(kind, pair, tmp_path, mixin=OnCPU, trainer={"args": None})
        assert type(trainer.args) is config
        assert trainer.args.output_dir == name


# Gradients against float64.


def log_probabilities(model: Any, prompt: list[int], completion: list[int], temperature: float) -> Tensor:
    """log p (T, V) of a float64 model that reads one row alone."""
    logits = model(input_ids=torch.tensor([[*prompt, *completion]]), use_cache=False).logits
    return (logits[0, len(prompt) - 1 : -1] / temperature).log_softmax(-1)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("grpo", {}),
        ("grpo", {"loss_type": "grpo", "correction": "token_truncate"}),
        ("grpo", {"loss_type": "grpo", "correction": "sequence_luffy", "positive_only": "none"}),
        ("grpo", {"correction": "prefix_mask", "correction_window": 2, "correction_self_normalise": True}),
        ("grpo", {"loss_type": "grpo", "distillation_coefficient": 0.3, "distillation_clip": 1.0}),
        ("grpo", {"positive_only": "mixture"}),
        ("rloo", {"beta": 0.0}),
        ("rloo", {"beta": 0.0, "positive_only": "mixture"}),
        ("rloo", {"beta": 0.0, "correction": "sequence_truncate", "positive_only": "none"}),
        ("divergence", {}),
        ("divergence", {"correction": "prefix_truncate", "correction_clip_max": 1.5}),
        ("divergence", {"correction": "prefix_luffy", "correction_window": 2, "temperature": 1.3}),
        ("sampled_token", {}),
        ("sampled_token", {"sampled_token_clip": 0.5, "sampled_token_centre": True, "temperature": 0.8}),
        ("sampled_token", {"correction": "token_truncate", "correction_clip_max": 1.2}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(f"{k}={v}" for k, v in value.items()) or "default",
)
def test_gradients_against_float64(
    pair: tuple[str, str], teacher: Any, tmp_path: Path, kind: str, settings: dict[str, Any]
) -> None:
    trainer = make_trainer(
        kind,
        pair,
        tmp_path,
        generator={"theta_fraction": 0.5},
        **{"gradient_accumulation_steps": 1, "per_device_train_batch_size": 12} | settings,
    )
    batch = one_batch(trainer, [text for text in TEXTS[:3] for _ in range(4)])
    trainer.current_gradient_accumulation_steps = 1  # which `train()` would set
    called: list[Any] = []  # the head is read in tiles: a call would lay out logits (B, T, V)
    watch = trainer.model.get_output_embeddings().register_forward_hook(lambda *_: called.append(1))
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    watch.remove()
    assert not called

    args, rows = trainer.args, rows_of(batch)
    theta, fixed = load(pair[1]).double(), copy.deepcopy(teacher).double()
    everything = [log_probabilities(theta, prompt, ids, args.temperature) for prompt, ids, _ in rows]
    sampled = [log.gather(1, torch.tensor(ids)[:, None])[:, 0] for log, (_, ids, _) in zip(everything, rows)]
    with torch.no_grad():
        of_teacher = [log_probabilities(fixed, prompt, ids, args.temperature) for prompt, ids, _ in rows]
        log_teacher = [log.gather(1, torch.tensor(ids)[:, None])[:, 0] for log, (_, ids, _) in zip(of_teacher, rows)]
    weights = row_weights(trainer.correction, rows, batch["mixture_rows"].tolist(), inclusive=kind != "divergence")
    count = sum(len(ids) for _, ids, _ in rows)
    if kind in RL:
        scores = [digits(trainer.processing_class.decode(ids, skip_special_tokens=True)) for _, ids, _ in rows]
        grouped = torch.tensor(scores, dtype=torch.float64).view(-1, 4)
        centred = grouped - grouped.mean(1, keepdim=True)
        scaled = centred / (grouped.std(1, keepdim=True) + 1e-4) if kind == "grpo" else centred * 4 / 3
        advantages = scaled.flatten().tolist()
        for row, mixed in enumerate(batch["mixture_rows"].tolist()):
            if args.positive_only == "all" or (args.positive_only == "mixture" and mixed):
                advantages[row] = max(advantages[row], 0)
    if kind == "grpo":
        terms = []
        for a, w, log, log_t in zip(advantages, weights, sampled, log_teacher):
            pull = (log_t - log.detach()).clamp(-args.distillation_clip, args.distillation_clip)
            terms.append(-(a + args.distillation_coefficient * pull) * w * (log - log.detach()).exp())
        if args.loss_type == "grpo":
            wanted = sum(term.mean() for term in terms) / len(rows)
        else:
            wanted = sum(term.sum() for term in terms) / count
    elif kind == "rloo":
        ratios = [(log.sum() - log.sum().detach()).exp() for log in sampled]
        wanted = -sum(a * w[0] * ratio for a, w, ratio in zip(advantages, weights, ratios)) / len(rows)
    elif kind == "divergence":  # TRL's default, reverse KL over the vocabulary
        assert args.beta == 1.0
        divergences = [(log.exp() * (log - t)).sum(-1) for log, t in zip(everything, of_teacher)]
        wanted = sum((w * d).sum() for w, d in zip(weights, divergences)) / count
    else:
        clip = args.sampled_token_clip
        pulls = [(t - log.detach()).clamp(-clip, clip) for t, log in zip(log_teacher, sampled)]
        if args.sampled_token_centre:
            mean = torch.cat(pulls).mean()
            pulls = [pull - mean for pull in pulls]
        wanted = -sum((c * w * log).sum() for c, w, log in zip(pulls, weights, sampled)) / count
    wanted.backward()

    assert loss.item() == pytest.approx(wanted.item(), rel=1e-4, abs=1e-6)
    exact = dict(theta.named_parameters())
    largest = max(float(parameter.grad.abs().max()) for parameter in exact.values())
    assert largest > 1e-3
    for name, parameter in trainer.model.named_parameters():
        assert float((parameter.grad.double() - exact[name].grad).abs().max()) < 1e-4 * largest, name


@pytest.mark.parametrize(
    ("kind", "settings"),
    [("grpo", {}), ("divergence", {}), ("sampled_token", {}), ("sampled_token", {"sampled_token_centre": True})],
)
def test_micro_batches_add_up_to_the_batch(
    pair: tuple[str, str], tmp_path: Path, kind: str, settings: dict[str, Any]
) -> None:
    """Two micro-batches of different length are normalised by the tokens of both, as TRL does."""
    trainer = make_trainer(kind, pair, tmp_path, **settings)
    trainer.current_gradient_accumulation_steps = 2
    batch = one_batch(trainer, [text for text in TEXTS[:2] for _ in range(4)])
    whole = trainer.compute_loss(trainer.model, batch).item()
    halves = [{name: x[part] if x.ndim else x for name, x in batch.items()} for part in (slice(3), slice(3, None))]
    assert halves[0]["completion_mask"].sum() != halves[1]["completion_mask"].sum()
    parts = [trainer.compute_loss(trainer.model, half).item() for half in halves]
    assert sum(parts) == pytest.approx(whole, rel=1e-5)
    assert abs(whole) > 1e-3


def test_truncated_completions_may_be_masked(pair: tuple[str, str], tmp_path: Path) -> None:
    """`mask_truncated_completions` takes rows out of the loss, and of the metrics, without a mismatch of records."""
    trainer = make_trainer("grpo", pair, tmp_path, mask_truncated_completions=True, correction="sequence_truncate")
    batch = one_batch(trainer, [text for text in TEXTS[:8] for _ in range(4)])
    valid = batch["completion_mask"].bool()
    whole = valid.any(1)
    assert 0 < int(whole.sum()) < len(whole)
    mixed = valid & batch["mixture_rows"][:, None]
    assert trainer._metrics["train"]["alpha/mean"] == pytest.approx([batch["alpha"][mixed].mean().item()], rel=1e-5)
    trainer.current_gradient_accumulation_steps = 1
    assert bool(trainer.compute_loss(trainer.model, batch).isfinite())


def row_weights(correction: Correction, rows: Any, mixed: list[bool], inclusive: bool) -> list[Tensor]:
    """The weights of each row, from its record alone, in float64."""
    level, _, shape = correction.name.partition("_")
    result = []
    for (_, ids, records), chosen in zip(rows, mixed):
        ratio = (records["log_theta"].double() - records["log_q"].double()).exp()
        weight = torch.ones(len(ids), dtype=torch.float64)
        for i in range(len(ids) if chosen and level != "none" else 0):
            last = i + 1 if inclusive else i
            first = max(0, last - (correction.window or len(ids)))
            weight[i] = {"token": ratio[i], "prefix": ratio[first:last].prod(), "sequence": ratio.prod()}[level]
        if chosen and shape == "truncate":
            weight = weight.clamp(max=correction.clip_max)
        if chosen and shape == "mask":
            weight = torch.where(weight <= correction.clip_max, weight, 0.0)
        if chosen and shape == "luffy":
            weight = weight / (weight + correction.gamma)
        result.append(weight)
    if correction.self_normalise:
        mean = torch.cat([w for w, chosen in zip(result, mixed) if chosen]).mean()
        result = [w / mean if chosen else w for w, chosen in zip(result, mixed)]
    return result


# Schedules.


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


# Two prompts, LoRA.


@pytest.mark.parametrize("chat", [False, True], ids=["text", "chat"])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "divergence"])
def test_two_system_prompts(pair: tuple[str, str], teacher: Any, tmp_path: Path, kind: str, chat: bool) -> None:
    """The records are those of a teacher that read its own system prompt; the student trains on its own."""
    from datasets import Dataset

    texts = TEXTS[:8]
    prompts = [[{"role": "user", "content": text}] for text in texts] if chat else texts
    generator = {"teacher_system_prompt": "sort the digits", "theta_system_prompt": "go"}
    trainer = make_trainer(
        kind,
        pair,
        tmp_path,
        generator=generator,
        mixin=Watch,
        max_steps=1,
        trainer={"train_dataset": Dataset.from_dict({"prompt": prompts * 2})},
    )
    trainer.train()
    tokenizer, theta = AutoTokenizer.from_pretrained(pair[0]), load(pair[1])
    between = "\n" if chat else "\n\n"
    known = {tuple(tokenizer(f"go{between}{text}").input_ids): text for text in texts}
    (_, _, rollouts) = trainer.generations[0]
    for rollout in rollouts:
        text = known[tuple(rollout.theta_prompt_ids)]
        assert rollout.prompt_ids == tokenizer(f"sort the digits{between}{text}").input_ids
        check_rollout(rollout, teacher, theta, tolerance=2e-5)
    by_ids = defaultdict(list)
    for rollout in rollouts:
        by_ids[tuple(rollout.theta_prompt_ids), tuple(rollout.completion_ids)].append(rollout)
    for inputs in trainer.micro_batches:
        for prompt, completion, records in rows_of(inputs):
            same = by_ids[tuple(prompt), tuple(completion)]
            assert any(torch.equal(records["log_teacher"], rollout.log_teacher) for rollout in same)


@pytest.mark.parametrize("kind", KINDS)
def test_lora(pair: tuple[str, str], teacher: Any, tmp_path: Path, kind: str) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = make_trainer(kind, pair, tmp_path, mixin=Watch, trainer={"peft_config": config})
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, before[name]) != ("lora_" in name), name
    # The last generation was sampled by the adapted student, not by the base.
    theta = peft.get_peft_model(load(pair[1]), config).eval()
    theta.load_state_dict(trainer.weights[-1], strict=False)
    check_batch(trainer.generations[-1][1], teacher, theta, Mixture(), tolerance=2e-5)
    with pytest.raises(AssertionError, match="off by"):
        check_batch(trainer.generations[-1][1], teacher, load(pair[1]), Mixture(), tolerance=2e-5)


# Refusals and warnings.


def refused(message: str, kind: str, pair: tuple[str, str], tmp_path: Path, **build: Any) -> None:
    with pytest.raises(ValueError, match=message):
        make_trainer(kind, pair, tmp_path, **build)


@pytest.mark.parametrize("kind", ["grpo", "rloo", "divergence"])
def test_refusals_of_every_trainer(pair: tuple[str, str], tmp_path: Path, kind: str) -> None:
    def refuse(message: str, **build: Any) -> None:
        refused(message, kind, pair, tmp_path, **build)

    refuse(
        r"`generator` is 'large'; wanted an `OptimalSamplingGenerator\(.*TRL's own trainer",
        trainer={"generator": "large"},
    )
    refuse(r"`generator` is None; wanted an `OptimalSamplingGenerator", trainer={"generator": None})
    for name, value in (("tools", [len]), ("rollout_func", len), ("environment_factory", dict)):
        if name in inspect.signature(KINDS[kind][0]).parameters:
            refuse(rf"`{name}` is not supported .*records would not match the tokens\. Drop it", trainer={name: value})
    refuse("`vllm_mode` is 'server' and `backend` 'transformers'; wanted 'vllm' or 'auto'", vllm_mode="server")
    refuse(r"`temperature` is 0; .*no probability to train with\. Raise it", temperature=0.0)
    refuse(r"`vllm_structured_outputs_regex` is not supported .*Drop it", vllm_structured_outputs_regex="[0-9]+")
    refuse(r"`generation_kwargs` has a `seed`, .*equal\. Set the trainer's `seed`", generation_kwargs={"seed": 1})
    refuse(
        r"Unknown entry of `generation_kwargs` 'top_kk'\. Known: .*Did you mean 'top_k'\?",
        generation_kwargs={"top_kk": 1},
    )
    refuse(r"Unknown correction 'prefix_trunc'\. .*Did you mean 'prefix_truncate'\?", correction="prefix_trunc")
    refuse(r"`vllm_tensor_parallel_size` is 2; .*Set it to 1 or use `backend=\"vllm\"`", vllm_tensor_parallel_size=2)
    refuse(
        r"`theta_fraction` is 0\.01 of a group of \d+, which rounds to 0; wanted .*Raise the group",
        generator={"theta_fraction": 0.01},
    )
    refuse(
        r"`theta_fraction` is 0\.99 of a group of \d+, which rounds to \d+; wanted", generator={"theta_fraction": 0.99}
    )


def test_refusals_of_one_trainer(pair: tuple[str, str], tmp_path: Path) -> None:
    refused(
        r"`correction` is 'token_mask' and `vllm_importance_sampling_correction` is False, .*Leave the latter True",
        "grpo",
        pair,
        tmp_path,
        correction="token_mask",
        vllm_importance_sampling_correction=False,
    )
    for name in ("token_truncate", "prefix_luffy"):
        refused(
            rf"`correction` is '{name}'; RLOO weighs whole completions, so wanted 'none' or .*'sequence_truncate'",
            "rloo",
            pair,
            tmp_path,
            correction=name,
        )
    for name in ("token_truncate", "sequence_mask"):
        refused(
            rf"`correction` is '{name}'; the divergence at a position is exact .*'prefix_truncate'",
            "divergence",
            pair,
            tmp_path,
            correction=name,
        )
    refused(
        r"`loss` is 'sampled_token', .*`teacher_model` was given as well\. Drop it, or set `loss='divergence'`",
        "sampled_token",
        pair,
        tmp_path,
        trainer={"teacher_model": pair[0]},
    )
    other = str(tmp_path / "other")
    cases: list[tuple[str, dict[str, Any], str]] = [
        (
            "grpo",
            {"loss_type": "vespo", "correction": "sequence_mask"},
            r"'sequence_mask' and `loss_type` 'vespo', .*wanted one of none, token_truncate, token_mask",
        ),
        (
            "grpo",
            {"correction": "token_mask", "correction_window": 3},
            r"`correction_window` is 3, and `correction='token_mask'` does not read it; wanted it with 'prefix'",
        ),
        ("rloo", {"correction_self_normalise": True}, r"is True, and `correction='none'` does not read it"),
        ("grpo", {"use_transformers_continuous_batching": True}, r"is for TRL's own rollouts\. Drop it"),
        ("grpo", {"generator": {"engine_arguments": {"device": "cpu"}}}, r"has `device`, which is the trainer's"),
        ("sampled_token", {"beta": 0.5}, r"`beta` is 0\.5, and `loss='sampled_token'` does not read it"),
        ("sampled_token", {"teacher_model_revision": "v2"}, r"`teacher_model_revision` is 'v2', and"),
        ("divergence", {"sampled_token_clip": 1.0}, r"is 1\.0, and `loss='divergence'` does not read it"),
        ("divergence", {"teacher_model_revision": "v2"}, r"is 'v2' and the `revision` among .* None; wanted one"),
        (
            "divergence",
            {"trainer": {"teacher_model": other}},
            rf"`teacher_model` is '{other}' and the generator's `teacher` .*Drop `teacher_model`",
        ),
    ]
    for kind, settings, words in cases:
        refused(words, kind, pair, tmp_path, **settings)
    refused(
        r"Unknown loss of distillation 'sample_token'\. Known: .*Did you mean 'sampled_token'\?",
        "divergence",
        pair,
        tmp_path,
        loss="sample_token",
    )


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"teacher": "t", "mixture": "kl_symmetry"}, r"`mixture` is 'kl_symmetry'; wanted a `Mixture`"),
        ({"teacher": "t", "theta_fraction": 1.5}, r"`theta_fraction` is 1\.5; wanted a number in \[0, 1\]"),
        ({"teacher": "t", "schedule": 2}, r"`schedule` is 2; wanted a number in \[0, 1\]"),
        ({"teacher": "t", "schedule": 0}, r"`schedule` is 0; wanted a share of training above 0, or None"),
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


def test_a_record_of_another_completion_is_refused(pair: tuple[str, str], tmp_path: Path) -> None:
    trainer = make_trainer("grpo", pair, tmp_path)
    batch = one_batch(trainer, TEXTS[:1] * 4)
    rollouts = list(trainer.rollouts)
    stack_records(rollouts, batch["completion_ids"])
    with pytest.raises(RuntimeError, match=r"Completion 1 of the batch is not the one that was sampled for it"):
        stack_records([rollouts[0], rollouts[2], rollouts[1], rollouts[3]], batch["completion_ids"])
    with pytest.raises(RuntimeError, match=r"The batch has 4 completions, but 3 were sampled for it"):
        stack_records(rollouts[:3], batch["completion_ids"])


def test_settings_that_collapsed_are_warned_of_once(pair: tuple[str, str], tmp_path: Path) -> None:
    negatives = {"correction": "token_truncate", "positive_only": "none"}
    vespo = {"loss_type": "vespo", "vllm_importance_sampling_mode": "token_truncate"}
    cases: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
        ("grpo", negatives, {"theta_fraction": 0.0}, r"match of 0\.14, .* 0\.44\. Leave `positive_only` at 'all'"),
        ("grpo", {"correction": "prefix_truncate"}, {}, r"prefix ratios to 0\.13 at most"),
        ("rloo", {"correction": "sequence_mask"}, {}, r"exact match of 0\.00 at every learning rate.*Use 'none'"),
        ("grpo", vespo, {}, r"`loss_type='vespo'` .*\.045 -> \.000.*\(0\.43\)"),
        ("grpo", {"beta": 0.1}, {}, r"`beta` is 0\.1 .*Leave them at 0 and None"),
    ]
    for kind, settings, generator, message in cases:
        with pytest.warns(UserWarning, match=message) as caught:
            make_trainer(kind, pair, tmp_path, generator=generator, **settings)
        ours = [w for w in caught if re.search(message, str(w.message))]
        assert len(ours) == 1
        assert Path(ours[0].filename).name == "training.py", ours[0].filename  # the line that builds the trainer
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_trainer("grpo", pair, tmp_path, correction="token_truncate")
        make_trainer("grpo", pair, tmp_path, correction="token_truncate", generator={"theta_fraction": 0.0})
    assert not [w for w in caught if "recipes/README.md" in str(w.message)]


def test_the_divergence_warns_of_endings_of_the_teachers_own(pair: tuple[str, str], tmp_path: Path) -> None:
    other = shutil.copytree(pair[0], tmp_path / "other")
    (other / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 1]}))
    with pytest.warns(UserWarning, match=r"also ends with the tokens \[3\], .*or set `loss='sampled_token'`"):
        make_trainer("divergence", pair, tmp_path, generator={"teacher": str(other)})


def test_the_divergence_takes_the_generators_teacher_alone(
    pair: tuple[str, str], tmp_path: Path, teacher: Any
) -> None:
    trainer = make_trainer("divergence", pair, tmp_path, trainer={"teacher_model": pair[0] + "/"})
    assert trainer.vllm_generation.backend.teacher is trainer.accelerator.unwrap_model(trainer.teacher_model)
    make_trainer("divergence", pair, tmp_path, generator={"teacher": teacher}, trainer={"teacher_model": teacher})
    with pytest.raises(ValueError, match="wanted one teacher"):
        make_trainer(
            "divergence", pair, tmp_path, generator={"teacher": teacher}, trainer={"teacher_model": load(pair[0])}
        )


def test_a_padded_vocabulary_is_told_of_the_loss_that_takes_it(pair: tuple[str, str], tmp_path: Path) -> None:
    wide = load(pair[0])
    wide.resize_token_embeddings(wide.config.vocab_size + 16)
    wide.save_pretrained(tmp_path / "wide")
    AutoTokenizer.from_pretrained(pair[0]).save_pretrained(tmp_path / "wide")
    own = {"teacher": str(tmp_path / "wide")}
    with pytest.raises(ValueError, match=r"vocab_size .*padded to another size will do for `loss='sampled_token'`"):
        make_trainer("divergence", pair, tmp_path, generator=own)
    make_trainer("sampled_token", pair, tmp_path, generator=own)


def test_the_divergence_refuses_two_prompts(pair: tuple[str, str], tmp_path: Path) -> None:
    """TRL's loss reads both models on one prompt: the teacher's own would be ignored without a word."""
    with pytest.raises(ValueError, match=r"reads both models on the student's prompt.*`loss='sampled_token'`"):
        make_trainer("divergence", pair, tmp_path, generator={"teacher_system_prompt": "sort"})


# The score of the embedded pair rises.


@pytest.fixture(scope="module")
def trained_pair() -> tuple[str, str]:
    made = embedded.make_pair()
    return made.teacher, made.student


SCORE: dict[str, tuple[dict[str, Any], float]] = {
    "grpo": ({"num_generations": 8, "max_steps": 80}, 0.03),
    "rloo": ({"num_generations": 8, "max_steps": 80}, 0.03),
    "divergence": ({"max_steps": 50}, 0.1),
    "sampled_token": ({"max_steps": 80, "learning_rate": 3e-3}, 0.03),
    "raft": ({"max_steps": 80}, 0.03),
}
"""Settings, and by how much exact match has to rise. It was seen to rise, seeds 0 to 2, by 0.064 to 0.071 (grpo),
0.056 to 0.075 (rloo), 0.147 to 0.212 (divergence) and 0.061 to 0.098 (sampled_token)."""


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("kind", SCORE)
def test_the_score_rises(trained_pair: tuple[str, str], tmp_path: Path, kind: str, seed: int) -> None:
    """Exact match of the student alone at temperature 1 on 2048 held-out prompts, before (0.018) and after.

    The standard error of a difference is 0.004 where nothing was learned, so a margin of 0.03 is passed by luck at
    seven errors; it is 0.007 at the smallest rise that was seen, 0.056, which misses the margin at four.
    """
    settings, margin = SCORE[kind]
    tokenizer = AutoTokenizer.from_pretrained(trained_pair[1])
    before = embedded.measure(load(trained_pair[1]), tokenizer)  # sets the seed, as the trainer then does anew
    build = {"trainer": {"train_dataset": embedded.dataset("train", 8000, seed=1)}}
    if kind in (*RL, "raft"):
        build["trainer"]["reward_funcs"] = embedded.reward
    trainer = make_trainer(
        kind,
        trained_pair,
        tmp_path,
        **build,
        **{
            "per_device_train_batch_size": 64,
            "gradient_accumulation_steps": 1,
            "max_completion_length": 12,
            "learning_rate": 1e-3,
            "logging_steps": 20,
            "seed": seed,
        }
        | settings,
    )
    trainer.train()
    after = embedded.measure(trainer.model.eval(), tokenizer)
    print(f"{kind}, seed {seed}: exact match {before:.4f} -> {after:.4f}")
    assert after - before > margin


# Two processes.


TWO = ("grpo", "rloo", "divergence", "raft")


@pytest.fixture(scope="module")
def two_ranks(pair: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """What each of two ranks saw, for each kind; one run, since most of it is starting up."""
    folder = tmp_path_factory.mktemp("ranks")
    process = run_two_ranks("two_processes.py", *pair, folder, *TWO)
    wanted = sorted(f"{kind}-{rank}.json" for kind in TWO for rank in (0, 1))
    assert sorted(file.name for file in folder.glob("*.json")) == wanted, process.stderr[-3000:]
    return {kind: [json.loads((folder / f"{kind}-{rank}.json").read_text()) for rank in (0, 1)] for kind in TWO}


@pytest.mark.parametrize("kind", TWO)
def test_two_processes(two_ranks: dict[str, list[dict[str, Any]]], kind: str) -> None:
    """Two ranks with six rows each: groups of four, of which the second spans both. Metrics are those of all twelve
    rows, equal on both ranks; each rank's records are its own rows' (the ranks checked them against the oracle)."""
    ranks = two_ranks[kind]
    assert [rank["processes"] for rank in ranks] == [2, 2]
    assert ranks[0]["parameters"] == ranks[1]["parameters"]  # DDP did its work
    assert max(rank["worst"] for rank in ranks) < 2e-5
    assert len(ranks[0]["generations"]) == 2
    for step in range(2):
        rows = [row for rank in ranks for row in rank["generations"][step]["rows"]]
        assert len(rows) == 12
        group = 4 if kind in RL else 6
        assert [row["mixed"] for row in rows] == ([False] * (group // 2) + [True] * (group // 2)) * (12 // group)
        alpha, log_q, log_theta, log_teacher = (
            np.concatenate([row[name] for row in rows if row["mixed"]]) for name in RECORDS
        )
        weights = np.exp(log_theta - log_q)
        wanted = {
            "alpha/mean": alpha.mean(),
            "alpha/q90": np.quantile(alpha, 0.9),
            "mixture/kl_theta": (log_q - log_theta).mean(),
            "mixture/kl_teacher": (log_q - log_teacher).mean(),
            "mixture/ess": weights.sum() ** 2 / (weights**2).sum() / len(weights),
        }
        if kind == "raft":
            accepted, mixed = (np.array([row[name] for row in rows]) for name in ("reward", "mixed"))
            accepted = accepted > 0
            wanted |= {
                "accepted/theta": accepted[~mixed].mean(),
                "accepted/mixture": accepted[mixed].mean(),
                "accepted/prompts": accepted.mean(),  # one completion each
            }
            weights = [weight for rank in ranks for weight in rank["generations"][step]["weights"]]
            assert weights == accepted.astype(float).tolist()
        if kind in RL:
            scores = np.array([row["reward"] for row in rows]).reshape(3, 4)
            assert all(len({row["prompt"] for row in rows[i : i + 4]}) == 1 for i in (0, 4, 8))
            wanted |= {
                "mixture/reward_theta": scores[:, :2].mean(),
                "mixture/reward_mixture": scores[:, 2:].mean(),
                "mixture/groups_with_signal": (scores.max(1) > scores.min(1)).mean(),
            }
            advantages = scores - scores.mean(1, keepdims=True)
            advantages = advantages / (scores.std(1, ddof=1, keepdims=True) + 1e-4) if kind == "grpo" else None
            if advantages is not None:
                advantages = np.maximum(advantages, 0)
                got = [a for rank in ranks for a in rank["generations"][step]["advantages"]]
                assert got == pytest.approx(advantages.flatten().tolist(), abs=1e-4)
        for rank in ranks:
            log = rank["log"][step]
            assert {name: log[name] for name in wanted} == pytest.approx(wanted, rel=1e-4, abs=1e-5)
            assert log["mixture/tokens_per_second"] == ranks[0]["log"][step]["mixture/tokens_per_second"]
