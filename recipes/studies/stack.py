"""Hundreds of small students trained side by side as one batch: what the study of long tasks runs on.

A tiny model leaves a GPU idle: its time is that of the launches. Here S students stand in one stack, each weight a
tensor (S, ...), each with its own prompts, mixture, loss and learning rate, and every launch serves all of them. The
mathematics is the trainers' (`stack_losses.py`; tests/recipes/test_stack.py compares the gradients), the rollouts are
sampled with the package's solver, and what is compared is the same: completions, updates, Adam, clipping. What it
leaves out: TRL.

Shapes: S students, B completions of each, P prompt tokens, T completion tokens, V vocabulary, H heads of size D.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn.functional import rms_norm, scaled_dot_product_attention, silu
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from optimal_sampling_trl.mixture import MixtureRows, log_distributions, mix_at, solve_alpha, solver

ROWS = 1 << 15
"""Most sequences in one forward pass; a kernel's grid ends at 2^16."""
SOLVER_STEPS = 12
"""Passes of the solver where it may not look whether it is done; it needs 4 to 8."""


class Cache:
    """Keys and values (rows, H, length, D) of each layer, filled from the left."""

    def __init__(self, layers: int, rows: int, heads: int, length: int, size: int, device: torch.device) -> None:
        self.keys, self.values = torch.zeros(2, layers, rows, heads, length, size, device=device)
        self.filled = 0


class Stack:
    """S Llamas of one shape as one: logits for token ids (S, B, L).

    Args:
        weights: each weight by its name in the checkpoint, (S, ...).
        config: the shape of every one.
    """

    def __init__(self, weights: dict[str, Tensor], config: LlamaConfig) -> None:
        self.weights, self.config = weights, config
        self.heads, self.size = config.num_attention_heads, config.head_dim
        base = config.rope_parameters["rope_theta"]
        powers = torch.arange(0, self.size, 2, device=self.device) / self.size
        self.frequencies = base**-powers  # (D/2,)

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.weights["model.norm.weight"].device

    @classmethod
    def load(cls, folder: str | Path, copies: int, device: torch.device | str) -> Stack:
        """`copies` of one checkpoint."""
        logging.disable_progress_bar()
        model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
        return cls.of(model.to(device), copies)  # type: ignore[arg-type]

    @classmethod
    def of(cls, model: LlamaForCausalLM, copies: int) -> Stack:
        """`copies` of one model, where it is."""
        names = model.named_parameters()  # tied weights come once
        return cls({name: p.detach().expand(copies, *p.shape).clone() for name, p in names}, model.config)

    def cache(self, rows: int, length: int) -> Cache:
        """An empty cache of `length` tokens for `rows` = S·B sequences."""
        return Cache(self.config.num_hidden_layers, rows, self.heads, length, self.size, self.device)

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return torch.einsum("sni,soi->sno", x, self.weights[f"{name}.weight"])

    def _norm(self, x: Tensor, name: str) -> Tensor:
        weight = self.weights[f"{name}.weight"][:, None]
        return rms_norm(x, x.shape[-1:], eps=self.config.rms_norm_eps) * weight

    def _rotate(self, x: Tensor, start: int) -> Tensor:
        """Rotary positions of (rows, H, L, D), whose first token is at `start`."""
        angles = torch.outer(torch.arange(start, start + x.shape[2], device=x.device), self.frequencies)  # (L, D/2)
        cosine, sine = angles.cos(), angles.sin()
        first, second = x.chunk(2, dim=-1)
        return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1)

    def _attend(self, x: Tensor, layer: int, B: int, cache: Cache | None) -> Tensor:
        """Attention over (S, B·L, hidden), with what the cache holds before it."""
        S, name = x.shape[0], f"model.layers.{layer}.self_attn"
        query, key, value = (
            self._linear(x, f"{name}.{part}_proj").view(S * B, -1, self.heads, self.size).transpose(1, 2)
            for part in "qkv"
        )
        start = cache.filled if cache is not None else 0
        query, key = self._rotate(query, start), self._rotate(key, start)
        if cache is not None:
            end = start + key.shape[2]
            cache.keys[layer, :, :, start:end], cache.values[layer, :, :, start:end] = key, value
            key, value = cache.keys[layer, :, :, :end], cache.values[layer, :, :, :end]
        out = scaled_dot_product_attention(query, key, value, is_causal=query.shape[2] > 1)
        return self._linear(out.transpose(1, 2).reshape(S, x.shape[1], -1), f"{name}.o_proj")

    def logits(self, ids: Tensor, keep: int, cache: Cache | None = None) -> Tensor:
        """Logits (S, B, keep, V) after the last `keep` of the tokens `ids` (S, B, L).

        With a cache `ids` follow what it holds, several tokens only where it is empty.
        """
        S, B, L = ids.shape
        table = self.weights["model.embed_tokens.weight"]  # (S, V, hidden)
        x = table[torch.arange(S, device=ids.device)[:, None], ids.reshape(S, -1)]  # (S, B·L, hidden)
        for layer in range(self.config.num_hidden_layers):
            name = f"model.layers.{layer}"
            x = x + self._attend(self._norm(x, f"{name}.input_layernorm"), layer, B, cache)
            inner = self._norm(x, f"{name}.post_attention_layernorm")
            gated = silu(self._linear(inner, f"{name}.mlp.gate_proj")) * self._linear(inner, f"{name}.mlp.up_proj")
            x = x + self._linear(gated, f"{name}.mlp.down_proj")
        if cache is not None:
            cache.filled += L
        x = x.view(S, B, L, -1)[:, :, -keep:].reshape(S, B * min(keep, L), -1)
        x = self._norm(x, "model.norm")
        head = "model.embed_tokens" if self.config.tie_word_embeddings else "lm_head"
        return self._linear(x, head).view(S, B, min(keep, L), -1)


