"""Tiny models of many families, built on the spot: seconds instead of downloads, and every test the same weights.

The tokenizer is byte-level: one token a byte, then `<eos>` and `<pad>`: 258 entries, so a text
of n bytes has n tokens. The weights are wide enough (0.08) that teacher and student disagree visibly.
"""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    LlamaConfig,
    LlamaTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
)

EOS, PAD, TOKENS = 256, 257, 258
CHAT_TEMPLATE = (
    "{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
MOE: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
LINEAR: dict[str, Any] = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 64,  # vLLM's kernels on a CPU know of no smaller one
    "linear_value_head_dim": 64,
}
GEMMA4: dict[str, Any] = {
    "global_head_dim": 64,
    "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": 320,
    "final_logit_softcapping": 3.0,
}
MINISTRAL: dict[str, Any] = {
    "rope_parameters": {
        **{"rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 64},
        **{"beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1},
    },
}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
LATENT: dict[str, Any] = {
    # The sizes of what is kept of a token are those that vLLM's kernel for CPUs was compiled for.
    **{"kv_lora_rank": 512, "qk_rope_head_dim": 64, "head_dim": 64, "qk_nope_head_dim": 32, "v_head_dim": 32},
    **{"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 64},
    **{"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": None},
}
BIASED = {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}
"""How DeepSeek-V3 and its kin choose experts; transformers knows no other way for them, vLLM does."""
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": None},
    "granite": {"embedding_multiplier": 2.0, "residual_multiplier": 0.5, "logits_scaling": 1.5},
    "phi3": {"sliding_window": None},
    "gemma2": {"query_pre_attn_scalar": 32, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0},
    "gemma3_text": {"query_pre_attn_scalar": 32},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gemma3": {"query_pre_attn_scalar": 32},
    "gemma4_text": GEMMA4,
    "gemma4": GEMMA4,
    "ministral3": MINISTRAL,
    "mistral3": {"model_type": "ministral3", **MINISTRAL},
    "qwen3_vl": {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [8, 4, 4],
            "mrope_interleaved": True,
        },
    },
    "granitemoehybrid": {"num_local_experts": 0, "num_experts_per_tok": 0, "shared_intermediate_size": 128}
    | {"position_embedding_type": "rope", "mamba_n_heads": 4, "mamba_expand": 2},
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False, "rope_parameters": ROPE},
    "nemotron_h": {
        **{"layer_types": ["linear_attention", "moe", "full_attention", "mlp"], "mamba_num_heads": 4},
        **{"mamba_head_dim": 32, "ssm_state_size": 32, "n_groups": 2, "chunk_size": 16, "n_routed_experts": 4},
        **{"num_experts_per_tok": 2, "moe_intermediate_size": 64, "moe_shared_expert_intermediate_size": 64},
    },
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "qwen2_moe": MOE | {"shared_expert_intermediate_size": 64, "decoder_sparse_step": 1},
    "qwen3_moe": MOE | {"decoder_sparse_step": 1, "norm_topk_prob": True},
    "qwen3_next": MOE | LINEAR | {"shared_expert_intermediate_size": 64, "decoder_sparse_step": 1},
    "qwen3_5_text": LINEAR,
    "qwen3_5": LINEAR,
    "qwen3_5_moe_text": MOE | LINEAR | {"shared_expert_intermediate_size": 64},
    "qwen3_5_moe": MOE | LINEAR | {"shared_expert_intermediate_size": 64},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT | BIASED,
    "glm4_moe_lite": LATENT | BIASED | {"q_lora_rank": 48},
}
"""Settings that each family's configuration needs beyond its sizes."""
KEPT = ("e_score_correction_bias", "layer_scalar")
"""Endings of the buffers that a checkpoint holds; at first each is 0 or 1, which would hide that one is not read."""
TOWER = {"hidden_size": 32, "intermediate_size": 64}
QWEN_TOWER: dict[str, Any] = {
    "vision_config": TOWER | {"depth": 1, "num_heads": 2, "patch_size": 4, "num_position_embeddings": 16}
}
WRAPPERS: dict[str, dict[str, Any]] = {
    "gemma3": {
        "mm_tokens_per_image": 4,
        "vision_config": TOWER | {"num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32, "patch_size": 8},
    },
    "gemma4": {
        "vision_config": TOWER
        | {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}
        | {"position_embedding_size": 16},
    },
    "mistral3": {
        "vision_config": TOWER
        | {"num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 16, "image_size": 32, "patch_size": 8},
    },
    "qwen3_5": QWEN_TOWER,
    "qwen3_5_moe": QWEN_TOWER,
    "qwen3_vl": QWEN_TOWER | {"vision_config": QWEN_TOWER["vision_config"] | {"deepstack_visual_indexes": []}},
}
"""Settings of multimodal families beyond those of the language model inside, which are `FAMILIES`."""


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, `<eos>` and `<pad>`, and a chat template."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate(letters)} | {"<eos>": EOS, "<pad>": PAD}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    # transformers reads a qwen2 folder with a class of its own, which would add an unknown token as the 259th.
    special = {"eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=CHAT_TEMPLATE, **special)


def make_spaced_tokenizer() -> LlamaTokenizer:
    """As Llama-2's, of as many tokens as `make_tokenizer`'s: every other letter has a space before it, as `▁`."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {f"▁{letter}" if index % 2 else letter: index for index, letter in enumerate(letters)}
    vocabulary |= {"<eos>": EOS, "<pad>": PAD}
    special = {"bos_token": "<eos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<pad>"}
    return LlamaTokenizer(vocab=vocabulary, merges=[], **special)


def make_model(
    folder: str | Path,
    family: str,
    seed: int,
    hidden: int = 64,
    layers: int = 2,
    heads: int = 2,
    kv_heads: int = 1,
    vocab_size: int = 288,
    tied: bool = False,
    dtype: torch.dtype = torch.float32,
    **config: Any,
) -> str:
    """Write a random model and its tokenizer into `folder`, and return the folder.

    Args:
        folder: where to write; made if need be.
        family: one of `FAMILIES`, as transformers calls its model type.
        seed: of the weights; equal arguments give equal weights. Torch's own generator is left as it was.
        hidden: size of the hidden state; hidden / heads has to be at least 32 for vLLM's attention on the CPU.
        layers: number of decoder layers.
        heads: attention heads, a multiple of `kv_heads`.
        kv_heads: key and value heads.
        vocab_size: rows of the embedding, at least `TOKENS`; what is above is padding.
        tied: whether the output layer is the embedding.
        dtype: of the weights in the files.
        **config: further fields of the family's configuration.
    """
    sizes = {
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads if "kv_lora_rank" in FAMILIES[family] else kv_heads,
        "head_dim": hidden // heads,
        "max_position_embeddings": 512,
        "tie_word_embeddings": tied,
        "initializer_range": 0.08,
        "bos_token_id": None,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
    }
    fields = {**sizes, **copy.deepcopy(FAMILIES[family]), **config}
    if family in WRAPPERS:
        towers = copy.deepcopy(WRAPPERS[family])
        towers["vision_config"]["out_hidden_size"] = hidden
        fields = {"text_config": fields, "tie_word_embeddings": tied, "eos_token_id": EOS, **towers}
    settings = CONFIG_MAPPING[family](**fields)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # Of some wrappers the causal model is the language model inside alone, and files have the towers, too.
        auto = AutoModelForImageTextToText if family in WRAPPERS else AutoModelForCausalLM
        model = auto.from_config(settings, dtype=torch.float32)
        remember(model)
        for name, buffer in model.named_buffers():
            if name.endswith(KEPT):
                buffer.add_(torch.randn_like(buffer) * 0.1)
    model.to(dtype).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def make_spaced_pair(root: Path) -> tuple[str, str]:
    """Write a teacher and a student whose tokenizer is that of `make_spaced_tokenizer`, and return their folders."""
    folders = [make_model(root / name, "llama", i, vocab_size=TOKENS) for i, name in enumerate(("teacher", "theta"))]
    for folder in folders:
        make_spaced_tokenizer().save_pretrained(folder)
    return folders[0], folders[1]


@torch.no_grad()
def remember(model: PreTrainedModel) -> None:
    """Let a model's linear attention remember tokens for long; as transformers begins, it forgets within one."""
    for name, weight in model.named_parameters():
        if name.endswith("A_log"):
            weight.uniform_(-6.0, -1.0)


def copy_with(model: str, folder: Path, **config: Any) -> str:
    """Copy a model's folder with further entries in its configuration, and return the copy."""
    shutil.copytree(model, folder)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return str(folder)


def publish(cache: Path, name: str, **revisions: str) -> str:
    """Put model folders into a cache of the Hub as revisions of one model, and return its name.

    Args:
        cache: what `huggingface_hub.constants.HF_HUB_CACHE` is to be.
        name: `owner/model`.
        **revisions: a folder for each; `main` is what is found where no revision is asked for.
    """
    place = cache / f"models--{name.replace('/', '--')}"
    for number, (revision, folder) in enumerate(revisions.items()):
        commit = f"{number:040x}"
        shutil.copytree(folder, place / "snapshots" / commit)
        (place / "refs").mkdir(exist_ok=True)
        (place / "refs" / revision).write_text(commit)
    return name


def make_unfit_models(root: Path) -> None:
    """Write `teacher` and `theta`, a pair, and what cannot be mixed with them: `swapped` tokens, an `empty` folder,
    a `small` vocabulary, a `mute` model without a tokenizer, an encoder-decoder `t5`."""
    make_model(root / "teacher", "qwen2", 0, vocab_size=320)
    make_model(root / "theta", "qwen2", 1, tied=True)
    make_model(root / "swapped", "qwen2", 1)
    path = root / "swapped" / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    words = tokenizer["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]
    path.write_text(json.dumps(tokenizer))
    (root / "empty").mkdir()
    LlamaConfig(vocab_size=200).save_pretrained(root / "small")
    make_tokenizer().save_pretrained(root / "small")
    LlamaConfig(vocab_size=288).save_pretrained(root / "mute")
    T5Config(architectures=["T5ForConditionalGeneration"]).save_pretrained(root / "t5")
