"""The worker's side of new weights of the student: loaded in place, so that CUDA graphs stay valid.

The caller's side is `VLLMBackend.load_theta`, or a trainer's client of a server.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from logging import Filter, LogRecord, getLogger
from typing import Any

import torch
from torch import Tensor, nn

from ....pairing import weight_digest
from ..families import OTHER_BACKEND
from .alone import set_alone
from .incoming import IncomingWeights


class OptimalSamplingWorker:
    """The methods that each of vLLM's workers gets: vLLM adds this class to its worker's bases."""

    model_runner: Any

    def install_mixture_sampler(self) -> None:
        """Put the mixture before the sampler of Model Runner V1, and its streams before the models; V2 asks the model
        for its own (model_state.py).

        Raises:
            ValueError: where vLLM gave the two models more than one group of caches on V2, or chose V1 on a GPU.
        """
        runner = self.model_runner
        groups = len(runner.kv_cache_config.kv_cache_groups)
        is_first_runner = hasattr(runner, "input_batch")
        if groups != 1 and not is_first_runner and runner.model.has_one_table:
            raise ValueError(
                f"vLLM made {groups} groups of KV caches for this pair; wanted 1. The two models differ in the kind "
                "of their attention: pass a pair of one family, or backend='transformers'."
            )
        if is_first_runner:
            if runner.device.type != "cpu":
                raise ValueError(
                    f"vLLM chose Model Runner V1 on {runner.device}; wanted V2, as V1's rows are mapped to requests "
                    "on the host. Install Triton and drop settings that force V1, such as `logits_processors`."
                )
            from .row_sampler import MixtureSampler
            from .row_streams import RowStreams

            if not isinstance(runner.sampler, MixtureSampler):
                runner.sampler = MixtureSampler(runner.sampler, runner)
                runner.model.row_streams = RowStreams(runner)

    def set_alone(self, alone: bool) -> None:
        """Let the student run alone, or both models again: see alone.py."""
        set_alone(self.model_runner, alone)

    def zero_caches(self) -> None:
        """Set every block of every layer's cache to 0, and every state."""
        for cache in self.model_runner.kv_caches:
            for part in cache if isinstance(cache, (list, tuple)) else [cache]:
                part.zero_()

    def check_theta_weights(self, named_parameters: Sequence[tuple[str, Tensor]]) -> None:
        """Read names and shapes of a whole set; see `VLLMBackend.load_theta`."""
        for _ in _checked(self.model_runner.model, named_parameters):
            pass

    @torch.no_grad()
    def load_theta_weights(self, named_parameters: Iterable[tuple[str, Tensor]]) -> None:
        """Load a whole set into the student's own storages."""
        model = self.model_runner.model
        load = model.destinations.load if keeps_what_it_loads(model.theta) else partial(load_copies, model.theta)
        with reloading(model):
            load(_checked(model, named_parameters))

    def theta_digest(self) -> str | None:
        """Return a number that changes with the student's weights; None before the first reload."""
        model = self.model_runner.model
        return weight_digest(model.theta) if model.updates else None

    def theta_state(self) -> dict[str, Any]:
        """Say which weights the student has. `instance`: random per start of this process; `updates`: reloads so far;
        `stale`: why not to sample from them, or None."""
        model = self.model_runner.model
        return {"instance": model.instance, "updates": model.updates, "stale": model.stale}

    def abandon_weight_update(self) -> None:
        """End an update that a trainer began and did not finish; the student stays stale until the next one."""
        if getattr(self, "_weight_update_active", False):
            self.finish_weight_update()  # type: ignore[attr-defined]  # vLLM's own, which the update begun is for

    def refuse_theta_shapes(self, shapes: str) -> dict[str, str | None]:
        """Return the reason why shapes, JSON of (name, shape) pairs, are no whole set of this student's, or None."""
        try:
            check_shapes(self.model_runner.model, json.loads(shapes))
        except ValueError as error:
            return {"reason": str(error)}
        return {"reason": None}


def load_copies(theta: Any, weights: Iterable[tuple[str, Tensor]]) -> None:
    """Hand copies to the loaders of vLLM's student.

    Symptom: after a reload a padded embedding has the weights without the adapter, and differs by 0.7 nats.
    Cause: a layerwise reload keeps what it is handed until the layer is whole, a padded layer's until its end; a
        trainer lends each tensor for a moment, merged with an adapter or gathered from many processes.
    Safe: each is copied, and the copy is dropped with its layer.
    Upstream: none found.
    Delete when: tests/trainers/engines/test_colocated.py passes for adapters on a padded embedding without the copy.
    """
    theta.load_weights((name, weight.clone()) for name, weight in weights)


@contextmanager
def reloading(model: Any) -> Iterator[None]:
    """Let vLLM's `load_weights` write into the student's own storages inside the block, in any portions."""
    model.stale = "a reload of the student failed half-way"
    with nullcontext() if keeps_what_it_loads(model.theta) else _layerwise(model):
        yield
    model.updates, model.stale = model.updates + 1, None


class _NotLoaded(Filter):
    def filter(self, record: LogRecord) -> bool:
        return "Failed to load weights" not in record.getMessage()


@contextmanager
def quiet_reload() -> Iterator[None]:
    """Drop vLLM's warnings of layers that are not loaded.

    Symptom: each reload warns "ParallelLMHead: Failed to load weights", for some models of more layers.
    Cause: a layer whose weights are another layer's, or that has none, counts as not loaded.
    Safe: the warning is dropped while the student is reloaded; what is missing is checked by name instead.
    Upstream: none found.
    Delete when: a reload of a whole tied model is silent.
    """
    logger, drop = getLogger("vllm.model_executor.model_loader.reload.layerwise"), _NotLoaded()
    logger.addFilter(drop)
    try:
        yield
    finally:
        logger.removeFilter(drop)


