"""The prompts of a data set or a list, each with what the teacher reads in its place."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, repeat
from typing import Any

from ..options import shown
from .prompts import TEACHER_PROMPT

MOST_KEYS = 8
"""Most keys of a dictionary that an error shows."""
NO_SLICE = "A slice of a data set is a dictionary of its columns: pass `data.select(range(n))`."
"""Advice to whoever passes a dictionary in place of a data set."""


def check_not_keyed(name: str, given: Any, wanted: str, advice: str = NO_SLICE) -> None:
    """Refuse a dictionary and a data frame: a loop over one gives its keys, which would be sampled as prompts.

    Args:
        name: what the error calls it.
        given: what was passed.
        wanted: what was wanted.
        advice: ends the error, and tells the user how to go on.

    Raises:
        ValueError: naming the keys.
    """
    keys = given if isinstance(given, Mapping) else getattr(given, "columns", None)
    if keys is not None:
        named = ", ".join(map(shown, islice(keys, MOST_KEYS)))
        raise ValueError(f"{name} is keyed by {named or 'nothing'}; wanted {wanted}. {advice}")


@dataclass(frozen=True)
class PromptRows(Sequence[tuple[Any, Any]]):
    """Each prompt with what the teacher reads in its place, or None; a column on disk is read as it is asked for.

    Args:
        prompts: texts, token ids or messages.
        teacher_prompts: as many, or None where the teacher has none of its own.
    """

    prompts: Sequence[Any]
    teacher_prompts: Sequence[Any] | None = None

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: Any) -> Any:
        return self.prompts[index], None if self.teacher_prompts is None else self.teacher_prompts[index]

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        return zip(self.prompts, repeat(None) if self.teacher_prompts is None else self.teacher_prompts)


def read_prompts(prompts: Iterable[Any], teacher_prompts: Sequence[Any] | None = None) -> PromptRows:
    """Read the prompts of a data set's column `prompt`, or of a list, each with the teacher's prompt or None.

    A streamed data set is read to its end.

    Args:
        prompts: a data set or a list.
        teacher_prompts: those of a list; a data set has them in the column `teacher_prompt`.

    Raises:
        ValueError: where there is no such column, or no prompt.
    """
    is_data = hasattr(prompts, "features") or hasattr(prompts, "column_names")
    if is_data and teacher_prompts is not None:
        raise ValueError(
            f"`prompts` is a data set and `teacher_prompts` was given as well; wanted its column `{TEACHER_PROMPT}`. "
            "Add the column, or pass two lists."
        )
    found, instead = _columns(prompts) if is_data else (_listed(prompts), teacher_prompts)
    if not len(found):
        raise ValueError("`prompts` is empty; wanted at least one.")
    return PromptRows(found, None if instead is None else teacher_prompts_of(instead, len(found)))


def _columns(data: Any) -> tuple[Sequence[Any], Sequence[Any] | None]:
    """Return a data set's prompts, and the teacher's where it has the column."""
    columns = getattr(data, "column_names", None)
    if isinstance(columns, dict):
        raise ValueError(f"`prompts` has the splits {', '.join(columns)}; wanted one of them. Pass data[split].")
    if columns is not None and "prompt" not in columns:
        raise ValueError(
            f"`prompts` has the columns {', '.join(columns)}; wanted 'prompt', of texts or messages. "
            "Rename one with `rename_column`."
        )
    if hasattr(data, "__len__"):
        return data["prompt"], data[TEACHER_PROMPT] if TEACHER_PROMPT in (columns or ()) else None
    try:  # a streamed one has no length, and may not know its columns
        rows = [(row["prompt"], row.get(TEACHER_PROMPT)) for row in data]
    except KeyError as error:
        raise ValueError("`prompts` has rows without 'prompt'; wanted a column of texts or messages.") from error
    return [prompt for prompt, _ in rows], [instead for _, instead in rows]


def _listed(prompts: Iterable[Any]) -> Sequence[Any]:
    if isinstance(prompts, str):
        raise ValueError(f"`prompts` is the text {prompts[:40]!r}; wanted a data set or a list of prompts. Wrap it.")
    check_not_keyed("`prompts`", prompts, "a data set or a list of prompts")
    return prompts if isinstance(prompts, Sequence) else list(prompts)


def teacher_prompts_of(teacher_prompts: Any, count: int) -> Sequence[Any]:
    """Return the teacher's prompt of each of `count` prompts, or None for each where there are none.

    Raises:
        ValueError: on another number of them.
    """
    if teacher_prompts is None:
        return [None] * count
    found = [teacher_prompts] if isinstance(teacher_prompts, str) else teacher_prompts
    if not isinstance(found, Sequence) or len(found) != count:
        got = f"{len(found)} of them" if isinstance(found, Sequence) else shown(found)
        raise ValueError(
            f"`teacher_prompts`: got {got}; wanted one for each of the {count} prompts, None where the teacher reads "
            "the prompt itself."
        )
    return found
