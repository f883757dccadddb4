"""Requests into vLLM's parameters, and vLLM's outputs into rollouts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ...mixture import Mixture
from ...options import shown, unknown_option
from ...pairing import Ending, Pair, check_prompt
from ...rollouts.dense import SCALARS, Dense
from ...rollouts.request import Request
from ...rollouts.rollout import Rollout, check_solved
from .limits import ONE_PROMPT
from .pair_settings import PairSettings, settings_of
from .wire import (
    DENSE,
    RECORD,
    TEACHER_SHIFT,
    THETA_PROMPT,
    columns_of,
    dense_of,
    extra_arguments,
    mixture_of,
    read_packed,
    read_records,
    same_arguments,
    stop_arguments,
)

if TYPE_CHECKING:
    from vllm import RequestOutput, SamplingParams

COLDEST, HOTTEST = 0.01, 2.0
"""Lowest and highest temperature above 0 that vLLM does not change."""
SCORES_OF_PROMPTS = {
    "prompt_logprobs": "`prompt_logprobs` (or `echo`)",
    "prompt_logprob_token_ids": "`prompt_logprob_token_ids`",
}
"""vLLM's parameters that ask for log-probabilities of a prompt, and how errors name each. Versions before 0.31 have
the first alone."""


def check_request(request: Request, pair: Pair, index: int, max_logprobs: int) -> None:
    """Refuse a request that the fused engine cannot serve.

    Args:
        request: what is asked for.
        pair: what the engine serves.
        index: the request's number, for the error.
        max_logprobs: the engine's setting: the most columns of a token; -1 is as many as the teacher has tokens.

    Raises:
        ValueError: on a prompt that is empty, too long or not of tokens, on two prompts where the models read one
            stream, on a stop text that never comes, on a temperature that vLLM would not sample at, and on more dense
            records than the engine hands back.
    """
    if list(request.prompt_ids) != list(request.theta_prompt_ids):
        _check_two_prompts(request, pair, index)
    check_prompt(request.prompt_ids, pair.context, pair.vocabulary, index, "teacher")
    pair.check_stop_texts(request.sampling.stop, request.sampling.ignore_eos, index)
    if request.sampling.temperature and not COLDEST <= request.sampling.temperature <= HOTTEST:
        raise ValueError(
            f"Request {index} has `temperature` {request.sampling.temperature}; wanted 0, or {COLDEST} to {HOTTEST}, "
            "beyond which vLLM changes or refuses it. Use backend='transformers'."
        )
    if request.dense is not None:
        request.dense.check_vocabulary(pair.vocabulary)
        most = pair.engine_vocabulary if max_logprobs == -1 else max_logprobs
        columns = columns_of(request.dense)
        if columns > most:
            raise ValueError(
                f"Request {index} asks for {request.dense}, which takes {columns} columns of each token, and the "
                f"engine's `max_logprobs` is {max_logprobs}; wanted no more. Raise it (`--max-logprobs` of a "
                "server), or lower `top_k`."
            )


def most_columns(pair: Pair) -> int:
    """Return the most columns that a request's records can take, dense ones of all tokens among them."""
    return columns_of(Dense(SCALARS, pair.vocabulary))


def _check_two_prompts(request: Request, pair: Pair, index: int) -> None:
    lengths = (
        f"Request {index} has a prompt for the teacher ({len(request.prompt_ids)} tokens) and another for the student "
        f"({len(request.theta_prompt_ids)} tokens)."
    )
    if not pair.two_prompts:
        raise ValueError(
            f"{lengths} Where layers have {ONE_PROMPT}, both models read one stream of tokens. Use "
            "backend='transformers', or give both the same prompt."
        )
    check_prompt(request.theta_prompt_ids, pair.context, pair.vocabulary, index, "student")


def to_sampling_params(request: Request, ending: Ending) -> SamplingParams:
    """Return vLLM's parameters of one request, with its records asked for.

    Without stop texts vLLM does not turn tokens into text; `to_rollouts` does it once at the end.
    """
    from vllm import SamplingParams

    return SamplingParams(
        **same_arguments(request),
        **stop_arguments(request, ending),
        seed=request.sampling.seed,
        detokenize=bool(request.sampling.stop),
        logprobs=columns_of(request.dense),
        flat_logprobs=True,
        extra_args=extra_arguments(request),
    )


