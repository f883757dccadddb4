"""Refusals of a student that cannot be pushed into an engine, or whose adapter an engine would read otherwise."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.utils.peft_utils import ADAPTER_CONFIG_NAME

from ...pairing import Source, check_adapter, load_config
from ...pairing.names import WeightNames, names_of
from ...pairing.wrappers import is_wrapper
from .student import StudentWeights, is_adapted, storages

OTHER_BACKEND = "use backend='transformers', which samples from the trained module itself"


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
    names = _names(model, folder)
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


@contextmanager
def named_in_words(model: Any, options: Mapping[str, Any] | None) -> Iterator[None]:
    """Tell of a student's name that leads to no model as of a teacher's, where transformers tells of the Hub alone.

    Args:
        model: the student that TRL is passed, by name or loaded.
        options: TRL's `model_init_kwargs`.

    Raises:
        ValueError: where TRL takes no model from it, and there is no configuration under the name.
    """
    try:
        yield
    except (OSError, ValueError) as error:  # the second is any refusal, or transformers' of a folder without a model
        if isinstance(model, str) and (isinstance(error, OSError) or (Path(model) / ADAPTER_CONFIG_NAME).is_file()):
            load_config(model, "student", **(options or {}))
        raise


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


def _names(model: Any, folder: Source) -> WeightNames | None:
    """Return the names of a folder's weights in a module that is all of it, or a wrapper's language model alone."""
    is_inside = is_wrapper(folder.config) and not is_wrapper(model.config)
    return names_of(folder.text_config) if is_inside else folder.weight_names


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
    """Refuse a trainer with two weights, adapters included, where the tied engine has one for both layers."""
    for name, other in names.ties.items():
        first, second = (weights.module(one.rpartition(".")[0]) for one in (other, name))
        if storages(first) == storages(second):
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


def _has_adapter(module: nn.Module) -> bool:
    return any(is_adapted(one) or hasattr(one, "modules_to_save") for one in module.modules())


def _adapters(model: Any) -> str:
    configs = getattr(model, "peft_config", None) or {}
    kinds = {str(getattr(config.peft_type, "value", config.peft_type)) for config in configs.values()}
    return ", ".join(sorted(kinds)) or "of no known kind"
