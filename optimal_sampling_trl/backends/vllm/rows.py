"""Log-probabilities of a request kept as the rows of numbers in which the worker packs them."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from ...rollouts.dense import Dense
from .wire import RECORD_COLUMNS, dense_of, packed_width, to_named, wants_record


class RecordRows(Sequence[Any]):
    """Stands where vLLM keeps a request's log-probabilities, and is read as its own containers are.

    The numbers are copied as they come. An engine's arrays hold a whole step, in memory that the GPU copies to: kept
    until the request ends, they would have every step take more of it.

    Args:
        dense: what the request asks for; a row may be wider, for other requests of its batch.
        ids: the ids of the first tokens' records.
        values: their numbers.
    """

    def __init__(self, dense: Dense, ids: Sequence[bytes] = (), values: Sequence[bytes] = ()) -> None:
        self.dense, self.width = dense, packed_width(dense)
        self.ids, self.values = list(ids), list(values)

    def add(self, lists: Any) -> None:
        """Keep the ids and the numbers of a step: vLLM's `LogprobsLists`."""
        self.ids.append(_cut(lists.logprob_token_ids, 1 + RECORD_COLUMNS))
        self.values.append(_cut(lists.logprobs, self.width))

    def arrays(self) -> tuple[Int[np.ndarray, "T 4"], Float[np.ndarray, "T C"]]:
        """Return the ids and the numbers of all tokens, read-only."""
        # Kept joined: a server reads one token after the other.
        self.ids, self.values = [b"".join(self.ids)], [b"".join(self.values)]
        ids, values = np.frombuffer(self.ids[0], np.int64), np.frombuffer(self.values[0], np.float32)
        return ids.reshape(-1, 1 + RECORD_COLUMNS), values.reshape(-1, self.width)

    def __len__(self) -> int:
        return sum(map(len, self.values)) // (np.dtype(np.float32).itemsize * self.width)

    def __getitem__(self, index: Any) -> Any:
        """Return a token's numbers by their ids, in vLLM's form; for a slice, the rows of its tokens."""
        ids, values = self.arrays()
        if isinstance(index, slice):
            return RecordRows(self.dense, [ids[index].tobytes()], [values[index].tobytes()])
        ids, values = (one[0].tolist() for one in to_named(ids[[index]], values[[index]], self.dense))
        numbers = [SimpleNamespace(logprob=value, rank=None, decoded_token=None) for value in values]
        return dict(zip(ids, numbers, strict=True))


def _cut(rows: np.ndarray, width: int) -> bytes:
    return (rows if rows.shape[1] == width else rows[:, :width]).tobytes()


def keep_rows(engine: Any) -> None:
    """Make no text of the columns of records, and keep dense ones as the worker packs them.

    Symptom: with a tokenizer like Llama-2's a request for records with stop texts ends the engine, by a TypeError;
        dense records of 32 likely tokens cost the host 25 µs a token, and with stop texts it decodes 139 ids.
    Cause: with stop texts vLLM turns the id of each column into text, and ids of records are beyond the vocabulary; it
        appends each number to four lists.
    Safe: these texts have no reader, and stop texts are found in another text, which is left alone. For requests with
        dense records the rows are kept in their place and read at the end: 1 µs.
    Upstream: none found; `flat_logprobs` is the nearest.
    Delete when: vLLM keeps the log-probabilities of a request in arrays, and numbers without ids.

    Args:
        engine: vLLM's, in this process or of a server.
    """
    output_processor = engine.output_processor
    add_request = output_processor.add_request

    def add(request: Any, *args: Any, **kwargs: Any) -> None:
        add_request(request, *args, **kwargs)
        params = request.sampling_params
        if params is None or not wants_record(params):
            return
        processor = output_processor.request_states[request.request_id].logprobs_processor
        processor.tokenizer = None
        dense = dense_of(params.extra_args)
        if dense is not None:
            processor.logprobs = rows = RecordRows(dense)
            processor._update_sample_logprobs = rows.add

    output_processor.add_request = add
