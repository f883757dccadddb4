"""Histograms and figures for the loggers of `report_to`, which get the scalars from TRL."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import numpy as np
from torch import Tensor
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback

from .. import metrics
from ..plots import draw_tokens, draw_training
from ..rollouts.rollout import Rollout

RUNS = ("wandb", "trackio")
"""Loggers with `log`, `Histogram` and `Image` of one form; TensorBoard has a writer."""


def send_histograms(trainer: Any, histograms: Mapping[str, Tensor]) -> None:
    """Send histograms to each logger of `report_to` that has them, under TRL's prefix `train/`, at the trainer's step.

    They go to the loggers directly, as TRL's tables of completions do. Loggers without histograms get nothing.

    Args:
        trainer: the trainer that logs.
        histograms: values (N,) by name.
    """
    writer = _writer(trainer)
    for name, values in histograms.items():
        if writer is not None:
            writer.add_histogram(f"train/{name}", values.float().cpu(), trainer.state.global_step)
        for run in _runs(trainer):
            run.log({f"train/{name}": run.Histogram(values.float().cpu().numpy())})


class FigureCallback(TrainerCallback):
    """Sends the figures of `plots` to the loggers at the end of training, where matplotlib is installed.

    It has to come before the callbacks of transformers, which close the loggers.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.rollouts: list[Rollout] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **keywords: Any) -> None:
        # At the end of training `trainer.rollouts` may be an evaluation's; a process with few rows may hold none.
        mixed = [rollout for rollout in self.trainer.rollouts if not rollout.mixture.is_theta_only]
        self.rollouts = mixed or self.rollouts

    def on_train_end(self, args: Any, state: Any, control: Any, **keywords: Any) -> None:
        if not state.is_world_process_zero or find_spec("matplotlib") is None:
            return
        writer, runs = _writer(self.trainer), _runs(self.trainer)
        if writer is None and not runs:
            return
        figures = {}
        if any(metrics.ALPHA_MEAN in entry for entry in state.log_history):
            figures["training"] = draw_training(state.log_history)
        if self.rollouts:
            figures["alpha_over_tokens"] = draw_tokens(self.rollouts)
        for name, figure in figures.items():
            if writer is not None:
                writer.add_figure(f"figures/{name}", figure, state.global_step)
            for run in runs:
                run.log({f"figures/{name}": run.Image(_pixels(figure))})


def _writer(trainer: Any) -> Any:
    """Find TensorBoard's writer, which exists while a run is open, on the process that logs."""
    callbacks = trainer.callback_handler.callbacks
    return next((each.tb_writer for each in callbacks if isinstance(each, TensorBoardCallback)), None)


def _runs(trainer: Any) -> list[Any]:
    """Find the modules of `report_to` that log to a run, on the process that logs; transformers imported them."""
    if not trainer.accelerator.is_main_process:
        return []
    wanted = [sys.modules[name] for name in RUNS if name in (trainer.args.report_to or ()) and name in sys.modules]
    return [module for module in wanted if module.__name__ != "wandb" or module.run is not None]


def _pixels(figure: Any) -> Any:
    """Draw a figure as (height, width, 4) bytes."""
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())
