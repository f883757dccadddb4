"""TRL's table of completions shows what was trained on: its columns against the batch."""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import Any

import pandas
import pytest
import torch
from datasets import Dataset

from helpers.training import TEXTS, Watch, make_trainer, one_batch, reward
from optimal_sampling_trl.trainers.table import mean_advantages

SETTINGS: dict[str, dict[str, Any]] = {
    "grpo": {},
    "rloo": {"correction": "sequence_truncate", "positive_only": "mixture"},
    "raft": {"completion_weight": "reward"},
    "coefficient": {"distillation_coefficient": 0.3, "positive_only": "none"},
}


@pytest.mark.parametrize("case", SETTINGS)
def test_a_row_shows_the_advantage_that_is_trained_on(pair: tuple[str, str], tmp_path: Path, case: str) -> None:
    """In the columns that TRL prints and sends; each row beside the prompt and the completion that it is of."""
    kind, halves = "grpo" if case == "coefficient" else case, {"theta_fraction": 0.5}
    trainer = make_trainer(kind, pair, tmp_path, mixin=Watch, generator=halves, log_completions=True, **SETTINGS[case])
    one_batch(trainer, [text for text in TEXTS[:2] for _ in range(4)])
    columns = {name: list(column) for name, column in trainer._logs.items() if name not in ("extra", "rewards")}
    columns |= {name: list(column) for name, column in trainer._logs["extra"].items()}
    _, output, rollouts = trainer.generations[-1]
    assert columns["completion"] == [rollout.text for rollout in rollouts]
    assert columns["mixture/alpha"] == pytest.approx([float(rollout.alpha.mean()) for rollout in rollouts])
    names = {False: "student", True: "mixture"}
    assert columns["mixture/sampled_by"] == [names[mixed] for mixed in output["mixture_rows"].tolist()]
    assert set(columns["mixture/sampled_by"]) == {"student", "mixture"}
    trained = output["imitation_weights" if case == "raft" else "advantages"]
    if case == "coefficient":
        assert trained.ndim == 2
        trained = torch.stack([row[valid].mean() for row, valid in zip(trained, output["completion_mask"].bool())])
    assert columns["advantages"] == pytest.approx(trained.tolist(), abs=1e-6)
    assert trainer.advantages == pytest.approx(trained.tolist(), abs=1e-6)
    assert len({round(value, 6) for value in trained.tolist()}) > 1


def test_the_file_holds_the_columns_after_an_evaluation_too(pair: tuple[str, str], tmp_path: Path) -> None:
    """Beside TRL's columns and one of the user's."""

    def with_column(completions: Any, log_extra: Any = None, **columns: Any) -> list[float]:
        log_extra("length", [len(text) for text in completions])
        return reward(completions)

    given = {"eval_dataset": Dataset.from_dict({"prompt": TEXTS[:4]}), "reward_funcs": with_column}
    logs = {"log_completions": True, "num_completions_to_print": 1, "eval_strategy": "steps", "eval_steps": 2}
    trainer = make_trainer("grpo", pair, tmp_path, mixin=Watch, trainer=given, max_steps=2, **logs)
    trainer.train()
    table = pandas.read_parquet(tmp_path / "completions" / "completions_00001.parquet")
    assert list(table.columns)[:4] == ["step", "prompt", "completion", "with_column"]
    _, output, rollouts = trainer.generations[0]
    assert table["length"].tolist() == [len(rollout.text) for rollout in rollouts]
    assert table["advantage"].tolist() == pytest.approx(output["advantages"].tolist(), abs=1e-6)
    assert min(table["advantage"]) == 0 < max(table["advantage"])
    after = pandas.read_parquet(sorted((tmp_path / "completions").glob("*.parquet"))[-1])
    assert set(after["mixture/sampled_by"].tail(4)) == {"student"}  # the evaluation's


def test_tokens_that_are_not_trained_on_have_no_advantage() -> None:
    mask = torch.tensor([[True, True, False], [False, False, False], [True, True, True]])
    assert mean_advantages(torch.tensor([1.5, 2.0, -1.0]), mask).tolist() == [1.5, 0.0, -1.0]
    by_token = torch.tensor([[1.0, 3.0, 9.0], [5.0, 5.0, 5.0], [1.0, 2.0, 6.0]])
    assert mean_advantages(by_token, mask).tolist() == [2.0, 0.0, 3.0]


def test_an_evaluation_larger_than_the_table_fills_it() -> None:
    from optimal_sampling_trl.trainers.table import _replace_last

    column = deque([1.0, 2.0, 3.0], maxlen=3)
    _replace_last(column, [7.0])
    assert list(column) == [1.0, 2.0, 7.0]
    _replace_last(column, [4.0, 5.0, 6.0, 8.0])
    assert list(column) == [5.0, 6.0, 8.0]
