"""The backend `transformers`: two plain models and their caches, on any device."""

from __future__ import annotations

from .backend import TransformersBackend

__all__ = ["TransformersBackend"]
