"""The study of what passes a teacher: its tasks, losses, phases and rates at an edge, and every arm for two steps."""

from __future__ import annotations

import itertools
import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import past_the_teacher_arms as design
import stack
import stack_losses
from digit_tasks import END, Task
from helpers.training import make_untrained_pair
from horizon_train import Prompts, train, verify
from optimal_sampling_trl import Mixture
from optimal_sampling_trl.mixture import MixtureRows
from pair import EOS, VOCABULARY, make_tokenizer
from past_the_teacher import time_alone
from past_the_teacher_report import report
from runs import read_runs
from stack_graph import Rollouts
from stacks import Run, Setting, key_of, missing
from stage import Arm, Stage

LENGTH = 5


@pytest.fixture(scope="module")
def ladder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as `ladder.py` writes it, of untrained models."""
    folder = tmp_path_factory.mktemp("ladder")
    teacher, student = make_untrained_pair(folder / "pair")
    for name, model in (("teacher-50", teacher), ("student-2", student)):
        shutil.copytree(model, folder / "sums-4" / name)
    return folder


def test_sequences_are_the_tokenizers() -> None:
    task = Task.of("sums-7")
    texts = [prompt + task.answer(prompt) + EOS for prompt in task.prompts("train", 20, 3)]
    assert torch.equal(task.sequences("train", 20, 3), make_tokenizer()(texts, return_tensors="pt").input_ids)


def test_many_completions_are_right_and_no_others() -> None:
    """All of 10³ numbers for one prompt: 2³ are right, those whose steps are the digit or one more."""
    task = Task.of("many-3")
    sequences = task.sequences("test", 1, 0)
    digits = [int(VOCABULARY[token]) for token in sequences[0, :3]]
    every = torch.tensor([[*number, END] for number in itertools.product(range(3, 13), repeat=3)])
    found = task.right_tokens(sequences.expand(1000, -1), every).all(-1)
    wanted = set()
    for bits in itertools.product((0, 1), repeat=3):
        sums = itertools.accumulate(digit + bit for digit, bit in zip(digits, bits))
        wanted.add("".join(str(total % 10) for total in sums))
    texts = ["".join(VOCABULARY[token] for token in row[:3]) for row in every[found].tolist()]
    assert set(texts) == wanted
    assert len(texts) == 8
    assert not task.right_tokens(sequences, torch.cat([every[found][:1, :3], torch.tensor([[5]])], dim=1)).all()


def test_verifiers() -> None:
    right = torch.tensor([[[True, True, False, True], [True] * 4]])
    assert verify("exact", right).tolist() == [[0.0, 1.0]]
    assert verify("graded", right).tolist() == [[0.5, 1.0]]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for length in (21, 41, 81):  # what is right in all its tokens is accepted at 1
        assert verify("graded", torch.ones(1, 1, length, dtype=torch.bool, device=device)).item() == 1
    torch.manual_seed(0)
    noisy = verify("noisy", right.expand(5000, 2, 4))
    assert noisy.mean(0).tolist() == pytest.approx([0.05, 0.95], abs=0.01)
    with pytest.raises(ValueError, match="'exact', 'graded' or 'noisy'"):
        verify("kind", right)


def test_given_tokens_begin_a_completion_and_teach_nothing(ladder: Path) -> None:
    student, teacher = (stack.Stack.load(ladder / "sums-4" / name, 1, "cpu") for name in ("student-2", "teacher-50"))
    prompts, ids = torch.randint(3, 13, (1, 3, LENGTH)), torch.randint(3, 13, (1, 3, LENGTH))
    given, rows = stack.Given(ids, torch.tensor([[0, 2, 5]])), MixtureRows.of([Mixture()] * 3)
    for until in (0, LENGTH):
        batch = stack.sample(student, teacher, prompts, rows, torch.full((3,), until), LENGTH, END, given)
        for row, count in enumerate((0, 2, 5)):
            assert torch.equal(batch.ids[0, row, :count], ids[0, row, :count])
            assert not batch.mask[0, row, :count].any()
        assert batch.mask[0, 0, 0] == 1
        logits = student.logits(torch.cat([prompts, batch.ids], dim=-1), keep=LENGTH + 1)[:, :, :-1]
        wanted = logits.log_softmax(-1).gather(-1, batch.ids[..., None])[..., 0]
        torch.testing.assert_close(batch.log_theta, wanted, rtol=0, atol=1e-4)


def test_filtered_fine_tuning_has_the_gradient_of_the_accepted_completions(ladder: Path) -> None:
    """By transformers: −log θ of the accepted ones over all tokens of the batch; two students, each its own filter."""
    folder = ladder / "sums-4" / "student-2"
    student = stack.Stack.load(folder, 2, "cpu")
    for weight in student.weights.values():
        weight.requires_grad_()
    prompts, rewards = torch.randint(3, 13, (2, 4, LENGTH)), torch.tensor([[0.0, 0.4, 1.0, 0.0], [1.0, 0.2, 0.0, 0.5]])
    batch = stack.sample_alone(student, None, prompts, LENGTH, END)
    stage = Stage([Arm({"accepted": 1.0}), Arm({"accepted": 1.0}, accept=0.5)], LENGTH, "cpu")
    mixed = torch.zeros(2, 4, LENGTH, dtype=torch.bool)
    losses = stack_losses.loss(
        student, batch, rewards, mixed, stage.losses(0.0), group=4, weights=stage.weights(rewards)
    )
    found = stack_losses.gradients(student, losses)
    for row, accepted in enumerate(([1, 2], [0, 3])):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        ids = torch.cat([prompts[row], batch.ids[row]], dim=-1)
        log_theta = model(ids).logits[:, LENGTH - 1 : -1].log_softmax(-1).gather(-1, batch.ids[row][..., None])[..., 0]
        (-(log_theta * batch.mask[row])[accepted].sum() / batch.mask[row].sum()).backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(found[name][row], parameter.grad, rtol=1e-3, atol=1e-6)
            assert parameter.grad.abs().max() > 1e-5 or "norm" in name


def test_improbable_tokens_are_pushed_down_and_others_are_not(ladder: Path) -> None:
    student = stack.Stack.load(ladder / "sums-4" / "student-2", 1, "cpu")
    for weight in student.weights.values():
        weight.requires_grad_()
    batch = stack.sample_alone(student, None, torch.randint(3, 13, (1, 4, LENGTH)), LENGTH, END)
    terms = Stage([Arm({"unlikely": 1.0})], LENGTH, "cpu").losses(0.0)
    mixed = torch.zeros(1, 4, LENGTH, dtype=torch.bool)
    below = (batch.log_theta < torch.tensor(stack_losses.UNLIKELY).log()) * batch.mask
    wanted = (batch.log_theta * below).sum() / batch.mask.sum()
    found = stack_losses.loss(student, batch, torch.zeros(1, 4), mixed, terms, group=4)
    assert found.item() == pytest.approx(wanted.item(), rel=1e-4)
    assert wanted < 0


def test_each_student_has_the_advantages_of_its_own_group() -> None:
    rewards = torch.rand(3, 8)
    found = stack_losses.advantages(rewards, torch.tensor([2, 8, 4]))
    for row, group in enumerate((2, 8, 4)):
        assert torch.equal(found[row], stack_losses.advantages(rewards[row : row + 1], group)[0])


def test_prompts_go_round_where_there_are_few() -> None:
    runs = [Run("a", 1e-3, 0), Run("b", 1e-3, 0), Run("a", 1e-3, 1)]
    few = Prompts(Task.of("sums-4"), runs, 10, 100)
    groups = torch.tensor([1, 8, 1])
    first, second = few.at(0, groups), few.at(1, groups)
    assert torch.equal(first[0], few.every[0, :64])
    assert torch.equal(second[0], torch.cat([few.every[0, 64:], few.every[0, :28]]))
    assert torch.equal(first[1], few.every[0, :8].repeat_interleave(8, 0))
    assert torch.equal(second[1][::8], few.every[0, 8:16])
    assert not torch.equal(first[0], first[2])


def test_a_second_phase_begins_when_the_validation_stalls() -> None:
    arms = [Arm({"divergence": 1.0}, then={"reward": 1.0}), Arm({"divergence": 1.0})]
    stage = Stage(arms, LENGTH, "cpu")
    for right, second in ((0.1, False), (0.3, False), (0.305, False), (0.3, True), (0.9, True)):
        stage.validate(torch.tensor([right, 0.0]))
        assert stage.second.tolist() == [second, False]
    assert stage.groups.tolist() == [8, 1]
    assert stage.losses(0.5).reward.tolist() == [1.0, 0.0]
    assert stage.losses(0.5).divergence.tolist() == [0.0, 1.0]


def test_a_dense_term_fades_and_a_reference_prefix_is_withdrawn() -> None:
    stage = Stage([Arm({"divergence": 1.0, "accepted": 1.0}, fade=0.5), Arm({"reward": 1.0}, hints=True)], 41, "cpu")
    assert [stage.losses(x).divergence[0].item() for x in (0.0, 0.25, 0.5, 1.0)] == [1.0, 0.5, 0.0, 0.0]
    assert stage.losses(1.0).accepted[0] == 1
    answers = torch.zeros(2, 64, 41, dtype=torch.long)
    start = stage.given(answers, 0.0)
    assert start.count[:, 0].tolist() == [0, 20]
    for _ in range(20):
        stage.note(torch.zeros(2, 64), torch.ones(2, 64))
    assert stage.given(answers, 0.0).count[1, 0] == 40  # never right: as much as there is, but its last token
    assert not stage.given(answers, 0.75).count.any()


def line(setting: Setting, arm: str, rate: float, seed: int, end: float) -> dict:
    return key_of(setting, 150, Run(arm, rate, seed)) | {"curve": [[0, 0.0], [1, end]], "stopped": False}


def test_a_rate_beyond_is_tried_where_the_best_is_at_an_edge(tmp_path: Path) -> None:
    setting = Setting("sums-4", "teacher-50", "student-2", ("RAFT, mixture",), 2)
    ends = {1e-3: 0.2, 3e-3: 0.5, 1e-2: 0.9}
    lines = [line(setting, "RAFT, mixture", rate, seed, end) for rate, end in ends.items() for seed in range(2)]
    assert design.rates_with_edges(lines[:-1])(setting, "RAFT, mixture") == (1e-3, 3e-3, 1e-2)
    assert design.rates_with_edges(lines)(setting, "RAFT, mixture") == (1e-3, 3e-3, 1e-2, 3e-2)
    for name in ("teacher-50", "student-2"):
        (tmp_path / "sums-4" / name).mkdir(parents=True)
    todo = list(missing([setting], design.rates_with_edges(lines), lines, 150, tmp_path, 240))
    assert todo == [(setting, [Run("RAFT, mixture", 3e-2, 0), Run("RAFT, mixture", 3e-2, 1)])]


def test_every_arm_is_run_at_three_rates_and_stands_in_the_design() -> None:
    places = design.settings()
    assert {arm for place in places for arm in place.arms} == set(design.ARMS)
    for arm in design.ARMS.values():
        assert len(arm.rates) == 3
        assert set(arm.rates) <= set(design.LADDER)
    assert len(design.FACTORIAL) == 36


@pytest.mark.parametrize(
    ("verifier", "arms"), [("exact", design.ARMS), ("graded", design.GRADED), ("noisy", ["RAFT, own"])]
)
def test_every_arm_trains_and_is_reported(ladder: Path, tmp_path: Path, verifier: str, arms: Any) -> None:
    setting = Setting("sums-4", "teacher-50", "student-2", tuple(arms), 1, verifier, prompts=64)
    runs = [Run(arm, 1e-3, 0) for arm in arms]
    lines = train(setting, runs, design.ARMS, 2, str(ladder), "cpu", float("inf"), ending=3)
    assert [line["arm"] for line in lines] == list(arms)
    for line in lines:
        assert not line["stopped"]
        assert len(line["curve"]) == 3
        assert all(0 <= line[name] <= 1 for name in ("right", "any_right", "greedy"))
        assert line["entropy"] > 0
        assert line["divergence"] > 0
    assert lines[0]["of_teacher"]["divergence"] == pytest.approx(0, abs=1e-4)
    report(lines, [], tmp_path, [setting])
    assert (tmp_path / "past_the_teacher.png").stat().st_size > 1000


def test_at_equal_seconds_a_slower_arm_made_fewer_updates(
    ladder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The arms are timed by themselves; the report reads the slower one's curve at the quicker one's time."""
    arms = ("RAFT, own", "RAFT, mixture")
    setting = Setting("sums-4", "teacher-50", "student-2", arms, 1)
    time_alone([setting], design.ARMS, Namespace(ladder=ladder, device="cpu"), tmp_path / "alone.jsonl")
    alone = read_runs(tmp_path / "alone.jsonl")
    assert [(line["task"], line["arm"], line["device"]) for line in alone] == [("sums-4", arm, "cpu") for arm in arms]
    assert all(line["seconds"] > 0 for line in alone)
    lines = train(setting, [Run(arm, 1e-3, 0) for arm in arms], design.ARMS, 4, str(ladder), "cpu", float("inf"))
    for line in lines:
        line["curve"] = [[0, 0.0], [1, 0.1], [2, 0.2], [3, 0.6], [4, 0.8]]
    seconds = dict(zip(arms, (1.0, 1.6)))
    report(lines, [line | {"seconds": seconds[line["arm"]]} for line in alone], tmp_path, [setting])
    rows = {row.split(" | ")[0]: row.split(" | ")[2:5] for row in capsys.readouterr().out.splitlines() if " | " in row}
    assert rows["| RAFT, own"] == ["0.800", "0.200", "0.800"]  # the end, half-way, at equal seconds
    assert rows["| RAFT, mixture"] == ["0.800", "0.200", "0.400"]  # after 2.5 of 4 updates


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("mixture", [Mixture(), Mixture.preset("skd")])
def test_a_recorded_rollout_is_the_students(ladder: Path, mixture: Mixture) -> None:
    """Recorded once, replayed with other prompts and other weights."""
    student, teacher = (stack.Stack.load(ladder / "sums-4" / name, 1, "cuda") for name in ("student-2", "teacher-50"))
    rollouts = Rollouts(student, teacher, LENGTH, END, mixes=True)
    rows, until = MixtureRows.of([mixture] * 64, "cuda"), torch.full((64,), LENGTH, device="cuda")
    drawn = []
    for _ in range(3):
        batch = rollouts(torch.randint(3, 13, (1, 64, LENGTH), device="cuda"), rows, until)
        assert rollouts.graph is not None
        rollouts._check(batch)
        drawn.append(batch.ids.clone())
        student.weights["model.norm.weight"].mul_(0.9)
    assert not torch.equal(drawn[0], drawn[1])
