"""Rows that ended at a stop text count as ended in TRL, and no others do."""

from __future__ import annotations

import json
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers.rollouts import rollout
from helpers.training import TEXTS, make_trainer, make_untrained_pair, one_batch
from optimal_sampling_trl.trainers.engines.endings import LastToken, mark_endings

PROMPTS = [text for text in TEXTS[:8] for _ in range(4)]
STOPS = ("1", "2", "3")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return make_untrained_pair(tmp_path_factory.mktemp("pair"))


def test_a_marked_token_is_an_int() -> None:
    (ids, cut) = mark_endings([rollout(), rollout(finish_reason="length")])
    assert ids == cut == [1, 2, 3]
    assert isinstance(ids[-1], LastToken)
    assert not isinstance(cut[-1], LastToken)
    assert torch.equal(torch.tensor(ids), torch.tensor([1, 2, 3]))
    assert json.loads(json.dumps(ids)) == [1, 2, 3]
    assert pickle.loads(pickle.dumps(ids)) == [1, 2, 3]
    assert {3: "x"}[ids[-1]] == "x"


def test_empty_batch_and_rollouts_stay_as_they_were() -> None:
    kept = rollout()
    mark_endings([kept])
    assert type(kept.completion_ids[-1]) is int
    assert mark_endings([]) == []


@pytest.mark.parametrize("kind", ["grpo", "rloo", "sampled_token"])
def test_rows_that_ended_at_a_stop_text(pair: tuple[str, str], tmp_path: Path, kind: str) -> None:
    """Some rows of the batch end at a stop text, others at `max_tokens` with the same token last."""
    masks = {} if kind == "sampled_token" else {"mask_truncated_completions": True}
    trainer = make_trainer(kind, pair, tmp_path, generation_kwargs={"stop": STOPS}, max_completion_length=4, **masks)
    eos = list(trainer.eos_token_ids)
    batch = one_batch(trainer, PROMPTS)
    pad = trainer.processing_class.pad_token_id  # TRL takes one that is drawn last for an ending
    ended = torch.tensor([r.finish_reason == "stop" or r.completion_ids[-1] == pad for r in trainer.rollouts])
    at_text = [r for r in trainer.rollouts if r.finish_reason == "stop" and r.completion_ids[-1] not in eos]
    assert at_text
    assert 0 < int(ended.sum()) < len(ended)
    logged = trainer._metrics["train"]
    assert logged["completions/clipped_ratio"] == [pytest.approx(1 - ended.float().mean().item())]
    lengths = [len(r.completion_ids) for r, is_ended in zip(trainer.rollouts, ended) if is_ended]
    assert logged["completions/mean_terminated_length"] == [pytest.approx(sum(lengths) / len(lengths))]
    if masks:
        assert torch.equal(batch["completion_mask"].bool().any(1), ended)
    assert trainer.eos_token_ids == eos


def test_a_row_that_was_cut_with_the_last_token_of_an_ended_one(pair: tuple[str, str], tmp_path: Path) -> None:
    """Only what the rollout says counts, token ids do not."""
    settings = {"mask_truncated_completions": True, "max_completion_length": 3}
    trainer = make_trainer("grpo", pair, tmp_path, log_theta_tolerance=float("inf"), **settings)
    generate = trainer.vllm_generation.backend.generate

    def alike(requests: Sequence[Any], *rest: Any) -> Any:
        rollouts = generate(requests, *rest)
        for index, one in enumerate(rollouts):
            one.completion_ids[-1] = 5
            object.__setattr__(one, "finish_reason", "stop" if index % 2 else "length")
        return rollouts

    trainer.vllm_generation.backend.generate = alike
    batch = one_batch(trainer, PROMPTS)
    assert batch["completion_mask"].bool().any(1).tolist() == [bool(index % 2) for index in range(len(PROMPTS))]


@pytest.mark.parametrize("place", ["tokenizer", "model"])
def test_the_trainers_ending_ends_completions(pair: tuple[str, str], tmp_path: Path, place: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(pair[1])
    end = tokenizer.convert_tokens_to_ids("7")
    if place == "tokenizer":
        tokenizer.eos_token = "7"
        given: dict[str, Any] = {"processing_class": tokenizer}
    else:
        model = AutoModelForCausalLM.from_pretrained(pair[1])
        model.generation_config.eos_token_id = [tokenizer.eos_token_id, end]
        given = {"model": model}
    trainer = make_trainer("grpo", pair, tmp_path, trainer=given, max_completion_length=20)
    one_batch(trainer, PROMPTS)
    assert set(trainer.vllm_generation.pair.ending.stop) == set(trainer.eos_token_ids)
    assert any(r.completion_ids[-1] == end for r in trainer.rollouts)
    assert not any(end in r.completion_ids[:-1] for r in trainer.rollouts)
