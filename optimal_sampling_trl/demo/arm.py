"""One training run on a tiny pair, watched: what the demo and the studies share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, ProgressCallback, TrainerCallback

from .pair import COMPLETION_LENGTH, PairFolders, dataset, measure, reward

GROUP = 8
HELD_OUT = 1024
"""Prompts of each measurement: a standard error of 0.004 at 2 % and of 0.016 at 50 %."""


class StudentTask(NamedTuple):
    """A student's task: tokens of a completion (EOS included), prompts, reward, and how it is measured."""

    length: int
    dataset: Callable[..., Any]
    reward: Callable[..., Any]
    measure: Callable[[Any, Any], float]


EMBEDDED = StudentTask(
    COMPLETION_LENGTH, dataset, reward, lambda model, tokenizer: measure(model, tokenizer, HELD_OUT)
)


class Bar(ProgressCallback):
    """The trainer's progress bar with the reward beside it, instead of a line for each log.

    Args:
        name: what stands before the bar.
        line: of the terminal, where several runs go side by side.
    """

    def __init__(self, name: str = "", line: int = 0) -> None:
        super().__init__()
        self.name, self.line = name, line
        self.training_bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.training_bar = tqdm(total=state.max_steps, desc=self.name, position=self.line, unit="step")
        self.current_step = 0

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        shown = {"reward": "reward", "alpha/mean": "α"}
        self.training_bar.set_postfix({word: f"{logs[name]:.2f}" for name, word in shown.items() if name in logs})


class Watch(TrainerCallback):
    """Exact match of the student's own samples over training, and the rollouts of a few steps for the page."""

    def __init__(self, task: StudentTask, tokenizer: Any, batch: int, every: int) -> None:
        self.task, self.tokenizer, self.batch, self.every = task, tokenizer, batch, every
        self.trainer: Any = None
        self.seconds = 0.0
        self.curve: list[tuple[float, float]] = []
        self.rollouts: list[Any] = []
        self.steps: list[int] = []
        self.advantages: list[float] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._look(state, kwargs["model"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.every == 0:
            self._look(state, kwargs["model"])

    def _look(self, state: Any, model: Any) -> None:
        training = model.training
        model.eval()  # gradient checkpointing, which TRL switches on, breaks `generate` in training mode
        with torch.random.fork_rng():  # a measurement changes nothing about the training
            self.curve.append((state.global_step * self.batch, self.task.measure(model, self.tokenizer)))
        model.train(training)
        taken = getattr(self.trainer, "rollouts", [])
        self.rollouts += taken
        self.steps += [state.global_step] * len(taken)
        self.advantages += getattr(self.trainer, "advantages", [])


def train(
    trainer_class: Any,
    config_class: Any,
    pair: PairFolders,
    steps: int,
    batch: int,
    settings: dict[str, Any],
    task: StudentTask = EMBEDDED,
    bar: Bar | None = None,
    **extra: Any,
) -> tuple[Any, Watch]:
    """Train the student of `pair` from its start; return the trainer and what was watched.

    Args:
        trainer_class: a trainer of TRL's or of this package.
        config_class: its configuration.
        pair: the teacher and the student.
        steps: optimizer steps.
        batch: completions in a step.
        settings: further fields of the configuration.
        task: what is learned, and how it is measured.
        bar: shows the progress; by default a bar without a name.
        extra: further arguments of the trainer.
    """
    tokenizer = AutoTokenizer.from_pretrained(pair.student)
    watch = Watch(task, tokenizer, batch, every=max(steps // 10, 1))
    grouped = "GRPO" in trainer_class.__name__ or "RLOO" in trainer_class.__name__
    settings = {"temperature": 1.0} | ({"num_generations": GROUP} if grouped else {}) | settings
    rewards = {} if "Distillation" in trainer_class.__name__ else {"reward_funcs": task.reward}
    trainer = trainer_class(
        model=AutoModelForCausalLM.from_pretrained(pair.student, dtype=torch.float32),
        train_dataset=task.dataset("train", steps * batch // settings.get("num_generations", 1), seed=1),
        processing_class=tokenizer,
        callbacks=[watch],
        args=_configuration(config_class, steps, batch, task.length, settings),
        **rewards,
        **extra,
    )
    for printer in (ProgressCallback, PrinterCallback):  # each prints a line for each log
        trainer.remove_callback(printer)
    if not trainer.args.disable_tqdm:
        trainer.add_callback(Bar() if bar is None else bar)
    watch.trainer = trainer
    trainer.train()
    watch.seconds = trainer.state.log_history[-1]["train_runtime"]
    return trainer, watch


def _configuration(config_class: Any, steps: int, batch: int, length: int, settings: dict[str, Any]) -> Any:
    """Make the configuration of a short run on a CPU that saves and reports nothing."""
    return config_class(
        max_steps=steps,
        per_device_train_batch_size=batch,
        max_completion_length=length,
        logging_steps=max(steps // 20, 1),
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        log_level="error",
        **settings,
    )
