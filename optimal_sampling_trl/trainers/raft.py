"""RAFT, reward-ranked fine-tuning online: imitation of the completions that a reward accepts."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import trl
from torch import Tensor

from ..losses import REWARD_TOLERANCE, accept_rewards, imitation_loss
from ..options import suggest_arguments
from . import columns
from .config import PolicyGradientConfig, RAFTConfig
from .generator import FOR_TRAINERS
from .records import loss_mask
from .rewarded import RewardedTrainer

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

UNREAD = (
    "vllm_importance_sampling_cap",  # TRL copies it to `vllm_importance_sampling_clip_max`
    *("beta", "epsilon", "epsilon_high", "delta", "importance_sampling_level", "loss_type", "scale_rewards"),
    *("multi_objective_aggregation", "sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps"),
    *("sapo_temperature_neg", "sapo_temperature_pos", "vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg"),
    *("vespo_lambda_neg", "top_entropy_quantile", "entropy_coef", "use_adaptive_entropy", "entropy_coef_min"),
    *("entropy_coef_max", "entropy_coef_delta", "entropy_target", "off_policy_mask_threshold"),
    *("use_bias_correction_kl", "vllm_importance_sampling_mode", "vllm_importance_sampling_clip_max"),
    "vllm_importance_sampling_clip_min",
)
"""Fields of TRL's `GRPOConfig` that serve a policy gradient, and that the loss of imitation does not read."""


