"""The settings of a mixture: refusals, values and back, annealing, and the one order of the fields."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
import torch
from hypothesis import given

from helpers.strategies import RANGED, mixtures
from optimal_sampling_trl.mixture import CHOICES, FIELDS, FORMS, METHODS, Mixture, MixtureRows, mix
from optimal_sampling_trl.mixture.settings import OWN


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"method": "kl_symetry"}, r"Unknown mixture method 'kl_symetry'\. Known: .*Did you mean 'kl_symmetry'\?"),
        ({"method": None}, r"Unknown mixture method None\. Known: entropy, entropy_gate, ess_balance, fixed"),
        ({"alpha_min": -0.1}, r"Mixture: `alpha_min` is -0\.1; wanted a number in \[0, 1\]"),
        ({"alpha_max": 1.5}, r"Mixture: `alpha_max` is 1\.5; wanted a number in \[0, 1\]"),
        ({"alpha_min": True}, r"Mixture: `alpha_min` is True; wanted a number"),
        ({"alpha_max": "0.5"}, r"Mixture: `alpha_max` is '0\.5'; wanted a number"),
        ({"alpha_max": math.nan}, r"Mixture: `alpha_max` is nan; wanted a number"),
        ({"fixed_alpha": None}, r"Mixture: `fixed_alpha` is None; wanted a number"),
        ({"fixed_alpha": 2}, r"Mixture: `fixed_alpha` is 2; wanted a number in \[0, 1\]"),
        ({"form": "arithmetical"}, r"Unknown mixture form 'arithmetical'\. Known: .*Did you mean 'arithmetic'\?"),
        (
            {"method": "ess_balance", "form": "arithmetic"},
            r"`method` is 'ess_balance' and `form` is 'arithmetic', whose solution is 1/2 .*Use Mixture\('fixed'",
        ),
        ({"epsilon": -1.0}, r"Mixture: `epsilon` is -1\.0; wanted a finite number of at least 0"),
        ({"epsilon": math.inf}, r"Mixture: `epsilon` is inf; wanted a finite number"),
        ({"epsilon": math.nan}, r"Mixture: `epsilon` is nan; wanted a finite number"),
        ({"entropy_scale": -1.0}, r"Mixture: `entropy_scale` is -1\.0; wanted a finite number above 0"),
        (
            {"entropy_scale": 0},
            r"Mixture: `entropy_scale` is 0; wanted a finite number above 0\. .*in nats.*teacher_only",
        ),
        (
            {"alpha_min": 0.8, "alpha_max": 0.2},
            r"`alpha_min` is 0\.8 and `alpha_max` is 0\.2; wanted alpha_min <= alpha_max\. Lower the first or raise",
        ),
        (
            {"method": "top_k_swap", "form": "arithmetic"},
            r"`method` is 'top_k_swap' and `form` is 'arithmetic'; wanted none, .*of its own\. Drop `form`",
        ),
        (
            {"method": "top_k_swap", "alpha_min": 0.1},
            r"'top_k_swap' with `alpha_min` 0\.1 and `alpha_max` 1\.0; wanted 0 and 1, .*`swap_top_k` says how much",
        ),
        ({"method": "top_k_swap", "alpha_max": 0.0}, r"with `alpha_min` 0\.0 and `alpha_max` 0\.0; wanted 0 and 1"),
        ({"swap_top_k": 0}, r"Mixture: `swap_top_k` is 0; wanted a whole number from 1 to 16777216"),
        ({"swap_top_k": 2.5}, r"Mixture: `swap_top_k` is 2\.5; wanted a whole number"),
        ({"swap_top_k": True}, r"Mixture: `swap_top_k` is True; wanted a whole number"),
        (
            {"method": "fixed", "alpha_min": 0.6},
            r"`fixed_alpha` is 0\.5, outside of \[alpha_min, alpha_max\] = \[0\.6, 1\.0\].*Widen the range",
        ),
    ],
)
def test_mixture_refuses(fields: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Mixture(**fields)


def test_mixture_is_frozen_and_accepts_whole_numbers() -> None:
    mixture = Mixture(alpha_min=0, alpha_max=1)
    assert mixture == Mixture()
    assert len({mixture, Mixture()}) == 1
    with pytest.raises(FrozenInstanceError):
        mixture.alpha_min = 0.5  # type: ignore[misc]


@given(mixtures())
def test_mixture_as_values_and_back(mixture: Mixture) -> None:
    values = mixture.to_dict()
    assert Mixture.from_dict(values) == mixture
    names = {"method", "alpha_min", "alpha_max", "fixed_alpha", "epsilon", "form", "entropy_scale", "swap_top_k"}
    assert set(values) == names
    columns = MixtureRows.of([mixture])
    assert METHODS[int(columns.method)] == mixture.method
    assert FORMS[int(columns.form)] == mixture.form
    numbers = [name for name in FIELDS if name not in CHOICES]
    assert [float(getattr(columns, name)) for name in numbers] == [values[name] for name in numbers]


def test_values_of_an_older_version_are_geometric() -> None:
    old = {"method": "trust_region", "alpha_min": 0.0, "alpha_max": 1.0, "fixed_alpha": 0.5, "epsilon": 0.1}
    assert Mixture.from_dict(old) == Mixture("trust_region", epsilon=0.1, form="geometric")


def test_a_key_that_no_mixture_has_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Unknown field of a mixture 'alpha_mn'\. .*Did you mean 'alpha_min'\?"):
        Mixture.from_dict({"method": "fixed", "alpha_mn": 0.1})
    with pytest.raises(ValueError, match=r"`alpha_min` is 0\.9 and `alpha_max` is 0\.1"):
        Mixture.from_dict({"alpha_min": 0.9, "alpha_max": 0.1})


def test_a_field_of_another_method_is_told() -> None:
    given = {"fixed_alpha": 0.25, "epsilon": 0.01, "entropy_scale": 1.5, "swap_top_k": 3}
    assert set(OWN) == set(given)
    assert set(FIELDS) - set(OWN) == {"method", "form", "alpha_min", "alpha_max"}
    for name, reads in OWN.items():
        for method in METHODS:
            mixture = Mixture(method, **{name: given[name]})
            assert mixture.unread() == ({} if method == reads else {name: reads})
    assert Mixture("trust_region", epsilon=0.1).own() == {"epsilon": 0.1}
    assert Mixture().own() == {}
    assert Mixture(epsilon=0.01, swap_top_k=3).unread() == {"epsilon": "trust_region", "swap_top_k": "top_k_swap"}
    wanted = (
        r"^Owner: `swap_top_k` is 3, and the method 'entropy' does not read it; wanted it with 'top_k_swap'\. Drop"
    )
    with pytest.raises(ValueError, match=wanted):
        Mixture("entropy", swap_top_k=3).check_read("Owner")


@pytest.mark.parametrize("name", OWN)
def test_the_table_of_fields_is_what_the_solver_reads(name: str) -> None:
    """α of a row moves with a field under the method that the table names, and under no other."""
    torch.manual_seed(0)
    pair = torch.randn(2, 20, 40).double().log_softmax(-1)
    one, other = {"fixed_alpha": (0.2, 0.7), "epsilon": (0.01, 0.2), "swap_top_k": (2, 20)}.get(name, (4.0, 9.0))
    for method in METHODS:
        first, second = (mix(*pair, Mixture(method, **{name: value}))[0] for value in (one, other))
        assert torch.equal(first, second) == (method != OWN[name]), method


def test_theta_only_and_teacher_only() -> None:
    assert Mixture.theta_only().is_theta_only
    assert not Mixture.teacher_only().is_theta_only
    assert not Mixture().is_theta_only
    assert (Mixture.teacher_only().alpha_min, Mixture.teacher_only().alpha_max) == (1.0, 1.0)


@pytest.mark.parametrize("method", RANGED)
def test_anneal_is_linear_and_ends_at_the_student(method: str) -> None:
    mixture = Mixture(method, alpha_min=0.3, alpha_max=0.8, fixed_alpha=0.6, epsilon=0.4)
    assert mixture.anneal(0.0) == mixture
    assert mixture.anneal(0) == mixture
    assert mixture.anneal(1.0) == Mixture.theta_only()
    for gone in (0.25, 0.5, 0.75):
        annealed = mixture.anneal(gone)
        if method == "trust_region":
            assert annealed.epsilon == pytest.approx(0.4 * (1 - gone))
            assert annealed.alpha_min == pytest.approx(
                0.3 * (1 - gone)
            )  # else α would stay at it, and jump at the end
            assert (annealed.alpha_max, annealed.fixed_alpha) == (0.8, 0.6)
        else:
            alpha_max = 0.8 * (1 - gone)
            assert annealed.alpha_max == pytest.approx(alpha_max)
            assert annealed.alpha_min == pytest.approx(0.3 * (1 - gone))
            assert annealed.fixed_alpha == pytest.approx(0.6 * (1 - gone) if method == "fixed" else 0.6)
            assert (annealed.method, annealed.epsilon) == (method, 0.4)
        Mixture(method).anneal(gone).check_read("an engine, which takes annealed mixtures, too")


@pytest.mark.parametrize("gone", [-0.1, 1.1, math.nan, "0.5", True, None])
def test_anneal_refuses_what_is_no_share(gone: Any) -> None:
    with pytest.raises(ValueError, match=r"Mixture\.anneal: `share` is .*; wanted a number in \[0, 1\]"):
        Mixture().anneal(gone)


def test_a_swap_is_not_annealed() -> None:
    with pytest.raises(ValueError, match=r"anneal: `method` is 'top_k_swap', whose α has no range.*or change"):
        Mixture("top_k_swap").anneal(0.5)
    assert Mixture("top_k_swap").anneal(0.0) == Mixture("top_k_swap")
    assert Mixture("top_k_swap").anneal(1.0) == Mixture.theta_only()


def test_the_order_of_the_fields_is_that_of_every_table() -> None:
    assert MixtureRows._fields == ("present", "most_swapped", *FIELDS)
    mixtures = [*(Mixture(method, 0.1, 0.9, 0.3, 0.2) for method in RANGED), Mixture("top_k_swap", swap_top_k=7)]
    rows, table = MixtureRows.of(mixtures), torch.tensor([mixture.numbers() for mixture in mixtures])
    for name, column, want in zip(FIELDS, MixtureRows.from_table(table)[2:], rows[2:], strict=True):
        assert torch.equal(column, want.float()), name
    assert rows.present == {("geometric", method) for method in METHODS}
    assert rows.methods("geometric") == frozenset(METHODS)
    assert not rows.methods("arithmetic")
    assert rows.are(method="top_k_swap").tolist() == [mixture.method == "top_k_swap" for mixture in mixtures]
    both = MixtureRows.of([Mixture("fixed"), Mixture("fixed", form="arithmetic"), Mixture(form="arithmetic")])
    assert both.are(form="arithmetic").tolist() == [False, True, True]
    assert both.are(form="arithmetic", method="fixed").tolist() == [False, True, False]
    assert rows.most_swapped == 7
    assert MixtureRows.from_table(table, most_swapped=7).methods("geometric") == frozenset(METHODS)
    assert MixtureRows.from_table(table[:-1]).methods("geometric") == frozenset(RANGED)
    assert MixtureRows.of([Mixture(swap_top_k=9), Mixture("fixed", swap_top_k=9)]).most_swapped == 0
