"""Two checkpoints are told apart by any of their weights."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from helpers.models import make_model
from optimal_sampling_trl.pairing import StoredWeights, checkpoint_digest


def test_two_checkpoints_differ_by_any_weight(tmp_path: Path) -> None:
    """Also in a bias of a few bytes, and in the middle of a large weight; a copy under another name is the same."""
    folder = Path(make_model(tmp_path / "a", "qwen2", 0, hidden=256, heads=4, layers=1))
    weights = load_file(folder / "model.safetensors")
    assert max(weight.nbytes for weight in weights.values()) > 16 * 4096
    first = checkpoint_digest(folder)
    assert checkpoint_digest(Path(shutil.copytree(folder, tmp_path / "copy"))) == first
    for name in weights:
        save_file(weights | {name: weights[name] + 1.0}, folder / "model.safetensors", metadata={"format": "pt"})
        assert checkpoint_digest(folder) != first, name
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert checkpoint_digest(folder) == first
    assert checkpoint_digest(tmp_path / "gone") is None
    (folder / "pytorch_model.bin").write_bytes(bytes(3 << 20))
    with_bin = checkpoint_digest(folder)
    assert with_bin != first
    (folder / "pytorch_model.bin").write_bytes(bytes(2 << 20) + b"x" + bytes((1 << 20) - 1))
    assert checkpoint_digest(folder) != with_bin


def test_stored_weights_are_those_of_the_model(tmp_path: Path) -> None:
    """In one file, or in several."""
    folder = make_model(tmp_path / "model", "llama", 0)
    model = AutoModelForCausalLM.from_pretrained(folder)
    for size in ("1GB", "100KB"):
        model.save_pretrained(tmp_path / size, max_shard_size=size)
        stored = StoredWeights(tmp_path / size)
        assert "model.norms.weight" not in stored
        for name, weight in model.named_parameters():
            assert name in stored
            assert torch.equal(stored[name], weight)
