"""The dense term: the divergence of the student from the teacher beside the loss of a reward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import metrics
from ..divergences import DIVERGENCES, union_divergence
from ..rollouts.dense import Dense
from . import columns
from .dense_config import coefficient_at
from .dense_head import DenseHead, dense_head
from .mixture_trainer import MixtureTrainer
from .records import loss_mask


class DenseTermTrainer(MixtureTrainer):
    """Base of the trainers with rewards: TRL's loss, or ours, plus the dense term.

    The term is a mean over all tokens of an optimizer's step, of the student's completions and the mixture's alike:
    at each position both models' distributions are compared, whoever drew the token. A subclass may weigh the tokens
    by the column `DENSE_WEIGHTS` of the batch.
    """

    def _dense_of_loss(self) -> Dense | None:
        """Return what the term reads; nothing once it has faded."""
        return super()._dense_of_loss() if self._dense_coefficient() else None

    def _dense_coefficient(self) -> float:
        return coefficient_at(self.args, self._progress())

    def _weigh(self, output: dict[str, Any]) -> None:
        """Put the number of tokens of all processes into the batch, where the dense term divides by it."""
        super()._weigh(output)
        if columns.DENSE_IDS in output:
            output[columns.DENSE_TOKENS] = self.accelerator.reduce(loss_mask(output).sum())

    def compute_loss(self, model: Any, inputs: dict[str, Any], *positional: Any, **keywords: Any) -> Any:
        """Compute the loss of the reward, plus the dense term where the batch has its records."""
        coefficient = self._dense_coefficient()
        if not coefficient or columns.DENSE_IDS not in inputs:
            return super().compute_loss(model, inputs, *positional, **keywords)
        with dense_head(inputs[columns.DENSE_IDS], inputs["completion_mask"].bool()) as head:
            loss = super().compute_loss(model, inputs, *positional, **keywords)
        divergences = divergences_of(head, inputs, DIVERGENCES[self.args.dense_divergence])
        total, tokens = self.accelerator.reduce(torch.stack([divergences.detach().sum(), loss_mask(inputs).sum()]))
        self._append_sum(metrics.DENSE_DIVERGENCE, float(total), float(tokens))
        self._append_metrics({metrics.DENSE_COEFFICIENT: coefficient})
        if columns.DENSE_WEIGHTS in inputs:
            divergences = divergences * inputs[columns.DENSE_WEIGHTS][loss_mask(inputs).bool()]
        return loss + coefficient * divergences.sum() / self._dense_share(inputs)

    def _dense_share(self, inputs: dict[str, Any]) -> Tensor:
        """Return the divisor of the term: this process's share of the tokens in one step of the optimizer.

        Where transformers divides the loss of each micro-batch by their number, as it does RLOO's, the share is that
        of a micro-batch.
        """
        share = inputs[columns.DENSE_TOKENS].clamp(min=1) / self.accelerator.num_processes
        if not self.model.training:
            return share
        scaled = self.current_gradient_accumulation_steps if self.loss_is_scaled_for_ga else 1
        return share * scaled / self.args.steps_per_generation


def divergences_of(head: DenseHead, inputs: dict[str, Any], beta: float) -> Tensor:
    """Divergence (N,) at each of a batch's N tokens in the loss, with the student's gradient.

    Args:
        head: has stood in TRL's output layer, at all tokens of the completions, while the student read the batch.
        inputs: the batch, with its dense records.
        beta: of the divergence; see `divergences`.

    Raises:
        RuntimeError: where the student did not pass through the output layer.
    """
    if head.log_theta is None:
        raise RuntimeError(
            "The student's forward pass did not use TRL's fused output layer, where log θ of the dense records' "
            "tokens is read. Does a subclass compute log-probabilities by itself? Leave `dense_coefficient` at 0."
        )
    mask = loss_mask(inputs).bool()
    log_theta = head.log_theta[mask[inputs["completion_mask"].bool()]]
    return union_divergence(log_theta, inputs[columns.DENSE_LOG_TEACHER][mask], inputs[columns.DENSE_IDS][mask], beta)
