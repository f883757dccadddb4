"""What is pushed into an engine of a trained student: the model that the trainer's forward pass is, or a refusal.

Here the weights go into a second model of the student's folder, which has to say what the trained one says.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from helpers.models import make_model
from optimal_sampling_trl.pairing import Source
from optimal_sampling_trl.trainers.engines.student import StudentWeights, check_student

peft = pytest.importorskip("peft")
LAYERS = {"target_modules": ["q_proj", "down_proj"]}
BOTH = {"embed_tokens": [7], "lm_head": [7]}
IDS = torch.arange(27).reshape(3, 9) * 7
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
EXPERTS: dict[str, Make] = {
    "experts": lambda model: model,
    "lora beside experts": lora(),
    "lora on experts": lora(
        target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    ),
    "lora on the router": lora(target_modules=["gate"]),
}
PUSHED = [
    *((name, make, "llama", tied) for name, make in TIED.items() for tied in (False, True)),
    *((name, make, "llama", False) for name, make in UNTIED.items()),
    *((name, make, "qwen3_moe", False) for name, make in EXPERTS.items()),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, bool], str]:
    """The folder of a student; 288 tokens, which vLLM pads."""
    root, made = tmp_path_factory.mktemp("students"), {}

    def folder(family: str, tied: bool) -> str:
        if (family, tied) not in made:
            made[family, tied] = make_model(root / f"{family}-{tied}", family, 1, tied=tied)
        return made[family, tied]

    return folder


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


@torch.no_grad()
def log_probabilities(model: Any) -> Tensor:
    return model(input_ids=IDS).logits.log_softmax(-1)


@pytest.mark.parametrize(
    ("name", "make", "family", "tied"),
    PUSHED,
    ids=lambda value: "" if callable(value) else str(value),  # a function's name differs between processes
)
def test_the_weights_are_those_of_the_forward_pass(
    folders: Callable[[str, bool], str], name: str, make: Make, family: str, tied: bool
) -> None:
    """And the trained model is left bit by bit as it was."""
    source = Source(folders(family, tied), "student")
    model = make(load(source.name))
    check_student(model, source, StudentWeights(model))
    wanted = log_probabilities(stirred(model))
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    assert source.weight_names is not None
    pushed = {name: weight.clone() for name, weight in StudentWeights(model) if name not in source.weight_names.ties}
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert pushed.keys() == source.weight_names.shapes.keys()
    second = load(source.name)
    assert (wanted - log_probabilities(second)).abs().max() > 0.01, "nothing was trained"
    second.load_state_dict(pushed, strict=False)
    second.tie_weights()
    assert (wanted - log_probabilities(second)).abs().max() < 5e-5


def test_what_rounds_is_restored(folders: Callable[[str, bool], str]) -> None:
    """In bfloat16 adding and subtracting an adapter does not give back what was there, and a push comes every step."""
    model = stirred(lora()(load(folders("llama", False)).to(torch.bfloat16)))
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    for _ in range(3):
        for _ in StudentWeights(model):
            pass
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    weights = iter(StudentWeights(model))  # one that breaks off leaves no layer merged
    for name, _ in weights:
        if "q_proj" in name:
            break
    weights.close()  # type: ignore[attr-defined]
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


TIES = "ties 'model.embed_tokens.weight' and 'lm_head.weight'"
APART = f"{TIES}, and the student's adapter .LORA. .*`ensure_weight_tying=True`"
SOFT = {"num_virtual_tokens": 4}
REFUSED: dict[str, tuple[Make, bool, str]] = {
    **{name: (make, True, APART) for name, make in UNTIED.items()},
    "untied": (untied, True, f"{TIES}, and the trained student has two weights there.*Save the untied student"),
    "resized": (resized, False, r"has shape \(312, 64\), there \(288, 64\).*Save it with `save_pretrained`"),
    "weight norm": (normalised, False, "up_proj.parametrizations.weight.original0' is none of the folder's"),
    "repeated layers": (lora(layer_replication=[(0, 2), (0, 2)]), False, "'model.layers.2.* is none of the folder's"),
    "activated": (lora(alora_invocation_tokens=[3]), False, r"\(LORA\) cannot be merged .* does not support merging"),
    "experts of adapters": (adapter("Poly", **LAYERS), False, r"\(POLY\) cannot be merged"),
    "prompt tuning": (adapter("PromptTuning", **SOFT), False, "of the kind PROMPT_TUNING"),
    "prefix tuning": (adapter("PrefixTuning", **SOFT), False, "of the kind PREFIX_TUNING"),
    "p-tuning": (adapter("PromptEncoder", **SOFT), False, "of the kind P_TUNING"),
    "a prompt in the layers": (adapter("AdaptionPrompt", adapter_len=4, adapter_layers=1), False, "ADAPTION_PROMPT"),
    "quantised": (quantised, False, "q_proj.weight' is of type torch.int8.*Load it unquantised"),
}


@pytest.mark.parametrize(("make", "tied", "words"), REFUSED.values(), ids=REFUSED)
def test_refused_by_name(folders: Callable[[str, bool], str], make: Make, tied: bool, words: str) -> None:
    source = Source(folders("llama", tied), "student")
    model = make(load(source.name))
    with pytest.raises(ValueError, match=f"(?s){words}"):
        check_student(model, source, StudentWeights(model))
