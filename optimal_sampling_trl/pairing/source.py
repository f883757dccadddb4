"""One model of a pair as it was passed (a folder, a model id or a loaded module), and what can be read from it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import find_adapter_config_file
from transformers.utils.hub import cached_file

from .checkpoint import StoredWeights
from .names import WeightNames, model_class, names_of
from .wrappers import WRAPPERS, is_wrapper, language_model

MODEL_OPTIONS = ("attn_implementation", "dtype", "revision", "trust_remote_code")
"""Options that go to `from_pretrained`; `revision` to the teacher's alone, as vLLM has it."""

NO_ROLLOUT_READS = {
    *("_name_or_path", "architectures", "transformers_version", "use_cache", "id2label", "label2id"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
}
"""Fields of a configuration that change no rollout, or do so as the pair's ending alone."""

EVERY_RANK = {"FSDP_CPU_RAM_EFFICIENT_LOADING": "false"}
"""Under FSDP, transformers loads real weights on rank 0 only. Ours are not wrapped: each rank must load them."""


@dataclass(frozen=True)
class Source:
    """A model that is not loaded yet, or one that is and stays as it is.

    Args:
        model: a folder, a model id or a loaded model.
        role: what errors call it.
        options: some of `MODEL_OPTIONS`; a loaded model has no use for them.
        token: the Hub's access token; by default the machine's.
        overrides: fields of the configuration that an engine sets to other values.
    """

    model: str | PreTrainedModel
    role: str
    options: dict[str, Any] = field(default_factory=dict)
    token: str | bool | None = None
    overrides: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, model: str | PreTrainedModel | Source, role: str, options: dict[str, Any], **further: Any) -> Source:
        """Name a model's source. One that is a source already stays as it is, with what was read of it."""
        return model if isinstance(model, Source) else cls(model, role, options, **further)

    @property
    def name(self) -> str:
        """The folder or model id; of a loaded model the one that it came from, or an empty text."""
        return self.model if isinstance(self.model, str) else str(self.model.name_or_path or "")

    @property
    def is_loaded(self) -> bool:
        """True where the caller loaded the model, and owns it."""
        return not isinstance(self.model, str)

    @property
    def device(self) -> torch.device:
        """The device of a loaded model; for another one a GPU, where there is one."""
        if not isinstance(self.model, str):
            return self.model.device
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @cached_property
    def config(self) -> PreTrainedConfig:
        """The configuration of a decoder, read once with the headers of its weights.

        Raises:
            ValueError: where there is none, the model is no decoder of text, or a file of its weights is broken.
        """
        if isinstance(self.model, str):
            config = load_config(self.model, self.role, **self._code, **self._access)
            config.update(self.overrides)
            check_weights(self.model, self.role)
            return config
        check_decoder(self.model.config, self.role)
        check_adapter(self.model, self.role)
        return self.model.config

    @cached_property
    def text_config(self) -> PreTrainedConfig:
        """The configuration of the language model alone, where it is inside of a multimodal wrapper."""
        return language_model(self.config)

    def settings(self) -> dict[str, Any]:
        """Return the fields of the language model's configuration on which its rollouts depend."""
        fields = self.text_config.to_dict()
        return {name: value for name, value in fields.items() if name not in NO_ROLLOUT_READS}

    @cached_property
    def weight_names(self) -> WeightNames | None:
        """The weights by name and shape; None where transformers cannot build a model of this kind without values."""
        return names_of(self.config, **self._code)

    def stored_weights(self) -> StoredWeights:
        """Return the weights in the files of a folder or model id."""
        config = cached_file(self.name, "config.json", **self._access)
        return StoredWeights(Path(str(config)).parent)

    def generation_config(self) -> GenerationConfig | PreTrainedConfig:
        """Return the generation settings, or the configuration where there are none."""
        if isinstance(self.model, str):
            return load_generation_config(self.model, self.config, **self._access)
        return getattr(self.model, "generation_config", None) or self.config

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the tokenizer beside the model's files."""
        if not self.name:
            raise ValueError(
                f"The {self.role} is a loaded model without a `name_or_path`; wanted the folder of its tokenizer "
                "there. Save both in one folder and set `model.name_or_path` to it."
            )
        return load_tokenizer(self.name, self.role, **self._code, **self._access)

    def load(self, device: torch.device) -> PreTrainedModel:
        """Return the model: one that was loaded where it stands, another on `device` and in evaluation mode."""
        if not isinstance(self.model, str):
            return self.model
        with patch.dict(os.environ, EVERY_RANK):
            loaded: Any = model_class(self.config).from_pretrained(self.model, **self.options)
        return loaded.to(device).eval()

    @property
    def _code(self) -> dict[str, Any]:
        # Not None, with which transformers asks on the terminal.
        return {"trust_remote_code": bool(self.options.get("trust_remote_code"))}

    @property
    def _access(self) -> dict[str, Any]:
        access = {"revision": self.options.get("revision"), "token": self.token}
        return {name: value for name, value in access.items() if value is not None}


