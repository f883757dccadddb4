"""The mixture on plain transformers: two models with a KV cache each, batched. Needs no vLLM, and is exact.

The student may be the module that is being trained. It is used in place, so there is no copy of it and nothing to
synchronise. Prompts are padded on the left; equal prompts are read once; rows that ended leave the batch.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ...options import MAX_MODEL_LEN, NAMED, check_choice, check_whole, unknown_option
from ...pairing import (
    MODEL_OPTIONS,
    NamedWeights,
    Source,
    check_prompt,
    context_length,
    is_wrapper,
    kept_buffers,
    name_sources,
    read_pair,
    weight_digest,
)
from ...pairing.wrappers import text_weights
from ...rollouts.progress import Progress
from ...rollouts.request import Request
from ...rollouts.rollout import Rollout, check_solved
from .decoding import Reader, Rows

DTYPES = ("auto", "bfloat16", "double", "float", "float16", "float32", "float64", "half")
"""Words for a dtype that models can be loaded in."""
ENGINE_OPTIONS = ("device", "max_model_len", "max_num_seqs", *MODEL_OPTIONS)
"""All options of this backend, under vLLM's names where vLLM has them."""

NO_CACHE = {"recurrent_gemma"}
"""Kinds of models that take a cache and hand none back."""
STATES_BESIDE = {"deepseek_v4", "minimax"}
"""Kinds of models whose cache cannot be cut to some of its rows."""
DISTANCES = {"bloom", "mpt"}
"""Kinds of models that need no positions: they read the distances between tokens, which padding does not change."""