@dataclass
class Batch:
    """Rollouts of a stack: each (S, B, T), `prompts` (S, B, P), `teacher` log t over the vocabulary (S, B, T, V)."""

    prompts: Tensor
    ids: Tensor
    mask: Tensor
    alpha: Tensor
    log_q: Tensor
    log_theta: Tensor
    log_teacher: Tensor
    teacher: Tensor


class Given(NamedTuple):
    """The first tokens of each completion, which nobody draws: `count` (S, B) of `ids` (S, B, T)."""

    ids: Tensor
    count: Tensor


@torch.no_grad()
def sample(
    student: Stack,
    teacher: Stack | None,
    prompts: Tensor,
    rows: MixtureRows,
    until: Tensor,
    length: int,
    eos: int,
    given: Given | None = None,
) -> Batch:
    """One completion of each prompt (S, B, P) at temperature 1.

    Where no completion asks for the mixture the teacher reads them all at once when they are done, as a trainer would.

    Args:
        teacher: one model (S = 1) that serves all; None where nothing reads it: its records are 0.
        rows: the mixture of each of the S·B completions.
        until: (S·B,) how many tokens come from the mixture; the student draws the rest. Not above 0: none.
        length: T.
        given: tokens that stand at the start of a completion; the mask leaves them out.
    """
    if teacher is None or not bool((until > 0).any()):
        return sample_alone(student, teacher, prompts, length, eos, given)
    return sample_mixed(student, teacher, prompts, rows, until, length, eos, given)


