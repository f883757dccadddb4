"""The trained student as an engine beside the trainer gets it: each weight with its adapter, under its plain name.

Adapters, compilers and shardings put modules of their own between the student's. `StudentWeights` looks through them,
and `check_student` says before an engine starts whether what it finds is what the student's folder holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ...pairing import Source, check_adapter
from ...pairing.names import WeightNames

SEEN_THROUGH = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Children by which a compiled, a sharded and a checkpointed module hold the one that they stand for."""
OTHER_BACKEND = "use backend='transformers', which samples from the trained module itself"
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
        for name, parameter in self._walk(self.model, ""):
            yield name, self._whole(parameter)

    def _walk(self, module: nn.Module, prefix: str) -> Iterator[tuple[str, Tensor]]:
        """Names and values below a module, which stands at `prefix` of the plain student."""
        module = seen_through(module)
        if is_adapted(module):
            with self.gather(list(module.parameters())), merged(module) as base:
                yield from self._walk(base, prefix)
            return
        for name, parameter in module._parameters.items():
            if parameter is not None:
                with self.gather([parameter]):
                    yield prefix + name, parameter.data
        for name, child in module.named_children():
            yield from self._walk(child, f"{prefix}{name}.")

    def _whole(self, weight: Any) -> Tensor:
        if not hasattr(weight, "full_tensor"):
            return weight
        return weight.to(self.device or weight.device).full_tensor()

    def module(self, name: str) -> nn.Module | None:
        """The module at a plain name, with its adapter; None where there is none."""
        module: Any = seen_through(self.model)
        for part in name.split("."):
            module = getattr(seen_through(module), part, None)
        return module


def seen_through(module: Any) -> Any:
    """The module that a wrapper stands for: compiled, sharded, or the one of several that an adapter has in use."""
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
    """The copy that the adapter in use trains whole, or the layer itself where none is in use."""
    in_use = [name for name in wrapper.active_adapters if name in wrapper.modules_to_save]
    return wrapper.modules_to_save[in_use[0]] if in_use and not wrapper.disable_adapters else wrapper.original_module


def is_adapted(module: Any) -> bool:
    """True for a layer of an adapter, which holds the layer that it changes."""
    return hasattr(module, "merge") and hasattr(module, "merged_adapters") and hasattr(module, "get_base_layer")


@contextmanager
def merged(layer: Any) -> Iterator[nn.Module]:
    """While this lasts the adapter's part is in the weights of the layer below it, which is yielded."""
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


def check_student(model: Any, folder: Source, weights: StudentWeights) -> None:
    """Refuse a student whose weights are not those that an engine can load over those of the student's folder.

    Args:
        model: the module that is trained.
        folder: what the engine is built from.
        weights: the module's.

    Raises:
        ValueError: naming the weights, and what to do.
    """
    check_adapter(model, "student")
    check_float(model)
    try:
        found = {name: (weight.shape, weight.dtype) for name, weight in weights}
    except (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"The student's adapter ({_adapters(model)}) cannot be merged into its weights, which the engine needs: "
            f"{error} Train with one that can, such as plain LoRA, or {OTHER_BACKEND}."
        ) from error
    names = folder.weight_names
    if names is not None:
        _check_shapes({name: shape for name, (shape, _) in found.items()}, names, folder)
        _check_ties(model, weights, names, folder)


def check_head(model: Any) -> None:
    """Refuse an adapter on the output layer, whose weight the losses read past the adapter.

    Raises:
        ValueError: where there is one.
    """
    head = model.get_output_embeddings()
    if is_adapted(head) or hasattr(head, "token_adapter"):
        raise ValueError(
            f"The student's adapter ({_adapters(model)}) is on its output layer. TRL's losses multiply by the layer's "
            "own weight, so that the adapter would sample but never be trained. Leave the layer out, or train it as a "
            "whole: `modules_to_save=['lm_head']`, of a tied student `modules_to_save=['embed_tokens']` with "
            "`ensure_weight_tying=True`."
        )


def check_teacher_apart(teacher: Any, model: nn.Module) -> None:
    """Refuse a loaded teacher that shares weights with the student: training would move both.

    Raises:
        ValueError: naming a weight of both.
    """
    if not isinstance(teacher, nn.Module):
        return
    trained = {id(parameter) for parameter in model.parameters()}
    shared = next((name for name, parameter in teacher.named_parameters() if id(parameter) in trained), None)
    if shared is not None:
        raise ValueError(
            f"The teacher and the student share the weight {shared!r}: they are one model, and training, or an "
            "adapter, would change the teacher with the student. Pass the teacher's folder or a copy of its own."
        )


