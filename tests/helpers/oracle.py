"""The record that any rollout must have: both models read prompt and completion anew, whole, in float32, without a
cache; α and q come from `mixture.reference`, and folding, penalty and truncation are written out here in float64."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from optimal_sampling_trl.mixture.reference import reference, reference_dense
from optimal_sampling_trl.pairing import Ending
from optimal_sampling_trl.rollouts.dense import SCALARS, Dense
from optimal_sampling_trl.rollouts.request import Request, Sampling
from optimal_sampling_trl.rollouts.rollout import RECORDS, Rollout

WISHES = (Dense(SCALARS, 5), None, Dense(("overlap", "kl_q_theta")), Dense(top_k=2), Dense(SCALARS, 5))
"""Wishes for dense records that a batch may mix."""


def with_wishes(requests: Sequence[Request]) -> list[Request]:
    """The same requests, each with one of `WISHES`."""
    return [replace(request, dense=WISHES[index % len(WISHES)]) for index, request in enumerate(requests)]


@torch.no_grad()
def read_logits(model: PreTrainedModel, prompt_ids: Sequence[int], completion_ids: Sequence[int]) -> Tensor:
    """A model's raw logits (T, V) in float64 at each token of a completion. The model stays as it is."""
    if model.training or model.dtype != torch.float32:
        model = copy.deepcopy(model).eval().float()
    ids = torch.tensor([[*prompt_ids, *completion_ids]], device=model.device)
    return model(input_ids=ids, use_cache=False).logits[0, len(prompt_ids) - 1 : -1].cpu().double()


def pair_logits(
    rollout: Rollout, teacher: PreTrainedModel, theta: PreTrainedModel, ending: Ending | None = None
) -> tuple[Tensor, Tensor]:
    """The raw logits (T, V) of the student and the teacher over the common vocabulary, endings folded."""
    return common_logits(
        read_logits(theta, rollout.theta_prompt_ids, rollout.completion_ids),
        read_logits(teacher, rollout.prompt_ids, rollout.completion_ids),
        ending,
    )


def common_logits(of_theta: Tensor, of_teacher: Tensor, ending: Ending | None = None) -> tuple[Tensor, Tensor]:
    """Logits (T, V of each model) over the common vocabulary, the teacher's endings folded."""
    if ending is not None and ending.stop and ending.folded:
        mass = of_teacher.exp()
        of_teacher[:, ending.stop[0]] = mass[:, [ending.stop[0], *ending.folded]].sum(1).log()
        of_teacher[:, list(ending.folded)] = -torch.inf
    V = min(of_theta.shape[1], of_teacher.shape[1])
    return of_theta[:, :V], of_teacher[:, :V]


def truncate(logits: Tensor, seen: set[int], sampling: Sampling) -> Tensor:
    """log q (V,) after all that a sampler does to the mixture's logits (V,): penalty, temperature, min_p, k, p.

    At temperature 0 the likeliest token is taken, and nothing is cut off.
    """
    x = logits.clone()
    for token in seen:
        x[token] = x[token] / sampling.repetition_penalty if x[token] > 0 else x[token] * sampling.repetition_penalty
    if sampling.temperature == 0:
        return x.log_softmax(0)
    x = x / sampling.temperature
    if sampling.min_p > 0:
        x[x.softmax(0) < sampling.min_p * x.softmax(0).max()] = -torch.inf
    if 0 < sampling.top_k < len(x):
        x[x < x.sort(descending=True).values[sampling.top_k - 1]] = -torch.inf
    if sampling.top_p < 1:
        order = x.argsort(descending=True)
        before = x.softmax(0)[order].cumsum(0) - x.softmax(0)[order]
        x[order[before >= sampling.top_p]] = -torch.inf
    return x.log_softmax(0)


