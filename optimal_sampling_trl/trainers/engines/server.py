"""TRL's `vllm_mode="server"`: rollouts from a server that `optimal-sampling-serve` started.

TRL's own client speaks to it. Weights go TRL's way, over NCCL, for which trainer and server need a GPU each. A batch
is taken only if the server had the weights of the last push before and after it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from functools import partial
from itertools import groupby
from typing import Any
from unittest.mock import patch

import requests
import torch
from requests.adapters import HTTPAdapter
from trl.generation import vllm_generation
from urllib3.util.retry import Retry

from ...rollouts.request import Request
from ...rollouts.rollout import Rollout, check_solved
from .seam import MixtureGeneration, Plan, refuse_images, together

CONCURRENT = 64
"""Requests that are sent at a time: as many connections as TRL's client keeps."""


class ServerGeneration(MixtureGeneration, vllm_generation.VLLMGeneration):
    """TRL's own generation from a server, with a request for each prompt and mixture; the main process asks it.

    Raises:
        ValueError: where the generator asks for what a server does not have.
        RuntimeError: where the server is gone, is another than wanted, or samples from other weights than were sent.
    """

    _weight_metadata: Any  # TRL's: name, dtype and shape of each weight, once it has walked through them

    def __init__(self, plan: Plan, **trl_arguments: Any) -> None:
        MixtureGeneration.__init__(self, plan, **trl_arguments)
        generator = plan.generator
        if generator.backend == "transformers":
            raise ValueError("`vllm_mode` is 'server' and `backend` 'transformers'; wanted 'vllm' or 'auto'.")
        if generator.engine_arguments:
            raise ValueError("`engine_arguments` is for an engine that the trainer starts. Pass them to the server.")
        if not isinstance(generator.named_teacher, str):
            raise ValueError("The teacher is a loaded model; with `vllm_mode='server'` wanted the server's: its name.")
        vllm_generation.VLLMGeneration.__init__(self, **trl_arguments)

    def _init_vllm(self) -> None:
        connect = partial(self._connect, vllm_generation.VLLMClient)
        with patch.object(vllm_generation, "VLLMClient", connect):
            super()._init_vllm()

    def _connect(self, client_class: type, **arguments: Any) -> Any:
        """What TRL calls for its client: a server that cannot be used is refused before weights are sent."""
        refuse_silence(arguments["base_url"], self.server_timeout)
        client = client_class(**arguments)
        tokenizer = getattr(self.processing_class, "tokenizer", self.processing_class)
        self.server = FusedServer(client, str(self.plan.generator.named_teacher), tokenizer, self.server_timeout)
        if self.plan.generator.two_prompts:
            self.server.check_two_prompts()
        return client

    def sync_weights(self) -> None:
        """Send the trainer's weights, all of them, to the server's student."""
        is_new = self._weight_metadata is None
        if is_new:
            self._weight_metadata = [
                (name, str(parameter.dtype).removeprefix("torch."), list(parameter.shape))
                for name, parameter in self._iter_named_params()
            ]
        with ExitStack() as stack:

            def begin() -> ExitStack:
                if self.accelerator.is_main_process:
                    if is_new:
                        self.server.check_shapes([(name, shape) for name, _, shape in self._weight_metadata])
                    stack.enter_context(self.server.push())
                return stack.pop_all()

            pushing = together(begin, self.accelerator)

        def send() -> None:
            with pushing:
                vllm_generation.VLLMGeneration.sync_weights(self)

        together(send, self.accelerator)

    def generate(
        self, prompts: list[list[int]], images: list[Any] | None, num_generations: int, profiler: Any = None
    ) -> tuple[list[list[int]], list[list[int]], list[list[list[float]]], None]:
        """Sample a completion of each prompt; see `LiveGeneration.generate` for what it returns."""
        refuse_images(images)
        everyone = vllm_generation.gather_object(prompts)
        box: list[Any] = [None]
        start = time.perf_counter()
        with profiler or nullcontext():
            box[0] = together(partial(self._sample, everyone), self.accelerator)
        self.seconds = time.perf_counter() - start
        vllm_generation.broadcast_object_list(box, from_process=0)
        first = self.accelerator.process_index * len(prompts)
        self.rollouts = box[0][first : first + len(prompts)]
        completions = [rollout.completion_ids for rollout in self.rollouts]
        log_probabilities = [[[value] for value in rollout.log_theta.tolist()] for rollout in self.rollouts]
        return prompts, completions, log_probabilities, None

    def _sample(self, prompts: Sequence[list[int]]) -> list[Rollout] | None:
        """The rollouts of all processes' prompts, in the main process."""
        return self.server.sample(self._requests(prompts, 0)) if self.accelerator.is_main_process else None

    def close(self) -> None:
        """Let go of the server, which runs on."""
        if self.accelerator.is_main_process:
            self.vllm_client.close_communicator()


