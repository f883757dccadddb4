"""The data that a command line names: a file, a stream, and what is not there."""

from __future__ import annotations

from pathlib import Path

import pytest
from datasets import IterableDataset
from trl import ScriptArguments

from optimal_sampling_trl.cli.data import load_data


def test_a_file_is_data(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text('{"prompt": "a"}\n')
    data = load_data(ScriptArguments(dataset_name=str(tmp_path / "data.jsonl")), evaluate=False)
    assert data["train_dataset"]["prompt"] == ["a"]
    assert data["eval_dataset"] is None
    script = ScriptArguments(dataset_name=str(tmp_path / "data.jsonl"), dataset_streaming=True)
    assert isinstance(load_data(script, evaluate=False)["train_dataset"], IterableDataset)
    for name in ("nowhere.jsonl", "nobody/nothing"):
        with pytest.raises(ValueError, match=f"`--dataset_name` is '{name}', and no data was found there: .* Wanted"):
            load_data(ScriptArguments(dataset_name=name), evaluate=False)
    with pytest.raises(ValueError, match="`--dataset_name` is missing"):
        load_data(ScriptArguments(), evaluate=False)
