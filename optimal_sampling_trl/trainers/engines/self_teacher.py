"""The student as its own teacher: it reads another prompt, or is the student as it was before training.

The weights are in memory once wherever both are one model. What is never trained, such as the layers below an adapter,
is shared even with a teacher that stays as it was at the start.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from ..generator import OptimalSamplingGenerator


def own_teacher(generator: OptimalSamplingGenerator, model: Any) -> Any:
    """Return the teacher that the generator asks for, made of the module that is trained.

    Args:
        generator: with the teacher `"student"`.
        model: the module.

    Returns:
        the module itself, `WithoutAdapter` of it, or a `frozen_copy`.

    Raises:
        ValueError: where the teacher is to be without an adapter that the module does not have.
    """
    if not generator.teacher_adapter:
        if not hasattr(model, "disable_adapter"):
            raise ValueError(
                "`teacher_adapter` is False, and the student has no adapter to leave out; wanted it with "
                "`peft_config=`. Pass one, or set `teacher_refresh='never'` for a teacher that stays as it is."
            )
        return WithoutAdapter(model)
    return model if generator.teacher_refresh == "step" else frozen_copy(model)


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
