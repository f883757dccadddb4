"""The metrics arrive where TRL's own do: in TensorBoard, under TRL's prefix, one value a step; so do the histograms
of α and of the weights, and the figures."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset

from helpers.children import run
from helpers.training import TEXTS, Watch, make_trainer, make_untrained_pair, one_batch
from optimal_sampling_trl import metrics
from optimal_sampling_trl.trainers.loggers import FigureCallback, send_histograms

METRICS = (
    metrics.ALPHA_MEAN,
    *metrics.ALPHA_QUANTILES,
    metrics.SAMPLE_SIZE,
    metrics.KL_THETA,
    metrics.KL_TEACHER,
    metrics.ACCEPTANCE,
    metrics.REWARD_THETA,
    metrics.REWARD_MIXTURE,
    metrics.GROUPS_WITH_SIGNAL,
    metrics.TOKENS_PER_SECOND,
    metrics.LOG_THETA_DIFFERENCE,
)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return make_untrained_pair(tmp_path_factory.mktemp("pair"))


@pytest.mark.parametrize("kind", ["grpo", "rloo"])
def test_metrics_reach_tensorboard(
    pair: tuple[str, str], tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    trainer = make_trainer(kind, pair, tmp_path, max_steps=2, report_to="tensorboard")
    trainer.train()
    written = accumulator.EventAccumulator(str(tmp_path / "logs")).Reload()
    history = [entry for entry in trainer.state.log_history if "alpha/mean" in entry]
    assert [entry["step"] for entry in history] == [1, 2]
    for name in METRICS:
        events = written.Scalars(f"train/{name}")
        assert [event.step for event in events] == [1, 2], name
        for event, entry in zip(events, history, strict=True):
            assert math.isfinite(event.value), name
            assert event.value == pytest.approx(entry[name], rel=1e-6), name  # TensorBoard keeps float32


def test_histograms_and_figures_reach_tensorboard(
    pair: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A histogram at each log, of the tokens that the mixture sampled in that batch: as many, with their sum and
    their ends; an evaluation between adds none. The two figures at the end are PNGs."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    trainer = make_trainer(
        "grpo",
        pair,
        tmp_path,
        mixin=Watch,
        trainer={"eval_dataset": Dataset.from_dict({"prompt": TEXTS[:4]})},
        max_steps=2,
        report_to="tensorboard",
        eval_strategy="steps",
        eval_steps=1,
        # TRL takes a batch of rollouts for each step
        gradient_accumulation_steps=1,
    )
    trainer.train()
    sizes = {"histograms": 0, "images": 0}
    written = accumulator.EventAccumulator(str(tmp_path / "logs"), size_guidance=sizes).Reload()
    batches = [rollouts for training, _, rollouts in trainer.generations if training]
    alpha, weight = (written.Histograms(f"train/{name}") for name in ("alpha/tokens", "mixture/log_weight"))
    assert [event.step for event in alpha] == [event.step for event in weight] == [1, 2]
    for rollouts, of_alpha, of_weight in zip(batches, alpha, weight, strict=True):
        mixed = [rollout for rollout in rollouts if not rollout.mixture.is_theta_only]
        assert 0 < len(mixed) < len(rollouts)
        for event, values in (
            (of_alpha, torch.cat([rollout.alpha for rollout in mixed])),
            (of_weight, torch.cat([rollout.log_theta - rollout.log_q for rollout in mixed])),
        ):
            told = event.histogram_value
            assert (told.num, sum(told.bucket)) == (len(values), len(values))
            assert told.sum == pytest.approx(float(values.double().sum()), rel=1e-4, abs=1e-4)
            assert (told.min, told.max) == pytest.approx((float(values.min()), float(values.max())), rel=1e-5)
    assert written.Tags()["images"] == ["figures/training", "figures/alpha_over_tokens"]
    for name in written.Tags()["images"]:
        (image,) = written.Images(name)
        assert image.step == 2
        assert image.encoded_image_string.startswith(b"\x89PNG")
        assert min(image.width, image.height) > 300


def test_the_figure_keeps_the_last_rollouts_of_the_mixture(pair: tuple[str, str], tmp_path: Path) -> None:
    """A process that holds a row of a group may have none of the mixture's in its last batch."""
    trainer = make_trainer("grpo", pair, tmp_path, mixin=Watch)
    (figures,) = (each for each in trainer.callback_handler.callbacks if isinstance(each, FigureCallback))
    one_batch(trainer, TEXTS[:1] * 4)
    mixed = [rollout for rollout in trainer.rollouts if not rollout.mixture.is_theta_only]
    figures.on_step_end(trainer.args, trainer.state, trainer.control)
    trainer.rollouts = [rollout for rollout in trainer.rollouts if rollout.mixture.is_theta_only]
    figures.on_step_end(trainer.args, trainer.state, trainer.control)
    assert len(mixed) == 2
    assert figures.rollouts == mixed


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_other_loggers_get_the_same(
    pair: tuple[str, str], tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No service is reached: a stand-in for the logger's module, with the functions that are used, writes down what it
    is given after a training."""
    trainer = make_trainer("sampled_token", pair, tmp_path, mixin=Watch, max_steps=1)
    (figures,) = (each for each in trainer.callback_handler.callbacks if isinstance(each, FigureCallback))
    trainer.train()
    told: list[dict[str, Any]] = []
    stand_in = ModuleType(name)
    vars(stand_in).update(
        log=told.append, run="on", Image=lambda v: ("image", v), Histogram=lambda v: ("histogram", v)
    )
    monkeypatch.setitem(sys.modules, name, stand_in)
    alpha = torch.cat([rollout.alpha for rollout in trainer.rollouts])
    send_histograms(trainer, {"alpha/tokens": alpha})
    assert told == []  # `report_to` does not name it
    trainer.args.report_to = [name]
    send_histograms(trainer, {"alpha/tokens": alpha})
    figures.on_train_end(trainer.args, trainer.state, trainer.control)
    assert [list(entry) for entry in told] == [
        ["train/alpha/tokens"],
        ["figures/training"],
        ["figures/alpha_over_tokens"],
    ]
    kind, values = told[0]["train/alpha/tokens"]
    assert (kind, values.tolist()) == ("histogram", alpha.tolist())
    for entry in told[1:]:
        ((kind, pixels),) = entry.values()
        assert kind == "image"
        assert pixels.shape[2] == 4
        assert len(np.unique(pixels)) > 10  # something is drawn


def test_nothing_is_drawn_without_a_logger(pair: tuple[str, str], tmp_path: Path) -> None:
    """No logger, no work: matplotlib is not even imported."""
    code = f"""
import sys
sys.path[:0] = {sys.path!r}
from pathlib import Path
from helpers.training import make_trainer
make_trainer("grpo", {pair!r}, Path({str(tmp_path)!r}), max_steps=1).train()
assert "optimal_sampling_trl.trainers.loggers" in sys.modules and "matplotlib.figure" not in sys.modules
"""
    done = run([sys.executable, "-c", code])
    assert done.returncode == 0, done.stderr[-3000:]


def test_rloo_measures_the_engines_difference_per_token(pair: tuple[str, str], tmp_path: Path) -> None:
    """TRL gives RLOO a sum for each completion: a log θ that is 0.01 off in the engine's record of each token shows as
    0.01, whatever the lengths; half of it where half of the rows are off; and nothing where nothing is."""
    trainer = make_trainer("rloo", pair, tmp_path)
    take, offset = trainer.vllm_generation.pop_turns, [0.0, 0.0]

    def off() -> Any:
        turns = take()
        for row, (rollout,) in enumerate(turns):
            rollout.log_theta.add_(offset[row % 2])
        return turns

    trainer.vllm_generation.pop_turns = off
    for offsets, wanted in (([0.0, 0.0], 0.0), ([0.01, 0.01], 0.01), ([0.0, -0.01], 0.005)):
        offset[:] = offsets
        trainer._metrics["train"].clear()
        batch = one_batch(trainer, [text for text in TEXTS[:4] for _ in range(4)])
        assert len(batch["completion_mask"].sum(1).unique()) > 1
        assert trainer._metrics["train"]["engine/log_theta_difference"] == pytest.approx([wanted], abs=2e-6)


def test_rloo_leaves_masked_completions_out_of_the_difference(pair: tuple[str, str], tmp_path: Path) -> None:
    """A truncated completion that TRL masks has no token: it is no zero in the mean."""
    trainer = make_trainer("rloo", pair, tmp_path, mask_truncated_completions=True, log_theta_tolerance=1.0)
    take = trainer.vllm_generation.pop_turns

    def off() -> Any:
        turns = take()
        for (rollout,) in turns:
            rollout.log_theta.add_(0.01)
        return turns

    trainer.vllm_generation.pop_turns = off
    batch = one_batch(trainer, [text for text in TEXTS[:8] for _ in range(4)])
    lengths = batch["completion_mask"].sum(1)
    assert bool(torch.any(lengths == 0))
    assert bool(torch.any(lengths > 0))
    assert trainer._metrics["train"]["engine/log_theta_difference"] == pytest.approx([0.01], abs=2e-6)
