"""The student's weights, replaced in place while the engine stays: same storages, so that CUDA graphs stay valid."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ....pairing import weight_digest
from ..versions import quiet_reload, repack_tied_head

if TYPE_CHECKING:
    from vllm import LLM

    from ..limits import Pair

HEAD = "lm_head.weight"
HALF = "a reload of the student failed half-way, so that its weights are a mixture of old and new ones"


def reload_theta(llm: LLM, pair: Pair, named_parameters: Iterable[tuple[str, Tensor]]) -> None:
    """Replace the student's weights and forget what was cached under the old ones.

    A list is checked as a whole first, and the old weights stay where it is refused. A generator is loaded as it
    comes, as each of its tensors may be gathered for a moment only: where that fails half-way the engine refuses to
    sample until a whole set was loaded.

    Args:
        llm: the engine.
        pair: its pair; `stale` is set and cleared here.
        named_parameters: every weight of the student under its checkpoint's name, as pairs or as a `state_dict`; the
            output layer of a tied one may be left out.

    Raises:
        RuntimeError: while requests run, or where vLLM keeps cached blocks.
        ValueError: where weights are missing, unknown or of another shape, naming them.
    """
    if llm.llm_engine.has_unfinished_requests():
        raise RuntimeError(
            "The student cannot be reloaded while requests run: their first tokens would be another model's. "
            "Wait until `generate` returned, or abort them."
        )
    if isinstance(named_parameters, Mapping):
        named_parameters = list(named_parameters.items())
    if isinstance(named_parameters, Sequence):
        llm.collective_rpc("check_theta_weights", args=(named_parameters,))
    clean_caches(llm, pair)

    def begun() -> Iterator[tuple[str, Tensor]]:
        for item in named_parameters:
            pair.stale = HALF
            yield item

    llm.collective_rpc("reload_theta", args=(begun(),))
    if not llm.reset_prefix_cache():
        pair.stale = "vLLM did not drop the blocks that were cached under the student's old weights"
        raise RuntimeError(f"{pair.stale[0].upper()}{pair.stale[1:]}: some request still holds them.")
    pair.stale = None


def clean_caches(llm: LLM, pair: Pair) -> None:
    """Drop what a NaN left in the caches: the trap `nan_in_cache`. Nothing where no model returned one."""
    if pair.has_nan and not llm.llm_engine.has_unfinished_requests():
        llm.collective_rpc("zero_caches")
        llm.reset_prefix_cache()
        pair.has_nan = False


class OptimalSamplingWorker:
    """What each of vLLM's workers learns to do; vLLM adds this class to its worker's bases."""

    model_runner: Any

    def install_mixture_sampler(self) -> None:
        """Put the mixture before the sampler of Model Runner V1; V2 asks the model for its own (model_state.py).

        Raises:
            ValueError: where vLLM gave the two models more than one group of caches, or chose V1 on a GPU.
        """
        runner = self.model_runner
        groups = len(runner.kv_cache_config.kv_cache_groups)
        if groups != 1:
            raise ValueError(
                f"vLLM made {groups} groups of KV caches for this pair; wanted 1. The two models differ in the kind "
                "of their attention: pass a pair of one family, or backend='transformers'."
            )
        if hasattr(runner, "input_batch"):
            if runner.device.type != "cpu":
                raise ValueError(
                    f"vLLM chose Model Runner V1 on {runner.device}; wanted V2, as V1's rows are mapped to requests "
                    "on the host. Install Triton and drop settings that force V1, such as `logits_processors`."
                )
            from .row_sampler import MixtureSampler

            if not isinstance(runner.sampler, MixtureSampler):
                runner.sampler = MixtureSampler(runner.sampler, runner)

    def zero_caches(self) -> None:
        """Set every block of every layer's cache to 0."""
        for cache in self.model_runner.kv_caches:
            cache.zero_()

    def check_theta_weights(self, named_parameters: Sequence[tuple[str, Tensor]]) -> None:
        """Read names and shapes of a whole set; see `reload_theta`."""
        for _ in _checked(self.model_runner.model, named_parameters):
            pass

    @torch.no_grad()
    def reload_theta(self, named_parameters: Iterable[tuple[str, Tensor]]) -> None:
        """Load a whole set into the student's own storages."""
        model = self.model_runner.model
        load = model.destinations.load if keeps_what_it_loads(model.theta) else model.theta.load_weights
        with reloading(model):
            load(_checked(model, named_parameters))

    def theta_digest(self) -> str | None:
        """A number that changes with the student's weights: of a few entries of each. None before the first reload."""
        model = self.model_runner.model
        return weight_digest(model.theta) if model.updates else None

    def theta_state(self) -> dict[str, Any]:
        """Which weights the student has: of which start of this process, after how many reloads, and why they are
        none to sample from (`stale`), or None."""
        model = self.model_runner.model
        return {"instance": model.instance, "updates": model.updates, "stale": model.stale}

    def abandon_weight_update(self) -> None:
        """End an update that a trainer began and did not finish; the student stays stale until the next one."""
        if getattr(self, "_weight_update_active", False):
            self.finish_weight_update()  # type: ignore[attr-defined]  # vLLM's own, which the update begun is for

    def refuse_theta_shapes(self, shapes: str) -> dict[str, str | None]:
        """Why weights of these shapes, JSON of (name, shape) pairs, are not a whole set of this student, or None."""
        try:
            check_shapes(self.model_runner.model, json.loads(shapes))
        except ValueError as error:
            return {"reason": str(error)}
        return {"reason": None}


