"""Tasks on digits of the embedded pair's kind, one token a character: prompts, right answers, and which tokens are."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from torch import Tensor

from pair import EOS, VOCABULARY

NAMES = ("sort", "sums", "many")
ZERO, END = VOCABULARY.index("0"), VOCABULARY.index(EOS)
TOKENS = torch.tensor([VOCABULARY.index(chr(code)) if chr(code) in VOCABULARY else -1 for code in range(128)])
"""The token of each character."""


class Task(NamedTuple):
    """A task: its `name` and the number of its digits."""

    name: str
    digits: int

    @classmethod
    def of(cls, text: str) -> Task:
        """The task that a text such as `sums-40` names."""
        name, _, digits = text.partition("-")
        if name not in NAMES or not digits.isdigit() or not 1 <= int(digits) <= 100:
            raise ValueError(f"task is {text!r}; wanted <{'|'.join(NAMES)}>-<digits> with 1 to 100 digits")
        return cls(name, int(digits))

    @property
    def completion_length(self) -> int:
        """Tokens of a right completion, EOS included."""
        return self.digits + 1

    def prompts(self, split: str, count: int, seed: int) -> list[str]:
        """`count` prompts of random digits; "train" and "test" draw from different streams."""
        if split not in ("train", "test"):
            raise ValueError(f"split is {split!r}; it must be 'train' or 'test'")
        source = random.Random(f"{self} {split} {seed}")
        return [f"{source.randrange(10**self.digits):0{self.digits}d}=" for _ in range(count)]

    def answer(self, prompt: str) -> str:
        """A right completion, without EOS: the right one, but for `many`."""
        digits = prompt.removesuffix("=")
        if self.name == "sort":
            return "".join(sorted(digits))
        chance = random.Random(prompt)
        extra = [chance.randrange(2) if self.name == "many" else 0 for _ in digits]
        return "".join(str(total % 10) for total in accumulate(map(int.__add__, map(int, digits), extra)))

    def right_tokens(self, sequences: Tensor, ids: Tensor) -> Tensor:
        """The tokens of completions `ids` (..., T) that are right after the ones before them, (..., T).

        Args:
            sequences: (..., P + T), each prompt with a right completion, as `sequences` returns them.
        """
        if self.name != "many":
            return ids == sequences[..., -self.completion_length :]
        digits, sums = sequences[..., : self.digits] - ZERO, ids[..., :-1] - ZERO
        before = torch.cat([torch.zeros_like(sums[..., :1]), sums[..., :-1]], dim=-1)
        step = ((sums - before - digits) % 10 <= 1) & (sums >= 0) & (sums <= 9)
        return torch.cat([step, ids[..., -1:] == END], dim=-1)

    def reward(self, prompts: Sequence[str], completions: Sequence[str], **kwargs: Any) -> list[float]:
        """TRL's reward: 1.0 for exactly the right text, else 0.0."""
        if self.name == "many":
            raise NotImplementedError(
                "Many completions are right and the reward compares with one; see `right_tokens`."
            )
        pairs = zip(prompts, completions, strict=True)
        return [float(completion == self.answer(prompt)) for prompt, completion in pairs]

    def dataset(self, split: str, count: int, seed: int) -> Dataset:
        """Prompts as TRL's trainers take them."""
        return Dataset.from_dict({"prompt": self.prompts(split, count, seed)})

    def sequences(self, split: str, count: int, seed: int) -> Tensor:
        """Token ids (count, digits + 1 + completion_length) of prompts with their right completions."""
        texts = "".join(prompt + self.answer(prompt) for prompt in self.prompts(split, count, seed))
        letters = torch.frombuffer(bytearray(texts, "ascii"), dtype=torch.uint8).view(count, -1)
        return torch.cat([TOKENS[letters.long()], torch.full((count, 1), END)], dim=1)  # the tokenizer takes minutes