def load_config(model: str, role: str, **kwargs: Any) -> PreTrainedConfig:
    """Return the configuration of a model on disk or on the Hub.

    Raises:
        ValueError: where there is none, where there is an adapter alone, or where the model is no decoder that reads
            text alone.
    """
    try:
        config = AutoConfig.from_pretrained(model, **kwargs)
    except (OSError, ValueError) as error:
        if _is_adapter(model, **kwargs):
            merging = f"AutoPeftModelForCausalLM.from_pretrained({str(model)!r}).merge_and_unload()"
            raise ValueError(
                f"The {role} could not be loaded from {str(model)!r}: it holds an adapter (adapter_config.json); "
                "wanted a whole model. Merge it into another folder with peft, "
                f"`{merging}.save_pretrained('merged')`, save the tokenizer there, too, and pass that folder."
            ) from error
        where = "The folder does not exist" if not Path(model).exists() else "The folder holds no model"
        raise ValueError(
            f"The {role} could not be loaded from {str(model)!r}: {where} or is no model that transformers knows, and "
            f"no model of that name was found on the Hub. Pass a folder with a config.json or a model id. ({error})"
        ) from error
    check_decoder(config, role)
    return config


def _is_adapter(model: str, token: str | bool | None = None, revision: str | None = None, **_: Any) -> bool:
    try:
        return find_adapter_config_file(str(model), token=token, revision=revision) is not None
    except (OSError, ValueError):  # nothing of that name on the Hub
        return False


def check_weights(model: str, role: str) -> None:
    """Refuse a folder whose weights are cut short or not all there, by the files' headers, before an engine starts.

    A model id is left to the Hub's client, which checks what it downloads.

    Raises:
        ValueError: naming the model and the file.
    """
    folder = Path(model)
    if not folder.is_dir():
        return
    wanted: set[str] = set()
    for index in folder.glob("*.safetensors.index.json"):
        try:
            wanted |= set(json.loads(index.read_text())["weight_map"].values())
        except (ValueError, KeyError) as error:
            raise _broken(model, role, index, error) from error
    for path in sorted({*folder.glob("*.safetensors"), *(folder / name for name in wanted)}):
        try:
            with safe_open(path, "pt"):
                pass
        except (OSError, SafetensorError) as error:
            raise _broken(model, role, path, error) from error


def _broken(model: str, role: str, path: Path, error: Exception) -> ValueError:
    return ValueError(
        f"The {role} {model!r} cannot be loaded: {path.name} is missing or was cut short ({error}). Wanted a whole "
        "checkpoint: copy or save it again, or pass an earlier one."
    )


NO_WEIGHTS = {"ADAPTION_PROMPT"}
"""Kinds of adapters that are no change of weights, beside those that peft calls prompt learning."""


def check_adapter(model: Any, role: str) -> None:
    """Refuse an adapter that is no change of weights: one that puts soft tokens or a cache before the prompt.

    A rollout reads a token at a time behind a cache, a loss all tokens at once; with such an adapter the two are
    different models.

    Raises:
        ValueError: naming the kind of adapter.
    """
    configs = getattr(model, "peft_config", None) or {}
    for config in configs.values() if isinstance(configs, dict) else ():
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        if getattr(config, "is_prompt_learning", False) or kind in NO_WEIGHTS:
            raise ValueError(
                f"The {role} has an adapter of the kind {kind}, which is no change of its weights but puts something "
                "before the prompt: rollouts and the loss would read two different models. Train with one that "
                "changes weights, for example LoRA."
            )


