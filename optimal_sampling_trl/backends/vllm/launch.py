"""The start of vLLM on a pair: the settings that this backend gives it, in process and in a server."""

from __future__ import annotations

import logging
import os
import random
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from ...pairing import Pair
from ...user_warnings import warn_user
from . import states
from .families import OTHER_BACKEND, is_on_cpu
from .limits import ONE_PROMPT
from .pair_settings import KEY, PairSettings
from .plugin import ARCHITECTURE, HYBRID
from .speculation import speculative_settings

WORKER = "optimal_sampling_trl.backends.vllm.worker.weights.OptimalSamplingWorker"
"""The class that vLLM adds to the bases of its worker, by its path."""


def engine_settings(
    pair: Pair, engine_arguments: Mapping[str, Any], told: PairSettings | None = None
) -> dict[str, Any]:
    """Return the engine arguments that this backend sets.

    Args:
        pair: what the engine is built on.
        engine_arguments: the user's, which are added to.
        told: what the engine tells about the pair; by default what its own processes need.

    Raises:
        ValueError: on a teacher that is the student itself, where the engine has one prompt for both.
    """
    if pair.one_model and not pair.two_prompts:
        raise ValueError(
            f"The teacher is the student {pair.theta!r} itself, with a prompt of its own, and the engine gives both "
            f"models one prompt where layers have {ONE_PROMPT}. Wanted a student without. {OTHER_BACKEND}"
        )
    told = told or PairSettings.of(pair)
    groups = {"disable_hybrid_kv_cache_manager": True} if told.has_one_table and pair.windows else {}
    architecture = HYBRID if pair.has_states else ARCHITECTURE
    return {
        **groups,
        **(states.SETTINGS if pair.has_states else {}),
        "max_model_len": pair.context,
        "hf_overrides": {**(engine_arguments.get("hf_overrides") or {}), "architectures": [architecture]},
        "additional_config": {**(engine_arguments.get("additional_config") or {}), KEY: told.to_dict()},
        "worker_extension_cls": WORKER,
        "logprobs_mode": "processed_logprobs",
        **speculative_settings(pair, engine_arguments),
    }


def platform_settings() -> dict[str, str]:
    """Return the variables that vLLM starts under: Model Runner V2 on a GPU, V1 on a CPU, even one with Triton."""
    return {"VLLM_USE_V2_MODEL_RUNNER": "0" if is_on_cpu() else "1"}


def quiet() -> None:
    """Let vLLM log only warnings and errors unless `VLLM_LOGGING_LEVEL` is set; else it logs thirty lines at each
    start.

    vLLM reads the variable when it is imported. On a CPU it also warns then that Triton has no driver.
    """
    warnings.filterwarnings("ignore", message=r".*torch\.distributed\.reduce_op", category=FutureWarning)
    if "VLLM_LOGGING_LEVEL" not in os.environ:
        os.environ["VLLM_LOGGING_LEVEL"] = "WARNING"
        logging.getLogger("vllm").setLevel(logging.WARNING)  # where it was imported before
        if not torch.cuda.is_available():
            logging.getLogger("vllm.triton_utils.importing").setLevel(logging.ERROR)


def quick_settings() -> dict[str, Any]:
    """Return the defaults of engine arguments: no bar for each shard, and on a CPU no compilation."""
    return {"use_tqdm_on_load": False} | ({"enforce_eager": True} if is_on_cpu() else {})


def warn_of_precision(model_config: Any, arguments: Mapping[str, Any]) -> None:
    """Warn where vLLM computes in fewer bits than the teacher's files have, and nobody asked for it.

    Args:
        model_config: that of vLLM's engine.
        arguments: the user's.
    """
    stored, used = getattr(model_config.hf_config, "dtype", None), model_config.dtype
    if (
        arguments.get("dtype") in (None, "auto")
        and isinstance(stored, torch.dtype)
        and stored.itemsize > used.itemsize
    ):
        warn_user(
            f"The teacher's files hold {stored}, and vLLM samples with {used}, its default for them. Pass "
            f"dtype={_name(stored)!r} to keep their precision, or dtype={_name(used)!r} to say that it is meant.",
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@contextmanager
def keep_generators() -> Iterator[None]:
    """Put the process's random generators back as they were before the block.

    Symptom: whatever seed a program sets before it builds an engine, requests without a seed get the same tokens.
    Cause: `seed` of vLLM's engine is 0 by default, and its worker seeds `random`, NumPy and torch with it.
    Safe: a worker of the caller's process leaves the caller's generators alone, unless the caller sets `seed`.
    Upstream: none found.
    Delete when: an engine can be built without a seed.
    """
    of_random, of_numpy, of_torch = random.getstate(), np.random.get_state(), torch.get_rng_state()
    on_gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    try:
        yield
    finally:
        random.setstate(of_random)
        np.random.set_state(of_numpy)
        torch.set_rng_state(of_torch)
        if on_gpus is not None:
            torch.cuda.set_rng_state_all(on_gpus)
        elif torch.cuda.is_initialized():  # those of GPUs had not begun, and begin with the seed of the CPU's
            torch.cuda.manual_seed_all(torch.initial_seed())


@contextmanager
def in_this_process() -> Iterator[None]:
    """Let vLLM start its core inside the caller's process, where the student's weights can be reached.

    Only these variables are restored: `patch.dict` would also undo what vLLM sets for its own later use.
    """
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
