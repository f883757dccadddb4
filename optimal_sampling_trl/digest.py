"""A number that tells one set of a model's weights from another."""

from __future__ import annotations

import hashlib

from torch import nn


def weight_digest(model: nn.Module) -> str:
    """What changes when a model is trained: of the first entries of each weight."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        digest.update(parameter.detach().reshape(-1)[:64].float().cpu().numpy().tobytes())
    return digest.hexdigest()
