"""A checkpoint on disk: a number for it that is quick to compute, for two machines to compare, and its weights."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import BinaryIO

from safetensors import safe_open
from torch import Tensor

BLOCK, SAMPLES, PIECE = 4096, 16, 1 << 20
"""Bytes that are read at a time, how many times in a weight, and the size of what stands for one in other files."""


def checkpoint_digest(folder: Path) -> str | None:
    """Return a digest of samples of a checkpoint's weights, to tell two apart; None where there is no such folder.

    Reads a small weight as a whole, and of a larger one `SAMPLES` blocks: some MiB, where all may be 100 GiB.
    """
    if not folder.is_dir():
        return None
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin")):
        digest.update(f"{path.name} {path.stat().st_size}".encode())
        with path.open("rb") as file:
            for start, end in _spans(file, path):
                step = max((end - start - BLOCK) // (SAMPLES - 1), BLOCK)
                for place in range(start, end, step):
                    file.seek(place)
                    digest.update(file.read(min(BLOCK, end - place)))
    return digest.hexdigest()[:16]


class StoredWeights:
    """The weights in a checkpoint's files, each read when it is asked for.

    Args:
        folder: holds `.safetensors` files.
    """

    def __init__(self, folder: Path) -> None:
        self._paths: dict[str, Path] = {}
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, "pt") as file:
                self._paths |= dict.fromkeys(file.keys(), path)

    def __contains__(self, name: object) -> bool:
        return name in self._paths

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self._paths[name], "pt") as file:
            return file.get_tensor(name)


def _spans(file: BinaryIO, path: Path) -> list[tuple[int, int]]:
    """Return the header of a file of weights and the place of each weight in it; pieces of a file of another kind."""
    size = path.stat().st_size
    if path.suffix != ".safetensors":
        return [(start, min(start + PIECE, size)) for start in range(0, size, PIECE)]
    first = 8 + int.from_bytes(file.read(8), "little")
    header = json.loads(file.read(first - 8))
    places = (entry["data_offsets"] for name, entry in header.items() if name != "__metadata__")
    return [(0, first), *sorted((first + start, first + end) for start, end in places)]