def check_params(params: Any, prompt_ids: Sequence[int], settings: PairSettings) -> None:
    """Refuse a client's request that the mixture cannot serve: inside the engine it would stop the step.

    Args:
        params: vLLM's parameters of the request.
        prompt_ids: its prompt.
        settings: what the engine is told about the pair.

    Raises:
        ValueError: on an extra argument that is unknown, out of range or not read by the mixture's method, on records
            without their columns or beside a grammar or scores of named tokens, and on a token that one of the models
            does not know.
    """
    extra = params.extra_args or {}
    known = (RECORD, THETA_PROMPT, TEACHER_SHIFT, *DENSE, *Mixture.__dataclass_fields__)
    for name in extra:
        if name not in known:
            raise ValueError(unknown_option("extra argument of a request", name, known))
    _check_grammar(params, extra, settings)
    _check_tokens(params, settings.vocabulary)
    mixture = mixture_of(extra)
    mixture.check_read("The request's mixture")
    _check_scoring(params, mixture)
    _check_records(params, extra, settings)
    if prompt_ids and max(prompt_ids) >= settings.vocabulary:  # vLLM knows the teacher's vocabulary alone
        wanted = f"wanted ids below {settings.vocabulary}, which both models read."
        raise ValueError(f"The prompt has the token {max(prompt_ids)}; {wanted}")
    if THETA_PROMPT in extra:
        _check_theta_prompt(extra[THETA_PROMPT], len(prompt_ids), settings)
    if TEACHER_SHIFT in extra:
        _check_teacher_shift(extra, len(prompt_ids))


