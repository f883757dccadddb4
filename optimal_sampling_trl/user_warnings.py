"""Warnings that name the user's line."""

from __future__ import annotations

import sys
import warnings

LIBRARIES = ("optimal_sampling_trl", "trl", "transformers", "accelerate", "vllm")
"""Packages whose lines are not the user's."""


def warn_user(message: str) -> None:
    """Warn at the user's line that led here: the nearest one outside of this package and the libraries it extends."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).split(".")[0] in LIBRARIES:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)
