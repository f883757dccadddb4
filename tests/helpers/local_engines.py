"""The engines that ranks share and that need GPUs, with the transformers backend where they have vLLM.

Gathering, slicing, requests and TRL's own code are the real ones. A backend that reads the live student stands for
what is asked over HTTP or split over two GPUs.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch

from helpers.training import load
from optimal_sampling_trl.rollouts.request import Request
from optimal_sampling_trl.rollouts.rollout import Rollout
from optimal_sampling_trl.trainers.engines.base import MixturePlan
from optimal_sampling_trl.trainers.engines.colocated import EngineGeneration, FusedLLM
from optimal_sampling_trl.trainers.engines.live import LiveGeneration
from optimal_sampling_trl.trainers.engines.server import ServerGeneration


def live_backend(plan: MixturePlan, trl_arguments: dict[str, Any]) -> Any:
    """A backend of the plan's teacher and the live student."""
    alone = trl_arguments | {"tensor_parallel_size": 1}
    return LiveGeneration(plan, load(plan.generator.named_teacher), **alone).backend


class LocalServer(ServerGeneration):
    """A server that is a backend of the main process."""

    def __init__(self, plan: MixturePlan, **trl_arguments: Any) -> None:
        backend = live_backend(plan, trl_arguments)
        self.server = SimpleNamespace(sample=backend.generate, dtype=torch.float32)
        super().__init__(plan, **trl_arguments)
        self.pair = backend.pair if self.accelerator.is_main_process else None  # who speaks to the server

    def _init_vllm(self) -> None:
        """There is nobody to connect to."""

    def _push(self) -> None:
        """The backend reads the live student."""

    def close(self) -> None:
        """There is nobody to let go of."""


class LocalTensorParallel(EngineGeneration):
    """One engine of two ranks: each has a backend, and both draw with the same noise, as a split engine does."""

    def __init__(self, plan: MixturePlan, **trl_arguments: Any) -> None:
        self.backend = live_backend(plan, trl_arguments)
        self.calls = 0
        super().__init__(plan, self.backend.pair, "", **trl_arguments)  # type: ignore[arg-type]

    def _init_vllm(self) -> None:
        ranks = list(range(self.tensor_parallel_size))
        self.tp_group, _ = torch.distributed.new_subgroups_by_enumeration([ranks])  # as TRL makes it
        self.llm = FusedLLM(self, self._requests_of_group, self.most_read, self.accelerator)  # type: ignore[arg-type]

    def sample(self, requests: Sequence[Request]) -> tuple[list[Any], list[Rollout]]:
        """As `VLLMBackend.sample`: outputs that TRL reads, and the rollouts."""
        torch.manual_seed(self.calls)
        self.calls += 1
        rollouts = self.backend.generate(requests)
        outputs = [
            SimpleNamespace(
                prompt_token_ids=rollout.theta_prompt_ids,
                outputs=[SimpleNamespace(token_ids=rollout.completion_ids, logprobs=None)],
            )
            for rollout in rollouts
        ]
        return outputs, rollouts

    def _push(self) -> None:
        """The backend reads the live student."""

    def types(self) -> set[torch.dtype]:
        return {torch.float32}

    def close(self) -> None:
        """There is no engine."""
