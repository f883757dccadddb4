"""The study of the probe's numbers at places whose ends are known: places, ends, rewards, and one place probed."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest

import probe_places
from digit_tasks import Task
from helpers.paths import ROOT
from helpers.training import make_untrained_pair
from runs import read_runs


def test_the_ends_are_those_of_the_runs() -> None:
    lines = read_runs(probe_places.RUNS)
    main = ("sums-40", "teacher-50", "student-2")
    for arm in probe_places.GAIN:
        at_rates: dict[float, list[float]] = {}
        for line in lines:
            if (line["task"], line["teacher"], line["student"], line["arm"]) == (*main, arm):
                at_rates.setdefault(line["learning_rate"], []).append(line["right"])
        assert all(len(seeds) == 3 for seeds in at_rates.values())
        assert probe_places.end(lines, main, arm) == pytest.approx(max(sum(s) / 3 for s in at_rates.values()))
    assert math.isnan(probe_places.end(lines, main, "no such arm"))


def test_the_rewards_accept_what_the_task_does() -> None:
    sums, many = (probe_places.reward_of(Task.of(name)) for name in ("sums-3", "many-3"))
    assert sums(prompts=["395="] * 3, completions=["327", "326", "3271"]) == [1.0, 0.0, 0.0]
    texts = ["327", "438", "437", "548", "327x", "32"]
    assert many(prompts=["395="] * 6, completions=texts) == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    task = Task.of("many-5")
    prompts = task.prompts("test", 50, 0)
    right = probe_places.reward_of(task)(prompts=prompts, completions=[task.answer(one) for one in prompts])
    assert right == [1.0] * 50


def test_a_place_is_probed(tmp_path: Path) -> None:
    teacher, student = make_untrained_pair(tmp_path / "pair")
    for name, model in (("teacher-50", teacher), ("student-2", student)):
        shutil.copytree(model, tmp_path / "sums-4" / name)
    found = probe_places.look(("sums-4", "teacher-50", "student-2"), tmp_path, 3, 2)
    assert found.keys() == probe_places.NUMBERS.keys()
    assert all(math.isfinite(number) for number in found.values())
    assert probe_places.places(read_runs(probe_places.RUNS), tmp_path) == []


def test_ranks_are_what_is_correlated() -> None:
    table = [{"gain": gain, "x": x} for gain, x in ((1.0, 10.0), (2.0, 1000.0), (3.0, 11.0), (9.0, 1001.0))]
    assert probe_places.correlate(table, "x") == pytest.approx(0.8)


def test_the_document_has_the_correlations_of_the_stored_numbers() -> None:
    stored = probe_places.RUNS.with_name("probe_places.jsonl").read_text().splitlines()
    table = [json.loads(line) for line in stored]
    lines = (ROOT / "docs" / "probe.md").read_text().replace("*", "").splitlines()
    for number in probe_places.NUMBERS:
        found = [f"{probe_places.correlate(some, number):.2f}" for some in (table[::2], table[1::2], table)]
        assert f"| {number} | {' | '.join(found)} |" in lines
