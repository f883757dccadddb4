"""On-policy distillation with rollouts from the mixture: TRL's divergence, or losses of what the rollouts carry."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
import trl
from accelerate.utils import broadcast, is_peft_model
from torch import Tensor
from trl.trainer.utils import add_fused_lm_head

from ..losses import sampled_token_coefficients
from ..options import suggest_arguments
from ..pairing.prompts import TEACHER_PROMPT
from ..user_warnings import warn_user
from . import columns
from .config import DistillationConfig
from .dense_head import DenseHead, dense_head
from .dense_term import divergences_of
from .generator import FOR_TRAINERS, check_generator
from .mixture_trainer import MixtureTrainer
from .records import loss_mask
from .trl_divergence import advice_on_vocabularies, weighted_divergence

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftConfig, PeftModel
    from transformers import (
        BitsAndBytesConfig,
        PreTrainedModel,
        PreTrainedTokenizerBase,
        ProcessorMixin,
        TrainerCallback,
    )

    from .generator import OptimalSamplingGenerator

READERS = {
    "beta": ("divergence", "dense"),
    "teacher_model_revision": ("divergence",),
    "teacher_model_init_kwargs": ("divergence",),
    "teacher_model_name_or_path": ("divergence",),
    "dense_top_k": ("dense",),
    "sampled_token_clip": ("sampled_token",),
    "sampled_token_centre": ("sampled_token",),
}
"""The losses that read a field which not all do."""


class DistillationTrainer(MixtureTrainer, trl.DistillationTrainer):
    """TRL's `DistillationTrainer` with `generator=`: rollouts from the mixture of the teacher and the model.

    The loss is TRL's divergence from the teacher, computed over the whole vocabulary, or one of two that need no
    teacher in the trainer, since the rollouts carry what they read: `DistillationConfig(loss="dense")`, the same
    divergence over the likeliest tokens of both models and what is left, and `loss="sampled_token"`, log t of the
    sampled tokens. `theta_fraction` is 0 by default: all rollouts come from the mixture.

    An evaluation samples from the student alone, and `eval_loss` is a divergence a token that falls as the student
    improves: TRL's, the dense one, or for the sampled tokens the estimate log θ − log t of KL(θ‖t). In training the
    `loss` of the sampled tokens has the right gradient and no meaning as a number: read `mixture/kl_theta` and
    `mixture/kl_teacher`.

    Args:
        model, train_dataset, eval_dataset, processing_class, callbacks, optimizers, quantization_config, peft_config:
            as TRL's.
        teacher_model: the generator's teacher, which is the default; no other is taken. The other losses need
            none.
        args: our `DistillationConfig`, or TRL's, which gets the divergence without weights.
        tools: as TRL's (docs/tools.md).
        generator: source of the rollouts; has to be passed.

    Raises:
        ValueError: on a generator that is none, on another teacher than the generator's, and on settings that would do
            nothing, before anything is loaded.

    Example:
        ```python
        trainer = DistillationTrainer(
            model="small",
            generator=OptimalSamplingGenerator(teacher="large"),  # the teacher of the loss as well
            train_dataset=dataset,
        )
        trainer.train()
        ```
    """

    args: Any
    config_class = DistillationConfig
    default_theta_fraction = 0.0

    @suggest_arguments(**FOR_TRAINERS)
    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        teacher_model: str | PreTrainedModel | None = None,
        args: trl.DistillationConfig | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: PeftConfig | None = None,
        tools: list[Callable] | None = None,
        *,
        generator: OptimalSamplingGenerator | None = None,
    ) -> None:
        self.loss = getattr(args, "loss", "divergence")
        with advice_on_vocabularies():
            super().__init__(
                model=model,
                generator=generator,
                args=args,
                teacher_model=self._teacher_of_loss(teacher_model, args, check_generator(generator)),
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                callbacks=callbacks,
                optimizers=optimizers,
                quantization_config=quantization_config,
                peft_config=peft_config,
                tools=tools,
            )
        if self.is_fsdp_enabled and self._loaded_teacher() is not None:
            self._place_teacher()
        if self.loss == "divergence":
            self._warn_of_endings()
        else:
            self._read_head_in_tiles()

    def _teacher_of_loss(self, teacher_model: Any, args: Any, generator: OptimalSamplingGenerator) -> Any:
        """Teacher that TRL loads for its loss; None where the loss reads the rollouts.

        Raises:
            ValueError: where a teacher was passed that the loss does not read, or another than the generator's, as an
                argument or by name in the configuration.
        """
        if self.loss == "divergence":
            named = getattr(args, "teacher_model_name_or_path", None)
            one_teacher(named, generator.named_teacher, "teacher_model_name_or_path")
            return one_teacher(teacher_model, generator.named_teacher)
        if teacher_model is not None:
            raise ValueError(
                f"`loss` is {self.loss!r}, which reads the teacher from the rollouts, and a `teacher_model` was given "
                "as well. Drop it, or set `loss='divergence'`."
            )
        return None

    def _read_head_in_tiles(self) -> None:
        """Compute log-probabilities without logits (B, T, V), as TRL's GRPO does."""
        student: Any = self.model
        student = student.get_base_model() if is_peft_model(student) else student
        add_fused_lm_head(student, temperature=self.temperature, outputs=("log_probs", "entropy"))

    def _warn_of_endings(self) -> None:
        """Warn where the rollouts fold endings of the teacher that TRL's divergence reads as they are."""
        engine: Any = self.vllm_generation
        pair = engine.pair
        if pair is not None and (ending := pair.ending).folded:
            warn_user(
                f"The teacher also ends with the tokens {list(ending.folded)}, and the student does not stop there. "
                f"The rollouts count them for {ending.stop[0]}; TRL's divergence trains the student to draw them. "
                "Give both models the same `eos_token_id`, or set `loss='dense'` or `loss='sampled_token'`.",
            )

    def _loaded_teacher(self) -> Any:
        return getattr(self, "teacher_model", None)

    def _place_teacher(self) -> None:
        """Bring the whole teacher to this process's GPU.

        Under FSDP TRL leaves it on the host (its issue 2580) and does not split it over the processes, and
        transformers loads its weights on the first process only, zeros on the others.
        """
        self.teacher_model.to(self.accelerator.device)
        broadcast([value.detach() for value in self.teacher_model.state_dict().values()])

    def _group_size(self) -> int:
        """Number of completions in a process's batch, which stands for the group that distillation does not have."""
        return self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps

    def _groups_share_prompts(self) -> bool:
        return False

    def _check_settings(self) -> None:
        super()._check_settings()
        self._check_read()
        if self.generator.two_rounds:
            raise ValueError(
                f"{self.generator.two_rounds_setting()}, and distillation has no rewards to compare with it. Drop it, "
                "or use GRPO, RLOO or RAFT."
            )
        if self.loss == "divergence" and self.generator.is_own_teacher:
            raise ValueError(
                "`teacher` is 'student', and TRL's divergence reads a teacher of its own from a folder. Set "
                "`loss='dense'` or `loss='sampled_token'`, which read the recorded log t, or name another teacher."
            )
        if self.loss != "sampled_token" and not self.correction.name.startswith(("none", "prefix")):
            raise ValueError(
                f"`correction` is {self.correction.name!r}; the divergence at a position is exact over the vocabulary "
                "and depends on the tokens before it alone, so wanted 'none' or one of the level 'prefix', "
                "for example 'prefix_truncate'."
            )

    def _check_two_prompts(self) -> None:
        """Refuse two prompts for the divergence, which TRL computes on one."""
        if self.loss != "divergence":
            return
        both = "`teacher_system_prompt` and `theta_system_prompt` differ"
        given = both if self.generator.two_prompts else f"The data set has the column `{TEACHER_PROMPT}`"
        raise ValueError(
            f"{given}, but TRL's divergence reads both models on the student's prompt. Set `loss='dense'` or "
            "`loss='sampled_token'`, which read the recorded log t, or give both one."
        )

    def _check_read(self) -> None:
        """Refuse settings that the loss does not read, and different revisions of the teacher in loss and rollouts."""
        for name, losses in READERS.items():
            default = getattr(DistillationConfig, name)
            if self.loss not in losses and (value := getattr(self.args, name, default)) != default:
                raise ValueError(
                    f"`{name}` is {value!r}, and `loss={self.loss!r}` does not read it. Drop it, or set "
                    f"{' or '.join(f'`loss={loss!r}`' for loss in losses)}."
                )
        revision = (self.generator.engine_arguments or {}).get("revision")
        in_loss = (self.args.teacher_model_init_kwargs or {}).get("revision", self.args.teacher_model_revision)
        if self.loss == "divergence" and self.args.vllm_mode != "server" and revision != in_loss:
            raise ValueError(
                f"`teacher_model_revision` is {in_loss!r} and the `revision` among the generator's `engine_arguments` "
                f"{revision!r}; wanted one teacher for the loss and the rollouts. Set both, or none."
            )

    def _evaluation_reads_teacher(self) -> bool:
        return self.loss == "sampled_token"

    def _correct(self, output: dict[str, Any]) -> None:
        if self.loss == "sampled_token" and self.args.sampled_token_centre:
            mask = loss_mask(output).float()
            log_ratio = sampled_token_coefficients(
                output[columns.LOG_TEACHER], output[columns.LOG_THETA], mask, clip=self.args.sampled_token_clip
            )
            total, count = self.accelerator.reduce(torch.stack([log_ratio.sum(), mask.sum()]))
            mean = total / count.clamp(min=1)
            output[columns.MEAN_LOG_RATIO] = mean.expand(len(mask))  # TRL shuffles and splits rows
        output[columns.CORRECTION_WEIGHTS] = self._correction_weights(output, inclusive=self.loss == "sampled_token")

    def _compute_loss(self, unwrapped_student: Any, inputs: dict[str, Any], num_items_in_batch: Any) -> Any:
        if self.loss != "divergence":
            return self._loss_of_records(unwrapped_student, inputs, num_items_in_batch)
        if self.correction.name == "none" or columns.CORRECTION_WEIGHTS not in inputs:  # an evaluation has none
            return super()._compute_loss(unwrapped_student, inputs, num_items_in_batch)
        with weighted_divergence(inputs[columns.CORRECTION_WEIGHTS], loss_mask(inputs)):
            return super()._compute_loss(unwrapped_student, inputs, num_items_in_batch)

    def _loss_of_records(self, student: Any, inputs: dict[str, Any], num_items_in_batch: Any) -> Any:
        """Compute the loss from the student and what the rollouts carry of the teacher.

        Returns:
            as TRL's: the loss, the sum of the student's entropies, the number of tokens.
        """
        ids, mask, counted = inputs["completion_ids"], inputs["completion_mask"], loss_mask(inputs)
        T, dense = ids.shape[1], self.loss == "dense"
        with dense_head(inputs[columns.DENSE_IDS], mask.bool()) if dense else nullcontext() as head:
            output = student(
                input_ids=torch.cat([inputs["prompt_ids"], ids], dim=1),
                attention_mask=torch.cat([inputs["prompt_mask"], mask], dim=1),
                labels=torch.cat(
                    [torch.full_like(inputs["prompt_ids"], -100), ids.masked_fill(mask == 0, -100)], dim=1
                ),
                fused_lm_head=True,
            )
        log_theta = output.log_probs[:, -T:].float()  # (B, T), at the temperature; 0 on padding
        entropy = (output.entropy[:, -T:].detach() * counted).sum()
        count = counted.sum()
        divisor = count.clamp(min=1) if num_items_in_batch is None else torch.as_tensor(num_items_in_batch)
        total = self._dense_total(head, inputs) if head else self._sampled_token_total(log_theta, inputs)
        return total / divisor.to(total), entropy, count

    def _dense_total(self, head: DenseHead, inputs: dict[str, Any]) -> Tensor:
        """Σ w·divergence over the tokens; w is 1 in an evaluation, which has no weights."""
        divergences = divergences_of(head, inputs, self.beta)
        if columns.CORRECTION_WEIGHTS in inputs:
            divergences = divergences * inputs[columns.CORRECTION_WEIGHTS][loss_mask(inputs).bool()]
        return divergences.sum()

    def _sampled_token_total(self, log_theta: Tensor, inputs: dict[str, Any]) -> Tensor:
        """Σ −c·log θ(x) over the sampled tokens, with c from `losses.sampled_token_coefficients`; in evaluation Σ −c.

        On the student's own samples −c = log θ − log t is an estimate of KL(θ‖t) without bias, which the surrogate's
        value is not.
        """
        training = columns.CORRECTION_WEIGHTS in inputs  # an evaluation has none
        return self._surrogate(log_theta, inputs) if training else _divergence(log_theta, inputs)

    def _surrogate(self, log_theta: Tensor, inputs: dict[str, Any]) -> Tensor:
        """Σ −c·w·log θ(x): its gradient is the loss's, its value is no divergence."""
        mask = loss_mask(inputs)
        coefficients = sampled_token_coefficients(
            inputs[columns.LOG_TEACHER],
            log_theta.detach(),
            mask.float(),
            clip=self.args.sampled_token_clip,
            mean=inputs.get(columns.MEAN_LOG_RATIO),
        )
        return -(coefficients * inputs[columns.CORRECTION_WEIGHTS] * log_theta * mask).sum()


