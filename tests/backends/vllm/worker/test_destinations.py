"""Reloads by known places, against loaders of the kinds that vLLM has. On live engines: test_engine_gpu.py."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from optimal_sampling_trl.backends.vllm.worker.destinations import Destinations


class Loaded(nn.Module):
    """One storage for two weights, one that is turned, one that is padded, one of which a part is kept."""

    def __init__(self) -> None:
        super().__init__()
        self.stacked, self.turned = torch.zeros(10, 4, dtype=torch.bfloat16), torch.zeros(4, 3)
        self.padded, self.part, self.norm = torch.ones(6, 2), torch.zeros(2, 4), torch.zeros(4)
        self.calls: list[str] = []

    def load_weights(self, named: list[tuple[str, Tensor]]) -> None:
        for name, weight in named:
            self.calls.append(name)
            if name in ("q", "k"):
                self.stacked.narrow(0, 0 if name == "q" else 6, len(weight)).copy_(weight)
            elif name == "turned":
                self.turned.copy_(weight.T)
            elif name == "padded":
                self.padded[:5].copy_(weight)
                self.padded[5:].fill_(0)
            elif name == "part":
                self.part.copy_(weight.narrow(0, 2, 2))
            else:
                self.norm.copy_(weight)


def random_weights(seed: int) -> dict[str, Tensor]:
    shapes = {"q": (6, 4), "k": (4, 4), "turned": (3, 4), "padded": (5, 2), "part": (4, 4), "norm": (4,)}
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(*shape, generator=generator) for name, shape in shapes.items()}


def values(model: Loaded) -> dict[str, Tensor]:
    return {name: value for name, value in vars(model).items() if isinstance(value, Tensor)}


def gathered(weights: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Each is whole until the next one is asked for, as FSDP gathers them."""
    for name, weight in weights.items():
        whole = weight.clone()
        yield name, whole
        whole.fill_(torch.nan)


def test_known_places_get_what_the_loaders_would_write() -> None:
    model, wanted = Loaded(), Loaded()
    storages = {name: value.data_ptr() for name, value in values(model).items()}
    known = Destinations(model)
    for seed in range(3):
        weights = random_weights(seed)
        known.load(gathered(weights))
        wanted.load_weights(list(weights.items()))
        for name, value in values(wanted).items():
            assert torch.equal(values(model)[name], value), name
    assert {name: value.data_ptr() for name, value in values(model).items()} == storages
    again = model.calls[len(weights) :]
    assert sorted(set(again)) == ["padded", "part", "turned"], "the others are copied without their loaders"


def test_a_square_weight_that_is_turned_has_no_place() -> None:
    """Its place has its shape, and not its order."""
    model = Loaded()
    model.turned = torch.zeros(4, 4)
    known, weight = Destinations(model), torch.arange(16.0).view(4, 4)
    for factor in (1, 2):
        known.load([("turned", weight * factor)])
        assert torch.equal(model.turned, weight.T * factor)
