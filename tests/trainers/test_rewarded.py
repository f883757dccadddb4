"""The trainers with rewards: the acceptance of completions, and the teacher alone in an evaluation."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback

from helpers.oracle import check_rollout, read_logits
from helpers.training import KINDS, TEXTS, Watch, digits, load, make_trainer
from optimal_sampling_trl import Mixture
from optimal_sampling_trl.trainers.overtaking import LEAST

REWARDED = ("grpo", "rloo", "raft")
EVALUATED = TEXTS[:4]
EVALUATION: dict[str, Any] = {
    "eval_strategy": "steps",
    "eval_steps": 1,
    "per_device_eval_batch_size": 8,
    "num_generations_eval": 4,
    "max_steps": 2,
}


def shifted(completions: list[str], **columns: Any) -> list[float]:
    """A graded reward of which some are below 0."""
    return [digits(text) - 0.35 for text in completions]


def make(kind: str, pair: tuple[str, str], folder: Path, **given: Any) -> Any:
    data = Dataset.from_dict({"prompt": EVALUATED})
    trainer = {"eval_dataset": data, "reward_funcs": shifted} | given.pop("trainer", {})
    return make_trainer(kind, pair, folder, mixin=Watch, trainer=trainer, **EVALUATION | given)


def evaluations(trainer: Any) -> list[dict[str, Any]]:
    return [entry for entry in trainer.state.log_history if "eval_reward" in entry]


@pytest.mark.parametrize("kind", REWARDED)
def test_acceptance_of_each_trainer_by_recomputation(pair: tuple[str, str], tmp_path: Path, kind: str) -> None:
    """A reward above 0 accepts, in training and in an evaluation of the student."""
    settings = {"generator": {"theta_fraction": 0.5}, "num_generations": 4, "evaluate_teacher": False}
    trainer = make(kind, pair, tmp_path, **settings)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "accepted/prompts" in entry]
    batches = [rollouts for training, _, rollouts in trainer.generations if training]
    assert len(logs) == len(batches) == 2
    seen = set()
    for log, rollouts in zip(logs, batches, strict=True):
        accepted = np.array([digits(rollout.text) > 0.35 for rollout in rollouts])
        alone = np.array([rollout.mixture.is_theta_only for rollout in rollouts])
        wanted = {
            "accepted/theta": accepted[alone].mean(),
            "accepted/mixture": accepted[~alone].mean(),
            "accepted/prompts": accepted.reshape(-1, 4).any(1).mean(),
        }
        assert {name: log[name] for name in wanted} == pytest.approx(wanted)
        seen.update(accepted.tolist())
    assert seen == {True, False}
    of_evaluation = [rollouts for training, _, rollouts in trainer.generations if not training]
    for number, log in enumerate(evaluations(trainer)):
        rollouts = [one for batch in of_evaluation[2 * number : 2 * number + 2] for one in batch]
        accepted = np.array([digits(rollout.text) > 0.35 for rollout in rollouts])
        assert log["eval_accepted/theta"] == pytest.approx(accepted.mean())
        assert log["eval_accepted/prompts"] == pytest.approx(accepted.reshape(-1, 4).any(1).mean())
        assert not {"eval_accepted/mixture", "eval_accepted/teacher", "eval_mixture/groups_with_signal"} & log.keys()


@pytest.mark.parametrize("kind", REWARDED)
def test_the_first_evaluation_measures_the_teacher_too(pair: tuple[str, str], tmp_path: Path, kind: str) -> None:
    """By recomputation: all its prompts, sampled from the teacher alone; all other numbers are the student's."""
    trainer = make(kind, pair, tmp_path)
    trainer.train()
    batches = [rollouts for training, _, rollouts in trainer.generations if not training]
    assert trainer.rollouts is batches[-1]
    assert len(batches) == 6  # two of the student in each of two evaluations, and two of the teacher in between
    teacher, theta = load(pair[0]), load(pair[1])
    theta.load_state_dict(trainer.weights[1], strict=False)
    of_teacher = [one for batch in batches[2:4] for one in batch]
    for rollout in of_teacher:
        assert rollout.mixture == Mixture.teacher_only()
        check_rollout(rollout, teacher, theta, tolerance=1e-5)
    prompts = [trainer.processing_class.decode(rollout.prompt_ids) for rollout in of_teacher]
    assert sorted(prompts) == sorted(text for text in EVALUATED for _ in range(4))
    scores = np.array([digits(rollout.text) - 0.35 for rollout in of_teacher])
    wanted = {"eval_mixture/reward_teacher": scores.mean(), "eval_accepted/teacher": (scores > 0).mean()}
    for number, log in enumerate(evaluations(trainer)):
        student = [one for batch in batches[4 * number :][:2] for one in batch]
        assert all(rollout.mixture.is_theta_only for rollout in student)
        lengths = [len(rollout.completion_ids) for rollout in student]
        wanted |= {
            "eval_reward": np.mean([digits(rollout.text) - 0.35 for rollout in student]),
            "eval_completions/mean_length": np.mean(lengths),
        }
        assert {name: log[name] for name in wanted} == pytest.approx(wanted, abs=1e-5)
        assert log["eval_reward"] != pytest.approx(log["eval_mixture/reward_teacher"])


