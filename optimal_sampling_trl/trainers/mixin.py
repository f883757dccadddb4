"""What our trainers add to TRL's: the engine, the records in the batch, the correction and the metrics."""

from __future__ import annotations

import copy
import inspect
import json
import logging
import re
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import Lock
from ..losses import effective_sample_size
from ..pairing import with_system_prompt
from ..rollouts.rollout import RECORDS, Rollout
from .config import correction_of
from .engines.base import MixtureGeneration, MixturePlan, on_all_ranks
from .engines.seam import build_generation, engine_replaced_by
from .generator import OptimalSamplingGenerator
from .report import FigureCallback, send_histograms

logger = logging.getLogger(__name__)

QUANTILES = (0.1, 0.5, 0.9)
PARTS = re.compile(r"checkpoint-(\d+)")
LOCK = "_training.lock"
"""Held in `output_dir` while a trainer trains; the Hub is not sent what begins with an underscore."""


TrlTrainer: Any = object
"""One of TRL's trainers, which comes after the mixin in the order of a class's methods."""


class MixtureTrainerMixin(TrlTrainer):
    """Goes before one of TRL's trainers among the bases of a class.

    `rollouts` holds those of the last batch, for callbacks; `histograms` the values (N,) over the tokens of the
    mixture in it, of all processes, until they are logged.

    A subclass says what a configuration is (`config_class`), which share of a group is the student's own unless the
    user says so (`default_theta_fraction`), and how its loss uses the records (`_correct`).
    """

    config_class: type
    default_theta_fraction: float
    rollouts: Sequence[Rollout] = ()

    def __init__(self, model: Any, *positional: Any, generator: OptimalSamplingGenerator, **keywords: Any) -> None:
        names = inspect.signature(super().__init__).parameters  # of TRL's trainer: model, ..., args, ...
        keywords |= dict(zip(list(names)[1:], positional))
        args = keywords.pop("args", None)
        if not isinstance(generator, OptimalSamplingGenerator):
            raise ValueError(
                f"`generator` is {generator!r}; wanted an `OptimalSamplingGenerator(teacher=...)`. "
                "For rollouts from the model alone use TRL's own trainer."
            )
        for name in ("tools", "rollout_func", "environment_factory"):
            if keywords.get(name) is not None:
                raise ValueError(
                    f"`{name}` is not supported with rollouts from the mixture: the records would not match the "
                    "tokens. Drop it, or use TRL's own trainer."
                )
        self.generator = generator
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            args = self.config_class(f"{name.rstrip('/').split('/')[-1]}-{self._name}")
        self.correction = correction_of(args)
        args = copy.copy(args)
        args.use_vllm = True  # what TRL calls any engine beside the trainer
        self.args = args
        self._check_settings()
        with engine_replaced_by(type(self), self._build_generation):
            super().__init__(model, args=args, **keywords)
        self.histograms: dict[str, Tensor] = {}
        self.callback_handler.callbacks.insert(0, FigureCallback(self))  # before those that close the loggers

    def _build_generation(self, **trl_arguments: Any) -> MixtureGeneration:
        """What TRL calls to build its engine, once, while its `__init__` runs."""
        plan = MixturePlan(
            generator=self.generator,
            group=self._group_size,
            theta_count=self._theta_count,
            training=lambda: self.model.training,
            progress=lambda: self.state.global_step / max(self.state.max_steps, 1),
        )
        return build_generation(plan, self._loaded_teacher(), **trl_arguments)

    def _loaded_teacher(self) -> Any:
        """The teacher that the trainer holds itself, for the transformers backend to share; None where it has none."""
        return None

    def train(self, resume_from_checkpoint: Any = None, *positional: Any, **keywords: Any) -> Any:
        """TRL's own, while no other trainer writes to `output_dir`: two would mix their checkpoints.

        Args:
            resume_from_checkpoint: as TRL's; True takes the last checkpoint that is whole, where TRL's takes the last,
                also one that a kill left without its end.

        Raises:
            RuntimeError: where another trainer trains into the folder, in all processes.
            ValueError: where no checkpoint is whole.
        """
        with ExitStack() as stack:
            on_all_ranks(lambda: self._lock_folder(stack), self.accelerator)
            if resume_from_checkpoint is True:
                resume_from_checkpoint = last_whole_checkpoint(self.args.output_dir)
            return super().train(resume_from_checkpoint, *positional, **keywords)

    def _lock_folder(self, stack: ExitStack) -> None:
        if not self.args.should_save or self.args.output_dir is None:
            return
        folder = Path(self.args.output_dir)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(Lock(folder / LOCK, f"the trainer's `output_dir` {str(folder)!r}"))
        except (ImportError, OSError) as error:
            logger.warning("The folder %s is not locked against a second trainer: %s", folder, error)

    def close(self) -> None:
        """Free the engine. The trainer can be used for all but sampling after."""
        self.vllm_generation.close()

    def _group_size(self) -> int:
        """How many completions make a group, of which `theta_fraction` is a share."""
        raise NotImplementedError

    def _theta_count(self) -> int:
        return self.generator.theta_count(self._group_size(), self.default_theta_fraction)

    def _check_settings(self) -> None:
        """Refuse settings that would do nothing, before anything is loaded; a subclass adds its own."""
        self._theta_count()
        if getattr(self.args, "use_transformers_continuous_batching", False):
            raise ValueError("`use_transformers_continuous_batching` is for TRL's own rollouts. Drop it.")

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """TRL's batch with the records: `alpha`, `log_q`, `log_theta`, `log_teacher` (B, T), 0 on padding, and
        `mixture_rows` (B,), True where a completion comes from the mixture. TRL's shuffle and split carry them."""
        self._own_inputs = inputs
        output = super()._generate_and_score_completions(self._with_system_prompts(inputs))
        rollouts = self.rollouts = self.vllm_generation.pop_rollouts()
        output.update(stack_records(rollouts, output["completion_ids"]))
        if self.model.training:
            self._correct(output)
        self._log_records(output, rollouts)
        return output

    def _with_system_prompts(self, inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The student's prompts go to TRL, the teacher's, tokenized as TRL would, straight to the engine."""
        generator = self.generator
        self.vllm_generation.teacher_prompts = None
        if generator.two_prompts:
            theirs = [with_system_prompt(example["prompt"], generator.teacher_system_prompt) for example in inputs]
            self.vllm_generation.teacher_prompts = self._tokenize_prompts(theirs)[0]
        own = generator.theta_system_prompt
        return [{**example, "prompt": with_system_prompt(example["prompt"], own)} for example in inputs]

    def _correct(self, output: dict[str, Any]) -> None:
        raise NotImplementedError

    def _log_records(self, output: dict[str, Any], rollouts: list[Rollout]) -> None:
        """Means over the tokens of all processes; α, the ratios and the divergences over the mixture's alone."""
        log = self._metrics["train" if self.model.training else "eval"]
        mask = output["completion_mask"].bool()
        tokens = torch.tensor([sum(len(r.completion_ids) for r in rollouts), 0.0], device=mask.device)
        tokens[1] = self.vllm_generation.seconds
        count, seconds = self.accelerator.gather(tokens).view(-1, 2).unbind(1)
        log["mixture/tokens_per_second"].append(float(count.sum() / seconds.max().clamp(min=1e-9)))
        if (trainer := output.get("old_per_token_logps")) is not None:
            difference = self._gathered((trainer - output["log_theta"]).abs(), mask)
            log["engine/log_theta_difference"].append(float(difference.mean()))
        elif (whole := output.get("old_logps")) is not None:  # RLOO's: (B,), so a completion's difference per token
            length = mask.sum(1, keepdim=True)
            distance = ((output["log_theta"] * mask).sum(1, keepdim=True) - whole[:, None]).abs()  # (B, 1)
            difference = self._gathered(distance / length.clamp(min=1), length > 0)
            log["engine/log_theta_difference"].append(float(difference.mean()))
        if not self.model.training:
            return
        mixed = mask & output["mixture_rows"][:, None]
        alpha, log_q, log_theta, log_teacher = (self._gathered(output[name], mixed) for name in RECORDS)
        if not len(alpha):  # the schedule has arrived at the student, or theta_fraction is 1
            return
        log["alpha/mean"].append(float(alpha.mean()))
        for share, value in zip(QUANTILES, quantiles(alpha, QUANTILES), strict=True):
            log[f"alpha/q{int(100 * share)}"].append(value)
        log["mixture/kl_theta"].append(float((log_q - log_theta).mean()))
        log["mixture/kl_teacher"].append(float((log_q - log_teacher).mean()))
        log["mixture/ess"].append(float(effective_sample_size((log_theta - log_q).exp()) / len(alpha)))
        self.histograms = {"alpha/tokens": alpha, "mixture/log_weight": log_theta - log_q}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL's, and after it the histograms of the last batch to the loggers that have them."""
        super().log(logs, start_time)
        send_histograms(self, self.histograms)
        self.histograms = {}

    def _gathered(self, values: Tensor, mask: Tensor) -> Tensor:
        """The values (B, T) where `mask` holds, of all processes, in one dimension."""
        marked = values.float().masked_fill(~mask, torch.nan)
        every = self.accelerator.gather(self.accelerator.pad_across_processes(marked, dim=1, pad_index=torch.nan))
        return every[~every.isnan()]


def quantiles(values: Tensor, shares: Sequence[float]) -> list[float]:
    """The quantiles of values (N,), linear between neighbours; `Tensor.quantile` refuses more than 2^24 values."""
    ordered = values.double().sort().values
    places = [share * (len(ordered) - 1) for share in shares]
    return [float(torch.lerp(ordered[int(p)], ordered[min(int(p) + 1, len(ordered) - 1)], p % 1)) for p in places]


def stack_records(rollouts: list[Rollout], completion_ids: Tensor) -> dict[str, Tensor]:
    """The records of rollouts as (B, T) tensors beside TRL's padded `completion_ids` (B, T).

    Raises:
        RuntimeError: where TRL's completions are not the rollouts' own.
    """
    B, T = completion_ids.shape
    if len(rollouts) != B:
        raise RuntimeError(f"The batch has {B} completions, but {len(rollouts)} were sampled for it.")
    records, sampled = torch.zeros(len(RECORDS), B, T), completion_ids.tolist()
    for row, rollout in enumerate(rollouts):
        length = len(rollout.completion_ids)
        if sampled[row][:length] != rollout.completion_ids:
            raise RuntimeError(
                f"Completion {row} of the batch is not the one that was sampled for it, so its record does not belong "
                "to it. Does a subclass or a callback of the trainer change completions?"
            )
        records[:, row, :length] = torch.stack([getattr(rollout, name) for name in RECORDS])
    mixed = torch.tensor([not rollout.mixture.is_theta_only for rollout in rollouts])
    stacked = dict(zip(RECORDS, records.unbind(0), strict=True)) | {"mixture_rows": mixed}
    return {name: tensor.to(completion_ids.device) for name, tensor in stacked.items()}


def last_whole_checkpoint(output_dir: str | None) -> str:
    """The folder of the last checkpoint whose state, which is written last, is there.

    Raises:
        ValueError: where there is none.
    """
    found = {path: PARTS.fullmatch(path.name) for path in Path(output_dir or ".").glob("checkpoint-*")}
    for path in sorted((path for path, name in found.items() if name), key=lambda p: int(found[p][1]), reverse=True):  # type: ignore[index]
        try:
            json.loads((path / "trainer_state.json").read_text())
            return str(path)
        except (OSError, ValueError):
            logger.warning("The checkpoint %s is not whole: a kill came while it was written. It is left out.", path)
    raise ValueError(
        f"`resume_from_checkpoint` is True, but {str(output_dir)!r} has no whole checkpoint. Name one, or train anew."
    )
