"""The wire format: how a request asks vLLM for records, and how the records of its tokens come back.

The writer (`worker/`) and the readers (`requests.py`, `server/messages.py`) may run in different processes, and share
this file. It imports no vLLM. A request carries its mixture, flat, among vLLM's extra arguments. A record rides on
vLLM's log-probabilities: the first column of a token is log q, and the others stand under token ids beyond the
vocabulary.

Dense records are further numbers in vLLM's rows. From the worker to `rows.py` they have no ids of their own: the
likely tokens travel as the bits of numbers, which is half as much, and nothing is counted or encoded on the way. What
leaves a server as JSON is a column for each number. A scalar then has its sign changed: it is never above 0, and +inf
becomes -inf, for which JSON has a number. A likely token has two columns, its log-probabilities under the student and
the teacher. The id of such a column is the token plus a multiple of V, so that no id occurs twice in a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ...mixture import FIELDS, Mixture
from ...pairing import Ending
from ...rollouts.dense import Dense, DenseRecords
from ...rollouts.request import Request
from ...rollouts.rollout import RECORDS

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.logprobs import FlatLogprobs

RECORD = "optimal_sampling_record"
"""The extra argument of a request that asks for the columns of a record."""
THETA_PROMPT = "optimal_sampling_theta_prompt"
"""The extra argument of a request whose student has a prompt of its own: its token ids."""
TEACHER_SHIFT = "optimal_sampling_teacher_shift"
"""The extra argument of a request whose teacher has the shorter prompt: the number of scheduled tokens before it."""
RECORD_NAMES = ("alpha", "log_theta", "log_teacher")
"""The columns behind that of the sampled token, log q, under the token ids V, V+1 and V+2; V is the teacher's."""
RECORD_COLUMNS = len(RECORD_NAMES)
"""Number of log-probabilities that a request for records asks for."""
NO_NUMBER = 2.0
"""Encodes NaN: no α and no log-probability is ever 2, and JSON has no NaN."""
DENSE = {"dense_scalars": "scalars", "dense_top_k": "top_k"}
"""The extra arguments of a request for dense records, and the fields of `Dense` that they are."""
FIRST_PLACE = 2
"""The multiple of V in the id of the first column of a likely token; below it stand the tokens and the scalars."""
SAME_NAMES = ("max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty")
"""The fields of `Sampling` that vLLM and TRL's client know by the same name."""
_ORDER = [("log_q", *RECORD_NAMES).index(name) for name in RECORDS]


def same_arguments(request: Request) -> dict[str, Any]:
    """Return the settings that vLLM knows by the same names."""
    return {name: getattr(request.sampling, name) for name in SAME_NAMES}


def stop_arguments(request: Request, ending: Ending) -> dict[str, Any]:
    """Return the settings that end a completion, under vLLM's names. vLLM does not know the student's end tokens."""
    return {
        "stop": list(request.sampling.stop),
        "stop_token_ids": [] if request.sampling.ignore_eos else list(ending.stop),
        "ignore_eos": True,  # vLLM would stop at the teacher's end, too
    }


def teacher_shift(request: Request) -> int:
    """Return by how many tokens the teacher's prompt is shorter than the student's; 0 where it is not."""
    return max(len(request.theta_prompt_ids) - len(request.prompt_ids), 0)


def scheduled_prompt(request: Request) -> list[int]:
    """Return the prompt that vLLM schedules: the teacher's, padded on the left to the length of a longer student's.

    No model reads the padding. It repeats the teacher's first token, so that a repetition penalty sees no other token.
    """
    return list(request.prompt_ids[:1]) * teacher_shift(request) + list(request.prompt_ids)


def extra_arguments(request: Request) -> dict[str, Any]:
    """Return the extra arguments of a request for records: its mixture, and the student's prompt where it differs."""
    extra: dict[str, Any] = {RECORD: 1, **request.mixture.to_dict()}
    if request.dense is not None:
        extra |= {name: getattr(request.dense, field) for name, field in DENSE.items()}
        extra["dense_scalars"] = list(request.dense.scalars)  # JSON has no tuples
    if list(request.theta_prompt_ids) != list(request.prompt_ids):
        extra[THETA_PROMPT] = list(request.theta_prompt_ids)
    if shift := teacher_shift(request):
        extra[TEACHER_SHIFT] = shift
    return extra


