"""Linear attention in the fused engine: each layer keeps a state of what it read, and the engine has to hold it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig

from ...pairing import has_states
from .families import OTHER_BACKEND

SETTINGS = {"enable_prefix_caching": False, "mamba_ssm_cache_dtype": "float32"}
"""Of an engine with states: each request has its own, and sums in float32."""


def check_states(configs: dict[str, PreTrainedConfig], arguments: Mapping[str, Any]) -> None:
    """Refuse linear attention where the engine's states were not seen to be right, and settings that go against them.

    Args:
        configs: of both models, by their roles.
        arguments: the engine's.

    Raises:
        ValueError: naming the model or the setting.
    """
    linear = [role for role, config in configs.items() if has_states(config)]
    if not linear:
        return
    name = f"{configs[linear[0]].name_or_path!r} has linear attention"
    if "teacher" not in linear:
        raise ValueError(
            f"The student {name} and the teacher has none: vLLM makes blocks for states where its own model has some, "
            f"which is the teacher. Wanted a teacher with linear attention. {OTHER_BACKEND}"
        )
    for setting, wanted in SETTINGS.items():
        if arguments.get(setting) not in (None, wanted):
            raise ValueError(
                f"The engine argument `{setting}` is {arguments[setting]!r}, and the {linear[0]} {name}; wanted "
                f"{wanted!r}, which this backend sets. Drop it."
            )
    if (dtype := _dtype(configs["teacher"], arguments)) != "bfloat16":
        raise ValueError(
            f"`dtype` is {dtype!r}, and the {linear[0]} {name}, which vLLM computes in 'bfloat16' alone. "
            f"Pass dtype='bfloat16'; in float32: {OTHER_BACKEND}"
        )


def _dtype(teacher: PreTrainedConfig, arguments: Mapping[str, Any]) -> str:
    asked = arguments.get("dtype") or "auto"
    return str(teacher.dtype if asked == "auto" else asked).removeprefix("torch.")