def repack_tied_head(model: Any, is_tied: bool) -> None:
    """Pack the output layer of a tied model again, on the CPU.

    Symptom: after a reload on the CPU a tied student's log-probabilities are off by about 0.02.
    Cause: the output layer holds a packed copy of the embedding, and no weight of its own that a reload sees.
    Safe: it is packed again after a reload, as vLLM does after the first load.
    Upstream: none found.
    Delete when: tests/backends/vllm/worker/test_weights.py passes for a tied student without this function.
    """
    head = getattr(model, "lm_head", None)
    if is_tied and head is not None and head.weight.device.type == "cpu":
        head.quant_method.process_weights_after_loading(head)


def repack_experts(model: nn.Module) -> None:
    """Pack the experts again, on the CPU.

    Symptom: after a reload on the CPU a student with experts is another model, by nats a token.
    Cause: the kernel of experts packs their weights at the first load alone, and reads later ones as if they were.
    Safe: they are packed after a reload, as vLLM does after the first load.
    Upstream: none found.
    Delete when: tests/backends/vllm/worker/test_weights.py passes for a student with experts without this function.
    """
    for module in model.modules():
        kernel = getattr(getattr(module, "quant_method", None), "moe_kernel", None)
        if kernel is not None and all(weight.device.type == "cpu" for weight in module.parameters()):
            kernel.fused_experts.process_weights_after_loading(module)


def unpack_convolutions(model: nn.Module) -> None:
    """Write the weights of Mamba's convolutions to where they are read, on the CPU.

    Symptom: after a reload on the CPU a student with Mamba layers convolves with its old weights: nats a token.
    Cause: the layer reads a view of the weights as they were loaded first; packing moves them to another storage.
    Safe: what vLLM keeps unpacked beside them is copied over the view; where nothing is packed the view is theirs.
    Upstream: none found.
    Delete when: test_records passes for the pair "granite4-h" without this function.
    """
    for module in model.modules():
        read = getattr(module, "conv_weights", None)
        loaded = getattr(getattr(module, "conv1d", None), "_cpu_unpacked_conv_weight", None)
        if read is not None and loaded is not None:
            read.copy_(loaded)


@contextmanager
def _layerwise(model: Any) -> Iterator[None]:
    """Load in vLLM's way: each layer anew beside the old one, made ready, and copied over it."""
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    with quiet_reload():
        initialize_layerwise_reload(model.theta)
        try:
            yield
        finally:
            lost = lost_weights(model.theta, _is_tied(model))
            finalize_layerwise_reload(model.theta, model.theta_config.model_config)
            repack_tied_head(model.theta, _is_tied(model))
            repack_experts(model.theta)
            unpack_convolutions(model.theta)
        if lost:
            raise ValueError(
                f"{len(lost)} of the student's weights keep their old values, such as {lost[0]!r}: vLLM's loader for "
                f"this family wrote past the reload. Wanted a student of another family. {OTHER_BACKEND}"
            )


def lost_weights(theta: nn.Module, is_tied: bool) -> list[str]:
    """Return the names of the student's parameters that a reload would leave as they were, asked before its end.

    Symptom: after a reload some weights are the old ones, and nothing says so.
    Cause: a family's loader that copies to a parameter itself writes to a stand-in, which the reload drops.
    Safe: each layer that is not whole yet names the parameters that came; a missing one fails the reload.
    Upstream: vLLM RFC 57795 and pull request 57805, for the sinks of attention.
    Delete when: vLLM raises where a reload did not reach a parameter.
    """
    from vllm.model_executor.layers.attention import Attention, MLAAttention
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    lost = []
    for name, layer in theta.named_modules():
        info = get_layerwise_info(layer)
        if not info.can_load() or isinstance(layer, (Attention, MLAAttention)) or (is_tied and name == "lm_head"):
            continue
        came = {each for each, _ in info.loaded_weights}
        lost += [f"{name}.{each}" for each, _ in layer.named_parameters(recurse=False) if each not in came]
    return lost


def keeps_what_it_loads(theta: nn.Module) -> bool:
    """Tell whether layers store their weights as they are loaded, so that loading them again in place is enough: plain
    layers on a GPU. A CPU packs them, layers of experts may reorder theirs, and latent attention multiplies some."""
    from vllm.model_executor.layers.attention import MLAAttention
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod
    from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

    methods = {type(getattr(module, "quant_method", None)) for module in theta.modules()}
    plain = {UnquantizedLinearMethod, UnquantizedEmbeddingMethod, type(None)}
    is_plain = methods <= plain and not any(isinstance(module, MLAAttention) for module in theta.modules())
    return is_plain and all(weight.is_cuda for weight in theta.parameters())


def _is_tied(model: Any) -> bool:
    return bool(model.theta_config.model_config.hf_config.tie_word_embeddings)


def _checked(model: Any, named_parameters: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights; raise where one does not fit, and at the end where some are missing."""
    incoming = IncomingWeights(model)
    yield from incoming.accept(named_parameters)
    incoming.finish()
    yield from incoming.buffers.items()


def check_shapes(model: Any, shapes: Iterable[tuple[str, Sequence[int]]]) -> None:
    """Refuse what is no whole set of the student's weights, by names and shapes.

    Raises:
        ValueError: where weights are missing, unknown or of another shape, naming them.
    """
    for _ in _checked(model, ((name, torch.empty(shape, device="meta")) for name, shape in shapes)):
        pass
