"""A batch in progress on plain transformers: what each model has read, and what has been drawn in each row."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedConfig,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ...mixture import MixtureRows, has_kernels, log_distributions, mix_at, precision, solve_alpha
from ...pairing import Pair
from ...rollouts.request import Request, Sampling
from ...rollouts.rollout import RECORDS, Rollout
from .dense import DenseRows


class Reader:
    """One model reading a batch: its KV cache and the logits (N, V) of each row's next token.

    Args:
        model: in evaluation mode.
        prompts: token ids, a list for each row; equal ones are read once.
        context: most tokens that the model can read. A row that ended may run past it until it leaves the batch.
        device: the model's.
    """

    def __init__(self, model: PreTrainedModel, prompts: list[list[int]], context: int, device: torch.device) -> None:
        self.model, self.context = model, context
        # Where a configuration asks for the experts' scores, transformers computes a loss from them, which raises with
        # a cache.
        self.further = {"output_router_logits": False} if _scores_experts(model.config) else {}
        unique = {tuple(prompt): index for index, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
        width = max(map(len, unique))
        ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in unique], device=device)
        self.lengths = torch.tensor([len(prompt) for prompt in unique], device=device)
        self.mask = (torch.arange(width, device=device) >= width - self.lengths[:, None]).long()
        self.cache: Any = None
        self._forward(ids, (self.mask.cumsum(1) - 1).clamp(min=0))
        if len(unique) < len(prompts):
            self.keep(torch.tensor([unique[tuple(prompt)] for prompt in prompts], device=device))

    def _forward(self, ids: Tensor, positions: Tensor) -> None:
        output = self.model(
            input_ids=ids,
            attention_mask=self.mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
            **self.further,
        )
        self.cache, self.logits = output.past_key_values, output.logits[:, -1]

    def step(self, tokens: Tensor) -> None:
        """Read one more token in each row."""
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(tokens), 1)], dim=1)
        self._forward(tokens[:, None], self.lengths[:, None].clamp(max=self.context - 1))
        self.lengths = self.lengths + 1

    def keep(self, index: Tensor) -> None:
        """Go on with the rows at `index` alone; a row may be named more than once."""
        self.cache.reorder_cache(index)  # the only row selection that every cache layer implements
        self.mask, self.lengths, self.logits = self.mask[index], self.lengths[index], self.logits[index]


def _scores_experts(config: PreTrainedConfig) -> bool:
    return bool(getattr(config, "output_router_logits", False))


class Step(NamedTuple):
    """The mixture of a step in each of N rows.

    Args:
        alpha: NaN in a row without a solution.
        scores: raw logits of the mixture.
        read: from tokens (N,) to their log θ and log t, (N,) each.
    """

    alpha: Float[Tensor, " N"]
    scores: Float[Tensor, "N V"]
    read: Callable[[Tensor], list[Tensor]]


class Rows:
    """The rows of a batch: the request of each, and what has been drawn. `active` maps a row to its request.

    Args:
        requests: one for each row.
        pair: says where a completion ends, by its tokens, its text or the context.
        device: where the logits come from.
    """

    def __init__(self, requests: list[Request], pair: Pair, device: torch.device) -> None:
        self.requests, self.pair, self.device = requests, pair, device
        count = len(requests)
        self.limits = [
            min(r.sampling.max_tokens, pair.context - max(len(r.prompt_ids), len(r.theta_prompt_ids)))
            for r in requests
        ]
        self.active = list(range(count))
        self.tokens = torch.zeros(count, max(self.limits), dtype=torch.int64, device=device)
        self.records = torch.zeros(count, max(self.limits), len(RECORDS), device=device)
        self.lengths = [0] * count
        self.reasons = ["length"] * count
        self.special_ids = set(pair.special_tokens)  # those that a text leaves out, more than the tokenizer's own
        self.recent = [_recent(request.sampling.stop) for request in requests]
        self.step = 0
        seeds = [request.sampling.seed for request in requests]
        self.generators = [None if s is None else torch.Generator(device).manual_seed(s) for s in seeds]
        self.dense = DenseRows(requests, device)
        self._regroup()

    def _regroup(self) -> None:
        """Make the settings of the active rows: when the rows change, and not at each token."""
        device = self.device
        requests = [self.requests[row] for row in self.active]
        self.index = torch.tensor(self.active, device=device)
        self.dense.regroup(self.active)
        self.mixtures = MixtureRows.of([request.mixture for request in requests], device)
        temperatures = [request.sampling.temperature for request in requests]
        self.temperature = torch.tensor([t or 1.0 for t in temperatures], dtype=precision(device), device=device)
        self.greedy = torch.tensor([t == 0 for t in temperatures], device=device)
        groups: dict[Sampling, list[int]] = {}
        for row, request in enumerate(requests):  # rows that differ in length or seed alone are processed together
            groups.setdefault(replace(request.sampling, max_tokens=1, seed=None, stop=()), []).append(row)
        self.processors = [
            (torch.tensor(rows, device=device), _processors(sampling)) for sampling, rows in groups.items()
        ]

    def draw(self, theta_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        """Draw a token in each active row and record it. Both logits are raw, (N, V of each model)."""
        mix = self._mix_by_kernels if has_kernels(theta_logits) else self._mix
        alpha, scores, read = mix(theta_logits, teacher_logits)
        V = scores.shape[1]
        self.dense.measure(theta_logits[:, :V], teacher_logits[:, :V], scores, self.temperature)
        for rows, processors in self.processors:
            scores[rows] = processors(self._seen(rows), scores[rows])  # type: ignore[arg-type]
        # A row without a solution goes on harmlessly; its NaN alpha names it when the batch is done.
        log_q = torch.log_softmax(scores, dim=-1).masked_fill(alpha.isnan()[:, None], 0.0)
        chosen = torch.where(self.greedy, log_q.argmax(-1), (log_q + self._gumbel(log_q)).argmax(-1))
        records = [alpha, log_q.gather(1, chosen[:, None])[:, 0], *read(chosen)]
        self.tokens[self.index, self.step] = chosen
        self.records[self.index, self.step] = torch.stack([x.float() for x in records], dim=-1)
        return chosen

    def _mix(self, theta_logits: Tensor, teacher_logits: Tensor) -> Step:
        log_theta, log_teacher = log_distributions(theta_logits, teacher_logits, self.temperature)
        alpha = solve_alpha(log_theta, log_teacher, self.mixtures)
        V = log_theta.shape[-1]
        scores = mix_at(theta_logits[:, :V], teacher_logits[:, :V], alpha, self.mixtures, self.temperature)
        return Step(
            alpha, scores, lambda chosen: [x.gather(1, chosen[:, None])[:, 0] for x in (log_theta, log_teacher)]
        )

    def _mix_by_kernels(self, theta_logits: Tensor, teacher_logits: Tensor) -> Step:
        """Mix in a few passes over the logits; the solver in float64 makes 48 and holds five copies of them."""
        from ...mixture.kernels.launch import mix_logits

        mixed = mix_logits(theta_logits, teacher_logits, self.mixtures, self.temperature)
        V = min(theta_logits.shape[1], teacher_logits.shape[1])

        def read(chosen: Tensor) -> list[Tensor]:
            both = (theta_logits, mixed.theta_sum), (teacher_logits, mixed.teacher_sum)
            return [x.gather(1, chosen[:, None])[:, 0] / self.temperature - total for x, total in both]

        return Step(mixed.alpha, mixed.logits[:, :V], read)

    def _seen(self, rows: Tensor) -> Tensor | None:
        """Return the tokens (rows, length) of the rows' teacher prompts and completions, for the penalty."""
        if all(r.sampling.repetition_penalty == 1.0 for r in self.requests):
            return None
        prompts = [self.requests[self.active[row]].prompt_ids for row in rows.tolist()]
        width = max(map(len, prompts))
        padded = [[prompt[0]] * (width - len(prompt)) + prompt for prompt in prompts]  # a token that was seen anyway
        return torch.cat([torch.tensor(padded, device=rows.device), self.tokens[self.index[rows], : self.step]], dim=1)

    def _gumbel(self, log_q: Tensor) -> Tensor:
        """Draw Gumbel noise (N, V): argmax(log q + noise) is a draw from q. Seeded rows use their own generators."""
        noise = torch.empty_like(log_q)
        if any(self.generators[request] is None for request in self.active):
            noise.exponential_()
        for row, request in enumerate(self.active):
            generator = self.generators[request]
            if generator is not None:
                noise[row].exponential_(generator=generator)
        return -noise.clamp(min=torch.finfo(noise.dtype).tiny).log()

    def advance(self, tokens: Tensor) -> Tensor | None:
        """Note which rows ended.

        Returns:
            The rows to go on with, none where all have ended; None while more than half go on, and all rows stay.
        """
        self.step += 1
        for token, request in zip(tokens.tolist(), self.active, strict=True):
            if not self.lengths[request] and self._ended(request, token):
                self.lengths[request] = self.step
        going = [row for row, request in enumerate(self.active) if not self.lengths[request]]
        if 2 * len(going) > len(self.active):
            return None
        self.active = [self.active[row] for row in going]
        if going:
            self._regroup()
        return torch.tensor(going, dtype=torch.int64, device=tokens.device)

    def so_far(self) -> tuple[int, int, float]:
        """Return the number of rows that ended, that of tokens drawn, and the sum of their α. Waits for the device."""
        lengths = torch.tensor([length or self.step for length in self.lengths])
        drawn = torch.arange(self.step) < lengths[:, None]
        alpha = self.records[:, : self.step, RECORDS.index("alpha")].cpu()
        return sum(length > 0 for length in self.lengths), int(lengths.sum()), float(alpha[drawn].nansum())

    def _ended(self, request: int, token: int) -> bool:
        sampling = self.requests[request].sampling
        stopped = token in self.pair.ending.stop and not sampling.ignore_eos
        if sampling.stop and not stopped and token not in self.special_ids:
            self.recent[request].append(token)
            text = self.pair.text(list(self.recent[request]))
            stopped = any(stop in text for stop in sampling.stop)
        if stopped:
            self.reasons[request] = "stop"
        return stopped or self.step >= self.limits[request]

    def rollouts(self) -> list[Rollout]:
        """Return a rollout for each request."""
        tokens, records, dense = self.tokens.cpu(), self.records.cpu(), self.dense.records(self.lengths)
        rollouts = []
        for row, (request, length) in enumerate(zip(self.requests, self.lengths, strict=True)):
            ids = tokens[row, :length].tolist()
            copied = records[row, :length].T.contiguous()  # (4, T): a view would keep all rows of the batch alive
            text = request.sampling.cut(self.pair.text(ids))
            rollouts.append(Rollout.from_request(request, ids, copied, text, self.reasons[row], dense[row]))
        return rollouts


def _recent(stops: Sequence[str]) -> deque[int]:
    """Return the last tokens of a completion, enough to hold the longest stop text."""
    # A token brings a byte or more, but for special ones, which are not kept; the first few may be half a character.
    return deque(maxlen=max((len(stop.encode()) for stop in stops), default=0) + 4)


def _processors(sampling: Sampling) -> LogitsProcessorList:
    """Return transformers' own processors, in vLLM's order: penalty, temperature, min_p, top_k, top_p.

    At temperature 0 the likeliest token is taken whatever is cut off: as in vLLM, the penalty alone changes log q.
    """
    processors = LogitsProcessorList()
    if sampling.repetition_penalty != 1.0:
        processors.append(RepetitionPenaltyLogitsProcessor(float(sampling.repetition_penalty)))
    if sampling.temperature == 0:
        return processors
    if sampling.temperature != 1.0:
        processors.append(TemperatureLogitsWarper(float(sampling.temperature)))
    if sampling.min_p > 0:
        processors.append(MinPLogitsWarper(sampling.min_p))
    if sampling.top_k > 0:
        processors.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        processors.append(TopPLogitsWarper(sampling.top_p))
    return processors
