"""Bounds on learning: short runs end where those of eight seeds ended, so that a change that harms it is seen.

A seed ends at the same number at every run on one build of torch. The bands are five deviations wide to either side,
as another build rounds otherwise and then is another seed. They are what `tests/checks/learning_bands.py` prints.
"""

from __future__ import annotations

from pathlib import Path
from statistics import mean

import pytest

import pair as embedded
from helpers.learning import BANDS, DEMO, STACK, end_of_demo, end_of_stack


@pytest.mark.parametrize("arm", DEMO)
def test_a_run_of_the_demo_ends_in_its_band(made: embedded.PairFolders, tmp_path: Path, arm: str) -> None:
    """RAFT on the mixture, and GRPO with half of each group from it, on the transformers backend."""
    band, end = BANDS[arm], end_of_demo(made, tmp_path, arm, seed=0)
    assert band.low <= end <= band.high, f"ended at {end:.3f}, wanted {band.low:.3f} to {band.high:.3f}"


@pytest.mark.parametrize("arm", STACK)
def test_a_stacks_runs_end_in_their_band(made: embedded.PairFolders, tmp_path: Path, arm: str) -> None:
    """Distillation and filtered imitation on the mixture's samples, by the package's solver and losses."""
    band = BANDS[arm]
    end = mean(end_of_stack(made, tmp_path, arm, band.runs))
    assert band.low <= end <= band.high, f"ended at {end:.3f}, wanted {band.low:.3f} to {band.high:.3f}"


def test_no_band_holds_the_student_as_it_was() -> None:
    """A run that learns nothing ends at 0.019, with a standard error of 0.003."""
    assert all(band.low > 0.04 for band in BANDS.values())
