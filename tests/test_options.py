"""Refusals of options in one form."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from optimal_sampling_trl.options import check_flag, check_number, check_whole, shown, unknown_option


def test_an_unknown_option_is_told_the_nearest() -> None:
    assert unknown_option("method", "entropi", ["kl", "entropy"]) == (
        "Unknown method 'entropi'. Known: entropy, kl. Did you mean 'entropy'?"
    )
    assert unknown_option("method", "xyz", ["kl", "entropy"]) == "Unknown method 'xyz'. Known: entropy, kl."


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
    check_whole("Owner", "name", 2, **limits)


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
