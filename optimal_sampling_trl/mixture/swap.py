"""The method `top_k_swap` in torch, q = θ·1[S] + α·t: the set S of the teacher's likeliest tokens, and α."""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor

from .settings import MixtureRows


def kth_largest(teacher: Float[Tensor, "N V"], rows: MixtureRows) -> Float[Tensor, " N"]:
    """Return the K-th largest logit of each row, the smallest where K is beyond V.

    Rows of other methods get a number that nothing reads. Does not wait for a GPU: the largest K is known on the host.
    """
    most = min(rows.most_swapped, teacher.shape[1])
    place = rows.swap_top_k.long().clamp(1, most) - 1
    return teacher.topk(most).values.gather(1, place[:, None])[:, 0]


def likeliest(teacher: Float[Tensor, "N V"], rows: MixtureRows) -> Bool[Tensor, "N V"]:
    """Return S: the K likeliest tokens, all that tie with the K-th among them, and none without mass.

    α and q each find it anew, which takes a fiftieth of the time of mixing at 152 000 tokens: a set handed from one to
    the other would have to be put together again where an engine solves the rows of a batch in parts.

    Args:
        teacher: the teacher's raw logits or log-probabilities.
        rows: say K of each row.
    """
    return (teacher >= kth_largest(teacher, rows)[:, None]) & ~teacher.isneginf()


def swapped_mass(
    log_theta: Float[Tensor, "N V"], log_teacher: Float[Tensor, "N V"], rows: MixtureRows
) -> Float[Tensor, " N"]:
    """Return α = 1 - θ(S), as a sum over the tokens outside of S: the probability that a token is swapped."""
    return log_theta.exp().masked_fill(likeliest(log_teacher, rows), 0.0).sum(-1)
