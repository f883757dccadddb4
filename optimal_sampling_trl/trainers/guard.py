"""The guard of the weights: the engine's log θ against the trainer's, on the tokens that the engine sampled.

Both come from one model, so they may differ only by rounding. A student that was not pushed, was pushed without its
adapter, or reads another prompt differs by tenths of a nat a token and more.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedConfig

from ..backends.transformers.backend import evaluating
from ..pairing import context_length
from ..rollouts.rollout import Rollout

logger = logging.getLogger(__name__)

BOUNDS = {torch.float32: 1e-2, torch.float16: 2e-2, torch.bfloat16: 0.15}
"""Largest mean of |log θ of the trainer − log θ of the engine| that rounding explains, in nats a token, by the
coarsest type that a weight or an activation has on either side.

Measured (docs/performance.md, docs/robustness.md): bfloat16 on an H100 0.04 in the mean with a small model, 0.06 over
hundreds of tokens with two prompts and graphs, 0.08 with random weights over 152 000 tokens; float32 there 0.005,
since attention multiplies in TF32; on a CPU 0.006 to 0.012 in bfloat16. float16 rounds eight times finer than
bfloat16. They hold for tokens of log θ down to `PROBABLE` in the mean."""
MARGIN = 2.0
"""Multiple of the bound at which training stops, where the user sets no tolerance.

Batches pass a bound where nothing is wrong: with SmolLM2-135M in bfloat16 on an H200 0.15 to 0.18 over 273 to 1536
tokens, and 0.17 over 13, at a mean log θ of about −2. A wrong student's were 0.38 to 0.77."""
PROBABLE = -5.0
"""Mean log θ, in nats, below which the bounds grow in proportion to it.

The trainer's float32 weights are rounded when they come into an engine in bfloat16, and a step of 3e-5 is less than
half of the spacing of many. So an engine lags behind, and where a loss pushes improbable tokens down, its log θ stays
above the trainer's. Measured with SmolLM2-135M: on an H200 0.15 and 0.18 at a mean log θ of −7.6 and −10.4 (preset
`logit-fusion`); on a CPU the rounding of its weights alone, after 10 to 40 updates that push random tokens down, 0.19
to 0.26 at −21 to −48."""
CPU_BOUND = 1e-3
"""The same for float32 on a CPU, where at most 1e-5 was measured."""
ROWS, TOKENS = 2, 512
"""Completions of each process, and tokens of each, for which the trainer's log θ is computed where TRL does not."""


def bound_of(types: Sequence[torch.dtype], device: torch.device) -> float:
    """Pick the bound for what the trainer and the engine compute in.

    Args:
        types: of weights and activations on both sides.
        device: where the trainer is.
    """
    if set(types) <= {torch.float32, torch.float64} and device.type == "cpu":
        return CPU_BOUND
    return max(BOUNDS.get(one, BOUNDS[torch.float32]) for one in types)


class WeightGuard:
    """Stops training where the engine samples from another student than the one that is trained.

    Args:
        bound: what rounding explains, in nats a token; see `BOUNDS`.
        tolerance: what stops training; None is `MARGIN` times the bound. Between the bound and this there is one
            warning, so that infinity only warns.
    """

    def __init__(self, bound: float, tolerance: float | None = None) -> None:
        self.bound, self.tolerance = bound, tolerance
        self.warned = False

    def check(self, engine: Float[Tensor, " N"], trainer: Float[Tensor, " N"], hints: Sequence[str] = ()) -> None:
        """Compare the log θ of N sampled tokens, in nats; N may be 0.

        Args:
            engine: log θ as it was recorded.
            trainer: log θ as the trained module computes it.
            hints: what may be wrong in this run, for the error.

        Raises:
            RuntimeError: with both numbers and what to check.
        """
        if not len(engine):
            return
        difference = float((trainer - engine).abs().mean())
        means = float(engine.mean()), float(trainer.mean())
        bound = self.bound * max(1.0, max(means) / PROBABLE)
        limit = MARGIN * bound if self.tolerance is None else self.tolerance
        if difference <= min(bound, limit):
            return
        message = (
            f"The engine's log θ and the trainer's differ by {difference:.3g} nats a token in the mean over "
            f"{len(engine)} tokens (engine {means[0]:.4g}, trainer {means[1]:.4g}); rounding "
            f"explains up to {bound:.3g}, and {limit:.3g} stops training. Beyond rounding, the completions come "
            f"from another model than the one that is trained. Check: {'; '.join([*hints, *CAUSES])}. Where you "
            "know why, set `log_theta_tolerance` to what may be; 'inf' only warns."
        )
        if not difference <= limit:
            raise RuntimeError(message)
        if not self.warned:
            logger.warning(message)
        self.warned = True


