"""The source of a trainer's rollouts, which a user passes as `generator=`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from typing import Any

from transformers import PreTrainedModel

from ..backends import BACKENDS
from ..backends.transformers.backend import ENGINE_OPTIONS
from ..mixture import FIELDS, SWAP, Mixture
from ..options import check_choice, check_flag, check_number, shown, suggest_arguments, unknown_option
from ..pairing import MODEL_OPTIONS, STUDENT, check_system_prompts, is_student, reads_two_prompts
from ..rollouts.dense import Dense, check_dense

ELSEWHERE = {
    "model_teacher": "teacher=",
    "alpha_method": "mixture=Mixture(method=...)",
    **{name: f"mixture=Mixture({name}=...)" for name in FIELDS},
}
"""Words for the teacher and the mixture in other interfaces, and what is to be written here."""
TWO_ROUNDS = ("mixture_below", "alpha_by_success")
"""Settings by which a batch is sampled in two rounds, each a reward."""
REFRESH = ("step", "never")
"""Times at which a teacher that is the student becomes as new as the student."""


@suggest_arguments(**ELSEWHERE)
@dataclass(frozen=True)
class OptimalSamplingGenerator:
    """Rollouts from the mixture of a teacher and the model being trained.

    Args:
        teacher: a folder, a model id, (with the transformers backend) a loaded model, or `"student"`: the model being
            trained is its own teacher, with a prompt of the teacher's own (docs/teacher_prompts.md).
        mixture: rule by which α is chosen.
        theta_fraction: share of each prompt's group that is sampled from the student alone, in [0, 1]; None is 0.5 in
            GRPO and RLOO, whose groups then hold on-policy samples, and 0 in RAFT and distillation.
        mixture_below: a reward: a group gets rows of the mixture only where none of the student's own rows, which are
            sampled and scored first, reaches it, rounding in float32 aside; elsewhere the student samples the others
            as well. None gives rows of the mixture to each group. For GRPO, RLOO and RAFT (docs/teacher_prompts.md).
        alpha_by_success: a reward that counts as a success: the student's own rows of a group are sampled and scored
            first, and by the share of them that reach it, rounding aside, the mixture of the others is annealed to the
            student. With `Mixture("fixed", fixed_alpha=1.0)` their α is 1 − that share. None does not look. For GRPO,
            RLOO and RAFT.
        schedule: share of training, in (0, 1], over which the mixture is annealed to the student (linear in ε and
            alpha_min for `trust_region`, in the range of α otherwise); None keeps it. It follows the trainer's step,
            so a resumed run goes on where it was.
        entropy_quantile: share of the mixture's tokens, in (0, 1), whose entropy lies below the scale of the method
            `entropy_gate`: before each batch the scale is set to that quantile of the last batch's entropies, but not
            below the mixture's `entropy_scale`, which the first batch has. None keeps the scale.
        teacher_system_prompt: put before each prompt for the teacher: as a system message, or as text.
        theta_system_prompt: put before each prompt for the student, in sampling and in training.
        system_message: what is done with the system message of a row that a system prompt is put before: `"refuse"`
            it, `"replace"` it, or `"append"` the system prompt to it.
        backend: `"vllm"`, `"transformers"` (the student is then the module being trained: no copy, nothing to
            synchronise), or `"auto"`: vLLM where it is installed and able.
        engine_arguments: go to the backend, as in `OptimalSamplingV1`.
        dense: dense records that the rollouts carry for each token, beside those that a loss asks for, which reads its
            own alone. With `kl_q_theta`, `kl_q_teacher` or `overlap` among its scalars `mixture/kl_theta`,
            `mixture/kl_teacher` or `mixture/acceptance` is the mean of exact numbers, where it is an estimate
            otherwise.
        teacher_refresh: of the teacher `"student"`: `"step"`, it is always as new as the student, whose weights are in
            memory once, or `"never"`, it stays as the student was before training; a copy of what is trained.
        teacher_adapter: of the teacher `"student"`, whether it has the student's adapter on as well. Off, it is the
            model below the adapter, which is not trained; with transformers it is in memory once.

    Raises:
        ValueError: on a `mixture` or `dense` of another type, a field of the mixture that its method does not read, an
            unknown backend, or a number out of range.

    Example:
        ```python
        OptimalSamplingGenerator("large", Mixture("trust_region", epsilon=0.05), schedule=0.5)
        OptimalSamplingGenerator("large", teacher_system_prompt="Think step by step.", theta_fraction=0.25)
        OptimalSamplingGenerator("student")  # the data set has a column `teacher_prompt`
        ```
    """

    teacher: str | os.PathLike[str] | PreTrainedModel
    mixture: Mixture = field(default_factory=Mixture)
    theta_fraction: float | None = None
    schedule: float | None = None
    teacher_system_prompt: str | None = None
    theta_system_prompt: str | None = None
    backend: str = "auto"
    engine_arguments: dict[str, Any] | None = None
    system_message: str = "refuse"
    dense: Dense | None = None
    teacher_refresh: str = "step"
    teacher_adapter: bool = True
    mixture_below: float | None = None
    entropy_quantile: float | None = None
    alpha_by_success: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.mixture, Mixture):
            raise ValueError(f"`mixture` is {self.mixture!r}; wanted a `Mixture`, for example `Mixture()`.")
        self.mixture.check_read("OptimalSamplingGenerator")
        if self.engine_arguments is not None and not isinstance(self.engine_arguments, Mapping):
            raise ValueError(
                f"`engine_arguments` is {shown(self.engine_arguments)}; wanted a dictionary, for example "
                "{'max_num_seqs': 64}."
            )
        check_system_prompts(self)
        check_dense("OptimalSamplingGenerator", self.dense)
        if self.theta_fraction is not None:
            check_number("OptimalSamplingGenerator", "theta_fraction", self.theta_fraction, 0.0, 1.0)
        self._check_two_rounds()
        if self.schedule is not None:
            share = "Pass a share of training, or None to keep the mixture."
            check_number("OptimalSamplingGenerator", "schedule", self.schedule, high=1.0, above=0.0, advice=share)
        for name in ("schedule", "alpha_by_success"):
            if getattr(self, name) is not None and self.mixture.method == SWAP:
                raise ValueError(
                    f"`{name}` is {getattr(self, name)} with the method {SWAP!r}, whose α has no range to shrink; "
                    f"wanted None, or another method. Drop `{name}`."
                )
        if self.entropy_quantile is not None:
            self._check_entropy_quantile()
        if self.backend not in BACKENDS:
            raise ValueError(unknown_option("backend", self.backend, BACKENDS))
        self._check_own_teacher()

    def _check_two_rounds(self) -> None:
        for name in TWO_ROUNDS:
            if getattr(self, name) is not None:
                check_number("OptimalSamplingGenerator", name, getattr(self, name), float("-inf"))
        if self.alpha_by_success is not None and self.mixture_below is not None:
            raise ValueError(
                f"`alpha_by_success` is {self.alpha_by_success} and `mixture_below` {self.mixture_below}, with which "
                "the mixture has rows only where the student had no success, so that there is nothing to anneal by. "
                "Drop one of the two."
            )
        if self.alpha_by_success is not None and self.entropy_quantile is not None:
            raise ValueError(
                f"`alpha_by_success` is {self.alpha_by_success} and `entropy_quantile` {self.entropy_quantile}, which "
                "reads the entropies from an α that nothing else lowers. Drop one of the two."
            )

    def _check_own_teacher(self) -> None:
        check_choice("teacher_refresh", self.teacher_refresh, REFRESH)
        check_flag("OptimalSamplingGenerator", "teacher_adapter", self.teacher_adapter)
        given = {"teacher_refresh": self.teacher_refresh != "step", "teacher_adapter": not self.teacher_adapter}
        set_ones = [f"`{name}` is {getattr(self, name)!r}" for name, is_set in given.items() if is_set]
        if not self.is_own_teacher:
            if set_ones:
                raise ValueError(f"{set_ones[0]}, which is read of `teacher='student'` alone. Drop it.")
            return
        if len(set_ones) == 2:
            raise ValueError(
                f"{' and '.join(set_ones)}: the model below the adapter never changes; wanted one of the two. Drop "
                "`teacher_refresh`."
            )
        is_student(self.teacher)  # refuses a folder of that name
        for name in MODEL_OPTIONS if self.backend == "transformers" else ("revision",):
            if name in (self.engine_arguments or {}):
                raise ValueError(
                    f"`engine_arguments` has `{name}`, which says how a teacher is loaded, and `teacher` is "
                    "'student', which is loaded already. Drop it."
                )

    @property
    def two_rounds(self) -> bool:
        """True where the student's own rows are sampled and scored first."""
        return any(getattr(self, name) is not None for name in TWO_ROUNDS)

    def two_rounds_setting(self) -> str:
        """Return words for the setting by which there are two rounds, for an error."""
        return next(f"`{name}` is {getattr(self, name)}" for name in TWO_ROUNDS if getattr(self, name) is not None)

    @property
    def is_own_teacher(self) -> bool:
        """True where the model being trained is its own teacher."""
        return isinstance(self.teacher, str) and self.teacher == STUDENT

    @property
    def is_the_student(self) -> bool:
        """True where the teacher differs from the student only in its prompt."""
        return self.is_own_teacher and self.teacher_refresh == "step" and self.teacher_adapter

    @property
    def is_frozen_student(self) -> bool:
        """True where the teacher is the student as it was at the start, or below its adapter."""
        return self.is_own_teacher and not self.is_the_student

    def _check_entropy_quantile(self) -> None:
        """Refuse a quantile that nothing reads, or that α could not tell."""
        owner, share = "OptimalSamplingGenerator", "Pass a share of the tokens, or None to keep the scale."
        check_number(owner, "entropy_quantile", self.entropy_quantile, above=0.0, below=1.0, advice=share)
        gate = self.mixture
        if gate.method != "entropy_gate" or (gate.alpha_min, gate.alpha_max) != (0, 1) or self.schedule is not None:
            raise ValueError(
                f"`entropy_quantile` is {self.entropy_quantile} with {gate} and `schedule` {self.schedule}; "
                "wanted the method 'entropy_gate' with α in [0, 1] and no schedule, since the entropies are read from "
                "α. Drop `entropy_quantile`, or the others."
            )

    @property
    def named_teacher(self) -> str | PreTrainedModel:
        """The teacher as TRL and vLLM take it, a path as text."""
        return os.fspath(self.teacher) if isinstance(self.teacher, os.PathLike) else self.teacher

    @property
    def two_prompts(self) -> bool:
        """True where the teacher and the student read different prompts."""
        return reads_two_prompts(self.teacher_system_prompt, self.theta_system_prompt)

    def theta_count(self, group: int, default: float) -> int:
        """Return the number of a group's completions that the student samples alone.

        Args:
            group: number of completions in the group.
            default: share that counts where `theta_fraction` is None.

        Raises:
            ValueError: where a share strictly between 0 and 1 rounds to none or all of the group.
        """
        fraction = default if self.theta_fraction is None else self.theta_fraction
        count = int(fraction * group + 0.5)
        if 0 < fraction < 1 and count in (0, group):
            raise ValueError(
                f"`theta_fraction` is {fraction} of a group of {group}, which rounds to {count}; wanted at least one "
                "completion of each kind. Raise the group (`num_generations`; where a prompt has one completion, a "
                "process's batch), or set `theta_fraction` to 0 or 1."
            )
        return count

    def current_mixture(self, progress: float, entropy_scale: float | None = None) -> Mixture:
        """Return the mixture at a share of training in [0, 1], with the last scale of the entropy gate."""
        if entropy_scale is not None:
            return replace(self.mixture, entropy_scale=entropy_scale)
        return self.mixture if self.schedule is None else self.mixture.anneal(min(progress / self.schedule, 1.0))

    def check_engine_arguments(self) -> None:
        """Refuse engine arguments that the backend does not know, before a model or an engine is loaded.

        Raises:
            ValueError: naming the argument and the nearest known one.
        """
        arguments = dict(self.engine_arguments or {})
        unknown = [name for name in arguments if name not in ENGINE_OPTIONS]
        if self.backend == "vllm" or (self.backend == "auto" and unknown and find_spec("vllm") is not None):
            if find_spec("vllm") is not None:  # its absence is told by the choice of the engine
                from ..backends.vllm.limits import check_arguments

                check_arguments(arguments)
        elif unknown:
            raise ValueError(unknown_option("argument of the transformers backend", unknown[0], ENGINE_OPTIONS))


FOR_TRAINERS = dict.fromkeys(
    ("teacher", "teacher_model", "model_teacher"), "generator=OptimalSamplingGenerator(teacher=...)"
)
"""Words by which a trainer might be given its teacher, and what is to be written."""


class GeneratorError(TypeError, ValueError):
    """A trainer got no `OptimalSamplingGenerator`: a TypeError as for any missing argument, a ValueError as for any
    refusal of this package."""


def check_generator(generator: object) -> OptimalSamplingGenerator:
    """Return a trainer's generator.

    Raises:
        GeneratorError: on anything else, such as a forgotten one, a teacher's name or a mixture.
    """
    if isinstance(generator, OptimalSamplingGenerator):
        return generator
    example = "OptimalSamplingGenerator(teacher=...)"
    if isinstance(generator, str | os.PathLike):
        example = f"OptimalSamplingGenerator(teacher={os.fspath(generator)!r})"
    elif isinstance(generator, Mixture):
        example = "OptimalSamplingGenerator(teacher=..., mixture=...)"
    raise GeneratorError(
        f"`generator` is {shown(generator)}; wanted an `{example}`, from which the trainer samples. "
        "Pass one, or use TRL's own trainer for rollouts from the model alone."
    )
