"""Prompts as a data set or lists hold them, each with what the teacher reads in its place."""

from __future__ import annotations

from typing import Any

import pandas
import pytest
from datasets import Dataset, DatasetDict, IterableDataset

from optimal_sampling_trl.pairing.rows import read_prompts, teacher_prompts_of

CHAT = [{"role": "user", "content": "1 + 1"}]
HINTED = [{"role": "user", "content": "1 + 1, which is 2"}]


def stream(*rows: dict[str, Any]) -> IterableDataset:
    return IterableDataset.from_generator(lambda: iter(rows))


def test_columns_and_lists_say_the_same() -> None:
    wanted = [("a", "b"), ("c", None)]
    rows = [{"prompt": prompt, "teacher_prompt": own} for prompt, own in wanted]
    found = read_prompts(Dataset.from_list(rows))
    assert [*found] == [found[0], found[1]] == wanted
    assert [*read_prompts(stream(*rows))] == wanted
    assert [*read_prompts(["a", "c"], ["b", None])] == wanted
    found = read_prompts(iter(["a"]))
    assert [*found] == [found[0]] == [("a", None)]
    chats = Dataset.from_dict({"prompt": [CHAT], "teacher_prompt": [HINTED]})
    assert [*read_prompts(chats)] == [(CHAT, HINTED)]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (([],), "`prompts` is empty"),
        (("a",), "`prompts` is the text 'a'"),
        ((["a", "b"], ["c"]), "`teacher_prompts`: got 1 of them; wanted one for each of the 2 prompts, None where"),
        ((["a"], 5), "`teacher_prompts`: got 5; wanted"),
        ((Dataset.from_dict({"text": ["a"]}),), "has the columns text; wanted 'prompt'"),
        ((Dataset.from_dict({"prompt": ["a"]}), ["b"]), "wanted its column `teacher_prompt`"),
        ((DatasetDict(train=Dataset.from_dict({"prompt": ["a"]})),), "has the splits train"),
        ((stream({"text": "a"}),), "rows without 'prompt'"),
        (
            (Dataset.from_dict({"prompt": ["a"], "answer": ["1"]})[:1],),
            r"`prompts` is keyed by 'prompt', 'answer'; wanted a data set or a list.*`data\.select\(range",
        ),
        ((pandas.DataFrame({"prompt": ["a"]}),), "`prompts` is keyed by 'prompt'; wanted a data set"),
    ],
)
def test_what_is_refused(given: tuple[Any, ...], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        read_prompts(*given)


def test_one_text_is_one_prompt() -> None:
    assert teacher_prompts_of("a", 1) == ["a"]
    assert teacher_prompts_of(None, 2) == [None, None]
