"""Rows of the mixture by what a group's own rows found: who sampled, at which α, who scored, and how often."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from helpers.oracle import check_rollout
from helpers.training import (
    PROMPTS,
    TEACHER_PROMPTS,
    Watch,
    check_successes,
    digits,
    load,
    make_trainer,
    make_untrained_pair,
)
from optimal_sampling_trl import Mixture
from optimal_sampling_trl.trainers.overtaking import LEAST
from optimal_sampling_trl.trainers.two_rounds import interleave, merge_numbers

EASY = PROMPTS[::2]
"""Prompts to which a reward accepts every answer; to the others none."""
SETTINGS: dict[str, Any] = {"num_generations": 4, "gradient_accumulation_steps": 4, "max_steps": 2}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return make_untrained_pair(tmp_path_factory.mktemp("pair"))


class Verifier:
    """A reward that counts what it is asked; 1 for an answer to one of `EASY`."""

    __name__ = "verifier"

    def __init__(self) -> None:
        self.calls: list[list[tuple[str, str]]] = []

    def __call__(self, prompts: Sequence[str], completions: Sequence[str], log_extra: Any, **_: Any) -> list[float]:
        self.calls.append(list(zip(prompts, completions, strict=True)))
        log_extra("asked", [f"{prompt}{completion}" for prompt, completion in self.calls[-1]])
        return [float(prompt in EASY) for prompt in prompts]


def train(kind: str, pair: tuple[str, str], folder: Path, verifier: Any, max_steps: int = 2, **given: Any) -> Any:
    rows = Dataset.from_dict({"prompt": PROMPTS, "teacher_prompt": TEACHER_PROMPTS})
    generator = {"mixture_below": 1.0, "theta_fraction": 0.25} | given
    trainer = make_trainer(
        kind, pair, folder, mixin=Watch, generator=generator,
        trainer={"reward_funcs": verifier, "train_dataset": rows}, **SETTINGS | {"max_steps": max_steps},
    )  # fmt: skip
    trainer.train()
    return trainer


@pytest.mark.parametrize("kind", ["grpo", "rloo", "raft"])
def test_the_mixture_samples_where_the_student_found_nothing(pair: tuple[str, str], tmp_path: Path, kind: str) -> None:
    verifier = Verifier()
    trainer = train(kind, pair, tmp_path, verifier)
    teacher, theta, own = load(pair[0]), load(pair[1]), dict(zip(PROMPTS, TEACHER_PROMPTS, strict=True))
    decode, asked, kinds = trainer.processing_class.decode, Counter[tuple[str, str]](), Counter[bool]()
    rights = list[list[bool]]()  # whether the student's own rows of each batch are right
    for weights, (_, output, rollouts) in zip(trainer.weights, trainer.generations, strict=True):
        theta.load_state_dict(weights, strict=False)
        rights.append([decode(rollout.theta_prompt_ids) in EASY for rollout in rollouts[::4]])
        for row, rollout in enumerate(rollouts):
            prompt = decode(rollout.theta_prompt_ids)
            mixed = prompt not in EASY and row % 4 >= 1
            assert rollout.mixture.is_theta_only != mixed
            assert bool(output["mixture_rows"][row]) == mixed
            assert decode(rollout.prompt_ids) == (own[prompt] or prompt)
            check_rollout(rollout, teacher, theta, tolerance=1e-4)
            asked[prompt, decode(rollout.completion_ids, skip_special_tokens=True)] += 1
            kinds[mixed] += 1
    assert len(kinds) == 2
    assert Counter(pair for call in verifier.calls for pair in call) == asked  # once for each completion
    assert [len(call) for call in verifier.calls] == [4, 12] * 2
    logs = [entry for entry in trainer.state.log_history if "mixture/groups_in_need" in entry]
    assert 0 < sum(log["mixture/groups_in_need"] for log in logs) < len(logs)
    for log, right in zip(logs, rights, strict=True):  # the rows that it got for being right say nothing of it
        of_student = {name: sum(right) / len(right) for name in ("mixture/reward_theta", "accepted/theta")}
        assert {name: log[name] for name in of_student} == pytest.approx(of_student)
        assert log["mixture/reward_mixture"] == log["accepted/mixture"] == 0
    assert any(0 < sum(right) < len(right) for right in rights), "the test says too little"


ENOUGH = 0.35
"""The reward that is a success where α follows the successes."""


@pytest.mark.parametrize(
    ("kind", "mixture", "further"),
    [
        ("grpo", Mixture("fixed", fixed_alpha=1.0), {}),
        ("rloo", Mixture("fixed", fixed_alpha=0.5, form="arithmetic"), {"schedule": 1.0}),
        ("raft", Mixture(), {}),
        ("grpo", Mixture("trust_region", epsilon=0.2), {}),
    ],
)
def test_the_mixture_is_annealed_by_the_students_successes(
    pair: tuple[str, str], tmp_path: Path, kind: str, mixture: Mixture, further: dict[str, Any]
) -> None:
    """By the share of the group's own rows that the reward counts, on top of a schedule; of fixed 1, α is 1 − share.

    Where all of them are right the other rows are the student's samples, and are recorded as such.
    """
    given = {"mixture": mixture, "alpha_by_success": ENOUGH, "theta_fraction": 0.5} | further
    settings = {"num_generations": 6, "gradient_accumulation_steps": 12, "max_steps": 2}
    trainer = make_trainer(kind, pair, tmp_path, mixin=Watch, generator=given, **settings)
    trainer.train()
    mixtures = [mixture.anneal(step / 2) if "schedule" in further else mixture for step in range(2)]
    shares = check_successes(trainer, pair, mixtures, 1e-4)
    assert {share for batch in shares for share in batch} == {0.0, 1 / 3, 2 / 3, 1.0}, "the test says too little"
    logs = [entry for entry in trainer.state.log_history if "mixture/own_success" in entry]
    for entry, batch, (_, _, rollouts) in zip(logs, shares, trainer.generations, strict=True):
        rewards = [digits(rollout.text) for row, rollout in enumerate(rollouts) if row % 6 < 3]
        assert entry["mixture/reward_theta"] == pytest.approx(sum(rewards) / len(rewards))
        assert entry["accepted/theta"] == pytest.approx(sum(score > 0 for score in rewards) / len(rewards))
        assert entry["mixture/own_success"] == pytest.approx(sum(batch) / len(batch))
        assert entry["mixture/groups_in_need"] == pytest.approx(sum(share < 1 for share in batch) / len(batch))


def test_a_completion_that_nobody_scores_is_no_success(pair: tuple[str, str], tmp_path: Path) -> None:
    def silent(completions: Sequence[str], **_: Any) -> list[float | None]:
        return [None] * len(completions)

    given = {"mixture_below": None, "alpha_by_success": -1.0, "mixture": Mixture("fixed", fixed_alpha=1.0)}
    for _, _, rollouts in train("grpo", pair, tmp_path, silent, max_steps=1, **given).generations:
        assert {float(alpha) for one in rollouts for alpha in one.alpha} == {0.0, 1.0}


@pytest.mark.parametrize("setting", ["mixture_below", "alpha_by_success"])
def test_full_marks_in_several_functions_are_a_success(pair: tuple[str, str], tmp_path: Path, setting: str) -> None:
    """Though float32 rounds their weighted sum to a bit less than 1: no group is in need of the mixture."""

    def right(completions: Sequence[str], **_: Any) -> list[float]:
        return [1.0] * len(completions)

    trainer = make_trainer(
        "grpo", pair, tmp_path, generator={setting: 1.0, "theta_fraction": 0.25},
        trainer={"reward_funcs": [right] * 3}, reward_weights=[0.35, 0.45, 0.2], **SETTINGS | {"max_steps": 1},
    )  # fmt: skip
    trainer.train()
    assert float(trainer.rewards.max()) < 1, "the test means nothing"
    log = next(entry for entry in trainer.state.log_history if "mixture/groups_in_need" in entry)
    assert log["mixture/groups_in_need"] == 0


def test_trls_table_and_lengths_are_those_of_one_round(pair: tuple[str, str], tmp_path: Path) -> None:
    """Columns that a reward function adds stand beside their completions, and lengths are those of all rows."""
    trainer = train("grpo", pair, tmp_path, Verifier())
    table = trainer._logs
    texts = zip(table["prompt"], table["completion"], strict=True)
    assert list(table["extra"]["asked"]) == [f"{prompt}{completion}" for prompt, completion in texts]
    assert list(table["rewards"]["verifier"]) == [float(prompt in EASY) for prompt in table["prompt"]]
    logs = [entry for entry in trainer.state.log_history if "completions/max_length" in entry]
    for (_, _, rollouts), log in zip(trainer.generations, logs, strict=True):
        lengths = [len(rollout.completion_ids) for rollout in rollouts]
        assert log["completions/max_length"] == max(lengths)
        assert log["completions/min_length"] == min(lengths)
        assert log["completions/mean_length"] == pytest.approx(sum(lengths) / len(lengths))
        pad = trainer.processing_class.pad_token_id  # TRL takes one that is drawn last for an ending
        ended = [len(r.completion_ids) for r in rollouts if r.finish_reason == "stop" or r.completion_ids[-1] == pad]
        assert log["completions/mean_terminated_length"] == pytest.approx(sum(ended) / max(len(ended), 1))
        assert log["completions/min_terminated_length"] == min(ended, default=0)
        assert log["completions/max_terminated_length"] == max(ended, default=0)


def numbers_of(lengths: Sequence[int], limit: int) -> dict[str, float]:
    """TRL's numbers of a batch's lengths; a completion as long as the limit did not end."""
    ended = [length for length in lengths if length < limit]
    numbers = {"completions/clipped_ratio": 1 - len(ended) / len(lengths)}
    for kind, some in (("", lengths), ("terminated_", ended or [0])):
        numbers |= {f"completions/{pick.__name__}_{kind}length": float(pick(some)) for pick in (min, max)}
        numbers[f"completions/mean_{kind}length"] = sum(some) / len(some)
    return numbers


@pytest.mark.parametrize(
    ("first", "second"), [([2, 9], [4, 5, 6, 9]), ([9, 9], [4, 5]), ([3], [9, 9, 9]), ([9], [9, 9]), ([1, 2], [3])]
)
def test_the_lengths_of_two_rounds_are_those_of_all_rows(first: list[int], second: list[int]) -> None:
    """A round in which no completion ended has no part in the lengths of those that did."""
    merged = merge_numbers(numbers_of(first, 9), numbers_of(second, 9), len(first) / len(first + second))
    assert merged == pytest.approx(numbers_of(first + second, 9))


def test_a_reward_that_nobody_gives_is_not_reached(pair: tuple[str, str], tmp_path: Path) -> None:
    """None stands for a completion that a function cannot score; then TRL warns, and the mixture samples."""

    def silent(completions: Sequence[str], **_: Any) -> list[float | None]:
        return [None] * len(completions)

    trainer = train("rloo", pair, tmp_path, silent)
    for _, output, _ in trainer.generations:
        assert output["mixture_rows"].tolist() == [False, True, True, True] * 4


def test_one_round_once_the_mixture_has_no_weight(pair: tuple[str, str], tmp_path: Path) -> None:
    """After `mixture_weight_steps` updates the student samples all rows, and there is no second round."""
    trainer = make_trainer(
        "grpo", pair, tmp_path, mixin=Watch, generator={"mixture_below": 1.0, "theta_fraction": 0.25},
        trainer={"reward_funcs": (verifier := Verifier())}, mixture_weight_steps=1, **SETTINGS,
    )  # fmt: skip
    trainer.train()
    assert [len(call) for call in verifier.calls] == [4, 12, 16]
    assert not trainer.generations[-1][1]["mixture_rows"].any()


def test_nobody_is_told_that_the_student_is_ahead(
    pair: tuple[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The mixture samples for the hard prompts alone, where the student earned nothing either."""
    trainer = train("grpo", pair, tmp_path, Verifier(), max_steps=LEAST + 3)
    halves = [entry for entry in trainer.state.log_history if "mixture/reward_mixture" in entry]
    assert sum(log["mixture/reward_theta"] for log in halves) > sum(log["mixture/reward_mixture"] for log in halves)
    assert "earns more than the mixture" not in caplog.text


