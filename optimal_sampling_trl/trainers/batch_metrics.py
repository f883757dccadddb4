"""The part of a trainer that logs what its batches were sampled from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from .. import metrics
from ..rollouts.dense import SCALARS
from ..rollouts.rollout import RECORDS, Rollout
from . import columns
from .entropy_scale import next_scale
from .generator import OptimalSamplingGenerator
from .loggers import send_histograms
from .prompt_reader import TrlTrainer
from .records import loss_mask


class BatchMetrics(TrlTrainer):
    """Base of the trainers: logs the numbers and histograms of each batch, and follows the scale of the entropy gate.

    Attributes:
        histograms: values (N,) over the mixture's tokens in the last batch, of all processes, until they are logged.
    """

    generator: OptimalSamplingGenerator
    rollouts: Sequence[Rollout]
    vllm_generation: Any  # a `MixtureGeneration`; TRL names its own type
    _scale: float | None = None  # of the entropy gate, once a batch has set it

    def __init__(self, **arguments: Any) -> None:
        self.histograms: dict[str, Tensor] = {}
        self._sums: dict[tuple[bool, str], tuple[float, float]] = {}  # totals and counts of what TRL has yet to log
        super().__init__(**arguments)

    def _append_metrics(self, numbers: dict[str, float]) -> None:
        """Add numbers of this batch to those that TRL averages until it logs them."""
        for name, value in numbers.items():
            self._unlogged()[name].append(value)

    def _append_sum(self, name: str, total: float, count: float) -> None:
        """Add to a number that is logged as the mean over all that was counted: micro-batches differ in tokens."""
        key, numbers = (self.model.training, name), self._unlogged()
        before = self._sums[key] if name in numbers else (0.0, 0.0)
        self._sums[key] = total, count = before[0] + total, before[1] + count
        if count:
            numbers[name] = [total / count]

    def _unlogged(self) -> dict[str, list[float]]:
        """Return the numbers, by name, that TRL averages at its next log, and then forgets."""
        return self._metrics["train" if self.model.training else "eval"]

    def evaluation_loop(self, dataloader: Any, *positional: Any, metric_key_prefix: str = "eval", **named: Any) -> Any:
        """Evaluate or predict as transformers does, and report this evaluation's numbers under its own prefix.

        TRL keeps them for its next log, which calls them `eval_` whichever of several data sets they are of, and which
        never comes after `predict`.
        """
        numbers = self._metrics["eval"]
        numbers.clear()
        output = super().evaluation_loop(dataloader, *positional, metric_key_prefix=metric_key_prefix, **named)
        self._report(output, metric_key_prefix, numbers)
        numbers.clear()
        return output

    def _report(self, output: Any, prefix: str, numbers: Mapping[str, Sequence[float]]) -> None:
        """Put the means of an evaluation's numbers among what it returns; NaN is left out, as TRL does.

        A number that has no mean has no name there: transformers' `log_metrics` takes no None.
        """
        known = {name: [value for value in values if not math.isnan(value)] for name, values in numbers.items()}
        output.metrics.update({f"{prefix}_{name}": fmean(values) for name, values in known.items() if values})

    def _log_batch(self, output: dict[str, Any]) -> None:
        """Log the batch of all processes; α, the ratios and the divergences over the mixture's tokens alone."""
        mask = loss_mask(output).bool()
        tokens = sum(len(rollout.completion_ids) for rollout in self.rollouts)
        work = torch.tensor([tokens, self.vllm_generation.seconds], device=mask.device)
        self._append_metrics(metrics.of_speed(*self.accelerator.gather(work).view(-1, 2).unbind(1)))
        self._log_difference(output, mask)
        for name in metrics.DENSE_MEANS:
            if (column := columns.dense_scalar(name)) in output:
                self._append_metrics(metrics.of_dense(name, self._gathered(output[column], mask)))
        if not self.model.training:
            return
        mixed = mask & output[columns.MIXTURE_ROWS][:, None]
        alpha, log_q, log_theta, log_teacher = (self._gathered(output[name], mixed) for name in RECORDS)
        recorded = [name for name in SCALARS if columns.dense_scalar(name) in output]
        exact = {name: self._gathered(output[columns.dense_scalar(name)], mixed) for name in recorded}
        if len(alpha):  # there are none where the schedule has arrived at the student, or `theta_fraction` is 1
            self._append_metrics(metrics.of_mixture(alpha, log_q, log_theta, log_teacher, exact))
            self._append_metrics(metrics.of_drafts(log_q, log_theta, exact))
            self._set_entropy_scale(alpha)
            self.histograms = metrics.histograms_of_mixture(alpha, log_q, log_theta)

    def _log_difference(self, output: dict[str, Any], mask: Tensor) -> None:
        """Log the distance between the engine's log θ and the trainer's, where TRL computed the latter."""
        if (of_tokens := output.get("old_per_token_logps")) is not None:  # GRPO's (B, T)
            differences = self._gathered(metrics.token_differences(of_tokens, output[columns.LOG_THETA]), mask)
        elif (of_completions := output.get("old_logps")) is not None:  # RLOO's (B,)
            per_token = metrics.completion_differences(of_completions, output[columns.LOG_THETA], mask)
            differences = self._gathered(per_token[:, None], mask.any(1, keepdim=True))
        else:
            return
        self._append_metrics(metrics.of_differences(differences))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as TRL does, and then send the histograms of the last batch to the loggers that have them."""
        super().log(logs, start_time)
        send_histograms(self, self.histograms)
        self.histograms = {}

    def _gathered(self, values: Tensor, mask: Tensor) -> Tensor:
        """Return the values (B, T) of all processes where `mask` holds, in one dimension."""
        marked = values.float().masked_fill(~mask, torch.nan)
        every = self.accelerator.gather(self.accelerator.pad_across_processes(marked, dim=1, pad_index=torch.nan))
        return every[~every.isnan()]

    def _entropy_scale(self) -> float | None:
        """Return the scale of the entropy gate for the next batch; a resumed run starts with the last logged one."""
        if self.generator.entropy_quantile is None:
            return None
        if self._scale is None:
            logged = [
                entry[metrics.ENTROPY_SCALE] for entry in self.state.log_history if metrics.ENTROPY_SCALE in entry
            ]
            self._scale = logged[-1] if logged else self.generator.mixture.entropy_scale
        return self._scale

    def _set_entropy_scale(self, alpha: Tensor) -> None:
        """Log the scale that a batch was sampled with, and set the next one from its α (N,)."""
        quantile, scale = self.generator.entropy_quantile, self._entropy_scale()
        if quantile is not None and scale is not None:
            self._append_metrics({metrics.ENTROPY_SCALE: scale})
            self._scale = next_scale(alpha, scale, quantile, self.generator.mixture.entropy_scale)
