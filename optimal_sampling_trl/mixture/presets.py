"""The mixtures that others have published, as the settings of a `Mixture`. `trainers.presets` has the rest of each."""

from __future__ import annotations

from typing import Any

from ..options import unknown_option

PUBLISHED: dict[str, dict[str, Any]] = {
    "mentor": {"method": "entropy_gate", "form": "arithmetic", "entropy_scale": 1.5},
    "logit-fusion": {"method": "fixed", "form": "geometric", "fixed_alpha": 0.5},
    "trb": {"method": "trust_region", "form": "geometric", "epsilon": 0.01},
    "minillm": {"method": "fixed", "form": "arithmetic", "fixed_alpha": 0.2},
    "skd": {"method": "top_k_swap", "swap_top_k": 25},
}
"""The settings of each mixture, by the name of its preset. The other settings keep their defaults."""


def check_preset(name: str) -> None:
    """Refuse a name that is no preset.

    Raises:
        ValueError: naming the nearest one.
    """
    if name not in PUBLISHED:
        raise ValueError(unknown_option("preset", name, PUBLISHED))


def published(name: str) -> dict[str, Any]:
    """Return the settings of a published mixture.

    Raises:
        ValueError: see `check_preset`.
    """
    check_preset(name)
    return PUBLISHED[name]
