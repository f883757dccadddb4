"""The base of a trainer's three engines: the mixture of each completion, and the rollouts of its turns."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from random import Random
from typing import Any, TypeVar

import torch
from accelerate.utils import gather_object
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ...mixture import Mixture
from ...options import unknown_option
from ...pairing import Pair
from ...rollouts.dense import Dense
from ...rollouts.request import Request, Sampling
from ...rollouts.rollout import Rollout, warn_of_context
from ..generator import OptimalSamplingGenerator
from .endings import mark_endings
from .turns import TurnPrompt, rows_of

T = TypeVar("T")
TrlReturns = tuple[Sequence[list[int]], list[list[int]], list["LogThetas"], None]
"""Prompts, completions and log-probabilities, as TRL's own `generate` returns them, and no ids of further tokens."""


@dataclass(frozen=True)
class MixturePlan:
    """The mixture that each completion of a batch is sampled from; asked anew for each batch.

    Args:
        generator: the user's settings.
        group: how many completions make a group.
        theta_count: how many of each group come from the student alone.
        training: whether the trainer trains; an evaluation samples from the student alone.
        progress: the share of training that is done, in [0, 1].
        step: number of updates so far; rows that do not divide evenly among the processes rotate with it.
        dense: the dense records that each completion shall carry.
        teacher_prompts: whether rows have a prompt of the teacher's own.
        annealed: for each row of all processes in the next call, the share of the way from the mixture to the student
            alone, in [0, 1]; None leaves to `theta_count` which rows are the student's.
        one_prompt: whether a group's rows share a prompt. Elsewhere the student's rows begin at another place in each
            step, so that a data set that is not shuffled does not give them the same prompts in every epoch.
        entropy_scale: the scale of the entropy gate, None for the mixture's own.
        evaluation_reads_teacher: whether an evaluation reads the recorded log t, which it does not have otherwise.
        will_evaluate_alone: whether the trainer is set to evaluate, and no evaluation needs the teacher.
        teacher_alone: whether the teacher alone samples, to be measured.
    """

    generator: OptimalSamplingGenerator
    group: Callable[[], int]
    theta_count: Callable[[], int]
    training: Callable[[], bool]
    progress: Callable[[], float]
    step: Callable[[], int] = lambda: 0
    dense: Callable[[], Dense | None] = lambda: None
    teacher_prompts: bool = False
    annealed: Sequence[float] | None = None
    one_prompt: bool = True
    entropy_scale: Callable[[], float | None] = lambda: None
    evaluation_reads_teacher: bool = False
    will_evaluate_alone: bool = False
    teacher_alone: bool = False

    @property
    def two_prompts(self) -> bool:
        """True where the teacher and the student read different prompts."""
        return self.teacher_prompts or self.generator.two_prompts

    @property
    def needs_teacher(self) -> bool:
        """True where the teacher samples, or what it records is read."""
        return self.training() or self.teacher_alone or self.evaluation_reads_teacher

    def mixtures(self, rows: int, first: int, processes: int = 1) -> list[Mixture]:
        """Return the mixture of each of `rows` completions, which start at row `first` of the batch of all processes.

        Args:
            rows: number of completions.
            first: position of the first of them.
            processes: number of processes whose completions these are, equally many of each.
        """
        if self.teacher_alone:
            return [Mixture.teacher_only()] * rows
        if not self.training():
            return [Mixture.theta_only()] * rows
        mixture = self.generator.current_mixture(self.progress(), self.entropy_scale())
        of_process, places = rows // processes, range(first, first + rows)
        if self.annealed is None:
            return [mixture.anneal(float(self._is_of_theta(row, of_process))) for row in places]
        return [mixture.anneal(self.annealed[row]) for row in places]

    def _is_of_theta(self, row: int, share: int) -> bool:
        """Return True for a row of the batch that the student samples alone.

        The student's rows stand first in a group that shares a prompt. A group that several processes of `share` rows
        hold is cut where they meet; each part has its share of the student's rows, first in the part. Which part gets
        one more, where they do not divide, turns with the group and the step.
        """
        group, alone = self.group(), self.theta_count()
        number, place = divmod(row, group)
        process = row // share * share - number * group  # where the process's rows begin, counted from the group's
        begin, end = max(process, 0), min(process + share, group)
        turn = (number + self.step()) % group
        first = 0 if self.one_prompt else _first_place(self.step(), end - begin)
        count = (end * alone + turn) // group - (begin * alone + turn) // group
        return (place - begin - first) % (end - begin) < count


@lru_cache(maxsize=16)
def _first_place(step: int, places: int) -> int:
    """The place among others at which the student's rows begin in a step; drawn once for all rows of a batch."""
    return Random(step).randrange(places)


