"""Short questions with one answer, which SmolLM2-135M gets right now and then; a few hundred thousand of them."""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Callable, Sequence
from typing import Any

from datasets import Dataset

CAPITALS = {
    "France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Germany": "Berlin", "Japan": "Tokyo", "China": "Beijing",
    "Russia": "Moscow", "Egypt": "Cairo", "Greece": "Athens", "Austria": "Vienna", "Portugal": "Lisbon",
    "Poland": "Warsaw", "Sweden": "Stockholm", "Norway": "Oslo", "Cuba": "Havana", "Ireland": "Dublin",
}  # fmt: skip
OPPOSITES = {
    "hot": "cold", "big": "small", "up": "down", "fast": "slow", "happy": "sad", "light": "dark", "old": "young",
    "hard": "soft", "open": "closed", "full": "empty", "early": "late", "rich": "poor", "high": "low", "wet": "dry",
}  # fmt: skip
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
NAMES = ("Ann", "Ben", "Clara", "David", "Emma", "Frank", "Grace", "Henry", "Ivy", "Jack", "Kate", "Leo")
THINGS = ("apples", "books", "coins", "pens", "cards", "stones", "stamps", "eggs", "cups", "keys")
ASKS = ("", "Please answer: ", "Quick question: ", "Tell me: ", "I wonder: ", "Answer in one sentence. ")
TEST = 5
"""A question whose checksum is a multiple of this is held out."""


def _sum(source: random.Random) -> tuple[str, str]:
    a, b = source.randint(1, 20), source.randint(1, 20)
    return f"What is {a} + {b}?", str(a + b)


def _story(source: random.Random) -> tuple[str, str]:
    a, b = source.randint(2, 10), source.randint(2, 10)
    one, two = source.sample(NAMES, 2)
    thing = source.choice(THINGS)
    return f"{one} has {a} {thing} and {two} has {b} {thing}. How many {thing} do they have together?", str(a + b)


def _capital(source: random.Random) -> tuple[str, str]:
    country = source.choice(list(CAPITALS))
    return f"What is the capital of {country}?", CAPITALS[country]


def _opposite(source: random.Random) -> tuple[str, str]:
    word = source.choice(list(OPPOSITES))
    return f"What is the opposite of '{word}'?", OPPOSITES[word]


def _day(source: random.Random) -> tuple[str, str]:
    place = source.randrange(7)
    return f"Which day comes after {DAYS[place]}?", DAYS[(place + 1) % 7]


KINDS: tuple[Callable[[random.Random], tuple[str, str]], ...] = (_sum, _story, _capital, _opposite, _day)


def questions(split: str, count: int, seed: int) -> Dataset:
    """`count` questions with the columns "prompt" (one user's turn) and "answer"; the splits share none."""
    if split not in ("train", "test"):
        raise ValueError(f"split is {split!r}; it must be 'train' or 'test'")
    source, rows = random.Random(f"{split} {seed}"), []
    while len(rows) < count:
        text, answer = source.choice(KINDS)(source)
        text = source.choice(ASKS) + text
        if (zlib.crc32(text.encode()) % TEST == 0) == (split == "test"):
            rows.append({"prompt": [{"role": "user", "content": text}], "answer": answer})
    return Dataset.from_list(rows)


def is_right(text: str, answer: str) -> bool:
    """Return True where the answer stands in the text as a word of its own."""
    return re.search(rf"\b{re.escape(answer)}\b", text, re.IGNORECASE) is not None


def reward(completions: Sequence[Any], answer: Sequence[str], **kwargs: Any) -> list[float]:
    """TRL's reward: 1.0 where the completion holds the answer, else 0.0."""
    return [float(is_right(turn[0]["content"], want)) for turn, want in zip(completions, answer, strict=True)]