def test_each_data_set_has_its_own_measure_of_the_teacher(pair: tuple[str, str], tmp_path: Path) -> None:
    """Once for each, under whichever prefix: the reward depends on the prompt alone, so that the teacher's does."""
    ends = {"easy": [text for text in TEXTS if len(text) < 6], "hard": [text for text in TEXTS if len(text) >= 6]}
    sets = {name: Dataset.from_dict({"prompt": texts, "unread": texts}) for name, texts in ends.items()}
    measured: list[float] = []

    class EvaluateAll(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            for data in (*sets.values(), None):  # the last is both, each with its prefix
                trainer.evaluate(data)
            for log in trainer.state.log_history[-4:]:
                measured.extend(value for name, value in log.items() if name.endswith("_mixture/reward_teacher"))

    def easy(prompts: list[str], **columns: Any) -> list[float]:
        return [float(prompt in ends["easy"]) for prompt in prompts]

    trainer = make(
        "raft", pair, tmp_path, trainer={"reward_funcs": easy, "eval_dataset": sets, "callbacks": [EvaluateAll()]},
        eval_strategy="no", num_generations_eval=1, remove_unused_columns=True,
    )  # fmt: skip
    trainer.train()
    assert measured == [1.0, 0.0] * 4
    of_teacher = [len(batch) for _, _, batch in trainer.generations if batch[0].mixture == Mixture.teacher_only()]
    assert of_teacher == [len(ends["easy"]), len(ends["hard"])] * 2


def by_prompt(completions: list[str], right: list[float], **columns: Any) -> list[float]:
    """A reward that the prompt alone decides, so that everybody's share is that of the data set."""
    return right


def of_shares(*right: float) -> Dataset:
    return Dataset.from_dict({"prompt": TEXTS[: len(right)], "right": right})


@pytest.mark.parametrize("kind", REWARDED)
def test_an_evaluation_is_over_completions(pair: tuple[str, str], tmp_path: Path, kind: str) -> None:
    """The last batch is smaller: a mean over batches would be 1/8 where 1 in 5 is right."""
    sets = {"train_dataset": of_shares(*[0.0] * 8), "eval_dataset": of_shares(0.0, 0.0, 0.0, 0.0, 1.0)}
    trainer = make_trainer(
        kind, pair, tmp_path, trainer={"reward_funcs": by_prompt} | sets,
        max_steps=1, eval_strategy="steps", eval_steps=1, num_generations_eval=1, per_device_eval_batch_size=4,
    )  # fmt: skip
    trainer.train()
    (log,) = evaluations(trainer)
    names = ("reward", "rewards/by_prompt/mean", "accepted/theta", "accepted/prompts")
    assert {name: log[f"eval_{name}"] for name in names} == pytest.approx(dict.fromkeys(names, 0.2))
    assert log["eval_accepted/teacher"] == log["eval_mixture/reward_teacher"] == pytest.approx(0.2)


@pytest.mark.parametrize("kind", KINDS)
def test_each_evaluation_reports_its_own_numbers(pair: tuple[str, str], tmp_path: Path, kind: str) -> None:
    """Those of a prediction stay out of the next evaluation, and several data sets have each its prefix."""
    easy, hard = of_shares(1.0, 1.0), of_shares(0.0, 0.0, 0.0)
    rewarded = {"reward_funcs": by_prompt} if kind in REWARDED else {}
    sets = {"train_dataset": hard, "eval_dataset": {"easy": easy, "hard": hard}}
    trainer = make_trainer(
        kind, pair, tmp_path, trainer=rewarded | sets, per_device_eval_batch_size=2,
        **({"num_generations_eval": 1} if rewarded else {}),
    )  # fmt: skip
    predicted, both = trainer.predict(easy).metrics, trainer.evaluate()
    for numbers, prefix, share in ((predicted, "test", 1.0), (both, "eval_easy", 1.0), (both, "eval_hard", 0.0)):
        assert numbers[f"{prefix}_completions/mean_length"] > 0
        if rewarded:
            assert numbers[f"{prefix}_accepted/theta"] == numbers[f"{prefix}_reward"] == share
    assert "eval_completions/mean_length" not in both
    trainer.close()


@pytest.mark.parametrize("kind", REWARDED)
def test_rewards_and_rollouts_are_of_one_model(pair: tuple[str, str], tmp_path: Path, kind: str) -> None:
    """The student's, also after the evaluation that measures the teacher."""
    trainer = make(kind, pair, tmp_path, max_steps=1)
    trainer.train()
    assert trainer.generations[-1][2][0].mixture == Mixture.teacher_only()
    assert all(rollout.mixture.is_theta_only for rollout in trainer.rollouts)
    assert trainer.rewards.tolist() == pytest.approx([digits(one.text) - 0.35 for one in trainer.rollouts])


BEST: dict[str, Any] = {"load_best_model_at_end": True, "save_strategy": "steps", "save_steps": 1}


def chosen_by_loss(
    kind: str, pair: tuple[str, str], folder: Path, caught: list[warnings.WarningMessage], **given: Any
) -> list[warnings.WarningMessage]:
    """The warnings of a new trainer that say by what the best checkpoint is chosen."""
    before = len(caught)
    evaluated = {name: value for name, value in EVALUATION.items() if name != "num_generations_eval"}
    data = {"eval_dataset": Dataset.from_dict({"prompt": EVALUATED})}
    make_trainer(kind, pair, folder, trainer=data, **evaluated | given).close()
    return [one for one in caught[before:] if "`metric_for_best_model` is " in str(one.message)]


def test_a_best_checkpoint_by_the_loss_is_warned_of(pair: tuple[str, str], tmp_path: Path) -> None:
    """Also by transformers' default, and where only a stop or a learning rate follows it; not in distillation."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        cases: list[tuple[str, dict[str, Any]]] = [
            *((kind, BEST) for kind in REWARDED),
            ("raft", BEST | {"metric_for_best_model": "eval_loss"}),
            ("raft", {"metric_for_best_model": "eval_easy_loss"}),
        ]
        for kind, given in cases:
            (one,) = chosen_by_loss(kind, pair, tmp_path, caught, **given)
            assert f"`metric_for_best_model` is '{given.get('metric_for_best_model', 'loss')}'" in str(one.message)
            assert "`metric_for_best_model='eval_accepted/theta'` or 'eval_reward'" in str(one.message)
            assert "`greater_is_better=True`" in str(one.message)
            assert Path(one.filename).name == "training.py", one.filename  # the line that builds the trainer
        quiet: list[tuple[str, dict[str, Any]]] = [
            ("raft", {}),
            ("raft", BEST | {"metric_for_best_model": "eval_reward", "greater_is_better": True}),
            ("raft", {"metric_for_best_model": "loss", "eval_strategy": "no"}),
            ("sampled_token", BEST),
        ]
        for kind, given in quiet:
            assert chosen_by_loss(kind, pair, tmp_path, caught, **given) == []


def test_the_measure_changes_nothing_of_the_training(pair: tuple[str, str], tmp_path: Path) -> None:
    """The same completions, the same weights and the same table as without it."""
    trained = []
    for measured in (True, False):
        trainer = make("grpo", pair, tmp_path / str(measured), evaluate_teacher=measured, log_completions=True)
        trainer.train()
        weights = [parameter.detach() for parameter in trainer.model.parameters()]
        trained.append((weights, {name: list(trainer._logs[name]) for name in ("completion", "advantages")}))
    (with_it, table), (without, other) = trained
    assert all(torch.equal(one, two) for one, two in zip(with_it, without, strict=True))
    assert table == other


@pytest.mark.parametrize(
    "given",
    [{"evaluate_teacher": False}, {"generator": {"teacher": "student", "teacher_system_prompt": "12"}}],
    ids=["switched off", "the student as it is"],
)
def test_where_the_teacher_is_not_measured(pair: tuple[str, str], tmp_path: Path, given: dict[str, Any]) -> None:
    trainer = make("raft", pair, tmp_path, **given)
    trainer.train()
    assert len(evaluations(trainer)) == 2
    assert not any("eval_accepted/teacher" in log for log in evaluations(trainer))
    assert all(one.mixture != Mixture.teacher_only() for _, _, batch in trainer.generations for one in batch)


def test_an_evaluation_outside_of_a_training_is_of_the_student_alone(pair: tuple[str, str], tmp_path: Path) -> None:
    """Its prompts may be any."""
    trainer = make("grpo", pair, tmp_path)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate(Dataset.from_dict({"prompt": TEXTS[4:6]}))
    assert not any("eval_accepted/teacher" in log for log in (before, after))
    assert all("eval_accepted/teacher" in log for log in evaluations(trainer)[1:-1])


def test_a_setting_that_is_no_flag_is_refused(pair: tuple[str, str], tmp_path: Path) -> None:
    for kind in REWARDED:
        with pytest.raises(ValueError, match="`evaluate_teacher` is 'false'; wanted True or False"):
            make(kind, pair, tmp_path, evaluate_teacher="false")


def likelier_of(pair: tuple[str, str], tokenizer: Any) -> Callable[..., list[float]]:
    """A reward: 1 where the student finds a completion likelier than the teacher does. No sampler can earn more of it
    at a fixed student than the student, which the mixture follows, and then the teacher."""
    models = [load(folder) for folder in reversed(pair)]

    def log_probability(model: Any, prompt: str, ids: list[int]) -> float:
        log_p = read_logits(model, tokenizer(prompt)["input_ids"], ids).log_softmax(-1)
        return float(log_p.gather(1, torch.tensor(ids)[:, None]).sum())

    def likelier(prompts: list[str], completion_ids: list[list[int]], **columns: Any) -> list[float]:
        pairs = zip(prompts, completion_ids, strict=True)
        values = ([log_probability(model, prompt, ids) for model in models] for prompt, ids in pairs)
        return [float(student > teacher) for student, teacher in values]

    return likelier


@pytest.mark.parametrize(
    ("kind", "measured", "words"),
    [
        ("raft", True, ["more than the teacher and the mixture: in this evaluation"]),
        ("raft", False, ["more than the mixture: in this evaluation"]),
        ("grpo", True, ["more than the mixture: a mean reward of", "more than the teacher: in this evaluation"]),
    ],
)
def test_a_trainer_tells_whom_the_student_has_passed(
    pair: tuple[str, str],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    kind: str,
    measured: bool,
    words: list[str],
) -> None:
    """Also where the mixture samples all of training's completions, RAFT's default. The student stays as it is."""
    from transformers import AutoTokenizer

    likelier = likelier_of(pair, AutoTokenizer.from_pretrained(pair[1]))
    steps = 2 * LEAST + 2
    with caplog.at_level(logging.WARNING, logger="optimal_sampling_trl.trainers.rewarded"):
        trainer = make(
            kind, pair, tmp_path, trainer={"reward_funcs": likelier}, evaluate_teacher=measured, learning_rate=0.0,
            max_steps=steps, eval_steps=steps // 2, num_generations_eval=8, per_device_eval_batch_size=32,
            per_device_train_batch_size=8,
        )  # fmt: skip
        trainer.train()
    told = [record.getMessage() for record in caplog.records if "The student alone now earns" in record.message]
    assert len(told) == len(words), told
    for message, expected in zip(told, words, strict=True):
        assert expected in message
    last = evaluations(trainer)[-1]
    assert ("It has passed both" in told[-1]) == measured
    if measured:
        assert last["eval_mixture/reward_teacher"] < last["eval_reward"]
        assert f"{last['eval_mixture/reward_teacher']:.3f} of the teacher alone on the same prompts" in told[-1]