class MixtureGeneration:
    """The base of all engines: requests from TRL's prompts, and the turns of a batch until they are popped.

    A completion has one turn, or several where it calls tools: then the student's prompt of a later turn is a
    `TurnPrompt`, which knows its row. What samples a row and what its teacher reads is settled once, for all turns.

    `pair` is what the models share; None in a process that does not speak to the server.

    Args:
        plan: which mixture each completion is sampled from.
        **trl_arguments: what TRL passes to its `VLLMGeneration`.

    Attributes:
        engine: words for what samples.
        turns: rollouts of each row of this process's batch, one for each turn.
        seconds: time that the engine took for them.
        pushes: how often the trained student came into the engine.
    """

    engine: str
    pair: Pair | None = None

    def __init__(self, plan: MixturePlan, **trl_arguments: Any) -> None:
        self.plan = plan
        self.sampling = _sampling(trl_arguments)
        self.longest: int | None = trl_arguments["max_completion_length"]  # of all turns, tools' tokens too
        self.accelerator = trl_arguments["accelerator"]
        self.teacher_prompts: Sequence[list[int]] | None = None  # of this process
        self.turns: list[list[Rollout]] = []
        self.mixtures: list[Mixture] = []  # of this process's rows
        self.seconds = 0.0
        self.pushes = 0
        self._has_told_of_context = False

    def sync_weights(self) -> None:
        """Bring the trained student into the engine; TRL calls it where the trainer's step has moved."""
        self.pushes += 1

    def has_changed(self) -> bool:
        """Return True where the engine's student is another than the trained one."""
        return False

    def types(self) -> set[torch.dtype]:
        """Return the types in which the engine computes."""
        raise NotImplementedError

    def begin(self, rows: int) -> None:
        """Start a batch of so many rows of this process, and settle what samples each of them."""
        self.mixtures = self.plan.mixtures(rows, self.accelerator.process_index * rows)
        self.turns = [[] for _ in range(rows)]
        self.seconds = 0.0

    def pop_turns(self) -> list[list[Rollout]]:
        """The turns of the batch, once."""
        turns, self.turns = self.turns, []
        return turns

    def make_requests(self, prompts: Sequence[list[int]]) -> list[Request]:
        """A request for each prompt of this process; prompts that are no `TurnPrompt` begin a batch."""
        if not all(isinstance(prompt, TurnPrompt) for prompt in prompts):
            self.begin(len(prompts))
        dense = self.plan.dense()
        needs_teacher = self.plan.needs_teacher or dense is not None
        requests = []
        for prompt, row in zip(prompts, rows_of(prompts), strict=True):
            tail = self._tail(prompt, row)
            teacher = prompt if self.teacher_prompts is None else [*self.teacher_prompts[row], *tail]
            sampling = replace(self.sampling, max_tokens=max(self._room(tail), 1))
            requests.append(Request(list(teacher), list(prompt), self.mixtures[row], sampling, dense, needs_teacher))
        return requests

    def _tail(self, prompt: list[int], row: int) -> list[int]:
        """Tokens that a completion has before this turn, those of tools included."""
        return prompt[len(self.turns[row][0].theta_prompt_ids) :] if self.turns[row] else []

    def _room(self, tail: Sequence[int]) -> int:
        """Number of tokens that a turn may still have; TRL cuts off what is above."""
        most = self.sampling.max_tokens
        return most if self.longest is None or not tail else min(most, self.longest - len(tail))

    def take(self, prompts: Sequence[list[int]], rollouts: Sequence[Rollout], seconds: float) -> TrlReturns:
        """Keep the rollouts of a call as the turns of their rows; a turn without room has no token.

        Warn once, of the first call whose completions the context cut short.

        Returns:
            what TRL's own `generate` does; see `as_trl_returns`.
        """
        rows = rows_of(prompts)
        rooms = [self._room(self._tail(prompt, row)) for prompt, row in zip(prompts, rows, strict=True)]
        if self.pair is not None and not self._has_told_of_context:
            setting = "max_completion_length" if self.sampling.max_tokens == self.longest else "max_tokens"
            self._has_told_of_context = warn_of_context(rollouts, rooms, self.pair.context, setting)
        fits = [room > 0 for room in rooms]
        for row, rollout, is_kept in zip(rows, rollouts, fits, strict=True):
            if is_kept:
                self.turns[row].append(rollout)
        self.seconds += seconds
        return as_trl_returns(prompts, [one if is_kept else None for one, is_kept in zip(rollouts, fits)])

    def most_read(self) -> int:
        """Most tokens that the student may have read before a turn, so that both models can go on by one."""
        context = sys.maxsize if self.pair is None else self.pair.context
        firsts = [turns[0] for turns in self.turns if turns]
        return context - max([0, *(len(one.prompt_ids) - len(one.theta_prompt_ids) for one in firsts)])

    def unread_settings(self) -> dict[str, str]:
        """Return the fields of TRL's configuration that this engine does not read, and what would read each."""
        return {}

    def close(self) -> None:
        """Free the engine. Doing so twice is fine."""
        raise NotImplementedError


