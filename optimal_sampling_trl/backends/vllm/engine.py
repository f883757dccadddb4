"""The fused engine: built from two names, asked with requests, answered with rollouts."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ...pairing import Ending, check_prompt
from ...request import Request
from ...rollout import Rollout
from .limits import Pair, check_arguments, check_pair, check_platform
from .plugin import ARCHITECTURE, require
from .weights import clean_caches, reload_theta

if TYPE_CHECKING:
    from vllm import LLM, RequestOutput, SamplingParams

WORKER = "optimal_sampling_trl.backends.vllm.weights.OptimalSamplingWorker"
COLDEST, HOTTEST = 0.01, 2.0
"""The temperatures above 0 that vLLM takes as they are."""


def build_llm(teacher: str, theta: str, **engine_arguments: Any) -> LLM:
    """Start vLLM on a teacher with a student beside it, in this process.

    Args:
        teacher: the teacher's folder or name; what the engine takes for its model.
        theta: the student's folder or name.
        **engine_arguments: those of `vllm.LLM`; `max_model_len` defaults to what both models can read.

    Returns:
        a `vllm.LLM`, whose requests `to_sampling_params` makes; `pair_of` tells what it was built on.

    Raises:
        ImportError: where vLLM is missing, unsuited, or did not load this package's plugin.
        ValueError: on a pair or an argument that the engine refuses (limits.py), before anything is started.
    """
    require()
    check_arguments(engine_arguments)
    check_platform(engine_arguments)
    pair = check_pair(teacher, theta, engine_arguments)
    ending = {"stop": pair.ending.stop, "folded": pair.ending.folded}
    ours = {
        "max_model_len": pair.context,
        "hf_overrides": {**(engine_arguments.get("hf_overrides") or {}), "architectures": [ARCHITECTURE]},
        "additional_config": {
            **(engine_arguments.get("additional_config") or {}),
            "optimal_sampling": {"theta": theta, "ending": ending},
        },
        "worker_extension_cls": WORKER,
        "logprobs_mode": "processed_logprobs",
    }
    from vllm import LLM

    with _in_this_process():
        llm = LLM(teacher, **{**engine_arguments, **ours})
    vars(llm)["optimal_sampling_pair"] = pair
    try:
        llm.collective_rpc("install_mixture_sampler")
    except BaseException:
        shut_down(llm)
        raise
    return llm


def pair_of(llm: LLM) -> Pair:
    """What `build_llm` built an engine on."""
    return vars(llm)["optimal_sampling_pair"]


@contextmanager
def _in_this_process() -> Iterator[None]:
    """vLLM's core beside the caller, where the student's weights can be reached; Model Runner V2 on a GPU."""
    from vllm.platforms import current_platform

    settings = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    if not current_platform.is_cpu():
        settings["VLLM_USE_V2_MODEL_RUNNER"] = "1"
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def shut_down(llm: LLM) -> None:
    """Free an engine's models and caches. Doing so twice is fine."""
    llm.llm_engine.engine_core.shutdown()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def to_sampling_params(request: Request, ending: Ending) -> SamplingParams:
    """vLLM's parameters of one request that asks for its records.

    Where no stop texts are asked for vLLM does not turn tokens into text: `to_rollouts` does it once at the end.
    """
    from vllm import SamplingParams

    from .sampler import COLUMNS, RECORD

    sampling = request.sampling
    return SamplingParams(
        max_tokens=sampling.max_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        seed=sampling.seed,
        stop=list(sampling.stop),
        detokenize=bool(sampling.stop),
        stop_token_ids=[] if sampling.ignore_eos else list(ending.stop),
        ignore_eos=True,  # vLLM would stop at the teacher's end, too
        logprobs=COLUMNS,
        flat_logprobs=True,
        extra_args={RECORD: 1, **request.mixture.to_dict()},
    )


