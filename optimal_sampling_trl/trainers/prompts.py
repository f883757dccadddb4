"""The prompts of a trainer's data sets: refused before the first step where a row cannot be read.

A row that is drawn after hours would stop a run that could have been refused at once. Data that is streamed cannot be
looked through, and is checked batch by batch as it comes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from jinja2 import TemplateError

from ..pairing import Pair, check_prompt, template_refusal, warn_of_templates, with_system_prompt
from ..pairing.prompts import SYSTEM_PROMPTS, ignored_refusal
from .engines.base import MixtureGeneration, tokenizer_of
from .generator import OptimalSamplingGenerator

AT_ONCE = 256
"""Prompts that are tokenized at a time."""

Tokenize = Callable[[list[Any]], list[list[int]]]
"""The trainer's way from prompts, texts or chats, to token ids; chats and texts in calls of their own."""


class Row(NamedTuple):
    """A prompt and where it stands."""

    where: str
    prompt: Any


def is_chat(prompt: Any) -> bool:
    """Tell whether a prompt is a list of messages."""
    return isinstance(prompt, list) and all(isinstance(message, dict) for message in prompt)


def rows_of(data: Any, name: str) -> Iterator[Row]:
    """The prompts of a trainer's data set or sets, but of those that are streamed.

    Args:
        data: a data set, a dictionary of some, or None.
        name: the trainer's argument.
    """
    if isinstance(data, Mapping):
        for key, part in data.items():
            yield from rows_of(part, f"{name}[{key!r}]")
    elif hasattr(data, "__len__") and "prompt" in (getattr(data, "column_names", None) or ()):
        for index, prompt in enumerate(data["prompt"]):
            yield Row(f"row {index} of `{name}`", prompt)


def role_prompts(generator: OptimalSamplingGenerator) -> dict[str, str | None]:
    """The system prompt of each model that reads prompts of its own."""
    prompts = {"teacher": generator.teacher_system_prompt, "student": generator.theta_system_prompt}
    return prompts if generator.two_prompts else {"student": generator.theta_system_prompt}


def check_shapes(rows: Iterator[Row], generator: OptimalSamplingGenerator, tokenize: Tokenize) -> dict[Any, int]:
    """Refuse rows that are no prompt, have a system message too many, or that the chat template does not render.

    A template looks at the roles of a chat, and seldom at its contents: one chat of each succession of roles is
    rendered for each model.

    Args:
        rows: prompts and where they stand.
        generator: the trainer's.
        tokenize: see `Tokenize`.

    Returns:
        for each shape of prompt the most tokens that one of the models reads of its first row.

    Raises:
        ValueError: naming the row, and the setting that does not go with it.
    """
    longest: dict[Any, int] = {}
    for where, prompt in rows:
        if not isinstance(prompt, str) and not is_chat(prompt):
            kind = f"{str(prompt)[:60]!r} ({type(prompt).__name__})"
            raise ValueError(f"The prompt in {where} is {kind}; wanted a text or a list of messages. Mend or drop it.")
        if not prompt:
            raise ValueError(f"The prompt in {where} is empty; wanted at least one token. Drop it.")
        if (shape := shape_of(prompt)) not in longest:
            longest[shape] = max(_read_first(where, prompt, generator, tokenize))
    return longest


def shape_of(prompt: Any) -> Any:
    """Return what a chat template's course depends on: the roles, and of what type the contents are."""
    if isinstance(prompt, str):
        return None
    return tuple((message.get("role"), type(message.get("content")).__name__) for message in prompt)


def _read_first(where: str, prompt: Any, generator: OptimalSamplingGenerator, tokenize: Tokenize) -> Iterator[int]:
    """The number of tokens that each model reads of the first row of a shape."""
    for role, system_prompt in role_prompts(generator).items():
        try:
            messages = with_system_prompt(prompt, system_prompt, generator.system_message)
            (ids,) = tokenize([messages])
            bare = tokenize([prompt])[0] if system_prompt and not isinstance(prompt, str) else None
        except ValueError as error:
            raise ValueError(f"In {where}: {error}") from error
        if ids == bare:
            raise ignored_refusal(SYSTEM_PROMPTS[role], str(system_prompt), where)
        yield len(ids)