def _divergence(log_theta: Tensor, inputs: dict[str, Any]) -> Tensor:
    """Σ log θ(x) − log t(x) over a batch's tokens, without those that the teacher rules out."""
    mask = loss_mask(inputs).float()
    return -sampled_token_coefficients(inputs[columns.LOG_TEACHER], log_theta, mask).sum()


def one_teacher(in_loss: Any, in_rollouts: Any, setting: str = "teacher_model") -> Any:
    """Pick the teacher of the loss: the generator's, or the one that was passed, which must be the same.

    Args:
        in_loss: the `teacher_model` that was passed, or None.
        in_rollouts: the generator's teacher.
        setting: by which the first was passed, for the error.

    Raises:
        ValueError: where they differ.
    """
    if in_loss is None or in_rollouts is None:
        return in_rollouts if in_loss is None else in_loss
    loaded = [hasattr(teacher, "config") for teacher in (in_loss, in_rollouts)]
    names = [
        str(teacher.name_or_path if is_loaded else teacher).rstrip("/")
        for teacher, is_loaded in zip((in_loss, in_rollouts), loaded)
    ]
    if in_loss is in_rollouts or (names[0] == names[1] and not all(loaded)):
        return in_loss
    raise ValueError(
        f"`{setting}` is {names[0]!r} and the generator's `teacher` {names[1]!r}; wanted one teacher for the loss "
        f"and the rollouts. Drop `{setting}`."
    )
