"""Settings of `OptimalSamplingV1` and `OptimalSamplingGenerator` as flags and YAML, for TRL's parser."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from ..backends import BACKENDS
from ..generate import OptimalSamplingV1
from ..mixture import FIELDS, FORMS, METHODS, Mixture
from ..pairing.prompts import SYSTEM_MESSAGE
from .generator import OptimalSamplingGenerator

FLAGS = {"method": "alpha_method", "epsilon": "mixture_epsilon", "form": "mixture_form"}
"""The flags of those fields of a mixture whose own names say too little on a command line, or that TRL has."""


@dataclass
class SamplerArguments:
    """Flags of the teacher, the mixture and the engine; see `OptimalSamplingV1` and `Mixture`."""

    teacher: str = field(
        default="",
        metadata={"help": "Folder or model id of the teacher; or 'student', the student itself."},
    )
    alpha_method: str = field(
        default=Mixture.method, metadata={"help": "Equation that alpha solves.", "choices": METHODS}
    )
    alpha_min: float | None = field(
        default=None,
        metadata={
            "help": f"Smallest weight of the teacher; by default {Mixture.alpha_min:g} in a trainer, and in sampling "
            "that of `OptimalSamplingV1`."
        },
    )
    alpha_max: float = field(default=Mixture.alpha_max, metadata={"help": "Largest weight of the teacher."})
    fixed_alpha: float = field(default=Mixture.fixed_alpha, metadata={"help": "alpha of the method 'fixed'."})
    mixture_epsilon: float = field(
        default=Mixture.epsilon,
        metadata={"help": "Budget KL(q||theta) of the method 'trust_region', in nats a token."},
    )
    mixture_form: str = field(
        default=Mixture.form, metadata={"help": "Geometric or arithmetic mean of the two.", "choices": FORMS}
    )
    entropy_scale: float = field(
        default=Mixture.entropy_scale,
        metadata={"help": "Entropy of the student, in nats, from which on alpha of the method 'entropy_gate' is 1."},
    )
    swap_top_k: int = field(
        default=Mixture.swap_top_k,
        metadata={"help": "Likeliest tokens of the teacher among which 'top_k_swap' keeps the student's token."},
    )
    teacher_system_prompt: str | None = field(default=None, metadata={"help": "System prompt of the teacher."})
    theta_system_prompt: str | None = field(default=None, metadata={"help": "System prompt of the student."})
    system_message: str = field(
        default="refuse",
        metadata={
            "help": "What is done with the system message of a prompt that a system prompt is put before: 'refuse' "
            "it, 'replace' it, or 'append' the system prompt to it.",
            "choices": SYSTEM_MESSAGE,
        },
    )
    backend: str = field(
        default="auto", metadata={"help": "Engine; 'auto' is vLLM where it is able.", "choices": BACKENDS}
    )
    engine_arguments: str | None = field(
        default=None, metadata={"help": "Further arguments of the engine, as a JSON object."}
    )

    def engine(self) -> dict[str, Any]:
        """Read the engine's arguments.

        Raises:
            ValueError: where they are no JSON object.
        """
        arguments: Any = self.engine_arguments or {}  # a dict from a YAML file
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except ValueError:
                arguments = None
        if not isinstance(arguments, dict):
            raise ValueError(
                f"`--engine_arguments` is {self.engine_arguments!r}; wanted a JSON object such as "
                "'{\"max_num_seqs\": 64}'."
            )
        return arguments

    def mixture(self) -> dict[str, Any]:
        """Return the fields of the `Mixture`; an `alpha_min` of None is for its reader to choose."""
        return {name: getattr(self, FLAGS.get(name, name)) for name in FIELDS}

    def check_teacher(self) -> str:
        """Return the teacher's name.

        Raises:
            ValueError: where there is none.
        """
        if not self.teacher:
            raise ValueError("`--teacher` is missing; wanted a folder or a model id.")
        return self.teacher

    def sampler(self, theta: str) -> OptimalSamplingV1:
        """Build the sampler that the flags describe.

        Args:
            theta: the student, a folder or a model id.

        Raises:
            ValueError: where no teacher is named, or a setting is out of range.
        """
        mixture = self.mixture()
        return OptimalSamplingV1(
            self.check_teacher(),
            theta,
            alpha_method=mixture.pop("method"),
            **mixture,
            teacher_system_prompt=self.teacher_system_prompt,
            theta_system_prompt=self.theta_system_prompt,
            system_message=self.system_message,
            backend=self.backend,
            **self.engine(),
        )


@dataclass
class GeneratorArguments(SamplerArguments):
    """Flags of a trainer's generator; see `OptimalSamplingGenerator` and `Mixture`."""

    theta_fraction: float | None = field(
        default=None,
        metadata={
            "help": "Share of each group that the student samples alone; by default 0.5 in GRPO and RLOO, else 0."
        },
    )
    schedule: float | None = field(
        default=None, metadata={"help": "Share of training over which the mixture is annealed to the student."}
    )
    mixture_below: float | None = field(
        default=None,
        metadata={
            "help": "Reward that one of the student's own completions reaches, or its group gets rows of the mixture."
        },
    )
    alpha_by_success: float | None = field(
        default=None,
        metadata={
            "help": "Reward that counts as a success: by the share of the student's own completions of a prompt that "
            "reach it the mixture is annealed to the student. With `--alpha_method fixed --fixed_alpha 1` alpha is "
            "1 - that share."
        },
    )
    teacher_refresh: str = field(
        default=OptimalSamplingGenerator.teacher_refresh,
        metadata={
            "help": "Of `--teacher student`: 'step', as new as the student, or 'never', as it was before training."
        },
    )
    teacher_adapter: bool = field(
        default=OptimalSamplingGenerator.teacher_adapter,
        metadata={"help": "Of `--teacher student`: whether it has the student's adapter on as well."},
    )

    entropy_quantile: float | None = field(
        default=None,
        metadata={
            "help": "Quantile of the last batch's entropies that the scale of the method 'entropy_gate' is set to, in "
            "(0, 1); by default the scale is kept."
        },
    )

    def generator(self) -> OptimalSamplingGenerator:
        """Build the generator that the flags describe.

        Raises:
            ValueError: where no teacher is named, or a setting is out of range.
        """
        mixture = self.mixture()
        if self.alpha_min is None:
            del mixture["alpha_min"]
        return OptimalSamplingGenerator(
            teacher=self.check_teacher(),
            mixture=Mixture(**mixture),
            theta_fraction=self.theta_fraction,
            schedule=self.schedule,
            entropy_quantile=self.entropy_quantile,
            teacher_system_prompt=self.teacher_system_prompt,
            theta_system_prompt=self.theta_system_prompt,
            system_message=self.system_message,
            mixture_below=self.mixture_below,
            alpha_by_success=self.alpha_by_success,
            teacher_refresh=self.teacher_refresh,
            teacher_adapter=self.teacher_adapter,
            backend=self.backend,
            engine_arguments=None if self.engine_arguments is None else self.engine(),
        )
