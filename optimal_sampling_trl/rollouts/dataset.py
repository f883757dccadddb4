"""Rollouts as rows of a dataset, and back."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

from ..mixture import CHOICES, FIELDS, Mixture
from .dense import SCALARS, Dense, DenseRecords
from .rollout import RECORDS, Rollout

if TYPE_CHECKING:
    from datasets import Dataset, Features

DENSE = "dense_"
"""Prefix of the names of the columns of dense records."""
LIKELIEST = ("ids", "log_theta", "log_teacher")
"""Fields of `DenseRecords` with K entries a token."""


def to_dataset(rollouts: Iterable[Rollout], dense: Dense | None = None) -> Dataset:
    """Put rollouts into a `datasets.Dataset`, a row each, without loss: float32 stays float32.

    Dense records have columns where some rollout has them, with None in the rows of the others.

    Args:
        rollouts: the rows.
        dense: dense records whose columns are made even where no rollout has them.

    Example:
        ```python
        with OptimalSamplingV1(model_teacher="large", model_theta="small") as sampler:
            dataset = to_dataset(sampler.generate(["3 + 4 ="], n=4, max_tokens=8).rollouts)
        dataset.to_parquet("output/rollouts.parquet")
        ```
    """
    from datasets import Dataset

    rollouts = list(rollouts)
    rows, columns = [_to_row(rollout) for rollout in rollouts], features(_dense_names(rollouts, dense))
    return Dataset.from_dict({name: [row.get(name) for row in rows] for name in columns}, features=columns)


def from_dataset(dataset: Iterable[dict[str, Any]]) -> list[Rollout]:
    """Read rollouts from the rows that `to_dataset` made.

    Args:
        dataset: rows with the columns of `features`; other columns are ignored.

    Raises:
        ValueError: where a column is missing, or a field of a mixture is unknown.

    Example:
        ```python
        with OptimalSamplingV1(model_teacher="large", model_theta="small") as sampler:
            rollouts = sampler.generate(["3 + 4 ="], n=4, max_tokens=8).rollouts
        assert from_dataset(to_dataset(rollouts))[0].completion_ids == rollouts[0].completion_ids
        ```
    """
    return [_from_row(row) for row in dataset]


def features(dense: Iterable[str] = ()) -> Features:
    """Return the columns of `to_dataset` with their types.

    Args:
        dense: names of the scalars, and of `LIKELIEST`, that have columns.
    """
    from datasets import Features, List, Value

    ids, record = List(Value("int64")), List(Value("float32"))
    mixture = {name: Value("string" if name in CHOICES else "float64") for name in FIELDS}
    mixture["swap_top_k"] = Value("int64")
    return Features(
        {
            **{name: ids for name in ("prompt_ids", "theta_prompt_ids", "completion_ids")},
            **{name: record for name in RECORDS},
            "text": Value("string"),
            "finish_reason": Value("string"),
            "mixture": mixture,
            "temperature": Value("float64"),
            **{DENSE + name: record if name in SCALARS else List(ids if name == "ids" else record) for name in dense},
        }
    )


def _dense_names(rollouts: Iterable[Rollout], asked: Dense | None) -> list[str]:
    """Return the names of the dense columns that the rollouts have or that are asked for, in a fixed order."""
    records = [rollout.dense for rollout in rollouts if rollout.dense is not None]
    scalars = set(asked.scalars if asked else ()).union(*(one.scalars for one in records))
    has_tokens = any(one.ids.shape[1] for one in records) or (asked is not None and asked.top_k > 0)
    return [name for name in SCALARS if name in scalars] + (list(LIKELIEST) if has_tokens else [])


def _to_row(rollout: Rollout) -> dict[str, Any]:
    row = dict(vars(rollout)) | {"mixture": rollout.mixture.to_dict()}
    numbers = {name: row[name] for name in RECORDS}
    dense = row.pop("dense")
    if dense is not None:
        numbers |= {DENSE + name: tensor for name, tensor in dense.scalars.items()}
        if dense.ids.shape[1]:
            numbers |= {DENSE + name: getattr(dense, name) for name in LIKELIEST}
    return row | {name: tensor.numpy() for name, tensor in numbers.items()}


def _from_row(row: dict[str, Any]) -> Rollout:
    names = [name for name in Rollout.__dataclass_fields__ if name != "dense"]
    missing = [name for name in names if name not in row]
    if missing:
        raise ValueError(
            f"A row of rollouts lacks {', '.join(missing)}; it has {', '.join(row)}. "
            "Wanted the columns that `to_dataset` writes."
        )
    records = {name: torch.tensor(row[name], dtype=torch.float32) for name in RECORDS}
    mixture = Mixture.from_dict(row["mixture"])
    fields = {name: row[name] for name in names} | records | {"mixture": mixture}
    return Rollout(**fields, dense=_dense_records(row, len(row["completion_ids"])))


def _dense_records(row: dict[str, Any], T: int) -> DenseRecords | None:
    """Read the dense records of a row; None where it has none."""
    given = {name: row.get(DENSE + name) for name in (*SCALARS, *LIKELIEST)}
    if all(value is None for value in given.values()):
        return None
    scalars = {name: torch.tensor(given[name], dtype=torch.float32) for name in SCALARS if given[name] is not None}
    K = len(given["ids"][0]) if given["ids"] else 0
    types = {"ids": torch.int64, "log_theta": torch.float32, "log_teacher": torch.float32}
    likeliest = {name: torch.tensor(given[name] or [], dtype=kind).reshape(T, K) for name, kind in types.items()}
    return DenseRecords(scalars, **likeliest)