def refuse_added(engine: Any) -> None:
    """Check each request of vLLM's engine in this process before it is added, whoever made its parameters."""
    settings = settings_of(engine.vllm_config)
    add_request = engine.add_request

    def add(request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        check_params(params, (prompt.get("prompt_token_ids") if isinstance(prompt, dict) else None) or (), settings)
        return add_request(request_id, prompt, params, *args, **kwargs)

    engine.add_request = add


def _check_scoring(params: Any, mixture: Mixture) -> None:
    """Refuse what vLLM would compute with the teacher alone: log-probabilities of a prompt."""
    scored = _scored_prompt(params)
    if scored is not None and mixture.alpha_min < 1:
        raise ValueError(
            f"{scored}, and vLLM computes it of the teacher alone; wanted it with the mixture of the teacher alone "
            "(alpha_min 1). Drop it."
        )


def _scored_prompt(params: Any) -> str | None:
    """Name the parameter that asks for log-probabilities of a prompt; None where there is none."""
    for name, shown_as in SCORES_OF_PROMPTS.items():
        if (value := getattr(params, name, None)) is not None:
            return f"{shown_as} is {value!r}"
    return None


def _check_grammar(params: Any, extra: dict[str, Any], settings: PairSettings) -> None:
    """Refuse a grammar that would end with a token of the teacher's alone, or would leave no log t to record."""
    if params.structured_outputs is None:
        return
    if settings.ending.folded:
        raise ValueError(
            "The request asks for structured outputs, whose grammar ends with the teacher's token; here that counts "
            "as the student's, since the two models end differently. Drop them."
        )
    if extra.get(RECORD):
        raise ValueError(
            "The request asks for structured outputs and for records, whose log t is over all tokens of both models, "
            "and vLLM hands on what the grammar left of the teacher; wanted one of the two. Drop the structured "
            f"outputs, or the extra argument `{RECORD}`."
        )


def _check_tokens(params: Any, vocabulary: int) -> None:
    """Refuse to allow, favour or force a token that one of the models does not know: it is never drawn.

    A forced one would stop the step, which looks for its log θ where the student has none.
    """
    for name in ("allowed_token_ids", "logit_bias", "trace_decode_token_ids"):
        named = getattr(params, name, None) or ()  # the last is vLLM's from 0.29 on
        beyond = [token for token in named if token >= vocabulary]
        if beyond:
            raise ValueError(
                f"`{name}` names the token {max(beyond)}, which is never drawn; wanted ids below {vocabulary}, which "
                "both models know. Leave it out."
            )


def _check_records(params: Any, extra: dict[str, Any], settings: PairSettings) -> None:
    """Refuse a wrong request for records: one without their columns, or for more than the models have."""
    if extra.get(RECORD, 0) not in (0, 1):
        raise ValueError(f"The extra argument `{RECORD}` is {extra[RECORD]!r}; wanted 0 or 1.")
    if extra.get(RECORD) and (scored := _scored_prompt(params)):
        raise ValueError(
            f"{scored} in a request for records, which are of the tokens that are drawn; wanted one of the two. Drop "
            "it, or ask without records."
        )
    if extra.get(RECORD) and (named := getattr(params, "logprob_token_ids", None)) is not None:
        raise ValueError(
            f"`logprob_token_ids` is {shown(named)} in a request for records, which stand in their places; wanted one "
            "of the two. Drop it, or ask without records."
        )
    dense = dense_of(extra)
    if dense is not None and not extra.get(RECORD):
        raise ValueError(
            f"The request asks for {dense} and no records; wanted the extra argument `{RECORD}` with it. Add it, as 1."
        )
    if dense is not None:
        dense.check_vocabulary(settings.vocabulary)
    if extra.get(RECORD) and params.logprobs != columns_of(dense):
        raise ValueError(
            f"`logprobs` is {params.logprobs!r} in a request for records; wanted {columns_of(dense)}, whose places "
            "they take."
        )


def _check_theta_prompt(prompt: Any, longest: int, settings: PairSettings) -> None:
    if not settings.two_prompts:
        raise ValueError(
            f"The request has the extra argument `{THETA_PROMPT}`; both models of this server read one stream of "
            f"tokens, as where layers have {ONE_PROMPT}. Drop it, or serve a pair without."
        )
    vocabulary = settings.vocabulary
    if not isinstance(prompt, list) or not all(type(token) is int and 0 <= token < vocabulary for token in prompt):
        raise ValueError(
            f"`{THETA_PROMPT}` is {str(prompt)[:60]}; wanted a list of token ids below {vocabulary}, which both "
            "models read."
        )
    if not 0 < len(prompt) <= longest:
        raise ValueError(
            f"`{THETA_PROMPT}` has {len(prompt)} tokens; wanted 1 to {longest}, the length of the request's prompt."
        )


def _check_teacher_shift(extra: dict[str, Any], length: int) -> None:
    shift = extra[TEACHER_SHIFT]
    if type(shift) is not int or not 0 <= shift < length:
        raise ValueError(
            f"`{TEACHER_SHIFT}` is {shift!r}; wanted a number of tokens from 0 to {length - 1}, fewer than the prompt "
            "has."
        )
    if shift and len(extra.get(THETA_PROMPT, ())) != length:
        raise ValueError(
            f"`{TEACHER_SHIFT}` is {shift} and `{THETA_PROMPT}` has {len(extra.get(THETA_PROMPT, ()))} tokens; wanted "
            f"{length}, as many as the request's prompt: one of the two models reads all of it."
        )


def to_rollouts(outputs: Sequence[RequestOutput], requests: Sequence[Request], pair: Pair) -> list[Rollout]:
    """Return one rollout for each request, from vLLM's outputs in the same order.

    Raises:
        UnsolvedError: naming every request in whose records a model returned NaN, or that was given the cached blocks
            of one that had; it carries the others' rollouts.
    """
    rollouts = [_to_rollout(output, request, pair) for output, request in zip(outputs, requests, strict=True)]
    check_solved(rollouts)
    return rollouts


def _to_rollout(output: RequestOutput, request: Request, pair: Pair) -> Rollout:
    completion = output.outputs[0]
    ids = list(completion.token_ids)
    given: Any = completion.logprobs
    if request.dense is None:
        records, dense = read_records(given, ids, pair.engine_vocabulary), None
    else:
        rows, values = given.arrays()
        records, dense = read_packed(rows, values, ids, request.dense, pair.engine_vocabulary)
    text = request.sampling.cut(pair.text(ids))
    return Rollout.from_request(request, ids, records, text, str(completion.finish_reason), dense)
