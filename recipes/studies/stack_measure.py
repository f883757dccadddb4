"""Measure each student of a stack: how often it is right, in how many of eight tries, how varied, how near."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from digit_tasks import END, Task
from stack import ROWS, Stack, sample_alone

TRIES = 8


@torch.no_grad()
def right(student: Stack, ids: Tensor, length: int) -> Tensor:
    """The probability (S,) that a sample is exactly right, a mean over held-out prompts with answers `ids` (N, L)."""
    S, results = len(student.weights["model.norm.weight"]), []
    for part in ids.split(max(ROWS // S, 1)):
        every = part.expand(S, *part.shape)
        logits = student.logits(every, keep=length + 1)[:, :, :-1].log_softmax(-1)
        results.append(logits.gather(-1, every[..., -length:, None])[..., 0].sum(-1).exp())
    return torch.cat(results, dim=1).mean(1)


@torch.no_grad()
def success(student: Stack, task: Task, ids: Tensor) -> Tensor:
    """The probability (S,) that a sample is right: exact where one answer is, else one sample of each prompt.

    Args:
        ids: held-out prompts with right completions, (N, P + T).
    """
    if task.name != "many":
        return right(student, ids, task.completion_length)
    with torch.random.fork_rng(devices=[ids.device] if ids.is_cuda else []):
        torch.manual_seed(0)
        return _tries(student, None, task, ids, 1).right.mean((1, 2))


class End(NamedTuple):
    """Measurements of each student (S,) at the end, on samples of its own.

    Args:
        right: the share of right samples.
        any_right: the share of prompts with a right one among eight (pass@8).
        greedy: the share of prompts whose likeliest tokens are right.
        entropy: of the next token, in nats, a mean over the samples' tokens.
        divergence: KL(θ‖t), in nats a token, of the same.
    """

    right: Tensor
    any_right: Tensor
    greedy: Tensor
    entropy: Tensor
    divergence: Tensor


def measure_end(student: Stack, teacher: Stack, task: Task, ids: Tensor) -> End:
    """All of `End` on held-out prompts with right completions `ids` (N, P + T)."""
    found = _tries(student, teacher, task, ids, TRIES)
    greedy = _tries(student, None, task, ids, 1, greedy=True).right
    tokens = found.tokens.clamp(min=1)
    return End(
        found.right.mean((1, 2)), found.right.amax(2).mean(1), greedy.mean((1, 2)),
        found.entropy / tokens, found.divergence / tokens,
    )  # fmt: skip


class _Tries(NamedTuple):
    right: Tensor  # (S, N, tries)
    tokens: Tensor  # (S,), and the sums over them:
    entropy: Tensor
    divergence: Tensor


@torch.no_grad()
def _tries(student: Stack, teacher: Stack | None, task: Task, ids: Tensor, tries: int, greedy: bool = False) -> _Tries:
    """Sample `tries` completions of each prompt, in parts that a pass can hold."""
    S, length = len(student.weights["model.norm.weight"]), task.completion_length
    parts, sums = [], torch.zeros(3, S, device=ids.device)
    for part in ids.split(max(ROWS // 2 // (S * tries), 1)):  # a teacher has more heads than a student
        every = part.repeat_interleave(tries, 0).expand(S, -1, -1)
        prompts = every[..., :-length]
        drawn = follow(student, prompts, length) if greedy else None
        batch = None if greedy else sample_alone(student, teacher, prompts, length, END)
        parts.append(
            task.right_tokens(every, drawn if batch is None else batch.ids).all(-1).float().view(S, -1, tries)
        )
        if batch is None or teacher is None:
            continue
        logits = student.logits(torch.cat([prompts, batch.ids], -1), keep=length + 1)[:, :, :-1]
        log_theta = logits.log_softmax(-1)
        entropy, log_ratio = ((log_theta.exp() * x).sum(-1) for x in (-log_theta, log_theta - batch.teacher))
        sums += torch.stack([(x * batch.mask).sum((1, 2)) for x in (torch.ones_like(entropy), entropy, log_ratio)])
    return _Tries(torch.cat(parts, dim=1), *sums)


@torch.no_grad()
def follow(student: Stack, prompts: Tensor, length: int) -> Tensor:
    """The likeliest token at each step, (S, B, length)."""
    S, B, P = prompts.shape
    cache, tokens, drawn = student.cache(S * B, P + length), prompts, []
    for _ in range(length):
        tokens = student.logits(tokens, keep=1, cache=cache).argmax(-1)  # (S, B, 1)
        drawn.append(tokens)
    return torch.cat(drawn, dim=-1)
