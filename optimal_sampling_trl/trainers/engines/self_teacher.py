"""The student as its own teacher: it reads another prompt, or is the student as it was before training.

The weights are in memory once wherever both are one model. With transformers, what is never trained, such as the
layers below an adapter, is shared even with a teacher that stays as it was at the start. vLLM's engine has adapters
merged, and reads such a teacher from the student's files, as a second model.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import nn
from trl.generation.vllm_generation import DistributedBackend

from ...pairing import Source
from ..generator import OptimalSamplingGenerator
from .student import StudentWeights


def check_own_adapter(generator: OptimalSamplingGenerator, model: Any) -> None:
    """Refuse a teacher that is to be without an adapter that the trained module does not have.

    Raises:
        ValueError: saying what to do.
    """
    if not generator.teacher_adapter and not hasattr(model, "disable_adapter"):
        raise ValueError(
            "`teacher_adapter` is False, and the student has no adapter to leave out; wanted it with "
            "`peft_config=`. Pass one, or set `teacher_refresh='never'` for a teacher that stays as it is."
        )


def own_teacher(generator: OptimalSamplingGenerator, model: Any) -> Any:
    """Return the teacher that the generator asks for, made of the module that is trained.

    Args:
        generator: with the teacher `"student"`.
        model: the module.

    Returns:
        the module itself, `WithoutAdapter` of it, or a `frozen_copy`.
    """
    if not generator.teacher_adapter:
        return WithoutAdapter(model)
    return model if generator.teacher_refresh == "step" else frozen_copy(model)


def other_files(generator: OptimalSamplingGenerator, model: Any, folder: Source, accelerator: Any) -> str | None:
    """Return the reason why an engine cannot read a frozen teacher from the student's files; None where it can, or the
    teacher is another.

    To be called by all processes, as each weight is brought together from them.

    Args:
        generator: the user's.
        model: the module that is trained.
        folder: the student's.
        accelerator: the trainer's.
    """
    if not generator.is_frozen_student:
        return None
    weights = StudentWeights(model, DistributedBackend(accelerator).gather_params, accelerator.device)
    with nullcontext() if generator.teacher_adapter else model.disable_adapter():
        differs = _differing_weight(weights, folder)
    every = gather_object([differs]) if accelerator.num_processes > 1 else [differs]
    found = [name for name in every if name]
    if not found:
        return None
    what = "the student as it is now" if generator.teacher_adapter else "the model below the student's adapter"
    return (
        f"the teacher is to be {what}, and the files of {folder.name!r}, from which the engine would read it, have "
        f"another {found[0]!r}, or none; wanted the same weights as safetensors. Save the model, an adapter merged "
        "into it, and train from that folder"
    )


def _differing_weight(weights: StudentWeights, folder: Source) -> str | None:
    """Return the name of a weight that a model's files have otherwise, or not at all. Walks through all of them."""
    stored, names = folder.stored_weights(), folder.weight_names
    found = None
    for name, weight in weights:
        if found is not None:
            continue  # the others are brought together by all processes, too
        parts = [(name, weight)] if names is None else names.on_disk([(name, weight)], stored)
        for place, part in parts:
            is_tied = names is not None and name in names.ties
            if place in stored:
                is_same = torch.equal(stored[place].to(part.device, part.dtype), part)
            else:
                is_same = is_tied
            found = found if found or is_same else place
    return found


class WithoutAdapter(nn.Module):
    """The model below a student's adapter, as the student's module computes it while the adapter is off.

    Args:
        model: a `PeftModel`.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.config, self.generation_config = model, model.config, model.generation_config
        self.name_or_path = model.name_or_path

    @property
    def device(self) -> Any:
        """The student's device."""
        return self.model.device

    def forward(self, **inputs: Any) -> Any:
        """Run the student's forward pass with its adapter off."""
        with self.model.disable_adapter():
            return self.model(**inputs)


def frozen_copy(model: Any) -> Any:
    """Return a copy of a model as it is now, in evaluation mode, which shares all weights that are not trained.

    TRL puts a `forward` into some modules that calls the original's: the copy has its class's own.
    """
    shared = {id(parameter): parameter for parameter in model.parameters() if not parameter.requires_grad}
    copied = copy.deepcopy(model, memo=shared)
    for module in copied.modules():
        vars(module).pop("forward", None)
    return copied.requires_grad_(False).eval()
