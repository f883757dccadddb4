"""Requests and rollouts of a server of the fused engine, as they travel over HTTP."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .... import __version__
from ....pairing import Ending, Pair, token_digest
from ....rollouts.request import Request
from ....rollouts.rollout import Rollout
from ..wire import RECORD_COLUMNS, column_ids, extra_arguments, same_arguments, stop_arguments, to_columns

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LEAST = -9999.0
"""Number that vLLM's server writes for a log-probability below it, -inf too."""


def describe(pair: Pair) -> dict[str, Any]:
    """The settings in which a server tells about itself, beside what its model needs."""
    return {
        "version": __version__,
        "tokens": token_digest(pair.tokenizer),
        "vocabulary": pair.vocabulary,
        "engine_vocabulary": pair.engine_vocabulary,
        "two_prompts": pair.two_prompts,
        "template": pair.teacher_template,
    }


def pair_of(info: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> Pair:
    """The pair that a server serves.

    Args:
        info: vLLM's `/server_info`.
        tokenizer: the trainer's.

    Raises:
        ValueError: where the server runs something else than this package serves, or a student of other tokens.
    """
    model = info["model_config"]
    settings = (info.get("additional_config") or {}).get("optimal_sampling") or {}
    if "version" not in settings:
        raise ValueError(f"it serves {model['model']!r} alone, and no pair of a teacher and a student.")
    if settings["version"] != __version__:
        raise ValueError(f"it runs version {settings['version']} of this package, and the trainer {__version__}.")
    if model["logprobs_mode"] != "processed_logprobs":
        raise ValueError(f"its `logprobs_mode` is {model['logprobs_mode']!r}; wanted 'processed_logprobs'.")
    if settings["tokens"] != token_digest(tokenizer):
        raise ValueError(f"its student {settings['theta']!r} has another tokenizer than the model that is trained.")
    return Pair(
        teacher=model["model"],
        theta=settings["theta"],
        tokenizer=tokenizer,
        vocabulary=settings["vocabulary"],
        engine_vocabulary=settings["engine_vocabulary"],
        context=model["max_model_len"],
        ending=Ending(**{name: tuple(ids) for name, ids in settings["ending"].items()}),
        two_prompts=settings["two_prompts"],
        teacher_template=settings["template"],
    )


def to_arguments(request: Request, ending: Ending, n: int, seed: int) -> dict[str, Any]:
    """The arguments of TRL's `VLLMClient.generate` for n completions of a request, with their records.

    Args:
        request: what is asked for.
        ending: where completions of the pair end.
        n: completions.
        seed: of the first of them; each gets its own, so that processes that share a request's model agree.
    """
    further = {"seed": seed, **stop_arguments(request, ending), "vllm_xargs": extra_arguments(request)}
    return {
        "prompts": [list(request.prompt_ids)],
        "n": n,
        "logprobs": RECORD_COLUMNS,
        **same_arguments(request),
        "generation_kwargs": further,
    }


def to_rollouts(answer: dict[str, Any], request: Request, pair: Pair) -> list[Rollout]:
    """The n rollouts in what TRL's client returned for `to_arguments`."""
    columns = zip(answer["completion_ids"], answer["logprob_token_ids"], answer["logprobs"], strict=True)
    return [_to_rollout(ids, names, values, request, pair) for ids, names, values in columns]


def _to_rollout(
    ids: list[int], names: list[list[int]], values: list[list[float]], request: Request, pair: Pair
) -> Rollout:
    wanted = column_ids(ids, pair.engine_vocabulary)
    rows = np.zeros(wanted.shape, dtype=np.float32)
    for row, columns, *pairs in zip(rows, wanted.tolist(), names, values, strict=True):
        found = dict(zip(*pairs, strict=True))
        if found.keys() != set(columns):
            raise RuntimeError(
                f"The server returned log-probabilities of the ids {sorted(found)}; wanted those of {columns[0]} and "
                f"of {columns[1:]}: another column is in the way of the records."
            )
        row[:] = [found[column] for column in columns]
    rows[rows <= LEAST] = -np.inf
    text = request.sampling.cut(str(pair.tokenizer.decode(ids, skip_special_tokens=True)))
    reason = "length" if _is_cut_short(ids, request, pair) else "stop"
    return Rollout.from_request(request, ids, to_columns(rows), text, reason)


def _is_cut_short(ids: list[int], request: Request, pair: Pair) -> bool:
    """Tell whether a completion met a limit: TRL's client does not hand on the server's word for it."""
    if not request.sampling.ignore_eos and ids[-1:] and ids[-1] in pair.ending.stop:
        return False
    limit = min(request.sampling.max_tokens, pair.context - len(request.prompt_ids))
    return len(ids) >= limit
