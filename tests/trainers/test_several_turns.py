"""Completions that call tools: the records of every turn, the halves of a group, the limit, what the losses read."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel

from helpers.children import run_two_ranks
from helpers.oracle import check_dense, check_rollout, expected_records, pair_logits
from helpers.speakers import PROMPTS, add, repeat
from helpers.training import KINDS, Watch, has_log_teacher, load, make_trainer
from optimal_sampling_trl import Dense, Mixture
from optimal_sampling_trl.rollouts.rollout import RECORDS, Rollout
from optimal_sampling_trl.trainers import mixture_trainer
from optimal_sampling_trl.trainers.engines.turns import TurnPrompt
from optimal_sampling_trl.trainers.records import loss_mask

WITH_TOOLS = [kind for kind in KINDS if kind != "rloo"]
"""The trainers of TRL that take tools."""
SETTINGS: dict[str, Any] = {
    "max_completion_length": 72,
    "max_steps": 2,
    "max_tool_calling_iterations": 3,
    "learning_rate": 1e-3,
}


@pytest.fixture(scope="module")
def teacher(speakers: tuple[str, str]) -> PreTrainedModel:
    return load(speakers[0])


def length(completions: Sequence[Any], **columns: Any) -> list[float]:
    """A reward that differs from completion to completion."""
    return [sum(len(message["content"]) for message in chat) / 100 for chat in completions]


def even(prompts: Sequence[Any], **columns: Any) -> list[float]:
    """A reward that accepts all completions of every other prompt, and none of the others."""
    return [float(int(chat[0]["content"].rstrip("?")) % 2 == 0) for chat in prompts]


def make(kind: str, speakers: tuple[str, str], folder: Path, **given: Any) -> Any:
    """A trainer of `KINDS` whose completions call tools."""
    trainer: dict[str, Any] = {"train_dataset": Dataset.from_dict({"prompt": PROMPTS}), "tools": [add, repeat]}
    if kind in ("grpo", "raft"):
        trainer["reward_funcs"] = length
        given = {"num_generations_eval": 1} | given
    trainer |= given.pop("trainer", {})
    return make_trainer(kind, speakers, folder, mixin=Watch, trainer=trainer, **SETTINGS | given)


def read_whole(batch: dict[str, Any], row: int, teacher: PreTrainedModel, theta: PreTrainedModel) -> Rollout:
    """A completion as one rollout, tools' tokens and all, with the records that the oracle gives each token."""
    prompt = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()].tolist()
    ids = batch["completion_ids"][row][batch["completion_mask"][row].bool()].tolist()
    mixture = Mixture() if batch["mixture_rows"][row] else Mixture.theta_only()
    nothing = dict.fromkeys(RECORDS, torch.zeros(len(ids)))
    whole = Rollout(prompt, prompt, ids, **nothing, text="", finish_reason="stop", mixture=mixture)
    expected, _ = expected_records(whole, teacher, theta)
    return replace(whole, **{name: record.float() for name, record in expected.items()})


def turns_of(mask: Tensor) -> list[slice]:
    """The runs of True in a mask (T,)."""
    edges = torch.nn.functional.pad(mask.int(), (1, 1)).diff().nonzero()[:, 0].tolist()
    return [slice(start, end) for start, end in zip(edges[::2], edges[1::2], strict=True)]


