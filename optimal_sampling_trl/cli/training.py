"""The commands that train: model and rewards that the flags name, and the run from start to end."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from transformers.trainer import TRAINER_STATE_NAME
from trl import ModelConfig, ScriptArguments, get_peft_config, get_quantization_config

from .. import trainers
from ..options import unknown_option
from ..trainers import GeneratorArguments
from .data import load_data
from .launch import launch, launch_flags, launch_words, needs_launch
from .parser import Parser
from .refusals import refusals
from .unread import warn_of_unread_flags


@dataclass
class RewardArguments(ScriptArguments):
    """TRL's script arguments with the rewards."""

    reward_funcs: list[str] = field(
        default_factory=list,
        metadata={"help": "Reward functions, each as an import path such as 'trl.rewards.accuracy_reward'."},
    )

    def rewards(self) -> list[Any]:
        """Return the functions that the paths name; the working directory is searched too.

        Raises:
            ValueError: where there is none, or a path names no function.
        """
        if not self.reward_funcs:
            raise ValueError("`--reward_funcs` is missing; wanted an import path such as trl.rewards.accuracy_reward.")
        for path in self.reward_funcs:
            if "." not in path.strip("."):
                raise ValueError(f"`--reward_funcs` has {path!r}; wanted an import path such as my_module.{path}.")
        sys.path.insert(0, os.getcwd())
        return [find_function(path) for path in self.reward_funcs]


def find_function(path: str) -> Any:
    """Return the function that an import path names; what a module lacks that it imports itself is Python's error.

    Raises:
        ValueError: where there is no such module or function.
    """
    place, _, name = path.rpartition(".")
    try:
        module = import_module(place)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{place}.".startswith(f"{error.name}."):
            raise
        raise ValueError(
            f"`--reward_funcs` has {path!r}, and there is no module {error.name!r}. Install it, or start the command "
            "in the folder of its file: `right` in my_rewards.py is my_rewards.right."
        ) from error
    found = getattr(module, name, None)
    if not callable(found):
        known = [each for each in dir(module) if each[0] != "_" and _is_reward(getattr(module, each))]
        wanted = "Wanted a function of `completions` and `**kwargs`."
        raise ValueError(f"`--reward_funcs`: {unknown_option(f'function of {place}', name, known, wanted)}")
    return found


def _is_reward(found: Any) -> bool:
    """Tell whether what a module holds is a reward: a function of `completions` and of all else that TRL passes."""
    if not inspect.isfunction(found):
        return False
    parameters = inspect.signature(found).parameters
    return "completions" in parameters and any(one.kind == one.VAR_KEYWORD for one in parameters.values())


def load_options(model: ModelConfig, training: Any) -> dict[str, Any]:
    """Load `model`, `quantization_config`, `peft_config` of a trainer; the model's other flags go into `training`."""
    training.model_init_kwargs = {
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        **(training.model_init_kwargs or {}),
    }
    return {
        "model": model.model_name_or_path,
        "quantization_config": get_quantization_config(model),
        "peft_config": get_peft_config(model),
    }


def checkpoint(given: str | bool | None, output_dir: str) -> str | bool | None:
    """Return what a trainer takes for the flag `--resume_from_checkpoint`: TRL's parser reads `True` as a text.

    Args:
        given: the flag's value: a checkpoint's folder, or true for the last one.
        output_dir: the folder of the run, which holds its checkpoints.

    Raises:
        ValueError: where there is no such checkpoint, naming those of the run.
    """
    if given is None or given is False:
        return given
    known = sorted(str(path.parent) for path in Path(output_dir).glob(f"checkpoint-*/{TRAINER_STATE_NAME}"))
    is_last = given in (True, "True", "true")
    if not (known if is_last else (Path(str(given)) / TRAINER_STATE_NAME).is_file()):
        raise ValueError(
            f"`--resume_from_checkpoint` is {given!r}, and no checkpoint is there; wanted true, for the last one, or "
            f"the folder of one. {output_dir!r} has {', '.join(known) or 'none'}. Name one, or drop the flag."
        )
    return True if is_last else given


def run(trainer: Any, resume: str | bool | None) -> None:
    """Train, resume where asked to, evaluate where there is data, and save.

    Args:
        trainer: a trainer of this package.
        resume: what `checkpoint` returned.
    """
    trainer.train(resume_from_checkpoint=resume)
    if trainer.eval_dataset is not None:
        trainer.log_metrics("eval", trainer.evaluate())
    trainer.save_model(trainer.args.output_dir)
    processes = trainer.accelerator.num_processes
    trainer.accelerator.print(f"The model is in {trainer.args.output_dir}, trained by {processes} process(es).")
    trainer.close()  # while the engine's groups of processes exist, which `end_training` ends
    trainer.accelerator.end_training()


@dataclass(frozen=True)
class Job:
    """A trainer as a command.

    Args:
        name: the command's name, and its module's.
        method: the trainer's name without its end, such as `GRPO` of `GRPOTrainer` and `GRPOConfig`.
        description: what the help says.
        rewarded: True where the trainer takes reward functions.
    """

    name: str
    method: str
    description: str
    rewarded: bool = True

    def parser(self) -> Parser:
        """Return the command's flags: the generator's first, then data, model and training."""
        config = getattr(trainers, f"{self.method}Config")
        script = RewardArguments if self.rewarded else ScriptArguments
        kinds = (GeneratorArguments, script, ModelConfig, config)
        return Parser(kinds, f"optimal-sampling {self.name}", self.description)

    def run(self, words: Sequence[str]) -> None:
        """Train in this process, or in those that accelerate is asked to start.

        Args:
            words: the command line after the command: this package's, TRL's and accelerate's flags.
        """
        parser = self.parser()
        of_file, of_line = parser.unread(words)
        launcher = launch_words(parser, [*of_file, *of_line])
        if not launcher and not needs_launch():
            return self._train(words)
        launch(f"{__package__}.commands.{self.name}", launcher, _without(words, of_line))

    def train(self, words: Sequence[str] | None = None) -> None:
        """Train as a script does, which accelerate or torchrun may have started several times; a refusal ends it.

        Args:
            words: the command line; by default this process's.
        """
        with refusals(f"optimal-sampling {self.name}"):
            self._train(sys.argv[1:] if words is None else words)

    def _train(self, words: Sequence[str]) -> None:
        parser = self.parser()
        further = {flag.removeprefix("--") for flag in launch_flags()}
        sampling, script, model, training = parser.read(words, further)
        with parser.refusing():
            generator = sampling.generator()
            resume = checkpoint(training.resume_from_checkpoint, training.output_dir)
            rewards = {"reward_funcs": script.rewards()} if self.rewarded else {}
            data = load_data(script, evaluate=training.eval_strategy != "no")
        warn_of_unread_flags(parser.named, script, model, evaluates=data["eval_dataset"] is not None)
        trainer = getattr(trainers, f"{self.method}Trainer")(
            generator=generator, args=training, **rewards, **load_options(model, training), **data
        )
        run(trainer, resume)


def _without(words: Sequence[str], taken: Sequence[str]) -> list[str]:
    """Return the words that are left after `taken`, which stand among them in this order."""
    waiting = list(taken)
    kept = []
    for word in words:
        if waiting and word == waiting[0]:
            waiting.pop(0)
        else:
            kept.append(word)
    return kept
