"""The wire format: what a request carries, and the columns in which the record of a token comes back."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from optimal_sampling_trl.backends.vllm import wire
from optimal_sampling_trl.mixture import Mixture
from optimal_sampling_trl.pairing import Ending
from optimal_sampling_trl.rollouts.dense import SCALARS, Dense
from optimal_sampling_trl.rollouts.request import Request, Sampling
from optimal_sampling_trl.rollouts.rollout import RECORDS

REQUEST = Request([1, 2, 3], [1, 2, 3], Mixture("trust_region", epsilon=0.2), Sampling(top_k=5, stop=("a",)))


def flat(rows: np.ndarray, ids: np.ndarray) -> Any:
    """What vLLM hands back: the columns of all tokens behind each other."""
    return SimpleNamespace(token_ids=ids.ravel().tolist(), logprobs=rows.ravel().tolist())


def test_every_column_arrives_under_its_name() -> None:
    rows = np.arange(8, dtype=np.float32).reshape(2, 4) / 16 - 1
    read = dict(zip(RECORDS, wire.read_records(flat(rows, wire.column_ids([5, 6], 320)), [5, 6], 320), strict=True))
    for column, name in enumerate(("log_q", *wire.RECORD_NAMES)):
        assert read[name].tolist() == rows[:, column].tolist(), name


def test_the_code_for_nan_is_undone() -> None:
    rows = np.array([[-1.0, wire.NO_NUMBER, -np.inf, wire.NO_NUMBER]], dtype=np.float32)
    alpha, log_q, log_theta, log_teacher = wire.to_columns(rows)
    assert alpha.isnan().all()
    assert log_teacher.isnan().all()
    assert (log_q.tolist(), log_theta.tolist()) == ([-1.0], [-torch.inf])


@pytest.mark.parametrize("shift", [0, 1])
def test_columns_of_another_token_are_refused(shift: int) -> None:
    answer = flat(np.zeros((1, 4), dtype=np.float32), wire.column_ids([5], 320))
    with pytest.raises(RuntimeError, match="another column is in its way"):
        wire.read_records(answer, [6] if shift == 0 else [5], 320 + shift)


DENSE = Dense(("overlap", "kl_q_theta"), 2)


def packed(V: int = 320) -> tuple[np.ndarray, np.ndarray]:
    """Ids and numbers of two tokens as a worker packs them: a record, two scalars, two likely tokens of each model."""
    ids = torch.tensor([[3, 7, 7, 9], [1, 2, 300, 319]])
    numbers = torch.arange(2 * 14.0).reshape(2, 14) / 16
    values = torch.cat([-numbers[:, :4], wire.pack(numbers[:, 4:6], ids, -numbers[:, 6:10], -numbers[:, 10:])], 1)
    return wire.column_ids([5, 6], V), values.numpy()


@pytest.mark.parametrize("named", [False, True])
def test_dense_records_arrive_under_their_names(named: bool) -> None:
    """In the rows of an engine, and in the columns of a server's JSON."""
    ids, values = packed()
    values[0, 4:6] = (np.nan, np.inf)
    values[1, 6] = -np.inf
    assert wire.packed_width(DENSE) == values.shape[1]
    if named:
        columns = wire.to_named(ids, values, DENSE)
        assert columns[0].shape == columns[1].shape == (2, 1 + wire.columns_of(DENSE))
        assert not np.isnan(columns[1]).any()
        assert not np.isposinf(columns[1]).any()
        records, dense = wire.read_named(*columns, [5, 6], DENSE, 320)
    else:
        records, dense = wire.read_packed(ids, values, [5, 6], DENSE, 320)
    assert records.tolist() == wire.to_columns(values[:, :4]).tolist()
    assert dense.ids.tolist() == [[3, 7, 7, 9], [1, 2, 300, 319]]
    assert dense.scalars["overlap"].isnan().tolist() == [True, False]
    assert dense.scalars["kl_q_theta"].tolist() == [torch.inf, values[1, 5]]
    assert dense.log_theta.tolist() == values[:, 6:10].tolist()
    assert dense.log_teacher.tolist() == values[:, 10:14].tolist()
    assert all(one.is_contiguous() for one in (dense.ids, dense.log_theta, dense.log_teacher, *dense.scalars.values()))


