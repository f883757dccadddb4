"""vLLM's `SamplingParams`: what is read of them, and what is refused."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from optimal_sampling_trl import Sampling
from optimal_sampling_trl.rollouts.params import READ, read_sampling_params, takes_sampling_params


@dataclass
class Params:
    """Fields and defaults of vLLM's, which `test_they_are_vllms` holds against its own."""

    n: int = 1
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: list[str] = field(default_factory=list)
    max_tokens: int | None = 16


class Sampler:
    @takes_sampling_params
    def generate(self, prompts: Any, max_tokens: int = 100, **further: Any) -> dict[str, Any]:
        return {"max_tokens": max_tokens, **further}


def test_what_is_read_reaches_the_call() -> None:
    params = Params(n=2, temperature=0.5, top_k=3, stop=["x"], seed=7, max_tokens=4)
    wanted = {"n": 2, "max_tokens": 4, "temperature": 0.5, "top_p": 1.0, "top_k": 3, "min_p": 0.0}
    wanted |= {"repetition_penalty": 1.0, "stop": ["x"], "seed": 7}
    for got in (
        Sampler().generate("a", params, mixture=1),
        Sampler().generate("a", sampling_params=params, mixture=1),
    ):
        assert got == wanted | {"mixture": 1}
    assert Sampler().generate("a", 5) == {"max_tokens": 5}
    assert read_sampling_params(Sampling(max_tokens=3, seed=None)).keys() == {*READ} - {"n", "seed"}


def test_what_is_not_read_is_refused() -> None:
    with pytest.raises(ValueError, match=r"has presence_penalty=1\.0, which .* does not read; it reads n, max_tokens"):
        read_sampling_params(Params(presence_penalty=1.0))
    with pytest.raises(ValueError, match=r"was given and `temperature` beside it.*Drop the other"):
        Sampler().generate("a", Params(), temperature=0.5)
    with pytest.raises(ValueError, match="was given and a further setting by its place beside it"):
        Sampler().generate("a", Params(), 0.5)
    with pytest.raises(ValueError, match="wanted one `SamplingParams` for all prompts"):
        Sampler().generate("a", [Params()])


def test_they_are_vllms() -> None:
    vllm = pytest.importorskip("vllm")
    assert read_sampling_params(vllm.SamplingParams()) == read_sampling_params(Params())
    asked = {"n": 2, "temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "seed": 3, "max_tokens": 9}
    read = read_sampling_params(vllm.SamplingParams(**asked, stop="end"))
    assert asked.items() <= read.items()
    assert list(read["stop"]) == ["end"]
    with pytest.raises(ValueError, match="has logprobs=5"):
        read_sampling_params(vllm.SamplingParams(logprobs=5))
