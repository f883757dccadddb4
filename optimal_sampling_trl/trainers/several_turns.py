"""The part of a trainer whose completions have several turns: they call tools, act in an environment, or are made by
the user's `rollout_func`.

TRL's own loop runs the tools. Here each later turn is sampled as its row was from the start, from the student alone or
from the mixture, and processes whose completions have ended wait for those of the others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from accelerate.utils import gather_object

from ..rollouts.rollout import Rollout
from .engines.turns import TurnPrompt
from .prompt_reader import PromptReader

SEVERAL_TURNS = ("tools", "environment_factory", "rollout_func")
"""Arguments of TRL's trainers with which completions may have several turns."""


class SeveralTurns(PromptReader):
    """Base of the trainers: samples the later turns of completions.

    Attributes:
        turn_makers: those of `SEVERAL_TURNS` that were passed.
    """

    turn_makers: tuple[str, ...] = ()

    @property
    def calls_tools(self) -> bool:
        """True where TRL's loop of tools makes the turns."""
        return "tools" in self.turn_makers or "environment_factory" in self.turn_makers

    def _take_turn_makers(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Note what makes several turns among TRL's arguments; None and no tools at all do not.

        Returns:
            the arguments, in which our own function calls the user's `rollout_func`.
        """
        self.turn_makers = tuple(name for name in SEVERAL_TURNS if arguments.get(name))
        given = {name: value for name, value in arguments.items() if name not in SEVERAL_TURNS or value is not None}
        if "rollout_func" in given:
            given["rollout_func"] = self._in_step(given["rollout_func"])
        return given

    def _check_turns(self) -> None:
        """Refuse what the later turns of a completion cannot be sampled with."""
        if not self.turn_makers:
            return
        maker = self.turn_makers[0]
        if self.args.max_completion_length is None:
            raise ValueError(
                f"`{maker}` was passed and `max_completion_length` is None; wanted the most tokens of all turns of a "
                "completion together, those of tools included. Set it."
            )
        if self.generator.two_rounds and (makers := self._row_makers()):
            raise ValueError(
                f"`{makers[0]}` was passed and {self.generator.two_rounds_setting()}: an environment belongs to a row "
                "of the whole batch, which is then sampled in two parts. Drop one of the two."
            )

    def _row_makers(self) -> list[str]:
        """Return those of the turns' makers that treat each row of a batch in its own way."""
        return [name for name in self.turn_makers if name != "tools"]

    def _check_two_prompts(self) -> None:
        """Refuse a teacher with another prompt where an environment adds to that of the student."""
        super()._check_two_prompts()
        if makers := self._row_makers():
            raise ValueError(
                f"`{makers[0]}` was passed, and the teacher reads another prompt than the student: what an "
                "environment adds to a prompt reaches the student's alone. Give both one prompt, or use `tools`."
            )

    def _tool_call_loop(self, prompts: list[Any], prompt_ids: list[list[int]], *further: Any) -> Any:
        """Run TRL's loop on prompts that know their rows, and then wait for the other processes'."""
        known = [TurnPrompt(ids, row) for row, ids in enumerate(prompt_ids)]
        result = super()._tool_call_loop(prompts, known, *further)
        self._wait_for_turns()
        return result

    def _generate_single_turn(self, prompt_ids: list[list[int]], *further: Any, **named: Any) -> Any:
        """Sample as TRL does; before a later turn all processes meet."""
        if any(isinstance(ids, TurnPrompt) for ids in prompt_ids):
            self._any_samples(True)
        return super()._generate_single_turn(prompt_ids, *further, **named)

    def _any_samples(self, here: bool) -> bool:
        """Tell whether a process samples another turn; each asks, once a turn, what it does itself."""
        return any(gather_object([here])) if self.accelerator.num_processes > 1 else here

    def _wait_for_turns(self) -> None:
        """Take part in the other processes' turns, without a prompt, until they have sampled the last."""
        while self._any_samples(False):
            self.vllm_generation.generate([], None, 1)

    def _in_step(self, rollout_func: Callable[..., Any]) -> Callable[..., Any]:
        """Let a `rollout_func` sample its turns with `sample_turn`, in step with the other processes."""

        def make(prompts: list[Any], trainer: Any) -> Any:
            self.vllm_generation.begin(len(prompts))
            made = rollout_func(prompts, trainer)
            self._wait_for_turns()
            return made

        return make

    def sample_turn(self, prompt_ids: Sequence[Sequence[int]], rows: Sequence[int]) -> list[Rollout]:
        """Sample one turn of some completions of the batch, for a `rollout_func`.

        Args:
            prompt_ids: for each of them all that the student has read: the row's prompt, and in a later turn the
                completion so far and what the environment added.
            rows: their numbers among the prompts that `rollout_func` was given, each once.

        Returns:
            the turns. A turn ends with an end-of-sequence token or where the completion is `max_completion_length`
            tokens long.

        Raises:
            ValueError: on a row that there is not, or is there twice, and where a completion has no room for a token.
        """
        engine = self.vllm_generation
        asked = [TurnPrompt(ids, row) for ids, row in zip(prompt_ids, rows, strict=True)]
        unknown = [row for row in rows if not 0 <= row < len(engine.turns)]
        if unknown or len(set(rows)) < len(rows):
            raise ValueError(
                f"`rows` is {list(rows)}; wanted numbers from 0 to {len(engine.turns) - 1}, each once: the prompts "
                "of this batch in `rollout_func`."
            )
        before = [len(turns) for turns in engine.turns]
        self._any_samples(True)
        engine.generate(asked, None, 1)
        full = [row for row in rows if len(engine.turns[row]) == before[row]]
        if full:
            raise ValueError(
                f"The completion of row {full[0]} is as long as `max_completion_length` allows "
                f"({self.args.max_completion_length} tokens); wanted room for another. End the row before this turn."
            )
        return [engine.turns[row][-1] for row in rows]
