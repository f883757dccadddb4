"""Mixing in the engine's sampler: α is solved for each row, and vLLM's own sampler draws from what comes out.

vLLM is handed the raw logits mixed at α by `mixture.mix_at`. It divides them by the temperature and applies penalties
and truncation as to any model's logits. Its processed log-probabilities are then log q of the distribution that was
drawn from. The rest of a token's record rides on them, as three more columns under ids beyond the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ....mixture import CERTAIN_LOGIT, Mixture, MixtureRows, log_distributions, mix_at, solve_alpha
from ....pairing import Ending
from ..wire import dense_of, mixture_of, wants_record
from .dense import Group, group_rows, measure_groups, with_dense
from .grammar import rule_out
from .records import Mixed, with_records

_CACHED = 1 << 16
"""Logits that the CPU solves at a time: half a MiB in float64, of which the solver holds a few; 4 times as fast as 32
rows of 32 768 at once."""


class BatchMixtures(NamedTuple):
    """The mixture of each row of a batch; made once for as long as the batch has the same requests.

    `solve` holds the rows whose α depends on the logits: None where it is all of them. `temperature` is None where it
    is 1 in all rows. `masked` holds the rows with a grammar: None where there is none.
    """

    rows: MixtureRows
    temperature: Float[Tensor, " N"] | None
    known: Float[Tensor, " N"]
    solve: Int[Tensor, " K"] | None
    masked: Bool[Tensor, "N 1"] | None

    @classmethod
    def of(
        cls, mixtures: Sequence[Mixture], temperatures: Sequence[float], masked: Sequence[bool], device: torch.device
    ) -> BatchMixtures:
        """Make a batch's mixtures. Greedy rows (temperature 0) are solved at 1; a grammar masks `masked` rows."""
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


def mix_step(
    theta: Float[Tensor, "N V_theta"], teacher: Float[Tensor, "N V_engine"], mixtures: BatchMixtures, ending: Ending
) -> Mixed:
    """Mix raw logits on a CPU. A row without a solution (see `mixture.mix`) has α = NaN and ends its sequence.

    Reads both logits about ten times where α is solved, four times where it is known.
    """
    V_engine = teacher.shape[1]
    V = min(theta.shape[1], V_engine)
    if mixtures.masked is not None:
        theta = rule_out(theta, teacher, mixtures.masked)
    log_theta, log_teacher = theta[:, :V].float(), ending.fold(teacher[:, :V].float())  # up to a constant of the row
    is_known = mixtures.solve is not None and len(mixtures.solve) == 0
    alpha = mixtures.known if is_known else _solve(log_theta, log_teacher, mixtures)
    temperature = 1.0 if mixtures.temperature is None else mixtures.temperature
    mixed = mix_at(log_theta, log_teacher, alpha.float(), mixtures.rows, temperature)
    if mixtures.temperature is not None:
        log_theta, log_teacher = (x / mixtures.temperature[:, None] for x in (log_theta, log_teacher))
    theta_sum, teacher_sum = log_theta.logsumexp(-1), log_teacher.logsumexp(-1)
    # A NaN among the logits is one in their sum; no finite logit at all is no distribution either. In the mixture
    # there is none where no token has mass under both models.
    solved = theta_sum.isfinite() & teacher_sum.isfinite() & ~mixed.amax(-1).isneginf()
    alpha = alpha.float().masked_fill(~solved, torch.nan)
    if bool(alpha.isnan().any()):
        mixed = torch.where(alpha.isnan()[:, None], _last_words(V, ending, mixed), mixed)
    if V_engine > V:
        mixed = nn.functional.pad(mixed, (0, V_engine - V), value=-torch.inf)
    return Mixed(mixed, alpha, theta, teacher, theta_sum, teacher_sum, mixtures.temperature, ending)