def adapters_in_use(model: nn.Module) -> list[Any]:
    """Returns what stands in no parameter of a model: the adapters in use, and their factors."""
    return [
        (name, module.disable_adapters, list(module.active_adapters), dict(getattr(module, "scaling", {})))
        for name, module in model.named_modules()
        if is_adapted(module) or hasattr(module, "original_module")
    ]


def tied_heads(model: Any) -> set[str]:
    """Names of the output layer's weight where the trained student ties it to the embedding."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    return {"lm_head.weight"} if head is not None and _storages(embedding) == _storages(head) else set()


def check_overrides(config: Any, overrides: Mapping[str, Any]) -> None:
    """Refuse settings by which the engine's student would compute otherwise than the trained one.

    Args:
        config: of the trained student.
        overrides: the engine's argument `hf_overrides`.

    Raises:
        ValueError: naming the field and both values.
    """
    for name, value in overrides.items():
        if getattr(config, name, None) != value:
            raise ValueError(
                f"`engine_arguments` has `hf_overrides` with {name!r}: {value!r}, which holds for both models of the "
                f"engine, and the trained student has {getattr(config, name, None)!r}: the engine's would be another "
                "model. Set it in the trained student's configuration as well, or in the teacher's folder alone."
            )


def check_float(model: nn.Module) -> None:
    """Refuse a quantised student.

    Raises:
        ValueError: naming a weight and its type.
    """
    for name, parameter in model.named_parameters():
        if not parameter.dtype.is_floating_point or parameter.dtype.itemsize < 2:
            raise ValueError(
                f"The student's weight {name!r} is of type {parameter.dtype}: the student is quantised, and cannot be "
                f"pushed into the engine beside a teacher. Load it unquantised, or {OTHER_BACKEND}."
            )


def _check_shapes(found: dict[str, torch.Size], names: WeightNames, folder: Source) -> None:
    wrong = [f"{name!r} is none of the folder's" for name in found if name not in names.shapes | names.ties]
    wrong += [f"{name!r} is missing" for name in names.shapes if name not in found]
    wrong += [
        f"{name!r} has shape {tuple(shape)}, there {tuple(names.shapes[name])}"
        for name, shape in found.items()
        if name in names.shapes and names.shapes[name] != shape
    ]
    if wrong:
        raise ValueError(
            f"The trained student's weights are not those of its folder {folder.name!r}, from which the engine is "
            f"built ({len(wrong)} differ): {'; '.join(wrong[:3])}. Was it resized, or changed, after it was loaded? "
            f"Save it with `save_pretrained` and pass that folder, or {OTHER_BACKEND}."
        )


def _check_ties(model: Any, weights: StudentWeights, names: WeightNames, folder: Source) -> None:
    """A tied engine has one weight for both layers, so the trainer must have one, too, adapters included."""
    for name, other in names.ties.items():
        first, second = (weights.module(one.rpartition(".")[0]) for one in (other, name))
        if _storages(first) == _storages(second):
            continue
        parts = f"{other!r} and {name!r}"
        if any(module is not None and _has_adapter(module) for module in (first, second)):
            raise ValueError(
                f"The student's folder {folder.name!r} ties {parts}, and the student's adapter ({_adapters(model)}) "
                "trains one of them, or each apart, so that they differ after the first step. The engine has one "
                "weight for both. Train the embedding as a whole, with `modules_to_save=['embed_tokens']` and "
                f"`ensure_weight_tying=True`, leave both layers out, or {OTHER_BACKEND}."
            )
        raise ValueError(
            f"The student's folder {folder.name!r} ties {parts}, and the trained student has two weights there, of "
            "which the engine would have one. Save the untied student (`tie_word_embeddings=False` in its "
            f"configuration) with `save_pretrained` and pass that folder, or {OTHER_BACKEND}."
        )


def _storages(module: nn.Module | None) -> set[int]:
    """Addresses of all that a layer is made of, its adapter included."""
    parameters: list[Any] = [] if module is None else list(module.parameters())
    return {getattr(one, "ds_tensor", one).untyped_storage().data_ptr() for one in parameters}


def _has_adapter(module: nn.Module) -> bool:
    return any(is_adapted(one) or hasattr(one, "modules_to_save") for one in module.modules())


def _adapters(model: Any) -> str:
    configs = getattr(model, "peft_config", None) or {}
    kinds = {str(getattr(config.peft_type, "value", config.peft_type)) for config in configs.values()}
    return ", ".join(sorted(kinds)) or "of no known kind"