def check_turns(trainer: Any, teacher: PreTrainedModel, theta: PreTrainedModel, tolerance: float = 1e-4) -> list[int]:
    """Hold each batch against the oracle, which reads each completion whole, and return the rows' numbers of turns.

    A record stands at each token in the loss, and 0 at all others; the rollouts are the same turns one by one.
    """
    counts = []
    for weights, (training, batch, rollouts) in zip(trainer.weights, trainer.generations, strict=True):
        theta.load_state_dict(weights, strict=False)
        missing = () if has_log_teacher(trainer, training) else ("log_teacher",)
        turns, left = loss_mask(batch).bool(), list(rollouts)
        for row, length in enumerate(batch["completion_mask"].sum(1).tolist()):
            whole = read_whole(batch, row, teacher, theta)
            for name in RECORDS:
                wanted = getattr(whole, name) * turns[row, :length]
                if name in missing:
                    wanted = wanted.masked_fill(turns[row, :length], torch.nan)
                torch.testing.assert_close(
                    batch[name][row, :length], wanted, atol=tolerance, rtol=0, equal_nan=name in missing
                )
                assert not batch[name][row, length:].any()
            places = turns_of(turns[row, :length])
            counts.append(len(places))
            for place in places:
                rollout = left.pop(0)
                assert rollout.mixture == whole.mixture
                assert rollout.theta_prompt_ids == [*whole.theta_prompt_ids, *whole.completion_ids[: place.start]]
                assert rollout.completion_ids == whole.completion_ids[place]
                held = [name for name in RECORDS if name not in missing]
                assert all(getattr(rollout, name).equal(batch[name][row, place]) for name in held)
        assert not left
    return counts


@pytest.mark.parametrize("kind", WITH_TOOLS)
def test_every_turn_has_its_records(
    speakers: tuple[str, str], teacher: PreTrainedModel, tmp_path: Path, kind: str
) -> None:
    """Some rows end at once, some after two or three turns; calls fail; a row is the student's or the mixture's
    throughout; an evaluation is the student's."""
    trainer = make(kind, speakers, tmp_path)
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    trainer.evaluate(Dataset.from_dict({"prompt": PROMPTS[:4]}))
    assert any(not parameter.equal(before[name]) for name, parameter in trainer.model.named_parameters())
    counts = check_turns(trainer, teacher, load(speakers[1]))
    assert {1, 2, 3} <= set(counts)
    for training, batch, _ in trainer.generations:
        mixed = batch["mixture_rows"].tolist()
        halves = [False, False, True, True] if kind == "grpo" else [True] * 4
        assert mixed == (halves * 2 if training else [False] * 4)
    logs = [log for log in trainer.state.log_history if "tools/call_frequency" in log]
    assert len(logs) == 2
    assert all(log["tools/call_frequency"] > 0 and 0 < log["tools/failure_frequency"] < 1 for log in logs)
    assert all(log.get("engine/log_theta_difference", 0.0) < 1e-5 for log in logs)


def test_a_completion_is_as_long_as_all_its_turns_may_be(
    speakers: tuple[str, str], teacher: PreTrainedModel, tmp_path: Path
) -> None:
    """A turn is cut where the completion is full; an answer of a tool that does not fit is left out, as by TRL."""
    trainer = make("grpo", speakers, tmp_path, max_completion_length=30, max_steps=3)
    trainer.train()
    check_turns(trainer, teacher, load(speakers[1]))
    cut, left_out, sampled = 0, 0, 0
    for _, batch, rollouts in trainer.generations:
        assert batch["completion_ids"].shape[1] <= 30
        cut += sum(rollout.finish_reason == "length" for rollout in rollouts)
        sampled += sum(len(rollout.completion_ids) for rollout in rollouts)
        chats = trainer.processing_class.batch_decode(batch["completion_ids"], skip_special_tokens=True)
        left_out += sum(chat.endswith("]") for chat in chats)
    assert cut > 0
    assert left_out > 0
    assert sampled == sum(int(loss_mask(batch).sum()) for _, batch, _ in trainer.generations)  # none in vain


def test_a_turn_without_room_is_not_sampled(speakers: tuple[str, str], tmp_path: Path) -> None:
    """TRL asks for a turn after an answer that fills a completion to its last token."""
    engine = make("grpo", speakers, tmp_path, max_completion_length=6).vllm_generation
    prompt = [60, 61]
    _, (first,), _, _ = engine.generate([prompt], None, 1)
    for length, room in ((5, 1), (6, 0)):
        later = TurnPrompt([*prompt, *range(length)], 0)
        _, (ids,), (log_theta,), _ = engine.generate([later], None, 1)
        assert len(ids) == len(log_theta) == room
    assert [len(rollout.completion_ids) for rollout in engine.pop_turns()[0]] == [len(first), 1]


