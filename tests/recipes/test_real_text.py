"""Tasks of reasoning-gym as the study of real text asks them, and how its teachers learn."""

from __future__ import annotations

import json
import math
import os
import socket
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from trl.trainer.utils import ensure_master_addr_port

import pair as embedded
from horizon_report import error
from informed_arms import REFERS, STUDY, TOLD, ReadingTask, ToldTask
from optimal_sampling_trl import Mixture, OptimalSamplingGenerator
from optimal_sampling_trl.rollouts.rollout import Rollout
from real_arms import ARMS as EVERY_ARM
from real_arms import PUBLISHED, trainer_of
from real_cells import above, chosen, equal, whole
from real_draws import MEASURED, draws
from real_exam import distance, mean_of
from real_models import learn
from real_places import ARMS, LONGER, RUNS, UPDATES, end
from real_rates import rates
from real_seconds import REFERENCE, alone, timed
from real_tables import RESULTS, TABLES, ends, of_place, stored
from real_tasks import TASKS, answer_of
from real_text_report import gain, seeds
from runs import one_each, read_runs, take_card


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("42 - 25 = 17\nAnswer: 17", "17"),
        ("Answer: 3\nno, wait.\nAnswer: -4.\nThat is it.", "-4"),
        ("I get 5, then 12 and -7.5", "-7.5"),
        ("nothing", ""),
    ],
)
def test_the_answer_of_a_text(text: str, answer: str) -> None:
    assert answer_of(text) == answer


@pytest.mark.parametrize("key", list(TASKS))
def test_solved_examples_are_right_and_no_question_is_in_both_splits(key: str) -> None:
    pytest.importorskip("reasoning_gym")
    task = TASKS[key]
    train, test = task.entries("train", 200, seed=1), task.entries("test", 200)
    for entry in train:  # gsm_symbolic's verifier takes an answer below 0 for wrong; 2 of 1 000 questions have one
        below = key == "gsm" and entry["answer"].startswith("-")
        assert task.score(task.solve(entry), entry) == (not below)
    assert not {entry["question"] for entry in train} & {entry["question"] for entry in test}
    assert train != task.entries("train", 200, seed=2)
    assert all(task.score(f"Answer: {entry['answer']}1", entry) == 0 for entry in test)  # gsm_symbolic gives 0.01
    rows = task.dataset("train", 2, seed=1)
    texts = [[{"role": "assistant", "content": text}] for text in ("Answer: x", task.solve(train[1]))]
    assert task.reward(completions=texts, entry=rows["entry"]) == [0.0, 1.0]


