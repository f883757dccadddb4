# /// script
# dependencies = ["optimal-sampling-trl[vllm]"]
# ///
"""Measure what rounding makes of a completion's weight: the engine's log θ against the trainer's, in bfloat16.

    python recipes/benchmarks/engine_noise.py --lengths 512 2048 8192                # on a GPU
    python recipes/benchmarks/engine_noise.py --lengths 64 --rows 4                   # on a CPU
    python recipes/benchmarks/engine_noise.py --pair output/teacher output/student   # a trained pair

The weights are equal on both sides, so each difference is rounding. TRL multiplies a completion's loss by
w = exp(Σ (log θ_trainer − log θ_engine)) (its `sequence_mask`, the default) and drops it where w > 3.

| column | what it says |
|---|---|
| `token` | mean over tokens of abs(log θ_trainer − log θ_engine), in nats |
| `token sd` | standard deviation of that difference |
| `sum sd` | standard deviation over completions of its sum, the logarithm of w |
| `w` | smallest, median and largest w |
| `dropped` | share of completions with w > 3 |
| `clipped` | share of tokens whose own ratio is above 3: what `token_truncate` would clip |
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Iterator

import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

from torch import Tensor
from transformers import AutoModelForCausalLM

from optimal_sampling_trl.backends import Backend, make_backend
from optimal_sampling_trl.mixture import Mixture
from optimal_sampling_trl.rollouts.request import Request, Sampling
from optimal_sampling_trl.rollouts.rollout import Rollout
from random_pair import make_random_pair, parser, print_head, processor

HEAD = (
    "trainer",
    "rows of",
    "tokens",
    "token",
    "token sd",
    "sum sd",
    "w: least",
    "median",
    "most",
    "dropped",
    "clipped",
)
HALVES = {"student": Mixture.theta_only(), "mixture": Mixture()}


def main() -> None:
    args = parse()
    with tempfile.TemporaryDirectory(prefix="noise-") as home:
        teacher, theta = args.pair or make_random_pair(home, args)
        longest, rows = args.prompt + max(args.lengths) + 1, 2 * args.rows
        backend = make_backend(
            args.backend, teacher, theta, dtype=args.dtype, max_model_len=longest, max_num_seqs=rows
        )
        print(f"engine {backend.name}, {args.dtype}, torch {torch.__version__}, {processor()}\n")
        print_head(*HEAD)
        rollouts = {(half, length): rows for length in args.lengths for half, rows in sample(backend, length, args)}
        backend.close()
        for trainer in ("bfloat16", "float32 under autocast"):
            model = AutoModelForCausalLM.from_pretrained(theta, dtype=trainer.split()[0]).to(device()).eval()
            for (half, length), rows in rollouts.items():
                print(line(trainer, half, length, differences(model, rows)), flush=True)


def parse() -> argparse.Namespace:
    flags = parser(__doc__)
    flags.add_argument("--lengths", type=int, nargs="+", default=(512, 2048, 8192), help="tokens of a completion")
    flags.add_argument("--rows", type=int, default=32, help="completions of each half")
    flags.add_argument("--pair", nargs=2, metavar=("TEACHER", "STUDENT"), help="folders, in place of random models")
    flags.add_argument("--backend", default="auto")
    flags.set_defaults(dtype="bfloat16", context=16384)
    return flags.parse_args()


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def sample(backend: Backend, length: int, args: argparse.Namespace) -> list[tuple[str, list[Rollout]]]:
    """Completions of exactly `length` tokens, of each half."""
    sampling = Sampling(length, ignore_eos=True)
    most = min(1000, backend.pair.vocabulary)
    prompts = torch.randint(1, most, (args.rows, args.prompt), generator=torch.Generator().manual_seed(0)).tolist()
    requests = [Request(ids, ids, mixture, sampling) for mixture in HALVES.values() for ids in prompts]
    rollouts = backend.generate(requests)
    return [(half, rollouts[i * args.rows : (i + 1) * args.rows]) for i, half in enumerate(HALVES)]


@torch.no_grad()
def differences(model: torch.nn.Module, rollouts: list[Rollout]) -> Tensor:
    """log θ of the trainer's pass less the engine's, (rows, tokens)."""
    return torch.stack([log_theta(model, rollout) - rollout.log_theta for rollout in rollouts])


def log_theta(model: torch.nn.Module, rollout: Rollout) -> Tensor:
    """log θ of a completion's tokens by one forward pass under autocast, as TRL's trainers compute it."""
    ids = torch.tensor([[*rollout.theta_prompt_ids, *rollout.completion_ids]], device=device())
    first = len(rollout.theta_prompt_ids)
    with torch.autocast(device(), torch.bfloat16):
        logits = model(ids, logits_to_keep=len(rollout.completion_ids) + 1).logits[0, :-1]
    chosen = ids[0, first:, None]
    return torch.cat([
        part.float().log_softmax(-1).gather(1, index)[:, 0] for part, index in zip(chunks(logits), chunks(chosen))
    ]).cpu()  # fmt: skip


def chunks(rows: Tensor) -> Iterator[Tensor]:
    """A few rows at a time, so that their float32 copies stay small."""
    yield from rows.split(1024)


def line(trainer: str, half: str, length: int, difference: Tensor) -> str:
    """The table's line of some completions."""
    total = difference.double().sum(1)
    weight = total.exp()
    numbers = (
        f"{difference.abs().mean():.4f}", f"{difference.std():.4f}", f"{total.std():.2f}", f"{weight.min():.3g}",
        f"{weight.median():.3g}", f"{weight.max():.3g}", f"{(weight > 3).float().mean():.0%}",
        f"{(difference.exp() > 3).float().mean():.2%}",
    )  # fmt: skip
    return f"| {trainer} | {half} | {length} | " + " | ".join(numbers) + " |"


if __name__ == "__main__":
    main()