def test_a_student_with_the_longer_prompt_reads_no_more_than_its_context(
    speakers: tuple[str, str], tmp_path: Path
) -> None:
    """TRL sends a turn of any prompt that is shorter than what the engine says, and cannot know of the teacher's."""
    engine = make("raft", speakers, tmp_path, num_generations=1).vllm_generation
    for of_teacher in ([60], [60, 61, 62, 63]):
        engine.teacher_prompts = [of_teacher]
        engine.generate([[60, 61]], None, 1)
        longest = TurnPrompt([60, 61, *[1] * (engine.most_read() - 3)], 0)
        engine.longest = None  # no limit but the context's
        _, (ids,), _, _ = engine.generate([longest], None, 1)
        assert len(ids) == 1


@pytest.mark.parametrize("kind", ["grpo", "dense"])
def test_dense_records_of_every_turn(
    speakers: tuple[str, str], teacher: PreTrainedModel, tmp_path: Path, kind: str
) -> None:
    """Those that a loss asks for and the user's; the dense losses read the sampled tokens alone."""
    extra: dict[str, Any] = {"dense_coefficient": 1.0} if kind == "grpo" else {}
    wish = Dense(("overlap",), 2)
    trainer = make(kind, speakers, tmp_path, generator={"dense": wish}, dense_top_k=32, max_steps=1, **extra)
    trainer.train()
    ((_, batch, rollouts),) = trainer.generations
    theta = load(speakers[1])
    for rollout in rollouts:
        check_dense(rollout, Dense(("overlap", "kl_theta_teacher"), 32), teacher, theta)
    mask = loss_mask(batch).bool()
    assert len(rollouts) > len(mask)
    assert not any(batch[name][~mask].any() for name in ("dense_overlap", "dense_ids", "dense_log_teacher"))
    for name in ("overlap", "kl_theta_teacher"):
        assert torch.cat([one.dense.scalars[name] for one in rollouts]).equal(batch[f"dense_{name}"][mask])


@pytest.mark.parametrize("kind", ["raft", "dense", "sampled_token", "divergence"])
def test_a_loss_is_over_the_sampled_tokens_alone(
    speakers: tuple[str, str], teacher: PreTrainedModel, tmp_path: Path, kind: str
) -> None:
    """The loss of an evaluation, written out from the oracle's logits of whole completions."""
    settings = {"dense_top_k": 288} if kind == "dense" else {}
    trainer = make(kind, speakers, tmp_path, max_completion_length=80, **settings)
    loss = trainer.evaluate(Dataset.from_dict({"prompt": PROMPTS[:4]}))["eval_loss"]
    ((_, batch, _),) = trainer.generations
    theta, parts = load(speakers[1]), []
    assert not loss_mask(batch).equal(batch["completion_mask"])
    for row in range(4):
        whole = read_whole(batch, row, teacher, theta)
        kept = loss_mask(batch)[row, : len(whole.completion_ids)].bool()
        of_theta, of_teacher = (logits[kept].log_softmax(-1) for logits in pair_logits(whole, teacher, theta))
        drawn = torch.tensor(whole.completion_ids)[kept][:, None]
        if kind == "raft":
            parts.append(-batch["imitation_weights"][row] * of_theta.gather(1, drawn)[:, 0])
        elif kind == "sampled_token":
            parts.append((of_theta - of_teacher).gather(1, drawn)[:, 0])
        else:
            parts.append((of_theta.exp() * (of_theta - of_teacher)).sum(1))
    assert loss == pytest.approx(float(torch.cat(parts).mean()), rel=1e-4)


class Guessing:
    """An environment: a number from 0 to 9 is to be found with `add`; it answers whether the sum is too small."""

    def reset(self, secret: int, **row: Any) -> str:
        self.secret, self.sums = secret, list[int]()
        return f" below {secret + 1}"

    def add(self, a: int, b: int) -> str:
        """Guesses a sum.

        Args:
            a: One number.
            b: The other.
        """
        self.sums.append(a + b)
        return "more" if a + b < self.secret else "done"

    def get_reward(self) -> float:
        return sum(self.sums) / 10


