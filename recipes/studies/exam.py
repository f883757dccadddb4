"""Measure a chat model while it trains: right answers to held-out questions, and its divergence from the teacher."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import TrainerCallback

from questions import is_right, questions

LENGTH, TEMPERATURE = 32, 0.7


def texts_of(tokenizer: Any, rows: Any) -> dict[str, torch.Tensor]:
    """The chats of questions, ready for an answer: ids and mask, padded on the left."""
    chats = [tokenizer.apply_chat_template(p, tokenize=False, add_generation_prompt=True) for p in rows["prompt"]]
    return dict(tokenizer(chats, return_tensors="pt", padding=True, add_special_tokens=False))


@torch.no_grad()
def answers(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """A sampled answer of each question, (N, LENGTH) at most."""
    options = {"do_sample": True, "top_k": 0, "temperature": TEMPERATURE, "max_new_tokens": LENGTH}
    ids: torch.Tensor = model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]
    return ids


@torch.no_grad()
def log_probabilities(model: Any, inputs: dict[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    """Return log-probabilities (N, T, V) of all tokens along the answers `ids` (N, T), at the sampling temperature."""
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(ids)], dim=1)
    logits = model(
        input_ids=torch.cat([inputs["input_ids"], ids], dim=1), attention_mask=mask,
        logits_to_keep=ids.shape[1] + 1, use_cache=False,
    ).logits[:, :-1]  # fmt: skip
    return torch.log_softmax(logits.float() / TEMPERATURE, dim=-1)


class Exam:
    """Held-out questions with answers of the teacher, and how a model does on them."""

    def __init__(self, teacher: Any, tokenizer: Any, count: int) -> None:
        self.teacher, self.tokenizer, self.rows = teacher, tokenizer, questions("test", count, seed=0)
        self.inputs = {name: x.to(teacher.device) for name, x in texts_of(tokenizer, self.rows).items()}
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.ids = answers(teacher, self.inputs)
        ended = (self.ids == tokenizer.eos_token_id).cumsum(1) - (self.ids == tokenizer.eos_token_id).long()
        self.mask = ended == 0

    def right(self, ids: torch.Tensor) -> float:
        """The share of right answers."""
        texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return sum(map(is_right, texts, self.rows["answer"])) / len(texts)

    @torch.no_grad()
    def take(self, model: Any) -> tuple[float, float]:
        """The share of the model's own answers that are right, and KL(t‖θ) in nats a token."""
        total = 0.0
        for first in range(0, len(self.ids), 32):
            part = slice(first, first + 32)
            inputs = {name: x[part] for name, x in self.inputs.items()}
            log_teacher, log_theta = (log_probabilities(m, inputs, self.ids[part]) for m in (self.teacher, model))
            divergence = torch.nn.functional.kl_div(log_theta, log_teacher, log_target=True, reduction="none").sum(-1)
            total += float((divergence * self.mask[part]).sum())
        with torch.random.fork_rng():
            torch.manual_seed(0)
            ids = answers(model, self.inputs)
        return self.right(ids), total / float(self.mask.sum())


class ExamWatch(TrainerCallback):
    """Takes the exam over training: points (completions, tokens, seconds without exams, right, divergence).

    Args:
        note: takes the points so far, after each; a run that is broken off has told its curve.
    """

    def __init__(
        self,
        exam: Exam,
        batch: int,
        every: int,
        deadline: float,
        note: Callable[[list[tuple[float, ...]]], None] = lambda points: None,
    ) -> None:
        self.exam, self.batch, self.every, self.deadline, self.note = exam, batch, every, deadline, note
        self.trainer: Any = None
        self.points: list[tuple[float, ...]] = []
        self.tokens, self.examined, self.start = 0, 0.0, 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.start = time.perf_counter()
        self._look(state, kwargs["model"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.tokens += self._sampled()
        over = time.time() > self.deadline
        control.should_training_stop |= over
        if state.global_step % self.every == 0 or over:
            self._look(state, kwargs["model"])

    def ends(self) -> dict[str, float]:
        """Further numbers of the whole training; none here."""
        return {}

    def _sampled(self) -> int:
        """Tokens of the last batch; TRL's own trainers have no rollouts, but the mean length of a completion."""
        if hasattr(self.trainer, "rollouts"):
            return sum(len(rollout.completion_ids) for rollout in self.trainer.rollouts)
        return round(self.trainer._metrics["train"]["completions/mean_length"][-1] * self.batch)

    def _look(self, state: Any, model: Any) -> None:
        start, training = time.perf_counter(), model.training
        model.eval()
        found = self.exam.take(model)
        model.train(training)
        self.points.append((state.global_step * self.batch, self.tokens, start - self.start - self.examined, *found))
        self.note(self.points)
        self.examined += time.perf_counter() - start
