"""Requests and rollouts of a server of the fused engine, as they travel over HTTP."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Int

from .... import __version__
from ....pairing import Ending, Pair, checkpoint_digest, token_digest
from ....rollouts.request import Request
from ....rollouts.rollout import Rollout
from ..pair_settings import KEY, ServerSettings
from ..wire import (
    RECORD_COLUMNS,
    columns_of,
    extra_arguments,
    read_named,
    same_arguments,
    scheduled_prompt,
    stop_arguments,
    to_columns,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token")
"""Tokens that chat templates name."""
LEAST = -9999.0
"""Number that vLLM's server writes for a log-probability below it, -inf too."""


def describe(pair: Pair) -> ServerSettings:
    """Return the settings by which a server of a pair describes itself."""
    return ServerSettings.of(
        pair,
        version=__version__,
        tokens=token_digest(pair.tokenizer),
        engine_vocabulary=pair.engine_vocabulary,
        template=pair.teacher_template,
        teacher_tokenizer=_settings_of(pair.teacher_tokenizer),
        teacher_digest=checkpoint_digest(Path(pair.teacher)),
    )


def settings_in(info: dict[str, Any]) -> ServerSettings:
    """Return the settings by which a server describes itself in vLLM's `/server_info`.

    Raises:
        ValueError: where the server runs something else than this package serves, or another build of it.
    """
    if "model_config" not in info:
        raise ValueError("its `/server_info` has no `model_config`, by which vLLM's servers tell what they run.")
    given = (info.get("additional_config") or {}).get(KEY) or {}
    if "version" not in given:
        raise ValueError(f"it serves {info['model_config']['model']!r} alone, and no pair of a teacher and a student.")
    if given["version"] != __version__:
        raise ValueError(f"it runs version {given['version']} of this package, and the trainer {__version__}.")
    return ServerSettings.from_dict(given)


def pair_of(info: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> Pair:
    """Return the pair that a server serves.

    Args:
        info: vLLM's `/server_info`.
        tokenizer: the trainer's.

    Raises:
        ValueError: where the server does not describe itself, or has a student of other tokens.
    """
    settings, model = settings_in(info), info["model_config"]
    if model["logprobs_mode"] != "processed_logprobs":
        raise ValueError(f"its `logprobs_mode` is {model['logprobs_mode']!r}; wanted 'processed_logprobs'.")
    if settings.tokens != token_digest(tokenizer):
        raise ValueError(f"its student {settings.theta!r} has another tokenizer than the model that is trained.")
    return Pair(
        teacher=model["model"],
        theta=settings.theta,
        tokenizer=tokenizer,
        vocabulary=settings.vocabulary,
        engine_vocabulary=settings.engine_vocabulary,
        context=model["max_model_len"],
        ending=settings.ending,
        two_prompts=settings.two_prompts,
        teacher_template=settings.template,
        teacher_tokenizer=_with_settings(tokenizer, settings.teacher_tokenizer),
        one_model=settings.one_model,
    )


def _settings_of(tokenizer: PreTrainedTokenizerBase | None) -> dict[str, Any] | None:
    """Return the chat template and special tokens of a teacher's tokenizer, which may differ from the pair's."""
    if tokenizer is None:
        return None
    special = {name: getattr(tokenizer, name) for name in SPECIAL_TOKENS}
    return {"chat_template": tokenizer.chat_template} | special


def _with_settings(
    tokenizer: PreTrainedTokenizerBase, settings: dict[str, Any] | None
) -> PreTrainedTokenizerBase | None:
    """Return the teacher's tokenizer: the pair's with what `_settings_of` told of it."""
    if settings is None:
        return None
    teacher = copy.deepcopy(tokenizer)
    for name, value in settings.items():
        setattr(teacher, name, value)
    return teacher


def to_arguments(request: Request, ending: Ending, n: int, seed: int) -> dict[str, Any]:
    """Return the arguments of TRL's `VLLMClient.generate` for n completions of a request, with their records.

    Args:
        request: what is asked for.
        ending: where completions of the pair end.
        n: completions.
        seed: of the first of them; each gets its own, so that processes that share a request's model agree.
    """
    further = {"seed": seed, **stop_arguments(request, ending), "vllm_xargs": extra_arguments(request)}
    return {
        "prompts": [scheduled_prompt(request)],
        "n": n,
        "logprobs": columns_of(request.dense),
        **same_arguments(request),
        "generation_kwargs": further,
    }


def to_rollouts(choices: Sequence[dict[str, Any]], request: Request, pair: Pair) -> list[Rollout]:
    """Return the n rollouts in the choices with which a server answered `to_arguments`, n of one request."""
    return [_to_rollout(choice, request, pair) for choice in choices]


def _to_rollout(choice: dict[str, Any], request: Request, pair: Pair) -> Rollout:
    ids: list[int] = choice["token_ids"]
    tokens = choice["logprobs"]["top_logprobs"] if ids else []
    if request.dense is None:
        rows = np.empty((len(ids), 1 + RECORD_COLUMNS), dtype=np.float32)
        if ids:
            rows[:, 0] = choice["logprobs"]["token_logprobs"]
            rows[:, 1:] = _columns(tokens, pair)
        records, dense = to_columns(_restored(rows)), None
    else:
        names, rows = _all_columns(tokens, 1 + columns_of(request.dense))
        records, dense = read_named(names, _restored(rows), ids, request.dense, pair.engine_vocabulary)
    text = request.sampling.cut(pair.text(ids))
    return Rollout.from_request(request, ids, records, text, str(choice["finish_reason"]), dense)


def _restored(rows: Float[np.ndarray, "T C"]) -> Float[np.ndarray, "T C"]:
    """Return the numbers with -inf where the server wrote `LEAST`."""
    return np.where(rows <= LEAST, np.float32(-np.inf), rows)


def _all_columns(
    tokens: Sequence[dict[str, float]], columns: int
) -> tuple[Int[np.ndarray, "T C"], Float[np.ndarray, "T C"]]:
    """Return the ids and the numbers of all columns, from a dictionary for each token, in their order.

    Raises:
        RuntimeError: where a token has another number of columns.
    """
    wrong = next((token for token in tokens if len(token) != columns), None)
    if wrong is not None:
        raise RuntimeError(
            f"The server returned {len(wrong)} log-probabilities of a token; wanted {columns}, of which dense records "
            "are: another column is in the way of the records."
        )
    names = [[int(name.removeprefix("token_id:")) for name in token] for token in tokens]
    numbers = [list(token.values()) for token in tokens]
    shape = (len(tokens), columns)
    return np.array(names, dtype=np.int64).reshape(shape), np.array(numbers, dtype=np.float32).reshape(shape)


def _columns(tokens: Sequence[dict[str, float]], pair: Pair) -> Float[np.ndarray, "T 3"]:
    """Return the columns of `RECORD_NAMES`, from a dictionary for each token: its own log q, and these.

    Raises:
        RuntimeError: where the dictionaries hold anything else.
    """
    names = [f"token_id:{pair.engine_vocabulary + column}" for column in range(RECORD_COLUMNS)]
    try:
        values = np.array(list(map(itemgetter(*names), tokens)), dtype=np.float32)
    except KeyError:
        values = None
    if values is None or set(map(len, tokens)) != {1 + RECORD_COLUMNS}:
        other = next(token for token in tokens if len(token) != 1 + RECORD_COLUMNS or not token.keys() > set(names))
        raise RuntimeError(
            f"The server returned log-probabilities of the ids {sorted(other)}; wanted those of a sampled token and "
            f"of {names}: another column is in the way of the records."
        )
    return values
