"""The wire format: how a request asks vLLM for records, and how the records of its tokens come back.

Writer (`worker/`) and readers (`requests.py`, `server/messages.py`) stand in different processes, and both read this
file. It imports no vLLM. A request carries its mixture, flat, among vLLM's extra arguments. A record rides on vLLM's
log-probabilities: the first column of a token is log q, and the others stand under token ids beyond the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ...mixture import Mixture
from ...pairing import Ending
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
SAME_NAMES = ("max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty")
"""The fields of `Sampling` that vLLM and TRL's client know by the same name."""
_ORDER = [("log_q", *RECORD_NAMES).index(name) for name in RECORDS]


def same_arguments(request: Request) -> dict[str, Any]:
    """The settings that go to vLLM by their names."""
    return {name: getattr(request.sampling, name) for name in SAME_NAMES}


def stop_arguments(request: Request, ending: Ending) -> dict[str, Any]:
    """The settings that end a completion, in vLLM's words: at the student's tokens, which vLLM does not know."""
    return {
        "stop": list(request.sampling.stop),
        "stop_token_ids": [] if request.sampling.ignore_eos else list(ending.stop),
        "ignore_eos": True,  # vLLM would stop at the teacher's end, too
    }


def teacher_shift(request: Request) -> int:
    """Return by how many tokens the teacher's prompt is shorter than the student's; 0 where it is not."""
    return max(len(request.theta_prompt_ids) - len(request.prompt_ids), 0)


def scheduled_prompt(request: Request) -> list[int]:
    """The prompt that vLLM schedules: the teacher's, behind tokens that no model reads where the student's is longer.

    They repeat the teacher's first token, so that a repetition penalty sees no token which the teacher did not.
    """
    return list(request.prompt_ids[:1]) * teacher_shift(request) + list(request.prompt_ids)


def extra_arguments(request: Request) -> dict[str, Any]:
    """The extra arguments of a request for records: its mixture, and what the student reads where that is another."""
    extra: dict[str, Any] = {RECORD: 1, **request.mixture.to_dict()}
    if list(request.theta_prompt_ids) != list(request.prompt_ids):
        extra[THETA_PROMPT] = list(request.theta_prompt_ids)
    if shift := teacher_shift(request):
        extra[TEACHER_SHIFT] = shift
    return extra


def mixture_of(extra_args: dict[str, Any] | None, default: dict[str, Any]) -> Mixture:
    """The mixture that a request's extra arguments describe, flat, under the names of `Mixture`'s fields."""
    given = extra_args or {}
    names = Mixture.__dataclass_fields__
    return Mixture(**(default | {name: given[name] for name in names if name in given}))


def theta_prompt_of(params: SamplingParams | None) -> list[int] | None:
    """The student's prompt in vLLM's parameters of a request, or None where it reads the teacher's."""
    return ((params and params.extra_args) or {}).get(THETA_PROMPT)


def teacher_shift_of(params: SamplingParams | None) -> int:
    """The number of scheduled tokens before the teacher's prompt, in vLLM's parameters of a request."""
    return int(((params and params.extra_args) or {}).get(TEACHER_SHIFT, 0))


def wants_record(params: SamplingParams) -> bool:
    """Tell whether vLLM's parameters of a request ask for the columns of a record."""
    return bool((params.extra_args or {}).get(RECORD))


def column_ids(token_ids: Sequence[int], engine_vocabulary: int) -> Int[np.ndarray, "T 4"]:
    """The token ids under which the columns of T records come: that of the sampled token, and those of the others."""
    ids = np.empty((len(token_ids), 1 + RECORD_COLUMNS), dtype=np.int64)
    ids[:, 0], ids[:, 1:] = token_ids, engine_vocabulary + np.arange(RECORD_COLUMNS)
    return ids


def read_records(logprobs: FlatLogprobs, token_ids: Sequence[int], engine_vocabulary: int) -> Float[Tensor, "4 T"]:
    """The records in their order, from the flat log-probabilities of T tokens.

    Raises:
        RuntimeError: where vLLM did not hand back the columns of a record, or those of other tokens.
    """
    if not len(token_ids):
        return torch.zeros(len(RECORDS), 0)
    wanted = column_ids(token_ids, engine_vocabulary)
    ids = np.array(logprobs.token_ids, dtype=np.int64)
    if not np.array_equal(ids, wanted.ravel()):
        raise RuntimeError(
            f"vLLM returned log-probabilities of the ids {ids[:8].tolist()}...; wanted {wanted.ravel()[:8].tolist()}"
            "...: the mixture's sampler is not installed in this engine, or another column is in its way."
        )
    return to_columns(np.array(logprobs.logprobs, dtype=np.float32).reshape(wanted.shape))


def to_columns(rows: Float[np.ndarray, "T 4"]) -> Float[Tensor, "4 T"]:
    """The records in the order of `RECORDS`, from one row a token: log q and the columns of `RECORD_NAMES`."""
    columns = torch.from_numpy(np.ascontiguousarray(rows.T[_ORDER]))
    columns[columns == NO_NUMBER] = torch.nan
    return columns
