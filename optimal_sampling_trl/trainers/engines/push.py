"""An engine with a copy of the student, into which the trained one is pushed whenever it has changed."""

from __future__ import annotations

from collections.abc import Container, Iterator
from typing import Any

import torch
from torch import Tensor
from trl.generation import vllm_generation

from ...pairing.source import fingerprint
from .base import MixtureGeneration, MixturePlan
from .student import StudentWeights, adapters_in_use, held_here


class PushedGeneration(MixtureGeneration, vllm_generation.VLLMGeneration):
    """Base of the engines that hold a copy of the student: what is pushed into it, and when.

    Args:
        plan: which mixture each completion is sampled from.
        **trl_arguments: what TRL passes to its `VLLMGeneration`.

    Raises:
        ValueError: on an adapter under FSDP1, whose layers cannot be merged one by one.
    """

    def __init__(self, plan: MixturePlan, **trl_arguments: Any) -> None:
        MixtureGeneration.__init__(self, plan, **trl_arguments)
        dist = vllm_generation.DistributedBackend(trl_arguments["accelerator"])
        if dist.fsdp_version == 1 and adapters_in_use(trl_arguments["model"]):
            raise ValueError(
                "The student has an adapter and is split by FSDP1, which does not let its layers be merged for the "
                "engine. Set `fsdp_version: 2` (recipes/accelerate/fsdp2.yaml), or train without an adapter."
            )
        self._pushed: tuple[Tensor, Any] | None = None
        # The requests hold all settings; TRL would make vLLM's parameters of these too, which take no tuple.
        vllm_generation.VLLMGeneration.__init__(self, **trl_arguments | {"generation_kwargs": {}})

    @property
    def weights(self) -> StudentWeights:
        """The trained student's weights, whole and merged."""
        return StudentWeights(self.model, self._dist.gather_params, self.accelerator.device)

    def left_out(self) -> Container[str]:
        """Return the names of tied weights, which are pushed under their other name."""
        raise NotImplementedError

    def _iter_named_params(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the weights in place of TRL's: with every kind of adapter, once each, and restored exactly afterwards.

        Only FSDP1 is left to TRL, which gathers its parts in turn.
        """
        if self._dist.fsdp_version == 1:
            for name, weight in super()._iter_named_params():
                yield name.replace("_orig_mod.", ""), weight
            return
        left_out = self.left_out()
        yield from ((name, weight) for name, weight in self.weights if name not in left_out)

    def sync_weights(self) -> None:
        """Push the trainer's weights, all of them, into the engine's student."""
        self._push()
        self._pushed = self._state()
        self.pushes += 1

    def _push(self) -> None:
        raise NotImplementedError

    def has_changed(self) -> bool:
        """Return True where the student differs from the one that was pushed last, in any process."""
        changed = True
        if self._pushed is not None:
            values, adapters = self._state()
            changed = adapters != self._pushed[1] or not torch.equal(values, self._pushed[0])
        counted = self.accelerator.reduce(torch.tensor([float(changed)], device=self.accelerator.device))
        return bool(counted.sum())

    def _state(self) -> tuple[Tensor, Any]:
        """Return what changes with the student: numbers of this process's weights, and the adapters in use."""
        held = [held_here(parameter) for parameter in self.model.parameters()]
        return torch.stack([fingerprint(one).cpu() for one in held]), adapters_in_use(self.model)
