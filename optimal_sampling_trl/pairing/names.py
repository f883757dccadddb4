"""A model's weights by name: as transformers holds them in memory, and as the files of a checkpoint hold them.

The two differ: transformers stacks the experts of a layer when it loads a model and splits them when it saves it, and
old files lack the prefix of the base model.
"""

from __future__ import annotations

import logging
from collections.abc import Container, Iterable, Iterator, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange, revert_weight_conversion

from .wrappers import is_wrapper

logger = logging.getLogger(__name__)

NamedWeights = Iterable[tuple[str, Tensor]] | Mapping[str, Tensor]
"""A model's weights: pairs of a name and a tensor, or a `state_dict`."""


def model_class(config: PreTrainedConfig) -> Any:
    """Return the auto class that a model is loaded with: a wrapper with its towers, as TRL loads it.

    To transformers some wrappers are no causal models, and of others the causal model is the language model alone.
    """
    return AutoModelForImageTextToText if is_wrapper(config) else AutoModelForCausalLM


class WeightNames:
    """The weights of a decoder by name and shape, read off a model that has no values.

    Args:
        config: the model's configuration.
        trust_remote_code: run the model's own code, where the checkpoint brings some.

    Attributes:
        shapes: shape of each parameter by its name in memory; one that is tied is named once.
        ties: names, each of which is another name of the parameter it maps to.
        buffers: names of what a model computes or keeps beside its parameters.
    """

    def __init__(self, config: PreTrainedConfig, trust_remote_code: bool = False) -> None:
        with torch.device("meta"):
            model = model_class(config).from_config(config, trust_remote_code=trust_remote_code)
        # Kept on the model, where `revert_weight_conversion` looks before it walks through all modules.
        conversions = get_model_conversion_mapping(model, add_legacy=False)
        model._weight_conversions = [item for item in conversions if not isinstance(item, PrefixChange)]
        self._model: PreTrainedModel = model
        self._prefix = f"{model.base_model_prefix}."
        self.shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        self.buffers = {name for name, _ in model.named_buffers()}
        names = {id(parameter): name for name, parameter in reversed(list(model.named_parameters()))}
        every = model.named_parameters(remove_duplicate=False)
        self.ties = {name: names[id(parameter)] for name, parameter in every if name not in self.shapes}

    def on_disk(self, named: Iterable[tuple[str, Tensor]], files: Container[str]) -> Iterator[tuple[str, Tensor]]:
        """Hand on weights under the names that the checkpoint's files have for them.

        Args:
            named: weights under their names in memory, or on disk already; each is split where the files split it.
            files: the names in the files. A weight that none of them fits comes under the name that it had.
        """
        for name, weight in named:
            if (found := self._place(name, files)) is not None:
                yield found, weight
                continue
            parts = revert_weight_conversion(self._model, {name: weight}) if self._converts else {}
            places = {part: self._place(part, files) for part in parts}
            if parts and None not in places.values():
                yield from ((str(places[part]), value) for part, value in parts.items())
            else:
                yield name, weight

    @property
    def _converts(self) -> bool:
        conversions: Any = self._model._weight_conversions
        return bool(conversions)

    def _place(self, name: str, files: Container[str]) -> str | None:
        """Return the name in the files, with or without the base model's prefix."""
        candidates = (name, name.removeprefix(self._prefix), self._prefix + name)
        return next((candidate for candidate in candidates if candidate in files), None)

    def parameters_on_disk(self, files: Container[str]) -> set[str]:
        """Return the names in the files of what are parameters in memory; a tied one under each of its names."""
        named = [(name, torch.empty(shape, device="meta")) for name, shape in self.shapes.items()]
        tied = [(name, torch.empty(self.shapes[of], device="meta")) for name, of in self.ties.items()]
        return {name for name, _ in self.on_disk(named + tied, files) if name in files}

    def is_buffer(self, name: str) -> bool:
        """Return True where a name in the files is that of a buffer in memory."""
        return self._place(name, self.buffers) is not None or name in self._buffers_on_disk

    @cached_property
    def _buffers_on_disk(self) -> set[str]:
        named = {name: torch.empty(1, device="meta") for name in self.buffers}
        return set(revert_weight_conversion(self._model, named)) if self._converts else set()


def names_of(config: PreTrainedConfig, trust_remote_code: bool = False) -> WeightNames | None:
    """Read the names of a model's weights; None where transformers cannot build one of its kind without values."""
    try:
        return WeightNames(config, trust_remote_code)
    except (AttributeError, ImportError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        logger.info("The weights of %r are known by its files alone: %s", config.name_or_path, error)
        return None
