"""The prompts of a trainer's data sets: refused before the first step where a row cannot be read.

A bad row that is drawn after hours would stop a run that could have been refused at once. A stream cannot be read in
advance, and is checked batch by batch as it comes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ..pairing import Pair, check_prompt, is_chat, with_system_prompt
from ..pairing.prompts import SYSTEM_PROMPTS, TEACHER_PROMPT, ignored_refusal
from .generator import OptimalSamplingGenerator

AT_ONCE = 256
"""Prompts that are tokenized at a time."""
CONVERSATIONS = ("messages", "conversations")
"""Columns that hold whole conversations by habit, answers included."""
IMAGES = ("image", "images")
"""Columns from which TRL reads images."""

Tokenize = Callable[[list[Any]], list[list[int]]]
"""The trainer's way from prompts, texts or chats, to token ids; chats and texts in calls of their own."""


class Row(NamedTuple):
    """A row's prompts and where it stands; `teacher_prompt` is None where the teacher has none of its own."""

    where: str
    prompt: Any
    teacher_prompt: Any = None


class Reading(NamedTuple):
    """A row as one model reads it.

    Args:
        role: the model, `"teacher"` or `"student"`.
        is_own: whether it comes from the column of the teacher's own prompts, which its own tokenizer reads.
        prompt: a text or messages, without the system prompt.
        system_prompt: what is put before it, or None.
    """

    role: str
    is_own: bool
    prompt: Any
    system_prompt: str | None

    @property
    def kind(self) -> tuple[str, bool, Any]:
        """Equal for readings that a chat template renders alike."""
        return self.role, self.is_own, shape_of(self.prompt)


def readings(row: Row, generator: OptimalSamplingGenerator) -> Iterator[Reading]:
    """Yield what the models read of a row: one reading where it is the same for both."""
    if row.teacher_prompt is not None:
        yield Reading("teacher", True, row.teacher_prompt, generator.teacher_system_prompt)
    elif generator.two_prompts:
        yield Reading("teacher", False, row.prompt, generator.teacher_system_prompt)
    yield Reading("student", False, row.prompt, generator.theta_system_prompt)


def rows_of(data: Any, name: str) -> Iterator[Row]:
    """Yield the prompts of a trainer's data set or sets, without streamed ones.

    Args:
        data: a data set, a dictionary of some, or None.
        name: the trainer's argument.
    """
    if isinstance(data, Mapping):
        for key, part in data.items():
            yield from rows_of(part, f"{name}[{key!r}]")
    elif hasattr(data, "__len__") and "prompt" in (getattr(data, "column_names", None) or ()):
        column = data[TEACHER_PROMPT] if TEACHER_PROMPT in data.column_names else itertools.repeat(None)
        for index, (prompt, teacher_prompt) in enumerate(zip(data["prompt"], column)):
            yield Row(f"row {index} of `{name}`", prompt, teacher_prompt)


def check_columns(data: Any, name: str) -> None:
    """Refuse a data set, or one of a dictionary, whose columns are known and lack the prompts, or may hold images.

    Args:
        data: a data set, a dictionary of some, or None.
        name: the trainer's argument.

    Raises:
        ValueError: naming the argument, and the columns that are there.
    """
    if isinstance(data, Mapping):
        for key, part in data.items():
            check_columns(part, f"{name}[{key!r}]")
    elif (columns := getattr(data, "column_names", None)) and "prompt" not in columns and isinstance(columns, list):
        whole = next((column for column in CONVERSATIONS if column in columns), None)
        advice = (
            f"Rename the column that holds the prompts: `data.rename_column({columns[0]!r}, 'prompt')`."
            if whole is None
            else f"A row's {whole!r} end with the answer; keep the turns before it: `data.map(lambda row: "
            f"{{'prompt': row[{whole!r}][:-1]}})`."
        )
        raise ValueError(f"`{name}` has the columns {', '.join(columns)}; wanted 'prompt'. {advice}")
    else:
        check_no_images(columns or (), f"`{name}`")


def check_no_images(columns: Iterable[str], where: str) -> None:
    """Refuse the columns that TRL reads images from, empty ones too: TRL takes such rows for those of a vision model.

    Raises:
        ValueError: naming them.
    """
    if found := [column for column in IMAGES if column in columns]:
        raise ValueError(
            f"{where} has the column {found[0]!r}, from which TRL reads images; rollouts from the mixture take text "
            f"alone. Drop it: `data.remove_columns({found})`."
        )


def check_one_kind(rows: Sequence[Row]) -> None:
    """Refuse a batch whose prompts are no texts or messages, or of both kinds: TRL reads all as it reads the first.

    Raises:
        ValueError: naming a row.
    """
    for row in rows:
        check_kinds(row)
        if is_chat(row.prompt) != is_chat(rows[0].prompt):
            words = {True: "messages", False: "a text"}
            raise ValueError(
                f"The prompt in {row.where} is {words[is_chat(row.prompt)]} and the one in {rows[0].where} "
                f"{words[is_chat(rows[0].prompt)]}; wanted one kind in a data set. Make a chat of each text: "
                "[{'role': 'user', 'content': text}]."
            )


