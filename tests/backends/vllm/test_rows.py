"""The container of a request's rows against vLLM's own."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np

from optimal_sampling_trl.backends.vllm.rows import RecordRows, keep_rows


def rows(tokens: int, width: int = 5) -> RecordRows:
    """Rows of three columns, in steps of one token each that were wider."""
    kept = RecordRows(3)
    for token in range(tokens):
        ids = np.arange(width)[None] + 10 * token
        kept.add(SimpleNamespace(logprob_token_ids=ids, logprobs=-ids.astype(np.float32)))
    return kept


def test_rows_are_cut_to_their_columns() -> None:
    ids, values = rows(2).arrays()
    assert ids.tolist() == [[0, 1, 2], [10, 11, 12]]
    assert values.tolist() == [[0, -1, -2], [-10, -11, -12]]
    assert [array.shape for array in rows(0).arrays()] == [(0, 3)] * 2


def test_they_are_read_as_vllms_own() -> None:
    assert not rows(0)
    assert len(rows(4)) == 4
    assert {id: one.logprob for id, one in rows(3)[1].items()} == {10: -10.0, 11: -11.0, 12: -12.0}
    assert [list(one) for one in rows(4)[-2:]] == [[20, 21, 22], [30, 31, 32]]
    assert len(rows(4)[:0]) == 0


def test_a_step_of_two_tokens() -> None:
    kept = RecordRows(2)
    kept.add(SimpleNamespace(logprob_token_ids=np.array([[1, 2], [3, 4]]), logprobs=np.zeros((2, 2), np.float32)))
    assert kept.arrays()[0].tolist() == [[1, 2], [3, 4]]


def test_only_requests_for_dense_records_are_kept_so() -> None:
    processor = SimpleNamespace(request_states={})

    def add_request(request: SimpleNamespace, prompt: str) -> None:
        own = SimpleNamespace(logprobs="vLLM's", _update_sample_logprobs=None)
        processor.request_states[request.request_id] = SimpleNamespace(logprobs_processor=own)

    processor.add_request = add_request
    keep_rows(SimpleNamespace(output_processor=processor))
    for name, extra in (("plain", None), ("record", {"optimal_sampling_record": 1}), ("dense", {"dense_top_k": 2})):
        params = SimpleNamespace(extra_args=extra)
        processor.add_request(SimpleNamespace(request_id=name, sampling_params=params), "prompt")
    kept = {name: state.logprobs_processor.logprobs for name, state in processor.request_states.items()}
    assert (kept["plain"], kept["record"]) == ("vLLM's", "vLLM's")
    assert kept["dense"].columns == 1 + 3 + 8
