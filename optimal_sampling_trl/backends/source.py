"""One model of a pair as it was passed, a folder, a model id or a loaded module, and what can be had from it."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .. import pairing

MODEL_OPTIONS = ("attn_implementation", "dtype", "revision", "trust_remote_code")
"""Options that go to `from_pretrained`; `revision` to the teacher's alone, as vLLM has it."""


EVERY_RANK = {"FSDP_CPU_RAM_EFFICIENT_LOADING": "false"}
"""Under accelerate's FSDP transformers loads zeros in all ranks but the first, which FSDP fills: not in ours."""


@dataclass(frozen=True)
class Source:
    """A model that is not loaded yet, or one that is and stays as it is.

    Args:
        model: a folder, a model id or a loaded model.
        role: what errors call it.
        options: some of `MODEL_OPTIONS`; a loaded model has no use for them.
    """

    model: str | PreTrainedModel
    role: str
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def is_loaded(self) -> bool:
        """Whether the caller loaded the model, and owns it."""
        return not isinstance(self.model, str)

    @property
    def device(self) -> torch.device:
        """Where a loaded model is; a GPU for one that is not, where there is a GPU."""
        if not isinstance(self.model, str):
            return self.model.device
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def config(self) -> PreTrainedConfig:
        """The configuration of a decoder."""
        if isinstance(self.model, str):
            config = pairing.load_config(self.model, self.role, **self._code, **self._revision)
            pairing.check_weights(self.model, self.role)
            return config
        pairing.check_decoder(self.model.config, self.role)
        return self.model.config

    def generation_config(self, config: PreTrainedConfig) -> GenerationConfig | PreTrainedConfig:
        """The generation settings, or `config` where there are none."""
        if isinstance(self.model, str):
            return pairing.load_generation_config(self.model, config, **self._revision)
        return getattr(self.model, "generation_config", None) or config

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer beside the model's files."""
        name = self.model if isinstance(self.model, str) else self.model.name_or_path
        if not name:
            raise ValueError(
                f"The {self.role} is a loaded model without a `name_or_path`; wanted the folder of its tokenizer "
                "there. Save both in one folder and set `model.name_or_path` to it."
            )
        return pairing.load_tokenizer(name, self.role, **self._code, **self._revision)

    def load(self, device: torch.device) -> PreTrainedModel:
        """The model: one that was loaded where it stands, another on `device` and in evaluation mode."""
        if not isinstance(self.model, str):
            return self.model
        with patch.dict(os.environ, EVERY_RANK):
            loaded: Any = AutoModelForCausalLM.from_pretrained(self.model, **self.options)
        return loaded.to(device).eval()

    @property
    def _code(self) -> dict[str, Any]:
        # Not None, with which transformers asks on the terminal.
        return {"trust_remote_code": self.options.get("trust_remote_code", False)}

    @property
    def _revision(self) -> dict[str, Any]:
        return {"revision": self.options["revision"]} if "revision" in self.options else {}
