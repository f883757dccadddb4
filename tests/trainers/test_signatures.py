"""The trainers' arguments are TRL's, by name, type and default, and `generator`; a wrong generator is told once, in
words, before anything is loaded."""

from __future__ import annotations

import importlib
import inspect
import sys
import typing
from pathlib import Path
from typing import Any

import pytest
import transformers
import trl
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from trl.trainer import grpo_trainer, rloo_trainer

from helpers.training import KINDS, make_trainer, reward
from optimal_sampling_trl import (
    DistillationTrainer,
    GRPOConfig,
    GRPOTrainer,
    Mixture,
    OptimalSamplingGenerator,
    RAFTTrainer,
    RLOOTrainer,
)

PAIRS = {
    "GRPO": (GRPOTrainer, trl.GRPOTrainer),
    "RLOO": (RLOOTrainer, trl.RLOOTrainer),
    "Distillation": (DistillationTrainer, trl.DistillationTrainer),
    "RAFT": (RAFTTrainer, trl.GRPOTrainer),
}
"""Each of our trainers, and the one of TRL whose arguments it takes."""


def types(trainer: type, upstream: type) -> dict[str, Any]:
    """The types of a trainer's arguments; peft, which is not always installed, has a stand-in."""
    names = {
        **{name: getattr(transformers, name) for name in transformers.__all__ if name in WANTED},
        **{each.__name__: each for each in (Dataset, DatasetDict, IterableDataset, IterableDatasetDict)},
        **{name: getattr(grpo_trainer, name) for name in ("RewardFunc", "RolloutFunc", "EnvironmentFactory")},
        "OptimalSamplingGenerator": OptimalSamplingGenerator,
        "torch": sys.modules["torch"],
        "PeftModel": Path,
        "PeftConfig": str,
        "GRPOTrainer": trl.GRPOTrainer,
    }
    modules = [vars(importlib.import_module(each.__module__)) for each in (upstream, trainer)]
    return typing.get_type_hints(trainer.__init__, globalns=modules[0] | modules[1] | names)  # type: ignore[misc]


WANTED = ("BitsAndBytesConfig", "PreTrainedModel", "PreTrainedTokenizerBase", "ProcessorMixin", "TrainerCallback")


@pytest.mark.parametrize("name", PAIRS)
def test_the_arguments_are_trls_and_the_generator(name: str) -> None:
    ours, upstream = PAIRS[name]
    taken, wanted = (dict(inspect.signature(each).parameters) for each in (ours, upstream))
    generator = taken.pop("generator")
    assert (generator.kind, generator.default) == (inspect.Parameter.KEYWORD_ONLY, None)
    advice = f"TRL {trl.__version__}: write them into the `__init__` of our {name}Trainer and hand them on"
    assert list(taken) == list(wanted), f"{name}Trainer of TRL takes {list(wanted)}, ours {list(taken)}. {advice}"
    hints, wanted_hints = types(ours, upstream), types(upstream, upstream)
    for each in wanted:
        assert taken[each].kind == wanted[each].kind, f"{name}Trainer: `{each}`. {advice}"
        assert taken[each].default == wanted[each].default, f"{name}Trainer: default of `{each}`. {advice}"
        assert hints[each] == wanted_hints[each], f"{name}Trainer: type of `{each}` is {wanted_hints[each]}. {advice}"


class ReachedError(Exception):
    """TRL's `__init__` has been called."""