def test_teachers_learn_from_answers_alone() -> None:
    """One step on prompts of unequal length: the loss is that of each answer without padding; a prompt is no label."""
    model = embedded.build(embedded.RECIPES["student"])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    examples = [([5, 6, 7], [8, 9]), ([5], [10, 11, 12, 13])]
    other = AutoModelForCausalLM.from_config(model.config)
    other.load_state_dict(model.state_dict())
    learn(model, torch.optim.SGD(model.parameters(), lr=1.0), examples, pad=0)
    total = 0.0
    with torch.autocast("cpu", torch.bfloat16):
        for prompt, answer in examples:
            logits = other(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
            total = total + torch.nn.functional.cross_entropy(logits.float(), torch.tensor(answer), reduction="sum")
    (total / 6).backward()
    torch.nn.utils.clip_grad_norm_(other.parameters(), 1.0)
    for name, parameter in other.named_parameters():
        moved = before[name] - dict(model.named_parameters())[name].detach()
        torch.testing.assert_close(moved, parameter.grad, rtol=0.05, atol=2e-3)


def test_the_distance_is_a_mean_over_tokens() -> None:
    def rollout(log_theta: list[float], log_teacher: list[float]) -> Rollout:
        theta, teacher = torch.tensor(log_theta), torch.tensor(log_teacher)
        count, alpha = len(theta), torch.zeros(len(theta))
        return Rollout([1], [1], [2] * count, alpha, theta, theta, teacher, "", "length", Mixture.theta_only())

    rollouts = [rollout([-1.0], [-2.0]), rollout([-1.0, -2.0, -0.5], [-1.0, -1.0, -1.0])]
    assert math.isclose(mean_of(rollouts, "log_theta"), -4.5 / 4)
    assert math.isclose(distance(rollouts), 0.5 / 4)


ENTRY = {"question": "2 + 3 - 9 = ?", "answer": "-4", "metadata": {"expression": "2 + 3 - 9"}}


@pytest.mark.parametrize("key", ["sums", "steps"])
def test_the_teacher_alone_is_told_the_solution(key: str) -> None:
    task = TASKS[key]
    told, reading = ToldTask(*task), ReadingTask(*task)
    ((asked,), (of_teacher,)) = told.prompt(ENTRY), told.teacher_prompt(ENTRY)
    assert [asked] == task.prompt(ENTRY)
    assert of_teacher["content"] == f"{asked['content']}\n{TOLD}\n{task.solve(ENTRY)}"
    assert [of_teacher] == reading.prompt(ENTRY)


def test_an_answer_that_speaks_of_the_solution_is_noticed() -> None:
    assert REFERS.search(TOLD)
    assert REFERS.search("As given above, the answer is 5.")
    assert not any(REFERS.search(TASKS[key].solve(ENTRY)) for key in ("sums", "steps"))
    assert {teaching.teacher for teaching in STUDY.values()} == {"self", "start", "separate"}


def test_arms_take_as_many_completions_in_whole_groups() -> None:
    for name, arm in EVERY_ARM.items():
        batch, steps = arm.budget(64, 340)
        assert trainer_of(arm) is not None, name
        assert batch % arm.group == 0, name
        assert abs(batch * steps - 64 * 340) < batch, name
    assert PUBLISHED["MENTOR"].budget(64, 340) == (60, 363)  # 8 of the student's and 4 of the mixture's for a prompt


def test_no_two_arms_are_the_same_run() -> None:
    """A generator without a share of the student takes its trainer's, which is none in RAFT."""
    names: dict[str, str] = {}
    for name, arm in EVERY_ARM.items():
        found = trainer_of(arm)
        assert found is not None, name
        generator = None
        if arm.generator is not None:
            generator = OptimalSamplingGenerator("teacher", **arm.generator)
            if generator.theta_fraction is None:
                generator = replace(generator, theta_fraction=found[0].default_theta_fraction)
        run = repr((arm._replace(generator=None), arm.library, generator))
        assert run not in names, (name, names[run])
        names[run] = name


def test_a_run_takes_a_card_and_a_port_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """The port of the environment is another process's: TRL's engine is not to meet others there."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    with socket.create_server(("localhost", 0)) as taken:
        monkeypatch.setenv("MASTER_PORT", str(taken.getsockname()[1]))
        take_card(1)
        ensure_master_addr_port()  # TRL's, before it starts vLLM
        with socket.create_server(("localhost", int(os.environ["MASTER_PORT"]))):
            assert os.environ["CUDA_VISIBLE_DEVICES"] == "6"


def test_seeds_stand_beside_each_other_and_cut_runs_say_so() -> None:
    def line(arm: str, seed: int, right: float, done: int = 4) -> dict[str, Any]:
        points = [[64 * step, 0, 0.0, right * step / 4] for step in range(done + 1)]
        key = {"arm": arm, "seed": seed, "learning_rate": 1e-4, "steps": 4, "done": done, "points": points}
        return key | {"right": right, "greedy": 0.5, "any_right": 0.75}

    lines = [line("RAFT", 0, 0.4), line("RAFT", 1, 0.8), line("GRPO", 0, 0.3), line("GRPO", 1, 0.2, done=3)]
    head, _, raft, grpo = seeds(lines)
    assert head == "| arm | rate | seed 0 | seed 1 | mean | greedy | pass@8 |"
    assert raft == "| RAFT | 0.0001 | 0.400 | 0.800 | 0.600 ± 0.200 | 0.500 | 0.750 |"
    assert grpo.startswith("| GRPO | 0.0001 | 0.300 | 0.200 (3) | 0.250 ± ")
    _, _, raft, grpo = seeds(lines, completions=130)
    assert raft == "| RAFT | 0.0001 | 0.200 | 0.400 | 0.300 ± 0.100 |  |  |"
    assert grpo.startswith("| GRPO | 0.0001 | 0.150 | 0.100 | ")
    mean, error, count = gain(lines, "RAFT", "GRPO")  # 0.1 and 0.6
    assert (round(mean, 6), round(error, 6), count) == (0.35, 0.25, 2)


STUDIES = Path(__file__).parents[2] / "recipes" / "studies"


@pytest.mark.parametrize("name", ["informed", "real_text", "presets_real", "dense_real", "real_seconds"])
def test_stored_runs_are_whole_lines(name: str) -> None:
    lines = read_runs(STUDIES / "results" / f"{name}.jsonl")
    assert lines
    for line in lines:
        assert 0 < line["done"] <= line["steps"]
        assert all(0 <= line[share] <= 1 for share in ("right", "greedy", "any_right"))
        done = [point[0] for point in line.get("points", [])]
        assert done == sorted(done)


@pytest.mark.parametrize("name", list(TABLES))
def test_the_documents_hold_the_tables_of_the_stored_runs(name: str) -> None:
    """And at their end each has a number for an arm; a table without runs is on no page."""
    rows = list(TABLES[name].rows())
    text = (STUDIES.parents[1] / TABLES[name].page).read_text()
    assert ("\n".join([*rows, "", ""]) in text) == (len(rows) > 2), "not as drawn, or rows follow that no run drew"


def test_the_informed_student_passes_grpo_with_one_model() -> None:
    """By more than two standard errors over three seeds."""
    lines = stored("informed", student="whole")
    above, error, count = gain(lines, "GRPO, half informed mixture", "GRPO")
    assert count == 3
    assert above > 2 * error > 0


def test_on_the_steps_the_best_rates_lie_inside_and_raft_with_the_term_alone_passes_its_teacher() -> None:
    """By more than two standard errors over three seeds, and the page of results has the ends."""
    lines, teacher = of_place("steps", "whole"), [shares["right"] for shares in draws(RESULTS, "steps")]
    page, passed = (STUDIES.parents[1] / "docs" / "results.md").read_text(), []
    names = {
        "RAFT, mixture + dense 1 faded": "RAFT + faded dense term",
        "RAFT, mixture": "RAFT",
        "Distillation": "distillation",
        "GRPO, half mixture": "GRPO with half mixture",
    }
    for arm, name in names.items():
        best = whole(chosen(lines, arm))
        first = {line["learning_rate"]: line["right"] for line in lines if line["arm"] == arm and line["seed"] == 0}
        for rate in (best[0]["learning_rate"], max(first, key=first.__getitem__)):
            assert min(first) < rate < max(first), arm
        assert len(best) == 3, arm
        assert f"{name} {end(lines, arm)} %" in page
        passed += [arm] * passes([line["right"] for line in best], teacher)
    assert passed == ["RAFT, mixture + dense 1 faded"]


def test_the_pruned_student_passes_its_teacher_at_once_on_the_sums_and_later_on_the_steps() -> None:
    """RAFT by more than two standard errors, with the term that fades and later without it; a page has the ends."""
    page = (STUDIES.parents[1] / "docs" / "results.md").read_text()
    passed, (faded, plain, *_) = [], ARMS
    for task, updates in RUNS:
        lines, teacher = of_place(task, "pruned", updates), [shares["right"] for shares in draws(RESULTS, task)]
        for arm in (faded, plain):
            passed += [(task, updates, arm)] * passes([line["right"] for line in whole(chosen(lines, arm))], teacher)
        assert f"RAFT + faded dense term {end(lines, faded)} %" in page
    assert f"RAFT {end(lines, plain)} %" in page
    assert passed == [("sums", UPDATES, faded), ("steps", LONGER, faded), ("steps", LONGER, plain)]


def test_a_longer_run_of_raft_ends_above_the_greedy_decoding_of_its_teacher() -> None:
    """Each student's in every seed, by more than two standard errors; the whole one's above pass@8; on a page."""
    page, plain = (STUDIES.parents[1] / "docs" / "results.md").read_text(), "RAFT, mixture"
    teacher = draws(RESULTS, "steps")
    for student, measure in (("pruned", "greedy"), ("whole", "any_right")):
        lines = of_place("steps", student, LONGER)
        shares = [line["right"] for line in whole(chosen(lines, plain))]
        assert min(shares) > max(draw["greedy"] for draw in teacher)
        assert passes(shares, [draw[measure] for draw in teacher])
        assert f"RAFT {end(lines, plain)} %" in page


def passes(shares: list[float], teacher: list[float]) -> bool:
    """Return whether right answers of an arm are above those of its teacher by more than two standard errors."""
    return mean(shares) - mean(teacher) > 2 * math.hypot(error(shares), error(teacher))


def test_a_longer_run_replaces_a_shorter_one_and_a_cut_one_is_in_no_mean() -> None:
    def line(arm: str, seed: int, right: float, done: int = 4, rate: float = 1e-4) -> dict[str, Any]:
        points = [[64 * step, 0, 0.0, right * step / 4, 0.0] for step in range(done + 1)]
        key = {"task": "sums", "student": "whole", "arm": arm, "learning_rate": rate, "seed": seed, "steps": 4}
        ends = {
            "right": right,
            "greedy": 0.5,
            "any_right": 0.75,
            "entropy": 0.25,
            "divergence": 0.0,
            "of_teacher": {"right": 0.5},
        }
        return key | ends | {"done": done, "points": points}

    cut, again, later = line("RAFT", 0, 0.1, done=3), line("RAFT", 0, 0.4), line("RAFT", 0, 0.3)
    assert one_each([again, cut]) == one_each([cut, again]) == [again]
    assert one_each([again, later]) == [later]
    lines = [line("GRPO", 0, 0.2, done=3), again, line("RAFT", 1, 0.0, done=1), line("RAFT", 0, 0.2, rate=3e-4)]
    _, _, raft, grpo = ends(lines)
    assert raft == "| RAFT | 1e-4 | .400, .000 (1) | .400 | .500 | .750 | .250 | .000 | .500 |"
    assert grpo.startswith("| GRPO | 1e-4 | .200 (3), – | cut | ")
    assert list(rates(lines))[2:] == ["| RAFT | – | .400 [.400] | .200 [.200] |"]
    assert equal([again], 0.6) == pytest.approx([0.24])  # between a half of the updates and three quarters


def test_an_arm_stands_at_its_best_rate_of_those_that_most_seeds_ended_at_and_every_rate_has_a_column() -> None:
    def line(arm: str, rate: float, seed: int, right: float, done: int = 4) -> dict[str, Any]:
        key = {"arm": arm, "learning_rate": rate, "seed": seed, "steps": 4, "done": done}
        return key | {"right": right, "points": [[64 * done, 0, 0.0, right, 0.0]]}

    at_usual = [line("RAFT", 1e-4, seed, 0.4) for seed in range(4)]
    higher = [line("RAFT", 3e-4, seed, 0.5) for seed in (2, 0)]
    assert chosen([*at_usual, *higher], "RAFT") == at_usual
    assert chosen([*at_usual, *higher, line("RAFT", 3e-4, 1, 0.5, done=2)], "RAFT") == at_usual
    third = line("RAFT", 3e-4, 1, 0.3)
    assert chosen([*at_usual, *higher, third], "RAFT") == [higher[1], third, higher[0]]
    assert chosen([*at_usual, *higher, third | {"right": 0.0}], "RAFT") == at_usual
    assert chosen([*at_usual[:2], *higher], "RAFT") == higher[::-1]  # two seeds of each
    assert chosen([at_usual[0], *[one for one in higher if one["seed"] == 0]], "RAFT") == at_usual[:1]
    others = [line("GRPO", 3e-5, 0, 0.2), line("GRPO", 3e-5 * (1 / 9), 0, 0.1), line("TRB", 1e-4, 0, 0.6)]
    head, _, *rows = rates([*at_usual, *higher, third, *others], corner="steps")
    assert head == "| steps | a ninth | a third | usual | threefold |"
    assert rows == ["| RAFT | – | – | .400 [.400] | .500 [.500] |", "| GRPO | .100 [.100] | – | .200 [.200] | – |"]
    lower = [line("GRPO", 1e-5, seed, 0.3) for seed in range(3)]
    assert list(rates([*others, *lower]))[2:] == ["| GRPO | .100 [.100] | .300 [.300] | .200 [.200] | – |"]


def test_a_cut_run_has_its_updates_in_the_tables_of_rates() -> None:
    def line(rate: float, done: int) -> dict[str, Any]:
        points = [[64 * step, 0, 0.0, step / 10, 0.0] for step in range(done + 1)]
        key = {"arm": "RAFT", "learning_rate": rate, "seed": 0, "steps": 4, "done": done}
        return key | {"right": done / 10, "points": points}

    lines = [line(1e-4, done=4), line(1e-4, done=4) | {"seed": 1}, line(3e-4, done=3), line(1e-4 / 3, done=1)]
    assert list(rates(lines))[2:] == ["| RAFT | .100 (1) [.100] | .400 [.400] | .300 (3) [.300] |"]


def test_an_arm_is_held_against_all_draws_of_the_teacher_that_most_runs_had(tmp_path: Path) -> None:
    def line(right: float, greedy: float, arm: str = "RAFT", done: int = 4) -> dict[str, Any]:
        teacher = {"right": right, "greedy": greedy, "any_right": 0.75}
        return {"task": "sums", "arm": arm, "of_teacher": teacher, "right": 0.6, "done": done, "steps": 4}

    runs = [line(0.5, 0.58), line(0.5, 0.58, arm="TRB"), line(0.46, 0.58, done=1), line(0.4, 0.5), line(0.4, 0.5)]
    for name in MEASURED:
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(run) + "\n" for run in runs))
    found = [shares["right"] for shares in draws(tmp_path, "sums")]
    assert found == [0.5, 0.46]
    assert above(runs[:2], found) == ".120 ± .025"  # √(.6 × .4 / 1024) of the samples, .02 of the teacher's draws
    assert above([runs[0], runs[1] | {"right": 0.7}], found) == ".170 ± .054"  # .05 over seeds
    assert above(runs[2:3], found) == "cut"


def test_seconds_are_of_64_completions_and_the_slower_arm_is_read_where_the_quicker_one_ends(tmp_path: Path) -> None:
    def line(arm: str, seconds: list[float], completions: int = 64, call: int = 0) -> dict[str, Any]:
        points = [[completions * step, 0, at, 0.1 * step, 0.0] for step, at in enumerate(seconds)]
        key = {"task": "sums", "student": "teacher", "arm": arm, "learning_rate": 1e-4, "seed": 0, "steps": 4}
        return key | {"done": 4, "points": points, "right": 0.4, "call": call}

    quick, slow = line(REFERENCE, [0, 9, 10, 11, 12]), line("MENTOR", [0, 9, 10, 11, 18], completions=32)
    assert (alone(quick), alone(slow)) == (1.0, 2.0)  # without the first span; the last is an outlier
    file = tmp_path / "real_seconds.jsonl"
    file.write_text(json.dumps(quick) + "\n" + json.dumps(slow) + "\n")
    columns = timed(tmp_path, "sums", [quick, slow])
    assert [column([slow]) for column in columns.values()] == ["2.00", ".200"]
    untimed = quick | {"arm": "SKD"}
    columns = timed(tmp_path, "sums", [quick, slow, untimed])
    assert [column([arm]) for column in columns.values() for arm in (slow, untimed)] == ["2.00", "–", ".200", "–"]
    assert not timed(tmp_path, "steps", [quick])  # nothing was timed there
    later = [line(REFERENCE, [0, 2, 4, 6, 8], call=1), line("SKD", [0, 8, 16, 24, 32], call=1)]  # half as fast
    file.write_text("".join(json.dumps(one) + "\n" for one in [*later, quick, slow]))
    columns = timed(tmp_path, "sums", [quick, slow, untimed])
    assert [column([arm]) for column in columns.values() for arm in (quick, untimed)] == [
        "1.00",
        "4.00",
        ".400",
        ".100",
    ]
