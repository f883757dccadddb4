# /// script
# dependencies = ["optimal-sampling-trl"]
# ///
"""Measure the transformers backend's mixture against `generate` of its teacher alone and its student alone.

    OMP_NUM_THREADS=1 python recipes/benchmarks/transformers_backend.py

Random models of Qwen2's shape, built on the spot: no download. All three sample at temperature 1 the same number of
tokens from the same prompts, past any end of sequence, and take turns, so that whatever else runs on the machine slows
them alike; of each, the fastest of a few rounds counts. `time/sum` is the mixture's time over the teacher's plus the
student's: what is above 1 is the price of solving α and keeping the record of each token.
"""

from __future__ import annotations

import argparse
import os
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from transformers import PreTrainedModel

from optimal_sampling_trl.backends.transformers import TransformersBackend
from random_pair import describe, fastest, make_random_pair, make_requests, parser


def alone(model: PreTrainedModel, ids: torch.Tensor, tokens: int) -> None:
    """transformers' own sampling of `tokens` tokens from one model, past any end of sequence."""
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, max_new_tokens=tokens)
    assert out.shape[1] == ids.shape[1] + tokens, f"{out.shape[1] - ids.shape[1]} tokens; wanted {tokens}"


def measure(backend: TransformersBackend, batch: int, args: argparse.Namespace) -> dict[str, float]:
    """Seconds of the mixture, the teacher and the student."""
    requests = make_requests(batch, args)
    ids = torch.tensor([request.prompt_ids for request in requests])
    works = {
        "mixture": lambda: backend.generate(requests),
        "teacher": lambda: alone(backend.teacher, ids, args.tokens),
        "theta": lambda: alone(backend.theta, ids, args.tokens),
    }
    return fastest(works, args.rounds)


def main() -> None:
    args = parser(__doc__).parse_args()
    with tempfile.TemporaryDirectory(prefix="benchmark-transformers-") as root:
        backend = TransformersBackend(*make_random_pair(root, args), dtype=args.dtype)
    print(describe(args, f"transformers {transformers.__version__}"))
    print("| batch | mixture tok/s | teacher tok/s | student tok/s | time/sum |")
    print("|------:|--------------:|--------------:|--------------:|---------:|")
    for batch in args.batches:
        took = measure(backend, batch, args)
        speeds = " | ".join(f"{batch * args.tokens / seconds:13.1f}" for seconds in took.values())
        print(f"| {batch:5} | {speeds} | {took['mixture'] / (took['teacher'] + took['theta']):8.2f} |", flush=True)


if __name__ == "__main__":
    main()
