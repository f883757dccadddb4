"""The data that a command line names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import load_dataset
from trl import ScriptArguments

DATA_FILES = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
"""Endings of files with data, and the builder of `datasets` that reads each."""


def load_data(script: ScriptArguments, evaluate: bool) -> dict[str, Any]:
    """Load `train_dataset` and `eval_dataset` from the Hub, a folder or a file (.jsonl, .json, .csv, .parquet).

    Raises:
        ValueError: where none is named, none is found, or a split is missing.
    """
    if not script.dataset_name:
        raise ValueError("`--dataset_name` is missing; wanted a dataset with the column 'prompt'.")
    try:
        data = _load(script.dataset_name, script)
    except OSError as error:  # what `datasets` raises of files, folders and the Hub
        raise ValueError(
            f"`--dataset_name` is {script.dataset_name!r}, and no data was found there: {error}. Wanted a name on the "
            "Hub, a folder, or a file (.jsonl, .json, .csv, .parquet)."
        ) from error
    for flag in ("dataset_train_split", "dataset_test_split")[: 2 if evaluate else 1]:
        if (split := getattr(script, flag)) not in data:
            raise ValueError(
                f"`--{flag}` is {split!r}, and {script.dataset_name} has {', '.join(map(repr, data))}. Name one of "
                "those, or a folder with a file for each split, such as train.jsonl and test.jsonl; "
                "`--eval_strategy no` needs no test split."
            )
    return {
        "train_dataset": data[script.dataset_train_split],
        "eval_dataset": data[script.dataset_test_split] if evaluate else None,
    }


def _load(name: str, script: ScriptArguments) -> Any:
    """Return the splits of a data set, as the flags say it."""
    if builder := DATA_FILES.get(Path(name).suffix):
        files = {script.dataset_train_split: name}
        return load_dataset(builder, data_files=files, streaming=script.dataset_streaming)
    return load_dataset(name, script.dataset_config, streaming=script.dataset_streaming)