def on_all_ranks(work: Callable[[], T], accelerator: Any) -> T:
    """Return what `work` returns in this process; where it raises in one process, raise in all.

    Otherwise the others would wait for that one for ever.

    Raises:
        RuntimeError: where it raised in another process, saying which and what.
    """
    result, error = None, None
    try:
        result = work()
    except Exception as caught:
        error = caught
    message = None if error is None else f"{type(error).__name__}: {error}"
    messages = gather_object([message]) if accelerator.num_processes > 1 else [message]
    if error is not None:
        raise error
    for process, reason in enumerate(messages):
        if reason is not None:
            raise RuntimeError(f"Process {process} could not do its part, and all stop: {reason}")
    return result  # type: ignore[return-value]


def tokenizer_of(processing_class: Any) -> PreTrainedTokenizerBase:
    """Return a trainer's tokenizer; a processor of several kinds of input holds it inside."""
    return getattr(processing_class, "tokenizer", processing_class)


def refuse_images(images: list[Any] | None) -> None:
    """Refuse images.

    Raises:
        ValueError: where there are any.
    """
    if images is not None:
        raise ValueError(
            "Rollouts from the mixture take text alone; the dataset, or an answer of a tool, has images. Drop them."
        )


class LogThetas(Sequence[tuple[float]]):
    """log θ of T tokens as TRL reads log-probabilities: one in a row of its own for each token.

    The rows are made while they are read: a list for each token would be millions of objects a batch.
    """

    def __init__(self, log_theta: Float[Tensor, " T"]) -> None:
        self.values = log_theta.tolist()

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: Any) -> Any:
        return list(zip(self.values[index])) if isinstance(index, slice) else (self.values[index],)

    def __iter__(self) -> Iterator[tuple[float]]:
        return zip(self.values)


def as_trl_returns(prompts: Sequence[list[int]], rollouts: Sequence[Rollout | None]) -> TrlReturns:
    """Return what TRL's own `generate` does, with log θ for the log-probabilities of each token.

    TRL corrects the difference between the engine and the trainer with them, and would take q, the mixture or a
    truncation, for a defect.

    Args:
        prompts: what the student read.
        rollouts: what followed; None is no token.
    """
    log_thetas = [LogThetas(torch.empty(0) if one is None else one.log_theta) for one in rollouts]
    return prompts, mark_endings(rollouts), log_thetas, None


def check_generation_kwargs(extra: Mapping[str, Any]) -> None:
    """Refuse entries of TRL's `generation_kwargs` that no engine reads, before a model is loaded.

    Raises:
        ValueError: naming the entry, and the nearest known one or the reason.
    """
    for name in extra:
        if name not in Sampling.__dataclass_fields__:
            raise ValueError(unknown_option("entry of `generation_kwargs`", name, Sampling.__dataclass_fields__))
        if name == "temperature":
            raise ValueError(
                "`generation_kwargs` has a `temperature`. Set the trainer's, which its loss uses as well."
            )
        if name == "seed":
            raise ValueError(
                "`generation_kwargs` has a `seed`, which would make the completions of a group equal. "
                "Set the trainer's `seed`."
            )


def _sampling(trl_arguments: dict[str, Any]) -> Sampling:
    """TRL's settings of generation as ours; `generation_kwargs` may add or replace some."""
    if trl_arguments["structured_outputs_regex"] is not None:
        raise ValueError("`vllm_structured_outputs_regex` is not supported with rollouts from the mixture. Drop it.")
    extra = trl_arguments["generation_kwargs"] or {}
    check_generation_kwargs(extra)
    sampling = Sampling(
        max_tokens=extra.get("max_tokens", trl_arguments["max_completion_length"]),
        temperature=trl_arguments["temperature"],
        top_p=trl_arguments["top_p"],
        top_k=trl_arguments["top_k"],
        min_p=trl_arguments["min_p"] or 0.0,
        repetition_penalty=trl_arguments["repetition_penalty"],
    )
    if sampling.temperature == 0:
        raise ValueError("`temperature` is 0; a token that was not drawn has no probability to train with. Raise it.")
    return replace(sampling, **extra)
