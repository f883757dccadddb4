"""The prompt of a later turn: its row stays with it, through TRL's sums and between processes."""

from __future__ import annotations

import pickle

from optimal_sampling_trl.trainers.engines.turns import Context, TurnPrompt, rows_of


def test_a_sum_is_of_the_same_row() -> None:
    prompt = TurnPrompt([1, 2], 5)
    completion, returned = [3], [4, 5]
    longer = prompt + completion + returned  # as TRL does
    assert longer == [1, 2, 3, 4, 5]
    assert isinstance(longer, TurnPrompt)
    assert longer.row == 5
    assert prompt == [1, 2]
    assert type(longer[2:]) is list
    copied = pickle.loads(pickle.dumps(longer))
    assert (copied, copied.row) == (longer, 5)


def test_a_prompt_without_a_row_is_of_its_place() -> None:
    assert rows_of([[7], [8]]) == [0, 1]
    assert rows_of([TurnPrompt([7], 3), TurnPrompt([8], 1)]) == [3, 1]


def test_the_context_is_asked_for_each_time() -> None:
    limits = iter((7, 8))
    engine = Context(lambda: next(limits))
    assert engine.llm_engine.model_config.max_model_len == 7
    assert engine.llm_engine.model_config.max_model_len == 8
