"""Rows of a data set that cannot be read are named before the first step; system messages, templates, lengths."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import AutoTokenizer

from helpers.models import make_model
from helpers.training import make_trainer, make_untrained_pair, one_batch
from optimal_sampling_trl import OptimalSamplingGenerator
from optimal_sampling_trl.pairing import with_system_prompt

USER = [{"role": "user", "content": "1 + 1"}]
SYSTEM = [{"role": "system", "content": "Count."}, *USER]
ANSWERED = [*USER, {"role": "assistant", "content": "2"}]
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
SILENT = (
    "{% for m in messages %}{% if m['role'] != 'system' %}[{{ m['role'] }}] {{ m['content'] }}{% endif %}{% endfor %}"
)
WISE = {"teacher_system_prompt": "Be terse."}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    root = tmp_path_factory.mktemp("pair")
    return make_model(root / "teacher", "qwen2", 0), make_model(root / "theta", "qwen2", 1)


def data(*prompts: Any) -> dict[str, Any]:
    return {"train_dataset": Dataset.from_dict({"prompt": list(prompts)})}


def template(folder: str, text: str) -> Any:
    """The tokenizer of a folder with another chat template."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = text.replace("OLD", tokenizer.chat_template)
    return tokenizer


@pytest.mark.parametrize("kind", ["grpo", "rloo", "sampled_token"])
def test_a_template_without_a_system_role(pair: tuple[str, str], tmp_path: Path, kind: str) -> None:
    given = data(USER, USER) | {"processing_class": template(pair[1], NO_SYSTEM + "OLD")}
    words = r"row 0 of `train_dataset`.*roles system, user: System role not supported\. `teacher_system_prompt` is put"
    with pytest.raises(ValueError, match=words):
        make_trainer(kind, pair, tmp_path, generator=WISE, trainer=given)
    make_trainer(kind, pair, tmp_path, trainer=given)
    with pytest.raises(ValueError, match=r"`theta_system_prompt` is put before a chat"):
        make_trainer(kind, pair, tmp_path, generator={"theta_system_prompt": "Hm."}, trainer=given)


def test_a_template_that_leaves_system_messages_out(pair: tuple[str, str], tmp_path: Path) -> None:
    given = data(USER) | {"processing_class": template(pair[1], SILENT)}
    with pytest.raises(ValueError, match=r"`teacher_system_prompt` is 'Be terse.', and the chat template leaves"):
        make_trainer("grpo", pair, tmp_path, generator=WISE, trainer=given)