class FusedServer:
    """A server of the fused engine, through TRL's client.

    Args:
        client: TRL's `VLLMClient`, connected.
        teacher: the teacher that the server must have.
        tokenizer: the trainer's.
        patience: seconds that an answer is waited for.

    Raises:
        RuntimeError: where the server is another than the trainer needs, saying what to start.
    """

    def __init__(self, client: Any, teacher: str, tokenizer: Any, patience: float = 240.0) -> None:
        from ...backends.vllm.server.messages import pair_of

        self.client, self.teacher, self.patience = client, teacher, patience
        for scheme in ("http://", "https://"):
            client.session.mount(scheme, _Patient(patience, client.session.adapters[scheme].max_retries))
        with self._named("does not fit the trainer"):
            self.pair = pair_of(client.get_server_info(), tokenizer)
            if _last(self.pair.teacher) != _last(teacher):
                raise ValueError(f"its teacher is {self.pair.teacher!r}, and the generator's {teacher!r}.")
        self.pushed: list[dict[str, Any]] | None = None

    def check_two_prompts(self) -> None:
        """Refuse a server whose models read one prompt.

        Raises:
            RuntimeError: where it runs on a CPU.
        """
        with self._named("does not fit the trainer"):
            if not self.pair.two_prompts:
                raise ValueError("teacher and student are to read different prompts, which takes a server on a GPU.")

    def check_shapes(self, shapes: Sequence[tuple[str, Sequence[int]]]) -> None:
        """Refuse weights that are no whole set of the server's student: in the middle of sending it would be too late.

        Raises:
            RuntimeError: naming the weights.
        """
        with self._named("does not fit the trainer"):
            for answer in self._ask("refuse_theta_shapes", json.dumps(shapes)):
                if answer["reason"]:
                    raise ValueError(answer["reason"])

    @contextmanager
    def push(self) -> Iterator[None]:
        """While this lasts weights are sent.

        Raises:
            RuntimeError: where they did not arrive in each of the server's processes, or another trainer's did.
        """
        with self._named("did not take the student's weights"):
            before = self._ask("theta_state")
            if self.pushed is not None:
                self._compare(before, self.pushed)
            if any(state["stale"] for state in before):
                self._ask("abandon_weight_update")
            yield
            if not self._forget():
                raise ValueError("it kept what it had cached under the old ones: somebody else samples from it.")
            self.pushed = [state | {"updates": state["updates"] + 1, "stale": None} for state in before]
            self._compare(self._ask("theta_state"), self.pushed)

    def sample(self, asked: Sequence[Request]) -> list[Rollout]:
        """One rollout for each request, in their order; equal ones that follow each other share an HTTP request.

        Raises:
            ValueError: on a request that cannot be served, before any is; and where a model returned NaN.
            RuntimeError: where the server is gone, or the weights are not those that were pushed last.
        """
        from ...backends.vllm.requests import check_request

        for index, request in enumerate(asked):
            check_request(request, self.pair, index)
        groups = [list(group) for _, group in groupby(asked)]
        seeds = torch.randint(2**31, (len(groups),)).tolist()
        with self._named("did not sample"):
            self._compare(self._ask("theta_state"), self.pushed)
            with ThreadPoolExecutor(max_workers=max(1, min(CONCURRENT, len(groups)))) as pool:
                answers = list(pool.map(self._sample_group, groups, seeds))
            self._compare(self._ask("theta_state"), self.pushed)
        rollouts = [rollout for answer in answers for rollout in answer]
        # The trap `nan_in_cache`; not while somebody else's requests read the caches.
        if any(bool(rollout.alpha.isnan().any()) for rollout in rollouts) and self._forget():
            self._ask("zero_caches")
        check_solved(rollouts)
        return rollouts

    def _sample_group(self, group: list[Request], seed: int) -> list[Rollout]:
        from ...backends.vllm.server.messages import to_arguments, to_rollouts

        answer = self.client.generate(**to_arguments(group[0], self.pair.ending, len(group), seed))
        return to_rollouts(answer, group[0], self.pair)

    def _forget(self) -> bool:
        """Whether the server dropped the blocks that it had cached; TRL asks for it, too, and not for the answer."""
        return bool(self.client._post(f"{self.client.base_url}/reset_prefix_cache").get("success", True))

    def _ask(self, method: str, *arguments: str) -> list[dict[str, Any]]:
        """What each of the server's processes answers."""
        url = f"{self.client.base_url}/collective_rpc"
        return self.client._post(url, json={"method": method, "args": arguments})["results"]

    @staticmethod
    def _compare(states: list[dict[str, Any]], wanted: list[dict[str, Any]] | None) -> None:
        """Refuse weights other than the pushed ones."""
        if wanted is None:
            raise ValueError("no weights were sent to it yet.")
        for state, want in zip(states, wanted, strict=True):
            if state["instance"] != want["instance"]:
                raise ValueError("it was restarted, so that its student has the weights on disk again.")
            if state["stale"]:
                raise ValueError(f"its student cannot be sampled from: {state['stale']}.")
            if state["updates"] != want["updates"]:
                raise ValueError(
                    f"its student has weights {state['updates']}, and this trainer sent {want['updates']}: "
                    "another trainer uses the same server."
                )

    @contextmanager
    def _named(self, what: str) -> Iterator[None]:
        """Errors of a server name it, and say what to start."""
        try:
            yield
        except Exception as error:
            raise RuntimeError(
                f"The server at {self.client.base_url} {what}: {self._cause(error)}\nStart one with "
                f"`optimal-sampling-serve --teacher {self.teacher} --theta <the student>`, and the trainer anew, from "
                "its last checkpoint."
            ) from error

    def _cause(self, error: Exception) -> str:
        """What happened, in words; an engine that died is told from a server that is gone or refuses."""
        if isinstance(error, requests.Timeout):
            return _silence(self.patience)
        if isinstance(error, ValueError):
            return str(error)
        try:
            is_dead = (
                requests.get(f"{self.client.base_url}/health", timeout=min(self.patience, 10.0)).status_code == 503
            )
        except requests.Timeout:
            return f"{error} It does not answer any more."
        except requests.RequestException:
            is_dead = False
        if is_dead or "EngineCore" in str(error) or "EngineDead" in str(error):
            return f"its engine died, as it does when memory runs out: see what the server printed last. ({error})"
        return str(error)


