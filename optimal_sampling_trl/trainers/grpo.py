"""GRPO with rollouts from the mixture."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import trl
from torch import Tensor

from ..losses import (
    anchor_factor,
    confidence,
    mixture_weight,
    own_baseline,
    sampled_token_coefficients,
)
from ..options import check_choice, suggest_arguments
from ..user_warnings import warn_user
from . import columns
from .config import GRPOConfig, with_our_default
from .dense_config import CONFIDENCE
from .generator import FOR_TRAINERS
from .policy_gradient import PolicyGradientTrainer
from .records import loss_mask
from .unread import has_negatives

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
    from peft import PeftConfig, PeftModel
    from transformers import (
        BitsAndBytesConfig,
        PreTrainedModel,
        PreTrainedTokenizerBase,
        ProcessorMixin,
        TrainerCallback,
    )
    from trl.trainer.grpo_trainer import EnvironmentFactory, RewardFunc, RolloutFunc

    from .generator import OptimalSamplingGenerator

VESPO = ("none", "token_truncate", "token_mask")
"""Corrections that the loss of this name takes: a weight of each token, and 1 on padding."""
TOKEN_LOSSES = ("cispo", "vespo")
"""Losses of TRL that multiply each token's log θ by its own advantage, whatever the level of the ratio."""
RATIO_MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
RATIO_DETAILS = tuple(f"vllm_importance_sampling_{detail}" for detail in ("mode", "clip_max", "clip_min"))
"""TRL's names, in its configuration and on its trainer, of what its ratio of the trainer to the engine reads."""


