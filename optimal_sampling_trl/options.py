"""Refusals of options in one form: the option, the value that was given, and the values that are known or allowed."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from difflib import get_close_matches
from numbers import Integral


def unknown_option(what: str, got: str, known: Iterable[str]) -> str:
    """Message for an unknown option: its kind, the name that was given, the known names and the nearest of them."""
    names = sorted(known)
    close = get_close_matches(str(got), names, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"Unknown {what} {got!r}. Known: {', '.join(names)}.{hint}"


def check_number(owner: str, name: str, value: object, low: float, high: float = float("inf")) -> None:
    """Refuse a value that is not a finite number in [low, high].

    Args:
        owner: the class or function that takes the option, for the error.
        name: the option.
        value: the value that was given.
        low: the smallest value that is allowed.
        high: the largest.

    Raises:
        ValueError: naming the option, the value and the range.
    """
    number = isinstance(value, int | float) and not isinstance(value, bool)
    largest = sys.float_info.max
    if not number or not max(low, -largest) <= value <= min(high, largest):  # type: ignore[operator]
        wanted = "a finite number" if low == float("-inf") else f"a finite number of at least {low:g}"
        wanted = wanted if high == float("inf") else f"a number in [{low:g}, {high:g}]"
        raise ValueError(f"{owner}: `{name}` is {shown(value)}; wanted {wanted}. Pass one.")


def check_whole(
    owner: str,
    name: str,
    value: object,
    low: int | None = None,
    advice: str = "Pass one.",
    high: int | None = None,
) -> None:
    """Refuse a value that is not a whole number in [low, high].

    Args:
        owner: the class or function that takes the option, for the error.
        name: the option.
        value: the value that was given.
        low: the smallest value that is allowed; None is any.
        advice: ends the error, and tells the user how to go on.
        high: the largest value that is allowed; None is any.

    Raises:
        ValueError: naming the option, the value and the range.
    """
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    if not whole or (low is not None and int(value) < low) or (high is not None and int(value) > high):  # type: ignore[call-overload]
        wanted = "a whole number"
        wanted += "" if low is None else f" of at least {low}" if high is None else f" from {low} to {high}"
        raise ValueError(f"{owner}: `{name}` is {shown(value)}; wanted {wanted}. {advice}")


def check_flag(owner: str, name: str, value: object) -> None:
    """Refuse a value that is neither True nor False, since the text 'false' would count as true.

    Raises:
        ValueError: naming the option and the value.
    """
    if not isinstance(value, bool):
        raise ValueError(f"{owner}: `{name}` is {shown(value)}; wanted True or False. Pass one of them.")


def shown(value: object) -> str:
    """Text of a value for an error, cut after 200 characters; a type's name where the value cannot be printed."""
    try:
        text = repr(value)
    except Exception:  # of a user's own class, or a whole number of more digits than Python prints
        return f"a {type(value).__name__} that cannot be printed"
    return text if len(text) <= 200 else f"{text[:200]}..."
