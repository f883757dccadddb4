"""Students with every kind of adapter, compiled, resized or untied, as a trainer may hold them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import torch
from torch import nn
from transformers import AutoModelForCausalLM

LAYERS = {"target_modules": ["q_proj", "down_proj"]}
BOTH = {"embed_tokens": [7], "lm_head": [7]}
Make = Callable[[Any], Any]


def lora(**settings: Any) -> Make:
    fields = {"r": 4, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | settings
    return lambda model: peft.get_peft_model(model, peft.LoraConfig(**fields))


def adapter(kind: str, **settings: Any) -> Make:
    return lambda model: peft.get_peft_model(model, getattr(peft, f"{kind}Config")(task_type="CAUSAL_LM", **settings))


def with_frozen_copy(model: Any) -> Any:
    """As TRL does for a ready adapter with `beta` above 0."""
    config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", modules_to_save=["embed_tokens"])
    model = peft.get_peft_model(model, config)
    model.add_adapter("ref", config)
    model.set_adapter("default")
    return model


def compiled_in_part(model: Any) -> Any:
    model.model.layers[0] = torch.compile(model.model.layers[0], backend="eager")
    return model


def injected(model: Any) -> Any:
    """Through transformers, without a model of peft around it."""
    model.add_adapter(peft.LoraConfig(r=4, target_modules=["q_proj"]))
    return model


def untied(model: Any) -> Any:
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    model.config.tie_word_embeddings = False
    return model


def resized(model: Any) -> Any:
    model.resize_token_embeddings(312)
    return model


def quantised(model: Any) -> Any:
    layer = model.model.layers[0].self_attn.q_proj
    layer.weight = nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
    return model


def normalised(model: Any) -> Any:
    nn.utils.parametrizations.weight_norm(model.model.layers[0].mlp.up_proj)
    return model


TIED: dict[str, Make] = {
    "full": lambda model: model,
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "compiled in part": compiled_in_part,
    "lora": lora(),
    "rslora": lora(use_rslora=True),
    "dora": lora(use_dora=True),
    "bias": lora(bias="all"),
    "ranks and factors by layer": lora(rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 3}),
    "some layers": lora(target_modules=["q_proj", "up_proj"], layers_to_transform=[1]),
    "a parameter": lora(target_modules=[], target_parameters=["mlp.up_proj.weight"]),
    "a norm as a whole": lora(modules_to_save=["norm"]),
    "injected": injected,
    "new tokens": lora(trainable_token_indices=[3, 7, 14]),
    "new tokens in both": lora(target_modules=["q_proj"], trainable_token_indices=BOTH),
    "tied embedding": lora(target_modules=["q_proj", "embed_tokens"], ensure_weight_tying=True),
    "tied embedding as a whole": lora(modules_to_save=["embed_tokens"], ensure_weight_tying=True),
    "pissa": lora(init_lora_weights="pissa"),
    "ia3": adapter("IA3", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "vera": adapter("Vera", **LAYERS),
    "loha": adapter("LoHa", **LAYERS),
    "norms": adapter("LNTuning", target_modules=["input_layernorm"]),
    "oft": adapter("OFT", oft_block_size=8, r=0, **LAYERS),
    "tokens alone": adapter("TrainableTokens", token_indices=[7, 14]),
}
"""Students that can be pushed, tied or not."""
UNTIED: dict[str, Make] = {
    "embedding": lora(target_modules=["q_proj", "embed_tokens"]),
    "embedding, dora": lora(target_modules=["q_proj", "embed_tokens"], use_dora=True),
    "head": lora(target_modules=["lm_head"]),
    "embedding as a whole": lora(modules_to_save=["embed_tokens"]),
    "both as a whole": lora(modules_to_save=["embed_tokens", "lm_head"]),
    "a frozen copy": with_frozen_copy,
    "different tokens": lora(target_modules=["q_proj"], trainable_token_indices=BOTH | {"lm_head": [14]}),
}
"""Those that would take an embedding and a head that are one weight apart."""


def load(folder: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def stirred(model: Any) -> Any:
    """As after some steps: all that is trained has moved."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()