def mixture_of(extra_args: dict[str, Any] | None) -> Mixture:
    """Return the mixture that a request's extra arguments describe, flat, under the names of `Mixture`'s fields."""
    given = extra_args or {}
    return Mixture(**{name: given[name] for name in FIELDS if name in given})


def dense_of(extra_args: dict[str, Any] | None) -> Dense | None:
    """Return the dense records that a request's extra arguments ask for; None where they ask for none.

    Raises:
        ValueError: on what `Dense` refuses.
    """
    extra = extra_args or {}
    given = {field: extra[name] for name, field in DENSE.items() if name in extra}
    return Dense(**given) if given else None


def columns_of(dense: Dense | None) -> int:
    """Return the number of columns of the record and of dense records, without that of the sampled token."""
    return RECORD_COLUMNS + (0 if dense is None else len(dense.scalars) + 4 * dense.top_k)


def theta_prompt_of(params: SamplingParams | None) -> list[int] | None:
    """Return the student's prompt in vLLM's parameters of a request, or None where it reads the teacher's."""
    return ((params and params.extra_args) or {}).get(THETA_PROMPT)


def teacher_shift_of(params: SamplingParams | None) -> int:
    """Return the number of scheduled tokens before the teacher's prompt, in vLLM's parameters of a request."""
    return int(((params and params.extra_args) or {}).get(TEACHER_SHIFT, 0))


def wants_record(params: SamplingParams) -> bool:
    """Tell whether vLLM's parameters of a request ask for the columns of a record."""
    return bool((params.extra_args or {}).get(RECORD))


def column_ids(token_ids: Sequence[int], engine_vocabulary: int) -> Int[np.ndarray, "T 4"]:
    """Return the token ids under which the columns of T records come, that of the sampled token first."""
    ids = np.empty((len(token_ids), 1 + RECORD_COLUMNS), dtype=np.int64)
    ids[:, 0], ids[:, 1:] = token_ids, engine_vocabulary + np.arange(RECORD_COLUMNS)
    return ids


def read_records(logprobs: FlatLogprobs, token_ids: Sequence[int], engine_vocabulary: int) -> Float[Tensor, "4 T"]:
    """Return the records in their order, from the flat log-probabilities of T tokens.

    Raises:
        RuntimeError: where vLLM did not hand back the columns of a record, or those of other tokens.
    """
    if not len(token_ids):
        return torch.zeros(len(RECORDS), 0)
    wanted = column_ids(token_ids, engine_vocabulary)
    _check_ids(np.array(logprobs.token_ids, dtype=np.int64), wanted.ravel())
    return to_columns(np.array(logprobs.logprobs, dtype=np.float32).reshape(wanted.shape))


def read_packed(
    ids: Int[np.ndarray, "T 4"],
    values: Float[np.ndarray, "T C"],
    token_ids: Sequence[int],
    dense: Dense,
    engine_vocabulary: int,
) -> tuple[Float[Tensor, "4 T"], DenseRecords]:
    """Return the records in their order and the dense records, from the rows of T tokens as the worker packed them.

    Raises:
        RuntimeError: see `read_records`.
    """
    _check_ids(ids.ravel(), column_ids(token_ids, engine_vocabulary).ravel())
    return to_columns(values[:, : 1 + RECORD_COLUMNS]), DenseRecords(*_unpack(values, dense))


