"""Mixing in the engine's sampler: α is solved for each row, and vLLM's own sampler draws from what comes out.

vLLM is handed x = (1-α)·θ + α·t of the raw logits. It divides by the temperature, applies penalties and truncation as
to any model's logits, and its processed log-probabilities are then log q of the distribution that was drawn from. What
else a token's record needs rides on the log-probabilities, as three more columns under ids beyond the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from vllm.v1.outputs import LogprobsTensors

from ...mixture import Mixture, MixtureRows, blend, log_distributions, solve_alpha
from ...pairing import Ending
from .compat import own_generators

RECORD = "optimal_sampling_record"
"""The extra argument of a request that asks for the columns of a record."""
COLUMNS = 3
"""α, log θ, log t, under the token ids V, V+1 and V+2; a request asks for as many log-probabilities."""
_CERTAIN = 1e4
"""The logit by which a row without a solution ends its sequence: a number that stays finite at any temperature."""


class Plan(NamedTuple):
    """How each row of a batch is mixed; made once for as long as the batch has the same requests.

    `solve` holds the rows whose α depends on the logits: None where it is all of them.
    """

    rows: MixtureRows
    temperature: Float[Tensor, " N"]
    known: Float[Tensor, " N"]
    solve: Int[Tensor, " K"] | None
    bitmask: Tensor | None

    @classmethod
    def of(
        cls, mixtures: Sequence[Mixture], temperatures: Sequence[float], masked: Sequence[bool], device: torch.device
    ) -> Plan:
        """Greedy rows (temperature 0) are solved at 1. `masked`: whether a grammar masks the row's logits."""
        rows = MixtureRows.of(mixtures, device)
        known = [m.alpha_min if m.alpha_min == m.alpha_max else m.fixed_alpha for m in mixtures]
        unknown = [i for i, m in enumerate(mixtures) if m.alpha_min < m.alpha_max and m.method != "fixed"]
        return cls(
            rows,
            torch.tensor([t or 1.0 for t in temperatures], device=device),
            torch.tensor(known, dtype=rows.alpha_min.dtype, device=device),
            None if len(unknown) == len(mixtures) else torch.tensor(unknown, dtype=torch.int64, device=device),
            torch.tensor(masked, device=device)[:, None] if any(masked) else None,
        )


class Mixed(NamedTuple):
    """One step: the logits to sample from, and what its records are read from. V_engine is the teacher's."""

    logits: Float[Tensor, "N V_engine"]
    alpha: Float[Tensor, " N"]
    log_theta: Float[Tensor, "N V"]
    log_teacher: Float[Tensor, "N V"]


def mix_step(
    theta: Float[Tensor, "N V_theta"], teacher: Float[Tensor, "N V_engine"], plan: Plan, ending: Ending
) -> Mixed:
    """Mix raw logits. A row without a solution (see `mixture.mix`) has α = NaN and ends its sequence.

    Reads both logits about ten times where α is solved, three times where it is known; waits for no device but the
    CPU.
    """
    V_engine = teacher.shape[1]
    V = min(theta.shape[1], V_engine)
    theta, teacher = theta[:, :V].float(), ending.fold(teacher[:, :V].float())
    if plan.solve is not None and len(plan.solve) == 0:
        scale = plan.temperature[:, None]
        log_theta, log_teacher = torch.log_softmax(theta / scale, -1), torch.log_softmax(teacher / scale, -1)
        alpha = plan.known
    else:
        log_theta, log_teacher = log_distributions(theta, teacher, plan.temperature)
        if plan.solve is None:
            alpha = solve_alpha(log_theta, log_teacher, plan.rows)
        else:
            solved = solve_alpha(log_theta[plan.solve], log_teacher[plan.solve], plan.rows.rows(plan.solve))
            alpha = plan.known.index_copy(0, plan.solve, solved)
    broken = log_theta[:, 0].isnan() | log_teacher[:, 0].isnan()  # a NaN anywhere is one throughout the row
    alpha = alpha.float().masked_fill(broken, torch.nan)
    mixed = blend(theta, teacher, alpha)
    if plan.bitmask is not None:  # a grammar's mask lands on the teacher's logits and must hold at α = 0 too
        mixed = mixed.masked_fill(plan.bitmask & teacher.isneginf(), -torch.inf)
    if alpha.device.type != "cpu" or bool(alpha.isnan().any()):
        mixed = torch.where(alpha.isnan()[:, None], _last_words(V, ending, mixed), mixed)
    if V_engine > V:
        mixed = nn.functional.pad(mixed, (0, V_engine - V), value=-torch.inf)
    return Mixed(mixed, alpha, log_theta, log_teacher)