class TransformersBackend:
    """Samples the mixture with transformers alone.

    Args:
        teacher: a folder, a model id, a loaded model, or the `Source` of one.
        theta: likewise; a loaded model is used in place, even while it is being trained.
        tokenizer: the pair's; by default the student's, checked against the teacher's.
        teacher_tokenizer: the teacher's own; by default the one beside its files.
        device: where models from folders are loaded; by default the student's device, or a GPU where there is one.
        max_num_seqs: most rows in a batch.
        max_model_len: most tokens of a prompt and its completion; by default what both models can read.
        model_options: `dtype`, `attn_implementation`, `trust_remote_code` for `from_pretrained`, and `revision` for
            the teacher's. Pass a student of another revision as a folder.

    Raises:
        ValueError: on an unknown option, a model that cannot be loaded, or a pair that cannot be mixed.
    """

    name = "transformers"

    def __init__(
        self,
        teacher: str | PreTrainedModel | Source,
        theta: str | PreTrainedModel | Source,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        teacher_tokenizer: PreTrainedTokenizerBase | None = None,
        device: torch.device | str | None = None,
        max_num_seqs: int = 256,
        max_model_len: int | None = None,
        **model_options: Any,
    ) -> None:
        for name in model_options:
            if name not in MODEL_OPTIONS:
                raise ValueError(unknown_option("argument of the transformers backend", name, ENGINE_OPTIONS))
        if not isinstance(dtype := model_options.get("dtype"), torch.dtype | dict | None):
            check_choice("dtype", dtype, DTYPES)
        max_num_seqs = check_whole(
            "The transformers backend", "max_num_seqs", max_num_seqs, 1, "Drop it for 256 rows at once."
        )
        of_teacher, of_theta = name_sources(teacher, theta, model_options)
        for source in (of_teacher, of_theta):
            known: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(source.config), None)
            if known is not None:
                _check_cache(known, source.config, source.role)
        longest = context_length(of_teacher.text_config, of_theta.text_config)
        max_model_len = _check_max_model_len(max_model_len, longest)
        self.pair = read_pair(
            of_teacher,
            of_theta,
            tokenizer=tokenizer,
            teacher_tokenizer=teacher_tokenizer,
            max_model_len=max_model_len,
        )
        self.max_num_seqs = max_num_seqs
        self.device = of_theta.device if device is None else _device(device)
        self._owns_teacher, self._owns_theta = not of_teacher.is_loaded, not of_theta.is_loaded
        self._wraps_theta = is_wrapper(of_theta.config)
        self.theta = of_theta.load(self.device)
        self.teacher = self.theta if self.pair.one_model else of_teacher.load(self.device)
        for source, model in ((of_teacher, self.teacher), (of_theta, self.theta)):
            if (kind := _own_class(model)) is not None:
                _check_cache(kind, source.config, source.role)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The pair's tokenizer."""
        return self.pair.tokenizer

    def check(self, request: Request, index: int) -> None:
        """Refuse a request with a prompt that a model cannot read or a stop text that never comes, or for more
        likeliest tokens than there are.

        Raises:
            ValueError: naming the prompt, the text or the number, what was got and what was wanted.
        """
        for role, ids in (("teacher", request.prompt_ids), ("student", request.theta_prompt_ids)):
            check_prompt(ids, self.pair.context, self.pair.vocabulary, index, role)
        self.pair.check_stop_texts(request.sampling.stop, request.sampling.ignore_eos, index)
        if request.dense is not None:
            request.dense.check_vocabulary(self.pair.vocabulary)

    def generate(self, requests: Sequence[Request], progress: Progress | None = None) -> list[Rollout]:
        """Sample one rollout for each request, in their order; `progress` shows them while they are drawn.

        Raises:
            ValueError: on a prompt that a model cannot read, before anything is sampled.
            UnsolvedError: naming each request for which a model returned NaN or the two share no token; it carries the
                others' rollouts.
            RuntimeError: after `close`, or where a model is on another device than the backend's.
        """
        self._check_ready()
        for index, request in enumerate(requests):
            self.check(request, index)
        order = sorted(range(len(requests)), key=lambda index: len(requests[index].prompt_ids))
        rollouts: dict[int, Rollout] = {}
        with torch.no_grad(), evaluating(self.theta), evaluating(self.teacher):
            for start in range(0, len(order), self.max_num_seqs):
                part = order[start : start + self.max_num_seqs]
                batch = self._generate_batch([requests[index] for index in part], progress)
                rollouts.update(zip(part, batch, strict=True))
                if progress is not None:
                    progress.add(batch)
        result = [rollouts[index] for index in range(len(requests))]
        check_solved(result)
        return result

    def _generate_batch(self, requests: list[Request], progress: Progress | None) -> list[Rollout]:
        prompts = [request.prompt_ids for request in requests], [request.theta_prompt_ids for request in requests]
        teacher = Reader(self.teacher, prompts[0], self.pair.context, self.device)
        theta = Reader(self.theta, prompts[1], self.pair.context, self.device)
        rows = Rows(requests, self.pair, self.device)
        while True:
            tokens = rows.draw(theta.logits.float(), self.pair.ending.fold(teacher.logits.float()))
            keep = rows.advance(tokens)
            if progress is not None and progress.due:
                progress.peek(*rows.so_far())
            if keep is not None:
                if not len(keep):
                    return rows.rollouts()
                teacher.keep(keep)
                theta.keep(keep)
                tokens = tokens[keep]
            teacher.step(tokens)
            theta.step(tokens)

    def load_theta(self, named_parameters: NamedWeights) -> None:
        """Copy weights into the student, all or none.

        Those of a multimodal wrapper may come under the wrapper's names or the language model's; its towers' stay.

        Args:
            named_parameters: every parameter under its name, as pairs or as a `state_dict`; a buffer that a checkpoint
                holds stays where it is not given.

        Raises:
            ValueError: where the student is a module that the caller trains, a name is missing or unknown, a shape
                differs, or a tied weight has two values; the old weights then stay.
            RuntimeError: after `close`.
        """
        self._check_open()
        if not self._owns_theta:
            raise ValueError(
                "The student of this backend is the live module itself: there is nothing to load. Drop the call."
            )
        loaded = dict(self.theta.named_parameters(remove_duplicate=False))
        current, new, buffers = (
            dict(self._of_text(weights.items()))
            for weights in (loaded, dict(named_parameters), dict(kept_buffers(self.theta)))
        )
        current |= {name: buffer for name, buffer in buffers.items() if name in new}  # `state_dict` has them as well
        wrong = _misfits(current, new)
        if wrong:
            raise ValueError(
                f"These weights do not fit the student ({len(wrong)} differ): {'; '.join(wrong[:3])}. Pass the "
                "`named_parameters()` of a model of its architecture. Nothing was loaded."
            )
        with torch.no_grad():
            for name in current.keys() & new.keys():
                current[name].copy_(new[name])

    def _of_text(self, weights: Iterable[tuple[str, Tensor]]) -> Iterable[tuple[str, Tensor]]:
        return text_weights(weights) if self._wraps_theta else weights

    def weight_digest(self, role: str) -> str | None:
        """Return a digest that changes with the weights of the `teacher` or of `theta`.

        Raises:
            RuntimeError: after `close`.
        """
        self._check_open()
        return weight_digest({"teacher": self.teacher, "theta": self.theta}[role])

    def sleep(self) -> None:
        """Move the models that were loaded here, not those that were passed loaded, to the CPU until `wake_up`."""
        self._move(torch.device("cpu"))

    def wake_up(self) -> None:
        """Move the models back to their device."""
        self._move(self.device)

    def _move(self, device: torch.device) -> None:
        self._check_open()
        for model, is_own in ((self.teacher, self._owns_teacher), (self.theta, self._owns_theta)):
            if is_own:
                model.to(device)  # type: ignore[arg-type]

    def close(self) -> None:
        """Release both models. Doing so twice is fine."""
        self.__dict__.pop("teacher", None)
        self.__dict__.pop("theta", None)

    def _check_open(self) -> None:
        if not hasattr(self, "theta"):
            raise RuntimeError("This backend was closed. Build another one.")

    def _check_ready(self) -> None:
        self._check_open()
        for role, model in (("teacher", self.teacher), ("student", self.theta)):
            device = next(model.parameters()).device
            if device.type != self.device.type:
                raise RuntimeError(
                    f"The {role} is on {device}; wanted {self.device}, where this backend samples. Call `wake_up()` "
                    "after `sleep()`, or move the model there before it is passed."
                )


