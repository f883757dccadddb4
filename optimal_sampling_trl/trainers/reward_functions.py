"""A user's reward functions: refused in words where they cannot be called, or return something else than rewards."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import wraps
from numbers import Real
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from trl.trainer.utils import is_async_callable

from ..options import shown

FINITE = "a finite number (at most 3.4e38 in size, as float32 holds it)"
"""Words for a reward that float32 holds, in a refusal."""


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
        ValueError: where it is no list, is longer or shorter, or holds something else than finite numbers, NaN
            and None. The last two stand for no reward; of an infinite one no advantage can be made.
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
        if reward is not None and not _is_held(reward):
            raise ValueError(
                f"The reward function {name!r} returned {shown(reward)} ({type(reward).__name__}) for completion "
                f"{index}; wanted {FINITE}, or None where it has none to give. Return None, or the worst or best "
                "reward that is meant."
            )
    return found


def check_totals(
    rewards: Float[Tensor, "N F"], weights: Float[Tensor, " F"], totals: Float[Tensor, " N"], names: Sequence[str]
) -> None:
    """Refuse a total that is not finite: a reward model may give one, and weights may make one of finite rewards.

    Args:
        rewards: what each of F functions gave for N completions.
        weights: those of the functions.
        totals: the weighted sums; NaN where infinite parts cancel.
        names: what TRL calls the functions.

    Raises:
        ValueError: naming the completion, and each function's reward and weight.
    """
    infinite = (~totals.isfinite() | rewards.isinf().any(1)).nonzero().flatten()
    if not len(infinite):
        return
    row = int(infinite[0])
    parts = zip(names, rewards[row].tolist(), weights.tolist(), strict=True)
    raise ValueError(
        f"The total reward of completion {row} is {float(totals[row]):g}: "
        f"{' + '.join(f'{name!r} {reward:g} × {weight:g}' for name, reward, weight in parts)}; wanted {FINITE}. "
        "Bound what is infinite or large, or lower `reward_weights`."
    )


def _is_held(reward: Any) -> bool:
    """Return True for NaN, and for a number that stays finite in float32, in which TRL keeps rewards."""
    try:
        return not abs(float(reward)) > torch.finfo(torch.float32).max
    except OverflowError:  # of a whole number
        return False