@contextmanager
def reloading(model: Any) -> Iterator[None]:
    """While this lasts `model.theta.load_weights` writes into the student's own storages, in any portions."""
    model.stale = "a reload of the student failed half-way"
    with nullcontext() if keeps_what_it_loads(model.theta) else _layerwise(model):
        yield
    model.updates, model.stale = model.updates + 1, None


@contextmanager
def _layerwise(model: Any) -> Iterator[None]:
    """vLLM's way: each layer is loaded anew beside the old one, made ready, and copied over it."""
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    with quiet_reload():
        initialize_layerwise_reload(model.theta)
        try:
            yield
        finally:
            finalize_layerwise_reload(model.theta, model.theta_config.model_config)
            repack_tied_head(model.theta, _is_tied(model))


def keeps_what_it_loads(theta: nn.Module) -> bool:
    """Whether the layers store their weights as they are loaded, so that loading them again in place is enough: plain
    layers on a GPU. A CPU packs them, and layers of experts may reorder theirs."""
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod
    from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

    methods = {type(getattr(module, "quant_method", None)) for module in theta.modules()}
    plain = {UnquantizedLinearMethod, UnquantizedEmbeddingMethod, type(None)}
    return all(weight.is_cuda for weight in theta.parameters()) and methods <= plain


def _is_tied(model: Any) -> bool:
    return bool(model.theta_config.model_config.hf_config.tie_word_embeddings)


def _checked(model: Any, named_parameters: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The weights, on their way; raises where one does not fit, and at the end where some are missing."""
    left = _required(model)
    for name, weight in named_parameters:
        if _check_shape(model, name, weight.shape):
            left.discard(name)
            yield name, weight.detach()
    _check_none_left(model, left)


def check_shapes(model: Any, shapes: Iterable[tuple[str, Sequence[int]]]) -> None:
    """Refuse what is no whole set of the student's weights, by names and shapes.

    Raises:
        ValueError: where weights are missing, unknown or of another shape, naming them.
    """
    left = _required(model)
    for name, shape in shapes:
        _check_shape(model, name, shape)
        left.discard(name)
    _check_none_left(model, left)


def _required(model: Any) -> set[str]:
    return set(model.theta_shapes) - ({HEAD} if _is_tied(model) else set())


def _check_shape(model: Any, name: str, shape: Sequence[int]) -> bool:
    """Whether a weight that fits is to be loaded: the output layer of a tied model is the embedding."""
    expected: dict[str, torch.Size] = model.theta_shapes
    if name == HEAD and _is_tied(model):
        return False
    if name not in expected or tuple(shape) != tuple(expected[name]):
        got = f"has shape {tuple(shape)}" if name in expected else "is none of its checkpoint's"
        wanted = f"shape {tuple(expected[name])}" if name in expected else f"names such as {min(expected)!r}"
        raise ValueError(f"The student's weight {name!r} {got}; wanted {wanted}. Was it another model's?")
    return True


def _check_none_left(model: Any, left: set[str]) -> None:
    if left:
        few = ", ".join(sorted(left)[:5]) + (f" and {len(left) - 5} more" if len(left) > 5 else "")
        raise ValueError(
            f"{len(left)} of the student's {len(model.theta_shapes)} weights are missing: {few}. "
            "Wanted the whole set: pass all of `model.named_parameters()`, an adapter merged into it."
        )