def expected_records(
    rollout: Rollout,
    teacher: PreTrainedModel,
    theta: PreTrainedModel,
    ending: Ending | None = None,
    sampling: Sampling | None = None,
) -> tuple[dict[str, Tensor], Tensor]:
    """Return each record (T,) that a rollout must have, and log q (T, V) of the distribution of each token.

    Args:
        sampling: how it was sampled; None where no token was cut off or penalised.
    """
    T = rollout.temperature or 1.0
    of_theta, of_teacher = pair_logits(rollout, teacher, theta, ending)
    alpha, log_q = reference(of_theta, of_teacher, rollout.mixture, T)
    if sampling is not None and not sampling.keeps_all:
        weight = alpha[:, None]
        mixed = (1 - weight) * of_theta + weight * of_teacher
        is_swap = rollout.mixture.method == "top_k_swap"
        if is_swap or rollout.mixture.form == "arithmetic":
            sums = ((row / T).logsumexp(1, keepdim=True) for row in (of_theta, of_teacher))
            mixed = T * (log_q + sum(part * each for part, each in zip((1 - weight, weight), sums)))
        if not is_swap:
            mixed = torch.where(weight == 0, of_theta, torch.where(weight == 1, of_teacher, mixed))  # 0·(-inf) is NaN
        past = [{*rollout.prompt_ids, *rollout.completion_ids[:t]} for t in range(len(mixed))]
        log_q = torch.stack([truncate(row, seen, sampling) for row, seen in zip(mixed, past)])
    drawn = torch.tensor(rollout.completion_ids)[:, None]
    rows = {"log_q": log_q, "log_theta": (of_theta / T).log_softmax(1), "log_teacher": (of_teacher / T).log_softmax(1)}
    return {"alpha": alpha} | {name: row.gather(1, drawn)[:, 0] for name, row in rows.items()}, log_q


def on_the_edge(
    rollout: Rollout,
    teacher: PreTrainedModel,
    theta: PreTrainedModel,
    ending: Ending | None = None,
    tolerance: float = 1e-4,
) -> Tensor:
    """Tokens (T,) at which rounding may decide what is among the K likeliest: q is another one on either side.

    Args:
        tolerance: how far the logits of two engines may lie apart.
    """
    mixture, nowhere = rollout.mixture, torch.zeros(len(rollout.completion_ids), dtype=torch.bool)
    if mixture.method != "top_k_swap":
        return nowhere
    _, logits = pair_logits(rollout, teacher, theta, ending)
    ordered = logits.sort(1, descending=True).values[:, mixture.swap_top_k - 1 :]
    return ordered[:, 0] - ordered[:, 1] <= 2 * tolerance if ordered.shape[1] > 1 else nowhere


def check_rollout(
    rollout: Rollout,
    teacher_model: PreTrainedModel,
    theta_model: PreTrainedModel,
    ending: Ending | None = None,
    sampling: Sampling | None = None,
    tolerance: float = 1e-4,
    has_teacher: bool = True,
) -> dict[str, float]:
    """The largest error of each record of a rollout.

    Args:
        ending: the pair's end-of-sequence tokens, where the teacher has some of its own.
        sampling: how it was sampled; None where no token was cut off or penalised.
        tolerance: the largest error allowed, in nats and in α.
        has_teacher: False where the request needed no teacher: log t is then NaN throughout.

    Raises:
        AssertionError: naming the record, the token, what was got and what the oracle says; at temperature 0 also
            where a token is not the likeliest.
    """
    if not rollout.completion_ids:
        raise AssertionError("The rollout has no tokens: there is nothing to check.")
    expected, log_q = expected_records(rollout, teacher_model, theta_model, ending, sampling)
    edge = on_the_edge(rollout, teacher_model, theta_model, ending, tolerance)
    worst = {}
    if not has_teacher:
        assert bool(rollout.log_teacher.isnan().all()), f"log t is {rollout.log_teacher}; nobody asked for it."
    for name in RECORDS if has_teacher else RECORDS[:-1]:
        got, wanted = getattr(rollout, name).double(), expected[name]
        error = (got - wanted).abs().masked_fill(got == wanted, 0.0).nan_to_num(nan=torch.inf)
        if name in ("alpha", "log_q"):
            error = error.masked_fill(edge, 0.0)
        token = int(error.argmax())
        worst[name] = float(error[token])
        if worst[name] > tolerance:
            raise AssertionError(
                f"`{name}` of token {token} (id {rollout.completion_ids[token]}, {rollout.mixture}) is "
                f"{float(got[token]):.7g}; the oracle says {float(wanted[token]):.7g}: off by {worst[name]:.2g}, "
                f"allowed {tolerance:g}."
            )
    if rollout.temperature == 0:
        chosen = log_q.gather(1, torch.tensor(rollout.completion_ids)[:, None].to(log_q.device))[:, 0]
        if not bool(((log_q.max(1).values - chosen <= 2 * tolerance) | edge.to(log_q.device)).all()):
            likeliest = log_q.argmax(1).tolist()
            raise AssertionError(f"Temperature 0 gave {rollout.completion_ids}; likeliest are {likeliest}.")
    return worst