def to_rollouts(outputs: Sequence[RequestOutput], requests: Sequence[Request], pair: Pair) -> list[Rollout]:
    """One rollout for each request, from vLLM's outputs in the same order.

    Raises:
        ValueError: naming every request in whose records a model returned NaN, or that was given the cached blocks of
            one that had.
    """
    rollouts = [_to_rollout(output, request, pair) for output, request in zip(outputs, requests, strict=True)]
    broken = [index for index, rollout in enumerate(rollouts) if bool(rollout.alpha.isnan().any())]
    if broken:
        pair.has_nan = True
        alone = ", ".join(map(str, broken[:10])) + (" and more" if len(broken) > 10 else "")
        raise ValueError(
            f"Request{'s' if len(broken) > 1 else ''} {alone}: the teacher or the student returned NaN, or no token "
            f"has mass under both. The other {len(rollouts) - len(broken)} requests were sampled rightly. Look for "
            f"NaN in the weights of the student ({pair.theta!r} or those last loaded), then of the teacher "
            f"({pair.teacher!r})."
        )
    return rollouts


def generate(llm: LLM, requests: Sequence[Request]) -> tuple[list[RequestOutput], list[Rollout]]:
    """vLLM's outputs and the rollouts in them, one of each for each request, in their order.

    Raises:
        ValueError: on a request that cannot be served, before any is; and where a model returned NaN.
        RuntimeError: after a reload that failed half-way.
    """
    from vllm import TokensPrompt

    pair = pair_of(llm)
    if pair.stale:
        raise RuntimeError(f"The engine refuses to sample: {pair.stale}. Load the whole student again.")
    clean_caches(llm, pair)
    for index, request in enumerate(requests):
        check_request(request, pair, index)
    if not requests:
        return [], []
    try:
        outputs = llm.generate(
            [TokensPrompt(prompt_token_ids=request.prompt_ids) for request in requests],
            [to_sampling_params(request, pair.ending) for request in requests],
            use_tqdm=False,
        )
    except BaseException:  # an interrupt, too: what was left would come back among the next call's outputs
        left = list(llm.llm_engine.output_processor.request_states)
        llm.llm_engine.abort_request(left, internal=True)
        raise
    return outputs, to_rollouts(outputs, requests, pair)


def _to_rollout(output: RequestOutput, request: Request, pair: Pair) -> Rollout:
    completion = output.outputs[0]
    ids = list(completion.token_ids)
    log_q, alpha, log_theta, log_teacher = read_records(completion.logprobs, ids, pair.engine_vocabulary)
    return Rollout(
        prompt_ids=request.prompt_ids,
        theta_prompt_ids=request.theta_prompt_ids,
        completion_ids=ids,
        alpha=alpha,
        log_q=log_q,
        log_theta=log_theta,
        log_teacher=log_teacher,
        text=completion.text if request.sampling.stop else str(pair.tokenizer.decode(ids, skip_special_tokens=True)),
        finish_reason=str(completion.finish_reason),
        mixture=request.mixture,
        temperature=request.sampling.temperature,
    )


def read_records(logprobs: Any, token_ids: Sequence[int], engine_vocabulary: int) -> tuple[Tensor, ...]:
    """log q, α, log θ and log t, each (T,) float32, from the flat log-probabilities of T tokens.

    Raises:
        RuntimeError: where vLLM did not hand back the columns of a record, or those of other tokens.
    """
    T = len(token_ids)
    if T == 0:
        return tuple(torch.zeros(4, 0))
    ids = np.array(logprobs.token_ids, dtype=np.int64)
    wanted = np.empty((T, 4), dtype=np.int64)
    wanted[:, 0], wanted[:, 1:] = token_ids, engine_vocabulary + np.arange(3)
    if ids.shape != (4 * T,) or not np.array_equal(ids.reshape(T, 4), wanted):
        raise RuntimeError(
            f"vLLM returned log-probabilities of the ids {ids[:8].tolist()}...; wanted {wanted.ravel()[:8].tolist()}"
            "...: the mixture's sampler is not installed in this engine, or another column is in its way."
        )
    return torch.from_numpy(np.array(logprobs.logprobs, dtype=np.float32).reshape(T, 4).T.copy()).unbind(0)


