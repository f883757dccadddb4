"""TRL's configurations with the fields of the correction and of our losses."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, fields
from typing import Any

import trl

from ..losses import LEVELS, Correction
from ..options import check_choice, check_flag, check_number, check_whole, suggest_arguments, unknown_option
from .credit_config import CreditConfig
from .dense_config import DenseLossConfig, DenseTermConfig
from .presets import PresetConfig

LOSSES = ("divergence", "dense", "sampled_token")
WEIGHTS = ("accepted", "reward")
DENOMINATORS = ("all", "accepted")
BASELINES = ("group", "own")
POSITIVE_ONLY = ("mixture", "all", "none")
OTHER_DEFAULTS = ("vllm_importance_sampling_correction", "beta")
"""Fields of TRL's configurations whose default differs here."""


@dataclass
class GuardConfig:
    """Settings of the guard that compares the engine's student with the trained one; see `guard.WeightGuard`.

    Raises:
        ValueError: on a tolerance that is no number of at least 0, and as TRL's.
    """

    log_theta_tolerance: float | None = field(
        default=None,
        metadata={
            "help": "Largest mean of |log theta of the trainer - log theta of the engine|, in nats a token, at which "
            "training goes on. By default twice what rounding explains: 0.15 in bfloat16, 0.02 in float16, 0.01 in "
            "float32, 0.001 in float32 on a CPU, in proportion more where log theta is below -5 in the mean. Between "
            "the two there is one warning; 'inf' warns only."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[misc]
        if self.log_theta_tolerance is not None and not self.log_theta_tolerance >= 0:
            raise ValueError(
                f"`log_theta_tolerance` is {self.log_theta_tolerance!r}; wanted a number of at least 0, in nats a "
                "token. Drop it for what rounding explains."
            )


@dataclass
class CorrectionConfig(GuardConfig):
    """Correction of the loss for completions that the mixture sampled; see `losses.Correction`."""

    correction: str = field(
        default="none",
        metadata={
            "help": "Weight of each token that the mixture sampled: 'none' (1, the default), or "
            "'<token|prefix|sequence>_<truncate|mask|luffy>' of the ratio theta/q."
        },
    )
    correction_clip_max: float = field(
        default=3.0, metadata={"help": "Largest weight of the shapes 'truncate' and 'mask'."}
    )
    correction_clip_min: float | None = field(
        default=None, metadata={"help": "Smallest weight that the shape 'mask' keeps."}
    )
    correction_gamma: float = field(default=0.1, metadata={"help": "gamma of the shape 'luffy', w / (w + gamma)."})
    correction_window: int | None = field(
        default=None, metadata={"help": "Number of the last ratios that the level 'prefix' multiplies; None is all."}
    )
    correction_self_normalise: bool = field(
        default=False,
        metadata={"help": "Divide the weights by their mean over the mixture's tokens, in all processes together."},
    )


@dataclass
class TeacherMeasureConfig:
    """Setting of the trainers with rewards: whether the teacher is measured, too.

    Raises:
        ValueError: where it is neither True nor False.
    """

    evaluate_teacher: bool = field(
        default=True,
        metadata={
            "help": "At the first evaluation of a training, sample its prompts from the teacher alone as well. What "
            "it earns is logged beside what the student does, and a warning tells when the student has passed it. "
            "It is one more evaluation, in which both models run."
        },
    )

    def __post_init__(self) -> None:
        check_flag(type(self).__name__, "evaluate_teacher", self.evaluate_teacher)
        super().__post_init__()  # type: ignore[misc]


@dataclass
class PolicyGradientConfig(TeacherMeasureConfig, DenseTermConfig, CorrectionConfig):
    """The correction of a policy gradient, which has advantages, and the dense term beside it.

    Raises:
        ValueError: where `positive_only` is none of `POSITIVE_ONLY`, and as TRL's.
    """

    positive_only: str = field(
        default="all",
        metadata={
            "help": "Completions that are trained on only where their advantage is above 0: 'all' (the default), "
            "those of the 'mixture' (the student's keep their negatives, as in TRL), or 'none'.",
            "choices": POSITIVE_ONLY,
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[misc]
        check_choice("positive_only", self.positive_only, POSITIVE_ONLY)


@suggest_arguments()
@dataclass
class GRPOConfig(PresetConfig, CreditConfig, PolicyGradientConfig, trl.GRPOConfig):
    """TRL's `GRPOConfig` with the correction for completions of the mixture.

    The defaults taught best in our measurements: half of each group from the student
    (`OptimalSamplingGenerator.theta_fraction`), the other half from the mixture with weight 1, and of both halves the
    positive advantages only. The best learning rate may differ from the one with negatives: see
    recipes/studies/README.md.

    Weight 1 is exact: `vllm_importance_sampling_correction`, TRL's correction of the engine's rounding, is off here.
    On, it multiplies our weight by TRL's ratio of the trainer to the engine. In TRL's default mode `sequence_mask`
    that is exp(Σ(log θ_trainer − log θ_engine)) over a completion, 0 above 3; in bfloat16 its logarithm spreads with
    the square root of the length (docs/robustness.md, "Rounding in the engine"). `engine/log_theta_difference` is
    logged either way, and so is TRL's `sampling/importance_sampling_ratio/*`: the ratio that would multiply the loss.

    A completion whose advantage is dropped still counts in the loss's denominator, as one of advantage 0 does in TRL:
    the gradient estimates E[max(A, 0)·∇log θ], and is smaller than TRL's while half of the advantages are negative.
    Adam does not notice; `max_grad_norm` and plain SGD do.

    Example:
        ```python
        GRPOConfig("output/grpo", distillation_coefficient=0.1)  # 0.1·(log t - log θ) beside the reward
        GRPOConfig("output/grpo", dense_coefficient=1.0, dense_fade=0.5)  # the divergence, gone by half of training
        GRPOConfig("output/grpo", credit="routed", dense_coefficient=1.0)  # the teacher corrects wrong completions
        GRPOConfig("output/grpo", correction="token_truncate", correction_clip_max=2.0)
        GRPOConfig("output/grpo", preset="mentor")  # what that publication sets, in the generator, too
        ```

    Raises:
        ValueError: on an unknown preset, credit or baseline, a setting that does not go with it, and as TRL's.
    """

    vllm_importance_sampling_correction: bool = field(
        default=False,
        metadata={
            "help": "Multiply the weights by TRL's ratio of the trainer to the engine, as "
            "`vllm_importance_sampling_mode` says. Off by default, where TRL has it on: in bfloat16 the ratio of a "
            "long completion is mostly rounding."
        },
    )
    distillation_coefficient: float = field(
        default=0.0,
        metadata={
            "help": "Adds this times log t - log theta of the sampled token to its advantage; 0 is the reward alone."
        },
    )
    distillation_clip: float | None = field(
        default=5.0, metadata={"help": "Limits log t - log theta to this many nats either way; None does not."}
    )
    baseline: str = field(
        default="group",
        metadata={
            "help": "Completions whose mean reward is the baseline of a group: all of the 'group' (the default, as in "
            "TRL), or the student's 'own'. With 'own' the student's advantages are divided by the deviation of its "
            "own rewards, and the mixture's are not divided.",
            "choices": BASELINES,
        },
    )
    mixture_weight_steps: int | None = field(
        default=None,
        metadata={
            "help": "Updates in which the weight of the mixture's advantages falls from 1 to 0, as half a cosine; "
            "after them the student samples alone. None keeps it at 1."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("GRPOConfig", "distillation_coefficient", self.distillation_coefficient)
        check_clip("GRPOConfig", "distillation_clip", self.distillation_clip)
        check_choice("baseline", self.baseline, BASELINES)
        if self.mixture_weight_steps is not None:
            check_whole("GRPOConfig", "mixture_weight_steps", self.mixture_weight_steps, 1)
        sums = self.multi_objective_aggregation == "sum_then_normalize"
        if self.baseline == "own" and (self.scale_rewards not in ("group", "none") or not sums):
            raise ValueError(
                f"`baseline` is 'own' with `scale_rewards` {self.scale_rewards!r} and `multi_objective_aggregation` "
                f"{self.multi_objective_aggregation!r}; wanted 'group' or 'none', and 'sum_then_normalize', which are "
                "what is computed of a group's own half. Set them, or leave `baseline` at 'group'."
            )


@suggest_arguments()
@dataclass
class RLOOConfig(PolicyGradientConfig, trl.RLOOConfig):
    """TRL's `RLOOConfig` with the correction for completions of the mixture; the defaults are `GRPOConfig`'s.

    `beta` is 0, where TRL has 0.05: RLOO takes β·Σ(log θ − log θ_reference) from the reward of each completion, and on
    the mixture's, whose likelihood is raised on purpose, that is no divergence from the reference.

    Example:
        ```python
        RLOOConfig("output/rloo", positive_only="none")  # the mixture's failures count as well
        ```
    """

    beta: float = field(
        default=0.0, metadata={"help": "Weight of TRL's KL penalty in the reward; see the class for why it is 0."}
    )


@suggest_arguments()
@dataclass
class RAFTConfig(TeacherMeasureConfig, DenseTermConfig, GuardConfig, trl.GRPOConfig):
    """TRL's `GRPOConfig` with the fields of filtered imitation; fields that the loss does not read are refused.

    By default each prompt of a batch has one completion, sampled from the mixture, since a batch of many prompts
    teaches more than one of few prompts with many completions. A completion that the reward accepts is imitated, and
    all tokens of the batch stand in the denominator: the step shrinks while few are accepted.

    Raises:
        ValueError: on an unknown weight or denominator, a number out of range, and as TRL's.

    Example:
        ```python
        RAFTConfig("output/raft", accept=0.5)  # imitates completions with a reward of at least 0.5
        RAFTConfig("output/raft", dense_coefficient=1.0, dense_fade=0.5)  # the teacher first, for a quick start
        RAFTConfig("output/raft", completion_weight="reward", denominator="accepted")
        ```
    """

    num_generations: int = field(
        default=1, metadata={"help": "Completions of each prompt; 1 spends a batch on as many prompts as it holds."}
    )
    accept: float | None = field(
        default=None,
        metadata={
            "help": "Smallest reward of a completion that is imitated, rounding aside; by default any above 0. With a "
            "graded reward set it to full marks: tiny models that imitated what is partly right ended much lower."
        },
    )
    completion_weight: str = field(
        default="accepted",
        metadata={
            "help": "'accepted': each accepted completion weighs 1; 'reward': its reward, which is in [0, 1].",
            "choices": WEIGHTS,
        },
    )
    denominator: str = field(
        default="all",
        metadata={
            "help": "Tokens by which the loss is divided: 'all' of the batch (the default), or the 'accepted' ones, "
            "each with its completion's weight.",
            "choices": DENOMINATORS,
        },
    )

    def __post_init__(self) -> None:
        check_whole("RAFTConfig", "num_generations", self.num_generations, 1)
        if self.accept is not None:
            check_number("RAFTConfig", "accept", self.accept)
        check_choice("completion_weight", self.completion_weight, WEIGHTS)
        check_choice("denominator", self.denominator, DENOMINATORS)
        number = self.num_generations
        self.num_generations = _GroupOfAnySize(number)
        super().__post_init__()
        self.num_generations = number


class _GroupOfAnySize(int):
    """Number of completions of a prompt that passes TRL's check for at least 2.

    TRL makes the check at the end of `GRPOConfig.__post_init__`, for advantages, which need a group. It is the only
    comparison there, so all else that TRL derives from the number is derived from its true value.
    """

    def __lt__(self, other: int) -> bool:
        return False if other == 2 else super().__lt__(other)


@suggest_arguments()
@dataclass
class DistillationConfig(PresetConfig, DenseLossConfig, CorrectionConfig, trl.DistillationConfig):
    """TRL's `DistillationConfig` with the correction, and losses that need no teacher in the trainer.

    `loss="dense"` is TRL's divergence (`beta` means the same) over the likeliest tokens of both models, from the dense
    records of the rollouts; see `divergences.union_divergence`.

    Raises:
        ValueError: on a loss or a preset that does not exist, and as TRL's.

    Example:
        ```python
        DistillationConfig("output/distill", loss="dense", beta=0.5)
        DistillationConfig("output/distill", loss="sampled_token")
        ```
    """

    loss: str = field(
        default="divergence",
        metadata={
            "help": "'divergence': TRL's; without a teacher in the trainer 'dense': the same over likely tokens of "
            "both models, or 'sampled_token': log t - log theta of the sampled tokens alone.",
            "choices": LOSSES,
        },
    )
    sampled_token_clip: float | None = field(
        default=5.0, metadata={"help": "Limits log t - log theta to this many nats either way; None does not."}
    )
    sampled_token_centre: bool = field(
        default=False, metadata={"help": "Subtract the mean of log t - log theta over the batch."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_clip("DistillationConfig", "sampled_token_clip", self.sampled_token_clip)
        check_flag(type(self).__name__, "sampled_token_centre", self.sampled_token_centre)
        if self.loss not in LOSSES:
            raise ValueError(unknown_option("loss of distillation", self.loss, LOSSES))


def check_clip(owner: str, name: str, value: float | None) -> None:
    """Refuse a limit of log t − log θ that is no number of nats.

    Raises:
        ValueError: on one that is not finite and above 0: below 0 every token would have the same pull, at 0 none.
    """
    if value is not None:
        check_number(owner, name, value, above=0.0, advice="Pass one, in nats, or None for no limit.")


def check_kind(args: Any, wanted: type) -> None:
    """Refuse what is neither a trainer's configuration nor TRL's of the same method.

    Args:
        args: what the user passed.
        wanted: the trainer's configuration.

    Raises:
        ValueError: naming both.
    """
    of_trl = next(base for base in wanted.__mro__ if base.__module__.startswith("trl."))
    if not isinstance(args, of_trl):
        raise ValueError(
            f"`args` is a `{type(args).__name__}`, which lacks fields of this trainer; wanted a `{wanted.__name__}`. "
            "Pass one: it takes the fields of `TrainingArguments`, too."
        )


def with_our_default(args: Any) -> Any:
    """Give TRL's own `GRPOConfig` our default of its engine's correction; return any other configuration as it is.

    TRL's configuration does not tell whether its default was set on purpose. The user's object stays as it was.
    """
    if isinstance(args, trl.GRPOConfig) and not isinstance(args, GRPOConfig):
        args = copy.copy(args)
        args.vllm_importance_sampling_correction = GRPOConfig.vllm_importance_sampling_correction
    return args


def correction_of(args: Any) -> Correction:
    """Read the correction of a configuration; the default where the configuration is TRL's, which has none.

    Raises:
        ValueError: on an unknown name, a number out of range, or a detail that the correction does not read.
    """
    names = {field.name for field in fields(args)}
    values = {name: getattr(args, f"correction_{name}") for name in _DETAILS if f"correction_{name}" in names}
    correction = Correction(getattr(args, "correction", "none"), **values)
    for name, parts in _DETAILS.items():
        value = getattr(correction, name)
        if value != getattr(Correction, name) and not any(part in correction.name.split("_") for part in parts):
            raise ValueError(
                f"`correction_{name}` is {value!r}, and `correction={correction.name!r}` does not read it; wanted it "
                f"with {' or '.join(map(repr, parts))} in the correction's name. Drop it, or name such a correction."
            )
    return correction


_DETAILS = {
    "clip_max": ("truncate", "mask"), "clip_min": ("mask",), "gamma": ("luffy",), "window": ("prefix",),
    "self_normalise": LEVELS,
}  # fmt: skip
"""Details of a correction, with the levels and shapes that read them."""
