"""The mixture on plain transformers: two models with a KV cache each, batched. Needs no vLLM, and is exact.

The student may be the module that is being trained: it is used where it stands, so there is no copy of it and nothing
to synchronise. Prompts are padded on the left; equal prompts are read once; rows that ended leave the batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from .. import pairing
from ..mixture import MixtureRows, blend, log_distributions, precision, solve_alpha
from ..options import unknown_option
from ..request import Request, Sampling
from ..rollout import RECORDS, Rollout, check_solved

MODEL_OPTIONS = ("attn_implementation", "dtype", "revision", "trust_remote_code")
"""Options that go to `from_pretrained`."""
ENGINE_OPTIONS = ("device", "max_model_len", "max_num_seqs", *MODEL_OPTIONS)
"""All options of this backend, under vLLM's names where vLLM has them."""


class TransformersBackend:
    """Samples the mixture with transformers alone.

    Args:
        teacher: a folder, a model id or a loaded model.
        theta: likewise; a loaded model is used as it stands, also while it is being trained.
        tokenizer: the pair's; by default the student's, checked against the teacher's.
        device: where loaded folders go; by default the student's device, or a GPU where there is one.
        max_num_seqs: most rows in a batch.
        max_model_len: most tokens of a prompt and its completion; by default what both models can read.
        model_options: `dtype`, `revision`, `attn_implementation`, `trust_remote_code` for `from_pretrained`.

    Raises:
        ValueError: on an unknown option, a model that cannot be loaded, or a pair that cannot be mixed.
    """

    name = "transformers"

    def __init__(
        self,
        teacher: str | PreTrainedModel,
        theta: str | PreTrainedModel,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        device: torch.device | str | None = None,
        max_num_seqs: int = 256,
        max_model_len: int | None = None,
        **model_options: Any,
    ) -> None:
        for name in model_options:
            if name not in MODEL_OPTIONS:
                raise ValueError(unknown_option("argument of the transformers backend", name, ENGINE_OPTIONS))
        code = {"trust_remote_code": model_options.get("trust_remote_code", False)}
        configs = [_config(model, role, **code) for model, role in ((teacher, "teacher"), (theta, "student"))]
        self.tokenizer = _tokenizer(teacher, theta, tokenizer, **code)
        self.vocabulary = pairing.check_vocabulary(*configs, self.tokenizer)
        self.context = _context(configs, max_model_len)
        self.max_num_seqs = max_num_seqs
        self.ending = pairing.end_of_sequence(
            *(_generation_config(model, config) for model, config in zip((teacher, theta), configs, strict=True)),
            self.tokenizer.eos_token_id,
        )
        self.device = torch.device(device) if device is not None else _device(theta)
        self._owns_theta = isinstance(theta, str)
        self.theta = _load(theta, self.device, **model_options)
        self.teacher = _load(teacher, self.device, **model_options)

    def generate(self, requests: Sequence[Request]) -> list[Rollout]:
        """One rollout for each request, in their order.

        Raises:
            ValueError: on a prompt that a model cannot read (before anything is sampled), or naming each request for
                which a model returned NaN or the two share no token (after all the others were sampled).
        """
        for index, request in enumerate(requests):
            for role, ids in (("teacher", request.prompt_ids), ("student", request.theta_prompt_ids)):
                pairing.check_prompt(ids, self.context, self.vocabulary, index, role)
        order = sorted(range(len(requests)), key=lambda index: len(requests[index].prompt_ids))
        rollouts: dict[int, Rollout] = {}
        with torch.no_grad(), _evaluating(self.theta), _evaluating(self.teacher):
            for start in range(0, len(order), self.max_num_seqs):
                part = order[start : start + self.max_num_seqs]
                rollouts.update(zip(part, self._generate_batch([requests[index] for index in part]), strict=True))
        result = [rollouts[index] for index in range(len(requests))]
        check_solved(result)
        return result

    def _generate_batch(self, requests: list[Request]) -> list[Rollout]:
        teacher = _Stream(self.teacher, [request.prompt_ids for request in requests], self.device)
        theta = _Stream(self.theta, [request.theta_prompt_ids for request in requests], self.device)
        rows = _Rows(requests, self)
        while True:
            tokens = rows.draw(theta.logits.float(), self.ending.fold(teacher.logits.float()))
            keep = rows.advance(tokens)
            if keep is not None:
                if not len(keep):
                    return rows.rollouts()
                teacher.keep(keep)
                theta.keep(keep)
                tokens = tokens[keep]
            teacher.step(tokens)
            theta.step(tokens)

    def load_theta(self, named_parameters: Iterable[tuple[str, Tensor]]) -> None:
        """Copy weights into the student, all or none.

        Raises:
            ValueError: where the student is a module that the caller trains, a name is missing or unknown, or a shape
                differs; the old weights then stay.
        """
        if not self._owns_theta:
            raise ValueError(
                "The student of this backend is the live module itself: there is nothing to load. Drop the call."
            )
        new = dict(named_parameters)
        own = dict(self.theta.named_parameters())
        wrong = [f"{name} is unknown" for name in new if name not in own and not name.endswith("lm_head.weight")]
        wrong += [f"{name} is missing" for name in own if name not in new]
        wrong += [
            f"{name} has shape {tuple(new[name].shape)}, wanted {tuple(own[name].shape)}"
            for name in own.keys() & new.keys()
            if new[name].shape != own[name].shape
        ]
        if wrong:
            raise ValueError(
                f"These weights do not fit the student ({len(wrong)} differ): {'; '.join(wrong[:3])}. Pass the "
                "`named_parameters()` of a model of its architecture. Nothing was loaded."
            )
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(new[name])

    def sleep(self) -> None:
        """Move the teacher (and the student, where it was loaded here) to the CPU until `wake_up`."""
        self._move(torch.device("cpu"))

    def wake_up(self) -> None:
        """Move the models back to their device."""
        self._move(self.device)

    def _move(self, device: torch.device) -> None:
        self.teacher.to(device)
        if self._owns_theta:
            self.theta.to(device)

    def close(self) -> None:
        """Let go of both models. Doing so twice is fine."""
        self.__dict__.pop("teacher", None)
        self.__dict__.pop("theta", None)


