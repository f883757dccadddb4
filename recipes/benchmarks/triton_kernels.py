# /// script
# dependencies = ["optimal-sampling-trl[vllm]"]
# ///
"""Measure the cost of mixing on a GPU: the Triton kernels, in ms, against the bound of the memory.

    python recipes/benchmarks/triton_kernels.py            # each method, on each kind of logits
    python recipes/benchmarks/triton_kernels.py --torch    # and the solver in torch, of the same rows
    python recipes/benchmarks/triton_kernels.py --sweep    # logits a program reads, and warps: which is fastest here
    python recipes/benchmarks/triton_kernels.py --dense    # dense records instead, beside what torch takes for them

Logits in bfloat16 of two padded vocabularies. `copy` reads both once and writes float32 once, measured in the same
run: no kernel that returns the mixed logits is faster. Each call takes the next of several sets of logits, together
larger than the cache. `spread` has the teacher at 3·N(0, 1) and the student at 0.7 of that plus 1.5·N(0, 1); in
`peaked` nine rows of ten are sure of one token; in `near` the student is the teacher but for 0.02·N(0, 1). `error` is
the largest |Δα| of any method to the float64 reference on a few rows of each.

Of dense records, `scalars` are all of them and `k` the likeliest tokens of both models alone. In torch the scalars
are `mixture.dense` as it runs on a CPU, without folded endings, and `k` two times `topk` of all logits.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from functools import partial

import torch
import triton
from torch import Tensor

from optimal_sampling_trl.mixture import (
    METHODS,
    Mixture,
    MixtureRows,
    dense,
    log_distributions,
    mix_at,
    solve_alpha,
)
from optimal_sampling_trl.mixture.kernels.dense import measure_rows
from optimal_sampling_trl.mixture.kernels.launch import CHUNK, WARPS, mix_logits
from optimal_sampling_trl.mixture.reference import reference

V_THETA, V_TEACHER = 151_936, 152_064
KINDS = ("spread", "peaked", "near")
CHUNKS = (4096, 8192, 16384, 32768)
CACHE = 128 << 20
"""Bytes of logits between two uses of a set, at least: more than twice the cache of an H100 or H200."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=(8, 32, 256))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--logits", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--checked", type=int, default=4, help="rows compared with the reference")
    parser.add_argument("--torch", action="store_true", help="time the solver in torch as well")
    parser.add_argument("--sweep", action="store_true", help="time each chunk and number of warps, compare nothing")
    parser.add_argument("--dense", action="store_true", help="time dense records, and nothing else")
    parser.add_argument("--top-k", type=int, nargs="+", default=(8, 32, 128), metavar="K", help="of dense records")
    args = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}\n")
    if args.dense:
        return show_dense(args)
    print(
        f"| rows | logits | program   | copy   | {' | '.join(f'{method:12}' for method in args.methods)} | error   |"
    )
    print(f"|-----:|--------|-----------|-------:|{'-------------:|' * len(args.methods)}--------:|")
    programs = [(chunk, warps) for chunk in CHUNKS for warps in (2, 4, 8)] if args.sweep else [(CHUNK, WARPS)]
    for rows in args.batches:
        for kind in args.logits:
            sets = make_sets(kind, rows)
            copied = median_ms(copy, sets, args.rounds)
            for chunk, warps in programs:
                took = [time_kernels(method, sets, args.rounds, chunk, warps) for method in args.methods]
                error = (
                    "-" if args.sweep or not args.checked else f"{find_error(args.methods, sets, args.checked):.1e}"
                )
                show(rows, kind, f"{chunk:5} × {warps}", copied, took, error)
            if args.torch:
                show(rows, kind, "torch", copied, [time_torch(method, sets) for method in args.methods], "-")


