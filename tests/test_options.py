"""Refusals of options in one form."""

from __future__ import annotations

import inspect
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from optimal_sampling_trl.options import (
    check_choice,
    check_flag,
    check_number,
    check_whole,
    shown,
    suggest_arguments,
    unknown_option,
)


def test_an_unknown_option_is_told_the_nearest() -> None:
    assert unknown_option("method", "entropi", ["kl", "entropy"]) == (
        "Unknown method 'entropi'. Known: entropy, kl. Did you mean 'entropy'?"
    )
    assert unknown_option("method", "xyz", ["kl", "entropy"]) == "Unknown method 'xyz'. Known: entropy, kl."
    told = unknown_option("method", "xyz", ["kl"], otherwise="The paper lists them.")
    assert told == "Unknown method 'xyz'. Known: kl. The paper lists them."
    assert unknown_option("method", "kll", ["kl"], otherwise="The paper lists them.").endswith(" Did you mean 'kl'?")


def test_a_choice_is_one_of_those_that_are_known() -> None:
    check_choice("mode", "kl", ("kl", "entropy"))
    told = r"^Unknown value of `mode` 'entropi'\. Known: entropy, kl\. Did you mean 'entropy'\?$"
    with pytest.raises(ValueError, match=told):
        check_choice("mode", "entropi", ("kl", "entropy"))


def test_of_many_names_the_nearest_alone_is_told() -> None:
    known = [f"name_{index}" for index in range(100)]
    assert unknown_option("flag", "name_7x", known) == "Unknown flag 'name_7x'. Did you mean 'name_7'?"
    assert unknown_option("flag", "zzz", known) == "Unknown flag 'zzz'. None of the 100 known ones resembles it."


def test_a_name_that_was_cut_short_is_told_what_begins_with_it() -> None:
    """`--model` is more like `--mode` than like `--model_name_or_path`, and means the second."""
    known = ["--mode", "--model_name_or_path", "--model_revision"]
    assert unknown_option("flag", "--model", known).endswith(
        " Did you mean '--model_name_or_path' or '--model_revision'?"
    )
    assert unknown_option("flag", "", known).endswith(f"Known: {', '.join(known)}.")
    many = [f"name_{index}" for index in range(9)]
    assert unknown_option("flag", "name", many).endswith(" Did you mean 'name_8'?")


@suggest_arguments(maximum="most=")
def cut(text: str, *, most: int = 3, **further: int) -> str:
    return text[:most] + str(len(further))


@suggest_arguments()
@dataclass(frozen=True)
class Point:
    left: int = 0


def test_a_misspelt_argument_is_told_the_nearest() -> None:
    assert (cut("abcd", most=2), cut(text="abcd", depth=1), Point(1).left) == ("ab0", "abc1", 1)
    with pytest.raises(TypeError, match=r"Unknown argument of cut 'mostt'\. Known: most, text\."):
        cut("abcd", mostt=2)
    with pytest.raises(ValueError, match=r"cut has no `maximum=`\. Write `most=`\."):
        cut("abcd", maximum=2)
    with pytest.raises(TypeError, match=r"argument of Point 'lefft'\. Known: left\. Did you mean 'left'\?"):
        Point(lefft=1)  # type: ignore[call-arg]
    assert list(inspect.signature(cut).parameters) == ["text", "most", "further"]


@pytest.mark.parametrize("value", [0, 1, 0.5, -0.0])
def test_a_number_in_range_passes(value: Any) -> None:
    check_number("Owner", "name", value, 0.0, 1.0)


def test_the_largest_float_is_finite_and_infinity_is_not() -> None:
    check_number("Owner", "name", sys.float_info.max, 0.0)
    with pytest.raises(ValueError, match="Owner: `name` is inf; wanted a finite number of at least 0"):
        check_number("Owner", "name", float("inf"), 0.0)


@pytest.mark.parametrize("value", [-1e-9, 1.01, float("nan"), True, "1", None, 10**400])
def test_other_values_are_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=r"Owner: `name` is .*; wanted a number in \[0, 1\]"):
        check_number("Owner", "name", value, 0.0, 1.0)


@pytest.mark.parametrize(
    ("limits", "inside", "outside", "wanted"),
    [
        ({}, [-1e300, 0], [float("nan"), -float("inf")], "a finite number"),
        ({"above": 0.0}, [1e-300, 3], [0, -0.0, -1, float("inf")], "a finite number above 0"),
        ({"high": 1.0, "above": 0.0}, [1e-9, 1], [0.0, 1.01, True], "a number in (0, 1]"),
        ({"above": 0.0, "below": 1.0}, [0.5], [0, 1, 1.0], "a number in (0, 1)"),
        ({"low": 0.0, "below": 1.0}, [0, 0.999], [-1e-9, 1], "a number in [0, 1)"),
    ],
)
def test_a_limit_may_be_open(limits: dict[str, float], inside: list[Any], outside: list[Any], wanted: str) -> None:
    for value in inside:
        check_number("Owner", "name", value, **limits)
    for value in outside:
        with pytest.raises(ValueError) as error:  # noqa: PT011
            check_number("Owner", "name", value, advice="One is best.", **limits)
        assert str(error.value) == f"Owner: `name` is {value!r}; wanted {wanted}. One is best."


@pytest.mark.parametrize(
    ("limits", "value", "wanted"),
    [
        ({}, 1.0, "wanted a whole number. Pass one."),
        ({"low": 1}, 0, "wanted a whole number of at least 1. Pass one."),
        ({"low": 1, "high": 3, "advice": "Two is best."}, 4, "wanted a whole number from 1 to 3. Two is best."),
        ({"low": 0}, True, "wanted a whole number of at least 0. Pass one."),
    ],
)
def test_whole_numbers(limits: dict[str, Any], value: Any, wanted: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011
        check_whole("Owner", "name", value, **limits)
    assert str(error.value) == f"Owner: `name` is {value!r}; {wanted}"
    assert type(check_whole("Owner", "name", np.int64(2), **limits)) is int


def test_a_flag_is_no_text() -> None:
    check_flag("Owner", "name", False)
    with pytest.raises(ValueError, match="Owner: `name` is 'false'; wanted True or False"):
        check_flag("Owner", "name", "false")


def test_a_value_that_is_long_or_cannot_be_printed_is_shown_in_short() -> None:
    class Broken:
        def __repr__(self) -> str:
            raise RuntimeError

    assert shown("x" * 300) == "'" + "x" * 199 + "..."
    assert shown(Broken()) == "a Broken that cannot be printed"
