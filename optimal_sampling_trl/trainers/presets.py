"""Settings of publications that sample from a mixture, in the words of this package: `preset=` of a configuration.

A preset is what its source sets. It fills those fields of the configuration and the generator that have their default,
and refuses one that is set to another value, so that a run under its name is the source's. For a variation take
`preset_settings` and `Mixture.preset`, change them, and set no `preset`. A field that is set to its default on purpose
cannot be told from one that is not set: the preset overrules it.

Models, batch sizes and learning rates are the user's; a preset sets none.
"""

from __future__ import annotations

from dataclasses import MISSING, Field, dataclass, field, fields, replace
from typing import Any

from ..mixture import Mixture
from ..mixture.presets import check_preset, published
from .generator import OptimalSamplingGenerator


@dataclass(frozen=True)
class Preset:
    """Hold what a publication sets.

    Args:
        title: name of the method, for readers.
        url: the publication.
        source: the code, or the place in the paper, that the settings were read from.
        trainer: name of the configuration that takes the preset.
        settings: fields of the configuration.
        generator: fields of the generator beside its mixture.
        differs: what the source does that the settings do not.
    """

    title: str
    url: str
    source: str
    trainer: str
    settings: dict[str, Any]
    generator: dict[str, Any] = field(default_factory=dict)
    differs: str = ""


PRESETS = {
    "mentor": Preset(
        "MENTOR",
        "https://arxiv.org/abs/2510.04140",
        "Jiangzs1028/MENTOR@f9b4fb5: vllm/model_executor/layers/rejection_sampler.py:193 (α), "
        "verl/workers/rollout/vllm_rollout_spmd.py:109 (γ), verl/trainer/core_algos.py:171-228 (advantages), "
        "verl/trainer/ray_trainer.py:633 (cosine), verl/workers/actor/config.py:86-92 (clip), "
        "examples/train.sh (8 + 4 completions, quantile 0.95, 120 steps)",
        "GRPOConfig",
        {
            "baseline": "own",
            "positive_only": "mixture",
            "correction": "none",
            "mixture_weight_steps": 120,
            "scale_rewards": "group",
            "loss_type": "dapo",
            "epsilon": 0.2,
            "epsilon_high": 0.28,
            "delta": 3.0,
            "beta": 0.0,
        },
        {"theta_fraction": 2 / 3, "entropy_quantile": 0.95},
        "The source takes the quantile over the tokens of both halves, from the training pass, and its first batch "
        "has γ = 999, so that the student samples nearly alone; here it is over the mixture's tokens, from their "
        "records, and the first batch has γ = 1.5. After 120 steps the source samples 8 completions, here all 12 are "
        "the student's.",
    ),
    "logit-fusion": Preset(
        "Logit Fusion",
        "https://github.com/juzhengz/logit-fusion",
        "a blog of 25 February 2026 without an arXiv number; juzhengz/logit-fusion@404082a: "
        "scripts/run_logit_fusion_dapo.sh:10-11 and 34-36 (α 0.5, linear), :52-60 (loss, clip, ratio θ/q of each "
        "token), trl/trainer/grpo_config.py (`logit_fusion_is_ratio_clip_max` 3.0), trl/trainer/grpo_trainer.py "
        "(`LogitsFusionProcessor`, `_get_logit_fusion_alpha`, `_get_difficulty_alpha_scales`, `_compute_loss`)",
        "GRPOConfig",
        {
            "positive_only": "none",
            "correction": "token_truncate",
            "correction_clip_max": 3.0,
            "importance_sampling_level": "token",
            "loss_type": "dapo",
            "epsilon": 0.2,
            "epsilon_high": 0.28,
            "beta": 0.0,
        },
        {"theta_fraction": 0.0, "schedule": 1.0},
        "The source anneals over 5 000 steps whatever the length of the run, here over the whole run. While α is "
        "above 0 it cuts the ratio θ/q off at 3 in place of its clip, and a token above 3 has no gradient; here its "
        "weight is 3. A variant, which no launcher of the source switches on, multiplies α by (d - 1)/9, of a "
        "difficulty d from 1 to 10 that the data set has in a column. The generator's `alpha_by_success` multiplies "
        "it by 1 less the share of the student's own completions of the prompt that succeed; the preset sets neither.",
    ),
    "trb": Preset(
        "TRB",
        "https://arxiv.org/abs/2605.31159",
        "the paper's sweep, ε in {.001, .005, .01, .02, .05} annealed over {15, 25, 50} of 400 steps; its middle, "
        "since the chosen pair was not found; no code was found",
        "DistillationConfig",
        {"loss": "divergence", "beta": 1.0, "correction": "none"},
        {"theta_fraction": 0.0, "schedule": 25 / 400},
        "The source's reverse KL is over the student's 16 likeliest tokens, here over the vocabulary.",
    ),
    "minillm": Preset(
        "MiniLLM",
        "https://arxiv.org/abs/2306.08543",
        "microsoft/LMOps@4f2a9de: minillm/scripts/gpt2/minillm/train_base_xl.sh:75-76 (single-step term, α 0.2), "
        "minillm/minillm/sampler.py:112-115 (q, and w = θ/q per token), minillm/minillm/losses.py:98-108 and 169-173 "
        "(`_reg_loss`)",
        "DistillationConfig",
        {"loss": "divergence", "beta": 1.0, "correction": "none"},
        {"theta_fraction": 0.0},
        "This is the single-step term of the source's loss, which has no weight in its code. Its policy gradient of "
        "the later tokens, with the ratios θ/q, and its language-modelling loss on other texts are left out.",
    ),
    "skd": Preset(
        "SKD",
        "https://arxiv.org/abs/2410.11325",
        "google-research/google-research: speculative_kd/config/kd_train.yaml (K 25, forward KL, all completions "
        "swapped), speculative_kd/train/ddp_skd.py (the loss, over the vocabulary), "
        "speculative_kd/transformers/utils.py (`_speculative_kd_sampling`)",
        "DistillationConfig",
        {"loss": "divergence", "beta": 0.0, "correction": "none"},
        {"theta_fraction": 0.0},
        "The source's configuration has temperature 0.5 and top_p 0.5 for the student, 0.2 and 0.5 for the teacher, "
        "and a loss at temperature 1; here both models and the loss have one `temperature`, and top_p cuts q. It "
        "takes the K likeliest from what top_p leaves of the teacher, here they are of its whole row. As its code "
        "reads, a second draw of the student is looked up among them and the first one is kept; here it is the token "
        "itself, as in the paper. Its K that falls within a completion (`expected_seq_len`, off in its "
        "configuration) is left out.",
    ),
}
"""The presets by name."""