def test_an_environment(speakers: tuple[str, str], teacher: PreTrainedModel, tmp_path: Path) -> None:
    """Each completion has one of its own, whose methods are the tools; it adds to the prompt and scores."""
    rows = Dataset.from_dict({"prompt": PROMPTS, "secret": [number % 10 for number in range(len(PROMPTS))]})
    built = {"environment_factory": Guessing, "tools": None, "reward_funcs": None, "train_dataset": rows}
    trainer = make("grpo", speakers, tmp_path, trainer=built)
    trainer.train()
    assert {1, 2} <= set(check_turns(trainer, teacher, load(speakers[1])))
    assert trainer.rewards.tolist() == pytest.approx([one.get_reward() for one in trainer.environments])
    assert any(one.sums for one in trainer.environments)
    for row, prompt in enumerate(trainer.processing_class.batch_decode(trainer.generations[-1][1]["prompt_ids"])):
        assert prompt.endswith(f" below {trainer.environments[row].secret + 1}>")


def test_an_environment_that_has_the_prompt(speakers: tuple[str, str], tmp_path: Path) -> None:
    """The data set needs no column of prompts then; of several environments each row names its own."""
    rows = Dataset.from_dict({"secret": list(range(8)), "environment": ["one", "other"] * 4})
    factories = {"one": Guessing, "other": Guessing}
    built = {"environment_factory": factories, "tools": None, "reward_funcs": length, "train_dataset": rows}
    trainer = make("grpo", speakers, tmp_path, trainer=built, max_steps=1)
    trainer.train()
    assert len(trainer.rollouts) >= 8
    trainer = make(
        "grpo", speakers, tmp_path, trainer=built, max_steps=1,
        generator={"theta_system_prompt": "hi ", "teacher_system_prompt": "hi "},
    )  # fmt: skip
    trainer.train()
    assert all(trainer.processing_class.decode(one.prompt_ids).startswith("add hi ") for one in trainer.rollouts)


def play(prompts: list[Any], trainer: Any) -> dict[str, Any]:
    """A `rollout_func` of two turns; before the second the environment says "(go)>". Every third row ends early."""
    tokenizer = trainer.processing_class
    asked = [tokenizer.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"] for prompt in prompts]
    said = tokenizer("(go)>")["input_ids"]
    first = trainer.sample_turn(asked, range(len(asked)))
    ids = [list(rollout.completion_ids) for rollout in first]
    logs, mask = [rollout.log_theta.tolist() for rollout in first], [[1] * len(one) for one in ids]
    rows = [row for row in range(len(asked)) if row % 3][::-1]
    for row in rows:
        ids[row] += said
        logs[row] += [0.0] * len(said)
        mask[row] += [0] * len(said)
    for row, rollout in zip(rows, trainer.sample_turn([asked[row] + ids[row] for row in rows], rows), strict=True):
        ids[row] += rollout.completion_ids
        logs[row] += rollout.log_theta.tolist()
        mask[row] += [1] * len(rollout.completion_ids)
    return {"prompt_ids": asked, "completion_ids": ids, "logprobs": logs, "env_mask": mask, "seen": list(range(8))}


def seen_by(completions: Sequence[Any], seen: list[int], **columns: Any) -> list[float]:
    """A reward that reads what a `rollout_func` returned."""
    return [float(one % 5) for one in seen]


def test_a_rollout_func_samples_its_turns(speakers: tuple[str, str], teacher: PreTrainedModel, tmp_path: Path) -> None:
    built = {"rollout_func": play, "tools": None, "reward_funcs": seen_by}
    trainer = make("grpo", speakers, tmp_path, trainer=built, max_steps=1)
    trainer.train()
    assert check_turns(trainer, teacher, load(speakers[1])) == [1 + bool(row % 3) for row in range(8)]
    ((_, batch, _),) = trainer.generations
    assert batch["mixture_rows"].tolist() == [False, False, True, True] * 2
    assert trainer.rewards.tolist() == [row % 5 for row in range(8)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda made: made["env_mask"].clear() or made.pop("env_mask"),
            "would be trained on, and no model sampled it",
        ),
        (
            lambda made: made["completion_ids"][1].__setitem__(0, 0),
            r"Completion 1 of the batch is not the one .*turn 0",
        ),
        (lambda made: made["completion_ids"][1].pop(-7), r"Completion 1 of the batch is not the one"),
    ],
    ids=["no mask", "another token", "a token left out"],
)
def test_a_rollout_func_that_returns_something_else_is_refused(
    speakers: tuple[str, str], tmp_path: Path, change: Any, message: str
) -> None:
    def changed(prompts: list[Any], trainer: Any) -> dict[str, Any]:
        made = play(prompts, trainer)
        change(made)
        return made

    built = {"rollout_func": changed, "tools": None, "reward_funcs": seen_by}
    trainer = make("grpo", speakers, tmp_path, trainer=built, max_steps=1, log_theta_tolerance=torch.inf)
    with pytest.raises(RuntimeError, match=message):
        trainer.train()


