# /// script
# dependencies = ["optimal-sampling-trl[vllm]"]
# ///
"""What mixing costs on a GPU: the Triton kernels against the bound of the memory and against the solver in torch.

    python recipes/benchmark_kernels.py

Logits in bfloat16 of two padded vocabularies. `copy` reads both once and writes float32 once, measured in the same
run: no kernel that returns the mixed logits is faster. Each call takes the next of several sets of logits, together
larger than the cache. `spread` has the teacher at 3·N(0, 1) and the student at 0.7 of that plus 1.5·N(0, 1); in
`peaked` nine rows of ten are sure of one token; in `near` the student is the teacher but for 0.02·N(0, 1). `error` is
the largest |Δα| to the float64 reference on a few rows of each.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch
import triton
from torch import Tensor

from optimal_sampling_trl.kernels import mix_logits
from optimal_sampling_trl.mixture import Mixture, MixtureRows, mix
from optimal_sampling_trl.reference import reference
from optimal_sampling_trl.solver import METHODS

V_THETA, V_TEACHER = 151_936, 152_064
CACHE = 128 << 20
"""Bytes of logits between two uses of a set, at least: more than twice the cache of an H100 or H200."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=(8, 32, 128, 256))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument(
        "--logits", nargs="+", choices=("spread", "peaked", "near"), default=("spread", "peaked", "near")
    )
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--checked", type=int, default=4, help="rows compared with the reference")
    parser.add_argument("--torch", action="store_true", help="time the solver in torch as well")
    args = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}\n")
    print("| rows | logits | method        | kernels ms | copy ms | kernels/copy | torch ms | error   |")
    print("|-----:|--------|---------------|-----------:|--------:|-------------:|---------:|---------|")
    for rows in args.batches:
        for kind in args.logits:
            sets = make_sets(kind, rows)
            copied = median_ms(copy, sets, args.rounds)
            for method in args.methods:
                print(line(method, kind, rows, sets, copied, args), flush=True)


def make_sets(kind: str, rows: int) -> list[tuple[Tensor, Tensor]]:
    """Pairs of raw logits, student first."""
    size = 2 * rows * (V_THETA + V_TEACHER)
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cuda")

    sets = []
    for _ in range(max(2, -(-CACHE // size) + 1)):
        teacher = 3 * normal(rows, V_TEACHER)
        theta = 0.7 * teacher[:, :V_THETA] + 1.5 * normal(rows, V_THETA)
        if kind == "near":
            theta = teacher[:, :V_THETA] + 0.02 * normal(rows, V_THETA)
        if kind == "peaked":
            sure = torch.arange(rows, device="cuda") % 10 != 0
            token = torch.randint(V_THETA, (rows,), generator=generator, device="cuda")
            for logits in (theta, teacher):
                logits[sure, token[sure]] = 22 + 2 * normal(rows)[sure]
        sets.append((theta.bfloat16(), teacher.bfloat16()))
    return sets


def copy(theta: Tensor, teacher: Tensor) -> Tensor:
    """Reads both and writes float32 once."""
    return torch.add(theta[:, :V_THETA], teacher[:, :V_THETA], out=OUT[: len(theta)])


OUT = torch.empty(0)


def median_ms(work: Callable[..., object], sets: list, rounds: int) -> float:
    """Device time of a call, on each set in turn; the host's time is hidden behind what waits before it."""
    global OUT
    if OUT.shape[:1] != sets[0][0].shape[:1]:
        OUT = torch.empty(len(sets[0][0]), V_THETA, device="cuda")
    for pair in sets:
        work(*pair)
    took = []
    for step in range(rounds):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(2_000_000)  # cycles, about a millisecond: all launches are queued when the first runs
        begin.record()
        work(*sets[step % len(sets)])
        end.record()
        torch.cuda.synchronize()
        took.append(begin.elapsed_time(end))
    return statistics.median(took)


def line(method: str, kind: str, rows: int, sets: list, copied: float, args: argparse.Namespace) -> str:
    columns = MixtureRows.of([Mixture(method)] * rows, "cuda")
    took = median_ms(lambda theta, teacher: mix_logits(theta, teacher, *columns[1:]), sets, args.rounds)
    slow = "-"
    if args.torch:
        slow = f"{median_ms(lambda theta, teacher: mix(theta, teacher, columns), sets, 2):.2f}"
    alpha = mix_logits(*sets[0], *columns[1:]).alpha[: args.checked].cpu()
    want, _ = reference(*(side[: args.checked].cpu() for side in sets[0]), Mixture(method))
    error = float((alpha - want).abs().max()) if args.checked else 0.0
    return (
        f"| {rows:4} | {kind:6} | {method:13} | {took:10.4f} | {copied:7.4f} | {took / copied:12.2f} | {slow:>8} | "
        f"{error:.1e} |"
    )


if __name__ == "__main__":
    main()
