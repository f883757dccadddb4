"""Options that a user may misspell: one way to refuse them, which names the nearest that exists."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from numbers import Integral


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
    if not number or not low <= value <= high or value == float("inf"):  # type: ignore[operator]
        wanted = f"a number in [{low:g}, {high:g}]" if high != float("inf") else f"a finite number of at least {low:g}"
        raise ValueError(f"{owner}: `{name}` is {value!r}; wanted {wanted}.")


def check_whole(owner: str, name: str, value: object, low: int | None = None, advice: str = "") -> None:
    """Refuse what is no whole number of at least `low`; `advice` says what to do.

    Raises:
        ValueError: naming the option, what was got and what was wanted.
    """
    if not isinstance(value, Integral) or isinstance(value, bool) or (low is not None and int(value) < low):
        wanted = "a whole number" if low is None else f"a whole number of at least {low}"
        raise ValueError(f"{owner}: `{name}` is {value!r}; wanted {wanted}. {advice}".rstrip())