def preset_settings(name: str) -> dict[str, Any]:
    """Return the fields of the configuration that a preset sets, to start a variation from.

    Example:
        ```python
        settings = preset_settings("mentor") | {"positive_only": "none"}
        ```

    Raises:
        ValueError: on a name that is no preset.
    """
    check_preset(name)
    return dict(PRESETS[name].settings)


def apply_preset(config: Any) -> None:
    """Set the fields of a configuration that its `preset` names, where they stand at their default.

    Raises:
        ValueError: on a name that is no preset, one of another trainer, or a field that is set to another value.
    """
    name, kind = config.preset, type(config).__name__
    if name is None:
        return
    check_preset(name)
    if (wanted := PRESETS[name].trainer) not in {base.__name__ for base in type(config).__mro__}:
        raise ValueError(
            f"`preset` is {name!r} in a `{kind}`; wanted it in a `{wanted}`, whose loss the source uses. Use that "
            f"trainer, or take the mixture alone: Mixture.preset({name!r})."
        )
    for setting, value in PRESETS[name].settings.items():
        setattr(config, setting, _settle(config, setting, value, name))


@dataclass
class PresetConfig:
    """The name of a publication whose settings a configuration takes; see the head of this module.

    Raises:
        ValueError: on a name that is no preset, or a field that is set to another value than the preset's.
    """

    preset: str | None = field(
        default=None,
        metadata={
            "help": "A publication whose mixture, schedule, share, baseline, correction and clip are set. A field "
            "that it sets and that is set to another value is refused.",
            "choices": tuple(PRESETS),
        },
    )

    def __post_init__(self) -> None:
        apply_preset(self)
        super().__post_init__()  # type: ignore[misc]


def with_preset(generator: OptimalSamplingGenerator, name: str | None) -> OptimalSamplingGenerator:
    """Return the generator with what a preset sets, where its fields stand at their default.

    Raises:
        ValueError: where a field is set to another value than the preset's.
    """
    if name is None:
        return generator
    wanted = {"mixture": Mixture.preset(name)} | PRESETS[name].generator
    return replace(generator, **{key: _settle(generator, key, value, name) for key, value in wanted.items()})


def _settle(owner: Any, setting: str, value: Any, preset: str) -> Any:
    """Return a preset's value of a field; refuse one that the user has set otherwise."""
    given = getattr(owner, setting)
    default = _default({one.name: one for one in fields(owner)}[setting])
    if given not in (default, value):
        raise ValueError(
            f"`{setting}` is {given!r} beside `preset={preset!r}`, which sets {value!r}: a preset is what its source "
            f"sets. Drop `{setting}`, or for a variation drop `preset` and set the fields of "
            f"`optimal_sampling_trl.trainers.presets.preset_settings({preset!r})` and `Mixture.preset({preset!r})`."
        )
    return value


def _default(one: Field[Any]) -> Any:
    return one.default if one.default_factory is MISSING else one.default_factory()


def preset_table() -> str:
    """Return the table of the presets in Markdown, as it stands in docs/presets.md."""
    lines = ["| preset | trainer | mixture | generator | configuration |", "|---|---|---|---|---|"]
    for name, preset in PRESETS.items():
        cells = (
            f"`{name}`: [{preset.title}]({preset.url})",
            f"`{preset.trainer.removesuffix('Config')}Trainer`",
            *map(_cell, (published(name), preset.generator, preset.settings)),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(settings: dict[str, Any]) -> str:
    return ", ".join(f"`{name}={_number(value)}`" for name, value in settings.items())


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else repr(value)