def read_named(
    ids: Int[np.ndarray, "T C"],
    values: Float[np.ndarray, "T C"],
    token_ids: Sequence[int],
    dense: Dense,
    engine_vocabulary: int,
) -> tuple[Float[Tensor, "4 T"], DenseRecords]:
    """Return the same from all columns of T tokens, as `to_named` writes them.

    Raises:
        RuntimeError: see `read_records`.
    """
    split, S, K = 1 + RECORD_COLUMNS, len(dense.scalars), 2 * dense.top_k
    tokens = ids[:, split + S : split + S + K] % engine_vocabulary
    wanted = [column_ids(token_ids, engine_vocabulary), _dense_ids(tokens, S, engine_vocabulary)]
    _check_ids(ids.ravel(), np.concatenate(wanted, 1).ravel())
    numbers = torch.from_numpy(values[:, split:].copy())
    numbers[numbers == NO_NUMBER] = torch.nan
    scalars = dict(zip(dense.scalars, (-numbers[:, :S]).T.contiguous().unbind(0), strict=True))
    log_theta, log_teacher = (numbers[:, start : start + K].contiguous() for start in (S, S + K))
    return to_columns(values[:, :split]), DenseRecords(scalars, torch.from_numpy(tokens), log_theta, log_teacher)


def _check_ids(found: Int[np.ndarray, " C"], wanted: Int[np.ndarray, " C"]) -> None:
    if not np.array_equal(found, wanted):
        raise RuntimeError(
            f"vLLM returned log-probabilities of the ids {found[:8].tolist()}...; wanted {wanted[:8].tolist()}"
            "...: the mixture's sampler is not installed in this engine, or another column is in its way."
        )


def to_columns(rows: Float[np.ndarray, "T 4"]) -> Float[Tensor, "4 T"]:
    """Return the records in the order of `RECORDS`, from one row a token: log q and the columns of `RECORD_NAMES`."""
    columns = torch.from_numpy(np.ascontiguousarray(rows.T[_ORDER]))
    columns[columns == NO_NUMBER] = torch.nan
    return columns


def packed_width(dense: Dense) -> int:
    """Return how many numbers a token has as the worker packs them: its record, and behind it dense records."""
    return 1 + RECORD_COLUMNS + len(dense.scalars) + 6 * dense.top_k


def pack(
    scalars: Float[Tensor, "N S"],
    ids: Int[Tensor, "N K"],
    log_theta: Float[Tensor, "N K"],
    log_teacher: Float[Tensor, "N K"],
) -> Float[Tensor, "N C"]:
    """Return dense records as one row of numbers for each token; the ids are the bits of the last K."""
    return torch.cat([scalars, log_theta, log_teacher, ids.int().view(torch.float32)], 1)


def _unpack(values: Float[np.ndarray, "T C"], dense: Dense) -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor]:
    """Undo `pack` behind the columns of records: the scalars by their names, ids and log-probabilities."""
    parts = np.split(values[:, 1 + RECORD_COLUMNS :], np.cumsum([len(dense.scalars), *[2 * dense.top_k] * 2]), 1)
    scalars, log_theta, log_teacher, bits = (torch.from_numpy(part.copy()) for part in parts)
    named = dict(zip(dense.scalars, scalars.T.contiguous().unbind(0), strict=True))
    return named, bits.view(torch.int32).long(), log_theta, log_teacher


def to_named(
    ids: Int[np.ndarray, "T 4"], values: Float[np.ndarray, "T C"], dense: Dense
) -> tuple[Int[np.ndarray, "T C"], Float[np.ndarray, "T C"]]:
    """Return the ids and the numbers of all columns of T tokens, for JSON, from rows as the worker packed them."""
    split, V = 1 + RECORD_COLUMNS, int(ids[0, 1])
    scalars, tokens, *likely = _unpack(values, dense)
    numbers = np.concatenate([*(-one.numpy()[:, None] for one in scalars.values()), *map(np.asarray, likely)], 1)
    numbers[np.isnan(numbers)] = NO_NUMBER
    names = np.concatenate([ids, _dense_ids(tokens.numpy(), len(scalars), V)], 1)
    return names, np.concatenate([values[:, :split], numbers], 1)


def _dense_ids(ids: Int[np.ndarray, "T K"], scalars: int, engine_vocabulary: int) -> Int[np.ndarray, "T C"]:
    """Return the ids of the columns of dense records: those of the scalars, then of `ids` under each model."""
    of_scalars = np.arange(scalars) + engine_vocabulary + RECORD_COLUMNS
    places = engine_vocabulary * np.arange(FIRST_PLACE, FIRST_PLACE + 2 * ids.shape[1])
    return np.concatenate([np.tile(of_scalars, (len(ids), 1)), np.tile(ids, 2) + places], 1)