@pytest.mark.parametrize("name", PAIRS)
def test_every_argument_reaches_trl(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A value in each place, by name: TRL's `__init__` gets the same, and a `rollout_func` that calls the user's."""
    ours, upstream = PAIRS[name]
    got: dict[str, Any] = {}

    def stop(self: Any, **arguments: Any) -> None:
        got.update(arguments)
        raise ReachedError

    monkeypatch.setattr(upstream, "__init__", stop)
    given: dict[str, Any] = {each: object() for each in inspect.signature(ours).parameters}
    given |= {"args": None, "generator": OptimalSamplingGenerator("t", backend="transformers"), "model": "folder/name"}
    if name == "Distillation":
        given["teacher_model"] = "t"
    else:
        given["reward_funcs"] = reward
    monkeypatch.setattr(ours, "config_class", ForCPU.of(ours))
    with pytest.raises(ReachedError):
        ours(**given)
    assert got.pop("args").output_dir == f"name-{name}"
    if "rollout_func" in given:
        assert callable(got.pop("rollout_func"))
    assert got == {each: value for each, value in given.items() if each not in ("args", "generator", "rollout_func")}


class ForCPU:
    """A configuration as the trainer makes it without one, on a machine without a GPU."""

    @staticmethod
    def of(trainer: Any) -> Any:
        config = trainer.config_class
        return staticmethod(lambda folder: config(folder, use_cpu=True, bf16=False))


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, r"^`generator` is None; wanted an `OptimalSamplingGenerator\(teacher=\.\.\.\)`, .* TRL's own trainer "),
        ({"generator": None}, r"^`generator` is None; wanted an `OptimalSamplingGenerator\(teacher=\.\.\.\)`, "),
        (
            {"generator": "large"},
            r"^`generator` is 'large'; wanted an `OptimalSamplingGenerator\(teacher='large'\)`, ",
        ),
        ({"generator": Path("large")}, r"wanted an `OptimalSamplingGenerator\(teacher='large'\)`, from which"),
        (
            {"generator": Mixture()},
            r"is Mixture\(.*wanted an `OptimalSamplingGenerator\(teacher=\.\.\., mixture=\.\.\.\)`",
        ),
        ({"generator": 5}, r"^`generator` is 5; wanted an `OptimalSamplingGenerator"),
    ],
    ids=["forgotten", "None", "name", "path", "mixture", "number"],
)
def test_a_wrong_generator_has_one_message(name: str, given: dict[str, Any], message: str) -> None:
    """Before TRL looks for the model, which does not exist."""
    second = [] if name == "Distillation" else [reward]
    for kind in (ValueError, TypeError):
        with pytest.raises(kind, match=message) as error:
            PAIRS[name][0]("no-such-model", *second, **given)
        assert "Mixin" not in str(error.value)


@pytest.mark.parametrize("name", PAIRS)
def test_a_misspelt_argument_names_the_trainer(name: str) -> None:
    trainer: Any = PAIRS[name][0]
    with pytest.raises(TypeError, match=rf"argument of {name}Trainer 'generater'\. .*Did you mean 'generator'\?"):
        trainer("no-such-model", generater=OptimalSamplingGenerator("t"))
    with pytest.raises(TypeError, match=rf"{name}Trainer has no `teacher=`\. Write `generator=OptimalSampling"):
        trainer("no-such-model", teacher="t")


def test_a_word_for_the_mixture_says_where_it_goes() -> None:
    with pytest.raises(TypeError, match=r"has no `alpha_min=`\. Write `mixture=Mixture\(alpha_min=\.\.\.\)`"):
        OptimalSamplingGenerator("t", alpha_min=0.5)  # type: ignore[call-arg]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            {"generator": {"engine_arguments": {"max_num_seq": 4}}},
            "Unknown argument of the transformers backend 'max_num_seq'.*Did you mean 'max_num_seqs'",
        ),
        ({"generator": {"theta_fraction": 0.01}}, "`theta_fraction` is 0.01 of a group of"),
        ({"generation_kwargs": {"top_kk": 1}}, "Unknown entry of `generation_kwargs` 'top_kk'.*Did you mean 'top_k'"),
    ],
    ids=["engine", "share", "generation"],
)
def test_a_typo_is_answered_before_a_model_is_looked_for(
    kind: str, build: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        make_trainer(kind, ("no-such-teacher", "no-such-student"), tmp_path, **build)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "raft"])
def test_a_typo_of_a_correction_is_answered_before_a_model_is_looked_for(kind: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Unknown correction 'token_trunc'.*Did you mean 'token_truncate'"):
        make_trainer(kind, ("no-such-teacher", "no-such-student"), tmp_path, correction="token_trunc")


def test_a_typo_of_an_argument_of_vllm_is_answered_before_a_model_is_looked_for(tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    for backend in ("vllm", "auto"):
        generator = {"backend": backend, "engine_arguments": {"max_num_batched_token": 64}}
        with pytest.raises(ValueError, match=r"'max_num_batched_token'.*Did you mean 'max_num_batched_tokens'"):
            make_trainer("grpo", ("no-such-teacher", "no-such-student"), tmp_path, generator=generator)


def test_engine_arguments_are_a_dictionary() -> None:
    with pytest.raises(ValueError, match=r"`engine_arguments` is \['max_num_seqs'\]; wanted a dictionary"):
        OptimalSamplingGenerator("t", engine_arguments=["max_num_seqs"])  # type: ignore[arg-type]


def test_the_aliases_of_trl_are_one() -> None:
    assert rloo_trainer.RewardFunc == grpo_trainer.RewardFunc
    assert issubclass(GRPOConfig, trl.GRPOConfig)
