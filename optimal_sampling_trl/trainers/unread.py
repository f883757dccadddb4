"""Settings of TRL's that are set and that nothing will read: each is named once, with what would read it.

TRL accepts most of them silently. They do no harm, so a warning is enough. A setting that contradicts another is
refused where the other is checked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import MISSING, fields
from typing import Any, NamedTuple

from ..user_warnings import warn_user

TOOL_TURNS = "max_tool_calling_iterations"
"""Field that is read where the trainer is passed what makes several turns, which the configuration does not know."""
RATIO_LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
"""Values of `loss_type` that clip the ratio of the new student to the old one from both sides."""


class Rule(NamedTuple):
    """Fields that are read where a condition holds.

    Attributes:
        names: the fields.
        is_read: the condition on a configuration, which is asked only where it has such a field.
        reader: what reads them, as the end of "it is read".
    """

    names: tuple[str, ...]
    is_read: Callable[[Any], bool]
    reader: str


def never(args: Any) -> bool:
    """Return False: nothing reads the field."""
    return False


def _loss(args: Any) -> str:
    return getattr(args, "loss_type", "grpo")  # RLOO's clips the ratio from both sides


def has_negatives(args: Any) -> bool:
    """Return True where an advantage below 0 can reach the loss."""
    return getattr(args, "positive_only", "all") != "all" or getattr(args, "distillation_coefficient", 0.0) != 0


def _largest_ratio(args: Any) -> float:
    return 1 + (args.epsilon if args.epsilon_high is None else args.epsilon_high)


ON_NEGATIVES = "for advantages below 0, which `positive_only='all'` drops: 'mixture' or 'none' keeps them"
RULES = (
    Rule(("sapo_temperature_pos", "sapo_temperature_neg"), lambda a: _loss(a) == "sapo", "with `loss_type='sapo'`"),
    Rule(
        ("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg"),
        lambda a: _loss(a) == "vespo",
        "with `loss_type='vespo'`",
    ),
    Rule(
        ("epsilon", "epsilon_high"),
        lambda a: _loss(a) in (*RATIO_LOSSES, "cispo"),
        "by a `loss_type` that clips the ratio",
    ),
    Rule(
        ("epsilon",),
        lambda a: _loss(a) != "cispo" or a.epsilon_high is None,
        "with `loss_type='cispo'` where `epsilon_high` is None",
    ),
    Rule(("delta",), lambda a: _loss(a) in RATIO_LOSSES, "by a `loss_type` that clips the ratio from both sides"),
    Rule(
        ("sapo_temperature_neg", "vespo_k_neg", "vespo_lambda_neg", "off_policy_mask_threshold"),
        has_negatives,
        ON_NEGATIVES,
    ),
    Rule(("epsilon",), lambda a: has_negatives(a) or a.epsilon_high is None, ON_NEGATIVES),
    Rule(("delta",), lambda a: has_negatives(a) or a.delta < _largest_ratio(a), ON_NEGATIVES),
    Rule(
        ("vllm_importance_sampling_mode", "vllm_importance_sampling_clip_max", "vllm_importance_sampling_clip_min"),
        lambda a: a.vllm_importance_sampling_correction,
        "with our `GRPOConfig(vllm_importance_sampling_correction=True)`",
    ),
    Rule(("distillation_clip",), lambda a: a.distillation_coefficient != 0, "with a `distillation_coefficient`"),
    Rule(("ref_model_mixup_alpha", "ref_model_sync_steps"), lambda a: a.sync_ref_model, "with `sync_ref_model=True`"),
    Rule(("use_bias_correction_kl",), lambda a: a.beta != 0, "with a `beta`"),
    Rule(
        ("entropy_coef_min", "entropy_coef_max", "entropy_coef_delta", "entropy_target"),
        lambda a: a.use_adaptive_entropy,
        "with `use_adaptive_entropy=True`",
    ),
    Rule(
        ("scale_rewards",),
        lambda a: a.multi_objective_aggregation == "sum_then_normalize",
        "with `multi_objective_aggregation='sum_then_normalize'`",
    ),
    Rule(
        ("num_completions_to_print", "log_unique_prompts"), lambda a: a.log_completions, "with `log_completions=True`"
    ),
    Rule(("log_multimodal",), never, "for images, which rollouts from the mixture do not take"),
    Rule((TOOL_TURNS,), never, "with `tools` or an `environment_factory`"),
    Rule(
        ("cache_implementation", "transformers_continuous_batching_config", "ds3_gather_for_generation"),
        never,
        "by TRL's own generation with transformers alone",
    ),
    Rule(
        ("vllm_server_host", "vllm_server_port"),
        lambda a: a.vllm_mode == "server" and a.vllm_server_base_url is None,
        "with `vllm_mode='server'` and without `vllm_server_base_url`",
    ),
    Rule(
        ("vllm_server_base_url", "vllm_server_timeout", "vllm_group_port"),
        lambda a: a.vllm_mode == "server",
        "with `vllm_mode='server'`",
    ),
    Rule(
        (
            *("vllm_gpu_memory_utilization", "vllm_max_model_length", "vllm_tensor_parallel_size"),
            *("vllm_enable_sleep_mode", "vllm_model_impl"),
        ),
        lambda a: a.vllm_mode == "colocate",
        "with `vllm_mode='colocate'`: they are the server's to be started with",
    ),
)
"""A field is read where every rule that names it holds. Of several that fail, the first is reported."""


def unread_settings(args: Any) -> dict[str, str]:
    """Find the fields of a configuration that are set to another value than their default and that nothing reads.

    Args:
        args: the configuration, TRL's or ours.

    Returns:
        by the name of each, what would read it.
    """
    changed, found = _changed(args), {}
    for rule in RULES:
        for name in rule.names:
            if name in changed and name not in found and not rule.is_read(args):
                found[name] = rule.reader
    return found


def warn_of_unread(args: Any, unread: dict[str, str]) -> None:
    """Warn of each field of `unread` that is set to another value than its default.

    Args:
        args: the configuration.
        unread: what would read each field, by its name.
    """
    changed = _changed(args)
    for name in sorted(unread.keys() & changed.keys()):
        warn_of_one(name, changed[name], unread[name])


def warn_of_one(name: str, value: Any, reader: str) -> None:
    """Warn that a setting does nothing; `reader` is the end of "it is read"."""
    warn_user(f"`{name}` is {value!r} and does nothing here: it is read {reader}. Drop it.")


OF_MIXTURE = ("mixture", "schedule", "entropy_quantile")
"""Fields of a generator that only completions of the mixture read."""
OF_MIXED_ROWS = ("correction", "mixture_weight_steps")
"""Those of our configurations."""


def warn_without_mixture(generator: Any, args: Any) -> None:
    """Warn of each setting of the mixture, which does nothing where the student samples all completions.

    A preset's settings are its own.

    Args:
        generator: the `OptimalSamplingGenerator`.
        args: the configuration.
    """
    if getattr(args, "preset", None) is not None:
        return
    of_args, of_generator = _changed(args), _changed(generator)
    found = {name: of_generator[name] for name in OF_MIXTURE if name in of_generator}
    found |= {name: of_args[name] for name in OF_MIXED_ROWS if name in of_args}
    for name, value in found.items():
        warn_user(
            f"`{name}` is {value!r} and does nothing here: it is read of the mixture's completions, and the student "
            "samples all. Lower `theta_fraction`, or drop it."
        )


def _changed(args: Any) -> dict[str, Any]:
    """Return the values of the fields that are not at their default, by name."""
    defaults: Iterable[tuple[str, Any]] = (
        (field.name, field.default if field.default_factory is MISSING else field.default_factory())
        for field in fields(args)
    )
    return {name: getattr(args, name) for name, default in defaults if getattr(args, name) != default}
