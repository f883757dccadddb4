"""A command in several processes: accelerate's flags are told from the command's, and profiles found by name."""

from __future__ import annotations

from typing import Any

import pytest

from optimal_sampling_trl.cli import launch as launching
from optimal_sampling_trl.cli.launch import PROFILE, launch, launch_words, profiles
from optimal_sampling_trl.cli.training import Job

JOB = Job("grpo", "GRPO", "")


def test_a_profile_has_a_name() -> None:
    """TRL's own, which `recipes/accelerate` explains."""
    assert {"fsdp2", "multi_gpu", "zero3"} <= set(profiles())
    first, path, *rest = launch_words(JOB.parser(), ["--num_processes", "2", PROFILE, "fsdp2"])
    assert (first, rest) == ("--config_file", ["--num_processes", "2"])
    assert path.endswith("trl/accelerate_configs/fsdp2.yaml")
    file = "recipes/accelerate/ddp.yaml"
    for words in ([PROFILE, file], [f"{PROFILE}={file}"]):
        assert launch_words(JOB.parser(), words) == ["--config_file", file]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([PROFILE, "fsdp3"], "'fsdp3'. Known: fsdp1, fsdp2"),
        ([PROFILE], "Known: fsdp1, fsdp2"),
        (["--num_proceses", "2"], "Unknown flag '--num_proceses'. Did you mean '--num_processes'?"),
        (["run.yaml"], "'run.yaml' follows no flag that takes it"),  # accelerate took it for its script
        (["--num_processes", "2", "run.yaml"], "'run.yaml' follows no flag"),
        (["--alpha_methd", "x"], "Unknown flag '--alpha_methd'. Did you mean '--alpha_method'?"),
    ],
)
def test_what_neither_knows_is_refused(words: list[str], told: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011
        launch_words(JOB.parser(), words)
    assert told in str(error.value)


def test_accelerate_gets_its_flags_and_the_module_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Any] = []
    monkeypatch.setattr(launching, "launch_command", started.append)
    words = ["--teacher", "t", "--num_processes", "2", "--max_steps", "2"]
    JOB.run(words)
    (asked,) = started
    assert (asked.num_processes, asked.module) == (2, True)
    assert asked.training_script == "optimal_sampling_trl.cli.commands.grpo"
    assert asked.training_script_args == ["--teacher", "t", "--max_steps", "2"]
    launch("some.module", [], ["--a"])
    assert started[-1].training_script_args == ["--a"]