def show_dense(args: argparse.Namespace) -> None:
    """A row for the kernels and one for torch, of each number of rows."""
    print(f"| rows | program | copy   | scalars | {' | '.join(f'k = {k:3}' for k in args.top_k)} |")
    print(f"|-----:|---------|-------:|--------:|{'--------:|' * len(args.top_k)}")
    for rows in args.batches:
        plain = make_sets("spread", rows)
        columns = MixtureRows.of([Mixture()] * rows, "cuda")
        sets = [(*pair, mix_logits(*pair, columns).logits) for pair in plain]
        copied = median_ms(copy, plain, args.rounds)
        for name, scalars, likeliest in (
            ("kernels", measure_rows, lambda *two, k: measure_rows(*two, None, None, k)),
            ("torch", scalars_in_torch, likeliest_in_torch),
        ):
            took = [median_ms(scalars, sets, args.rounds if name == "kernels" else 5)]
            took += [median_ms(partial(likeliest, k=k), plain, args.rounds) for k in args.top_k]
            cells = " | ".join(f"{ms:7.4f}" for ms in took)
            print(f"| {rows:4} | {name:7} | {copied:6.4f} | {cells} |", flush=True)


def scalars_in_torch(*three: Tensor) -> list[dense.Measured]:
    """All scalars one operation after the other, in parts of as many rows as `measure` takes."""
    parts = zip(*(side[:, :V_THETA].split(dense.AT_ONCE // V_THETA) for side in three))
    return [
        dense.measure_in_torch(*(one.float() for one in part), torch.ones(1, 1, device="cuda"), dense.SCALARS, 0)
        for part in parts
    ]


def likeliest_in_torch(*two: Tensor, k: int) -> list[Tensor]:
    """The likeliest tokens of both models, in float32 as `measure` has them."""
    return [side[:, :V_THETA].float().topk(k).indices for side in two]


def show(rows: int, kind: str, program: str, copied: float, took: list[float], error: str) -> None:
    cells = " | ".join(f"{ms:12.4f}" for ms in took)
    print(f"| {rows:4} | {kind:6} | {program:9} | {copied:6.4f} | {cells} | {error:7} |", flush=True)


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
    """Read both and write float32 once."""
    return torch.add(theta[:, :V_THETA], teacher[:, :V_THETA], out=OUT[: len(theta)])


OUT = torch.empty(0)


def median_ms(work: Callable[..., object], sets: list, rounds: int) -> float:
    """Device time of a call, on each set in turn; the host's time is hidden behind what waits before it."""
    global OUT
    if OUT.shape[:1] != sets[0][0].shape[:1]:
        OUT = torch.empty(len(sets[0][0]), V_THETA, device="cuda")
    for one in sets:
        work(*one)
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


def time_kernels(method: str, sets: list, rounds: int, chunk: int, warps: int) -> float:
    rows = MixtureRows.of([Mixture(method)] * len(sets[0][0]), "cuda")
    return median_ms(lambda *pair: mix_logits(*pair, rows, chunk=chunk, warps=warps), sets, rounds)


def time_torch(method: str, sets: list) -> float:
    columns = MixtureRows.of([Mixture(method)] * len(sets[0][0]), "cuda")

    def mix_in_torch(theta: Tensor, teacher: Tensor) -> Tensor:
        log_theta, log_teacher = log_distributions(theta, teacher)
        return mix_at(log_theta, log_teacher, solve_alpha(log_theta, log_teacher, columns), columns)

    return median_ms(mix_in_torch, sets, 2)


def find_error(methods: Sequence[str], sets: list, checked: int) -> float:
    """The largest |Δα| to the reference in the first rows of the first set."""
    theta, teacher = (side[:checked] for side in sets[0])
    errors = []
    for method in methods:
        rows = MixtureRows.of([Mixture(method)] * len(theta), "cuda")
        alpha = mix_logits(theta, teacher, rows).alpha.cpu()
        want, _ = reference(theta.cpu(), teacher.cpu(), Mixture(method))
        errors.append(float((alpha - want).abs().max()))
    return max(errors)


if __name__ == "__main__":
    main()
