"""Tasks of reasoning-gym for a small model: questions, solved examples, and the package's own verifier.

    pip install reasoning-gym

`sums` is answered at once; `steps` and `gsm` reason first. The examples are made of what the package says of each
question: the expression of `chain_sum`, the worked solution of `gsm_symbolic`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from functools import cache
from itertools import islice
from typing import Any, NamedTuple

from datasets import Dataset

MARK = "Answer:"
ASK = "Work it out step by step, then end with a line `Answer: ` and the number."
AT_ONCE = "Reply with `Answer: ` and the number alone."
FIRST = {"test": 1, "train": 10_000_000}
"""The seed of a split's first question; a question's own seed is that plus its number."""
SPAN = 1_000_000
"""Numbers that the questions of one seed of the training take up."""


def _at_once(entry: dict[str, Any]) -> str:
    return f"{MARK} {entry['answer']}"


def _running_totals(entry: dict[str, Any]) -> str:
    """The expression from left to right, a line for each operation: `42 - 25 = 17`."""
    total, *rest = entry["metadata"]["expression"].split()
    lines = []
    for sign, number in zip(rest[::2], rest[1::2]):
        result = int(total) + (int(number) if sign == "+" else -int(number))
        lines.append(f"{total} {sign} {number} = {result}")
        total = str(result)
    return "\n".join([*lines, _at_once(entry)])


def _worked(entry: dict[str, Any]) -> str:
    return entry["metadata"]["answer_cot"].partition("####")[0].strip() + "\n" + _at_once(entry)


class Task(NamedTuple):
    """A task.

    Args:
        key: our name, in `TASKS`.
        name: reasoning-gym's.
        config: its configuration.
        ask: what is added to a question.
        solve: a solved example of an entry.
        length: tokens of an answer at most.
    """

    key: str
    name: str
    config: dict[str, Any]
    ask: str
    solve: Callable[[dict[str, Any]], str]
    length: int

    def entries(self, split: str, count: int, seed: int = 0) -> list[dict[str, Any]]:
        """`count` questions as reasoning-gym makes them; those of "train" are none of "test" with any seed.

        Raises:
            ValueError: on another split.
        """
        if split not in FIRST:
            raise ValueError(f"split is {split!r}; it must be 'train' or 'test'")
        held_out = frozenset() if split == "test" else _held_out(self.key)
        made = _make(self.name, self.config, FIRST[split] + seed * SPAN, SPAN)
        return list(islice((entry for entry in made if entry["question"] not in held_out), count))

    def prompt(self, entry: dict[str, Any]) -> list[dict[str, str]]:
        """One user's turn."""
        return [{"role": "user", "content": f"{entry['question']}\n{self.ask}"}]

    def dataset(self, split: str, count: int, seed: int) -> Dataset:
        """Prompts as TRL's trainers take them, each with its entry for the reward."""
        rows = self.entries(split, count, seed)
        return Dataset.from_list([{"prompt": self.prompt(row), "entry": json.dumps(row)} for row in rows])

    def score(self, text: str, entry: dict[str, Any]) -> float:
        """1.0 where reasoning-gym's verifier says that the answer in a text is wholly right, else 0.0.

        The verifier gives a wrong number a little, too: `gsm_symbolic` 0.01.
        """
        return float(_make(self.name, self.config, 1, 1).score_answer(answer_of(text), entry) >= 1.0)

    def reward(self, completions: Sequence[Any], entry: Sequence[str], **columns: Any) -> list[float]:
        """TRL's reward."""
        return [self.score(turn[0]["content"], json.loads(row)) for turn, row in zip(completions, entry, strict=True)]


def answer_of(text: str) -> str:
    """Return the text behind the last mark, on its line; the last number of a text without one."""
    _, mark, after = text.rpartition(MARK)
    if mark:
        return after.strip().split("\n")[0].strip().rstrip(".")
    return ([*re.findall(r"-?\d+(?:\.\d+)?", text)] or [""])[-1]


@cache
def _import() -> Any:
    try:
        import reasoning_gym
    except ImportError as error:
        raise SystemExit(f"reasoning-gym could not be imported ({error}). Run `pip install reasoning-gym`.") from error
    return reasoning_gym


def _make(name: str, config: dict[str, Any], seed: int, size: int) -> Any:
    """A data set of the package, which makes its entries when they are read."""
    return _import().create_dataset(name, seed=seed, size=size, **config)


@cache
def _held_out(key: str) -> frozenset[str]:
    return frozenset(entry["question"] for entry in TASKS[key].entries("test", HELD_OUT))


HELD_OUT = 2048
"""Questions that no training sees."""
SUMS, STEPS = {"max_terms": 2, "min_digits": 2, "max_digits": 3}, {"min_terms": 4, "max_terms": 4, "min_digits": 2}
EVERY = (
    Task("sums", "chain_sum", SUMS, AT_ONCE, _at_once, 24),
    Task("steps", "chain_sum", {**STEPS, "max_digits": 2}, ASK, _running_totals, 96),
    Task("gsm", "gsm_symbolic", {}, ASK, _worked, 288),
)
TASKS = {task.key: task for task in EVERY}
