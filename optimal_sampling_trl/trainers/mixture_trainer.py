"""The part that all trainers of this package share: engine, records in the batch, correction."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .. import metrics
from ..options import check_choice
from ..pairing import rope_kinds
from ..rollouts.dense import Dense
from ..rollouts.rollout import Rollout
from ..user_warnings import warn_user
from . import columns
from .batch_metrics import BatchMetrics
from .card import TAG, complete_card
from .checkpoints import keep_settings, last_whole_checkpoint, lock_folder, warn_of_other_settings
from .config import check_kind, correction_of
from .dense_config import dense_of, joined
from .engines.base import MixtureGeneration, MixturePlan, check_generation_kwargs, on_all_ranks
from .engines.endings import endings_known
from .engines.seam import build_generation, engine_replaced_by
from .engines.student_checks import check_head, check_teacher_apart, named_in_words
from .generator import OptimalSamplingGenerator, check_generator
from .guard import ROWS, TOKENS, WeightGuard, bound_of, check_padding, dropout_of, log_theta_of
from .loggers import FigureCallback
from .presets import with_preset
from .prompts import check_columns, has_teacher_prompts
from .records import Turns, loss_mask, stack_dense, stack_records
from .several_turns import SeveralTurns
from .summary import print_summary
from .table import complete_table
from .unread import TOOL_TURNS, unread_settings, warn_of_unread, warn_without_mixture

VLLM_MODES = ("colocate", "server")


class MixtureTrainer(BatchMetrics, SeveralTurns):
    """Base of the trainers: it stands before one of TRL's trainers among the bases of a class.

    A subclass names its configuration (`config_class`), the share of a group that the student samples unless the user
    sets one (`default_theta_fraction`), and uses the records in its loss (`_correct`).

    Of TRL's trainers it and its own bases override:

    - `__init__`: settings are refused before a model is loaded, and TRL builds our engine in place of vLLM's.
    - `train`: a folder has one trainer at a time, and a run is resumed from a checkpoint that is whole.
    - `_save_checkpoint`: the generator's settings are kept beside the weights.
    - `create_model_card`: the card says what the rollouts came from.
    - `_set_signature_columns_if_needed`: the teacher's prompts of a data set are kept.
    - `_tokenize_prompts`: an error of a chat template is explained.
    - `_generate_single_turn`, `_tool_call_loop`: processes that share an engine sample equally many turns.
    - `_generate_and_score_completions`: the records are put beside TRL's batch, compared, weighed and logged.
    - `evaluation_loop`: an evaluation samples from the weights as they are now, and reports its own numbers.
    - `log`: histograms of the last batch go out with the numbers.

    Attributes:
        rollouts: the rollouts of the last batch, for callbacks; a completion of several turns has one for each.
        advantages: what the loss multiplies each of them with, the mean over its completion's tokens; empty where it
            has none.
    """

    config_class: type
    default_theta_fraction: float
    rollouts: Sequence[Rollout] = ()
    advantages: Sequence[float] = ()
    _tag_names: list[str]  # TRL's, of the model and its card

    def __init__(self, *, model: Any, generator: OptimalSamplingGenerator | None, args: Any, **trl_arguments: Any):
        self.generator = with_preset(check_generator(generator), getattr(args, "preset", None))
        trl_arguments = self._take_turn_makers(trl_arguments)
        if args is not None:
            check_kind(args, self.config_class)
        else:
            name = model if isinstance(model, str) else model.config._name_or_path
            args = self.config_class(f"{name.rstrip('/').split('/')[-1]}-{self._name}")
        self.correction = correction_of(args)
        data = [trl_arguments.get("train_dataset"), trl_arguments.get("eval_dataset")]
        if trl_arguments.get("environment_factory") is None:  # an environment may have the prompts
            check_columns(data[0], "train_dataset")
            check_columns(data[1], "eval_dataset")
        self.has_teacher_prompts = has_teacher_prompts(*data)
        is_known = getattr(data[0], "column_names", None) is not None
        self.may_have_teacher_prompts = self.has_teacher_prompts or not is_known
        args = copy.copy(args)
        args.use_vllm = True  # TRL's word for any engine beside the trainer
        self.args = args
        self._check_settings()
        self._tag_names = [*type(self)._tag_names, TAG]
        try:
            with named_in_words(model, args.model_init_kwargs), engine_replaced_by(type(self), self._build_generation):
                super().__init__(model=model, args=args, **trl_arguments)
        except BaseException:  # a notebook keeps the error, and with it an engine that stays open
            if hasattr(self, "vllm_generation"):
                self.close()
            raise
        self.guard = WeightGuard(self._rounding(), self._setting("log_theta_tolerance"))
        self._guarded = 0  # the push whose first batch was compared last
        self._warn_of_noise()
        self.callback_handler.callbacks.insert(0, FigureCallback(self))  # before those that close the loggers

    def _build_generation(self, **trl_arguments: Any) -> MixtureGeneration:
        """Build the engine; TRL calls this once, while its `__init__` runs."""
        check_teacher_apart(self.generator.teacher, trl_arguments["model"])
        check_head(trl_arguments["model"])
        plan = MixturePlan(
            generator=self.generator,
            group=self._group_size,
            theta_count=self._theta_count,
            one_prompt=self._groups_share_prompts(),
            training=lambda: self.model.training,
            progress=self._progress,
            step=lambda: self.state.global_step,
            dense=self._dense_wish,
            teacher_prompts=self.has_teacher_prompts,
            entropy_scale=self._entropy_scale,
            evaluation_reads_teacher=self._evaluation_reads_teacher(),
            will_evaluate_alone=self._will_evaluate_alone(),
        )
        first_lengths = on_all_ranks(self._check_shapes, self.accelerator)
        self.vllm_generation = engine = build_generation(plan, self._loaded_teacher(), **trl_arguments)
        self._share_teacher_tokenizer(engine)
        on_all_ranks(lambda: self._check_lengths(first_lengths, engine), self.accelerator)
        warn_of_unread(self.args, engine.unread_settings())
        return engine

    def _progress(self) -> float:
        """Share of training that is done, in [0, 1]."""
        return self.state.global_step / max(self.state.max_steps, 1)

    def _dense_wish(self) -> Dense | None:
        """Dense records that the next batch carries: those that the loss reads, and those that the user asks for."""
        wish, pair = self._dense_of_loss(), self.vllm_generation.pair
        if wish is not None and pair is not None:
            wish = replace(wish, top_k=min(wish.top_k, pair.vocabulary))
        return joined(self.generator.dense, wish)

    def _dense_of_loss(self) -> Dense | None:
        return dense_of(self.args)

    def _evaluation_reads_teacher(self) -> bool:
        """True where the loss of an evaluation reads log t of the sampled tokens; elsewhere it is NaN there."""
        return False

    def _will_evaluate_alone(self) -> bool:
        reads = self._evaluation_reads_teacher() or joined(self.generator.dense, self._dense_of_loss()) is not None
        return self.args.eval_strategy != "no" and not reads

    def _loaded_teacher(self) -> Any:
        """Teacher that the trainer has loaded, for the transformers backend to share; None where it has none."""
        return None

    def train(self, resume_from_checkpoint: Any = None, *positional: Any, **keywords: Any) -> Any:
        """Train as TRL does, while no other trainer writes to `output_dir`: two would mix their checkpoints.

        Args:
            resume_from_checkpoint: as TRL's; True takes the last checkpoint that is whole, where TRL takes the last,
                even one that a kill left without its end. One that was trained with other settings of the generator
                is told in a warning.

        Raises:
            RuntimeError: where another trainer trains into the folder, in all processes.
            ValueError: where no checkpoint is whole, or the data set has too few rows for one batch; of a stream
                that is known at its end.
        """
        self._check_rows()
        with ExitStack() as stack:
            on_all_ranks(lambda: self._lock_folder(stack), self.accelerator)
            self._push_before_sampling()
            if resume_from_checkpoint is True:
                resume_from_checkpoint = last_whole_checkpoint(self.args.output_dir)
            if resume_from_checkpoint and self.accelerator.is_main_process:
                warn_of_other_settings(Path(resume_from_checkpoint), self.generator)
            print_summary(self)
            output = super().train(resume_from_checkpoint, *positional, **keywords)
        if self.state.global_step == 0 < self.state.max_steps:
            raise ValueError(
                "Training ended without a step: `train_dataset`, a stream, has fewer rows than a batch takes. Pass "
                "more rows, or lower `per_device_train_batch_size` or `gradient_accumulation_steps`."
            )
        return output

    def _check_rows(self) -> None:
        """Refuse a data set without the rows of one batch: TRL leaves an incomplete one out, and would end at once."""
        if not hasattr(self.train_dataset, "__len__"):
            return
        wanted = getattr(self._get_train_sampler(), "batch_size", 0)
        if (found := len(self.train_dataset)) < wanted:
            raise ValueError(
                f"`train_dataset` has {found} rows, and a batch takes {wanted} different ones: there would be no "
                "step. Pass more rows, or lower `per_device_train_batch_size` or `gradient_accumulation_steps`."
            )

    def _lock_folder(self, stack: ExitStack) -> None:
        if self.args.should_save and self.args.output_dir is not None:
            lock_folder(Path(self.args.output_dir), stack)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save TRL's checkpoint with the generator's settings in it, before the state that makes it whole."""
        if self.args.should_save:
            folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            keep_settings(folder, self.generator)
        super()._save_checkpoint(model, trial)

    def create_model_card(self, *positional: Any, **keywords: Any) -> None:
        """Write TRL's card, and add what the rollouts came from."""
        super().create_model_card(*positional, **keywords)
        if self.is_world_process_zero():
            complete_card(Path(self.args.output_dir) / "README.md", self)

    def close(self) -> None:
        """Free the engine. Afterwards the trainer can do all but sample."""
        self.vllm_generation.close()

    def _group_size(self) -> int:
        """Number of completions in a group, of which `theta_fraction` is a share."""
        raise NotImplementedError

    def _groups_share_prompts(self) -> bool:
        """True where the completions of a group are of one prompt."""
        return True

    def _theta_count(self) -> int:
        return self.generator.theta_count(self._group_size(), self.default_theta_fraction)

    def _trains_on_mixture(self) -> bool:
        """True where the mixture samples some completions of a group."""
        return self._theta_count() < self._group_size()

    def _theta_rows(self) -> Tensor:
        """True in the rows of all processes (rows,) that the student samples alone, by the plan of this batch."""
        processes = self.accelerator.num_processes
        rows = len(self._dataset_rows) * processes
        mixtures = self.vllm_generation.plan.mixtures(rows, 0, processes)
        return torch.tensor([mixture.is_theta_only for mixture in mixtures], device=self.accelerator.device)

    def _setting(self, name: str) -> Any:
        """Return a field of our configuration; its default where the configuration is TRL's, which lacks it."""
        return getattr(self.args if hasattr(self.args, name) else self.config_class, name)

    def _check_settings(self) -> None:
        """Refuse settings that contradict each other, and warn of those that do nothing, before anything is loaded.

        A subclass adds its refusals.
        """
        trains_on_mixture = self._trains_on_mixture()
        if self.generator.two_prompts or self.has_teacher_prompts:
            self._check_two_prompts()
        check_choice("vllm_mode", self.args.vllm_mode, VLLM_MODES)
        if self.generator.is_own_teacher:
            self._check_own_teacher()
        self.generator.check_engine_arguments()
        check_generation_kwargs(self.args.generation_kwargs or {})
        if self.args.max_completion_length is None and "max_tokens" not in (self.args.generation_kwargs or {}):
            raise ValueError(
                "`max_completion_length` is None; wanted a whole number of at least 1: room for that many records is "
                "made for each completion. Set it, at most to what the models' context leaves beside a prompt."
            )
        if getattr(self.args, "use_transformers_continuous_batching", False):
            raise ValueError("`use_transformers_continuous_batching` is for TRL's own rollouts. Drop it.")
        self._check_turns()
        unread = unread_settings(self.args)
        if self.calls_tools:
            unread.pop(TOOL_TURNS, None)
        warn_of_unread(self.args, unread)
        if not trains_on_mixture:
            warn_without_mixture(self.generator, self.args)

    def _check_own_teacher(self) -> None:
        """Refuse the teacher `"student"` where their mixture would be the student itself."""
        if self.generator.is_the_student and not (self.generator.two_prompts or self.may_have_teacher_prompts):
            raise ValueError(
                "`teacher` is 'student', and both read the same prompt: their mixture is the student itself. Add a "
                "column `teacher_prompt` to the data set, set `teacher_system_prompt`, or keep the teacher as it was "
                "before training: `teacher_refresh='never'`."
            )

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """Add the records of `stack_records` to TRL's batch, whose shuffle and split carry them with their rows."""
        self._dataset_rows = inputs
        if self._last_loaded_step == self.state.global_step and self.vllm_generation.has_changed():
            self._push_before_sampling()
        with endings_known(self):
            output = super()._generate_and_score_completions(self._with_own_prompts(inputs))
        if "longrope" in rope_kinds(self.model.config.get_text_config()):
            width = output["prompt_ids"].shape[1] + output["completion_ids"].shape[1]
            on_all_ranks(lambda: check_padding(self.model.config, width), self.accelerator)
        turns = self.vllm_generation.pop_turns()
        self.rollouts = [rollout for of_row in turns for rollout in of_row]
        output.update(stack_records(turns, output))
        if self._dense_wish() is not None:
            read = self._dense_of_loss()
            output.update(stack_dense(turns, output["completion_ids"], read.top_k if read else 0))
        self._guard_weights(turns, output)
        self._weigh(output)
        if self.model.training:
            self._correct(output)
        self._log_batch(output)
        if (trained_on := self._trained_on(output)) is not None:
            means = complete_table(self._logs, trained_on, loss_mask(output).bool(), turns)
            self.advantages = [mean for mean, of_row in zip(means, turns, strict=True) for _ in of_row]
        return output

    def evaluation_loop(self, *positional: Any, **keywords: Any) -> Any:
        """Evaluate or predict as TRL does, with the weights as they are now: a checkpoint may have been loaded."""
        self._push_before_sampling()
        return super().evaluation_loop(*positional, **keywords)

    def _push_before_sampling(self) -> None:
        """Let TRL push the weights before the next rollouts: it does so in another step than that of the last push."""
        self._last_loaded_step = -1

    def _rounding(self) -> float:
        """Difference of log θ that rounding explains in this run."""
        types = {parameter.dtype for parameter in self.model.parameters()} | self.vllm_generation.types()
        mixed = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.accelerator.mixed_precision)
        return bound_of([*types, *([mixed] if mixed else [])], self.accelerator.device)

    def _noise(self) -> list[str]:
        """Name what makes the student's log θ noisy while it trains, each with its size."""
        neftune = self.args.neftune_noise_alpha
        return dropout_of(self.model) + ([f"neftune_noise_alpha {neftune:g}"] if neftune else [])

    def _warn_of_noise(self) -> None:
        if noise := self._noise():
            warn_user(
                f"The student has dropout or noise ({', '.join(noise)}): the trainer's log θ is taken with it, the "
                f"rollouts' without, so that ratios of the two are noisy and `{metrics.LOG_THETA_DIFFERENCE}` is no "
                "rounding. Set dropout to 0 in the configurations of the model and of the adapter; "
                "`disable_dropout=True` switches off what is a module. Drop `neftune_noise_alpha`.",
            )

    def _guard_weights(self, turns: Turns, output: dict[str, Any]) -> None:
        """Compare the engine's log θ with the trainer's, on the first batch after each push of weights.

        Of a completion's turns the first is read: where processes share the student each has to run it equally often,
        and they differ in the number of turns.
        """
        if self._guarded == self.vllm_generation.pushes:
            return
        self._guarded = self.vllm_generation.pushes
        noise = self._noise()
        of_tokens = output.get("old_per_token_logps")
        if of_tokens is not None and not (noise and self.model.training):
            mask = loss_mask(output).bool()
            engine, trainer = output[columns.LOG_THETA][mask], of_tokens[mask]
        else:  # TRL computed none, or a noisy one
            few = [of_row[0] for of_row in turns[:ROWS]]
            trainer = log_theta_of(self.model, [one.theta_prompt_ids for one in few], few, self.temperature)
            engine = torch.cat([one.log_theta[:TOKENS] for one in few]).to(trainer.device)
        both = torch.stack([engine, trainer.float()], dim=1)  # (N, 2)
        every = self.accelerator.gather(self.accelerator.pad_across_processes(both, pad_index=torch.nan)).float()
        hints = [f"the student has dropout or noise ({', '.join(noise)})"] if noise else []
        engine, trainer = every[~every.isnan().all(1)].unbind(1)  # of all processes
        self.guard.bound = self._rounding()  # a full evaluation in bfloat16 has cast the model
        self.guard.check(engine, trainer, hints)

    def _weigh(self, output: dict[str, Any]) -> None:
        """Put weights into the batch that the loss reads in evaluation too; by default there are none."""

    def _correct(self, output: dict[str, Any]) -> None:
        """Put the weights or advantages into the batch that the loss of the subclass reads."""
        raise NotImplementedError

    def _trained_on(self, output: dict[str, Any]) -> Tensor | None:
        """Factors of each completion (B,) or token (B, T) in the loss; None where TRL's table has no advantage."""
        return output.get("advantages")

    def _correction_weights(self, output: dict[str, Any], inclusive: bool = True) -> Tensor:
        """Weights (B, T) of the correction for a batch; the mean that some are divided by is that of all processes."""
        return self.correction.weights(
            output[columns.LOG_THETA],
            output[columns.LOG_Q],
            loss_mask(output).float(),
            output[columns.MIXTURE_ROWS],
            inclusive=inclusive,
            total=self.accelerator.reduce,
        )
