"""Flags describe the same generator and sampler as the classes do, with the same defaults."""

from __future__ import annotations

from pathlib import Path

import pytest
from trl import TrlParser

from helpers.models import make_model
from optimal_sampling_trl import Mixture, OptimalSamplingGenerator, OptimalSamplingV1
from optimal_sampling_trl.trainers import GeneratorArguments, SamplerArguments


def test_without_flags_the_generator_is_the_default() -> None:
    (flags,) = TrlParser((GeneratorArguments,)).parse_args_and_config(["--teacher", "large"])
    assert flags.generator() == OptimalSamplingGenerator("large")


@pytest.mark.parametrize("method", ["kl_symmetry", "trust_region", "top_k_swap"])
def test_without_flags_the_sampler_is_the_default(tmp_path: Path, method: str) -> None:
    """One mixture under one name: the same call samples the same from Python and from `recipes/sample.py`."""
    for seed, name in enumerate(("large", "small")):
        make_model(tmp_path / name, "llama", seed)
    flags = ["--teacher", str(tmp_path / "large"), "--backend", "transformers", "--alpha_method", method]
    (arguments,) = TrlParser((SamplerArguments,)).parse_args_and_config(flags)
    pair = str(tmp_path / "large"), str(tmp_path / "small")
    with (
        arguments.sampler(pair[1]) as by_flags,
        OptimalSamplingV1(*pair, alpha_method=method, backend="transformers") as by_hand,
    ):
        assert by_flags.mixture == by_hand.mixture


def test_each_flag_of_the_mixture_reaches_its_field(pair: tuple[str, str]) -> None:
    line = (
        "--alpha_method trust_region --alpha_min 0.1 --alpha_max 0.9 --mixture_epsilon 0.2 --mixture_form arithmetic"
    )
    wanted = Mixture("trust_region", alpha_min=0.1, alpha_max=0.9, epsilon=0.2, form="arithmetic")
    words = f"--teacher {pair[0]} --backend transformers {line}".split()
    (arguments,) = TrlParser((GeneratorArguments,)).parse_args_and_config(words)
    assert arguments.generator().mixture == wanted
    with arguments.sampler(pair[1]) as sampler:
        assert sampler.mixture == wanted


@pytest.mark.parametrize(
    ("flag", "told"),
    [
        ("--fixed_alpha 0.2", "`fixed_alpha` is 0.2, and the method 'kl_symmetry' does not read it; wanted it with"),
        ("--mixture_epsilon 0.2", "`epsilon` is 0.2, and the method"),
        ("--entropy_scale 2", "`entropy_scale` is 2.0, and the method"),
        ("--swap_top_k 3", "wanted it with 'top_k_swap'. Drop it, or choose that method."),
    ],
)
def test_a_flag_that_the_method_does_not_read_is_refused(flag: str, told: str) -> None:
    """Before a model is looked for."""
    words = f"--teacher no_model --backend transformers {flag}".split()
    (arguments,) = TrlParser((GeneratorArguments,)).parse_args_and_config(words)
    for owner, build in (("Generator", arguments.generator), ("V1", lambda: arguments.sampler("no_model"))):
        with pytest.raises(ValueError, match=f"^OptimalSampling{owner}: ") as error:
            build()
        assert told in str(error.value)


def test_flags_of_a_teacher_that_is_the_student() -> None:
    flags = ("--teacher student --teacher_refresh never", "--teacher student --teacher_adapter False")
    wanted = ({"teacher_refresh": "never"}, {"teacher_adapter": False})
    for line, settings in zip(flags, wanted, strict=True):
        (arguments,) = TrlParser((GeneratorArguments,)).parse_args_and_config(line.split())
        assert arguments.generator() == OptimalSamplingGenerator("student", **settings)  # type: ignore[arg-type]


def test_flags_of_two_rounds() -> None:
    for name in ("mixture_below", "alpha_by_success"):
        flags = f"--teacher large --{name} 0.5"
        (arguments,) = TrlParser((GeneratorArguments,)).parse_args_and_config(flags.split())
        assert arguments.generator() == OptimalSamplingGenerator("large", **{name: 0.5})  # type: ignore[arg-type]


def test_flags_reach_the_mixture() -> None:
    flags = (
        "--teacher large --alpha_method fixed --alpha_min 0.2 --alpha_max 0.7 --fixed_alpha 0.3 --theta_fraction 0.25 "
        "--mixture_form arithmetic"
    )
    gate = "--teacher large --alpha_method entropy_gate --entropy_scale 1.5 --entropy_quantile 0.9"
    (opened,) = TrlParser((GeneratorArguments,)).parse_args_and_config(gate.split())
    assert opened.generator() == OptimalSamplingGenerator(
        "large", Mixture("entropy_gate", entropy_scale=1.5), entropy_quantile=0.9
    )
    swap = "--teacher large --alpha_method top_k_swap --swap_top_k 7"
    (swapped,) = TrlParser((GeneratorArguments,)).parse_args_and_config(swap.split())
    assert swapped.generator() == OptimalSamplingGenerator("large", Mixture("top_k_swap", swap_top_k=7))
    (arguments,) = TrlParser((GeneratorArguments,)).parse_args_and_config(flags.split())
    wanted = OptimalSamplingGenerator("large", Mixture("fixed", 0.2, 0.7, 0.3, form="arithmetic"), theta_fraction=0.25)
    assert arguments.generator() == wanted
