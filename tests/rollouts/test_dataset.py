"""Rollouts to a dataset and to a Parquet file and back, without loss."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.rollouts import empty, rollout
from helpers.strategies import EDGES, assert_same, rollouts
from optimal_sampling_trl.mixture import Mixture
from optimal_sampling_trl.rollouts.dataset import features, from_dataset, to_dataset
from optimal_sampling_trl.rollouts.dense import DenseRecords
from optimal_sampling_trl.rollouts.rollout import RECORDS, Rollout


@settings(max_examples=100)
@given(st.lists(rollouts(), max_size=3))
def test_dataset_and_back_loses_nothing(wanted: list[Rollout]) -> None:
    dataset = to_dataset(wanted)
    assert dataset.features == features()
    found = from_dataset(dataset)
    assert len(found) == len(wanted)
    for got, want in zip(found, wanted):
        assert_same(got, want)


def test_parquet_and_back_loses_nothing(tmp_path: Path) -> None:
    from datasets import Dataset

    edges = torch.tensor(EDGES)
    tokens = list(range(len(EDGES)))
    wanted = [
        rollout(
            text="“ein\n\0🦜 Satz\u200d”", mixture=Mixture("trust_region", 0.1, 1 / 3, 0.2, 1e-9), temperature=0.1
        ),
        empty(),
        rollout(completion_ids=tokens, **{name: edges.roll(n) for n, name in enumerate(RECORDS)}),
        rollout(completion_ids=[9], **{name: torch.tensor([torch.nan]) for name in RECORDS}),
    ]
    path = str(tmp_path / "rollouts.parquet")
    to_dataset(wanted).to_parquet(path)
    dataset = Dataset.from_parquet(path, cache_dir=str(tmp_path / "cache"))
    assert dataset.features == features()
    for got, want in zip(from_dataset(dataset), wanted, strict=True):
        assert_same(got, want)


def test_dense_records_have_columns_where_some_rollout_has_them(tmp_path: Path) -> None:
    from datasets import Dataset

    numbers = torch.tensor([*EDGES, torch.nan]).repeat(3, 1)[:, :8]
    ids = torch.arange(24).reshape(3, 8)
    scalars = {"overlap": numbers[:, 0], "kl_q_theta": torch.tensor([torch.inf, -0.0, torch.nan])}
    dense = [
        DenseRecords(scalars, ids, numbers, numbers.flip(0)),
        None,
        DenseRecords({"overlap": torch.zeros(3)}, ids[:, :0], numbers[:, :0], numbers[:, :0]),
        DenseRecords({}, ids[:, :2], numbers[:, 2:4], numbers[:, 4:6]),
    ]
    wanted = [rollout(dense=one) for one in dense]
    empty_dense = DenseRecords({"overlap": torch.zeros(0)}, ids[:0, :0], numbers[:0, :0], numbers[:0, :0])
    wanted.append(rollout(**(vars(empty()) | {"dense": empty_dense})))
    path = str(tmp_path / "rollouts.parquet")
    to_dataset(wanted).to_parquet(path)
    dataset = Dataset.from_parquet(path, cache_dir=str(tmp_path / "cache"))
    columns = {name for name in dataset.column_names if name.startswith("dense_")}
    assert columns == {"dense_kl_q_theta", "dense_overlap", "dense_ids", "dense_log_theta", "dense_log_teacher"}
    for got, want in zip(from_dataset(dataset), wanted, strict=True):
        assert_same(got, want)


def test_no_rollouts_are_a_dataset_too() -> None:
    dataset = to_dataset([])
    assert dataset.features == features()
    assert from_dataset(dataset) == []


def test_a_dataset_without_a_column_is_refused() -> None:
    dataset = to_dataset([rollout()]).remove_columns(["log_theta", "temperature"])
    with pytest.raises(
        ValueError, match=r"lacks log_theta, temperature; it has prompt_ids, .* that `to_dataset` writes"
    ):
        from_dataset(dataset)


def test_a_row_of_an_older_version_is_geometric() -> None:
    row = to_dataset([rollout()])[0]
    del row["mixture"]["form"]
    assert from_dataset([row])[0].mixture == rollout().mixture


def test_a_dataset_with_another_mixture_is_refused() -> None:
    row = to_dataset([rollout()])[0]
    row["mixture"]["alpha_minimum"] = 0.5
    with pytest.raises(ValueError, match=r"Unknown field of a mixture 'alpha_minimum'.*Did you mean 'alpha_min'"):
        from_dataset([row])
