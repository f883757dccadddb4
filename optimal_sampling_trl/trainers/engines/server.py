"""TRL's `vllm_mode="server"`: rollouts from a server that `optimal-sampling-serve` started.

TRL's own client speaks to it. Weights go TRL's way, over NCCL, for which trainer and server need a GPU each. A batch
is taken only if the server had the weights of the last push before and after it.
"""

from __future__ import annotations

import time
from collections.abc import Container, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from trl.generation import vllm_generation

from ...backends.vllm.server.client import FusedServer, refuse_silence
from ...pairing import check_adapter, stop_tokens
from ...rollouts.request import Request
from ...rollouts.rollout import Rollout
from .base import MixturePlan, TrlReturns, on_all_ranks, refuse_images, tokenizer_of
from .push import PushedGeneration
from .student import tied_heads
from .student_checks import check_float


class ServerGeneration(PushedGeneration):
    """TRL's own generation from a server, with a request for each prompt and mixture; the main process asks it.

    Raises:
        ValueError: where the generator asks for what a server does not have.
        RuntimeError: where the server is gone, is another than wanted, or samples from other weights than were sent.
    """

    engine = "a vLLM server"
    _weight_metadata: Any  # TRL's: name, dtype and shape of each weight, once it has walked through them

    def __init__(self, plan: MixturePlan, **trl_arguments: Any) -> None:
        generator = plan.generator
        if generator.backend == "transformers":
            raise ValueError("`vllm_mode` is 'server' and `backend` 'transformers'; wanted 'vllm' or 'auto'.")
        if generator.engine_arguments:
            raise ValueError("`engine_arguments` is for an engine that the trainer starts. Pass them to the server.")
        if not isinstance(generator.named_teacher, str):
            raise ValueError("The teacher is a loaded model; with `vllm_mode='server'` wanted the server's: its name.")
        check_adapter(trl_arguments["model"], "student")
        check_float(trl_arguments["model"])
        super().__init__(plan, **trl_arguments)

    def left_out(self) -> Container[str]:
        """Return the output layer's name if the student is tied; an untied server's student would miss it."""
        return tied_heads(self.model)

    def _init_vllm(self) -> None:
        connect = partial(self._connect, vllm_generation.VLLMClient)
        with patch.object(vllm_generation, "VLLMClient", connect):
            try:
                super()._init_vllm()
            except NotImplementedError as error:  # of TRL's client, which sends by NCCL alone
                raise ValueError(
                    f"`vllm_mode` is 'server' and the trainer is on {self.accelerator.device}: weights go to a server "
                    "over NCCL, for which trainer and server need a GPU each. Leave `vllm_mode` at 'colocate'."
                ) from error

    def _connect(self, client_class: type, **arguments: Any) -> Any:
        """Build TRL's client: a server that cannot be used is refused before weights are sent."""
        refuse_silence(arguments["base_url"], self.server_timeout)
        client = client_class(**arguments)
        generator, tokenizer = self.plan.generator, tokenizer_of(self.processing_class)
        teacher = str(self.model.name_or_path if generator.is_frozen_student else generator.named_teacher)
        self.server = FusedServer(client, teacher, tokenizer, self.server_timeout)
        self.pair = self.server.pair
        self.server.check_ending(stop_tokens(self.model.generation_config, tokenizer.eos_token_id))
        if self.plan.two_prompts:
            self.server.check_two_prompts()
        return client

    def _push(self) -> None:
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

            pushing = on_all_ranks(begin, self.accelerator)

        def send() -> None:
            with pushing:
                vllm_generation.VLLMGeneration.sync_weights(self)

        on_all_ranks(send, self.accelerator)

    def generate(
        self, prompts: list[list[int]], images: list[Any] | None, num_generations: int, profiler: Any = None
    ) -> TrlReturns:
        """Sample a turn of each prompt; see `as_trl_returns` for what comes back."""
        refuse_images(images)
        everyone = vllm_generation.gather_object([self.make_requests(prompts)])  # a list for each process
        box: list[Any] = [None]
        start = time.perf_counter()
        with profiler or nullcontext():
            box[0] = on_all_ranks(partial(self._sample, everyone), self.accelerator)
        seconds = time.perf_counter() - start
        vllm_generation.broadcast_object_list(box, from_process=0)
        first = sum(map(len, everyone[: self.accelerator.process_index]))
        return self.take(prompts, box[0][first : first + len(prompts)], seconds)

    def _sample(self, everyone: Sequence[list[Request]]) -> list[Rollout] | None:
        """The rollouts of all processes' requests, in the main process."""
        if not self.accelerator.is_main_process:
            return None
        dense = self.plan.dense()  # whose number of tokens this process alone can hold to the vocabulary
        return self.server.sample([replace(one, dense=dense) for of_process in everyone for one in of_process])

    def types(self) -> set[torch.dtype]:
        """Return the type that the server computes in, which the main process is told; to be called by all."""
        box: list[Any] = [self.server.dtype if self.accelerator.is_main_process else None]
        vllm_generation.broadcast_object_list(box, from_process=0)
        return {box[0]}

    def close(self) -> None:
        """Disconnect from the server, which keeps running."""
        if self.accelerator.is_main_process:
            self.vllm_client.close_communicator()
