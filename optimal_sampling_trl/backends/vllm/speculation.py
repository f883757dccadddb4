"""Speculative sampling of the mixture: its setting, its limits, and the room that vLLM makes for it.

The student drafts a few tokens of each sequence, and one pass of the fused model verifies them: a draft is kept with
probability min(1, q/θ), and the first one that is not is replaced by a draw from what q has more than θ, (q - θ)₊. The
tokens are then those of the mixture, whatever the student drafts (Leviathan et al. 2023, arXiv 2211.17192). What runs
inside vLLM is `worker/speculator.py`.

It is off by default, since a training step gained nothing on an H200 and the speeds missed their goals
(docs/speculative.md). With drafts the engine also refuses `min_p` and grammars, and with `auto` a seed's tokens depend
on the company of a request.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import wraps
from importlib import import_module
from typing import Any

from transformers import PreTrainedConfig

from ...options import check_whole
from ...pairing import Pair, has_states, shares_caches
from ...rollouts.request import Request
from .families import has_experts, has_window, is_on_cpu, latent_sizes
from .pair_settings import KEY
from .versions import minor_version

NUM_SPECULATIVE_TOKENS = "num_speculative_tokens"
"""The engine argument: how many tokens of each sequence the student drafts before the mixture verifies them."""
AUTO, AUTO_COUNTS = "auto", (0, 1, 3)
"""The value by which each step chooses, and what it chooses from. One more is a power of two, as are vLLM's sizes of
graphs, so that each count has a graph for each batch."""
MOST = 8
VERSIONS = ((0, 26),)
"""Minor versions of vLLM on which the tokens were held against the mixture; others draw drafts by other rules."""
COUNTS_BY_BATCH = "num_speculative_tokens_per_batch_size"
METHOD = "draft_model"
"""The kind of drafts for which vLLM's scheduler sets blocks aside, and whose folder holds a whole model."""
SPECULATOR = f"{__package__}.worker.speculator"
"""The module that runs in the worker, named because it imports vLLM."""
SCHEDULER = f"{__package__}.worker.draft_scheduler.DraftScheduler"
"""The scheduler that chooses how many tokens are drafted, named because it imports vLLM."""
SAME_SPEED = "Drop it: the tokens are of the same distribution without."


