"""Rollouts as rows of a dataset, and back."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

from ..mixture import CHOICES, FIELDS, Mixture
from .rollout import RECORDS, Rollout

if TYPE_CHECKING:
    from datasets import Dataset, Features


def to_dataset(rollouts: Iterable[Rollout]) -> Dataset:
    """Put rollouts into a `datasets.Dataset`, a row each, without loss: float32 stays float32.

    Example:
        ```python
        with OptimalSamplingV1(model_teacher="large", model_theta="small") as sampler:
            dataset = to_dataset(sampler.generate(["3 + 4 ="], n=4, max_tokens=8).rollouts)
        dataset.to_parquet("output/rollouts.parquet")
        ```
    """
    from datasets import Dataset

    rows, columns = [_to_row(rollout) for rollout in rollouts], features()
    return Dataset.from_dict({name: [row[name] for row in rows] for name in columns}, features=columns)


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


def features() -> Features:
    """Columns of `to_dataset` with their types."""
    from datasets import Features, List, Value

    ids, record = List(Value("int64")), List(Value("float32"))
    mixture = {name: Value("string" if name in CHOICES else "float64") for name in FIELDS}
    return Features(
        {
            **{name: ids for name in ("prompt_ids", "theta_prompt_ids", "completion_ids")},
            **{name: record for name in RECORDS},
            "text": Value("string"),
            "finish_reason": Value("string"),
            "mixture": mixture,
            "temperature": Value("float64"),
        }
    )


def _to_row(rollout: Rollout) -> dict[str, Any]:
    row = dict(vars(rollout))
    return row | {name: row[name].numpy() for name in RECORDS} | {"mixture": rollout.mixture.to_dict()}


def _from_row(row: dict[str, Any]) -> Rollout:
    names = Rollout.__dataclass_fields__
    missing = [name for name in names if name not in row]
    if missing:
        raise ValueError(
            f"A row of rollouts lacks {', '.join(missing)}; it has {', '.join(row)}. "
            "Wanted the columns that `to_dataset` writes."
        )
    records = {name: torch.tensor(row[name], dtype=torch.float32) for name in RECORDS}
    mixture = Mixture.from_dict(row["mixture"])
    return Rollout(**{**{name: row[name] for name in names}, **records, "mixture": mixture})
