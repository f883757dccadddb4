"""Options that a user may misspell: one way to refuse them, which names the nearest that exists."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from numbers import Integral

LARGEST = 1.7976931348623157e308
"""The largest finite float."""


def unknown_option(what: str, got: str, known: Iterable[str]) -> str:
    """The message for an option that does not exist: what it was, what was got, what is known, the nearest name."""
    names = sorted(known)
    close = get_close_matches(str(got), names, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"Unknown {what} {got!r}. Known: {', '.join(names)}.{hint}"


def check_number(owner: str, name: str, value: object, low: float, high: float = float("inf")) -> None:
    """Refuse what is no finite number in [low, high].

    Raises:
        ValueError: naming the option, what was got and what was wanted.
    """
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not low <= value <= min(high, LARGEST):  # type: ignore[operator]
        wanted = f"a number in [{low:g}, {high:g}]" if high != float("inf") else f"a finite number of at least {low:g}"
        raise ValueError(f"{owner}: `{name}` is {shown(value)}; wanted {wanted}. Pass one.")


def check_whole(
    owner: str,
    name: str,
    value: object,
    low: int | None = None,
    advice: str = "Pass one.",
    high: int | None = None,
) -> None:
    """Refuse what is no whole number in [low, high]; `advice` says what to do.

    Raises:
        ValueError: naming the option, what was got and what was wanted.
    """
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    if not whole or (low is not None and int(value) < low) or (high is not None and int(value) > high):  # type: ignore[call-overload]
        wanted = "a whole number"
        wanted += "" if low is None else f" of at least {low}" if high is None else f" from {low} to {high}"
        raise ValueError(f"{owner}: `{name}` is {shown(value)}; wanted {wanted}. {advice}")


def check_flag(owner: str, name: str, value: object) -> None:
    """Refuse what is neither True nor False: the text 'false' is true.

    Raises:
        ValueError: naming the option and what was got.
    """
    if not isinstance(value, bool):
        raise ValueError(f"{owner}: `{name}` is {shown(value)}; wanted True or False. Pass one of them.")


def shown(value: object) -> str:
    """A value as an error shows it: what is long, or cannot be shown, in short."""
    try:
        text = repr(value)
    except Exception:  # of a user's own class, or a whole number of more digits than Python prints
        return f"a {type(value).__name__} that cannot be printed"
    return text if len(text) <= 200 else f"{text[:200]}..."
