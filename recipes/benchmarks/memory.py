# /// script
# dependencies = ["optimal-sampling-trl"]
# ///
"""Compute what a pair needs on one GPU: bytes of weights, caches and trainer, and a bound of the speed.

    python recipes/benchmarks/memory.py

Nothing is run. The engine holds both models in bfloat16, `ENGINE_GB` for graphs and work space, and caches in the
rest of its share of the GPU. The trainer holds float32 weights, gradients and both moments of Adam, 16 bytes a
parameter, or with LoRA the weights in bfloat16, 2 bytes. `ACTIVATIONS` of the GPU stay free for activations and
logits. The bound is what reading both models' weights and caches once a step allows, at the speed of memory that the
maker names.
"""

import argparse
import math
from typing import NamedTuple

from random_pair import SHAPES, Shape

GB = 1e9
ENGINE_GB = 2.0
"""Graphs, work space and logits of the engine, in GB: an allowance, not a measurement."""
ACTIVATIONS = 0.2
"""Share of the GPU that the trainer's activations and logits get, likewise."""
LEAST_TOKENS = 32 * 1024
"""Tokens of cache below which a pair is not listed: 32 completions of 1 024 tokens."""
BATCH, CONTEXT = 128, 1024


class Card(NamedTuple):
    """A GPU: its memory in GB, and the speed of its memory in GB/s, as its maker says."""

    memory: float
    bandwidth: float


CARDS = {"24 GB (RTX 4090)": Card(24, 1008), "48 GB (L40S)": Card(48, 864), "80 GB (H100 SXM)": Card(80, 3350)}
PAIRS = [("1.5b", "0.5b"), ("3b", "0.5b"), ("3b", "1.5b"), ("7b", "0.5b"), ("7b", "1.5b")]
TRAINERS = {"all weights": 16, "LoRA": 2}
"""Bytes a parameter of the student that the trainer holds."""


class Fit(NamedTuple):
    """The settings of a pair on a card.

    Args:
        share: `vllm_gpu_memory_utilization`.
        trainer: GB of the trainer without activations.
        weights: GB of both models in the engine.
        tokens: tokens of cache that both models have room for together.
        bound: tokens/s that the memory's speed allows, `BATCH` completions with `CONTEXT` tokens each.
    """

    share: float
    trainer: float
    weights: float
    tokens: int
    bound: float


def stored(shape: Shape) -> int:
    """Count the parameters that a model stores: an embedding that is not tied adds to those that decoding reads."""
    return shape.parameters + (0 if shape.tied else shape.hidden * shape.vocabulary)


def fit(card: Card, teacher: Shape, student: Shape, bytes_per_parameter: int) -> Fit:
    """Compute the largest share of the card that the engine can have beside the trainer, in steps of 0.05."""
    trainer = bytes_per_parameter * stored(student) / GB
    share = math.floor((1 - ACTIVATIONS - trainer / card.memory) * 20 + 1e-9) / 20
    weights = 2 * (stored(teacher) + stored(student)) / GB
    per_token = 2 * (teacher.cached + student.cached)
    tokens = int((share * card.memory - weights - ENGINE_GB) * GB / per_token)
    step = 2 * (teacher.parameters + student.parameters) + BATCH * CONTEXT * per_token
    return Fit(share, trainer, weights, tokens, BATCH * card.bandwidth * GB / step)


def table() -> str:
    """Make the table of all pairs that fit, as Markdown."""
    lines = [
        "| GPU | teacher, student | trained | trainer GB | engine's weights GB | `vllm_gpu_memory_utilization` "
        f"| tokens of cache | bound, tokens/s at batch {BATCH} |",
        "|---|---|---|--:|--:|--:|--:|--:|",
    ]
    for name, card in CARDS.items():
        for teacher, student in PAIRS:
            for trained, size in TRAINERS.items():
                one = fit(card, SHAPES[teacher], SHAPES[student], size)
                if one.tokens >= LEAST_TOKENS:
                    pair = f"{teacher.upper()}, {student.upper()}"
                    numbers = f"{one.trainer:.1f} | {one.weights:.1f} | {one.share:.2f} | {one.tokens:,}"
                    lines.append(f"| {name} | {pair} | {trained} | {numbers} | {one.bound:,.0f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print(table())