def check_lengths(
    rows: Iterator[Row],
    longest: Mapping[Any, int],
    generator: OptimalSamplingGenerator,
    tokenize: Tokenize,
    pair: Pair,
) -> None:
    """Refuse rows that leave no room for a token, or hold none, as one of the models reads them.

    No token has less than a byte of its own, so that only rows which are long in bytes need to be tokenized.

    Args:
        rows: prompts and where they stand.
        longest: of `check_shapes`: more than all that a template adds.
        generator: the trainer's.
        tokenize: see `Tokenize`.
        pair: says what the models can read.

    Raises:
        ValueError: naming the row.
    """
    batches: dict[bool, list[Row]] = {False: [], True: []}
    system = max(len((text or "").encode()) for text in role_prompts(generator).values())
    for row in rows:
        size = _bytes(row.prompt)
        if size and size + system + longest.get(shape_of(row.prompt), pair.context) < pair.context:
            continue
        batch = batches[is_chat(row.prompt)]
        batch.append(row)
        if len(batch) == AT_ONCE:
            _check_batch(batch, generator, tokenize, pair)
            batch.clear()
    for batch in filter(None, batches.values()):
        _check_batch(batch, generator, tokenize, pair)


def _check_batch(rows: Sequence[Row], generator: OptimalSamplingGenerator, tokenize: Tokenize, pair: Pair) -> None:
    for role, system_prompt in role_prompts(generator).items():
        prompts = [with_system_prompt(row.prompt, system_prompt, generator.system_message) for row in rows]
        for row, ids in zip(rows, tokenize(prompts), strict=True):
            check_prompt(ids, pair.context, pair.vocabulary, f"in {row.where}", role)


def _bytes(prompt: Any) -> int:
    """The size of a prompt's own text."""
    contents = [prompt] if isinstance(prompt, str) else [message.get("content") for message in prompt]
    return sum(len(str(content or "").encode()) for content in contents)


TrlTrainer: Any = object
"""The TRL trainer that follows in the method resolution order; Any, so that mypy lets its attributes pass."""


class PromptReader(TrlTrainer):
    """Base of the trainers: checks the prompts of their data sets, and gives each model its own."""

    generator: OptimalSamplingGenerator
    _has_compared_templates = False

    def _check_shapes(self) -> dict[Any, int]:
        """See `prompts.check_shapes`; one process looks for all."""
        if not self.accelerator.is_main_process:
            return {}
        return check_shapes(self._rows(), self.generator, self._token_ids)

    def _check_lengths(self, longest: dict[Any, int], engine: MixtureGeneration) -> None:
        """See `prompts.check_lengths`; warn where the teacher has another chat template."""
        if self.accelerator.is_main_process and engine.pair is not None:
            check_lengths(self._rows(), longest, self.generator, self._token_ids, engine.pair)
            if any(shape is not None for shape in longest):
                self._compare_templates(engine.pair)

    def _rows(self) -> Iterator[Row]:
        """The prompts of all data sets that are not streamed."""
        yield from rows_of(self.train_dataset, "train_dataset")
        yield from rows_of(self.eval_dataset, "eval_dataset")

    def _token_ids(self, prompts: list[Any]) -> list[list[int]]:
        return self._tokenize_prompts(prompts)[0]

    def _compare_templates(self, pair: Pair) -> None:
        """Warn once of the teacher's own chat template."""
        if not self._has_compared_templates:
            self._has_compared_templates = True
            warn_of_templates(pair.teacher, pair.teacher_template, pair.tokenizer, stacklevel=8)

    def _tokenize_prompts(self, prompts: list[Any]) -> Any:
        """Tokenize as TRL does, and explain what a chat template raises."""
        try:
            return super()._tokenize_prompts(prompts)
        except (TemplateError, TypeError) as error:
            if not is_chat(prompts[0]):
                raise
            refusals = [self._template_refusal(prompt, error) for prompt in prompts]
            raise next((refusal for refusal in refusals if refusal is not None), error) from error

    def _template_refusal(self, messages: list[Any], error: Exception) -> ValueError | None:
        """Make the error for one chat of a batch; None where the template takes it."""
        try:
            super()._tokenize_prompts([messages])
        except (TemplateError, TypeError) as reason:
            texts = {name: getattr(self.generator, name) for name in SYSTEM_PROMPTS.values()}
            head = str(messages[0].get("content")) if messages else ""
            setting = next((name for name, text in texts.items() if text and text in head), None)
            return template_refusal(reason, messages, tokenizer_of(self.processing_class), "The prompt", setting)
        return None

    def _with_system_prompts(self, inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Give TRL the student's prompts and the engine the teacher's, tokenized as TRL would."""
        generator = self.generator

        def put_before(example: dict[str, Any], system_prompt: str | None) -> Any:
            return with_system_prompt(example["prompt"], system_prompt, generator.system_message)

        if self.vllm_generation.pair is not None and is_chat(inputs[0]["prompt"]):  # of streamed data; once
            self._compare_templates(self.vllm_generation.pair)
        self.vllm_generation.teacher_prompts = None
        if generator.two_prompts:
            prompts = [put_before(example, generator.teacher_system_prompt) for example in inputs]
            self.vllm_generation.teacher_prompts = self._token_ids(prompts)
        return [{**example, "prompt": put_before(example, generator.theta_system_prompt)} for example in inputs]