def test_an_evaluation_samples_once(pair: tuple[str, str], tmp_path: Path) -> None:
    verifier = Verifier()
    rows = Dataset.from_dict({"prompt": PROMPTS[:4]})
    trainer = make_trainer(
        "grpo", pair, tmp_path, mixin=Watch, generator={"mixture_below": 1.0},
        trainer={"reward_funcs": verifier, "eval_dataset": rows}, num_generations_eval=1, **SETTINGS,
    )  # fmt: skip
    trainer.evaluate()
    assert [len(call) for call in verifier.calls] == [4]
    assert not any(output["mixture_rows"].any() for _, output, _ in trainer.generations)


BY_SUCCESS: dict[str, Any] = {"mixture_below": None, "alpha_by_success": 1.0}


@pytest.mark.parametrize(
    ("kind", "given", "settings", "words"),
    [
        ("grpo", {"theta_fraction": 0.0}, {}, "of a group of 4 the student samples 0 alone; wanted some of each kind"),
        ("raft", {}, {}, "of a group of 4 the student samples 0 alone; wanted some of each kind"),
        ("raft", {"theta_fraction": 0.5}, {"num_generations": 1}, "and `num_generations` to at least 2"),
        ("grpo", {}, {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 2, "num_generations": 3}, None),
        ("grpo", {}, {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 2, "num_generations": 4}, "4"),
        ("sampled_token", {}, {}, "distillation has no rewards to compare with it"),
        ("grpo", {"mixture_below": "1"}, {}, "`mixture_below`"),
        ("grpo", BY_SUCCESS | {"theta_fraction": 0.0}, {}, "`alpha_by_success` is 1.0, and of a group of 4 the stu"),
        ("raft", BY_SUCCESS, {"num_generations": 1}, "`alpha_by_success` is 1.0, and of a group of 1 the student sam"),
        ("sampled_token", BY_SUCCESS, {}, "`alpha_by_success` is 1.0, and distillation has no rewards"),
        ("grpo", BY_SUCCESS | {"alpha_by_success": True}, {}, "`alpha_by_success` is True; wanted a finite number"),
        ("grpo", {"alpha_by_success": 1.0}, {}, "`alpha_by_success` is 1.0 and `mixture_below` 1.0, with which the m"),
        (
            "grpo",
            BY_SUCCESS | {"mixture": Mixture("entropy_gate"), "entropy_quantile": 0.9},
            {},
            "`alpha_by_success` is 1.0 and `entropy_quantile` 0.9",
        ),
    ],
)
def test_what_is_refused(
    pair: tuple[str, str],
    tmp_path: Path,
    kind: str,
    given: dict[str, Any],
    settings: dict[str, Any],
    words: str | None,
) -> None:
    sizes = {"num_generations": 4} if kind != "sampled_token" else {}
    built = {"generator": {"mixture_below": 1.0} | given, **sizes, **settings}
    if words is None:
        make_trainer(kind, pair, tmp_path, **built)
        return
    with pytest.raises(ValueError, match=words):
        make_trainer(kind, pair, tmp_path, **built)


def test_rows_of_two_rounds_in_the_order_of_the_batch() -> None:
    assert interleave(["a", "b"], ["c", "d", "e"], [0, 3], [1, 2, 4]) == ["a", "c", "d", "b", "e"]
    assert interleave(None, None, [0], [1]) is None
    assert interleave({}, {}, [0], [1]) == {}
