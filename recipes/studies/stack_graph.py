"""The rollouts of a stack as one launch: on a GPU all steps of a completion are recorded once and then replayed."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from optimal_sampling_trl.mixture import MixtureRows
from stack import Batch, Given, Stack, sample_alone, sample_mixed

SWITCH = "STACK_GRAPHS"
TOLERANCE = 1e-2
"""Nats by which a replayed record may differ from the student's own pass over the same tokens."""


class Rollouts:
    """`stack.sample` for one stack, again and again: the same shapes, the same mixtures, other numbers.

    On a GPU tiny models spend their time on launches; one CUDA graph holds those of a whole rollout. A batch is valid
    until the next one. Elsewhere, where recording fails, and with `STACK_GRAPHS=0`, the steps are launched one by one.

    Args:
        mixes: whether any completion may come from the mixture; otherwise the student draws alone.
    """

    def __init__(self, student: Stack, teacher: Stack | None, length: int, eos: int, mixes: bool) -> None:
        self.student, self.teacher, self.length, self.eos = student, teacher, length, eos
        self.mixes = mixes and teacher is not None
        self.record = student.device.type == "cuda" and os.environ.get(SWITCH) != "0"
        self.graph: torch.cuda.CUDAGraph | None = None
        self.inputs: list[Tensor] = []
        self.batch: Batch | None = None

    def __call__(self, prompts: Tensor, rows: MixtureRows, until: Tensor, given: Given | None = None) -> Batch:
        """A completion of each prompt; the arguments are those of `stack.sample`."""
        columns = {name: value for name, value in rows._asdict().items() if isinstance(value, Tensor)}
        tensors = [prompts, until, *columns.values(), *(given or ())]

        def work(prompts: Tensor, until: Tensor, *others: Tensor) -> Batch:
            there = Given(*others[len(columns) :]) if given is not None else None
            if not self.mixes or not (self.record or bool((until > 0).any())):  # a graph holds one way alone
                return sample_alone(self.student, self.teacher, prompts, self.length, self.eos, there)
            mixture, teacher = rows._replace(**dict(zip(columns, others))), self.teacher
            assert teacher is not None
            return sample_mixed(self.student, teacher, prompts, mixture, until, self.length, self.eos, there)

        if not self.record:
            return work(*tensors)
        if self.graph is None:
            self._capture(work, tensors)
        if self.graph is None or self.batch is None:
            return work(*tensors)
        for place, tensor in zip(self.inputs, tensors, strict=True):
            place.copy_(tensor)
        self.graph.replay()
        return self.batch

    @torch.no_grad()
    def _capture(self, work: Callable[..., Batch], tensors: list[Tensor]) -> None:
        """Record `work`; where that fails, say so and let it be."""
        self.inputs = [tensor.clone() for tensor in tensors]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            work(*self.inputs)  # libraries set themselves up
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self.batch = work(*self.inputs)
            graph.replay()
            self._check(self.batch)
        except RuntimeError as error:
            warnings.warn(f"The rollouts could not be recorded and are launched step by step: {error}", stacklevel=2)
            self.record, self.batch = False, None
            return
        self.graph = graph

    def _check(self, batch: Batch) -> None:
        """Refuse records that are not the student's: log θ of each drawn token, from a pass over the sequences."""
        logits = self.student.logits(torch.cat([batch.prompts, batch.ids], dim=-1), keep=self.length + 1)[:, :, :-1]
        wanted = logits.log_softmax(-1).gather(-1, batch.ids[..., None])[..., 0]
        difference = float(((wanted - batch.log_theta) * batch.mask).abs().max())
        if not difference <= TOLERANCE:
            raise RuntimeError(
                f"a replayed log θ is {difference:.3f} nats from the student's; wanted {TOLERANCE} at most"
            )
