"""Teacher and student as one vLLM model: two submodules that share a schedule, a block table and a batch.

vLLM's own machinery builds, loads, compiles and caches both. This class runs one after the other and keeps the
student's logits for the sampler, which mixes (`row_sampler.py`, `slot_sampler.py`): `compute_logits` returns the
teacher's.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from vllm.compilation.backends import set_model_tag
from vllm.config import VllmConfig
from vllm.config.utils import replace
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention, MLAAttention
from vllm.model_executor.model_loader import DefaultModelLoader
from vllm.platforms import current_platform

from ....pairing import is_wrapper
from ....pairing.names import names_of
from ....pairing.wrappers import text_weights
from ..hooks import own_architectures
from ..pair_settings import KEY, settings_of
from .destinations import Destinations
from .shared import share_layers, share_modules
from .submodels import (
    as_text,
    bind_attention,
    build_submodel,
    copy_cache_config,
    theta_model_config,
    use_common_blocks,
    use_own_window,
)

ONE_STREAM = "OPTIMAL_SAMPLING_ONE_STREAM"
"""The variable that keeps both models on one stream of the GPU, to measure what the second one brings."""
THETA = "theta."
"""Prefix of the names of the student's weights while the engine loads both models from disk."""

ROLES = ("teacher", "theta")

COMPUTED = ".rotary_emb.inv_freq"
"""Suffix of buffers that vLLM computes instead of loading."""


