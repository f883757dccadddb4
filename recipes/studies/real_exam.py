"""Measure a student of real_text.py on held-out questions, sampled by the engine that it is trained with."""

from __future__ import annotations

from collections.abc import Sequence
from math import nan
from statistics import mean
from typing import Any

from optimal_sampling_trl import Mixture, Rollout, Sampling
from optimal_sampling_trl.rollouts.request import Request
from real_models import examine, texts_of
from real_tasks import Task

TRIES = 8


class EngineExam:
    """The questions of `exam.ExamWatch` over training, and more at its end; `trainer` is set once it is built.

    Args:
        count: held-out questions; the measurements of several tries take a quarter of them.
    """

    def __init__(self, task: Task, count: int) -> None:
        self.task, self.entries = task, task.entries("test", count)
        self.trainer: Any = None

    def take(self, model: Any) -> tuple[float, float]:
        """The share of the student's own answers that are right, and KL(θ‖t) in nats a token, estimated on them."""
        rollouts = self._sample(Mixture.theta_only(), self.entries)
        return self._right(rollouts, self.entries), distance(rollouts)

    def take_all(self) -> dict[str, float]:
        """Measure the student: how often it is right, in any of eight tries and greedily, its entropy, KL(θ‖t)."""
        rollouts = self._sample(Mixture.theta_only(), self.entries)
        return {
            **self._tries(Mixture.theta_only()),
            "right": self._right(rollouts, self.entries),
            "entropy": -mean_of(rollouts, "log_theta"),  # E[-log θ] of its own tokens
            "divergence": distance(rollouts),
            "tokens": mean(len(rollout.completion_ids) for rollout in rollouts),
            "ended": mean(rollout.finish_reason == "stop" for rollout in rollouts),
        }

    def of_teacher(self) -> dict[str, float]:
        """Measure how often the teacher is right, in any of eight tries and greedily; and the mixture."""
        teacher, mixture = (self._sample(m, self.entries) for m in (Mixture.teacher_only(), Mixture()))
        return {
            **self._tries(Mixture.teacher_only()),
            "right": self._right(teacher, self.entries),
            "mixture": self._right(mixture, self.entries),
        }

    def _tries(self, mixture: Mixture) -> dict[str, float]:
        few = self.entries[: max(len(self.entries) // 4, 1)]
        rows = [entry for entry in few for _ in range(TRIES)]
        scores = self._scores(self._sample(mixture, rows), rows)
        groups = [scores[first : first + TRIES] for first in range(0, len(scores), TRIES)]
        greedy = self._sample(mixture, self.entries, temperature=0.0)
        return {"any_right": mean(map(max, groups)), "greedy": self._right(greedy, self.entries)}

    def _sample(
        self, mixture: Mixture, entries: Sequence[dict[str, Any]], temperature: float = 1.0
    ) -> Sequence[Rollout]:
        """An answer to each question, with the trainer's weights of this moment."""
        generation = self.trainer.vllm_generation
        sampling = Sampling(max_tokens=self.task.length, temperature=temperature)
        requests = [Request(*prompts, mixture, sampling) for prompts in self._prompts(list(entries))]
        generation.sync_weights()
        owner = generation if hasattr(generation, "backend") else generation.llm  # transformers, or vLLM
        return owner.backend.generate(requests)

    def _prompts(self, entries: list[dict[str, Any]]) -> list[tuple[list[int], list[int]]]:
        """The tokens of each question as the teacher and as the student read it."""
        tokenizer = self.trainer.processing_class
        every = tokenizer(texts_of(self.task, tokenizer, entries), add_special_tokens=False).input_ids
        return [(ids, ids) for ids in every]

    def _scores(self, rollouts: Sequence[Rollout], entries: Sequence[dict[str, Any]]) -> list[float]:
        tokenizer = self.trainer.processing_class
        texts = tokenizer.batch_decode([rollout.completion_ids for rollout in rollouts], skip_special_tokens=True)
        return [self.task.score(text, entry) for text, entry in zip(texts, entries, strict=True)]

    def _right(self, rollouts: Sequence[Rollout], entries: Sequence[dict[str, Any]]) -> float:
        return mean(self._scores(rollouts, entries))


class SampledExam(EngineExam):
    """The same for TRL's own trainers, which keep no records: right answers alone, sampled by transformers."""

    def take(self, model: Any) -> tuple[float, float]:
        return examine(model, self.trainer.processing_class, self.task, self.entries), nan

    def take_all(self) -> dict[str, float]:
        unknown = dict.fromkeys(("any_right", "greedy", "entropy", "divergence", "tokens", "ended"), nan)
        return unknown | {"right": self.take(self.trainer.model)[0]}

    def of_teacher(self) -> dict[str, float]:
        return {}


def mean_of(rollouts: Sequence[Rollout], field: str) -> float:
    """The mean of a record over all tokens."""
    return float(sum(getattr(rollout, field).sum() for rollout in rollouts)) / sum(
        len(rollout.completion_ids) for rollout in rollouts
    )


def distance(rollouts: Sequence[Rollout]) -> float:
    """KL(θ‖t) in nats a token, estimated on the student's own tokens."""
    return mean_of(rollouts, "log_theta") - mean_of(rollouts, "log_teacher")