class _Patient(HTTPAdapter):
    """Waits a given time for an answer, where TRL's session waits for ever.

    An answer that does not come is not asked for again: the server may still be at work on it. One with status 500 is
    handed on, for the words in it.
    """

    def __init__(self, patience: float, retries: Retry) -> None:
        patient = retries.new(read=False, status_forcelist=[502, 503], raise_on_status=False)
        super().__init__(pool_maxsize=CONCURRENT, max_retries=patient)
        self.patience = patience

    def send(self, request: Any, stream: bool = False, timeout: Any = None, *further: Any, **keywords: Any) -> Any:
        return super().send(request, stream, self.patience if timeout is None else timeout, *further, **keywords)


def refuse_silence(url: str, patience: float) -> None:
    """Refuse a server that takes a connection and then says nothing, on which TRL's client would wait for ever.

    Raises:
        RuntimeError: naming the server. One that takes no connection is waited for by TRL.
    """
    with suppress(requests.ConnectionError):
        try:
            requests.get(f"{url}/health", timeout=patience)
        except requests.ReadTimeout as error:
            raise RuntimeError(f"The server at {url} hangs: {_silence(patience)}") from error


def _silence(patience: float) -> str:
    return (
        f"it did not answer within {patience:g} s. It hangs, or a completion takes longer: then raise "
        "`vllm_server_timeout`."
    )


def _last(name: str) -> str:
    """A model's name without where it lies, which differs from machine to machine."""
    return name.rstrip("/").split("/")[-1]
