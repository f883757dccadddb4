"""The parser of the commands: groups, choices, and one line with the nearest name for what it does not know."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from trl import ModelConfig, ScriptArguments

from optimal_sampling_trl.cli.parser import Parser
from optimal_sampling_trl.cli.training import RewardArguments
from optimal_sampling_trl.trainers import GeneratorArguments, GRPOConfig

KINDS = (GeneratorArguments, ScriptArguments, GRPOConfig)
CPU = ("--use_cpu", "--bf16", "False", "--report_to", "none")


def parser() -> Parser:
    return Parser(KINDS, "optimal-sampling test", "Tests the parser.")


def refused(words: Sequence[object]) -> str:
    """The one line with which a command line is refused."""
    with pytest.raises(ValueError) as error:  # noqa: PT011
        parser().read([str(word) for word in words])
    told = str(error.value)
    assert "\n" not in told
    return told


def test_flags_and_the_file_become_the_dataclasses(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(f"teacher: large\nlearning_rate: 1.0e-3\noutput_dir: {tmp_path}\nnum_processes: 2\n")
    words = ["--config", str(config), "--alpha-method", "entropy", "--dataset_name", "data", *CPU]
    sampling, script, training = parser().read(words, ["num_processes"])
    assert (sampling.teacher, sampling.alpha_method, script.dataset_name) == ("large", "entropy", "data")
    assert (training.learning_rate, training.use_cpu) == (1e-3, True)
    for given in (words, [f"--config={config}", *words[2:]]):
        assert parser().unread([*given, "--num_machines", "1"]) == (["--num_processes", "2"], ["--num_machines", "1"])
        assert parser().read(given, ["num_processes"])[0].teacher == "large"


def test_what_is_misspelt_is_told_the_nearest(tmp_path: Path) -> None:
    told = refused(["--alpha_methd", "entropy", *CPU])
    assert "Unknown flag '--alpha_methd'. Did you mean '--alpha_method'?" in told
    told = refused(["--alpha_method", "entropi", *CPU])
    assert "Unknown value 'entropi'. Known: " in told
    assert "Did you mean 'entropy'?" in told
    config = tmp_path / "config.yaml"
    config.write_text("alpha_method: entropi\n")
    told = refused(["--config", config, *CPU])
    assert "Unknown value of `alpha_method` 'entropi'. " in told
    config.write_text("learning_rte: 1\n")
    assert "Did you mean '--learning_rate'?" in refused(["--config", config, *CPU])
    assert "nowhere.yaml" in refused(["--config", tmp_path / "nowhere.yaml", *CPU])
    assert "Did you mean '--dataset_name'?" in refused(["--dataset", "data", *CPU])
    told = refused(["--student", "small", *CPU])
    assert "--model_name_or_path" not in told  # where the command has no such flag
    told = refused(["--qqqq", "1", *CPU])
    assert "Unknown flag '--qqqq'. None of the " in told
    assert "`optimal-sampling test --help` lists them." in told


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["recipes/raft.yaml", *CPU], "'recipes/raft.yaml' follows no flag that takes it; wanted each value behind"),
        (["--num_generations", "4", "8", *CPU], "'8' follows no flag that takes it"),
        (["-config", "recipes/raft.yaml", *CPU], "Unknown flag '-config'. Did you mean '--config"),
        ([*CPU, "--config"], "`--config` stands at the end; wanted the path of a YAML file behind it"),
    ],
)
def test_a_word_that_no_flag_takes_is_refused(words: list[str], told: str) -> None:
    assert told in refused(words)


@pytest.mark.parametrize(("text", "held"), [("", "nothing"), ("- teacher\n", "a list"), ("large\n", "a str")])
def test_a_file_of_no_flags_is_refused(text: str, held: str, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(text)
    told = refused(["--config", config, *CPU])
    assert f"config.yaml', which holds {held}; wanted a flag without its dashes on each line" in told


@pytest.mark.parametrize("word", ["--student", "--theta", "--model"])
def test_words_for_the_student_lead_to_trls_flag(word: str) -> None:
    with pytest.raises(ValueError, match=rf"Unknown flag '{word}'\. Did you mean '--model_name_or_path'\?"):
        Parser((ModelConfig,), "optimal-sampling test", "").read([word, "small"])


def test_one_value_in_a_file_is_a_list_of_one(tmp_path: Path) -> None:
    """A text was read as the list of its letters. TRL's adapters take `all-linear` alone, without a list."""
    config = tmp_path / "config.yaml"
    config.write_text(f"reward_funcs: rewards.right\nlora_target_modules: all-linear\noutput_dir: {tmp_path}\n")
    kinds = (RewardArguments, ModelConfig, GRPOConfig)
    script, model, _ = Parser(kinds, "optimal-sampling test", "").read([f"--config={config}", *CPU])
    assert (script.reward_funcs, model.lora_target_modules) == (["rewards.right"], "all-linear")


def test_a_number_in_a_file_is_a_list_of_one_where_numbers_are_meant(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(f"reward_weights: 0.5\noutput_dir: {tmp_path}\n")
    (training,) = Parser((GRPOConfig,), "optimal-sampling test", "").read([f"--config={config}", *CPU])
    assert training.reward_weights == [0.5]


@pytest.mark.parametrize(("value", "held"), [("7", "7"), ("no", "False"), ("[a, 8]", "8"), ("{a: b}", "{'a': 'b'}")])
def test_what_is_no_text_in_a_file_is_refused_where_texts_are_meant(value: str, held: str, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(f"label_names: {value}\noutput_dir: {tmp_path}\n")
    told = refused(["--config", config, *CPU])
    assert f"`label_names` in the YAML file holds {held}; wanted texts. Put it into quotes." in told


def test_a_configuration_that_refuses_is_one_line() -> None:
    told = refused(["--log_theta_tolerance", "-1", *CPU])
    assert "`log_theta_tolerance` is -1.0; wanted a number of at least 0" in told


def test_the_help_begins_with_the_generators_flags(capsys: pytest.CaptureFixture[str]) -> None:
    """Each flag stands in one group, by the package that defines it, and once by its name."""
    with pytest.raises(SystemExit):
        parser().unread(["--help"])
    told = capsys.readouterr().out
    titles = ["GeneratorArguments, flags of this package", "ScriptArguments, flags of TRL"]
    titles += [f"GRPOConfig, flags of {package}" for package in ("this package", "TRL", "transformers")]
    assert [told.index(title) for title in titles] == sorted(told.index(title) for title in titles)
    assert told.index("  --teacher") < told.index(titles[1])
    assert told.index(titles[2]) < told.index("  --correction ") < told.index(titles[3])
    assert "--alpha-method" not in told
    built = parser()
    grouped = [id(action) for group in built._action_groups for action in group._group_actions]
    assert sorted(grouped) == sorted(map(id, built._actions))
