"""The models of real_text.py: SmolLM2-135M, the same without a third of its layers, and a teacher of each task."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from real_tasks import HELD_OUT, Task
from recover import make_models

STUDENTS = {"whole": "teacher", "pruned": "student"}
"""The folders in which `recover.make_models` puts them: there the whole model teaches."""
BATCH, EVERY, RATE, WARMUP, EXAM = 64, 10, 5e-5, 20, 256


def make_base(gguf: Path | None, output: Path) -> dict[str, str]:
    """Both students' folders, made where they are missing."""
    make_models(gguf, output / "models")
    return {name: str(output / "models" / folder) for name, folder in STUDENTS.items()}


def teach(task: Task, base: str, folder: Path, goal: float, steps: int, device: str) -> dict[str, float]:
    """Fine-tune a model on solved examples until its samples are right as often as `goal`; or what a folder holds.

    Returns:
        "right" of samples at temperature 1 on held-out questions, "steps" and "seconds", as `teaching.json` has them.
    """
    note = folder / "teaching.json"
    if note.is_file():
        return json.loads(note.read_text())
    torch.manual_seed(0)
    start, right, step = time.perf_counter(), 0.0, 0
    tokenizer = AutoTokenizer.from_pretrained(base, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.0)
    examples = encode(task, tokenizer, task.entries("train", steps * BATCH, seed=9))
    exam = task.entries("test", HELD_OUT)[-EXAM:]
    for step in range(1, steps + 1):
        optimizer.param_groups[0]["lr"] = RATE * min(step / WARMUP, 1.0)
        learn(model, optimizer, examples[(step - 1) * BATCH : step * BATCH], tokenizer.pad_token_id)
        if step % EVERY == 0 or step == steps:
            right = examine(model, tokenizer, task, exam)
            print(
                f"{task.key}: right in {right:.3f} after {step} steps, {time.perf_counter() - start:.0f} s", flush=True
            )
            if right >= goal:
                break
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    found = {"right": right, "steps": step, "seconds": time.perf_counter() - start}
    note.write_text(json.dumps(found))
    return found


def encode(task: Task, tokenizer: Any, entries: list[dict[str, Any]]) -> list[tuple[list[int], list[int]]]:
    """The tokens of each prompt as a chat, and of its solved example with its end."""
    prompts = texts_of(task, tokenizer, entries)
    asked = tokenizer(prompts, add_special_tokens=False).input_ids
    solved = tokenizer([task.solve(entry) for entry in entries], add_special_tokens=False).input_ids
    return [(prompt, [*answer, tokenizer.eos_token_id]) for prompt, answer in zip(asked, solved)]


def texts_of(task: Task, tokenizer: Any, entries: list[dict[str, Any]]) -> list[str]:
    """The chats, ready for an answer."""
    chats = [task.prompt(entry) for entry in entries]
    return [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]


def learn(model: Any, optimizer: Any, examples: list[tuple[list[int], list[int]]], pad: int) -> None:
    """One update of cross-entropy on the answers; padded on the right."""
    length = max(len(prompt) + len(answer) for prompt, answer in examples)
    ids = torch.full((len(examples), length), pad)
    labels = torch.full((len(examples), length), -100)
    for row, (prompt, answer) in enumerate(examples):
        end = len(prompt) + len(answer)
        ids[row, :end] = torch.tensor([*prompt, *answer])
        labels[row, len(prompt) : end] = ids[row, len(prompt) : end]
    mask = torch.arange(length) < torch.tensor([len(p) + len(a) for p, a in examples])[:, None]
    device = model.device
    with torch.autocast(device.type, torch.bfloat16):
        loss = model(ids.to(device), attention_mask=mask.long().to(device), labels=labels.to(device)).loss
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


@torch.no_grad()
def examine(model: Any, tokenizer: Any, task: Task, entries: list[dict[str, Any]]) -> float:
    """The share of questions that a sample at temperature 1 answers rightly."""
    inputs = tokenizer(texts_of(task, tokenizer, entries), return_tensors="pt", padding=True, add_special_tokens=False)
    with torch.autocast(model.device.type, torch.bfloat16):
        drawn = model.generate(
            **inputs.to(model.device), do_sample=True, top_k=0, temperature=1.0, max_new_tokens=task.length
        )
    texts = tokenizer.batch_decode(drawn[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return sum(map(task.score, texts, entries)) / len(entries)
