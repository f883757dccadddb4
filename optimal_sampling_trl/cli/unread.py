"""TRL's flags for models and data, each with what reads it: one that nothing will read is named by a warning.

TRL takes most of them silently: `--lora_r 64` without `--use_peft` trains the whole model. As with the unread fields
of a training's configuration, a warning is enough: a YAML file may well keep the flags of LoRA beside
`use_peft: false`.
"""

from __future__ import annotations

from collections.abc import Container
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ..trainers.unread import Rule, never, warn_of_one
from .data import DATA_FILES


def _always(flags: Any) -> bool:
    return True


RULES = (
    Rule(("model_name_or_path", "model_revision", "dtype", "attn_implementation"), _always, ""),
    Rule(("use_peft", "load_in_8bit", "load_in_4bit"), _always, ""),
    Rule(
        (
            *("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_target_parameters"),
            *("lora_modules_to_save", "lora_task_type", "use_rslora", "use_dora"),
        ),
        lambda flags: flags.use_peft,
        "with `--use_peft`, without which the whole model is trained",
    ),
    Rule(
        ("bnb_4bit_quant_type", "use_bnb_nested_quant", "bnb_4bit_quant_storage"),
        lambda flags: flags.load_in_4bit,
        "with `--load_in_4bit`",
    ),
    Rule(("dataset_name", "dataset_train_split", "dataset_streaming"), _always, ""),
    Rule(
        ("dataset_config",),
        lambda flags: Path(flags.dataset_name or "").suffix not in DATA_FILES,
        "of a data set on the Hub or in a folder, not of a file",
    ),
    Rule(
        ("dataset_test_split",), lambda flags: flags.evaluates, "by a training that evaluates (its `--eval_strategy`)"
    ),
    Rule(("ignore_bias_buffers",), never, "by TRL's script for DPO alone"),
)
"""Every field of TRL's `ModelConfig` and `ScriptArguments`, each under one rule."""


def warn_of_unread_flags(named: Container[str], *arguments: Any, evaluates: bool = False) -> None:
    """Warn of each flag that is set and that nothing reads; one that is false or null asks for nothing.

    Args:
        named: the fields that a command line sets. One that is set to its default is meant, too.
        *arguments: the dataclasses that were read from it.
        evaluates: True where a training evaluates.
    """
    values = {name: value for each in arguments for name, value in vars(each).items()}
    flags = SimpleNamespace(**values, evaluates=evaluates)
    given = {name for name, value in values.items() if name in named and value is not None and value is not False}
    for rule in RULES:
        for name in rule.names:
            if name in given and not rule.is_read(flags):
                warn_of_one(f"--{name}", values[name], rule.reader)