def has_teacher_prompts(*data: Any) -> bool:
    """Tell whether one of a trainer's data sets has the column `teacher_prompt`; a stream may not know its columns."""
    parts = [part for one in data for part in (one.values() if isinstance(one, Mapping) else [one])]
    return any(TEACHER_PROMPT in (getattr(part, "column_names", None) or ()) for part in parts)


def check_kinds(row: Row) -> None:
    """Refuse a row whose prompts are no texts or messages.

    Raises:
        ValueError: naming the row and the column.
    """
    given = {"prompt": row.prompt}
    if row.teacher_prompt is not None:
        given[f"`{TEACHER_PROMPT}`"] = row.teacher_prompt
    for name, prompt in given.items():
        absent = "" if name == "prompt" else " None lets the teacher read the student's prompt."
        if isinstance(prompt, str | list) and not prompt:
            raise ValueError(f"The {name} in {row.where} is empty; wanted at least one token. Drop it.{absent}")
        chat = isinstance(prompt, list) and is_chat(prompt)  # TRL takes no other sequence for messages
        if not isinstance(prompt, str) and not chat:
            kind = f"{str(prompt)[:60]!r} ({type(prompt).__name__})"
            raise ValueError(
                f"The {name} in {row.where} is {kind}; wanted a text or a list of messages. Fix or drop it.{absent}"
            )


def check_shapes(
    rows: Iterator[Row], generator: OptimalSamplingGenerator, tokenize: Tokenize, of_column: bool = False
) -> dict[Any, int]:
    """Refuse rows that are no prompt, have one system message too many, or that the chat template does not render.

    A template depends on the roles of a chat, and seldom on its contents. So one chat of each sequence of roles is
    rendered for each model.

    Args:
        rows: prompts and where they stand.
        generator: the trainer's.
        tokenize: see `Tokenize`.
        of_column: whether the teacher's own prompts are looked at, with its tokenizer, or all others.

    Returns:
        for each kind of reading the number of tokens of its first row.

    Raises:
        ValueError: naming the row, and the setting that does not go with it.
    """
    first_lengths: dict[Any, int] = {}
    for row in rows:
        check_kinds(row)
        for reading in readings(row, generator):
            if reading.is_own == of_column and (kind := reading.kind) not in first_lengths:
                first_lengths[kind] = _read_first(row.where, reading, generator.system_message, tokenize)
    return first_lengths


def shape_of(prompt: Any) -> Any:
    """Return what the course of a chat template depends on: the roles, and the types of the contents."""
    if isinstance(prompt, str):
        return None
    return tuple((message.get("role"), type(message.get("content")).__name__) for message in prompt)


def _read_first(where: str, reading: Reading, system_message: str, tokenize: Tokenize) -> int:
    """Return the number of tokens that a model reads of the first row of a kind."""
    where = f"the `{TEACHER_PROMPT}` of {where}" if reading.is_own else where
    prompt, system_prompt = reading.prompt, reading.system_prompt
    try:
        (ids,) = tokenize([with_system_prompt(prompt, system_prompt, system_message)])
        bare = tokenize([prompt])[0] if system_prompt and not isinstance(prompt, str) else None
    except ValueError as error:
        raise ValueError(f"In {where}: {error}") from error
    if ids == bare:
        raise ignored_refusal(SYSTEM_PROMPTS[reading.role], str(system_prompt), where)
    return len(ids)


def check_lengths(
    rows: Iterator[Row],
    first_lengths: Mapping[Any, int],
    generator: OptimalSamplingGenerator,
    tokenize: Mapping[bool, Tokenize],
    pair: Pair,
) -> None:
    """Refuse rows that leave no room for a token, or hold none, as one of the models reads them.

    Each token takes at least a byte, so that only rows with many bytes need to be tokenized.

    Args:
        rows: prompts and where they stand.
        first_lengths: of `check_shapes`: more than all that a template adds.
        generator: the trainer's.
        tokenize: see `Tokenize`; at True that of the teacher's own prompts, at False that of all others.
        pair: says what the models can read.

    Raises:
        ValueError: naming the row.
    """
    batches: dict[Any, list[tuple[str, Reading]]] = {}

    def check(batch: list[tuple[str, Reading]]) -> None:
        first = batch[0][1]
        prompts = [with_system_prompt(one.prompt, one.system_prompt, generator.system_message) for _, one in batch]
        for (where, _), ids in zip(batch, tokenize[first.is_own](prompts), strict=True):
            check_prompt(ids, pair.context, pair.vocabulary, f"in {where}", first.role)

    for row in rows:
        for reading in readings(row, generator):
            size, system = _bytes(reading.prompt), len((reading.system_prompt or "").encode())
            if size and size + system + first_lengths.get(reading.kind, pair.context) < pair.context:
                continue
            batch = batches.setdefault((reading.role, reading.is_own, is_chat(reading.prompt)), [])
            batch.append((row.where, reading))
            if len(batch) == AT_ONCE:
                check(batch)
                batch.clear()
    for batch in filter(None, batches.values()):
        check(batch)


def _bytes(prompt: Any) -> int:
    """Return the size of a prompt's own text."""
    contents = [prompt] if isinstance(prompt, str) else [message.get("content") for message in prompt]
    return sum(len(str(content or "").encode()) for content in contents)