def _last_words(V: int, ending: Ending, like: Tensor) -> Float[Tensor, " V"]:
    logits = like.new_zeros(V)
    if ending.stop:
        logits[ending.stop[0]] = _CERTAIN
    return logits


def with_records(
    columns: LogprobsTensors, sampled: Int[Tensor, " N"], mixed: Mixed, wanted: Tensor | None
) -> LogprobsTensors:
    """The log-probabilities of a step with the record behind the first column, that of the sampled token.

    Args:
        columns: vLLM's own, (N, 1 + k).
        sampled: the sampled tokens.
        mixed: the step.
        wanted: (N, 1) the rows that asked for records; None: all, and k is 0.
    """
    N, V = mixed.logits.shape
    index = sampled[:, None].long()
    record = torch.cat([mixed.alpha[:, None], mixed.log_theta.gather(1, index), mixed.log_teacher.gather(1, index)], 1)
    ids = torch.arange(V, V + COLUMNS, dtype=columns.logprob_token_ids.dtype, device=index.device).expand(N, -1)
    if wanted is not None:
        theirs = max(columns.logprobs.shape[1] - 1, COLUMNS)
        ids, record = nn.functional.pad(ids, (0, theirs - COLUMNS)), nn.functional.pad(record, (0, theirs - COLUMNS))
        missing = (0, theirs + 1 - columns.logprobs.shape[1])
        ids = torch.where(wanted, ids, nn.functional.pad(columns.logprob_token_ids[:, 1:], missing))
        record = torch.where(wanted, record, nn.functional.pad(columns.logprobs[:, 1:], missing))
    return columns._replace(
        logprob_token_ids=torch.cat([columns.logprob_token_ids[:, :1], ids], 1),
        logprobs=torch.cat([columns.logprobs[:, :1], record.float()], 1),
    )


def mixture_of(extra_args: dict[str, Any] | None, default: dict[str, Any]) -> Mixture:
    """The mixture that a request's extra arguments describe, flat, under the names of `Mixture`'s fields."""
    given = extra_args or {}
    names = Mixture.__dataclass_fields__
    return Mixture(**(default | {name: given[name] for name in names if name in given}))


class MixtureSampler(nn.Module):
    """Stands before the sampler of Model Runner V1, whose row i is `runner.input_batch.req_ids[i]`."""

    def __init__(self, base: nn.Module, runner: Any) -> None:
        super().__init__()
        self.base = base
        self.runner = runner
        self.requests: list[str] = []
        self.plan: Plan | None = None
        self.wanted: Tensor | None = None
        self.num_logprobs: int | None = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)

    def forward(self, logits: Tensor, sampling_metadata: Any, *args: Any, **kwargs: Any) -> Any:
        """What vLLM's sampler returns, drawn from the mixture; `logits` are the teacher's."""
        requests = self.runner.input_batch.req_ids[: len(logits)]
        if requests != self.requests:
            self._make_plan(list(requests), logits.device)
        assert self.plan is not None
        model = self.runner.model
        mixed = mix_step(model.theta_logits, logits, self.plan, model.ending)
        sampling_metadata = replace(
            sampling_metadata,
            max_num_logprobs=sampling_metadata.max_num_logprobs if self.num_logprobs is None else self.num_logprobs,
            generators=own_generators(self.runner, sampling_metadata.generators),
        )
        output = self.base(mixed.logits, sampling_metadata, *args, **kwargs)
        if self.num_logprobs is not None:
            output.logprobs_tensors = with_records(
                output.logprobs_tensors, output.sampled_token_ids[:, 0], mixed, self.wanted
            )
        return output

    def _make_plan(self, requests: list[str], device: torch.device) -> None:
        params = [self.runner.requests[name].sampling_params for name in requests]
        default = self.runner.model.default_mixture
        self.plan = Plan.of(
            [mixture_of(one.extra_args, default) for one in params],
            [one.temperature for one in params],
            [one.structured_outputs is not None for one in params],
            device,
        )
        wanted = [bool((one.extra_args or {}).get(RECORD)) for one in params]
        others = [one.logprobs for one, mine in zip(params, wanted) if not mine and one.logprobs is not None]
        self.wanted = torch.tensor(wanted, device=device)[:, None] if others or not all(wanted) else None
        # vLLM looks for as many likeliest tokens as are asked for; our columns need none of them.
        self.num_logprobs = max(others, default=0) if any(wanted) else None
        self.requests = requests
