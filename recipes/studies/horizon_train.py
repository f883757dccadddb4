"""One stack of runs from its start to its end: what horizon.py runs many of."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

from horizon_arms import ARMS, GROUP, Setting
from ladder import Task
from optimal_sampling_trl.mixture import MixtureRows
from pair import EOS, VOCABULARY
from stack import Adam, Losses, Stack, gradients, loss, right, sample

BATCH, WARMUP = 64, 10
HELD_OUT = 512
SMOOTHING = 0.9


class Run(NamedTuple):
    """One student of a stack."""

    arm: str
    learning_rate: float
    seed: int


def key_of(setting: Setting, steps: int, run: Run) -> dict[str, Any]:
    """What tells a run from all others."""
    return {
        "task": setting.task,
        "teacher": setting.teacher,
        "student": setting.student,
        "steps": steps,
    } | run._asdict()


class Stage:
    """What a stack of runs samples from at each step, by the state that each run is in."""

    def __init__(self, runs: list[Run], length: int, device: str) -> None:
        self.arms = [ARMS[run.arm] for run in runs]
        self.length, self.device = length, device
        self.success = torch.zeros(len(runs))  # of the student's own completions, smoothed
        self.groups = torch.tensor([arm.group for arm in self.arms])
        self.rows = MixtureRows.of([arm.mixture for arm in self.arms for _ in range(BATCH)], device)
        names = Losses._fields
        table = torch.tensor([[float(arm.terms.get(name, 0.0)) for name in names] for arm in self.arms], device=device)
        self.losses = Losses(*table.unbind(1))
        terms = ("sampled", "divergence")
        self.reads_teacher = any(not arm.mixture.is_theta_only or arm.terms.keys() & terms for arm in self.arms)

    def left(self, progress: float) -> torch.Tensor:
        """How much of each run's mixture is left, in [0, 1]: 1 less `Mixture.anneal`'s share."""
        shares = [
            float(success) if arm.schedule == "success" else min(progress / float(arm.schedule), 1.0)
            if arm.schedule is not None else 0.0
            for arm, success in zip(self.arms, self.success, strict=True)
        ]  # fmt: skip
        return 1 - torch.tensor(shares)

    def mixtures(self, progress: float) -> tuple[MixtureRows, torch.Tensor]:
        """The mixture of each row, and how many of its tokens come from it (S, B); 0 in the student's own rows."""
        left = self.left(progress)
        until = torch.zeros(len(self.arms), BATCH)
        for place, arm in enumerate(self.arms):
            own = 0.5 + 0.5 * float(self.success[place]) if arm.own is None else arm.own
            count = int(own * GROUP + 0.5)
            share = torch.rand(BATCH) if arm.prefix == "random" else torch.full((BATCH,), float(arm.prefix))
            until[place] = torch.ceil(share * self.length) * (torch.arange(BATCH) % GROUP >= count)
            if arm.mixture.is_theta_only or left[place] == 0:
                until[place] = 0
        shrunk = left.repeat_interleave(BATCH).to(self.rows.alpha_min)
        annealed = self.rows._replace(
            alpha_min=self.rows.alpha_min * shrunk, alpha_max=self.rows.alpha_max * shrunk,
            fixed_alpha=self.rows.fixed_alpha * shrunk, epsilon=self.rows.epsilon * shrunk,
        )  # fmt: skip
        trust = torch.tensor([arm.mixture.method == "trust_region" for arm in self.arms]).repeat_interleave(BATCH)
        trust = trust.to(self.device)  # annealed in its budget alone
        annealed = annealed._replace(alpha_max=torch.where(trust, self.rows.alpha_max, annealed.alpha_max))
        return annealed, until.to(self.device)

    def note(self, rewards: torch.Tensor, own: torch.Tensor) -> None:
        """Update the success of the student's own completions; where a run has none it stays."""
        rewards, own = rewards.cpu(), own.cpu()
        count = own.sum(1)
        new = (rewards * own).sum(1) / count.clamp(min=1)
        self.success = torch.where(count > 0, SMOOTHING * self.success + (1 - SMOOTHING) * new, self.success)


def prompt_ids(task: Task, runs: list[Run], stage: Stage, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The sequences with answers that each seed draws its prompts from, and which of them each row of a step reads."""
    seeds = sorted({run.seed for run in runs})
    every = torch.stack([task.sequences("train", BATCH * steps, seed) for seed in seeds]).view(
        len(seeds), steps, BATCH, -1
    )
    place = torch.stack([torch.arange(BATCH) // int(group) for group in stage.groups])  # (S, B)
    which = torch.tensor([seeds.index(run.seed) for run in runs])
    return every, torch.stack([which[:, None].expand_as(place), place])


def train(setting: Setting, runs: list[Run], steps: int, ladder: str, device: str, deadline: float) -> list[Any]:
    """A stack of runs from their start to their end, or to the deadline: their lines of runs.jsonl.

    `curve` holds points (tokens, exact match), `clock` the seconds of training up to each, of the whole stack.
    """
    task, folder = Task.of(setting.task), Path(ladder) / setting.task
    length, eos = task.completion_length, VOCABULARY.index(EOS)
    torch.manual_seed(0)
    teacher = Stack.load(folder / setting.teacher, 1, device)
    student = Stack.load(folder / setting.student, len(runs), device)
    for weight in student.weights.values():
        weight.requires_grad_()
    adam = Adam(student.weights, torch.tensor([run.learning_rate for run in runs], device=device))
    stage = Stage(runs, length, device)
    every, (which, place) = prompt_ids(task, runs, stage, steps)
    held_out = task.sequences("test", HELD_OUT, seed=0).to(device)
    tokens, curves, start = torch.zeros(len(runs), device=device), [], time.perf_counter()
    last, looked, clock = 0, 0.0, []
    for step in range(steps + 1):
        if step % max(steps // 10, 1) == 0 or step == steps:
            count, now = tokens.cpu(), time.perf_counter()  # the copy waits for the device
            clock.append(now - start - looked)
            curves.append(torch.stack([count, right(student, held_out, length).cpu()], dim=1))  # (S, 2)
            looked += time.perf_counter() - now
        if step == steps or time.time() > deadline:
            break
        sequences = every[which, step, place].to(device)  # (S, B, L)
        prompts, answers = sequences[..., :-length], sequences[..., -length:]
        rows, until = stage.mixtures(step / steps)
        batch = sample(student, teacher if stage.reads_teacher else None, prompts, rows, until.view(-1), length, eos)
        correct = (((batch.ids == answers) | (batch.mask == 0)).all(-1) & (batch.mask.sum(-1) == length)).float()
        mixed = torch.arange(length, device=device) < until[..., None]
        adam.step(
            gradients(student, loss(student, batch, correct, mixed, stage.losses, GROUP)), min((step + 1) / WARMUP, 1)
        )
        stage.note(correct, (until == 0).float())
        tokens += batch.mask.sum((1, 2))
        last = step + 1
    seconds = time.perf_counter() - start
    return [
        key_of(setting, steps, run)
        | {"curve": points, "clock": clock, "stopped": last < steps, "stack": len(runs), "seconds": seconds}
        for run, points in zip(runs, torch.stack(curves, dim=1).tolist(), strict=True)
    ]
