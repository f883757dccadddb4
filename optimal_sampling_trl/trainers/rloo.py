"""RLOO with rollouts from the mixture."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import trl

from ..options import suggest_arguments
from ..user_warnings import warn_user
from .config import RLOOConfig
from .generator import FOR_TRAINERS
from .policy_gradient import PolicyGradientTrainer

if TYPE_CHECKING:
    import torch
    from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
    from peft import PeftConfig, PeftModel
    from transformers import (
        BitsAndBytesConfig,
        PreTrainedModel,
        PreTrainedTokenizerBase,
        ProcessorMixin,
        TrainerCallback,
    )
    from trl.trainer.rloo_trainer import RewardFunc

    from .generator import OptimalSamplingGenerator


class RLOOTrainer(PolicyGradientTrainer, trl.RLOOTrainer):
    """TRL's `RLOOTrainer` with `generator=`: rollouts from the mixture of a teacher and the model.

    It samples as our `GRPOTrainer` does. RLOO's loss has one ratio for a completion and no place for a weight, so a
    correction scales the advantage, in which the clipped objective is homogeneous for weights of at least 0: only the
    corrections of the level `sequence` can be chosen.

    Args:
        model, reward_funcs, train_dataset, eval_dataset, processing_class, reward_processing_classes, callbacks,
            optimizers, quantization_config, peft_config: as TRL's.
        args: our `RLOOConfig`, or TRL's, which gets the default correction.
        generator: source of the rollouts; has to be passed.

    Raises:
        ValueError: without a generator, and on settings that would do nothing, before anything is loaded.

    Example:
        ```python
        trainer = RLOOTrainer(
            model="small",
            generator=OptimalSamplingGenerator(teacher="large"),
            reward_funcs=reward,
            train_dataset=dataset,
            args=RLOOConfig("output/rloo", num_generations=4, per_device_train_batch_size=4),
        )
        trainer.train()
        ```
    """

    config_class = RLOOConfig

    @suggest_arguments(**FOR_TRAINERS)
    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        reward_funcs: RewardFunc | list[RewardFunc],
        args: trl.RLOOConfig | None = None,
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
        )

    def _check_settings(self) -> None:
        super()._check_settings()
        if not self.correction.name.startswith(("none", "sequence")):
            raise ValueError(
                f"`correction` is {self.correction.name!r}; RLOO weighs whole completions, so wanted 'none' or one of "
                "the level 'sequence', for example 'sequence_truncate'."
            )

        if self.args.beta != 0 and self._trains_on_mixture():
            warn_user(
                f"`beta` is {self.args.beta}: RLOO takes β·Σ(log θ − log θ_reference) from the reward of each "
                "completion, on the mixture's tokens as if the student had sampled them, and so punishes what the "
                "mixture's half teaches. Leave it at 0."
            )

    def _correct(self, output: dict[str, Any]) -> None:
        weights = self._correction_weights(output)
        output["advantages"] = self._advantages(output) * weights[:, 0]  # equal along a completion
