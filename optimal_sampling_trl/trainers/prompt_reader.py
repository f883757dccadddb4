"""The part of a trainer that checks the prompts of its data sets, and gives each model its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from accelerate.utils import broadcast_object_list
from jinja2 import TemplateError

from ..pairing import Pair, is_chat, template_refusal, warn_of_templates, with_system_prompt
from ..pairing.prompts import SYSTEM_PROMPTS, TEACHER_PROMPT, render
from .engines.base import MixtureGeneration, tokenizer_of
from .generator import OptimalSamplingGenerator
from .prompts import Row, check_lengths, check_no_images, check_one_kind, check_shapes, rows_of

TrlTrainer: Any = object
"""The TRL trainer that follows in the method resolution order; Any, so that mypy lets its attributes pass."""


class PromptReader(TrlTrainer):
    """Base of the trainers: checks the prompts of their data sets, and gives each model its own."""

    generator: OptimalSamplingGenerator
    teacher_tokenizer: Any = None
    """Reads the teacher's own prompts; known as soon as there is an engine."""
    _has_compared_templates = False

    def _check_two_prompts(self) -> None:
        """Refuse a teacher that reads another prompt than the student; by default it may."""

    def _check_shapes(self) -> dict[Any, int]:
        """Check shapes as `prompts.check_shapes` does; one process looks for all."""
        if not self.accelerator.is_main_process:
            return {}
        return check_shapes(self._rows(), self.generator, self._token_ids)

    def _check_lengths(self, first_lengths: dict[Any, int], engine: MixtureGeneration) -> None:
        """Check lengths as `prompts.check_lengths` does; warn where the teacher has another chat template."""
        if self.accelerator.is_main_process and engine.pair is not None:
            first_lengths |= check_shapes(self._rows(), self.generator, self._own_token_ids, of_column=True)
            tokenize = {False: self._token_ids, True: self._own_token_ids}
            check_lengths(self._rows(), first_lengths, self.generator, tokenize, engine.pair)
            if any(row.teacher_prompt is None and is_chat(row.prompt) for row in self._rows()):
                self._compare_templates(engine.pair)

    def _rows(self) -> Iterator[Row]:
        """Return the prompts of all data sets that are not streamed."""
        yield from rows_of(self.train_dataset, "train_dataset")
        yield from rows_of(self.eval_dataset, "eval_dataset")

    def _set_signature_columns_if_needed(self) -> None:
        """Name the teacher's prompts among the columns that `remove_unused_columns` keeps."""
        super()._set_signature_columns_if_needed()
        if TEACHER_PROMPT not in self._signature_columns:
            self._signature_columns.append(TEACHER_PROMPT)

    def _share_teacher_tokenizer(self, engine: MixtureGeneration) -> None:
        """Keep the teacher's tokenizer; of a server's pair the main process alone knows it, and tells the others."""
        box = [None if engine.pair is None else engine.pair.teacher_tokenizer]
        if self.args.vllm_mode == "server" and self.accelerator.num_processes > 1:
            broadcast_object_list(box, from_process=0)
        self.teacher_tokenizer = box[0]

    def _token_ids(self, prompts: list[Any]) -> list[list[int]]:
        with self._in_some_environment(len(prompts)):
            return self._tokenize_prompts(prompts)[0]

    @contextmanager
    def _in_some_environment(self, count: int) -> Iterator[None]:
        """Let TRL tokenize prompts that are not those of its batch, with the tools of the first environment if any.

        Args:
            count: number of the prompts.
        """
        factories = getattr(self, "environment_factories", None)  # of GRPO alone
        if factories is None:
            yield
            return
        with patch.object(self, "_batch_environments", [next(iter(factories))] * count, create=True):
            yield

    def _own_token_ids(self, prompts: list[Any]) -> list[list[int]]:
        """Return the teacher's own prompts as its own tokenizer and chat template have them; chats or texts alone.

        Raises:
            ValueError: naming the roles of a chat that the template does not take.
        """
        if self.generator.is_own_teacher:
            return self._token_ids(prompts)
        return [self._own_ids(prompt) for prompt in prompts]

    def _own_ids(self, prompt: Any) -> list[int]:
        tokenizer, setting = self.teacher_tokenizer, self.generator.teacher_system_prompt
        if isinstance(prompt, str):
            return list(tokenizer(text=prompt)["input_ids"])
        if tokenizer.chat_template is None:
            raise ValueError(
                f"`{TEACHER_PROMPT}` holds messages, and the teacher's tokenizer {tokenizer.name_or_path!r} has no "
                "chat template. Pass texts, or save a template with the teacher."
            )
        try:
            return render(prompt, tokenizer, tools=getattr(self, "tools", None) or None, **self.chat_template_kwargs)
        except (TemplateError, TypeError) as error:
            is_set = bool(setting) and str(setting) in str(prompt[0].get("content"))
            name = SYSTEM_PROMPTS["teacher"] if is_set else None
            raise template_refusal(error, prompt, tokenizer, f"The `{TEACHER_PROMPT}`", name) from error

    def _compare_templates(self, pair: Pair) -> None:
        """Warn once of the teacher's own chat template."""
        if not self._has_compared_templates:
            self._has_compared_templates = True
            warn_of_templates(pair.teacher, pair.teacher_template, pair.tokenizer)

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
            with self._in_some_environment(1):
                super()._tokenize_prompts([messages])
        except (TemplateError, TypeError) as reason:
            texts = {name: getattr(self.generator, name) for name in SYSTEM_PROMPTS.values()}
            head = str(messages[0].get("content")) if messages else ""
            setting = next((name for name, text in texts.items() if text and text in head), None)
            return template_refusal(reason, messages, tokenizer_of(self.processing_class), "The prompt", setting)
        return None

    def _with_own_prompts(self, inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Give TRL the student's prompts and the engine the teacher's, tokenized as TRL would."""
        generator, engine = self.generator, self.vllm_generation
        rows = [
            Row(f"row {index} of the batch", self._prompt_of(example), example.get(TEACHER_PROMPT))
            for index, example in enumerate(inputs)
        ]
        check_no_images(inputs[0], "A row of the batch")
        check_one_kind(rows)
        if engine.pair is not None and is_chat(rows[0].prompt) and rows[0].teacher_prompt is None:  # of streams; once
            self._compare_templates(engine.pair)
        engine.teacher_prompts = None
        if generator.two_prompts or any(TEACHER_PROMPT in example for example in inputs):
            self._check_two_prompts()
            engine.teacher_prompts = self._teacher_ids(rows)
        system_prompt, way = generator.theta_system_prompt, generator.system_message
        return [
            {**one, "prompt": with_system_prompt(row.prompt, system_prompt, way)} if "prompt" in one or system_prompt
            else one  # an environment is not shown a prompt that TRL makes up
            for one, row in zip(inputs, rows, strict=True)
        ]  # fmt: skip

    def _prompt_of(self, example: dict[str, Any]) -> Any:
        """The prompt of a row; an environment may have it alone, and TRL then starts from an empty one."""
        if getattr(self, "environment_factories", None) is None:
            return example["prompt"]
        return example.get("prompt", [{"role": "user", "content": ""}])

    def _teacher_ids(self, rows: Sequence[Row]) -> list[list[int]]:
        """Return the token ids that the teacher reads of each row of a batch."""
        system_prompt, way = self.generator.teacher_system_prompt, self.generator.system_message
        groups: dict[tuple[bool, bool], dict[int, Any]] = {}  # by whose tokenizer reads it, and whether it is a chat
        for index, row in enumerate(rows):
            prompt = row.prompt if row.teacher_prompt is None else row.teacher_prompt
            group = groups.setdefault((row.teacher_prompt is not None, is_chat(prompt)), {})
            group[index] = with_system_prompt(prompt, system_prompt, way)
        ids: dict[int, list[int]] = {}
        for (is_own, _), prompts in groups.items():
            tokenize = self._own_token_ids if is_own else self._token_ids
            ids.update(zip(prompts, tokenize(list(prompts.values())), strict=True))
        return [ids[index] for index in range(len(rows))]
