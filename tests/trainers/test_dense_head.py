"""log θ of many tokens from TRL's fused output layer: values, gradients, tiles, and what the layer does to logits."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from trl.trainer import utils

from helpers.models import make_model
from optimal_sampling_trl.trainers import dense_head
from optimal_sampling_trl.trainers.dense_head import DenseHead

B, P, T, K = 3, 4, 6, 5
TEMPERATURE = 1.3


def batch(vocabulary: int) -> dict[str, Tensor]:
    """Prompts of P tokens, completions of up to T, and K tokens at each position of a completion."""
    generator = torch.Generator().manual_seed(0)
    return {
        "input_ids": torch.randint(vocabulary, (B, P + T), generator=generator),
        "mask": torch.arange(T) < torch.tensor([6, 2, 0])[:, None],
        "ids": torch.randint(vocabulary, (B, T, K), generator=generator),
    }


def scored(model: Any, inputs: dict[str, Tensor]) -> tuple[Any, Any]:
    """What TRL's output layer returns of the completions, and our head beside it."""
    labels = torch.cat([torch.full((B, P), -100), inputs["input_ids"][:, P:].masked_fill(~inputs["mask"], -100)], 1)
    attention = torch.cat([torch.ones(B, P, dtype=torch.long), inputs["mask"].long()], 1)
    with dense_head.dense_head(inputs["ids"], inputs["mask"]) as head:
        output = model(input_ids=inputs["input_ids"], attention_mask=attention, labels=labels, fused_lm_head=True)
    return output, head


def exact(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """log θ (N, K) from whole logits."""
    attention = torch.cat([torch.ones(B, P, dtype=torch.long), inputs["mask"].long()], 1)
    logits = model(input_ids=inputs["input_ids"], attention_mask=attention, use_cache=False).logits[:, P - 1 : -1]
    return (logits / TEMPERATURE).log_softmax(-1).gather(-1, inputs["ids"])[inputs["mask"]]


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite", "qwen3"])
def test_values_and_gradients_are_those_of_whole_logits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    """Of an output layer with a softcap, a scale or ties; in one tile and in many. TRL's own numbers stay."""
    model = AutoModelForCausalLM.from_pretrained(make_model(tmp_path / family, family, 0), dtype=torch.float32)
    reference = copy.deepcopy(model).double()
    utils.add_fused_lm_head(model, temperature=TEMPERATURE)
    inputs = batch(model.config.vocab_size)
    wanted = exact(reference, inputs)
    weights = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (wanted * weights).sum().backward()
    for tile in (dense_head.TILE, 3 * model.config.vocab_size):
        monkeypatch.setattr(dense_head, "TILE", tile)
        model.zero_grad()
        output, head = scored(model, inputs)
        assert torch.allclose(head.log_theta.double(), wanted, atol=1e-4)
        sampled = exact(reference, inputs | {"ids": inputs["input_ids"][:, P:, None]})[:, 0]
        assert torch.allclose(output.log_probs[:, -T:][inputs["mask"]].double(), sampled, atol=1e-4)
        (head.log_theta * weights.float()).sum().backward()
        for (name, parameter), other in zip(model.named_parameters(), reference.parameters(), strict=True):
            scale = float(other.grad.abs().max())
            assert float((parameter.grad.double() - other.grad).abs().max()) <= 1e-3 * scale + 1e-6, name
    assert utils._ChunkedLogProbFunction is not head  # it stands there for the forward pass alone


def test_a_frozen_output_layer_and_no_token(tmp_path: Path) -> None:
    """With an adapter the layer is frozen; a batch of which no token counts has a gradient of 0."""
    model = AutoModelForCausalLM.from_pretrained(make_model(tmp_path / "llama", "llama", 0), dtype=torch.float32)
    utils.add_fused_lm_head(model)
    model.get_output_embeddings().weight.requires_grad_(False)
    for mask in (batch(9)["mask"], torch.zeros(B, T, dtype=torch.bool)):
        model.zero_grad()
        _, head = scored(model, batch(model.config.vocab_size) | {"mask": mask})
        assert head.log_theta.shape == (int(mask.sum()), K)
        head.log_theta.sum().backward()
        moved = [p.grad is not None and bool(p.grad.abs().max() > 0) for p in model.parameters() if p.requires_grad]
        assert any(moved) == bool(mask.any())


def test_autocast_multiplies_in_its_type(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(make_model(tmp_path / "llama", "llama", 0), dtype=torch.float32)
    utils.add_fused_lm_head(model, temperature=TEMPERATURE)
    inputs = batch(model.config.vocab_size)
    with torch.autocast("cpu", torch.bfloat16):
        output, head = scored(model, inputs | {"ids": inputs["input_ids"][:, P:, None]})
    assert torch.allclose(head.log_theta[:, 0], output.log_probs[:, -T:][inputs["mask"]], atol=1e-5)
    head.log_theta.sum().backward()
    assert model.get_output_embeddings().weight.grad.dtype == torch.float32


def test_positions_that_trl_has_picked() -> None:
    """On a GPU TRL hands over the hidden states of the labels alone, elsewhere whole rows with what stands before."""
    mask = batch(9)["mask"]
    rows = torch.randn(B, P + T, 7)
    head = DenseHead(None, batch(9)["ids"], mask)
    assert torch.equal(head._positions(rows.view(-1, 7), mask), rows[:, -T:][mask])
