"""The gradient of every loss and correction against float64, and its sum over micro-batches."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.training import (
    TEXTS,
    digits,
    load,
    make_trainer,
    one_batch,
    rows_of,
)
from optimal_sampling_trl.losses import Correction

RL = ("grpo", "rloo")


def log_probabilities(model: Any, prompt: list[int], completion: list[int], temperature: float) -> Tensor:
    """log p (T, V) of a float64 model that reads one row alone."""
    logits = model(input_ids=torch.tensor([[*prompt, *completion]]), use_cache=False).logits
    return (logits[0, len(prompt) - 1 : -1] / temperature).log_softmax(-1)


def anchored(advantage: float, log_theta: Tensor, log_teacher: Tensor) -> Tensor:
    """The gradient (T,) of RLAD's objective for log θ: its ratio, its two clips, and θ_old = θ."""
    log_theta = log_theta.detach().requires_grad_()
    teacher = (log_theta - log_teacher).clamp(-1, 1)
    ratio = torch.exp(0.5 * (log_theta - log_theta.detach()) + 0.5 * teacher)
    objective = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.28) * advantage)
    return torch.autograd.grad(objective.sum(), log_theta)[0]


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("grpo", {}),
        ("grpo", {"loss_type": "grpo", "correction": "token_truncate"}),
        ("grpo", {"loss_type": "grpo", "correction": "sequence_luffy", "positive_only": "none"}),
        ("grpo", {"correction": "prefix_mask", "correction_window": 2, "correction_self_normalise": True}),
        ("grpo", {"loss_type": "grpo", "distillation_coefficient": 0.3, "distillation_clip": 1.0}),
        ("grpo", {"positive_only": "mixture"}),
        ("grpo", {"credit": "anchored"}),
        ("grpo", {"credit": "anchored", "positive_only": "none", "distillation_coefficient": 0.3}),
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
            a = anchored(a, log, log_t) if args.credit == "anchored" else a
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
