"""The container of a request's rows against vLLM's own."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import torch

from helpers.models import make_tokenizer
from optimal_sampling_trl.backends.vllm.rows import RecordRows, keep_rows
from optimal_sampling_trl.backends.vllm.wire import column_ids, pack
from optimal_sampling_trl.rollouts.dense import Dense

V = 10
DENSE = Dense(("overlap",), 1)


def step(*tokens: int, more: int = 0) -> SimpleNamespace:
    """What the engine hands over of these tokens, in rows that were wider for others."""
    column = torch.tensor(tokens, dtype=torch.float32)[:, None]
    packed = pack(
        column / 10, torch.tensor([[token, 9] for token in tokens]), -column.expand(-1, 2), -2 * column.expand(-1, 2)
    )
    values = np.concatenate(
        [-column.expand(-1, 4).numpy(), packed.numpy(), np.ones((len(tokens), more), np.float32)], 1
    )
    ids = np.pad(column_ids(tokens, V), ((0, 0), (0, more)), constant_values=7)
    return SimpleNamespace(logprob_token_ids=ids, logprobs=values)


def rows(*tokens: int, more: int = 0) -> RecordRows:
    """Rows of these tokens, in steps of one each."""
    kept = RecordRows(DENSE)
    for token in tokens:
        kept.add(step(token, more=more))
    return kept


def test_rows_are_cut_to_their_columns() -> None:
    for wide, narrow in zip(rows(1, 2, more=3).arrays(), rows(1, 2).arrays(), strict=True):
        assert np.array_equal(wide, narrow)
    assert rows(1, 2).arrays()[0].tolist() == [[1, V, V + 1, V + 2], [2, V, V + 1, V + 2]]
    assert [array.shape for array in rows().arrays()] == [(0, 4), (0, 4 + 1 + 6)]


def test_they_are_read_as_vllms_own() -> None:
    assert not rows()
    assert len(rows(1, 2, 3)) == 3
    numbers = {id: one.logprob for id, one in rows(1, 2)[1].items()}
    assert list(numbers) == [2, V, V + 1, V + 2, V + 3, 2 * V + 2, 3 * V + 9, 4 * V + 2, 5 * V + 9]
    assert list(numbers.values()) == [-2.0] * 4 + [-np.float32(0.2)] + [-2.0] * 2 + [-4.0] * 2
    assert [next(iter(one)) for one in rows(1, 2, 3)[-2:]] == [2, 3]
    assert len(rows(1, 2)[:0]) == 0


def test_a_step_of_two_tokens() -> None:
    kept = RecordRows(DENSE)
    kept.add(step(1, 2, more=2))
    for at_once, alone in zip(kept.arrays(), rows(1, 2).arrays(), strict=True):
        assert np.array_equal(at_once, alone)


def test_a_step_is_not_held() -> None:
    """An engine's arrays may be views of memory that is pinned; they are free again when they were added."""
    kept, given = RecordRows(DENSE), step(4)
    kept.add(given)
    before = [one.copy() for one in kept.arrays()]
    given.logprob_token_ids[:], given.logprobs[:] = 0, 0
    assert all(np.array_equal(one, other) for one, other in zip(kept.arrays(), before, strict=True))


def test_what_is_kept_of_a_request_depends_on_what_it_asks_for() -> None:
    """The rows of dense records; no text of any record's columns; and all that vLLM keeps for a stranger."""
    tokenizer, processor = make_tokenizer(), SimpleNamespace(request_states={})

    def add_request(request: SimpleNamespace, prompt: str) -> None:
        own = SimpleNamespace(logprobs="vLLM's", _update_sample_logprobs=None, tokenizer=tokenizer)
        processor.request_states[request.request_id] = SimpleNamespace(logprobs_processor=own)

    processor.add_request = add_request
    keep_rows(SimpleNamespace(output_processor=processor))
    record = {"optimal_sampling_record": 1}
    for name, extra in (("plain", None), ("record", record), ("dense", record | {"dense_top_k": 2})):
        params = SimpleNamespace(extra_args=extra)
        processor.add_request(SimpleNamespace(request_id=name, sampling_params=params), "prompt")
    kept = {name: state.logprobs_processor for name, state in processor.request_states.items()}
    assert (kept["plain"].logprobs, kept["record"].logprobs) == ("vLLM's", "vLLM's")
    assert kept["dense"].logprobs.dense == Dense(top_k=2)
    assert [kept[name].tokenizer for name in ("plain", "record", "dense")] == [tokenizer, None, None]
