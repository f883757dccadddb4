"""A tiny pair that calls tools: both models were trained for seconds on chats in which calls succeed and fail.

A turn holds calls such as `[add a=3 b=5]`, right, wrong or of a tool that there is not, or an answer. `add` answers in
a few tokens, `repeat` in many.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from helpers.models import make_model, make_tokenizer

CALLS = (
    "{% for call in m.tool_calls or [] %}[{{ call.function.name }}"
    "{% for key, value in call.function.arguments.items() %} {{ key }}={{ value }}{% endfor %}]{% endfor %}"
)
CHAT_TEMPLATE = (
    "{% for tool in tools or [] %}{{ tool.function.name }} {% endfor %}{% for m in messages %}"
    "{% if m.role == 'assistant' %}{{ m.content }}" + CALLS + "{{ eos_token }}"
    "{% elif m.role == 'tool' %}({{ m.content }}){% else %}{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}>{% endif %}"
)
RESPONSE_TEMPLATE: dict[str, Any] = {
    "defaults": {"role": "assistant"},
    "start_anchor": ">",
    "fields": {
        "tool_calls": {
            "open_pattern": r"\[(?P<name>[a-z]+)",
            "close": "]",
            "repeats": True,
            "content": "xml-inline",
            "content_args": {"tag_pattern": r" (?P<key>[a-z])=(?P<value>[0-9]+)", "value_parser": {"name": "int"}},
            "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}},
        },
        "content": {"close_pattern": r"<eos>", "content": "text"},
    },
}
PROMPTS = [[{"role": "user", "content": f"{number}?"}] for number in range(24)]
"""Chats of one user's message."""


def add(a: int, b: int) -> int:
    """Adds two numbers.

    Args:
        a: One number.
        b: The other.
    """
    return a + b


def repeat(a: int) -> str:
    """Says a number many times.

    Args:
        a: The number.
    """
    return f"{a} " * 12


def make_speakers(folder: Path) -> tuple[str, str]:
    """Folders of a teacher and a student that call the tools, and disagree on how often."""
    made = []
    for seed, (role, steps) in enumerate({"teacher": 120, "student": 70}.items()):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            path = make_model(folder / role, "llama", seed, max_position_embeddings=512)
            model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
            tokenizer = speaking_tokenizer()
            teach(model, tokenizer, steps, seed)
            model.save_pretrained(path)
            tokenizer.save_pretrained(path)
        made.append(path)
    return made[0], made[1]


def speaking_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of bytes, with a chat template that renders calls, and what reads them."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.response_template = RESPONSE_TEMPLATE  # type: ignore[attr-defined]
    return tokenizer


def teach(model: Any, tokenizer: PreTrainedTokenizerFast, steps: int, seed: int) -> None:
    """Train on the next token of made-up chats."""
    source = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(steps):
        texts = [chat(source) for _ in range(8)]
        batch = tokenizer(texts, return_tensors="pt", padding=True, return_token_type_ids=False)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        optimizer.zero_grad()
        model(**batch, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def chat(source: random.Random) -> str:
    """A chat of three turns, as the models read one."""
    turns = [turn(source) + "<eos>" + f"({source.randrange(20)})" for _ in range(3)]
    return f"{source.choice(['add repeat ', ''])}{source.randrange(24)}?>" + ">".join(turns)


def turn(source: random.Random) -> str:
    """What a model says before it hands over: calls, two calls, or an answer."""
    digit = source.randrange(10)
    right = f"[add a={digit} b={source.randrange(10)}]"
    kinds = [right, f"[repeat a={digit}]", f"[add a={digit}]", f"[pow a={digit}]", right + f"[repeat a={digit}]"]
    return source.choices([*kinds, f"so {digit}"], [6, 3, 2, 2, 2, 5])[0]