class OptimalSamplingForCausalLM(nn.Module):
    """Teacher and student as one model of vLLM; the engine's own model is the teacher.

    `PairSettings` in the engine's `additional_config` tell it the rest.
    """

    is_text_generation_model = True
    is_hybrid = False
    teacher: Any
    theta: Any
    stale: str | None

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        additional: Any = vllm_config.additional_config
        settings = settings_of(vllm_config)
        self.ending = settings.ending
        cache_config = copy_cache_config(vllm_config)
        with set_model_tag("teacher"):
            # Without a prefix: a quantised checkpoint names the layers that it leaves out by their own names.
            self.teacher = build_submodel(*as_text(vllm_config, own_architectures(vllm_config.model_config)), "")
        theta = theta_model_config(vllm_config.model_config, settings.theta)
        use_own_window(cache_config, theta)
        self.theta_config = replace(
            vllm_config,
            model_config=theta,
            quant_config=None,
            cache_config=cache_config,
            additional_config={**additional, KEY: replace(settings, role="theta").to_dict()},
        )
        self.wraps = {role: is_wrapper(each.hf_config) for role, each in zip(ROLES, (vllm_config.model_config, theta))}
        self.one_model = settings.one_model
        self.has_one_table = settings.has_one_table
        layers = vllm_config.compilation_config.static_forward_context
        with set_model_tag("theta"), torch.device("meta") if self.one_model else nullcontext():
            self.theta_config, architectures = as_text(self.theta_config, theta.architectures)
            # Before the student is built: vLLM gives some settings of rotary embeddings names of its own.
            self.theta_names = names_of(self.theta_config.model_config.hf_config, theta.trust_remote_code)
            self.theta = build_submodel(self.theta_config, architectures, "theta")
        if self.one_model:
            share_modules(self.theta, self.teacher)
            share_layers(layers, THETA)
        bind_attention(self.theta, self.theta_config)
        if vllm_config.scheduler_config.disable_hybrid_kv_cache_manager:
            use_common_blocks(layers.values())
        files = DefaultModelLoader.Source(settings.theta, revision=None, prefix=THETA)
        self.secondary_weights = [] if self.one_model else [files]
        self.teacher_size = vllm_config.model_config.get_hidden_size()
        self.theta_size = theta.get_hidden_size()
        self.teacher_vocabulary = vllm_config.model_config.get_vocab_size()
        self.dtype: Any = vllm_config.model_config.dtype
        # Of the student's files: all shapes, the parameters among them, and the values of the buffers.
        self.theta_shapes: dict[str, torch.Size] = {}
        self.theta_required: set[str] = set()
        self.theta_buffers: dict[str, Tensor] = {}
        self.theta_logits: Tensor | None = None
        self.theta_layers = [name for name in layers if name.startswith(THETA)]
        self.teacher_layers = [name for name in layers if not name.startswith(THETA)]
        # Where each model's cache is written, see model_state.py; None: where vLLM says.
        self.teacher_places: Tensor | None = None
        self.theta_places: Tensor | None = None
        self.row_streams: Any = None  # of Model Runner V1, see row_streams.py
        self.theta_alone = False  # alone.py sets it between calls, and keeps the CUDA graphs of both cases
        self.graphs: dict[bool, Any] = {}
        self.side_stream = torch.cuda.Stream() if _may_overlap(self, vllm_config) else None
        self.is_loaded = False
        self.destinations = Destinations(self.theta)
        # What a trainer asks a server for, so that it never samples from weights that it did not send.
        self.instance, self.updates, self.stale = secrets.token_hex(8), 0, None

    def embed_input_ids(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the teacher's embeddings; vLLM asks every model for them, and uses them for multimodal ones alone."""
        return self.teacher.embed_input_ids(input_ids, *args, **kwargs)

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        *args: Any,
        teacher_ids: Tensor | None = None,
        teacher_positions: Tensor | None = None,
        theta_ids: Tensor | None = None,
        theta_positions: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Return the hidden states of both models, (tokens, teacher's size + student's size).

        Where the student runs alone, the teacher's part has no values.

        Args:
            input_ids: what vLLM schedules.
            positions: the tokens' positions in it.
            teacher_ids: what the teacher reads; None: the same.
            teacher_positions: their positions in the teacher's stream.
            theta_ids: what the student reads; None: the same.
            theta_positions: their positions in the student's stream.
        """
        scheduled = (input_ids, positions)
        teacher = scheduled if teacher_ids is None else (teacher_ids, teacher_positions)
        theta = scheduled if theta_ids is None else (theta_ids, theta_positions)
        self._write_to(self.teacher_places, self.teacher_layers, len(input_ids))
        self._write_to(self.theta_places, self.theta_layers, len(input_ids))
        hidden = torch.empty(
            len(input_ids), self.teacher_size + self.theta_size, dtype=self.dtype, device=input_ids.device
        )
        of_teacher, of_theta = hidden.split([self.teacher_size, self.theta_size], dim=1)
        if self.row_streams is not None and (parts := self.row_streams.parts(*scheduled)):
            if not self.theta_alone:
                self._run_part(self.teacher, parts.get("teacher"), scheduled, of_teacher)
            self._run_part(self.theta, parts.get("theta"), scheduled, of_theta)
            return hidden
        if self.theta_alone:
            of_theta.copy_(self.theta(*theta))
            return hidden
        # Graphs of one pool must not run at the same time: only while a graph of the whole step is captured may they.
        if self.side_stream is None or not torch.cuda.is_current_stream_capturing():
            self._run_in_turn(teacher, theta, of_teacher, of_theta)
        else:
            self._run_beside(self.side_stream, teacher, theta, of_teacher, of_theta)
        return hidden

    @staticmethod
    def _run_part(model: nn.Module, part: Any, scheduled: tuple[Tensor, Tensor], out: Tensor) -> None:
        """Run a model on the tokens of a step that it reads, all that is scheduled without a part; others get 0."""
        if part is None:
            out.copy_(model(*scheduled))
            return
        out.zero_()
        if len(part.rows):
            out.index_copy_(0, part.rows, model(part.ids, part.positions))

    def _run_in_turn(self, teacher: Any, theta: Any, of_teacher: Tensor, of_theta: Tensor) -> None:
        """Run the teacher, copy its hidden states out, and only then run the student.

        Symptom: wrong tokens in steps that mix prefill and decode, under piecewise CUDA graphs.
        Cause: the last piece of each compiled submodel frees its output into the pool that the next one writes to.
        Safe: the teacher's hidden states are copied out before the student runs; joining the two copies anyway.
        Upstream: vLLM pull request 22282, closed without a merge.
        Delete when: a compiled submodel may keep its output.
        """
        of_teacher.copy_(self.teacher(*teacher))
        of_theta.copy_(self.theta(*theta))

    def _run_beside(
        self, stream: torch.cuda.Stream, teacher: Any, theta: Any, of_teacher: Tensor, of_theta: Tensor
    ) -> None:
        """Run the student on a stream of its own while the teacher runs."""
        main = torch.cuda.current_stream()
        stream.wait_stream(main)
        with torch.cuda.stream(stream):
            of_theta.copy_(self.theta(*theta))
        of_teacher.copy_(self.teacher(*teacher))
        main.wait_stream(stream)

    @staticmethod
    def _write_to(places: Tensor | None, layers: Sequence[str], tokens: int) -> None:
        """Send this step's keys and values of a model to its own places; in a trial step without caches nowhere."""
        if places is None:
            return
        planned: Any = get_forward_context().slot_mapping
        if planned:
            planned.update({name: places[:tokens] for name in layers if name in planned})

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        """Return the teacher's logits (N, V of the teacher); the student's stay on `theta_logits` for the sampler.

        Where the student runs alone, its own stand for the teacher's: a mixture of equal models is the model itself.
        """
        teacher, theta = hidden_states.split([self.teacher_size, self.theta_size], dim=1)
        self.theta_logits = theta_logits = self.theta.compute_logits(theta.contiguous())
        if self.theta_alone:
            missing = self.teacher_vocabulary - theta_logits.shape[1]
            return nn.functional.pad(theta_logits, (0, missing), value=-torch.inf)  # a copy: a sampler may write to it
        return self.teacher.compute_logits(teacher.contiguous())

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load both models from disk the first time, and the student alone later.

        The student's names begin with `theta.` the first time. Later they are those of its own checkpoint, so that
        vLLM's and TRL's ways of pushing weights reach it.
        """
        names = self.theta_names
        if self.is_loaded:
            weights = self.of_text("theta", weights)
            on_disk = weights if names is None else names.on_disk(weights, self.theta_shapes)
            return {THETA + name for name in self.theta.load_weights(on_disk)}
        loaded: set[str] = set()
        of_teacher = self._strip if self.one_model else partial(self.of_text, "teacher")
        for is_theta, group in groupby(weights, lambda item: item[0].startswith(THETA)):
            if is_theta:
                loaded |= {THETA + name for name in self.theta.load_weights(self._strip(group))}
            else:
                loaded |= {"teacher." + name for name in self.teacher.load_weights(of_teacher(group))}
        if not self.theta_shapes:
            raise ValueError(
                "vLLM's loader brought no weights of the student; wanted a `load_format` that reads files."
            )
        self.theta_required = set(self.theta_shapes) if names is None else names.parameters_on_disk(self.theta_shapes)
        self.is_loaded = True
        return loaded

    def _strip(self, weights: Iterable[tuple[str, Tensor]]) -> Iterable[tuple[str, Tensor]]:
        for name, weight in self.of_text("theta", ((name.removeprefix(THETA), weight) for name, weight in weights)):
            if not name.endswith(COMPUTED):  # old checkpoints hold it, and no parameter has its name
                self.theta_shapes[name] = weight.shape
                if self.theta_names is not None and self.theta_names.is_buffer(name):
                    self.theta_buffers[name] = weight.clone()
            yield name, weight

    def of_text(self, role: str, weights: Iterable[tuple[str, Tensor]]) -> Iterable[tuple[str, Tensor]]:
        """A model's weights under the names of its language model, without the towers of a multimodal wrapper."""
        return text_weights(weights) if self.wraps[role] else weights

    def get_model_state_cls(self) -> type:
        """Return the class that Model Runner V2 asks for its hooks."""
        from .model_state import DecoderState, OptimalSamplingModelState

        return OptimalSamplingModelState if self.has_one_table else DecoderState


def _may_overlap(model: OptimalSamplingForCausalLM, config: VllmConfig) -> bool:
    """Tell whether both models may run at the same time: on one GPU, where their layers share no workspace.

    Experts, latent attention and FlashInfer have one for the whole process, and tensor parallelism one set of signals;
    of linear attention it was not checked.
    """
    backends = {m.attn_backend.get_name() for m in model.modules() if isinstance(m, (Attention, MLAAttention))}
    return (
        current_platform.is_cuda()
        and config.parallel_config.world_size == 1
        and backends == {"FLASH_ATTN"}
        and not has_experts(model)
        and not model.is_hybrid
        and not os.environ.get(ONE_STREAM)
    )


def has_experts(model: nn.Module) -> bool:
    """Tell whether some layer is a mixture of experts: by its room, as its class has another name in each vLLM."""
    return any(".fused_moe." in type(module).__module__ for module in model.modules())
