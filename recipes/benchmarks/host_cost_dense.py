# /// script
# dependencies = ["optimal-sampling-trl[vllm]", "numpy"]
# ///
"""Measure the host's work for each token with dense records, besides sampling.

    OMP_NUM_THREADS=1 python recipes/benchmarks/host_cost_dense.py

As `host_cost.py`, with all scalars and k likely tokens of each model. Two ways are timed from the engine's numbers on:
the lists that vLLM keeps, and the rows that are kept in their place; and what a client of a server reads.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from itertools import repeat
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch

from host_cost import Batch, cost, flags, print_table, silent
from optimal_sampling_trl.backends.vllm.rows import RecordRows
from optimal_sampling_trl.backends.vllm.server.messages import to_rollouts
from optimal_sampling_trl.backends.vllm.wire import column_ids, pack, read_named, read_packed, to_named
from optimal_sampling_trl.rollouts.dense import SCALARS, Dense


class DenseBatch:
    """Dense records as the engine hands them over: in each step a row of ids and numbers for each completion.

    Args:
        batch: whose completions they are of.
        dense: what they hold.
    """

    def __init__(self, batch: Batch, dense: Dense) -> None:
        self.dense, self.V, self.ids = dense, batch.pair.engine_vocabulary, batch.ids
        self.request = replace(batch.request, dense=dense)
        self.pair: Any = silent(batch.pair)
        completions, tokens = batch.ids.shape
        generator = torch.Generator().manual_seed(1)
        likely = torch.randint(self.V, (completions * tokens, 2 * dense.top_k), generator=generator)
        record, scalars = (torch.rand(len(likely), count, generator=generator) for count in (4, len(dense.scalars)))
        log_p = torch.rand(2, *likely.shape, generator=generator)
        values = torch.cat([record, pack(scalars, likely, *log_p)], 1).numpy()
        ids = column_ids(batch.ids.flatten().tolist(), self.V)
        self.columns, self.numbers = (one.reshape(completions, tokens, -1) for one in to_named(ids, values, dense))
        self.steps = [
            [SimpleNamespace(logprob_token_ids=row[None], logprobs=numbers[None]) for row, numbers in zip(*both)]
            for both in zip(*(one.reshape(completions, tokens, -1) for one in (ids, values)))
        ]

    def lists(self) -> None:
        """Keep and read them as vLLM keeps any log-probabilities."""
        from vllm.logprobs import FlatLogprobs, append_logprobs_for_next_position

        for ids, columns, numbers in zip(self.ids.tolist(), self.columns, self.numbers):
            kept = FlatLogprobs()
            for row, values in zip(columns, numbers):  # a step each
                append_logprobs_for_next_position(kept, row.tolist(), values.tolist(), repeat(None), 1, len(row) - 1)
            shape = columns.shape
            arrays = np.array(kept.token_ids).reshape(shape), np.array(kept.logprobs, np.float32).reshape(shape)
            read_named(*arrays, ids, self.dense, self.V)

    def rows(self) -> None:
        """Keep and read them as they come."""
        for ids, steps in zip(self.ids.tolist(), self.steps):
            kept = RecordRows(self.dense)
            for step in steps:
                kept.add(step)
            read_packed(*kept.arrays(), ids, self.dense, self.V)

    def answers(self) -> list[str]:
        """Return what a server sends: a JSON text for each completion."""
        texts = []
        for ids, columns, numbers in zip(self.ids.tolist(), self.columns, self.numbers):
            names = [[f"token_id:{name}" for name in row] for row in columns.tolist()]
            top = [dict(zip(row, values)) for row, values in zip(names, numbers.tolist())]
            choice = {"token_ids": ids, "finish_reason": "length", "logprobs": {"top_logprobs": top}}
            texts.append(json.dumps({"choices": [choice]}))
        return texts

    def read(self, answers: Sequence[str]) -> None:
        """Read a server's answers."""
        for answer in answers:
            to_rollouts(json.loads(answer)["choices"], self.request, self.pair)


def measure(batch: Batch, top_k: int, rounds: int) -> list[tuple[str, float]]:
    """Names and seconds of each way, with so many likely tokens of each model; vLLM's where it is installed."""
    made = DenseBatch(batch, Dense(SCALARS, top_k))
    rows = [(f"k = {top_k}, rows", cost(made.rows, rounds))]
    if find_spec("vllm") is not None:
        rows.append((f"k = {top_k}, lists", cost(made.lists, rounds)))
    answers = made.answers()
    return [*rows, (f"k = {top_k}, JSON", cost(lambda: made.read(answers), rounds))]


def main() -> None:
    parser = flags(__doc__)
    parser.add_argument("--top_k", type=int, nargs="+", default=[0, 8, 32, 128], help="likely tokens of each model")
    args = parser.parse_args()
    torch.set_num_threads(1)
    batch = Batch(args.completions, args.tokens, args.vocabulary)
    print_table([row for top_k in args.top_k for row in measure(batch, top_k, args.rounds)], args)


if __name__ == "__main__":
    main()
