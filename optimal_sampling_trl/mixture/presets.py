"""The mixtures that others have published, as the settings of a `Mixture`. `trainers.presets` has the rest of each."""

from __future__ import annotations

from typing import Any

from ..options import unknown_option

PUBLISHED: dict[str, dict[str, Any]] = {
    "mentor": {"method": "entropy_gate", "form": "arithmetic", "entropy_scale": 1.5},
    "logit-fusion": {"method": "fixed", "form": "geometric", "fixed_alpha": 0.5},
    "trb": {"method": "trust_region", "form": "geometric", "epsilon": 0.01},
    "minillm": {"method": "fixed", "form": "arithmetic", "fixed_alpha": 0.2},
}
"""The settings of each mixture, by the name of its preset. The other settings keep their defaults."""

LEFT_OUT = {
    "skd": "SKD (arXiv:2410.11325) draws a token from the student, and again from the teacher where the first one is "
    "not among the teacher's K likeliest, a set S. That is a distribution, q = θ·1[S] + (1-θ(S))·t. It needs the K-th "
    "largest logit of each row, which no kernel here selects, and its authors draw the two models at temperatures and "
    "top_p of their own, which one request cannot ask for.",
}
"""Published ways of sampling that are no preset, and why."""


def published(name: str) -> dict[str, Any]:
    """Return the settings of a published mixture.

    Raises:
        ValueError: on a name that is no preset, with the reason where it is known.
    """
    if name in LEFT_OUT:
        raise ValueError(f"There is no preset {name!r}: {LEFT_OUT[name]} Known: {', '.join(sorted(PUBLISHED))}.")
    if name not in PUBLISHED:
        raise ValueError(unknown_option("preset", name, PUBLISHED))
    return PUBLISHED[name]
