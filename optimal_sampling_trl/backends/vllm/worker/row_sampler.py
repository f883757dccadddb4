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

from ....mixture import Mixture, MixtureRows, blend, log_distributions, solve_alpha
from ....pairing import Ending
from ..versions import own_generators

RECORD = "optimal_sampling_record"
"""The extra argument of a request that asks for the columns of a record."""
COLUMNS = 3
"""α, log θ, log t, under the token ids V, V+1 and V+2; a request asks for as many log-probabilities."""
NO_NUMBER = 2.0
"""Stands for NaN in a record, which has no probability's logarithm and no α above 1: JSON has no NaN."""
_CACHED = 1 << 16
"""Logits that the CPU solves at a time: half a MiB in float64, of which the solver holds a few; 4 times as fast as 32
rows of 32 768 at once."""
_CERTAIN = 1e4
"""The logit by which a row without a solution ends its sequence: a number that stays finite at any temperature."""


class Plan(NamedTuple):
    """How each row of a batch is mixed; made once for as long as the batch has the same requests.

    `solve` holds the rows whose α depends on the logits: None where it is all of them. `temperature` is None where it
    is 1 in all rows.
    """

    rows: MixtureRows
    temperature: Float[Tensor, " N"] | None
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
            None if set(temperatures) <= {0, 1} else torch.tensor([t or 1.0 for t in temperatures], device=device),
            torch.tensor(known, dtype=rows.alpha_min.dtype, device=device),
            None if len(unknown) == len(mixtures) else torch.tensor(unknown, dtype=torch.int64, device=device),
            torch.tensor(masked, device=device)[:, None] if any(masked) else None,
        )


class Mixed(NamedTuple):
    """One step: the logits to sample from, and what its records are read from. V_engine is the teacher's V.

    `theta` and `teacher` are raw logits, the two sums the logarithms of what normalises them at the sampling
    temperature (None: 1), the teacher's endings folded.
    """

    logits: Float[Tensor, "N V_engine"]
    alpha: Float[Tensor, " N"]
    theta: Float[Tensor, "N V_theta"]
    teacher: Float[Tensor, "N V_engine"]
    theta_sum: Float[Tensor, " N"]
    teacher_sum: Float[Tensor, " N"]
    temperature: Float[Tensor, " N"] | None
    ending: Ending

    def record(self, sampled: Int[Tensor, " N"]) -> Float[Tensor, "N 3"]:
        """α, log θ and log t of the sampled tokens; `NO_NUMBER` for NaN."""
        index = sampled[:, None].long()
        theta, teacher = self.theta.gather(1, index)[:, 0].float(), self.teacher.gather(1, index)[:, 0].float()
        if self.ending.stop and self.ending.folded:
            # Columns one by one: a list of them would be copied to the device, and the step would wait.
            ends = torch.stack([self.teacher[:, id] for id in (self.ending.stop[0], *self.ending.folded)], 1)
            ends = ends.float().logsumexp(-1)
            teacher = torch.where(index[:, 0] == self.ending.stop[0], ends, teacher)
        if self.temperature is not None:
            theta, teacher = theta / self.temperature, teacher / self.temperature
        columns = [self.alpha, theta - self.theta_sum, teacher - self.teacher_sum]
        return torch.stack(columns, 1).nan_to_num(nan=NO_NUMBER, posinf=torch.inf, neginf=-torch.inf)


def mix_step(
    theta: Float[Tensor, "N V_theta"], teacher: Float[Tensor, "N V_engine"], plan: Plan, ending: Ending
) -> Mixed:
    """Mix raw logits on a CPU. A row without a solution (see `mixture.mix`) has α = NaN and ends its sequence.

    Reads both logits about ten times where α is solved, three times where it is known.
    """
    V_engine = teacher.shape[1]
    V = min(theta.shape[1], V_engine)
    own, other = theta[:, :V].float(), ending.fold(teacher[:, :V].float())
    alpha = plan.known if plan.solve is not None and len(plan.solve) == 0 else _solve(own, other, plan)
    mixed = blend(own, other, alpha.float())
    if plan.bitmask is not None:  # a grammar's mask lands on the teacher's logits and must hold at α = 0 too
        mixed = mixed.masked_fill(plan.bitmask & other.isneginf(), -torch.inf)
    if plan.temperature is not None:
        own, other = own / plan.temperature[:, None], other / plan.temperature[:, None]
    theta_sum, teacher_sum = own.logsumexp(-1), other.logsumexp(-1)
    # A NaN among the logits is one in their sum; no finite logit at all is no distribution either.
    alpha = alpha.float().masked_fill(~(theta_sum.isfinite() & teacher_sum.isfinite()), torch.nan)
    if bool(alpha.isnan().any()):
        mixed = torch.where(alpha.isnan()[:, None], _last_words(V, ending, mixed), mixed)
    if V_engine > V:
        mixed = nn.functional.pad(mixed, (0, V_engine - V), value=-torch.inf)
    return Mixed(mixed, alpha, theta, teacher, theta_sum, teacher_sum, plan.temperature, ending)


def _solve(theta: Float[Tensor, "N V"], teacher: Float[Tensor, "N V"], plan: Plan) -> Float[Tensor, " N"]:
    """α of each row, of raw logits; a few rows at a time, as many as the processor's cache holds."""
    rows = plan.solve if plan.solve is not None else torch.arange(len(theta))
    solved = []
    for part in rows.split(max(1, _CACHED // theta.shape[1])):
        whole = len(part) == len(theta)
        temperature = 1.0 if plan.temperature is None else plan.temperature[part]
        logits = (theta, teacher) if whole else (theta[part], teacher[part])
        log_theta, log_teacher = log_distributions(*logits, temperature)
        solved.append(solve_alpha(log_theta, log_teacher, plan.rows if whole else plan.rows.rows(part)))
    return plan.known.index_copy(0, rows, torch.cat(solved))


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
    record = mixed.record(sampled)
    ids = torch.arange(V, V + COLUMNS, dtype=columns.logprob_token_ids.dtype, device=record.device).expand(N, -1)
    if wanted is not None:
        theirs = max(columns.logprobs.shape[1] - 1, COLUMNS)
        ids, record = nn.functional.pad(ids, (0, theirs - COLUMNS)), nn.functional.pad(record, (0, theirs - COLUMNS))
        missing = (0, theirs + 1 - columns.logprobs.shape[1])
        ids = torch.where(wanted, ids, nn.functional.pad(columns.logprob_token_ids[:, 1:], missing))
        record = torch.where(wanted, record, nn.functional.pad(columns.logprobs[:, 1:], missing))
    return columns._replace(
        logprob_token_ids=torch.cat([columns.logprob_token_ids[:, :1], ids], 1),
        logprobs=torch.cat([columns.logprobs[:, :1], record], 1),
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
        V = self.runner.input_batch.vocab_size  # what -1 stands for
        asked = [one.logprobs for one, mine in zip(params, wanted) if not mine and one.logprobs is not None]
        others = [V if count == -1 else count for count in asked]
        self.wanted = torch.tensor(wanted, device=device)[:, None] if others or not all(wanted) else None
        # vLLM looks for as many likeliest tokens as are asked for; our columns need none of them.
        self.num_logprobs = max(others, default=0) if any(wanted) else None
        self.requests = requests
