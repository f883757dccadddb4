"""The records of a batch: they stay with their rows in training and evaluation, from the student or the mixture."""

from __future__ import annotations

from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from helpers.oracle import check_rollout
from helpers.training import (
    KINDS,
    TEXTS,
    Watch,
    check_batch,
    digits,
    load,
    make_trainer,
    one_batch,
    rows_of,
)
from optimal_sampling_trl import Mixture, OptimalSamplingGenerator, Rollout
from optimal_sampling_trl.mixture.dense import measure_in_torch
from optimal_sampling_trl.rollouts.dense import DenseRecords
from optimal_sampling_trl.rollouts.rollout import RECORDS
from optimal_sampling_trl.trainers.engines.base import MixturePlan
from optimal_sampling_trl.trainers.records import stack_dense, stack_records

RL = ("grpo", "rloo")


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("grpo", {}),
        ("grpo", {"num_iterations": 2}),
        ("grpo", {"steps_per_generation": 4}),
        ("grpo", {"num_iterations": 2, "steps_per_generation": 1}),
        ("rloo", {"num_iterations": 2}),
        ("rloo", {"steps_per_generation": 4}),
        ("divergence", {}),
        ("divergence", {"correction": "prefix_truncate", "correction_window": 3}),
        ("sampled_token", {}),
        ("raft", {}),
        ("raft", {"num_iterations": 2}),
        ("raft", {"steps_per_generation": 4, "num_generations": 2}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(f"{k}={v}" for k, v in value.items()),
)
def test_three_steps(pair: tuple[str, str], teacher: Any, tmp_path: Path, kind: str, settings: dict[str, Any]) -> None:
    """Through shuffle, split, accumulation and repeated use of a batch: each micro-batch is held against the oracle,
    which reads each row alone, with the weights of the moment of sampling."""
    trainer = make_trainer(kind, pair, tmp_path, mixin=Watch, **settings)
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    for name, parameter in trainer.model.named_parameters():
        assert not torch.equal(parameter, before[name]), f"{name} did not move"

    steps, accumulation = trainer.args.max_steps, trainer.args.gradient_accumulation_steps
    per_generation = getattr(trainer.args, "steps_per_generation", accumulation)
    repeats = getattr(trainer, "num_iterations", 1)
    assert len(trainer.micro_batches) == steps * accumulation
    assert len(trainer.generations) == -(-steps * accumulation // (per_generation * repeats))
    theta = load(pair[1])
    shuffled = 0
    for index, inputs in enumerate(trainer.micro_batches):
        generation = index // (per_generation * repeats)
        training, output, _ = trainer.generations[generation]
        assert training
        theta.load_state_dict(trainer.weights[generation], strict=False)
        theta.tie_weights()
        check_batch(inputs, teacher, theta, Mixture(), tolerance=2e-5)
        micro = index % per_generation
        rows = slice(micro * 4, micro * 4 + 4)
        shuffled += not torch.equal(inputs["log_teacher"], output["log_teacher"][rows])
    assert shuffled  # the test means something: TRL did change the order of rows
    lengths = {int(n) for inputs in trainer.micro_batches for n in inputs["completion_mask"].sum(1)}
    assert len(lengths) > 1  # and padding was there to be got wrong


def with_dense(length: int, top_k: int = 2, scalars: tuple[str, ...] = ("kl_theta_teacher",)) -> Rollout:
    """A rollout of `length` tokens whose dense records count up from 1; `top_k` 0 is one without."""
    numbers = torch.arange(1.0, length + 1)
    table = numbers[:, None].expand(length, 2 * top_k)
    dense = DenseRecords(dict.fromkeys(scalars, numbers), table.long(), -table, -2 * table) if top_k else None
    nothing = dict.fromkeys(RECORDS, torch.zeros(length))
    return Rollout([1], [1], [7] * length, **nothing, text="", finish_reason="stop", mixture=Mixture(), dense=dense)


def test_dense_records_stand_beside_their_tokens() -> None:
    """Up to the length that TRL padded to, 0 on padding; an engine that left some out is not taken."""
    ids = torch.full((2, 6), 7)
    stacked = stack_dense([[with_dense(2)], [with_dense(4)]], ids, top_k=2)
    assert {name: tuple(rows.shape) for name, rows in stacked.items()} == {
        "dense_kl_theta_teacher": (2, 6),
        "dense_ids": (2, 6, 4),
        "dense_log_teacher": (2, 6, 4),
    }
    assert stacked["dense_ids"].dtype == torch.int64
    counted = torch.tensor([[1, 2, 0, 0, 0, 0], [1, 2, 3, 4, 0, 0]])
    assert torch.equal(stacked["dense_kl_theta_teacher"], counted.float())
    assert torch.equal(stacked["dense_ids"], counted[..., None].expand(2, 6, 4))
    assert torch.equal(stacked["dense_log_teacher"], -2.0 * counted[..., None].expand(2, 6, 4))
    for other in (with_dense(4, 0), with_dense(4, 3), with_dense(4, 2, ("overlap",))):
        with pytest.raises(RuntimeError, match="have dense records, or they differ in what they record"):
            stack_dense([[with_dense(2)], [other]], ids, top_k=2)


def measured(theta: torch.Tensor, teacher: torch.Tensor, top_k: int) -> list[list[Rollout]]:
    """A rollout whose dense records are those of logits (T, V) at `top_k`, as the turns of a batch."""
    _, ids, log_theta, log_teacher = measure_in_torch(theta, teacher, theta, torch.ones(1, 1), (), top_k)
    dense = DenseRecords({}, ids, log_theta, log_teacher)
    nothing = dict.fromkeys(RECORDS, torch.zeros(len(ids)))
    return [
        [Rollout([1], [1], [7] * len(ids), **nothing, text="", finish_reason="stop", mixture=Mixture(), dense=dense)]
    ]


@pytest.mark.parametrize("asked", [1, 2, 5, 8])
def test_a_batch_has_the_likeliest_tokens_that_the_loss_reads(asked: int) -> None:
    """Whatever a rollout carries beside them: of each model's half the first, among them tokens that are in both."""
    theta, shift, ids = torch.randn(6, 8), torch.randn(6, 8), torch.full((1, 6), 7)
    teacher = theta + shift / 2
    wanted = stack_dense(measured(theta, teacher, asked), ids, top_k=asked)
    for recorded in range(asked, 9):
        stacked = stack_dense(measured(theta, teacher, recorded), ids, top_k=asked)
        assert stacked.keys() == wanted.keys() == {"dense_ids", "dense_log_teacher"}
        for name, values in stacked.items():
            assert torch.equal(values, wanted[name]), (name, recorded)
    halves = wanted["dense_ids"].unflatten(-1, (2, asked))
    assert asked == 1 or bool((halves[..., 0, :, None] == halves[..., 1, None, :]).any())
    assert stack_dense(measured(theta, teacher, 8), ids, top_k=0) == {}


@pytest.mark.parametrize("kind", RL)
def test_advantages_belong_to_their_rows(pair: tuple[str, str], tmp_path: Path, kind: str) -> None:
    """From the micro-batches alone: rewards from the completions, groups from the prompts, advantages by hand."""
    settings = {"positive_only": "mixture"} | ({"beta": 0.0} if kind == "rloo" else {})
    trainer = make_trainer(kind, pair, tmp_path, mixin=Watch, max_steps=2, **settings)
    trainer.train()
    decode = trainer.processing_class.decode
    for step in range(2):
        groups: dict[tuple[int, ...], list[tuple[float, bool, float]]] = defaultdict(list)
        for inputs in trainer.micro_batches[2 * step : 2 * step + 2]:
            for row, (prompt, completion, _) in enumerate(rows_of(inputs)):
                scored = digits(decode(completion, skip_special_tokens=True))
                groups[tuple(prompt)].append(
                    (scored, bool(inputs["mixture_rows"][row]), float(inputs["advantages"][row]))
                )
        assert len(groups) == 2
        for rows in groups.values():
            assert [mixed for _, mixed, _ in rows].count(True) == 2
            rewards = np.array([scored for scored, _, _ in rows])
            if kind == "grpo":
                wanted = (rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-4)
            else:
                wanted = rewards - (rewards.sum() - rewards) / 3
            mixed = np.array([mixed for _, mixed, _ in rows])
            wanted = np.where(mixed, np.maximum(wanted, 0.0), wanted)
            assert [advantage for _, _, advantage in rows] == pytest.approx(wanted.tolist(), abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_samples_from_the_student_alone(pair: tuple[str, str], tmp_path: Path, kind: str) -> None:
    from datasets import Dataset

    trainer = make_trainer(
        kind, pair, tmp_path, mixin=Watch, trainer={"eval_dataset": Dataset.from_dict({"prompt": TEXTS[:4]})}
    )
    metrics = trainer.evaluate()
    assert metrics["eval_mixture/tokens_per_second"] > 0
    assert not [name for name in metrics if "alpha" in name or "mixture/kl" in name]
    assert trainer.generations
    theta = load(pair[1])
    for training, output, rollouts in trainer.generations:
        assert not training
        assert bool((output["alpha"] == 0).all())
        assert not output["mixture_rows"].any()
        assert torch.allclose(output["log_q"], output["log_theta"], atol=1e-5)
        for rollout in rollouts:
            reads_teacher = kind in ("dense", "sampled_token")  # the loss of an evaluation does
            check_rollout(rollout, load(pair[0]), theta, tolerance=2e-5, has_teacher=reads_teacher)
    one_batch(trainer, TEXTS[:1] * 4)  # and training goes on with the mixture
    assert trainer.generations[-1][1]["mixture_rows"].any()


@pytest.mark.parametrize("fraction", [0.0, 0.25, 0.5, 0.75, 1.0])
@pytest.mark.parametrize(("processes", "rows"), [(1, 24), (2, 12), (3, 8), (4, 6), (8, 3), (24, 1)])
def test_a_group_may_span_processes(fraction: float, processes: int, rows: int) -> None:
    generator, group = OptimalSamplingGenerator(teacher="t", theta_fraction=fraction), 4
    plan = MixturePlan(generator, lambda: group, lambda: generator.theta_count(group, 0.5), lambda: True, lambda: 0.0)
    drawn = [mixture for rank in range(processes) for mixture in plan.mixtures(rows, rank * rows)]
    alone, is_theta = round(4 * fraction), [mixture.is_theta_only for mixture in drawn]
    assert [sum(is_theta[i : i + 4]) for i in range(0, 24, 4)] == [alone] * 6
    assert drawn == plan.mixtures(24, 0, processes)  # of all ranks at once, as one engine of theirs is asked
    if rows % 4 == 0:
        assert is_theta == ([True] * alone + [False] * (4 - alone)) * 6


@pytest.mark.parametrize(("group", "alone"), [(4, 1), (4, 2), (8, 4), (8, 1), (6, 3), (5, 2)])
@pytest.mark.parametrize(("processes", "rows"), [(2, 4), (2, 6), (4, 2), (8, 1), (3, 5), (7, 3)])
def test_a_rank_gets_its_share_of_both_halves(group: int, alone: int, processes: int, rows: int) -> None:
    """Ranks that hold a part of a group: each part has its share of the student's rows, first, within one row; over as
    many steps as a group has rows every part has had exactly its share."""
    generator, now = OptimalSamplingGenerator(teacher="t"), [0]
    plan = MixturePlan(generator, lambda: group, lambda: alone, lambda: True, lambda: 0.0, lambda: now[0])
    cuts = sorted({*range(0, processes * rows + 1, rows), *range(0, processes * rows + 1, group)})
    whole = processes * rows // group * group
    parts = [(begin, end) for begin, end in pairwise(cuts) if begin < whole]
    seen: dict[tuple[int, int], int] = defaultdict(int)
    for step in range(group):
        now[0] = step
        is_theta = [mixture.is_theta_only for mixture in plan.mixtures(processes * rows, 0, processes)]
        for begin, end in parts:
            count = sum(is_theta[begin:end])
            assert is_theta[begin:end] == [True] * count + [False] * (end - begin - count)
            assert abs(count - (end - begin) * alone / group) < 1
            seen[begin, end] += count
        for begin in range(0, whole, group):
            assert sum(is_theta[begin : begin + group]) == alone
    assert seen == {(begin, end): (end - begin) * alone for begin, end in parts}


@pytest.mark.parametrize(("processes", "rows"), [(1, 8), (2, 8), (4, 2)])
def test_a_share_of_different_prompts_falls_on_other_ones_in_each_epoch(processes: int, rows: int) -> None:
    """Two batches of eight prompts in one order: half of each batch is the student's, and no prompt stays with it."""
    generator, now, seen = OptimalSamplingGenerator(teacher="t"), [0], defaultdict(set)
    plan = MixturePlan(generator, lambda: 8, lambda: 4, lambda: True, lambda: 0.0, lambda: now[0], one_prompt=False)
    for step in range(40):
        now[0] = step
        is_theta = [mixture.is_theta_only for mixture in plan.mixtures(processes * rows, 0, processes)]
        assert (
            is_theta
            == [mixture.is_theta_only for rank in range(processes) for mixture in plan.mixtures(rows, rank * rows, 1)]
            or processes * rows == 8
        )  # a part of a group is cut by the ranks that hold it
        for begin in range(0, processes * rows, 8):
            assert sum(is_theta[begin : begin + 8]) == 4
        for place, alone in enumerate(is_theta):
            seen[step % 2, place].add(alone)
    assert set(map(len, seen.values())) == {2}


@pytest.mark.parametrize("fraction", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_theta_fraction_of_each_group(pair: tuple[str, str], tmp_path: Path, kind: str, fraction: float) -> None:
    trainer = make_trainer(kind, pair, tmp_path, generator={"theta_fraction": fraction})
    prompts = [text for text in TEXTS[:4] for _ in range(4)]
    batch = one_batch(trainer, prompts)
    group = 4 if kind in RL else 8
    alone = int(group * fraction)
    mixed = batch["mixture_rows"].view(-1, group)
    assert mixed.sum(1).tolist() == [group - alone] * (16 // group)
    if kind in RL:  # elsewhere the share begins at another place in each step
        assert not mixed[:, :alone].any()
    tokens = batch["completion_mask"].bool()
    own = tokens & ~batch["mixture_rows"][:, None]
    assert bool((batch["alpha"][own] == 0).all())
    assert bool((batch["alpha"][tokens & batch["mixture_rows"][:, None]] > 0).all())
    assert torch.allclose(batch["log_q"][own], batch["log_theta"][own], atol=1e-5)


def test_default_shares(pair: tuple[str, str], tmp_path: Path) -> None:
    for kind, share in (("grpo", 0.5), ("rloo", 0.5), ("divergence", 0.0)):
        trainer = make_trainer(kind, pair, tmp_path)
        batch = one_batch(trainer, TEXTS[:1] * 8)
        assert float((~batch["mixture_rows"]).float().mean()) == share


def test_a_record_of_another_completion_is_refused(pair: tuple[str, str], tmp_path: Path) -> None:
    trainer = make_trainer("grpo", pair, tmp_path)
    batch = one_batch(trainer, TEXTS[:1] * 4)
    turns = [[rollout] for rollout in trainer.rollouts]
    stack_records(turns, batch)
    with pytest.raises(RuntimeError, match=r"Completion 1 of the batch is not the one that was sampled for it"):
        stack_records([turns[0], turns[2], turns[1], turns[3]], batch)
    with pytest.raises(RuntimeError, match=r"The batch has 4 completions, but 3 were sampled for it"):
        stack_records(turns[:3], batch)
    with pytest.raises(RuntimeError, match=r"Completion 3 of the batch was not sampled: it has no turn"):
        stack_records([*turns[:3], []], batch)
    batch["completion_mask"][:] = 1
    with pytest.raises(RuntimeError, match=r"Token \d+ of completion \d would be trained on, and no model sampled it"):
        stack_records(turns, batch)
