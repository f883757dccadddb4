"""The arms of informed.py, what their teachers are told, and what the students' answers are searched for."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from statistics import mean
from typing import Any, NamedTuple

from datasets import Dataset

from exam import ExamWatch
from optimal_sampling_trl import Mixture, Rollout
from real_arms import ALONE, FILTER, MIXED, TEACHER, Arm
from real_exam import EngineExam
from real_models import texts_of
from real_tasks import Task
from runs import Line

TOLD = "A solution, for reference:"
REFERS = re.compile(r"\b(solution|reference|referred|given|told|hint|above|provided)\b", re.IGNORECASE)
"""Words of an answer that speak of the solution. No solved example has one."""


class ToldTask(Task):
    """A task whose teacher reads the solved example of its question, too."""

    def teacher_prompt(self, entry: dict[str, Any]) -> list[dict[str, str]]:
        """One user's turn: the student's, and the solution."""
        (turn,) = self.prompt(entry)
        return [{"role": "user", "content": f"{turn['content']}\n{TOLD}\n{self.solve(entry)}"}]

    def dataset(self, split: str, count: int, seed: int) -> Dataset:
        """Prompts as TRL's trainers take them, with a column of the teacher's."""
        rows = super().dataset(split, count, seed)
        told = [self.teacher_prompt(json.loads(entry)) for entry in rows["entry"]]
        return rows.add_column("teacher_prompt", told)


class ReadingTask(ToldTask):
    """A task that is asked with its solution: what a student learns to read before it teaches itself."""

    def prompt(self, entry: dict[str, Any]) -> list[dict[str, str]]:
        """One user's turn, the teacher's."""
        return ToldTask(*self).teacher_prompt(entry)


class Teaching(NamedTuple):
    """An arm, and its teacher: the student as it is ("self") or was ("start"), or a model of its own ("separate")."""

    arm: Arm
    teacher: str = "self"


OPSD = {"loss": "dense"}
STUDY = {
    "RAFT, informed mixture": Teaching(Arm("RAFT", 1e-4, FILTER, MIXED)),
    "GRPO": Teaching(Arm("GRPO", 3e-5, {"positive_only": "none"}, ALONE)),
    "GRPO, half informed mixture": Teaching(Arm("GRPO", 3e-5)),
    "Self-distillation": Teaching(Arm("Distillation", 1e-4, OPSD, ALONE)),
    "RAFT, own": Teaching(Arm("RAFT", 1e-4, FILTER, ALONE)),
    "RAFT, informed rollouts": Teaching(Arm("RAFT", 1e-4, FILTER, TEACHER)),
    "Self-distillation, teacher as at the start": Teaching(Arm("Distillation", 1e-4, OPSD, ALONE), "start"),
    "RAFT, informed mixture, teacher as at the start": Teaching(Arm("RAFT", 1e-4, FILTER, MIXED), "start"),
    "RAFT, separate teacher's mixture": Teaching(Arm("RAFT", 1e-4, FILTER, MIXED), "separate"),
    "GRPO, half informed mixture, teacher as at the start": Teaching(Arm("GRPO", 3e-5), "start"),
    "GRPO, half mixture of a separate teacher": Teaching(Arm("GRPO", 3e-5), "separate"),
    "GRPO, informed mixture where needed": Teaching(Arm("GRPO", 3e-5, {}, {"mixture_below": 1.0})),
}
"""The most important first."""


def refers(rollouts: Sequence[Rollout]) -> int:
    """The number of completions that speak of the solution."""
    return sum(REFERS.search(rollout.text) is not None for rollout in rollouts)


class ToldExam(EngineExam):
    """The exam of a student whose teacher is told the solution; the student is not.

    Args:
        task: a `ToldTask`.
        count: held-out questions.
    """

    def _prompts(self, entries: list[dict[str, Any]]) -> list[tuple[list[int], list[int]]]:
        tokenizer = self.trainer.processing_class
        both = [texts_of(task, tokenizer, entries) for task in (ReadingTask(*self.task), self.task)]
        of_teacher, of_student = (tokenizer(texts, add_special_tokens=False).input_ids for texts in both)
        return list(zip(of_teacher, of_student, strict=True))


class LeakWatch(ExamWatch):
    """Counts the completions of the training that speak of the solution, as well."""

    def __init__(self, *positional: Any) -> None:
        super().__init__(*positional)
        self.completions, self.referring = 0, 0

    def _sampled(self) -> int:
        self.completions += len(self.trainer.rollouts)
        self.referring += refers(self.trainer.rollouts)
        return super()._sampled()

    def ends(self) -> dict[str, float]:
        """The share of the student's answers to held-out questions that speak of the solution, and of all these."""
        answers = self.exam._sample(Mixture.theta_only(), self.exam.entries)
        found = refers(answers) / len(answers)
        return {"refers": found, "refers_in_training": self.referring / max(self.completions, 1)}


def leaks(lines: list[Line]) -> Iterator[str]:
    """A row for each arm: the share of answers that speak of the solution, at the end and in all of the training."""
    yield "| arm | answers that speak of a solution | of the completions of the training |"
    yield "|---|---|---|"
    for arm in dict.fromkeys(line["arm"] for line in lines):
        seeds = [line for line in lines if line["arm"] == arm]
        both = (mean(line[name] for line in seeds) for name in ("refers", "refers_in_training"))
        yield f"| {arm} | " + " | ".join(f"{share:.3f}" for share in both) + " |"