def test_what_sample_turn_refuses(speakers: tuple[str, str], tmp_path: Path) -> None:
    trainer = make("grpo", speakers, tmp_path, max_completion_length=4)
    trainer.vllm_generation.begin(2)
    for rows in ([0, 0], [1, 2], [-1, 0]):
        with pytest.raises(ValueError, match=r"wanted numbers from 0 to 1, each once: the prompts of this batch"):
            trainer.sample_turn([[60], [60]], rows)
    (first,) = trainer.sample_turn([[60, 61]], [1])
    assert first.theta_prompt_ids == [60, 61]
    with pytest.raises(ValueError, match=r"row 1 is as long as `max_completion_length` allows \(4 tokens\)"):
        trainer.sample_turn([[60, 61, 1, 2, 3, 4]], [1])


def test_the_teacher_reads_its_own_prompt_before_every_turn(
    speakers: tuple[str, str], teacher: PreTrainedModel, tmp_path: Path
) -> None:
    own = [[{"role": "user", "content": f"hint {number} "}, *prompt] for number, prompt in enumerate(PROMPTS)]
    rows = Dataset.from_dict({"prompt": PROMPTS, "teacher_prompt": own})
    trainer = make("raft", speakers, tmp_path, trainer={"train_dataset": rows}, max_steps=1, num_generations=1)
    trainer.train()
    theta, decode = load(speakers[1]), trainer.processing_class.decode
    theta.load_state_dict(trainer.weights[0], strict=False)
    later = 0
    for rollout in trainer.rollouts:
        check_rollout(rollout, teacher, theta)
        read, read_by_teacher = decode(rollout.theta_prompt_ids), decode(rollout.prompt_ids)
        tools, rest = read.removeprefix("add repeat "), read_by_teacher.removeprefix("add repeat hint ")
        assert rest == f"{tools.split('?')[0]} {tools}"
        later += tools.count(">") > 1
    assert later > 0


