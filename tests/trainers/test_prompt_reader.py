"""A dataset's column `teacher_prompt`: what the teacher reads of each row, in every trainer, and what is refused."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer

from helpers.models import make_model
from helpers.oracle import check_rollout
from helpers.training import Watch, load, make_trainer, rows_of

USER = [{"role": "user", "content": "1 + 1"}]
HINTED = [{"role": "user", "content": "1 + 1, which is 2"}]
SYSTEM = [{"role": "system", "content": "Count."}, *USER]
SPOKEN = "{% for m in messages %}<{{ m['content'] }}>{% endfor %}"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A teacher with a chat template of its own, and a student."""
    root = tmp_path_factory.mktemp("pair")
    teacher, theta = make_model(root / "teacher", "qwen2", 0), make_model(root / "theta", "qwen2", 1)
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    tokenizer.chat_template = SPOKEN
    tokenizer.save_pretrained(teacher)
    return teacher, theta


def data(*rows: tuple[Any, Any], **further: list[Any]) -> Dataset:
    prompts, own = zip(*rows, strict=True)
    return Dataset.from_dict({"prompt": list(prompts), "teacher_prompt": list(own), **further})


@pytest.mark.parametrize("kind", ["grpo", "rloo", "raft", "sampled_token"])
def test_every_trainer_samples_with_the_teachers_prompts(pair: tuple[str, str], tmp_path: Path, kind: str) -> None:
    """Held against the oracle; reward functions are handed the column, as every other."""
    rows = [("31=", "31=?"), ("2718=", None), ("5=", "2, 3 and 5=")]
    seen: list[str | None] = []

    def reward(completions: list[str], prompts: list[str], teacher_prompt: list[str | None], **_: Any) -> list[float]:
        assert [dict(rows)[prompt] for prompt in prompts] == teacher_prompt
        seen.extend(teacher_prompt)
        return [float(len(completion)) for completion in completions]

    further: dict[str, Any] = {"train_dataset": data(*rows * 8)}
    if kind != "sampled_token":
        further["reward_funcs"] = reward
    settings = {"max_steps": 2, "gradient_accumulation_steps": 3, "remove_unused_columns": kind == "raft"}
    generator = {"theta_fraction": 0.5, "teacher_system_prompt": "Count."}
    trainer = make_trainer(kind, pair, tmp_path, mixin=Watch, generator=generator, trainer=further, **settings)
    trainer.train()
    teacher, theta = load(pair[0]), load(pair[1])
    read = set()
    for weights, (_, output, rollouts) in zip(trainer.weights, trainer.generations, strict=True):
        theta.load_state_dict(weights, strict=False)
        for rollout, (prompt, ids, _) in zip(rollouts, rows_of(output), strict=True):
            text = trainer.processing_class.decode(prompt)
            assert (rollout.theta_prompt_ids, rollout.completion_ids) == (prompt, ids)
            wanted = dict(rows)[text]
            assert trainer.processing_class.decode(rollout.prompt_ids) == f"Count.\n\n{wanted or text}"
            check_rollout(rollout, teacher, theta, tolerance=1e-4)
            read.add((wanted, rollout.mixture.is_theta_only))
    assert len(read) > 3
    assert kind == "sampled_token" or set(seen) == {"31=?", None, "2, 3 and 5="}


def test_the_teachers_own_template_renders_its_prompts(pair: tuple[str, str], tmp_path: Path) -> None:
    """No warning of another template where each chat that the teacher reads is its own."""
    for rows, count in ((((USER, HINTED), (USER, HINTED)), 0), (((USER, HINTED), (USER, None)), 1)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer = make_trainer("grpo", pair, tmp_path, trainer={"train_dataset": data(*rows)})
            trainer.model.train()
            inputs = [{"prompt": prompt, "teacher_prompt": own} for prompt, own in rows for _ in range(2)]
            trainer._generate_and_score_completions(inputs)
        assert len([w for w in caught if "has another chat template" in str(w.message)]) == count
        decode, first, last = trainer.processing_class.decode, trainer.rollouts[0], trainer.rollouts[-1]
        asked = "[user] 1 + 1\n[assistant] "
        assert (decode(first.prompt_ids), decode(first.theta_prompt_ids)) == ("<1 + 1, which is 2>", asked)
        assert decode(last.prompt_ids) == (asked if count else "<1 + 1, which is 2>")


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (
            [("7", "8"), ("7", "")],
            r"The `teacher_prompt` in row 1 of `train_dataset` is empty; .*None lets the teacher",
        ),
        ([("7", 5)], r"The `teacher_prompt` in row 0 of `train_dataset` is '5' \(int\); wanted a text or a list"),
        ([("7", "8" * 520)], r"The teacher's prompt in row 0 of `train_dataset` has 527 tokens, but the context"),
        ([("7", [])], r"The `teacher_prompt` in row 0 of `train_dataset` is empty"),
        (
            [("7", SYSTEM)],
            r"In the `teacher_prompt` of row 0 of `train_dataset`: A prompt begins with the system mess",
        ),
    ],
    ids=["empty", "number", "long", "no message", "system"],
)
def test_a_row_is_named_at_the_start(pair: tuple[str, str], tmp_path: Path, rows: list[Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make_trainer(
            "grpo",
            pair,
            tmp_path,
            generator={"teacher_system_prompt": "Wise."},
            trainer={"train_dataset": data(*rows)},
        )


def test_a_template_of_the_teacher_that_refuses(pair: tuple[str, str], tmp_path: Path) -> None:
    strict = make_model(tmp_path / "strict", "qwen2", 0)
    tokenizer = AutoTokenizer.from_pretrained(strict)
    tokenizer.chat_template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('No') }}{% endif %}" + SPOKEN
    tokenizer.save_pretrained(strict)
    rows = {"train_dataset": data((USER, HINTED), (USER, SYSTEM))}
    words = r"In the `teacher_prompt` of row 1 of `train_dataset`: .*roles system, user: No\. Fix the row"
    with pytest.raises(ValueError, match=words):
        make_trainer("grpo", (strict, pair[1]), tmp_path, trainer=rows)
    rows = {"train_dataset": data((USER, HINTED))}
    words = r"In the `teacher_prompt` of row 0 .*: No\. `teacher_system_prompt` is put before a chat"
    with pytest.raises(ValueError, match=words):
        make_trainer("grpo", (strict, pair[1]), tmp_path, generator={"teacher_system_prompt": "Hm."}, trainer=rows)


def test_the_divergence_refuses_the_column(pair: tuple[str, str], tmp_path: Path) -> None:
    words = r"The data set has the column `teacher_prompt`, but TRL's divergence .* or `loss='sampled_token'`"
    with pytest.raises(ValueError, match=words):
        make_trainer("divergence", pair, tmp_path, trainer={"train_dataset": data(("7", "8"))})


def test_streamed_rows_are_checked_as_they_come(pair: tuple[str, str], tmp_path: Path) -> None:
    rows = data(("7", "8"), ("7", None)).to_iterable_dataset()
    trainer = make_trainer("grpo", pair, tmp_path, trainer={"train_dataset": rows})
    trainer.model.train()
    torch.manual_seed(0)
    trainer._generate_and_score_completions([{"prompt": "7", "teacher_prompt": "8"}] * 4)
    assert trainer.processing_class.decode(trainer.rollouts[0].prompt_ids) == "8"
    inputs = [{"prompt": "7", "teacher_prompt": own} for own in ("8", 5, "8", "8")]
    with pytest.raises(ValueError, match=r"The `teacher_prompt` in row 1 of the batch is '5' \(int\)"):
        trainer._generate_and_score_completions(inputs)
