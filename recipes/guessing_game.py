# /// script
# dependencies = ["optimal-sampling-trl"]
# ///
"""Several turns: a student learns to guess a number from a teacher that knows how, in an environment with a tool.

The number is one of ten, and each call of `guess` is answered with "more", "less" or "found". A completion has three
calls. The teacher halves what is left, the student guesses at random: both are tiny and made here, in about a minute
on a CPU core. GRPO then trains the student on groups of which half is sampled from the mixture, every turn of them:

    python recipes/guessing_game.py --output output/guessing_game

Prints the share of numbers that the teacher, the student before and the student after training find, sampled from each
alone. Three guesses find 7 numbers of ten by halving, and 27 % of them at random.
"""

import argparse
import random
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from optimal_sampling_trl import GRPOConfig, GRPOTrainer, OptimalSamplingGenerator
from optimal_sampling_trl.demo.pair import RECIPES, build, make_tokenizer

NUMBERS, GUESSES = 10, 3
CALLS = (
    "{% for call in m.tool_calls or [] %}{{ call.function.name }}"
    "{% for key, value in call.function.arguments.items() %} {{ key }}={{ value }}{% endfor %}.{% endfor %}"
)
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content }}" + CALLS + "{{ eos_token }}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}:{% endif %}"
)
RESPONSE_TEMPLATE = {
    "defaults": {"role": "assistant"},
    "start_anchor": ":",
    "fields": {
        "tool_calls": {
            "open_pattern": "(?P<name>guess)",
            "close": ".",
            "repeats": True,
            "content": "xml-inline",
            "content_args": {"tag_pattern": " (?P<key>n)=(?P<value>[0-9])", "value_parser": {"name": "int"}},
            "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}},
        },
        "content": {"close_pattern": "<eos>", "content": "text"},
    },
}
"""Reads a call such as `guess n=4.` out of a completion."""


class Game:
    """An environment of TRL's: it is reset for each completion, and its public methods are the tools."""

    def reset(self, secret: int, **row: Any) -> None:
        self.secret, self.found = secret, False

    def guess(self, n: int) -> str:
        """Guesses the number.

        Args:
            n: The guess, from 0 to 9.
        """
        self.found = self.found or n == self.secret
        return "found" if n == self.secret else "more" if n < self.secret else "less"

    def get_reward(self) -> float:
        return float(self.found)


def play(secret: int, halves: bool, source: random.Random) -> str:
    """A game as the models read one; `halves` the range that is left, or guesses anywhere."""
    game, low, high, text = Game(), 0, NUMBERS - 1, "go:"
    game.reset(secret)
    for _ in range(GUESSES):
        number = (low + high) // 2 if halves else source.randrange(NUMBERS)
        answer = game.guess(number)
        text += f"guess n={number}.<eos>{answer}:"
        if game.found:
            break
        low, high = (number + 1, high) if answer == "more" else (low, number - 1)
    return text + "done<eos>"


def make_player(folder: Path, role: str, steps: int) -> str:
    """Train a tiny model on games of a teacher or a student, and return its folder."""
    source, tokenizer, model = random.Random(0), make_tokenizer(), build(RECIPES[role])
    tokenizer.chat_template, tokenizer.response_template = CHAT_TEMPLATE, RESPONSE_TEMPLATE
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(steps):
        games = [play(source.randrange(NUMBERS), role == "teacher", source) for _ in range(32)]
        learn(model, tokenizer, games)
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder / role)
    tokenizer.save_pretrained(folder / role)
    return str(folder / role)


def learn(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, games: list[str]) -> None:
    """Add the gradient of the cross-entropy of every token."""
    batch = tokenizer(games, return_tensors="pt", padding=True, return_token_type_ids=False)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    model(**batch, labels=labels).loss.backward()


def make_trainer(student: str, teacher: str, args: argparse.Namespace) -> GRPOTrainer:
    """A trainer in the environment; the rows of its data go to `Game.reset`."""
    rows = Dataset.from_dict(
        {"prompt": [[{"role": "user", "content": "go"}]] * 400, "secret": list(range(NUMBERS)) * 40}
    )
    settings = GRPOConfig(
        str(args.output / "training"), max_steps=args.steps, learning_rate=args.learning_rate, num_generations=8,
        per_device_train_batch_size=64, max_completion_length=60, max_tool_calling_iterations=GUESSES,
        num_generations_eval=1, per_device_eval_batch_size=100, logging_steps=10, save_strategy="no",
        report_to="none", use_cpu=True, bf16=False, gradient_checkpointing=False,
    )  # fmt: skip
    return GRPOTrainer(
        student, args=settings, train_dataset=rows, eval_dataset=rows, environment_factory=Game,
        generator=OptimalSamplingGenerator(teacher, backend="transformers"),
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("output/guessing_game"))
    parser.add_argument("--steps", type=int, default=60, help="of GRPO (%(default)s)")
    parser.add_argument("--games", type=int, default=250, help="batches of games that a player is made of")
    parser.add_argument("--learning_rate", type=float, default=3e-3)
    args = parser.parse_args()
    teacher, student = (make_player(args.output, role, args.games) for role in ("teacher", "student"))
    found = {"teacher": make_trainer(teacher, student, args).evaluate()["eval_reward"]}
    trainer = make_trainer(student, teacher, args)
    found["student before"] = trainer.evaluate()["eval_reward"]
    trainer.train()
    found["student after"] = trainer.evaluate()["eval_reward"]
    for who, share in found.items():
        print(f"{who:15} finds {share:.0%} of the numbers")


if __name__ == "__main__":
    main()