def test_the_guard_reads_as_many_prompts_in_every_process(
    speakers: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the student is split over processes each forward pass needs all of them, whatever turns a row has."""
    read, compute = [], mixture_trainer.log_theta_of

    def counted(model: Any, prompts: Any, *further: Any) -> Tensor:
        read.append(len(prompts))
        return compute(model, prompts, *further)

    monkeypatch.setattr(mixture_trainer, "log_theta_of", counted)
    alone = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}
    trainer = make("sampled_token", speakers, tmp_path, **alone, max_steps=6)
    trainer.train()
    assert max(len(rollouts) for _, _, rollouts in trainer.generations) > 1
    assert read == [1] * 6


def test_two_rounds_of_completions_that_call_tools(
    speakers: tuple[str, str], teacher: PreTrainedModel, tmp_path: Path
) -> None:
    """The mixture samples only in groups whose own rows earned nothing, every turn of theirs."""
    built = {"reward_funcs": even}
    trainer = make("grpo", speakers, tmp_path, generator={"mixture_below": 1.0}, trainer=built, max_steps=3)
    seen: list[tuple[int, int, int]] = []  # rows, calls and failures of each round
    loop = trainer._tool_call_loop

    def watched(prompts: Sequence[Any], *further: Any) -> Any:
        result = loop(prompts, *further)
        seen.append((len(prompts), *result[4:6]))
        return result

    trainer._tool_call_loop = watched
    trainer.train()
    logs = [log for log in trainer.state.log_history if "tools/call_frequency" in log]
    for log, first, second in zip(logs, seen[::2], seen[1::2], strict=True):
        rows, calls, failures = (sum(both) for both in zip(first, second))
        assert log["tools/call_frequency"] == pytest.approx(calls / rows)
        assert log["tools/failure_frequency"] == pytest.approx(failures / calls)
    counts = check_turns(trainer, teacher, load(speakers[1]))
    assert max(counts) > 1
    halves = {
        tuple(rows) for _, batch, _ in trainer.generations for rows in batch["mixture_rows"].view(-1, 4).tolist()
    }
    assert halves == {(False,) * 4, (False, False, True, True)}


def test_the_table_has_a_row_for_each_completion(speakers: tuple[str, str], tmp_path: Path) -> None:
    trainer = make("grpo", speakers, tmp_path, max_steps=1, log_completions=True)
    trainer.train()
    ((_, batch, rollouts),) = trainer.generations
    table = trainer._logs["extra"]
    assert list(table["mixture/sampled_by"]) == ["student", "student", "mixture", "mixture"] * 2
    alpha = batch["alpha"].sum(1) / loss_mask(batch).sum(1)
    assert list(table["mixture/alpha"]) == pytest.approx(alpha.tolist(), abs=1e-5)
    assert len(trainer.advantages) == len(rollouts) > 8


@pytest.mark.parametrize(
    ("built", "given", "message"),
    [
        (
            {},
            {"max_completion_length": None, "generation_kwargs": {"max_tokens": 9}},
            "`tools` was passed and `max_com",
        ),
        (
            {"environment_factory": Guessing},
            {"generator": {"teacher_system_prompt": "hint"}},
            "`environment_factory` was passed, and the teacher reads another prompt than the student",
        ),
        (
            {"rollout_func": play},
            {"generator": {"mixture_below": 1.0}},
            "`rollout_func` was passed and `mixture_below` is 1.0: an environment belongs to a row",
        ),
    ],
)
def test_what_is_refused(
    speakers: tuple[str, str], tmp_path: Path, built: dict[str, Any], given: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make("grpo", speakers, tmp_path, trainer=built, **given)


def test_the_number_of_turns_is_read_where_tools_are(speakers: tuple[str, str], tmp_path: Path) -> None:
    """Else it is named among the settings that do nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make("raft", speakers, tmp_path)
    with pytest.warns(UserWarning, match=r"`max_tool_calling_iterations` is 3 and does nothing here: it is read with"):
        make("raft", speakers, tmp_path, trainer={"tools": []})


@pytest.fixture(scope="module")
def two_ranks(speakers: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """What each of two ranks saw with each engine."""
    folder = tmp_path_factory.mktemp("ranks")
    process = run_two_ranks("two_ranks_with_tools.py", *speakers, folder)
    names = ("live", "server", "shared")
    wanted = sorted(f"{name}-{rank}.json" for name in names for rank in (0, 1))
    assert sorted(file.name for file in folder.glob("*.json")) == wanted, process.stderr[-3000:]
    return {name: [json.loads((folder / f"{name}-{rank}.json").read_text()) for rank in (0, 1)] for name in names}


@pytest.mark.parametrize("name", ["live", "server", "shared"])
def test_two_ranks_whose_completions_end_at_different_turns(
    two_ranks: dict[str, list[dict[str, Any]]], name: str
) -> None:
    """Nobody waits for ever, and the rollouts of each rank are its own rows' (the ranks asked the oracle)."""
    ranks = two_ranks[name]
    assert max(rank["worst"] for rank in ranks) < 1e-4
    assert ranks[0]["turns"] == [1, 1]
    assert max(ranks[1]["turns"]) > 1
    for rank in ranks:
        assert rank["mixed"] == [[False, False, True, True]] * 2
