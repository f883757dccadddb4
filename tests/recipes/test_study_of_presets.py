"""The presets as arms of the stack: what each becomes, the student's own baseline, and the entropy gate's scale."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import presets_arms
import stack_losses
from helpers.paths import RECIPES, ROOT
from optimal_sampling_trl import Mixture
from optimal_sampling_trl.losses import mixture_weight
from optimal_sampling_trl.trainers.presets import PRESETS
from presets_report import Cell, Place, best, places_of, separates, table
from runs import Line
from stage import Stage

STEPS, LENGTH, BATCH = 200, 5, presets_arms.BATCH


def test_every_preset_that_is_compared_is_an_arm_with_its_mixture() -> None:
    arms = presets_arms.arms_of(STEPS)
    assert presets_arms.NAMES.keys() == PRESETS.keys()
    for name in presets_arms.NAMES:
        arm = arms[presets_arms.NAMES[name]]
        assert arm.mixture == Mixture.preset(name)
        assert f"RAFT, {presets_arms.NAMES[name]}'s mixture" in arms
    assert {arm for place in presets_arms.settings_of("sums-40") for arm in place.arms} == set(arms)
    assert arms["MENTOR"].terms == {"reward": 1.0, "own_baseline": 1.0}
    assert arms["Logit Fusion"].terms == {"reward": 1.0, "negatives": 1.0, "ratios": 1.0}
    assert arms["TRB"].terms == arms["MiniLLM"].terms == {"divergence": 1.0}
    assert arms["SKD"].terms == {"forward": 1.0}
    assert (arms["Logit Fusion"].schedule, arms["TRB"].schedule, arms["MiniLLM"].schedule) == (1.0, 0.0625, None)


@pytest.mark.parametrize("name", ["mentor", "skd"])
def test_a_setting_that_the_stack_does_not_know_is_refused(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    changed = dataclasses.replace(PRESETS[name], settings=PRESETS[name].settings | {"beta": 0.1})
    monkeypatch.setitem(PRESETS, name, changed)
    with pytest.raises(ValueError, match=rf"no \{{\('beta', 0.1\)\}} of preset '{name}'"):
        presets_arms.arm_of(name, STEPS)


def test_a_preset_that_leaves_its_divergence_open_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its arm would have no loss."""
    settings = {key: value for key, value in PRESETS["skd"].settings.items() if key != "beta"}
    monkeypatch.setitem(PRESETS, "skd", dataclasses.replace(PRESETS["skd"], settings=settings))
    with pytest.raises(ValueError, match=r"'skd' leaves \['beta'\]"):
        presets_arms.arm_of("skd", STEPS)


def test_the_mixture_of_mentor_is_withdrawn() -> None:
    """8 of 12 completions are the student's, and all of them after 120 updates."""
    stage = Stage([presets_arms.arm_of("mentor", STEPS)], LENGTH, "cpu", BATCH)
    rows, until = stage.mixtures(0.0)
    assert (until[0] > 0).tolist() == ([False] * 8 + [True] * 4) * 6
    assert len(rows.entropy_scale) == BATCH
    for step in (0, 60, 119, 120, 199):
        assert stage.losses(step / STEPS).withdrawn.item() == pytest.approx(1 - mixture_weight(step, 120), abs=1e-6)
        stage.mixtures(step / STEPS)
    assert not stage.mixtures(120 / STEPS)[1].any()


def test_the_gate_follows_the_entropy() -> None:
    """Where α is 1 the scale grows, and where entropies are small it stays at the preset's."""
    stage = Stage([presets_arms.arm_of("mentor", STEPS)], LENGTH, "cpu", BATCH)
    mixed = torch.ones(1, BATCH, LENGTH, dtype=torch.bool)
    stage.note_alpha(torch.ones(1, BATCH, LENGTH), mixed)
    stage.mixtures(0.1)
    assert stage.mixtures(0.1)[0].entropy_scale.tolist() == [3.0] * BATCH
    stage.note_alpha(torch.full((1, BATCH, LENGTH), 0.1), mixed)
    stage.mixtures(0.2)
    assert stage.mixtures(0.2)[0].entropy_scale.tolist() == [1.5] * BATCH


def test_advantages_over_the_students_own_baseline() -> None:
    """Each group by itself, whatever the size of the others'."""
    rewards = torch.tensor([[1.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0, 1.0]])
    mixed = torch.tensor([[False, False, True, True] * 2])
    found = stack_losses.own_advantages(rewards.expand(2, 8), mixed.expand(2, 8), torch.tensor([4, 8]))
    assert found[0].tolist() == pytest.approx([0.7071, -0.7071, 0.5, 0.5, 0.0, 0.0, 0.0, 1.0], abs=1e-3)
    assert found[1].tolist() == pytest.approx([1.5, -0.5, 0.75, 0.75, -0.5, -0.5, -0.25, 0.75], abs=1e-3)


def line(arm: str, rate: float, seed: int, middle: float, end: float) -> Line:
    curve = [[0, 0.0], [1, middle], [2, end]]
    return {"arm": arm, "learning_rate": rate, "seed": seed, "curve": curve, "steps": 2}


def test_each_arm_is_shown_at_its_best_rate_for_the_budget() -> None:
    ends = {1e-4: (0.5, 0.6), 3e-4: (0.1, 0.8), 1e-3: (0.2, 0.3)}
    lines = [line("a", rate, seed, *points) for rate, points in ends.items() for seed in range(2)]
    assert best(lines, "a") == Cell([0.8, 0.8], 3e-4, False, lines[2:4])
    assert best(lines, "a", 0.5) == Cell([0.5, 0.5], 1e-4, True, lines[:2])
    assert best(lines, "b") is None
    assert separates([0.8, 0.8], [0.7, 0.7])
    assert not separates([0.9, 0.7], [0.8, 0.6])
    others = [line("b", 1e-4, seed, 0.1, 0.2) for seed in range(2)]
    place = Place("here", lines + others, {"a": 2.0, "b": 1.0})
    by_completions, by_seconds = (list(table([place], ("a", "b"), equal)) for equal in ("completions", "seconds"))
    assert by_completions[2:] == ["| a | **.800 ± .000** (0.0003) |", "| b | .200 ± .000 (0.0001*) |"]
    assert by_seconds[2:] == ["| a | **.500 ± .000** (0.0001*) |", "| b | .200 ± .000 (0.0001*) |"]


@pytest.mark.parametrize("equal", ["completions", "seconds"])
def test_the_page_holds_the_tables_of_the_stored_runs(equal: str) -> None:
    places = places_of(RECIPES / "studies" / "results")
    page = (ROOT / "docs" / "presets.md").read_text()
    assert "\n".join(table(places, tuple(presets_arms.PAIR), equal)) in page
