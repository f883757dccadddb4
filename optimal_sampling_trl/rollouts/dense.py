"""Dense records: what both models say about the whole vocabulary at each token, for losses that need the teacher.

They describe the models' distributions over the whole common vocabulary at the sampling temperature, with the
teacher's endings folded. Here q is the mixture itself, before penalties and truncation. A token that those act on was
drawn from another distribution, the one whose log-probability is a rollout's `log_q`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..mixture.dense import SCALARS
from ..options import check_whole, shown, unknown_option


@dataclass(frozen=True)
class Dense:
    """Ask for dense records.

    Args:
        scalars: those of `SCALARS` that are wanted.
        top_k: how many of each model's likeliest tokens are wanted; 0 is none.

    Raises:
        ValueError: on an unknown or repeated scalar, a `top_k` below 0, or where nothing is asked for.

    Example:
        ```python
        Dense(scalars=("kl_theta_teacher", "overlap"), top_k=8)
        ```
    """

    scalars: tuple[str, ...] = ()
    top_k: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.scalars, tuple | list):
            raise ValueError(
                f"Dense: `scalars` is {shown(self.scalars)}; wanted a tuple of names. For a single one write "
                "`scalars=('...',)`."
            )
        object.__setattr__(self, "scalars", tuple(self.scalars))
        for name in self.scalars:
            if name not in SCALARS:
                raise ValueError(unknown_option("dense scalar", name, SCALARS))
        if len(set(self.scalars)) < len(self.scalars):
            raise ValueError(f"Dense: `scalars` is {self.scalars}; wanted each name once. Drop the repeated ones.")
        object.__setattr__(self, "top_k", check_whole("Dense", "top_k", self.top_k, 0, "0 is none."))
        if not self.scalars and not self.top_k:
            raise ValueError(
                "Dense: `scalars` is empty and `top_k` is 0, which asks for nothing; wanted at least one of the two. "
                "Pass None in the place of a `Dense` for no dense records."
            )

    def check_vocabulary(self, vocabulary: int) -> None:
        """Refuse more tokens than both models share.

        Args:
            vocabulary: size V of the common vocabulary.

        Raises:
            ValueError: naming both numbers.
        """
        check_whole("Dense", "top_k", self.top_k, 0, "Both models share no more tokens.", high=vocabulary)


def check_dense(owner: str, dense: object) -> None:
    """Refuse an option `dense` that is no `Dense`.

    Args:
        owner: the function or class that takes the option, for the error.
        dense: the value that was given.

    Raises:
        ValueError: where it is neither None nor a `Dense`.
    """
    if dense is not None and not isinstance(dense, Dense):
        raise ValueError(
            f"{owner}: `dense` is {shown(dense)}; wanted None or a `Dense`, for example `Dense(top_k=32)`. Pass one."
        )


@dataclass(frozen=True, eq=False)
class DenseRecords:
    """Dense records of the T tokens of a completion, as float32 and int64 tensors on the CPU.

    Divergences and entropies are in nats. A divergence is +inf where its first distribution has a token that the
    second lacks. A log-probability is -inf for a token that the model lacks.

    Args:
        scalars: (T,) numbers by the names of `SCALARS`; those that were asked for.
        ids: (T, K) the student's K/2 likeliest tokens in falling order, then the teacher's. A token that is among both
            appears twice. K is 0 where none were asked for.
        log_theta: (T, K) log-probabilities of `ids` under the student.
        log_teacher: (T, K) under the teacher.

    Raises:
        ValueError: where the shapes do not fit together, or K is odd.

    Example:
        ```python
        with OptimalSamplingV1(model_teacher="large", model_theta="small") as sampler:
            asked = Dense(scalars=("kl_theta_teacher",), top_k=8)
            dense = sampler.generate(["3 + 4 ="], max_tokens=8, dense=asked).rollouts[0].dense
        print(dense.scalars["kl_theta_teacher"], dense.ids[:, 8:], dense.tail_teacher)
        ```
    """

    scalars: dict[str, Float[Tensor, " T"]]
    ids: Int[Tensor, "T K"]
    log_theta: Float[Tensor, "T K"]
    log_teacher: Float[Tensor, "T K"]

    def __post_init__(self) -> None:
        shape = tuple(self.ids.shape)
        for name, record in (("log_theta", self.log_theta), ("log_teacher", self.log_teacher)):
            if tuple(record.shape) != shape or len(shape) != 2 or shape[1] % 2:
                raise ValueError(
                    f"DenseRecords: `{name}` has shape {tuple(record.shape)} and `ids` {shape}; wanted (T, K) in both "
                    "with as many tokens of each model in K."
                )
        for name, record in self.scalars.items():
            if name not in SCALARS:
                raise ValueError(unknown_option("dense scalar", name, SCALARS))
            if tuple(record.shape) != shape[:1]:
                raise ValueError(
                    f"DenseRecords: `{name}` has shape {tuple(record.shape)}; wanted one entry for each of the "
                    f"{shape[0]} tokens."
                )

    def __len__(self) -> int:
        """Return the number T of tokens."""
        return len(self.ids)

    @property
    def is_first(self) -> Bool[Tensor, "T K"]:
        """True where a token appears for the first time: the distinct tokens of each row."""
        half = self.ids.shape[1] // 2
        student, teacher = self.ids[:, :half], self.ids[:, half:]
        repeated = (teacher[:, :, None] == student[:, None, :]).any(-1)
        return torch.cat([torch.ones_like(student, dtype=torch.bool), ~repeated], 1)

    @property
    def tail_theta(self) -> Float[Tensor, " T"]:
        """Student's mass beyond `ids`, a token in both halves counted once."""
        return self._tail(self.log_theta)

    @property
    def tail_teacher(self) -> Float[Tensor, " T"]:
        """Teacher's mass beyond `ids`, likewise."""
        return self._tail(self.log_teacher)

    def _tail(self, log_probabilities: Float[Tensor, "T K"]) -> Float[Tensor, " T"]:
        kept = log_probabilities.double().exp().masked_fill(~self.is_first, 0.0).sum(1)
        return (1 - kept).clamp(min=0.0).float()