@torch.no_grad()
def sample_mixed(
    student: Stack,
    teacher: Stack,
    prompts: Tensor,
    rows: MixtureRows,
    until: Tensor,
    length: int,
    eos: int,
    given: Given | None = None,
) -> Batch:
    """`sample` token by token from both models; nothing in it waits for a GPU."""
    S, B, P = prompts.shape
    both = [(student, (S, B)), (teacher, (1, S * B))]
    caches = [model.cache(S * B, P + length) for model, _ in both]
    tokens, records, kept = prompts, [], []
    for step in range(length):
        theta_logits, teacher_logits = (
            model.logits(tokens.reshape(*shape, -1), keep=1, cache=cache).view(S * B, -1)
            for (model, shape), cache in zip(both, caches, strict=True)
        )
        log_theta, log_teacher = log_distributions(theta_logits, teacher_logits)
        with patch.object(solver, "SOLVER_STEPS", SOLVER_STEPS):
            alpha = solve_alpha(log_theta, log_teacher, rows)
        alone = until <= step
        alpha = alpha.masked_fill(alone, 0.0)
        mixed = mix_at(log_theta, log_teacher, alpha, rows)
        log_q = torch.where(alone[:, None], log_theta, mixed).log_softmax(-1)  # of a swap α = 0 is not the student
        chosen = _replace(draw(log_q).view(S, B, 1), given, step).view(S * B, 1)
        records.append([alpha, *(x.gather(1, chosen)[:, 0] for x in (log_q, log_theta, log_teacher)), chosen[:, 0]])
        kept.append(log_teacher.float())
        tokens = chosen.view(S, B, 1)
    alpha, log_q, log_theta, log_teacher, ids = (torch.stack(x, dim=-1).view(S, B, length) for x in zip(*records))
    return Batch(
        prompts, ids, mask_of(ids, eos, given), alpha.float(), log_q.float(), log_theta.float(), log_teacher.float(),
        torch.stack(kept, dim=1).view(S, B, length, -1),
    )  # fmt: skip


@torch.no_grad()
def sample_alone(
    student: Stack, teacher: Stack | None, prompts: Tensor, length: int, eos: int, given: Given | None = None
) -> Batch:
    """`sample` with α = 0 everywhere."""
    S, B, P = prompts.shape
    cache, tokens, drawn, records = student.cache(S * B, P + length), prompts, [], []
    for step in range(length):
        log_theta = student.logits(tokens, keep=1, cache=cache).log_softmax(-1)  # (S, B, 1, V)
        tokens = _replace(draw(log_theta)[..., 0], given, step)
        drawn.append(tokens)
        records.append(log_theta.gather(-1, tokens[..., None])[..., 0])
    ids, log_theta = torch.cat(drawn, dim=-1), torch.cat(records, dim=-1)
    log_teacher, every = torch.zeros_like(log_theta), log_theta.new_zeros(1)
    if teacher is not None:
        sequences = torch.cat([prompts, ids], dim=-1).view(1, S * B, -1)
        every = teacher.logits(sequences, keep=length + 1)[:, :, :-1].log_softmax(-1).view(S, B, length, -1)
        log_teacher = every.gather(-1, ids[..., None])[..., 0]
    zeros = torch.zeros_like(log_theta)
    return Batch(prompts, ids, mask_of(ids, eos, given), zeros, log_theta, log_theta, log_teacher, every)


def draw(log_p: Tensor) -> Tensor:
    """A token (..., 1) from each distribution of `log_p` (..., V), by Gumbel's trick."""
    noise = torch.empty_like(log_p).exponential_().clamp(min=torch.finfo(log_p.dtype).tiny).log()
    return (log_p - noise).argmax(-1, keepdim=True)


def _replace(chosen: Tensor, given: Given | None, step: int) -> Tensor:
    """`chosen` (S, B, 1) with the tokens that are given at this step."""
    if given is None:
        return chosen
    return torch.where(given.count[..., None] > step, given.ids[..., step, None], chosen)


def mask_of(ids: Tensor, eos: int, given: Given | None = None) -> Tensor:
    """1 on the tokens up to the first EOS, itself included; 0 after it and on those that were given."""
    ended = (ids == eos).cumsum(-1) - (ids == eos).long()  # of the tokens before this one
    if given is not None:
        ended = ended + (torch.arange(ids.shape[-1], device=ids.device) < given.count[..., None])
    return (ended == 0).float()
