"""A request to a backend: one completion of one prompt, with its mixture and its sampling settings."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..mixture import Mixture
from ..options import check_flag, check_number, check_whole, suggest_arguments
from .dense import Dense

LAST_SEED = 2**63 - 1
"""Largest seed that both engines accept."""


@suggest_arguments()
@dataclass(frozen=True)
class Sampling:
    """Settings by which tokens are drawn from the mixture, in vLLM's words and with vLLM's meaning.

    Args:
        max_tokens: the most tokens to generate; a completion also ends with the models' context.
        temperature: acts on both models before α is solved. 0 takes the likeliest token of the mixture solved at 1,
            and `top_p`, `top_k` and `min_p` then cut nothing off.
        top_p: keep the likeliest tokens of q whose mass reaches this share; 1 keeps all.
        top_k: keep the k likeliest tokens of q; -1 or 0 keeps all.
        min_p: keep tokens with at least this share of the likeliest token's probability under q.
        repetition_penalty: divides (or, where negative, multiplies) the mixture's logit of each token seen before.
        stop: texts that end a completion; the text is cut before the first, the tokens are kept. No text holds a
            special token of the tokenizer, and an engine refuses one.
        seed: from 0 to 2^63 - 1; makes the completion the same in any batch; None draws from torch's global generator.
        ignore_eos: go on after an end-of-sequence token.

    Raises:
        ValueError: on a number outside of its range, or a stop that is no text.

    Example:
        ```python
        Sampling(max_tokens=64, temperature=0.7, stop=("\\n",))
        ```
    """

    max_tokens: int = 100
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int | None = None
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "max_tokens", check_whole("Sampling", "max_tokens", self.max_tokens, 1))
        check_number("Sampling", "temperature", self.temperature, 0.0)
        likeliest = "Pass one; for the likeliest token alone set `temperature=0`."
        check_number("Sampling", "top_p", self.top_p, high=1.0, above=0.0, advice=likeliest)
        object.__setattr__(self, "top_k", check_whole("Sampling", "top_k", self.top_k, -1, "-1 keeps all tokens."))
        check_number("Sampling", "min_p", self.min_p, 0.0, 1.0)
        no_penalty = "Pass one; 1 is no penalty."
        check_number("Sampling", "repetition_penalty", self.repetition_penalty, above=0.0, advice=no_penalty)
        if self.seed is not None:
            object.__setattr__(self, "seed", check_whole("Sampling", "seed", self.seed, 0, high=LAST_SEED))
        check_flag("Sampling", "ignore_eos", self.ignore_eos)
        if not isinstance(self.stop, tuple | list) or not all(isinstance(stop, str) and stop for stop in self.stop):
            raise ValueError(
                f"Sampling: `stop` is {self.stop!r}; wanted a tuple of texts, none of them empty. "
                "For a single one write `stop=('...',)`."
            )

    def cut(self, text: str) -> str:
        """Cut a text before the first stop text in it."""
        return text[: min([text.find(stop) for stop in self.stop if stop in text], default=len(text))]

    @property
    def keeps_all(self) -> bool:
        """True where no token is cut off or penalised, so that log q is that of the mixture itself."""
        return self.top_p == 1.0 and self.top_k <= 0 and self.min_p == 0.0 and self.repetition_penalty == 1.0


@dataclass(frozen=True)
class Request:
    """One completion to sample.

    Args:
        prompt_ids: token ids that the teacher reads.
        theta_prompt_ids: token ids that the student reads; equal to `prompt_ids` unless the two prompts differ.
        mixture: rule by which α is chosen.
        sampling: settings by which tokens are drawn.
        dense: dense records that are wanted of each token; None is none.
        needs_teacher: False where the student samples alone and nobody reads log t, which is then NaN. A fused engine
            runs the student alone where all requests of a call say so.

    Raises:
        ValueError: on a mixture or dense records without the teacher.
    """

    prompt_ids: list[int]
    theta_prompt_ids: list[int]
    mixture: Mixture = field(default_factory=Mixture)
    sampling: Sampling = field(default_factory=Sampling)
    dense: Dense | None = None
    needs_teacher: bool = True

    def __post_init__(self) -> None:
        if not self.needs_teacher and (not self.mixture.is_theta_only or self.dense is not None):
            raise ValueError(
                f"Request: `needs_teacher` is False with {self.mixture} and `dense` {self.dense}; wanted α 0 "
                "and no dense records. Drop `needs_teacher`, or pass `Mixture.theta_only()` and no `dense`."
            )
