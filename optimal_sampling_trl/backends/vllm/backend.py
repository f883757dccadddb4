"""The fused engine: built from two names, asked with requests, answered with rollouts."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ...rollouts.progress import Progress
from ...rollouts.request import Request
from ...rollouts.rollout import Rollout
from .limits import Pair, check_arguments, check_pair, check_platform
from .plugin import ARCHITECTURE, require
from .requests import check_request, to_rollouts, to_sampling_params
from .versions import (
    forget_workspace,
    keeping,
    own_graph_pool,
    process_group,
    sharing_groups,
    workspace,
    workspace_of,
)
from .worker.weights import clean_caches, reload_theta

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from vllm import LLM, RequestOutput, SamplingParams

_OPEN: WeakSet[LLM] = WeakSet()
"""The engines in this process that are not shut down."""
WORKER = "optimal_sampling_trl.backends.vllm.worker.weights.OptimalSamplingWorker"


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
    from vllm import LLM

    own_graph_pool()
    group = vars(next(iter(_OPEN)))["optimal_sampling_group"] if _OPEN else process_group()
    with _in_this_process():
        llm = LLM(teacher, **{**engine_arguments, **engine_settings(pair, engine_arguments)})
    vars(llm).update(optimal_sampling_pair=pair, optimal_sampling_group=group, optimal_sampling_workspace=workspace())
    _OPEN.add(llm)
    try:
        llm.collective_rpc("install_mixture_sampler")
    except BaseException:
        shut_down(llm)
        raise
    return llm


def engine_settings(pair: Pair, engine_arguments: dict[str, Any], **further: Any) -> dict[str, Any]:
    """The engine arguments that this backend sets, in process and in a server.

    Args:
        pair: what the engine is built on.
        engine_arguments: the user's, which are added to.
        **further: what else the engine is to tell about itself.
    """
    ending = {"stop": pair.ending.stop, "folded": pair.ending.folded}
    return {
        "max_model_len": pair.context,
        "hf_overrides": {**(engine_arguments.get("hf_overrides") or {}), "architectures": [ARCHITECTURE]},
        "additional_config": {
            **(engine_arguments.get("additional_config") or {}),
            "optimal_sampling": {"theta": pair.theta, "ending": ending, **further},
        },
        "worker_extension_cls": WORKER,
        "logprobs_mode": "processed_logprobs",
    }


def pair_of(llm: LLM) -> Pair:
    """What `build_llm` built an engine on."""
    return vars(llm)["optimal_sampling_pair"]


def platform_settings() -> dict[str, str]:
    """The variables that vLLM starts under: Model Runner V2 on a GPU."""
    from vllm.platforms import current_platform

    return {} if current_platform.is_cpu() else {"VLLM_USE_V2_MODEL_RUNNER": "1"}


@contextmanager
def _in_this_process() -> Iterator[None]:
    """vLLM's core beside the caller, where the student's weights can be reached."""
    settings = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", **platform_settings()}
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
    _OPEN.discard(llm)
    own = vars(llm).pop("optimal_sampling_workspace", None)
    with keeping(vars(llm).get("optimal_sampling_group")), sharing_groups(bool(_OPEN)), workspace_of(own):
        llm.llm_engine.engine_core.shutdown()
    forget_workspace(own)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def generate(
    llm: LLM, requests: Sequence[Request], use_tqdm: bool = False
) -> tuple[list[RequestOutput], list[Rollout]]:
    """vLLM's outputs and the rollouts in them, one of each for each request, in their order.

    Args:
        use_tqdm: show vLLM's own bar while it works.

    Raises:
        ValueError: on a request that cannot be served, before any is; and where a model returned NaN.
        RuntimeError: while the engine sleeps, and after a reload that failed half-way.
    """
    from vllm import TokensPrompt

    pair = pair_of(llm)
    if llm.llm_engine.is_sleeping():  # it would take the requests and never schedule them
        raise RuntimeError("The engine sleeps. Call `wake_up()` before sampling.")
    if pair.stale:
        raise RuntimeError(f"The engine refuses to sample: {pair.stale}. Load the whole student again.")
    clean_caches(llm, pair)
    for index, request in enumerate(requests):
        check_request(request, pair, index)
    if not requests:
        return [], []
    parameters = [to_sampling_params(request, pair.ending) for request in requests]
    share_seeds(llm, parameters)
    try:
        with workspace_of(vars(llm)["optimal_sampling_workspace"]):
            outputs = llm.generate(
                [TokensPrompt(prompt_token_ids=request.prompt_ids) for request in requests],
                parameters,
                use_tqdm=partial(tqdm, leave=False) if use_tqdm else False,
            )
    except BaseException:  # an interrupt, too: what was left would come back among the next call's outputs
        left = list(llm.llm_engine.output_processor.request_states)
        llm.llm_engine.abort_request(left, internal=True)
        raise
    return outputs, to_rollouts(outputs, requests, pair)


def share_seeds(llm: LLM, parameters: Sequence[SamplingParams]) -> None:
    """Under tensor parallelism, give requests without a seed one that all ranks have: the trap `seeds_of_ranks`."""
    if llm.llm_engine.vllm_config.parallel_config.tensor_parallel_size == 1:
        return
    from vllm.distributed.parallel_state import get_tp_group

    seeds = get_tp_group().broadcast_object(torch.randint(2**31, (len(parameters),)).tolist())
    for one, seed in zip(parameters, seeds, strict=True):
        one.seed = seed if one.seed is None else one.seed


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
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The pair's."""
        return self.pair.tokenizer

    @property
    def llm(self) -> LLM:
        """The engine.

        Raises:
            RuntimeError: after `close`.
        """
        if self._llm is None:
            raise RuntimeError("This engine was closed. Build another one.")
        return self._llm

    def check(self, request: Request, index: int) -> None:
        """Refuse a request that cannot be served: see `requests.check_request`."""
        check_request(request, self.pair, index)

    def generate(self, requests: Sequence[Request], progress: Progress | None = None) -> list[Rollout]:
        """One rollout for each request, in their order; `progress` has vLLM's bar below it, and counts at the end.

        Raises:
            ValueError: on a request that cannot be served, before any is; and where a model returned NaN.
            RuntimeError: after a reload that failed half-way, or after `close`.
        """
        rollouts = generate(self.llm, requests, use_tqdm=progress is not None and progress.shown)[1]
        if progress is not None:
            progress.add(rollouts)
        return rollouts

    def load_theta(self, named_parameters: Iterable[tuple[str, Tensor]]) -> None:
        """Replace the student's weights in place: see `weights.reload_theta`."""
        reload_theta(self.llm, self.pair, named_parameters)

    def theta_digest(self) -> str | None:
        """A number that changes with the student's weights; None as long as they are the folder's."""
        return self.llm.collective_rpc("theta_digest")[0]

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
