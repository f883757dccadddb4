"""The fused engine: it is built from two names, takes requests and returns rollouts."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ...pairing import NamedWeights, Pair
from ...rollouts.progress import Progress
from ...rollouts.request import LAST_SEED, Request
from ...rollouts.rollout import Rollout, UnsolvedError
from . import GPU_MEMORY_UTILIZATION
from .families import is_on_cpu
from .launch import engine_settings, in_this_process, keep_generators, quick_settings, quiet, warn_of_precision
from .limits import check_arguments, check_pair, check_platform
from .neighbours import Neighbour
from .plugin import require
from .requests import check_request, most_columns, refuse_added, to_rollouts, to_sampling_params
from .rows import keep_rows
from .speculation import NUM_SPECULATIVE_TOKENS, check_drafted
from .wire import scheduled_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from vllm import LLM, RequestOutput, SamplingParams

HALF_LOADED = "a reload of the student failed half-way, so that its weights are partly old, partly new"


class VLLMBackend:
    """The backend `vllm` (see `backends.Backend`): owns vLLM's engine in this process, and all that belongs to it.

    Args:
        teacher: the teacher's folder or name; what the engine takes for its model.
        theta: the student's folder or name.
        pair: what both models share, if it was read already from these names and arguments.
        gpu_memory_utilization: vLLM's share of the device's memory; on a CPU, of the machine's.
        **engine_arguments: further arguments of `vllm.LLM`; `max_model_len` defaults to what both models can read.
            `num_speculative_tokens` (0) is how many tokens the student drafts at a time, or "auto"
            (docs/speculative.md).

    Attributes:
        pair: what the engine was built on.
        stale: why the engine must not sample until the next reload; None if it may.
        has_nan: whether a model returned NaN since the caches were last cleaned.

    Raises:
        ImportError: where vLLM is missing, unsuited, or did not load this package's plugin.
        ValueError: on a pair or an argument that the engine refuses (limits.py), before anything is started.
    """

    name = "vllm"

    def __init__(
        self,
        teacher: str,
        theta: str,
        *,
        pair: Pair | None = None,
        gpu_memory_utilization: float = GPU_MEMORY_UTILIZATION,
        **engine_arguments: Any,
    ) -> None:
        quiet()
        require()
        arguments = quick_settings() | engine_arguments | {"gpu_memory_utilization": gpu_memory_utilization}
        check_arguments(arguments)
        check_platform(arguments)
        self.pair = check_pair(teacher, theta, arguments) if pair is None else pair
        self.stale: str | None = None
        self.has_nan = False
        self._neighbour = Neighbour()
        self._llm: LLM | None = self._start(arguments)
        self._neighbour.enter()
        try:
            warn_of_precision(self._llm.llm_engine.model_config, arguments)  # raises where warnings are errors
            self._llm.collective_rpc("install_mixture_sampler")
        except BaseException:
            self.close()
            raise

    def _start(self, arguments: dict[str, Any]) -> LLM:
        from vllm import LLM

        most = {"max_logprobs": most_columns(self.pair)}
        settings = {**most, **arguments, **engine_settings(self.pair, arguments)}
        settings.pop(NUM_SPECULATIVE_TOKENS, None)
        seeds = nullcontext() if arguments.get("seed") is not None else keep_generators()
        with in_this_process(), seeds:
            llm = LLM(self.pair.teacher, **settings)
        keep_rows(llm.llm_engine)
        refuse_added(llm.llm_engine)
        return llm

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The pair's tokenizer."""
        return self.pair.tokenizer

    @property
    def llm(self) -> LLM:
        """vLLM's engine, for measurements and tests; `to_sampling_params` makes its parameters of a request.

        Raises:
            RuntimeError: after `close`.
        """
        if self._llm is None:
            raise RuntimeError("This engine was closed. Build another one.")
        return self._llm

    def check(self, request: Request, index: int) -> None:
        """Refuse a request that cannot be served: see `requests.check_request`."""
        check_request(request, self.pair, index, self.llm.llm_engine.model_config.max_logprobs)
        if self.llm.llm_engine.vllm_config.speculative_config is not None:
            check_drafted(request, index)

    def generate(self, requests: Sequence[Request], progress: Progress | None = None) -> list[Rollout]:
        """Sample one rollout for each request, in their order. vLLM shows its bar; `progress` counts at the end.

        Raises:
            ValueError: on a request that cannot be served, before any is; and where a model returned NaN.
            RuntimeError: while the engine sleeps, after a reload that failed half-way, or after `close`.
        """
        rollouts = self.sample(requests, use_tqdm=progress is not None and progress.shown)[1]
        if progress is not None:
            progress.add(rollouts)
        return rollouts

    def sample(self, requests: Sequence[Request], use_tqdm: bool = False) -> tuple[list[RequestOutput], list[Rollout]]:
        """Return vLLM's outputs and their rollouts, one of each per request, in the requests' order.

        Where no request needs the teacher, the student runs alone.

        Args:
            requests: what is asked for.
            use_tqdm: show vLLM's own bar while it works.

        Raises:
            ValueError: see `generate`.
            RuntimeError: see `generate`.
        """
        self._check_ready()
        self.clean_caches()
        for index, request in enumerate(requests):
            self.check(request, index)
        if not requests:
            return [], []
        with self._alone(not any(request.needs_teacher for request in requests)):
            outputs = self._run(requests, use_tqdm)
        try:
            return outputs, to_rollouts(outputs, requests, self.pair)
        except UnsolvedError:
            self.has_nan = True
            raise

    def _check_ready(self) -> None:
        if self.llm.llm_engine.is_sleeping():  # it would take the requests and never schedule them
            raise RuntimeError("The engine sleeps. Call `wake_up()` before sampling.")
        if self.stale:
            raise RuntimeError(f"The engine refuses to sample: {self.stale}. Load the whole student again.")

    def _run(self, requests: Sequence[Request], use_tqdm: bool) -> list[RequestOutput]:
        from vllm import TokensPrompt

        parameters = [to_sampling_params(request, self.pair.ending) for request in requests]
        self.share_seeds(parameters)
        try:
            with self._neighbour.sampling():
                return self.llm.generate(
                    [TokensPrompt(prompt_token_ids=scheduled_prompt(request)) for request in requests],
                    parameters,
                    use_tqdm=partial(tqdm, leave=False) if use_tqdm else False,
                )
        except BaseException:  # an interrupt, too: its requests would come back among the next call's outputs
            engine = self.llm.llm_engine
            engine.abort_request(list(engine.output_processor.request_states), internal=True)
            raise

    @contextmanager
    def _alone(self, wanted: bool) -> Iterator[None]:
        """Run the student alone inside the block, and drop what is cached there: it lacks the teacher's part.

        Where the teacher verifies drafts, or other requests run, both models run as ever.
        """
        engine = self.llm.llm_engine
        if not wanted or engine.vllm_config.speculative_config is not None or engine.has_unfinished_requests():
            yield
            return
        try:
            self._set_alone(True)
            yield
        finally:
            self._set_alone(False)
            self._drop_prefixes("without the teacher")

    def _set_alone(self, alone: bool) -> None:
        with self._neighbour.sampling():  # it may capture CUDA graphs
            self.llm.collective_rpc("set_alone", args=(alone,))

    def prepare_alone(self) -> None:
        """Capture the CUDA graphs of the student alone, if there are any; else the first call without a teacher does.

        While graphs are captured no other thread of the process may allocate on the GPU, such as a trainer's loader.
        """
        with self._alone(True):
            pass

    def share_seeds(self, parameters: Sequence[SamplingParams]) -> None:
        """Give requests without a seed one of torch's global generator, the same on all ranks of tensor parallelism.

        Symptom: each rank goes on with a token of its own, and the caches no longer match; on a GPU torch's seed does
            not repeat the tokens of one rank either.
        Cause: a request without a seed is drawn from a generator of the process, which a training process shares. It
            is torch's on a CPU, and NumPy's in Model Runner V2.
        Safe: the first rank draws a seed for each such request and sends it to the others; one rank alone on a CPU
            needs none.
        Upstream: none found. TRL starts the ranks from one seed, which holds until one of them draws on its own.
        Delete when: vLLM's ranks agree on the token, and draw from torch's generator.
        """
        from vllm.distributed.parallel_state import get_tp_group

        has_ranks = self.llm.llm_engine.vllm_config.parallel_config.tensor_parallel_size > 1
        if all(one.seed is not None for one in parameters) or (is_on_cpu() and not has_ranks):
            return
        seeds = torch.randint(LAST_SEED, (len(parameters),)).tolist()
        if has_ranks:
            seeds = get_tp_group().broadcast_object(seeds)
        for one, seed in zip(parameters, seeds, strict=True):
            one.seed = seed if one.seed is None else one.seed

    def load_theta(self, named_parameters: NamedWeights) -> None:
        """Replace the student's weights in place and forget what was cached under the old ones.

        A list is checked as a whole first; if it is refused, the old weights stay. A generator is loaded as it comes,
        because each of its tensors may be gathered for a moment only. If that fails half-way, the engine refuses to
        sample until a whole set has been loaded.

        Args:
            named_parameters: every weight of the student under its checkpoint's name, as pairs or as a `state_dict`;
                the output layer of a tied one may be left out.

        Raises:
            RuntimeError: while requests run, where vLLM keeps cached blocks, or after `close`.
            ValueError: where weights are missing, unknown or of another shape, naming them.
        """
        if self.llm.llm_engine.has_unfinished_requests():
            raise RuntimeError(
                "The student cannot be reloaded while requests run: their first tokens would be another model's. "
                "Wait until `generate` returned, or abort them."
            )
        if isinstance(named_parameters, Mapping):
            named_parameters = list(named_parameters.items())
        if isinstance(named_parameters, Sequence):
            self.llm.collective_rpc("check_theta_weights", args=(named_parameters,))
        self.clean_caches()

        def begun() -> Iterator[tuple[str, Tensor]]:
            for item in named_parameters:
                self.stale = HALF_LOADED
                yield item

        self.llm.collective_rpc("load_theta_weights", args=(begun(),))
        self._drop_prefixes("under the student's old weights")
        self.stale = None

    def _drop_prefixes(self, cached: str) -> None:
        """Empty the prefix cache; where vLLM keeps blocks, the engine samples no more until the next reload."""
        if not self.llm.reset_prefix_cache():
            self.stale = f"vLLM did not drop the blocks that were cached {cached}"
            raise RuntimeError(f"{self.stale[0].upper()}{self.stale[1:]}: some request still holds them.")

    def clean_caches(self) -> None:
        """Drop what a NaN left in the caches. Does nothing where no model returned one, or while requests run.

        Symptom: on the CPU requests return NaN after weights with a NaN were replaced by good ones.
        Cause: freed blocks keep their values, and the attention kernel multiplies those past the end by 0.
        Safe: after a NaN all caches are zeroed and no prefix is kept, while nothing runs.
        Upstream: `needs_kv_cache_zeroing` is true for recurrent layers alone (vLLM issue 35219).
        Delete when: test_nan_is_named_and_harms_no_other passes without this function.
        """
        if self.has_nan and not self.llm.llm_engine.has_unfinished_requests():
            self.llm.collective_rpc("zero_caches")
            self.llm.reset_prefix_cache()
            self.has_nan = False

    def weight_digest(self, role: str) -> str | None:
        """Return a digest that changes with the student's weights; None while weights are those of the files."""
        reloaded = role == "theta" or self.pair.one_model
        return self.llm.collective_rpc("theta_digest")[0] if reloaded else None

    def sleep(self) -> None:
        """Move both models to the host's memory and drop the caches; on a CPU there is nothing to free.

        Symptom: after `sleep(level=2)` the teacher is gone, and TRL pushes back the student alone.
        Cause: level 2 frees all weights, as they would be replaced.
        Safe: this backend sleeps at level 1, which keeps both models in the host's memory.
        Upstream: none; it is what level 2 is for.
        Delete when: the teacher can be kept by name.

        Raises:
            ValueError: where the engine was not built with `enable_sleep_mode=True`.
        """
        if self._sleeps("sleep"):
            self.llm.sleep(level=1)

    def wake_up(self, tags: list[str] | None = None) -> None:
        """Undo `sleep`; fine on an engine that is awake.

        Args:
            tags: wake `"weights"` or `"kv_cache"` alone; by default both.

        Raises:
            ValueError: see `sleep`.
        """
        if self._sleeps("wake up") and self.llm.llm_engine.is_sleeping():
            self.llm.wake_up(tags=tags)

    def _sleeps(self, what: str) -> bool:
        if is_on_cpu():
            return False
        if not self.llm.llm_engine.model_config.enable_sleep_mode:
            raise ValueError(f"This engine cannot {what}: build it with `enable_sleep_mode=True`.")
        return True

    def close(self) -> None:
        """Free the engine's models and caches. Doing so twice is fine."""
        if self._llm is None:
            return
        llm, self._llm = self._llm, None
        with self._neighbour.leaving():
            llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
