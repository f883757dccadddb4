"""Distillation: the teacher and the prompts that TRL's divergence can take, and the losses that are logged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer

from helpers.training import TEXTS, Watch, load, make_trainer, make_untrained_pair


def test_the_divergence_warns_of_endings_of_the_teachers_own(pair: tuple[str, str], tmp_path: Path) -> None:
    other = shutil.copytree(pair[0], tmp_path / "other")
    (other / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 1]}))
    with pytest.warns(
        UserWarning, match=r"also ends with the tokens \[3\], .*or set `loss='dense'` or `loss='sampled_token'`"
    ) as caught:
        make_trainer("divergence", pair, tmp_path, generator={"teacher": str(other)})
    assert "training.py" in {Path(one.filename).name for one in caught}  # the line that builds the trainer


def test_the_divergence_takes_the_generators_teacher_alone(
    pair: tuple[str, str], tmp_path: Path, teacher: Any
) -> None:
    trainer = make_trainer("divergence", pair, tmp_path, trainer={"teacher_model": pair[0] + "/"})
    assert trainer.vllm_generation.backend.teacher is trainer.accelerator.unwrap_model(trainer.teacher_model)
    make_trainer("divergence", pair, tmp_path, generator={"teacher": teacher}, trainer={"teacher_model": teacher})
    with pytest.raises(ValueError, match="wanted one teacher"):
        make_trainer(
            "divergence", pair, tmp_path, generator={"teacher": teacher}, trainer={"teacher_model": load(pair[0])}
        )


def test_a_padded_vocabulary_is_told_of_the_loss_that_takes_it(pair: tuple[str, str], tmp_path: Path) -> None:
    wide = load(pair[0])
    wide.resize_token_embeddings(wide.config.vocab_size + 16)
    wide.save_pretrained(tmp_path / "wide")
    AutoTokenizer.from_pretrained(pair[0]).save_pretrained(tmp_path / "wide")
    own = {"teacher": str(tmp_path / "wide")}
    with pytest.raises(
        ValueError, match=r"vocab_size .*padded to another size will do for `loss='dense'` and `loss='sampled_token'`"
    ):
        make_trainer("divergence", pair, tmp_path, generator=own)
    make_trainer("sampled_token", pair, tmp_path, generator=own)


def test_the_divergence_refuses_two_prompts(pair: tuple[str, str], tmp_path: Path) -> None:
    """TRL's loss reads both models on one prompt: the teacher's own would be ignored without a word."""
    with pytest.raises(ValueError, match=r"reads both models on the student's prompt.*`loss='dense'`"):
        make_trainer("divergence", pair, tmp_path, generator={"teacher_system_prompt": "sort"})


def test_the_loss_of_an_evaluation_falls_with_quality(tmp_path: Path) -> None:
    """Of the sampled tokens: KL(θ‖t) on the student's own samples, which falls on the way to the teacher, so that the
    best checkpoint is the best student. 0 for one that has arrived."""
    pair = make_untrained_pair(tmp_path, same_size=True)
    given = {"eval_dataset": Dataset.from_dict({"prompt": TEXTS[:4] * 8})}
    for clip in (5.0, None):
        settings = {"per_device_eval_batch_size": 32, "sampled_token_clip": clip}
        trainer = make_trainer("sampled_token", pair, tmp_path, mixin=Watch, trainer=given, **settings)
        begin, end, losses = load(pair[1]).state_dict(), load(pair[0]).state_dict(), []
        for way in (0.0, 0.4, 0.8, 1.0):
            between = {name: (1 - way) * begin[name] + way * end[name] for name in begin}
            trainer.model.load_state_dict(between)
            losses.append(trainer.evaluate()["eval_loss"])
            _, _, rollouts = trainer.generations[-1]
            log_ratios = torch.cat([rollout.log_theta - rollout.log_teacher for rollout in rollouts])
            assert losses[-1] == pytest.approx(float(log_ratios.mean()), abs=1e-5)
        assert losses == sorted(losses, reverse=True)
        assert losses[0] > 0.3
        assert abs(losses[-1]) < 1e-5