class VLLMBackend:
    """The backend `vllm`: see `backends.Backend`.

    Args:
        teacher: the teacher's folder or name.
        theta: the student's folder or name.
        gpu_memory_utilization: vLLM's share of the device's memory; on the CPU of the machine's.
        **engine_arguments: further arguments of `vllm.LLM`, see `build_llm`.

    Raises:
        ImportError: see `build_llm`.
        ValueError: see `build_llm`.
    """

    name = "vllm"

    def __init__(
        self, teacher: str, theta: str, *, gpu_memory_utilization: float = 0.5, **engine_arguments: Any
    ) -> None:
        self._llm: LLM | None = build_llm(
            teacher, theta, gpu_memory_utilization=gpu_memory_utilization, **engine_arguments
        )
        self.pair = pair_of(self._llm)

    @property
    def llm(self) -> LLM:
        """The engine.

        Raises:
            RuntimeError: after `close`.
        """
        if self._llm is None:
            raise RuntimeError("This engine was closed. Build another one.")
        return self._llm

    def generate(self, requests: Sequence[Request]) -> list[Rollout]:
        """One rollout for each request, in their order.

        Raises:
            ValueError: on a request that cannot be served, before any is; and where a model returned NaN.
            RuntimeError: after a reload that failed half-way, or after `close`.
        """
        return generate(self.llm, requests)[1]

    def load_theta(self, named_parameters: Iterable[tuple[str, Tensor]]) -> None:
        """Replace the student's weights in place: see `weights.reload_theta`."""
        reload_theta(self.llm, self.pair, named_parameters)

    def sleep(self) -> None:
        """Move both models to the host's memory and drop the caches (vLLM's level 1); on a CPU nothing is to be freed.

        Raises:
            ValueError: where the engine was not built with `enable_sleep_mode=True`.
        """
        if self._sleeps("sleep"):
            self.llm.sleep(level=1)

    def wake_up(self) -> None:
        """Undo `sleep`; fine on an engine that is awake."""
        if self._sleeps("wake up") and self.llm.llm_engine.is_sleeping():
            self.llm.wake_up()

    def _sleeps(self, what: str) -> bool:
        from vllm.platforms import current_platform

        if current_platform.is_cpu():
            return False
        if not self.llm.llm_engine.model_config.enable_sleep_mode:
            raise ValueError(f"This engine cannot {what}: build it with `enable_sleep_mode=True`.")
        return True

    def close(self) -> None:
        """Free the engine. Doing so twice is fine."""
        if self._llm is not None:
            llm, self._llm = self._llm, None
            shut_down(llm)


def check_request(request: Request, pair: Pair, index: int) -> None:
    """Refuse a request that the fused engine cannot serve.

    Raises:
        ValueError: on a prompt that is empty, too long or no tokens, on a prompt of the student's own, and on a
            temperature that vLLM would not sample at.
    """
    if list(request.prompt_ids) != list(request.theta_prompt_ids):
        raise ValueError(
            f"Request {index} has a prompt for the teacher ({len(request.prompt_ids)} tokens) and another for the "
            f"student ({len(request.theta_prompt_ids)} tokens). In this engine both models read one stream of tokens "
            "under Model Runner V1. Use backend='transformers', or give both the same system prompt."
        )
    check_prompt(request.prompt_ids, pair.context, pair.vocabulary, index, "teacher")
    if request.sampling.temperature and not COLDEST <= request.sampling.temperature <= HOTTEST:
        raise ValueError(
            f"Request {index} has `temperature` {request.sampling.temperature}; wanted 0, or {COLDEST} to {HOTTEST}, "
            "beyond which vLLM changes or refuses it. Use backend='transformers'."
        )
