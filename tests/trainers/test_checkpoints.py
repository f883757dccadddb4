"""A checkpoint keeps what its rollouts were sampled from, and a training that is resumed with something else says so.

Kills between two checkpoints, and two trainers in one folder: tests/whole/test_faults.py.
"""

from __future__ import annotations

import os
import re
import warnings
from pathlib import Path

import pytest

from helpers.training import load, make_trainer
from optimal_sampling_trl import Mixture
from optimal_sampling_trl.trainers.checkpoints import SETTINGS

SAVED = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}


@pytest.mark.parametrize("kind", ["grpo", "rloo", "divergence", "raft"])
def test_a_run_resumed_with_another_teacher_or_mixture_says_so(
    pair: tuple[str, str], tmp_path: Path, kind: str
) -> None:
    """The settings that differ are named with both values, and training goes on; without the file nothing is said."""
    make_trainer(kind, pair, tmp_path, **SAVED).train()
    teacher, checkpoint = load(pair[1]), tmp_path / "checkpoint-1"
    others = {"teacher": teacher, "mixture": Mixture("trust_region", epsilon=0.1), "schedule": 0.5}
    changed = [
        f"`teacher` was {pair[0]!r}, is {pair[1]!r}",
        "`mixture.method` was 'kl_symmetry', is 'trust_region'",
        "`mixture.epsilon` was 0.05, is 0.1",
        "`schedule` was None, is 0.5",
    ]
    message = f"{str(checkpoint)!r} was trained with other settings of `generator`: {'; '.join(changed)}."
    resumed = make_trainer(kind, pair, tmp_path, generator=others, max_steps=2)
    with pytest.warns(UserWarning, match=re.escape(message)) as seen:
        resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 2
    assert [each.filename for each in seen if "other settings" in str(each.message)] == [__file__]
    (checkpoint / SETTINGS).unlink()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "The checkpoint")
        make_trainer(kind, pair, tmp_path, generator=others, max_steps=2).train(str(checkpoint))


def test_a_run_resumed_with_the_same_settings_says_nothing(pair: tuple[str, str], tmp_path: Path) -> None:
    """Of the teacher's files only their revision counts; the engine, its size and what rollouts carry may change."""
    make_trainer("raft", pair, tmp_path, generator={"theta_fraction": 1 / 3, "schedule": 0.3}, **SAVED).train()
    others = {"theta_fraction": 1 / 3, "schedule": 0.3, "engine_arguments": {"max_num_seqs": 2}}
    others["teacher"] = os.path.relpath(pair[0])  # the same folder
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "The checkpoint")
        make_trainer("raft", pair, tmp_path, generator=others, max_steps=2).train(resume_from_checkpoint=True)
    others["engine_arguments"] = {"revision": "main"}
    resumed = make_trainer("raft", pair, tmp_path, generator=others, max_steps=2)
    with pytest.warns(UserWarning, match=r"`engine_arguments\.revision` was None, is 'main'"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
