"""A sampled completion with the record of how each of its tokens was drawn."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..losses import effective_sample_size
from ..mixture import Mixture
from ..options import MAX_MODEL_LEN
from ..user_warnings import warn_user
from .dense import DenseRecords
from .request import Request

RECORDS = ("alpha", "log_q", "log_theta", "log_teacher")
"""Numbers that each sampled token carries, in the order of an engine's records."""


@dataclass(frozen=True, eq=False, repr=False)
class Rollout:
    """One completion and its record.

    T counts the sampled tokens, an end-of-sequence token included. The records are float32 tensors on the CPU.

    Args:
        prompt_ids: token ids that the teacher read.
        theta_prompt_ids: token ids that the student read.
        completion_ids: the T sampled tokens.
        alpha: (T,) weight of the teacher at each token.
        log_q: (T,) log-probability of the token under the distribution that it was drawn from, in nats: after
            temperature, penalties and truncation. At temperature 0, under the mixture at 1 after penalties alone.
        log_theta: (T,) under the student at the sampling temperature, over the whole common vocabulary.
        log_teacher: (T,) under the teacher, likewise; NaN where the request did not need it, as in an evaluation.
        text: the completion without special tokens.
        finish_reason: `"stop"` (an end-of-sequence token or a stop text) or `"length"`.
        mixture: rule by which α was chosen.
        temperature: the sampling temperature.
        dense: dense records of the T tokens, where they were asked for.

    Raises:
        ValueError: where a record does not have one entry for each token.

    Example:
        ```python
        with OptimalSamplingV1(model_teacher="large", model_theta="small") as sampler:
            rollout = sampler.generate(["3 + 4 ="], max_tokens=8).rollouts[0]
        print(rollout.text, rollout.alpha, rollout.weight_theta.mean())
        ```
    """

    prompt_ids: list[int]
    theta_prompt_ids: list[int]
    completion_ids: list[int]
    alpha: Float[Tensor, " T"]
    log_q: Float[Tensor, " T"]
    log_theta: Float[Tensor, " T"]
    log_teacher: Float[Tensor, " T"]
    text: str
    finish_reason: str
    mixture: Mixture
    temperature: float = 1.0
    dense: DenseRecords | None = None

    def __post_init__(self) -> None:
        for name in RECORDS:
            record = getattr(self, name)
            shape = tuple(record.shape) if isinstance(record, Tensor) else None
            if shape != (len(self.completion_ids),):
                raise ValueError(
                    f"Rollout: `{name}` {f'is a {type(record).__name__}' if shape is None else f'has shape {shape}'}; "
                    f"wanted one entry for each of the {len(self.completion_ids)} tokens of "
                    "`completion_ids`."
                )
        if self.dense is not None and len(self.dense) != len(self.completion_ids):
            raise ValueError(
                f"Rollout: `dense` has records of {len(self.dense)} tokens; wanted one for each of the "
                f"{len(self.completion_ids)} tokens of `completion_ids`."
            )

    @classmethod
    def from_request(
        cls,
        request: Request,
        completion_ids: list[int],
        records: Float[Tensor, "4 T"],
        text: str,
        finish_reason: str,
        dense: DenseRecords | None = None,
    ) -> Rollout:
        """Make the rollout with which an engine answers a request.

        Args:
            request: its prompts, its mixture and its temperature become the rollout's.
            completion_ids: the T sampled tokens.
            records: a row for each of `RECORDS`, in their order. Where the request needs no teacher log t is dropped,
                and α is 0.
            text: the completion without special tokens.
            finish_reason: `"stop"` or `"length"`.
            dense: the dense records that the request asked for.
        """
        if not request.needs_teacher:  # no engine's number, since in some the student ran in the teacher's place
            alpha, log_q, log_theta, log_teacher = records.unbind(0)
            records = torch.stack([alpha * 0, log_q, log_theta, torch.full_like(log_teacher, torch.nan)])  # NaN stays
        return cls(
            prompt_ids=list(request.prompt_ids),
            theta_prompt_ids=list(request.theta_prompt_ids),
            completion_ids=completion_ids,
            **dict(zip(RECORDS, records.unbind(0), strict=True)),
            text=text,
            finish_reason=finish_reason,
            mixture=request.mixture,
            temperature=request.sampling.temperature,
            dense=dense,
        )

    def __repr__(self) -> str:
        return f"Rollout({', '.join(f'{name} {value}' for name, value in self._summary().items())})"

    def _repr_html_(self) -> str:
        """Return a small table for a notebook; the page of every token is `OptimalSamplingOutput.to_html`."""
        rows = [
            f"<tr><th>{name}</th><td>{html.escape(value)}</td></tr>" for name, value in self._summary(2000).items()
        ]
        return f"<table>{''.join(rows)}</table>"

    def _summary(self, most: int = 60) -> dict[str, str]:
        """Describe the rollout: at most `most` characters of its completion, and means over its tokens."""
        text = self.text if len(self.text) <= most else f"{self.text[:most]}..."
        means = {name: float(getattr(self, name).mean()) for name in RECORDS} if self.completion_ids else {}
        counted = {"text": repr(text), "tokens": str(len(self.completion_ids)), "finish": self.finish_reason}
        return counted | {f"mean {name}": f"{mean:.3f}" for name, mean in means.items()}

    @property
    def weight_theta(self) -> Float[Tensor, " T"]:
        """θ(x)/q(x) of each token, the weight that turns an expectation under q into one under the student.

        Where top_p, top_k or min_p cut q, E_q[θ/q] is below 1 by the student's mass that was cut off.
        """
        return torch.exp(self._log_weight(self.log_theta))

    @property
    def weight_teacher(self) -> Float[Tensor, " T"]:
        """t(x)/q(x) of each token, the weight that turns an expectation under q into one under the teacher."""
        return torch.exp(self._log_weight(self.log_teacher))

    def _log_weight(self, log_target: Tensor) -> Tensor:
        if self.temperature == 0:
            raise ValueError(
                "A rollout sampled at temperature 0 has no importance weights: its tokens were not drawn. "
                "Sample at a temperature above 0."
            )
        return log_target - self.log_q

    @property
    def mixing_weights(self) -> Float[Tensor, "T 2"]:
        """(1-α, α) of each token: the weights of the student and the teacher."""
        return torch.stack([1 - self.alpha, self.alpha], dim=1)

    @property
    def effective_sample_size(self) -> float:
        """Number of tokens drawn by the student that these T tokens are worth; see `losses.effective_sample_size`."""
        return float(effective_sample_size(self._log_weight(self.log_theta).double()))


