"""One stack of runs from its start to its end: what horizon.py and past_the_teacher.py run many of."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from digit_tasks import END, Task
from stack import Stack
from stack_graph import Rollouts
from stack_losses import Adam, gradients, loss
from stack_measure import End, measure_end, success
from stacks import Run, Setting, key_of
from stage import BATCH, Arm, Stage

WARMUP, HELD_OUT, VALIDATION = 10, 512, 256
WRONG = 0.05
"""The rate at which a noisy verifier says the contrary."""


class Prompts:
    """The sequences with answers that each row of each step reads; runs of one seed read the same.

    Args:
        count: how many there are; 0 is one for each completion of the training.
        batch: completions of a run in a step.
    """

    def __init__(self, task: Task, runs: list[Run], steps: int, count: int, batch: int = BATCH) -> None:
        seeds = sorted({run.seed for run in runs})
        self.batch = batch
        self.every = torch.stack([task.sequences("train", count or batch * steps, seed) for seed in seeds])
        self.which = torch.tensor([seeds.index(run.seed) for run in runs])[:, None]

    def at(self, step: int, groups: Tensor) -> Tensor:
        """The sequences (S, B, P + T) of a step, each prompt as often as its run's group (S,) is large."""
        different = self.batch // groups[:, None]
        place = step * different + torch.arange(self.batch) // groups[:, None]  # (S, B)
        return self.every[self.which, place % self.every.shape[1]]


def verify(verifier: str, right: Tensor) -> Tensor:
    """The rewards (S, B) of completions whose tokens are `right` (S, B, T)."""
    exact = right.all(-1).float()
    if verifier == "exact":
        return exact
    if verifier == "graded":
        return right.cumprod(-1).double().mean(-1).float()  # in float32 a GPU's mean of 41 ones is below 1
    if verifier == "noisy":
        return torch.where(torch.rand_like(exact) < WRONG, 1 - exact, exact)
    raise ValueError(f"The verifier is {verifier!r}; wanted 'exact', 'graded' or 'noisy'.")


class Curve:
    """Points (tokens, success) of each run over training, and the seconds up to each without the measurements.

    On a CPU they are the processor's for this process: others use it, too.
    """

    def __init__(self, runs: int, device: str) -> None:
        self.tokens, self.points = torch.zeros(runs, device=device), []
        self.clock: list[float] = []
        self.now = time.process_time if device == "cpu" else time.perf_counter
        self.start, self.looked = self.now(), 0.0

    def look(self, student: Stack, task: Task, held_out: Tensor, stage: Stage, validation: Tensor) -> None:
        """Take a point; the runs of two phases see the validation."""
        count, now = self.tokens.cpu(), self.now()  # the copy waits for the device
        self.clock.append(now - self.start - self.looked)
        self.points.append(torch.stack([count, success(student, task, held_out).cpu()], dim=1))  # (S, 2)
        if any(arm.then for arm in stage.arms):
            stage.validate(success(student, task, validation).cpu())
        self.looked += self.now() - now


def update(
    student: Stack, adam: Adam, rollouts: Rollouts, stage: Stage, sequences: Tensor, setting: Setting, progress: float
) -> Tensor:
    """Sample, learn, note what was right; how many tokens each run learnt from (S,)."""
    task = Task.of(setting.task)
    length = task.completion_length
    rows, until = stage.mixtures(progress)
    given = stage.given(sequences[..., -length:], progress)
    batch = rollouts(sequences[..., :-length].contiguous(), rows, until.view(-1), given)
    right = task.right_tokens(sequences, batch.ids)
    rewards = verify(setting.verifier, right)
    mixed = torch.arange(length, device=until.device) < until[..., None]
    sizes, weights = stage.sizes().to(until.device), stage.weights(rewards)
    losses = loss(student, batch, rewards, mixed, stage.losses(progress), sizes, weights=weights)
    adam.step(gradients(student, losses), min((adam.steps + 1) / WARMUP, 1))
    stage.note(right.all(-1).float(), (until == 0).float())
    stage.note_alpha(batch.alpha, mixed & (batch.mask > 0))
    return batch.mask.sum((1, 2))


def train(
    setting: Setting,
    runs: list[Run],
    arms: Mapping[str, Arm],
    steps: int,
    ladder: str,
    device: str,
    deadline: float,
    ending: int = 0,
) -> list[Any]:
    """A stack of runs from their start to their end, or to the deadline: their lines of runs.jsonl.

    `curve` holds points (tokens, exact match), `clock` the seconds of training up to each, of the whole stack. Where
    `ending` is not 0 each line has the fields of `stack_measure.End`, on so many held-out prompts, and the teacher's
    under "of_teacher".
    """
    task, folder = Task.of(setting.task), Path(ladder) / setting.task
    torch.manual_seed(0)
    teacher = Stack.load(folder / setting.teacher, 1, device)
    student = Stack.load(folder / setting.student, len(runs), device)
    for weight in student.weights.values():
        weight.requires_grad_()
    adam = Adam(student.weights, torch.tensor([run.learning_rate for run in runs], device=device))
    stage = Stage([arms[run.arm] for run in runs], task.completion_length, device, setting.batch)
    prompts = Prompts(task, runs, steps, setting.prompts, setting.batch)
    read = teacher if stage.reads_teacher else None
    rollouts = Rollouts(student, read, task.completion_length, END, stage.mixes)
    held_out, validation = (
        task.sequences("test", count, seed).to(device) for seed, count in enumerate((HELD_OUT, VALIDATION))
    )
    curve = Curve(len(runs), device)
    for step in range(steps + 1):
        if step % max(steps // 15, 1) == 0 or step == steps:
            curve.look(student, task, held_out, stage, validation)
        if step == steps or time.time() > deadline:
            break
        sequences = prompts.at(step, stage.groups).to(device)
        curve.tokens += update(student, adam, rollouts, stage, sequences, setting, step / steps)
    seconds = curve.now() - curve.start
    shared = {
        "clock": curve.clock,
        "stopped": adam.steps < steps,
        "stack": len(runs),
        "batch": setting.batch,
        "seconds": seconds,
    }
    ends: list[dict[str, float]] = [{}] * len(runs)
    if ending and not shared["stopped"]:
        part = held_out[:ending]
        shared["of_teacher"] = rows_of(measure_end(teacher, teacher, task, part))[0]
        ends = rows_of(measure_end(student, teacher, task, part))
    points = torch.stack(curve.points, dim=1).tolist()
    return [
        key_of(setting, steps, run) | {"curve": line} | end | shared
        for run, line, end in zip(runs, points, ends, strict=True)
    ]


def rows_of(end: End) -> list[dict[str, float]]:
    """Return what was measured of each student, by name."""
    columns = zip(*(values.tolist() for values in end))
    return [dict(zip(End._fields, (round(value, 4) for value in row))) for row in columns]