class RAFTTrainer(RewardedTrainer, trl.GRPOTrainer):
    """Reward-ranked fine-tuning with `generator=`: the student imitates the completions that a reward accepts.

    The loss is −log θ of the accepted completions over all tokens of the batch (`losses.imitation_loss`): no baseline,
    no negatives, no ratio. Prompts, rewards, rollouts and batches are those of TRL's `GRPOTrainer`. By default each
    prompt has one completion, and all come from the mixture (`theta_fraction` is 0). Where `num_generations` is 1,
    `theta_fraction` is a share of each process's batch. A batch without an accepted completion has a loss of 0. An
    evaluation samples from the student alone.

    Source: Dong et al., "RAFT: Reward rAnked FineTuning for Generative Foundation Model Alignment", arXiv:2304.06767;
    Xiong et al., "A Minimalist Approach to LLM Reasoning: from Rejection Sampling to Reinforce", arXiv:2504.11343.

    Args:
        model, reward_funcs, train_dataset, eval_dataset, processing_class, reward_processing_classes, callbacks,
            optimizers, quantization_config, peft_config: as those of TRL's `GRPOTrainer`.
        args: a `RAFTConfig`, or TRL's `GRPOConfig`, which gets the defaults of `RAFTConfig` but for its own fields.
        tools, environment_factory: as TRL's (docs/tools.md).
        rollout_func: as TRL's; it samples each turn with `sample_turn`.
        generator: source of the rollouts; has to be passed.

    Raises:
        ValueError: without a generator, and on settings that would do nothing, before anything is loaded.

    Example:
        ```python
        trainer = RAFTTrainer(
            model="small",
            generator=OptimalSamplingGenerator(teacher="large"),
            reward_funcs=reward,  # a verifier, 1 for right and 0 for wrong; see `RAFTConfig.accept` for others
            train_dataset=dataset,
        )
        trainer.train()
        ```
    """

    args: Any
    model: Any
    config_class = RAFTConfig
    default_theta_fraction = 0.0

    _tag_names = ["trl", "raft"]  # noqa: RUF012 - a list, as TRL's
    _name = "RAFT"
    _paper = {  # noqa: RUF012
        "title": "RAFT: Reward rAnked FineTuning for Generative Foundation Model Alignment",
        "id": "2304.06767",
        "citation": textwrap.dedent("""\
            @article{dong2023raft,
                title        = {{RAFT: Reward rAnked FineTuning for Generative Foundation Model Alignment}},
                author       = {Hanze Dong and Wei Xiong and Deepanshu Goyal and Yihan Zhang and Winnie Chow and Rui Pan and Shizhe Diao and Jipeng Zhang and Kashun Shum and Tong Zhang},
                year         = 2023,
                eprint       = {arXiv:2304.06767},
            }"""),  # noqa: E501
    }

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
            args=args,
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

    def _group_size(self) -> int:
        """Return the number of completions of a prompt, or, where it has one, of a process's batch."""
        if self.args.num_generations > 1:
            return self.args.num_generations
        return self.args.per_device_train_batch_size * self.args.steps_per_generation

    def _groups_share_prompts(self) -> bool:
        return self.args.num_generations > 1

    def _check_settings(self) -> None:
        super()._check_settings()
        if isinstance(self.args, PolicyGradientConfig):
            raise ValueError(
                f"`args` is a `{type(self.args).__name__}`, whose correction and advantages imitation does not read; "
                "wanted a `RAFTConfig`. Pass one."
            )
        for name in UNREAD:
            default = getattr(trl.GRPOConfig, name)
            if (value := getattr(self.args, name)) != default:
                raise ValueError(
                    f"`{name}` is {value!r}, and RAFT does not read it: its loss is −log θ of the accepted "
                    f"completions. Leave it at {default!r}, or use `GRPOTrainer`."
                )

    def _accepts(self, rewards: Tensor) -> Tensor:
        return accept_rewards(rewards, self._setting("accept"))

    def _weigh(self, output: dict[str, Any]) -> None:
        """Put `imitation_weights` (B,) into the batch, and the tokens that they weigh where they divide the loss.

        The loss of an evaluation imitates the student's accepted completions.
        """
        super()._weigh(output)
        output[columns.IMITATION_WEIGHTS] = weights = self._own_rows(self._imitation_weights())
        if self._setting("denominator") == "accepted":
            output["num_items_in_batch"] = self.accelerator.reduce((weights[:, None] * loss_mask(output)).sum())

    def _correct(self, output: dict[str, Any]) -> None:
        """Do nothing: the weights are those of an evaluation too."""

    def _trained_on(self, output: dict[str, Any]) -> Tensor:
        return output[columns.IMITATION_WEIGHTS]

    def _imitation_weights(self) -> Tensor:
        """Return the weight of each row of all processes, 0 where it is not accepted.

        Raises:
            ValueError: where the reward is the weight, and one is outside [0, 1] by more than rounding.
        """
        accepted = self._accepts(self.rewards)
        if self._setting("completion_weight") == "accepted":
            return accepted.float()
        outside = self.rewards[(self.rewards < -REWARD_TOLERANCE) | (self.rewards > 1 + REWARD_TOLERANCE)]
        if len(outside):
            raise ValueError(
                f"`completion_weight` is 'reward' and a reward is {float(outside[0]):.7g}; wanted all in [0, 1]. "
                "Scale the rewards, or set `completion_weight='accepted'`, which weighs each accepted completion by 1."
            )
        return torch.where(accepted, self.rewards.clamp(0, 1), 0.0)

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        """Compute the loss of imitation."""
        mask = loss_mask(inputs)
        log_theta, entropies, router_loss = self._get_per_token_logps_and_entropies(
            model,
            torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
            torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
            mask.shape[1],
            compute_entropy=True,
            compute_aux_loss=self.aux_loss_enabled,
        )
        entropy, tokens = self.accelerator.reduce(torch.stack([(entropies.detach() * mask).sum(), mask.sum()]))
        self._append_sum("entropy", float(entropy), float(tokens))
        loss = imitation_loss(log_theta, inputs[columns.IMITATION_WEIGHTS], mask.float(), self._token_count(inputs))
        if self.aux_loss_enabled:  # of a mixture of experts, as TRL adds it
            steps = self.current_gradient_accumulation_steps if self.model.training else 1
            loss = loss + self.router_aux_loss_coef * router_loss / steps
        return loss

    def _token_count(self, inputs: dict[str, Any]) -> Tensor:
        """Return this process's share of the tokens of an optimizer step, as TRL counts them for its loss 'dapo'."""
        count = inputs["num_items_in_batch"].float() / self.accelerator.num_processes
        if not self.model.training:
            return count
        return count * self.current_gradient_accumulation_steps / self.args.steps_per_generation