def check_dense(
    rollout: Rollout,
    wish: Dense | None,
    teacher_model: PreTrainedModel,
    theta_model: PreTrainedModel,
    ending: Ending | None = None,
    tolerance: float = 1e-4,
) -> None:
    """Hold the dense records of a rollout against their definitions; without a wish there must be none.

    Raises:
        AssertionError: where numbers differ, or the likeliest tokens are not the likeliest.
    """
    dense = rollout.dense
    if dense is None or wish is None:
        assert dense is wish, f"asked for {wish}, got {dense}"
        return
    T, k = rollout.temperature or 1.0, wish.top_k
    logits = pair_logits(rollout, teacher_model, theta_model, ending)
    expected = reference_dense(*logits, rollout.mixture, T)
    assert tuple(dense.scalars) == wish.scalars
    close = {"rtol": tolerance, "atol": tolerance}
    clear = ~on_the_edge(rollout, teacher_model, theta_model, ending, tolerance)
    for name, got in dense.scalars.items():
        torch.testing.assert_close(
            got.double()[clear], expected[name][clear], **close, msg=lambda text, name=name: f"{name}: {text}"
        )
    assert dense.ids.shape == (len(rollout.completion_ids), 2 * k)
    rows = [(row / T).log_softmax(1) for row in logits]
    for got, row in zip((dense.log_theta, dense.log_teacher), rows):
        torch.testing.assert_close(got.double(), row.gather(1, dense.ids), **close)
    for got, row in zip((dense.log_theta[:, :k], dense.log_teacher[:, k:]), rows):  # equal ones may change places
        torch.testing.assert_close(got.double(), row.topk(k).values, **close)
        assert all(len(set(ids)) == k for half in dense.ids.split(k, 1) for ids in half.tolist()) if k else True


def check_rollouts(
    rollouts: Sequence[Rollout],
    requests: Sequence[Request],
    teacher_model: PreTrainedModel,
    theta_model: PreTrainedModel,
    ending: Ending | None = None,
    tolerance: float = 1e-4,
) -> dict[str, float]:
    """The largest errors over the rollouts of some requests; each must also answer its own request."""
    worst = dict.fromkeys(RECORDS, 0.0)
    for index, (rollout, request) in enumerate(zip(rollouts, requests, strict=True)):
        asked = (request.prompt_ids, request.theta_prompt_ids, request.mixture, request.sampling.temperature)
        if (rollout.prompt_ids, rollout.theta_prompt_ids, rollout.mixture, rollout.temperature) != asked:
            raise AssertionError(f"Rollout {index} answers another request than {request}: {rollout}.")
        errors = check_rollout(rollout, teacher_model, theta_model, ending, request.sampling, tolerance)
        check_dense(rollout, request.dense, teacher_model, theta_model, ending, tolerance)
        worst = {name: max(worst[name], errors[name]) for name in RECORDS}
    print("oracle, worst errors:", {name: f"{error:.1e}" for name, error in worst.items()})
    return worst