@pytest.mark.parametrize(
    ("prompts", "words"),
    [
        ([USER, USER, SYSTEM], r"In row 2 of `train_dataset`: A prompt begins with the system message 'Count\.'"),
        ([USER, ANSWERED, []], r"The prompt in row 2 of `train_dataset` is empty"),
        ([USER, None], r"The prompt in row 1 of `train_dataset` is 'None' \(NoneType\); wanted a text or a list"),
        (["7", "", "8"], r"The prompt in row 1 of `train_dataset` is empty"),
        (["7"] * 300 + ["7" * 600], r"prompt in row 300 of `train_dataset` has 611 tokens, but the context holds 512"),
        ([USER, [{"role": "user", "content": "7" * 600}]], r"prompt in row 1 of `train_dataset` has \d+ tokens"),
        (["7", "7" * 505], r"The teacher's prompt in row 1 of `train_dataset` has 516 tokens"),
    ],
    ids=["system", "no message", "none", "empty", "long", "long chat", "long with the system prompt"],
)
def test_a_row_is_named_at_the_start(pair: tuple[str, str], tmp_path: Path, prompts: list[Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make_trainer("grpo", pair, tmp_path, generator=WISE, trainer=data(*prompts))


def test_messages_of_a_stream_stand_in_a_list(pair: tuple[str, str], tmp_path: Path) -> None:
    """TRL would take a tuple of messages for a text. A stored data set makes lists of them."""
    trainer = make_trainer("grpo", pair, tmp_path, generator=WISE)
    with pytest.raises(ValueError, match=r"\(tuple\); wanted a text or a list of messages"):
        one_batch(trainer, [tuple(USER)] * 4)


def test_a_chat_that_its_template_refuses(pair: tuple[str, str], tmp_path: Path) -> None:
    given = data(USER, SYSTEM) | {"processing_class": template(pair[1], NO_SYSTEM + "OLD")}
    with pytest.raises(ValueError, match=r"In row 1 of `train_dataset`: .*System role not supported\. Fix the row"):
        make_trainer("grpo", pair, tmp_path, trainer=given)


def test_rows_of_an_evaluation(pair: tuple[str, str], tmp_path: Path) -> None:
    for evaluation, name in (({"a": data("7" * 600)["train_dataset"]}, r"`eval_dataset\['a'\]`"), (None, "none")):
        given = data("7") | {"eval_dataset": evaluation}
        if evaluation is None:
            make_trainer("grpo", pair, tmp_path, trainer=given)
        else:
            with pytest.raises(ValueError, match=f"The student's prompt in row 0 of {name} has 600 tokens"):
                make_trainer("grpo", pair, tmp_path, trainer=given)


def test_the_longest_rows_that_can_be_read(pair: tuple[str, str], tmp_path: Path) -> None:
    make_trainer("grpo", pair, tmp_path, generator=WISE, trainer=data("7" * 500, "7"))
    make_trainer("grpo", pair, tmp_path, trainer=data("7" * 511, "7"))


def test_streamed_data_is_checked_as_it_comes(pair: tuple[str, str], tmp_path: Path) -> None:
    rows = data(USER, SYSTEM)["train_dataset"].to_iterable_dataset()
    trainer = make_trainer("grpo", pair, tmp_path, generator=WISE, trainer={"train_dataset": rows})
    with pytest.raises(ValueError, match="begins with the system message"):
        one_batch(trainer, [SYSTEM] * 4)
    tokenizer = template(pair[1], NO_SYSTEM + "OLD")
    given = {"train_dataset": rows, "processing_class": tokenizer}
    trainer = make_trainer("grpo", pair, tmp_path, generator=WISE, trainer=given)
    with pytest.raises(ValueError, match=r"System role not supported\. `teacher_system_prompt` is put"):
        one_batch(trainer, [USER] * 4)


def test_texts_and_chats_in_one_stream(pair: tuple[str, str], tmp_path: Path) -> None:
    """TRL reads a batch as it reads its first prompt."""
    rows = data(USER)["train_dataset"].to_iterable_dataset()
    trainer = make_trainer("grpo", pair, tmp_path, trainer={"train_dataset": rows})
    for prompts, words in (
        ([USER, USER, "7", USER], "The prompt in row 2 of the batch is a text and the one in row 0 .* messages"),
        (["7", USER, "7", "7"], "The prompt in row 1 of the batch is messages and the one in row 0 .* a text"),
        (["7", None, "7", "7"], r"The prompt in row 1 of the batch is 'None' \(NoneType\); wanted a text or a list"),
    ):
        with pytest.raises(ValueError, match=words):
            one_batch(trainer, prompts)


@pytest.mark.parametrize("column", ["image", "images"])
def test_columns_of_images(pair: tuple[str, str], tmp_path: Path, column: str) -> None:
    """Empty ones too, which TRL takes for a vision model's."""
    given = data(USER, USER)["train_dataset"].add_column(column, [None, None])
    words = rf"`train_dataset` has the column '{column}', .*Drop it: `data\.remove_columns\(\['{column}'\]\)`"
    with pytest.raises(ValueError, match=words):
        make_trainer("grpo", pair, tmp_path, trainer={"train_dataset": given})
    trainer = make_trainer("grpo", pair, tmp_path, trainer=data(USER))
    with pytest.raises(ValueError, match=f"A row of the batch has the column '{column}'"):
        trainer._generate_and_score_completions([{"prompt": USER, column: None}] * 4)


@pytest.mark.parametrize(("mode", "content"), [("replace", "Be terse."), ("append", "Count.\n\nBe terse.")])
def test_a_system_message_is_replaced_or_appended_to(
    pair: tuple[str, str], tmp_path: Path, mode: str, content: str
) -> None:
    settings = WISE | {"system_message": mode}
    trainer = make_trainer("grpo", pair, tmp_path, generator=settings, trainer=data(SYSTEM, USER))
    one_batch(trainer, [SYSTEM] * 4)
    tokenizer = AutoTokenizer.from_pretrained(pair[0])
    rollout = trainer.rollouts[0]
    assert tokenizer.decode(rollout.prompt_ids).startswith(f"[system] {content}\n[user] 1 + 1")
    assert tokenizer.decode(rollout.theta_prompt_ids).startswith("[system] Count.\n[user] 1 + 1")


def test_a_system_message_of_parts_and_of_a_developer() -> None:
    parts = [{"role": "developer", "content": [{"type": "text", "text": "Count."}]}, *USER]
    both = with_system_prompt(parts, "Hm.", "append")
    assert both[0] == {"role": "developer", "content": [*parts[0]["content"], {"type": "text", "text": "Hm."}]}
    assert with_system_prompt(parts, "Hm.", "replace")[0] == {"role": "developer", "content": "Hm."}
    assert len(parts[0]["content"]) == 1
    with pytest.raises(ValueError, match="set `system_message` to 'replace' or 'append'"):
        with_system_prompt(parts, "Hm.")


def test_an_unknown_way_with_system_messages() -> None:
    with pytest.raises(ValueError, match=r"`system_message`.*'replce'.*replace"):
        OptimalSamplingGenerator("large", system_message="replce")


def test_a_teacher_with_another_template_is_named_once(pair: tuple[str, str], tmp_path: Path) -> None:
    other = make_model(tmp_path / "other", "qwen2", 0)
    template(other, "TEACHER OLD").save_pretrained(other)
    chats, texts = data(USER, USER), data("7", "8")
    streamed = {"train_dataset": chats["train_dataset"].to_iterable_dataset()}
    for teacher, given, count in ((other, chats, 1), (other, texts, 0), (pair[0], chats, 0), (other, streamed, 1)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer = make_trainer("grpo", pair, tmp_path, generator={"teacher": teacher}, trainer=given)
            for _ in range(2):
                one_batch(trainer, [USER if given is not texts else "7"] * 4)
        told = [w for w in caught if "has another chat template" in str(w.message)]
        assert len(told) == count, (teacher, given)
        assert {Path(w.filename).name for w in told} <= {"training.py", Path(__file__).name}


def test_a_length_that_is_none_is_named(tmp_path: Path) -> None:
    pair = make_untrained_pair(tmp_path)
    with pytest.raises(ValueError, match="`max_completion_length` is None; wanted a whole number"):
        make_trainer("grpo", pair, tmp_path, max_completion_length=None)
    settings = {"max_completion_length": None, "generation_kwargs": {"max_tokens": 5}}
    trainer = make_trainer("rloo", pair, tmp_path, **settings)
    one_batch(trainer, ["31="] * 4)
    assert max(len(rollout.completion_ids) for rollout in trainer.rollouts) <= 5


@pytest.mark.parametrize("kind", ["grpo", "rloo", "raft", "sampled_token"])
def test_a_data_set_without_prompts(pair: tuple[str, str], tmp_path: Path, kind: str) -> None:
    """Named before anything is loaded, where TRL's message was `KeyError: 'prompt'` in the first step."""
    asked = Dataset.from_dict({"question": ["1="], "answer": ["1"]})
    words = r"`train_dataset` has the columns question, answer; wanted 'prompt'.*rename_column\('question', 'prompt'\)"
    with pytest.raises(ValueError, match=words):
        make_trainer(kind, pair, tmp_path, trainer={"train_dataset": asked})
    with pytest.raises(ValueError, match=r"`eval_dataset\['hard'\]` has the columns question, answer; wanted"):
        make_trainer(kind, pair, tmp_path, trainer={"eval_dataset": {"hard": asked}})
    spoken = Dataset.from_dict({"id": [1], "messages": [[*USER, {"role": "assistant", "content": "1"}]]})
    with pytest.raises(ValueError, match=r"columns id, messages; wanted 'prompt'\. .*\{'prompt': row\['messages'\]\["):
        make_trainer(kind, pair, tmp_path, trainer={"train_dataset": spoken})
    advised = spoken.map(lambda row: {"prompt": row["messages"][:-1]})
    assert advised[0]["prompt"] == USER


@pytest.mark.parametrize(("kind", "wanted"), [("grpo", 2), ("rloo", 2), ("raft", 8), ("sampled_token", 8)])
def test_a_data_set_of_less_than_one_batch(pair: tuple[str, str], tmp_path: Path, kind: str, wanted: int) -> None:
    """TRL took no step, and said that the training had ended."""
    few = data(*["1 + 1 ="] * (wanted - 1))
    words = (
        rf"`train_dataset` has {wanted - 1} rows, and a batch takes {wanted} different ones: there would be no step"
    )
    with pytest.raises(ValueError, match=words):
        make_trainer(kind, pair, tmp_path, trainer=few, max_steps=1).train()
    stream = few | {"train_dataset": few["train_dataset"].to_iterable_dataset()}
    with pytest.raises(ValueError, match=r"^Training ended without a step: `train_dataset`, a stream, has fewer rows"):
        make_trainer(kind, pair, tmp_path, trainer=stream, max_steps=1).train()


@pytest.mark.parametrize("kind", ["grpo", "rloo", "raft", "sampled_token"])
def test_a_student_that_is_nowhere(pair: tuple[str, str], tmp_path: Path, kind: str) -> None:
    """In the words that a teacher has; transformers told of the Hub alone."""
    words = r"^The student could not be loaded from '.*nowhere': The folder does not exist.*Pass a folder with"
    with pytest.raises(ValueError, match=words):
        make_trainer(kind, pair, tmp_path, trainer={"model": str(tmp_path / "nowhere")})
