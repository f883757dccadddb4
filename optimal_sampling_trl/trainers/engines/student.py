"""The trained student as an engine beside the trainer gets it: each weight with its adapter, under its plain name.

Adapters, compilers and shardings put modules of their own between the student's, and `StudentWeights` looks through
them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

SEEN_THROUGH = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Children by which a compiled, a sharded and a checkpointed module hold the one that they stand for."""
Gather = Callable[[list[Any]], AbstractContextManager[Any]]
"""The context in which parameters that DeepSpeed splits over processes are whole."""


class StudentWeights:
    """The weights of the trained student: each once, as the forward pass uses it.

    A layer with an adapter is merged while its weights are handed out, one layer at a time, and has its own values bit
    by bit afterwards. Each tensor is lent until the next one is asked for.

    Args:
        model: the module that is trained.
        gather: see `Gather`; every process has to walk through all weights.
        device: where the shards of a weight that FSDP2 splits are brought together.
    """

    def __init__(self, model: nn.Module, gather: Gather = nullcontext, device: torch.device | None = None) -> None:
        self.model, self.gather, self.device = model, gather, device

    @torch.no_grad()
    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self._walk(self.model, "", self.gather):
            yield name, self._whole(parameter)

    def _walk(self, module: nn.Module, prefix: str, gather: Gather) -> Iterator[tuple[str, Tensor]]:
        """Yield the names and values below a module, which stands at `prefix` of the plain student."""
        module = seen_through(module)
        if is_adapted(module):
            with gather(list(module.parameters())), self._whole_layer(module), merged(module) as base:
                yield from self._walk(base, prefix, nullcontext)  # DeepSpeed refuses to gather what is gathered
            return
        for name, parameter in module._parameters.items():
            if parameter is not None:
                with gather([parameter]):
                    yield prefix + name, parameter.data
        for name, child in module.named_children():
            yield from self._walk(child, f"{prefix}{name}.", gather)

    @contextmanager
    def _whole_layer(self, layer: nn.Module) -> Iterator[None]:
        """Give a layer its whole parameters inside the block, in place of the shards that FSDP2 keeps.

        DoRA, IA3 and others assign what they merged to `weight.data`, which a shard ignores without a word.
        """
        places = [
            (module, name, parameter)
            for module in layer.modules()
            for name, parameter in module._parameters.items()
            if hasattr(parameter, "full_tensor")
        ]
        try:
            for module, name, shard in places:
                module._parameters[name] = nn.Parameter(self._whole(shard), requires_grad=False)
            yield
        finally:
            for module, name, shard in places:
                module._parameters[name] = shard

    def _whole(self, weight: Any) -> Tensor:
        if not hasattr(weight, "full_tensor"):
            return weight
        return weight.to(self.device or weight.device).full_tensor()

    def module(self, name: str) -> nn.Module | None:
        """Return the module at a plain name, with its adapter; None where there is none."""
        module: Any = seen_through(self.model)
        for part in name.split("."):
            module = getattr(seen_through(module), part, None)
        return module


def seen_through(module: Any) -> Any:
    """Return the module behind a wrapper: compiled, sharded, or the one of several that an adapter has in use."""
    while True:
        inner = next((child for name, child in module.named_children() if name in SEEN_THROUGH), None)
        if inner is None and hasattr(module, "peft_config") and hasattr(module, "get_base_model"):
            inner = module.get_base_model()
        if inner is None and hasattr(module, "token_adapter"):
            inner = module.token_adapter
        if inner is None and hasattr(module, "modules_to_save") and hasattr(module, "original_module"):
            inner = _saved_module(module)
        if inner is None:
            return module
        module = inner


def _saved_module(wrapper: Any) -> nn.Module:
    """Return the copy that the adapter in use trains whole, or the layer itself where none is in use."""
    in_use = [name for name in wrapper.active_adapters if name in wrapper.modules_to_save]
    return wrapper.modules_to_save[in_use[0]] if in_use and not wrapper.disable_adapters else wrapper.original_module


def is_adapted(module: Any) -> bool:
    """Return True for a layer of an adapter, which holds the layer that it changes."""
    return hasattr(module, "merge") and hasattr(module, "merged_adapters") and hasattr(module, "get_base_layer")


@contextmanager
def merged(layer: Any) -> Iterator[nn.Module]:
    """Merge an adapter into the weights of the layer below it inside the block; yield that layer."""
    layers = [layer]
    while is_adapted(layers[-1].base_layer):
        layers.append(layers[-1].base_layer)
    before = [(parameter, parameter.data, parameter.data.clone()) for parameter in layers[-1].base_layer.parameters()]
    to_merge = [one for one in layers if not (one.merged or one.disable_adapters)]
    try:
        for one in to_merge:
            one.merge()
        yield layers[-1].base_layer
    finally:
        for one in to_merge:
            if one.merged:
                one.unmerge()
        for parameter, storage, values in before:  # rounding must not add up from reload to reload
            storage.copy_(values)
            parameter.data = storage


def held_here(parameter: Any) -> Tensor:
    """Return the part of a parameter that this process holds, where DeepSpeed or FSDP2 splits it."""
    part = getattr(parameter, "ds_tensor", parameter)
    return part.to_local() if hasattr(part, "to_local") else part


def adapters_in_use(model: nn.Module) -> list[Any]:
    """Return what stands in no parameter of a model: the adapters in use, and their factors."""
    return [
        (name, module.disable_adapters, list(module.active_adapters), dict(getattr(module, "scaling", {})))
        for name, module in model.named_modules()
        if is_adapted(module) or hasattr(module, "original_module")
    ]


def tied_heads(model: Any) -> set[str]:
    """Return the names of the output layer's weight where the trained student ties it to the embedding."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    return {"lm_head.weight"} if head is not None and storages(embedding) == storages(head) else set()


def storages(module: nn.Module | None) -> set[int]:
    """Return the addresses of all that a layer is made of, its adapter included."""
    parameters = [] if module is None else list(module.parameters())
    return {held_here(one).data_ptr() for one in parameters}