def _own_class(model: nn.Module) -> type | None:
    """Return the class of a loaded model whose code is not transformers' own; None for any other.

    The model inside is looked for: an adapter, or another module around it, hands on what it is given.
    """
    kind = next((type(module) for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    return None if kind is None or kind.__module__.startswith("transformers.") else kind


def _taken(model: type) -> set[str]:
    """Return what a model's `forward` takes by name, or may hand on to that of a base class.

    A `forward` that hands on whatever it is given to a model inside names nothing.
    """
    names: set[str] = set()
    for kind in model.__mro__[: model.__mro__.index(nn.Module)]:
        if "forward" in vars(kind):
            parameters = inspect.signature(vars(kind)["forward"]).parameters
            names |= {name for name, one in parameters.items() if one.kind in NAMED} - {"self"}
            if all(one.kind != inspect.Parameter.VAR_KEYWORD for one in parameters.values()):
                break
    return names


def _check_cache(model: type, config: PreTrainedConfig, role: str) -> None:
    """Refuse a model that a batch of rows cannot be read with token by token.

    That is a purely recurrent one (Mamba), and one that cannot be told where a row's prompt begins behind padding. A
    hybrid, which has a cache of keys and values too, is fine.

    Args:
        model: its class.
        config: its configuration.
        role: what errors call it.

    Raises:
        ValueError: naming the model, its class and what it lacks.
    """
    taken = _taken(model) or {"past_key_values", "position_ids"}
    if "cache_params" in taken or "past_key_values" not in taken or config.model_type in NO_CACHE:
        lacking = "keeps a state instead of a cache, or neither; wanted a decoder with attention, or a hybrid"
    elif config.model_type in STATES_BESIDE:
        lacking = "keeps states beside its cache, which stay where a row leaves it; wanted another decoder"
    elif "position_ids" not in taken and config.model_type not in DISTANCES:
        lacking = "takes no `position_ids` and would count padding as tokens; wanted a decoder that takes them"
    else:
        return
    raise ValueError(f"The {role} {config.name_or_path!r} ({model.__name__}) {lacking}. Pass another pair.")


def _device(device: torch.device | str) -> torch.device:
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (AssertionError, RuntimeError) as error:
        raise ValueError(
            f"The transformers backend: `device` is {str(device)!r}; wanted one that torch has on this machine "
            f"({str(error).splitlines()[0]}). Pass another, or none for a GPU where there is one."
        ) from error
    return found


def _misfits(current: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> list[str]:
    """Say what keeps `new` from replacing `current`. A tied weight may come under any of its names, or all."""
    names: dict[int, list[str]] = {}
    for name, parameter in current.items():
        names.setdefault(id(parameter), []).append(name)
    wrong = [f"{name} is unknown" for name in new if name not in current]
    for tied in names.values():
        given = [name for name in tied if name in new]
        if not given:
            wrong.append(f"{tied[0]} is missing")
        for name in given:
            if new[name].shape != current[name].shape:
                wrong.append(f"{name} has shape {tuple(new[name].shape)}, wanted {tuple(current[name].shape)}")
            elif not (new[name] is new[given[0]] or torch.equal(new[name], new[given[0]].to(new[name]))):
                wrong.append(f"{name} and {given[0]} differ, but the student ties them")
    return wrong


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Switch dropout off, and afterwards on again exactly where it was on."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _check_max_model_len(max_model_len: int | None, longest: int) -> int | None:
    if max_model_len is None:
        return None
    max_model_len = check_whole("The transformers backend", "max_model_len", max_model_len, 2)
    if max_model_len > longest:
        raise ValueError(
            f"`max_model_len` is {max_model_len}; wanted 2 to {longest}, the shorter of the two models' contexts. "
            f"Lower {MAX_MODEL_LEN}, or drop it for the whole context."
        )
    return max_model_len