CAUSES = (
    "was the student, or its configuration, changed in memory after it was loaded from its folder",
    "does a callback or a subclass replace the model, or change how it reads a prompt",
    "does backend='transformers' agree",
)


@torch.no_grad()
def log_theta_of(
    model: Any, prompts: Sequence[Sequence[int]], rollouts: Sequence[Rollout], temperature: float
) -> Tensor:
    """Compute log θ of the sampled tokens with the trained module, row by row and without dropout.

    Args:
        model: the module.
        prompts: what the student read.
        rollouts: the completions, of which the first `TOKENS` tokens count.
        temperature: at which they were sampled.

    Returns:
        log θ (N,), one row's tokens after another's.
    """
    keeps = "logits_to_keep" in inspect.signature(_decoder(model).forward).parameters
    rows = []
    device = next(model.parameters()).device
    with evaluating(model):
        for prompt, rollout in zip(prompts, rollouts, strict=True):
            sampled = torch.tensor(rollout.completion_ids[:TOKENS], device=device)
            ids = torch.cat([torch.tensor(list(prompt), device=device), sampled])[None]
            logits = model(input_ids=ids, **({"logits_to_keep": len(sampled) + 1} if keeps else {})).logits
            log_probabilities = (logits[0, -len(sampled) - 1 : -1].float() / temperature).log_softmax(-1)
            rows.append(log_probabilities.gather(1, sampled[:, None])[:, 0])
    return torch.cat(rows)


def _decoder(model: Any) -> nn.Module:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def dropout_of(model: nn.Module) -> list[str]:
    """Name the dropout that is on while a model trains, each kind once with its largest probability."""
    found: dict[str, float] = {}
    for path, module in model.named_modules():
        for name, value in _dropout_of_module(path, module):
            found[name] = max(value, found.get(name, 0.0))
    return [f"{name} {value:g}" for name, value in sorted(found.items())]


def _dropout_of_module(path: str, module: nn.Module) -> Iterator[tuple[str, float]]:
    if isinstance(module, nn.modules.dropout._DropoutNd):
        if module.p > 0:
            parts = [part for part in path.split(".") if "drop" in part]
            yield (parts or [path or "dropout"])[0], module.p
        return
    for name, value in vars(module).items():
        if "drop" in name and isinstance(value, float) and value > 0:
            yield name, value


def check_padding(config: PreTrainedConfig, width: int) -> None:
    """Refuse a batch that is longer, padding included, than the context of LongRoPE's first angles.

    The engine reads each text alone. transformers looks at the longest row, and beyond that context turns all tokens
    of the batch by other angles: the trainer's log θ would be another model's.

    Args:
        config: of a student with LongRoPE.
        width: tokens of the longest prompt and the longest completion together, to which all rows are padded.

    Raises:
        ValueError: naming both lengths.
    """
    if width > (most := context_length(config.get_text_config())):
        raise ValueError(
            f"The student {config.name_or_path!r} reads by LongRoPE, whose angles change behind {most} tokens, "
            f"padding included, and the batch is padded to {width}: its longest prompt and its longest completion. "
            "Leave out the longest prompts, or lower `max_completion_length`."
        )