class GRPOTrainer(PolicyGradientTrainer, trl.GRPOTrainer):
    """TRL's `GRPOTrainer` with `generator=`: rollouts from the mixture of a teacher and the model.

    By default half of each group is sampled from the student, the other half from the mixture, with weight 1; they
    share the group's baseline, and a completion is trained on where its advantage is positive
    (`GRPOConfig.positive_only`). An evaluation samples from the student alone.

    Args:
        model, reward_funcs, train_dataset, eval_dataset, processing_class, reward_processing_classes, callbacks,
            optimizers, quantization_config, peft_config: as TRL's.
        args: our `GRPOConfig`, or TRL's, which gets the default correction, and none of the engine's rounding.
        tools, environment_factory: as TRL's (docs/tools.md).
        rollout_func: as TRL's; it samples each turn with `sample_turn`.
        generator: source of the rollouts; has to be passed.

    Raises:
        ValueError: without a generator, and on settings that would do nothing, before anything is loaded.

    Example:
        ```python
        trainer = GRPOTrainer(
            model="small",
            generator=OptimalSamplingGenerator(teacher="large"),
            reward_funcs=reward,  # as TRL's: a function of completions, prompts and the dataset's columns
            train_dataset=dataset,
        )
        trainer.train()
        ```
    """

    args: Any
    config_class = GRPOConfig

    @suggest_arguments(**FOR_TRAINERS)
    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        reward_funcs: RewardFunc | list[RewardFunc] | None = None,
        args: trl.GRPOConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset
        | IterableDataset
        | DatasetDict
        | IterableDatasetDict
        | dict[str, Dataset | IterableDataset]
        | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        reward_processing_classes: PreTrainedTokenizerBase | list[PreTrainedTokenizerBase] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: PeftConfig | None = None,
        tools: list[Callable] | None = None,
        rollout_func: RolloutFunc | None = None,
        environment_factory: EnvironmentFactory | dict[str, EnvironmentFactory] | None = None,
        *,
        generator: OptimalSamplingGenerator | None = None,
    ) -> None:
        super().__init__(
            model=model,
            generator=generator,
            args=with_our_default(args),
            reward_funcs=reward_funcs,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            reward_processing_classes=reward_processing_classes,
            callbacks=callbacks,
            optimizers=optimizers,
            quantization_config=quantization_config,
            peft_config=peft_config,
            tools=tools,
            rollout_func=rollout_func,
            environment_factory=environment_factory,
        )
        self._let_trl_weigh()

    def _let_trl_weigh(self) -> None:
        """Let TRL compute the trainer's log θ of each batch and multiply its loss by `importance_sampling_ratio`.

        TRL's own ratio, where it does not count, is computed as TRL does by default, for its metrics.
        """
        if not self.vllm_importance_sampling_correction:
            for name in RATIO_DETAILS:
                setattr(self, name, getattr(trl.GRPOConfig, name))
        self.vllm_importance_sampling_correction = True

    def _check_settings(self) -> None:
        super()._check_settings()
        check_choice("vllm_importance_sampling_mode", self.args.vllm_importance_sampling_mode, RATIO_MODES)
        if self._setting("baseline") == "own" and self._theta_count() == 0:
            raise ValueError(
                "`baseline` is 'own' and the student samples no completion of a group; wanted some. Raise the "
                "generator's `theta_fraction`, or leave `baseline` at 'group'."
            )
        self._check_credit()
        self._check_level()
        if self.args.loss_type == "dr_grpo" and self.args.max_completion_length is None:
            raise ValueError(
                "`max_completion_length` is None and `loss_type` 'dr_grpo', which divides by it; wanted a whole "
                "number of at least 1. Set it, or take another `loss_type`."
            )
        if self.args.loss_type == "vespo":
            if self.correction.name not in VESPO:
                raise ValueError(
                    f"`correction` is {self.correction.name!r} and `loss_type` 'vespo', which multiplies the weights "
                    f"of a completion's tokens itself; wanted one of {', '.join(VESPO)}."
                )
            warn_user(
                "`loss_type='vespo'` on completions of the mixture: in a study of 4-digit addition it collapsed "
                "(exact match .045 -> .000), on the embedded pair (recipes/studies/README.md) it did not (0.43). "
                "Watch the evaluation.",
            )
        reads_threshold = self.args.off_policy_mask_threshold is not None and has_negatives(self.args)
        if (self.args.beta != 0 or reads_threshold) and self._trains_on_mixture():
            warn_user(
                f"`beta` is {self.args.beta} and `off_policy_mask_threshold` {self.args.off_policy_mask_threshold}: "
                "TRL computes both on the mixture's tokens as if the student had sampled them. "
                "Leave them at 0 and None.",
            )

    def _check_credit(self) -> None:
        """Refuse several updates of one batch with anchored credit: its factor is that of the first."""
        updates = self.args.steps_per_generation * self.args.num_iterations
        if self._setting("credit") == "anchored" and self.args.gradient_accumulation_steps % updates != 0:
            raise ValueError(
                f"`credit` is 'anchored' with `steps_per_generation` {self.args.steps_per_generation} and "
                f"`num_iterations` {self.args.num_iterations}, at `gradient_accumulation_steps` "
                f"{self.args.gradient_accumulation_steps}; wanted one update of each batch, at which the student is "
                "the one that sampled it. Leave `num_iterations` at 1 and drop `steps_per_generation`, or leave "
                "`credit` at 'completion'."
            )

    def _check_level(self) -> None:
        """Refuse what differs from token to token where TRL's ratio of a completion gives all its tokens the mean."""
        if self.args.importance_sampling_level != "sequence" or self.args.loss_type in TOKEN_LOSSES:
            return
        unread = {
            "credit": self._setting("credit") == "anchored",
            "distillation_coefficient": bool(self._setting("distillation_coefficient")),
            "correction": self.correction.name.startswith(("token", "prefix")),
        }
        if names := [f"`{name}` {self._setting(name)!r}" for name, is_set in unread.items() if is_set]:
            raise ValueError(
                f"`importance_sampling_level` is 'sequence' with `loss_type` {self.args.loss_type!r} and "
                f"{', '.join(names)}: each token of a completion would learn from their mean. Leave "
                f"`importance_sampling_level` at 'token', take `loss_type` {' or '.join(map(repr, TOKEN_LOSSES))}, or "
                "drop the settings of tokens; a correction of the level 'sequence' goes with it."
            )

    def _theta_count(self) -> int:
        steps, state = self._setting("mixture_weight_steps"), getattr(self, "state", None)
        if steps is not None and state is not None and state.global_step >= steps:
            return self._group_size()  # the mixture's completions would have no weight
        return super()._theta_count()

    def _advantages(self, output: dict[str, Any]) -> Tensor:
        """Return the advantages (B,), over the student's own baseline and weighted down where that is asked for."""
        if self._setting("baseline") == "own":
            output["advantages"] = self._own_advantages()
        weight = mixture_weight(self.state.global_step, self._setting("mixture_weight_steps"))
        return torch.where(output[columns.MIXTURE_ROWS], weight, 1.0) * super()._advantages(output)

    def _own_advantages(self) -> Tensor:
        """Return the advantages (B,) of this process over the student's own baseline."""
        group = self._group_size()
        theta_rows = self._theta_rows().view(-1, group)
        advantages = own_baseline(self.rewards.view(-1, group), theta_rows, self.args.scale_rewards == "group")
        return self._own_rows(advantages.flatten())

    def _weigh(self, output: dict[str, Any]) -> None:
        """Put our weights where TRL has its ratio of the trainer to the engine, times it if that is asked for."""
        super()._weigh(output)
        weights = self._correction_weights(output)  # 1 in an evaluation, which samples from the student alone
        if self.args.vllm_importance_sampling_correction:
            weights = output["importance_sampling_ratio"] * weights  # TRL's (B, T) or (B, 1)
        output["importance_sampling_ratio"] = weights
        if self._setting("credit") == "routed" and self._dense_coefficient():
            output[columns.DENSE_WEIGHTS] = self._routed_weights(output)

    def _routed_weights(self, output: dict[str, Any]) -> Tensor:
        """Weight (B, T) of each token in the dense term: 0 in right completions, a mean of 1 over the others' tokens.

        The mean is over all processes.
        """
        wrong = ~self._accepts(self._own_rows(self.rewards))
        routed = wrong[:, None] * loss_mask(output).float()
        weights = confidence(output[columns.dense_scalar(CONFIDENCE)], routed)
        total, count = self.accelerator.reduce(torch.stack([weights.sum(), routed.sum()]))
        return weights * count / total.clamp(min=torch.finfo(total.dtype).tiny)

    def _correct(self, output: dict[str, Any]) -> None:
        output["advantages"] = advantages = self._advantages(output)
        if columns.DENSE_WEIGHTS in output:
            routed = (output[columns.DENSE_WEIGHTS] > 0).any(1)
            output["advantages"] = advantages = advantages.masked_fill(routed, 0.0)
        if self._setting("credit") == "anchored":
            log_ratio = output[columns.LOG_TEACHER] - output[columns.LOG_THETA]
            of_tokens = advantages[:, None].expand_as(log_ratio)
            output["advantages"] = of_tokens * anchor_factor(of_tokens, log_ratio)
        if coefficient := self._setting("distillation_coefficient"):
            towards_teacher = sampled_token_coefficients(
                output[columns.LOG_TEACHER],
                output[columns.LOG_THETA],
                loss_mask(output).float(),
                clip=self.args.distillation_clip,
            )
            reward = output["advantages"].view(len(advantages), -1)  # (B, T) or (B, 1)
            output["advantages"] = reward + coefficient * towards_teacher  # (B, T)
