"""A user's reward functions: refused in words where they cannot be called, or return something else than rewards."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import wraps
from numbers import Real
from typing import Any

from torch import nn
from trl.trainer.utils import is_async_callable

from ..options import shown


def check_reward_funcs(reward_funcs: Any) -> None:
    """Refuse an entry of `reward_funcs` that is no function, no model and no name of one.

    Raises:
        ValueError: naming the entry.
    """
    for function in reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]:
        if function is not None and not callable(function) and not isinstance(function, str):
            raise ValueError(
                f"`reward_funcs` has {shown(function)} ({type(function).__name__}); wanted a function of completions "
                "that returns a list of numbers, or a reward model. Pass the function itself, without calling it."
            )


def checked(function: Any, name: str) -> Any:
    """Return a reward function that does the same, and whose wrong call or result is told in words.

    A reward model is returned as it is: TRL calls it by itself.

    Args:
        function: the user's, which may be `async`.
        name: what TRL calls it.
    """
    if isinstance(function, nn.Module):
        return function

    @wraps(function)
    def ask(**given: Any) -> Any:
        check_call(function, name, given)
        return rewards_of(function(**given), name, len(given["completions"]))

    @wraps(function)
    async def ask_later(**given: Any) -> Any:
        check_call(function, name, given)
        return rewards_of(await function(**given), name, len(given["completions"]))

    return ask_later if is_async_callable(function) else ask


def check_call(function: Callable[..., Any], name: str, given: dict[str, Any]) -> None:
    """Refuse a function that does not take what TRL passes.

    Raises:
        ValueError: naming what it lacks or does not take, and what it is passed.
    """
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # of a function that is written in C
        return
    try:
        signature.bind(**given)
    except TypeError as error:
        raise ValueError(
            f"The reward function {name!r} cannot be called as TRL calls it: {error}. It is passed by name "
            f"{', '.join(given)}, of which the columns of the data set are a part. Add `**kwargs` for those that it "
            "does not read, or a column to the data set."
        ) from error


def rewards_of(rewards: Any, name: str, completions: int) -> Sequence[Any]:
    """Return what a reward function returned for a number of completions as a list.

    TRL gives a list of one number to all completions.

    Raises:
        ValueError: where it is no list, is longer or shorter, or holds something else than numbers and None.
    """
    try:
        found = list(rewards)
    except TypeError as error:
        raise ValueError(
            f"The reward function {name!r} returned {shown(rewards)} ({type(rewards).__name__}); wanted a list with a "
            "number for each completion. Return one."
        ) from error
    if len(found) != completions:
        raise ValueError(
            f"The reward function {name!r} returned a list of {len(found)}; wanted {completions} numbers, one for "
            "each completion, in their order. Return None for a completion without one."
        )
    for index, reward in enumerate(found):
        is_scalar = isinstance(reward, Real) or getattr(reward, "shape", None) == ()  # of NumPy or torch
        if reward is not None and not is_scalar:
            raise ValueError(
                f"The reward function {name!r} returned {shown(reward)} ({type(reward).__name__}) for completion "
                f"{index}; wanted a number, or None where it has none to give. Return one."
            )
    return found