def test_no_id_stands_twice_in_a_row() -> None:
    """Not even where both models like the same tokens, and where the vocabulary is barely larger than the scalars."""
    scalars, ids = torch.zeros(1, 7), torch.tensor([[0, 1, 0, 11]])
    values = torch.cat([torch.zeros(1, 4), wire.pack(scalars, ids, -ids.float(), -ids.float())], 1)
    row = wire.to_named(wire.column_ids([3], 12), values.numpy(), Dense(SCALARS, 2))[0][0].tolist()
    assert len(set(row)) == len(row) == 4 + 7 + 8
    assert sorted(row)[1] == 12


def test_dense_records_of_another_layout_are_refused() -> None:
    ids, values = wire.to_named(*packed(), DENSE)
    ids[1, 10] += 1  # another token under the teacher than under the student
    with pytest.raises(RuntimeError, match="another column is in its way"):
        wire.read_named(ids, values, [5, 6], DENSE, 320)
    ids, values = packed()
    with pytest.raises(RuntimeError, match="another column is in its way"):
        wire.read_packed(ids, values, [5, 7], DENSE, 320)


def test_a_completion_without_tokens_has_empty_dense_records() -> None:
    ids, values = (one[:0] for one in packed())
    empty = [wire.read_packed(ids, values, [], DENSE, 320), wire.read_named(*_no_columns(), [], DENSE, 320)]
    for _, dense in empty:
        assert (len(dense), tuple(dense.ids.shape)) == (0, (0, 4))


def _no_columns() -> tuple[np.ndarray, np.ndarray]:
    return tuple(one[:0] for one in wire.to_named(*packed(), DENSE))  # type: ignore[return-value]


def test_a_wish_travels_flat_and_comes_back() -> None:
    extra = wire.extra_arguments(replace(REQUEST, dense=DENSE))
    assert wire.dense_of(extra) == DENSE
    assert json.loads(json.dumps(extra)) == extra
    assert wire.dense_of(wire.extra_arguments(REQUEST)) is wire.dense_of(None) is None
    assert wire.mixture_of(extra) == REQUEST.mixture


def test_a_mixture_travels_flat_and_comes_back() -> None:
    extra = wire.extra_arguments(REQUEST)
    assert wire.mixture_of(extra) == REQUEST.mixture
    assert wire.wants_record(SimpleNamespace(extra_args=extra))  # type: ignore[arg-type]
    assert not wire.wants_record(SimpleNamespace(extra_args=None))  # type: ignore[arg-type]
    assert wire.mixture_of(None) == wire.mixture_of({}) == Mixture()
    swap = Mixture("top_k_swap", swap_top_k=7)
    extra = json.loads(json.dumps(wire.extra_arguments(replace(REQUEST, mixture=swap))))
    assert wire.mixture_of(extra) == swap


def test_the_students_prompt_travels_where_it_is_another() -> None:
    same, other = (SimpleNamespace(extra_args=wire.extra_arguments(one)) for one in (
        REQUEST, replace(REQUEST, theta_prompt_ids=[2, 3])
    ))  # fmt: skip
    assert wire.theta_prompt_of(same) is None  # type: ignore[arg-type]
    assert wire.theta_prompt_of(other) == [2, 3]  # type: ignore[arg-type]
    assert wire.theta_prompt_of(None) is None


def test_a_shorter_prompt_of_the_teacher_is_scheduled_behind_its_first_token() -> None:
    longer = replace(REQUEST, theta_prompt_ids=[9, 9, 2, 3, 4])
    assert wire.scheduled_prompt(REQUEST) == [1, 2, 3]
    assert wire.scheduled_prompt(replace(REQUEST, theta_prompt_ids=[2])) == [1, 2, 3]
    assert wire.scheduled_prompt(longer) == [1, 1, 1, 2, 3]
    for request, shift in ((REQUEST, 0), (longer, 2)):
        params = SimpleNamespace(extra_args=wire.extra_arguments(request))
        assert wire.teacher_shift_of(params) == shift  # type: ignore[arg-type]
        assert (wire.TEACHER_SHIFT in params.extra_args) == (shift > 0)
    assert wire.teacher_shift_of(None) == 0


def test_every_setting_has_a_word() -> None:
    """Those of `Sampling` that are left out here have another word: see `to_sampling_params`."""
    words = wire.same_arguments(REQUEST) | wire.stop_arguments(REQUEST, Ending((7, 8), (9,)))
    assert set(Sampling.__dataclass_fields__) - set(words) == {"seed"}
    assert (words["top_k"], words["stop"], words["stop_token_ids"], words["ignore_eos"]) == (5, ["a"], [7, 8], True)
    ignoring = replace(REQUEST, sampling=replace(REQUEST.sampling, ignore_eos=True))
    assert wire.stop_arguments(ignoring, Ending((7, 8), (9,)))["stop_token_ids"] == []