class _Stream:
    """One model reading a batch: its KV cache and the logits (N, V) of each row's next token."""

    def __init__(self, model: PreTrainedModel, prompts: list[list[int]], device: torch.device) -> None:
        self.model = model
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
        )
        self.cache, self.logits = output.past_key_values, output.logits[:, -1]

    def step(self, tokens: Tensor) -> None:
        """Read one more token in each row."""
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(tokens), 1)], dim=1)
        self._forward(tokens[:, None], self.lengths[:, None])
        self.lengths = self.lengths + 1

    def keep(self, index: Tensor) -> None:
        """Go on with the rows at `index` alone; a row may be named more than once."""
        self.cache.batch_select_indices(index)
        self.mask, self.lengths, self.logits = self.mask[index], self.lengths[index], self.logits[index]


class _Rows:
    """The rows of a batch: what is asked of each, and what has been drawn. `active` maps a row to its request."""

    def __init__(self, requests: list[Request], backend: TransformersBackend) -> None:
        self.requests, self.backend = requests, backend
        device, count = backend.device, len(requests)
        self.limits = [
            min(r.sampling.max_tokens, backend.context - max(len(r.prompt_ids), len(r.theta_prompt_ids)))
            for r in requests
        ]
        self.active = list(range(count))
        self.tokens = torch.zeros(count, max(self.limits), dtype=torch.int64, device=device)
        self.records = torch.zeros(count, max(self.limits), len(RECORDS), device=device)
        self.lengths = [0] * count
        self.reasons = ["length"] * count
        self.step = 0
        seeds = [request.sampling.seed for request in requests]
        self.generators = [None if s is None else torch.Generator(device).manual_seed(s) for s in seeds]
        self._regroup()

    def _regroup(self) -> None:
        """Per-row settings of the active rows, made when the rows change and not at each token."""
        device = self.backend.device
        requests = [self.requests[row] for row in self.active]
        self.index = torch.tensor(self.active, device=device)
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
        log_theta, log_teacher = log_distributions(theta_logits, teacher_logits, self.temperature)
        alpha = solve_alpha(log_theta, log_teacher, self.mixtures)
        V = log_theta.shape[-1]
        scores = blend(theta_logits[:, :V], teacher_logits[:, :V], alpha)
        for rows, processors in self.processors:
            scores[rows] = processors(self._seen(rows), scores[rows])
        # A row without a solution goes on harmlessly; its NaN alpha names it when the batch is done.
        log_q = torch.log_softmax(scores, dim=-1).masked_fill(alpha.isnan()[:, None], 0.0)
        chosen = torch.where(self.greedy, log_q.argmax(-1), (log_q + self._gumbel(log_q)).argmax(-1))
        records = [alpha, *(x.gather(1, chosen[:, None])[:, 0] for x in (log_q, log_theta, log_teacher))]
        self.tokens[self.index, self.step] = chosen
        self.records[self.index, self.step] = torch.stack([x.float() for x in records], dim=-1)
        return chosen

    def _seen(self, rows: Tensor) -> Tensor | None:
        """What the rows' teacher prompts and completions hold, for the repetition penalty: (rows, length) ids."""
        if all(r.sampling.repetition_penalty == 1.0 for r in self.requests):
            return None
        prompts = [self.requests[self.active[row]].prompt_ids for row in rows.tolist()]
        width = max(map(len, prompts))
        padded = [[prompt[0]] * (width - len(prompt)) + prompt for prompt in prompts]  # a token that was seen anyway
        return torch.cat([torch.tensor(padded, device=rows.device), self.tokens[self.index[rows], : self.step]], dim=1)

    def _gumbel(self, log_q: Tensor) -> Tensor:
        """Standard Gumbel noise (N, V): argmax(log q + noise) is a draw from q. Seeded rows use their own stream."""
        noise = torch.empty_like(log_q).exponential_()
        for row, request in enumerate(self.active):
            generator = self.generators[request]
            if generator is not None:
                noise[row].exponential_(generator=generator)
        return -noise.clamp(min=torch.finfo(noise.dtype).tiny).log()

    def advance(self, tokens: Tensor) -> Tensor | None:
        """Note which rows ended. Returns the rows to go on with where at least half have ended (none: all have)."""
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

    def _ended(self, request: int, token: int) -> bool:
        sampling = self.requests[request].sampling
        stopped = token in self.backend.ending.stop and not sampling.ignore_eos
        if sampling.stop and not stopped:
            text = self.backend.tokenizer.decode(self.tokens[request, : self.step], skip_special_tokens=True)
            stopped = any(stop in text for stop in sampling.stop)
        if stopped:
            self.reasons[request] = "stop"
        return stopped or self.step >= self.limits[request]

    def rollouts(self) -> list[Rollout]:
        """What was drawn, a rollout for each request."""
        tokens, records = self.tokens.cpu(), self.records.cpu()
        rollouts = []
        for row, (request, length) in enumerate(zip(self.requests, self.lengths, strict=True)):
            ids = tokens[row, :length].tolist()
            text = self.backend.tokenizer.decode(ids, skip_special_tokens=True)
            for stop in request.sampling.stop:
                text = text.split(stop)[0]
            rollouts.append(
                Rollout(
                    prompt_ids=list(request.prompt_ids),
                    theta_prompt_ids=list(request.theta_prompt_ids),
                    completion_ids=ids,
                    **{name: records[row, :length, i].clone() for i, name in enumerate(RECORDS)},
                    text=text,
                    finish_reason=self.reasons[row],
                    mixture=request.mixture,
                    temperature=request.sampling.temperature,
                )
            )
        return rollouts


