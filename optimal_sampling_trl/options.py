"""Refusals of options in one form: the option, the value that was given, and the values that are known or allowed."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Collection, Iterable
from difflib import get_close_matches
from functools import wraps
from inspect import Parameter
from numbers import Integral
from typing import Any, TypeVar

C = TypeVar("C", bound=Callable[..., Any])

INFINITY = float("inf")

MANY = 40
"""Number of known names above which they are not listed."""
FEW = 5
"""Most names that are shown as the longer ones of a word."""
NEARLY = 0.8
"""Similarity from which a keyword counts as a misspelt one of a function that takes any keyword."""
NAMED = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)
"""Kinds of parameters that a keyword can name."""
MAX_MODEL_LEN = "`max_model_len` (of a trainer `vllm_max_model_length`, of a server `--max-model-len`)"
"""The setting of the context, as messages name it."""


def unknown_option(what: str, got: str, known: Iterable[str], otherwise: str = "") -> str:
    """Return the message for an unknown option: its kind, the given name, the known names and the nearest ones.

    Args:
        what: its kind.
        got: the given name.
        known: the known names.
        otherwise: ends the message where no known name is near.
    """
    names = sorted(known)
    near = _nearest(str(got), names)
    hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else otherwise and f" {otherwise}"
    listed = f" Known: {', '.join(names)}." if names else ""
    if len(names) > MANY:
        listed = "" if near else f" None of the {len(names)} known ones resembles it."
    return f"Unknown {what} {got!r}.{listed}{hint}"


def _nearest(got: str, names: list[str]) -> list[str]:
    """Return the names that begin with a word, where they are few; else the most similar one, if there is any."""
    longer = [name for name in names if got and name.startswith(got)]
    return longer if 0 < len(longer) <= FEW else get_close_matches(got, names, n=1)


def check_choice(name: str, value: Any, known: Collection[str]) -> None:
    """Refuse a value of an option that is none of the known ones.

    Raises:
        ValueError: naming the option, the value and the known ones.
    """
    if value not in known:
        raise ValueError(unknown_option(f"value of `{name}`", value, known))


class UnknownArgumentError(TypeError, ValueError):
    """A call has a keyword that does not exist: a TypeError as Python's, a ValueError as any refusal here."""


def suggest_arguments(**instead: str) -> Callable[[C], C]:
    """Return a decorator by which a function, or a class, answers an unknown keyword before anything is done.

    The answer names the nearest keyword. A function that takes further ones, such as an engine's, refuses those alone
    that are nearly one of its own.

    Args:
        **instead: for words of another interface, what is to be written here.
    """

    def decorate(called: C) -> C:
        function: Any = called.__init__ if isinstance(called, type) else called  # type: ignore[misc]
        kinds = {name: each.kind for name, each in inspect.signature(function).parameters.items() if name != "self"}
        takes_any = Parameter.VAR_KEYWORD in kinds.values()
        known = [name for name, kind in kinds.items() if kind in NAMED]
        owner = called.__qualname__.removesuffix(".__init__")

        @wraps(function)
        def checked(*positional: Any, **keywords: Any) -> Any:
            for name in keywords.keys() - set(known):
                if name in instead:
                    raise UnknownArgumentError(f"{owner} has no `{name}=`. Write `{instead[name]}`.")
                if not takes_any or get_close_matches(name, known, cutoff=NEARLY):
                    raise UnknownArgumentError(unknown_option(f"argument of {owner}", name, known))
            return function(*positional, **keywords)

        if isinstance(called, type):
            called.__init__ = checked  # type: ignore[misc]
            return called
        return checked  # type: ignore[return-value]

    return decorate


def check_number(
    owner: str,
    name: str,
    value: object,
    low: float = -INFINITY,
    high: float = INFINITY,
    advice: str = "Pass one.",
    *,
    above: float = -INFINITY,
    below: float = INFINITY,
) -> None:
    """Refuse a value that is not a finite number in the range that the limits leave.

    Args:
        owner: the class or function that takes the option, for the error.
        name: the option.
        value: the value that was given.
        low: the smallest value that is allowed.
        high: the largest.
        advice: ends the error, and tells the user how to go on.
        above: in place of `low`, the largest value that is too small.
        below: in place of `high`, the smallest value that is too large.

    Raises:
        ValueError: naming the option, the value and the range.
    """
    number = isinstance(value, int | float) and not isinstance(value, bool)
    largest = sys.float_info.max
    if number and max(low, -largest) <= value <= min(high, largest) and above < value < below:  # type: ignore[operator]
        return
    least, most = max(low, above), min(high, below)
    if most < INFINITY:
        wanted = f"a number in {'[' if low > above else '('}{least:g}, {most:g}{']' if high < below else ')'}"
    elif least > -INFINITY:
        wanted = f"a finite number {'of at least' if low > above else 'above'} {least:g}"
    else:
        wanted = "a finite number"
    raise ValueError(f"{owner}: `{name}` is {shown(value)}; wanted {wanted}. {advice}")


def check_whole(
    owner: str,
    name: str,
    value: object,
    low: int | None = None,
    advice: str = "Pass one.",
    high: int | None = None,
) -> int:
    """Return a whole number as Python's own, since JSON and engines take no other; refuse one outside of [low, high].

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
    return int(value)  # type: ignore[call-overload, no-any-return]


def check_flag(owner: str, name: str, value: object) -> None:
    """Refuse a value that is neither True nor False, since the text 'false' would count as true.

    Raises:
        ValueError: naming the option and the value.
    """
    if not isinstance(value, bool):
        raise ValueError(f"{owner}: `{name}` is {shown(value)}; wanted True or False. Pass one of them.")


def shown(value: object) -> str:
    """Return a value's text for an error, cut after 200 characters; its type's name if it cannot be printed."""
    try:
        text = repr(value)
    except Exception:  # of a user's own class, or a whole number of more digits than Python prints
        return f"a {type(value).__name__} that cannot be printed"
    return text if len(text) <= 200 else f"{text[:200]}..."
