"""Layers with states in the fused engine: linear attention, Mamba layers, short convolutions keep what they read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig

from ...pairing import has_states
from .families import OTHER_BACKEND

SETTINGS = {"enable_prefix_caching": False, "mamba_ssm_cache_dtype": "float32"}
"""Of an engine with states: each request has its own, and sums in float32."""


def check_states(configs: dict[str, PreTrainedConfig], arguments: Mapping[str, Any]) -> None:
    """Refuse states where the engine's were not seen to be right, and settings that go against them.

    Args:
        configs: of both models, by their roles.
        arguments: the engine's.

    Raises:
        ValueError: naming the model or the setting.
    """
    found = [role for role, config in configs.items() if has_states(config)]
    if not found:
        return
    name = f"{configs[found[0]].name_or_path!r} has layers with states"
    if "teacher" not in found:
        raise ValueError(
            f"The student {name} and the teacher has none: vLLM makes blocks for states where its own model has some, "
            f"which is the teacher. Wanted a teacher with such layers. {OTHER_BACKEND}"
        )
    for setting, wanted in SETTINGS.items():
        if arguments.get(setting) not in (None, wanted):
            raise ValueError(
                f"The engine argument `{setting}` is {arguments[setting]!r}, and the {found[0]} {name}; wanted "
                f"{wanted!r}, which this backend sets. Drop it."
            )
    if (dtype := _dtype(configs["teacher"], arguments)) != "bfloat16":
        raise ValueError(
            f"`dtype` is {dtype!r}, and the {found[0]} {name}, which were checked in 'bfloat16' alone. "
            f"Pass dtype='bfloat16'; in float32: {OTHER_BACKEND}"
        )


def _dtype(teacher: PreTrainedConfig, arguments: Mapping[str, Any]) -> str:
    asked = arguments.get("dtype") or "auto"
    return str(teacher.dtype if asked == "auto" else asked).removeprefix("torch.")
