"""The record of each sampled token, written behind vLLM's log-probabilities, for both samplers."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from vllm.v1.outputs import LogprobsTensors

from ....pairing import Ending
from ..wire import NO_NUMBER, RECORD_COLUMNS, RECORD_NAMES


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
        """Return α, log θ and log t of the sampled tokens, in the order of `RECORD_NAMES`; `NO_NUMBER` for NaN."""
        index = sampled[:, None].long()
        theta, teacher = self.theta.gather(1, index)[:, 0].float(), self.teacher.gather(1, index)[:, 0].float()
        if self.ending.stop and self.ending.folded:
            # Columns one by one: a list of them would be copied to the device, and the step would wait.
            ends = torch.stack([self.teacher[:, id] for id in (self.ending.stop[0], *self.ending.folded)], 1)
            ends = ends.float().logsumexp(-1)
            teacher = torch.where(index[:, 0] == self.ending.stop[0], ends, teacher)
            for id in self.ending.folded:  # the student alone may draw one; its mass went to the end above
                teacher = teacher.masked_fill(index[:, 0] == id, -torch.inf)
        if self.temperature is not None:
            theta, teacher = theta / self.temperature, teacher / self.temperature
        record = {
            "alpha": self.alpha,
            "log_theta": theta - self.theta_sum,
            "log_teacher": teacher - self.teacher_sum,
        }
        columns = torch.stack([record[name] for name in RECORD_NAMES], 1)
        return columns.nan_to_num(nan=NO_NUMBER, posinf=torch.inf, neginf=-torch.inf)


def with_records(
    columns: LogprobsTensors, sampled: Int[Tensor, " N"], mixed: Mixed, wanted: Tensor | None
) -> LogprobsTensors:
    """Return the log-probabilities of a step with the record behind the first column, that of the sampled token.

    Args:
        columns: vLLM's, (N, 1 + k).
        sampled: the sampled tokens.
        mixed: the step.
        wanted: (N, 1) the rows that asked for records; None: all, and k is 0.
    """
    N, V = mixed.logits.shape
    record = mixed.record(sampled)
    ids = torch.arange(V, V + RECORD_COLUMNS, dtype=columns.logprob_token_ids.dtype, device=record.device)
    ids = ids.expand(N, -1)
    if wanted is not None:
        width = max(columns.logprobs.shape[1] - 1, RECORD_COLUMNS)
        ids, record = (nn.functional.pad(part, (0, width - RECORD_COLUMNS)) for part in (ids, record))
        missing = (0, width + 1 - columns.logprobs.shape[1])
        ids = torch.where(wanted, ids, nn.functional.pad(columns.logprob_token_ids[:, 1:], missing))
        record = torch.where(wanted, record, nn.functional.pad(columns.logprobs[:, 1:], missing))
    return columns._replace(
        logprob_token_ids=torch.cat([columns.logprob_token_ids[:, :1], ids], 1),
        logprobs=torch.cat([columns.logprobs[:, :1], record], 1),
    )