def _solve(theta: Float[Tensor, "N V"], teacher: Float[Tensor, "N V"], mixtures: BatchMixtures) -> Float[Tensor, " N"]:
    """Return α of each row from raw logits, solving as many rows at a time as the processor's cache holds."""
    rows = mixtures.solve if mixtures.solve is not None else torch.arange(len(theta))
    solved = []
    for part in rows.split(max(1, _CACHED // theta.shape[1])):
        whole = len(part) == len(theta)
        temperature = 1.0 if mixtures.temperature is None else mixtures.temperature[part]
        logits = (theta, teacher) if whole else (theta[part], teacher[part])
        log_theta, log_teacher = log_distributions(*logits, temperature)
        solved.append(solve_alpha(log_theta, log_teacher, mixtures.rows if whole else mixtures.rows.at(part)))
    return mixtures.known.index_copy(0, rows, torch.cat(solved))


def _last_words(V: int, ending: Ending, like: Tensor) -> Float[Tensor, " V"]:
    logits = like.new_zeros(V)
    if ending.stop:
        logits[ending.stop[0]] = CERTAIN_LOGIT
    return logits


class _HeldGenerator(torch.Generator):
    """A generator that a discarded row did not draw from, so that there is nothing to wind back."""

    def get_offset(self) -> int:
        return 4

    def set_offset(self, offset: int) -> torch.Generator:
        return self


def generators_of_kept_rows(runner: Any, generators: dict[int, torch.Generator]) -> dict[int, torch.Generator]:
    """Return the generators of the rows whose token will be kept, by row.

    Symptom: seeded requests and chunked prefill on the CPU stop with "CPU Generator does not use offset".
    Cause: Model Runner V1 winds back the generator of a row whose prompt is not yet read, by an offset that only GPUs
        have.
    Safe: such a row draws from the global generator; its generator is not touched and ignores being wound back.
    Upstream: none found.
    Delete when: tests/backends/vllm/worker/test_schedule.py passes with chunked prefill and without this function.
    """
    discarded = [int(row) for row in runner.discard_request_mask.np[: runner.input_batch.num_reqs].nonzero()[0]]
    for row in discarded:
        if row in generators and not isinstance(generators[row], _HeldGenerator):
            held = _HeldGenerator()
            held.set_state(generators[row].get_state())
            generators[row] = held
            runner.requests[runner.input_batch.req_ids[row]].generator = held
    return {row: generator for row, generator in generators.items() if row not in discarded}


class MixtureSampler(nn.Module):
    """Stands before the sampler of Model Runner V1, whose row i is `runner.input_batch.req_ids[i]`."""

    def __init__(self, base: nn.Module, runner: Any) -> None:
        super().__init__()
        self.base = base
        self.runner = runner
        self.requests: list[str] = []
        self.mixtures: BatchMixtures | None = None
        self.wanted: Tensor | None = None
        self.num_logprobs: int | None = None
        self.groups: list[Group] = []

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)

    def forward(self, logits: Tensor, sampling_metadata: Any, *args: Any, **kwargs: Any) -> Any:
        """Return what vLLM's sampler does, drawn from the mixture; `logits` are the teacher's."""
        requests = self.runner.input_batch.req_ids[: len(logits)]
        if requests != self.requests:
            self._read_mixtures(list(requests), logits.device)
        assert self.mixtures is not None
        model = self.runner.model
        mixed = mix_step(model.theta_logits, logits, self.mixtures, model.ending)
        sampling_metadata = replace(
            sampling_metadata,
            max_num_logprobs=sampling_metadata.max_num_logprobs if self.num_logprobs is None else self.num_logprobs,
            generators=generators_of_kept_rows(self.runner, sampling_metadata.generators),
        )
        measured = measure_groups(mixed, self.groups)
        output = self.base(mixed.logits, sampling_metadata, *args, **kwargs)
        if self.num_logprobs is not None:
            output.logprobs_tensors = with_records(
                output.logprobs_tensors, output.sampled_token_ids[:, 0], mixed, self.wanted
            )
        if measured:
            output.logprobs_tensors = with_dense(output.logprobs_tensors, measured)
        return output

    def _read_mixtures(self, requests: list[str], device: torch.device) -> None:
        params = [self.runner.requests[name].sampling_params for name in requests]
        self.mixtures = BatchMixtures.of(
            [mixture_of(one.extra_args) for one in params],
            [one.temperature for one in params],
            [one.structured_outputs is not None for one in params],
            device,
        )
        self.groups = group_rows([dense_of(one.extra_args) if wants_record(one) else None for one in params], device)
        wanted = [wants_record(one) for one in params]
        V = self.runner.input_batch.vocab_size  # what -1 stands for
        asked = [one.logprobs for one, mine in zip(params, wanted) if not mine and one.logprobs is not None]
        others = [V if count == -1 else count for count in asked]
        self.wanted = torch.tensor(wanted, device=device)[:, None] if others or not all(wanted) else None
        # vLLM looks for as many likeliest tokens as are asked for; our columns need none of them.
        self.num_logprobs = max(others, default=0) if any(wanted) else None
        self.requests = requests