def _processors(sampling: Sampling) -> LogitsProcessorList:
    """transformers' own processors, in vLLM's order: penalty, temperature, min_p, top_k, top_p."""
    processors = LogitsProcessorList()
    if sampling.repetition_penalty != 1.0:
        processors.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if sampling.temperature not in (0.0, 1.0):
        processors.append(TemperatureLogitsWarper(float(sampling.temperature)))
    if sampling.min_p > 0:
        processors.append(MinPLogitsWarper(sampling.min_p))
    if sampling.top_k > 0:
        processors.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        processors.append(TopPLogitsWarper(sampling.top_p))
    return processors


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Switch dropout off, and afterwards on again exactly where it was on."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _config(model: str | PreTrainedModel, role: str, **kwargs: Any) -> Any:
    if isinstance(model, str):
        return pairing.load_config(model, role, **kwargs)
    pairing.check_decoder(model.config, role)
    return model.config


def _generation_config(model: str | PreTrainedModel, config: Any) -> Any:
    if isinstance(model, str):
        return pairing.load_generation_config(model, config)
    return getattr(model, "generation_config", None) or config


def _tokenizer(
    teacher: str | PreTrainedModel, theta: str | PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, **kw: Any
) -> PreTrainedTokenizerBase:
    name = teacher if isinstance(teacher, str) else teacher.name_or_path
    if tokenizer is None:
        source = theta if isinstance(theta, str) else theta.name_or_path
        tokenizer = pairing.load_tokenizer(source, "student", **kw)
    pairing.check_same_tokens(pairing.load_tokenizer(name, "teacher", **kw), tokenizer)
    return tokenizer


def _context(configs: list[Any], max_model_len: int | None) -> int:
    longest = pairing.context_length(*configs)
    if max_model_len is not None and not 2 <= max_model_len <= longest:
        raise ValueError(
            f"`max_model_len` is {max_model_len}; wanted 2 to {longest}, the shorter of the two models' contexts."
        )
    return max_model_len or longest


def _device(theta: str | PreTrainedModel) -> torch.device:
    if not isinstance(theta, str):
        return theta.device
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _load(model: str | PreTrainedModel, device: torch.device, **options: Any) -> PreTrainedModel:
    if not isinstance(model, str):
        return model
    return AutoModelForCausalLM.from_pretrained(model, **options).to(device).eval()
