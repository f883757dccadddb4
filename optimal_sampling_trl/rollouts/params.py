"""vLLM's `SamplingParams` in place of keywords."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass
from functools import wraps
from typing import Any, TypeVar

C = TypeVar("C", bound=Callable[..., Any])

READ = ("n", "max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "stop", "seed")
"""The fields that sampling from a mixture reads. They mean here what they mean in vLLM."""


def read_sampling_params(params: Any) -> dict[str, Any]:
    """Return vLLM's settings as keywords of `OptimalSamplingV1.generate`.

    Args:
        params: vLLM's `SamplingParams`, or an object with its fields, such as our `Sampling`.

    Raises:
        ValueError: on an object without these fields, and on a field that is set and not among `READ`.
    """
    if isinstance(params, type) or not hasattr(params, "temperature"):
        raise ValueError(
            f"`sampling_params` is {params!r}; wanted one `SamplingParams` for all prompts. Pass one, or the settings "
            "as keywords: temperature and mixture may differ from prompt to prompt."
        )
    names = [each.name for each in fields(params)] if is_dataclass(params) else list(params.__struct_fields__)
    read = {name: getattr(params, name) for name in READ if name in names}
    alike = type(params)(**read)  # what vLLM derives from these fields is the same there
    for name in set(names) - read.keys():
        if not name.startswith("_") and getattr(params, name) != getattr(alike, name):
            raise ValueError(
                f"`sampling_params` has {name}={getattr(params, name)!r}, which sampling from a mixture does not "
                f"read; it reads {', '.join(READ)}. Drop it."
            )
    return {name: value for name, value in read.items() if value is not None or name == "max_tokens"}


def takes_sampling_params(function: C) -> C:
    """Let a method `f(self, prompts, max_tokens, ...)` take vLLM's `SamplingParams` after its prompts, too.

    Raises:
        ValueError: where a setting is given beside it.
    """

    @wraps(function)
    def translated(self: Any, prompts: Any, *positional: Any, sampling_params: Any = None, **keywords: Any) -> Any:
        if positional and (hasattr(positional[0], "temperature") or isinstance(positional[0], list)):
            sampling_params, *positional = positional  # type: ignore[assignment]
        if sampling_params is None:
            return function(self, prompts, *positional, **keywords)
        twice = sorted(keywords.keys() & set(READ))
        if positional or twice:
            got = f"`{twice[0]}`" if twice else "a further setting by its place"
            raise ValueError(
                f"`sampling_params` was given and {got} beside it; wanted one of the two. Drop the other."
            )
        return function(self, prompts, **read_sampling_params(sampling_params), **keywords)

    return translated  # type: ignore[return-value]