class UnsolvedError(ValueError):
    """A model returned NaN, or the two share no token, in some requests of a call; the others were sampled.

    Args:
        rollouts: the call's rollouts in their order, None for each request that failed.
        failed: the reason of each failure, by the request's number.

    Example:
        ```python
        with OptimalSamplingV1(model_teacher="large", model_theta="small") as sampler:
            try:
                rollouts = sampler.generate(["3 + 4 =", "1 + 1 ="], max_tokens=8).rollouts
            except UnsolvedError as error:
                rollouts = [rollout for rollout in error.rollouts if rollout is not None]
        assert len(rollouts) == 2
        ```
    """

    def __init__(self, rollouts: Sequence[Rollout | None], failed: dict[int, str]) -> None:
        self.rollouts, self.failed = list(rollouts), dict(failed)
        shown = [f"request {index}, {reason}" for index, reason in list(self.failed.items())[:5]]
        more = f"; and {len(self.failed) - len(shown)} more" if len(self.failed) > len(shown) else ""
        super().__init__(
            f"The mixture has no solution in {len(self.failed)} request(s): {'; '.join(shown)}{more}. NaN comes from "
            "weights or activations that overflowed: look at the model's checkpoint and dtype. The other "
            f"{len(self.rollouts) - len(self.failed)} rollouts were sampled and are in this error's `rollouts`."
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.rollouts, self.failed)  # so that it travels between processes


def check_solved(rollouts: Sequence[Rollout]) -> None:
    """Refuse rollouts with a NaN in a token's record: α had no solution, or no token was left to draw from.

    Raises:
        UnsolvedError: naming each such request, the token and the model to blame; it carries the other rollouts.
    """
    failed = {index: reason for index, rollout in enumerate(rollouts) if (reason := _unsolved(rollout)) is not None}
    if failed:
        raise UnsolvedError([None if index in failed else r for index, r in enumerate(rollouts)], failed)


def has_nan(rollout: Rollout) -> bool:
    """Tell whether some token's record holds a NaN that a model returned.

    Where the student sampled alone, log t may be NaN because nobody asked for it. A NaN of the teacher is one of α.
    """
    return bool(_nan_tokens(rollout).any())


def _nan_tokens(rollout: Rollout) -> Tensor:
    """True at the tokens (T,) for which a model returned NaN."""
    names = RECORDS[:-1] if rollout.mixture.is_theta_only else RECORDS
    return torch.stack([getattr(rollout, name).isnan() for name in names]).any(0)


def _unsolved(rollout: Rollout) -> str | None:
    """Name the first token of a rollout with a NaN in its record, and the model to blame; None where there is none."""
    if not has_nan(rollout):
        return None
    nan = {name: getattr(rollout, name).isnan() for name in RECORDS}
    token = int(_nan_tokens(rollout).int().argmax())
    records = {"student": "log_theta", "teacher": "log_teacher"}
    bad = [role for role, name in records.items() if bool(nan[name][token])]
    if rollout.mixture.is_theta_only:
        bad = bad[:1]
    if bad:
        return f"token {token}: the {' and the '.join(bad)} returned NaN"
    if bool(nan["alpha"][token]):
        return f"token {token}: no token has mass under both models"
    return f"token {token}: log q is NaN, as no token was left to draw from"


def warn_of_context(
    rollouts: Iterable[Rollout], max_tokens: int | Sequence[int], context: int, setting: str = "max_tokens"
) -> bool:
    """Warn where completions ended because the models' context did: they look as if `max_tokens` had ended them.

    Args:
        rollouts: the completions.
        max_tokens: tokens that each was allowed, one number for all or one for each.
        context: most tokens, prompt and completion together.
        setting: what the user sets `max_tokens` by.

    Returns:
        True where it warned.
    """
    rooms = max_tokens if isinstance(max_tokens, Sequence) else repeat(max_tokens)
    ended = [(one, most) for one, most in zip(rollouts, rooms) if one.finish_reason == "length"]
    cut = [most for one, most in ended if len(one.completion_ids) < most]
    if cut:
        warn_user(
            f"Completions end before they have the {max(cut)} tokens that `{setting}` leaves them, since the context "
            f"of {context} tokens ends there, prompt included. Shorten the prompts, raise {MAX_MODEL_LEN} where it "
            "was set, or pass models with a longer context."
        )
    return bool(cut)