def speculative_settings(pair: Pair, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the engine arguments by which vLLM makes room for drafts; none without speculation.

    vLLM asks for a draft model's folder and reads sizes from it. The teacher's are named, as nothing is loaded from
    there: the student in the engine drafts.

    Args:
        pair: what the engine is built on.
        arguments: the user's engine arguments.

    Raises:
        ValueError: on a teacher that is the student itself, with which drafts were not checked.
    """
    given = arguments.get(NUM_SPECULATIVE_TOKENS) or 0
    if not given:
        return {}
    if pair.one_model:
        raise ValueError(
            f"`{NUM_SPECULATIVE_TOKENS}` is {given!r}, and the teacher is the student itself; wanted two models. "
            f"{SAME_SPEED}"
        )
    drafts: dict[str, Any] = {"method": METHOD, "model": pair.teacher, "draft_sample_method": "probabilistic"}
    drafts[NUM_SPECULATIVE_TOKENS] = max(AUTO_COUNTS) if given == AUTO else given
    settings = {"async_scheduling": arguments.get("async_scheduling", True)}  # vLLM leaves it off for draft models
    if given == AUTO:
        # vLLM captures graphs for each count in the table; the scheduler chooses by more than the batch.
        drafts[COUNTS_BY_BATCH] = [(size, size, count) for size, count in enumerate(reversed(AUTO_COUNTS), 1)]
        settings["scheduler_cls"] = SCHEDULER
    return settings | {"speculative_config": drafts}


def check_speculation(configs: Mapping[str, PreTrainedConfig], arguments: Mapping[str, Any], context: int) -> None:
    """Refuse speculation where it was not seen to be exact.

    Args:
        configs: of both models, by their roles.
        arguments: the engine's.
        context: most tokens that the engine reads.

    Raises:
        ValueError: naming the setting, and the model or the other setting that goes against it.
    """
    count = arguments.get(NUM_SPECULATIVE_TOKENS) or 0
    if count != AUTO:
        check_whole("The engine", NUM_SPECULATIVE_TOKENS, count, 0, f"Pass one, or {AUTO!r}.", MOST)
    if count and (reason := _reason_against(configs, arguments, context)):
        raise ValueError(f"`{NUM_SPECULATIVE_TOKENS}` is {count!r}, and {reason}. {SAME_SPEED}")


def _reason_against(configs: Mapping[str, PreTrainedConfig], arguments: Mapping[str, Any], context: int) -> str | None:
    from vllm import __version__

    if is_on_cpu():
        return "the engine is to run on a CPU, where vLLM's runner verifies no drafts; wanted a GPU"
    if not is_checked():
        wanted = " or ".join(".".join(map(str, version)) for version in VERSIONS)
        return f"vLLM is {__version__}; drafts were checked on {wanted} alone"
    if arguments[NUM_SPECULATIVE_TOKENS] == AUTO:
        if arguments.get("scheduler_cls"):
            return "`scheduler_cls` is set; a scheduler of this package's chooses. A number goes with yours"
        if arguments.get("async_scheduling") is False:
            return "`async_scheduling` is off, which it takes. A number goes without"
    if (replicas := arguments.get("data_parallel_size") or 1) > 1:
        return f"`data_parallel_size` is {replicas}; drafts were not checked in an engine that is one of several"
    for role, config in configs.items():
        if kind := _unproven(config, context):
            return f"the {role} {config.name_or_path!r} has {kind}; wanted two dense models with full attention"
    return None


def is_checked() -> bool:
    """Tell whether drafts were checked on this version of vLLM."""
    return minor_version() in VERSIONS


def _unproven(config: PreTrainedConfig, context: int) -> str | None:
    """Name what a model has that drafts were not checked with."""
    kinds = {
        "linear attention": has_states(config),
        "latent attention": latent_sizes(config) is not None,
        "windows of attention": has_window(config, context),
        "layers that share a cache": shares_caches(config),
        "experts": has_experts(config),
    }
    return next((kind for kind, is_there in kinds.items() if is_there), None)


def check_drafted(request: Request, index: int) -> None:
    """Refuse a request that vLLM does not serve together with drafts.

    Args:
        request: what is asked for.
        index: its number, for the error.

    Raises:
        ValueError: where it cuts tokens off by `min_p`.
    """
    if request.sampling.min_p > 0:
        raise ValueError(
            f"Request {index} has `min_p` {request.sampling.min_p}, which vLLM refuses beside drafts; wanted 0 in an "
            f"engine with `{NUM_SPECULATIVE_TOKENS}`. Drop one of the two."
        )


def check_drafted_params(params: Any) -> None:
    """Refuse a client's request that drafts do not go with: inside the engine it would stop the step.

    Args:
        params: vLLM's parameters of the request; what vLLM refuses beside drafts, it refuses itself.

    Raises:
        ValueError: on a grammar, for which vLLM takes drafts back after they were drawn.
    """
    if params.structured_outputs is not None:
        raise ValueError(
            "The request asks for structured outputs, and this server drafts tokens; wanted one of them. Drop them, "
            f"or serve without `--{NUM_SPECULATIVE_TOKENS.replace('_', '-')}`."
        )


def draft_with_theta() -> None:
    """Let Model Runner V2 draft with the fused model's own student. May be called any number of times.

    Symptom: vLLM refuses a draft model on this runner, or would load a third model and its cache.
    Cause: its speculators bring weights of their own, and `draft_model` is written for the first runner alone.
    Safe: an engine whose model is the fused one gets this package's speculator; others keep vLLM's.
    Upstream: Model Runner V2 takes `draft_model` since 0.31, with a copy of the weights and without CUDA graphs.
    Delete when: vLLM takes a speculator's class from the model, as it takes the model state's.
    """
    if not is_checked():
        return
    from vllm.config import VllmConfig
    from vllm.v1.worker.gpu import spec_decode

    if hasattr(spec_decode.init_speculator, "__wrapped__"):
        return
    make, list_unsupported = spec_decode.init_speculator, VllmConfig._get_v2_model_runner_unsupported_features

    @wraps(make)
    def init_speculator(vllm_config: Any, device: Any, *args: Any) -> Any:
        if not is_fused(vllm_config):
            return make(vllm_config, device, *args)
        module = import_module(SPECULATOR)
        module.tell_counts()
        return module.ThetaSpeculator(vllm_config, device)

    @wraps(list_unsupported)
    def unsupported(self: Any) -> list[str]:
        return [words for words in list_unsupported(self) if not (is_fused(self) and METHOD in words)]

    # The runner takes the function by its name when it is imported, which is after vLLM's plugins are loaded.
    setattr(spec_decode, init_speculator.__name__, init_speculator)
    setattr(VllmConfig, list_unsupported.__name__, unsupported)


def is_fused(vllm_config: Any) -> bool:
    """Tell whether a configuration of vLLM is the fused model's, or that of one of its two models."""
    return KEY in (vllm_config.additional_config or {})