def check_decoder(config: PreTrainedConfig, role: str) -> None:
    """Refuse what is no decoder-only language model.

    Raises:
        ValueError: naming the model and its architecture.
    """
    kind = None
    if getattr(config, "is_encoder_decoder", False):
        kind = "an encoder-decoder"
    elif is_wrapper(config):
        return
    elif any(getattr(config, part, None) is not None for part in ("vision_config", "audio_config")):
        kind = "a multimodal model"
    elif getattr(config, "vocab_size", None) is None:  # Qwen2.5-Omni, Granite Speech: models inside of a model
        kind = "a multimodal model without a vocabulary of its own"
    if kind:
        raise ValueError(
            f"The {role} {config.name_or_path!r} ({', '.join(config.architectures or ['?'])}) is {kind}; "
            f"wanted a decoder-only language model, or one inside of {', '.join(WRAPPERS)}. Pass a text checkpoint of "
            "its family."
        )


def token_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a digest that is equal for tokenizers with the same tokens under the same ids, added ones included."""
    tokens = sorted((index, token) for token, index in tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(tokens).encode()).hexdigest()[:16]


def load_tokenizer(model: str, role: str, **kwargs: Any) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a model.

    Raises:
        ValueError: where there is none.
    """
    try:
        return AutoTokenizer.from_pretrained(model, **kwargs)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"The {role}'s tokenizer could not be loaded from {str(model)!r}. Save one there with "
            f"`tokenizer.save_pretrained`. ({error})"
        ) from error


def load_generation_config(model: str, config: PreTrainedConfig, **kwargs: Any) -> GenerationConfig | PreTrainedConfig:
    """Return the generation settings beside a model, which may name more end tokens; else its configuration."""
    try:
        return GenerationConfig.from_pretrained(model, **kwargs)
    except OSError:
        return config


def weight_digest(model: nn.Module) -> str:
    """Return a number that changes with any weight of a model, a kept buffer too: SHA-256 of all of their bytes.

    Waits for the device, and copies each weight to the host once.
    """
    digest = hashlib.sha256()
    for name, weight in chain(model.named_parameters(), kept_buffers(model)):
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        digest.update(weight.detach().reshape(-1).view(torch.uint8).cpu().numpy().data)
    return digest.hexdigest()


def kept_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Iterate over the buffers that a checkpoint holds, by name: weights that are not trained."""
    for place, module in model.named_modules():
        for name, buffer in module.named_buffers(prefix=place, recurse=False):
            if name.rpartition(".")[2] not in module._non_persistent_buffers_set:
                yield name, buffer


@torch.no_grad()
def fingerprint(weight: Tensor) -> Tensor:
    """Return a number () that changes with any element of a tensor and with their order, on the tensor's device.

    The elements' bits, as integers, are multiplied by odd numbers that depend on the place, modulo 2^32, and summed: a
    change of one element always shows, one of many all but surely.
    """
    bits = weight.detach().reshape(-1).view(_INTEGERS[weight.element_size()])
    size = 1 << (24 if weight.is_cuda else 20)  # few launches there, the cache here
    factors = torch.arange(min(len(bits), size), dtype=torch.int32, device=weight.device) * 0x61C88647 | 1
    total = torch.zeros((), dtype=torch.int64, device=weight.device)
    for number, chunk in enumerate(bits.split(size)):
        total += (chunk * factors[: len(chunk)]).sum(dtype=torch.int64) * (2 * number + 1)
    return total


_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def folder_digest(folder: Path) -> str:
    """Return a number that changes with any byte of a folder's weights, and not with the folder's name.

    Reads each file once, several at a time: loading the model reads the same bytes.
    """
    files = sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin"))

    def digest_of(path: Path) -> bytes:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()

    with ThreadPoolExecutor() as pool:
        parts = pool.map(digest_of, files)
        return hashlib.sha256(b"".join(f"{p.name} ".encode() + part for p, part in zip(files, parts))).hexdigest()
