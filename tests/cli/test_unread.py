"""Every flag of TRL's for models and data has its place, and one that nothing reads is named."""

from __future__ import annotations

import ast
import inspect
import textwrap
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from trl import ModelConfig, ScriptArguments, get_peft_config, get_quantization_config

import optimal_sampling_trl
from optimal_sampling_trl.cli.commands import distill, grpo, probe, raft, rloo, sample
from optimal_sampling_trl.cli.parser import Parser
from optimal_sampling_trl.cli.unread import RULES, warn_of_unread_flags

WHOLE = "with `--use_peft`, without which the whole model is trained"
LORA = {"lora_r": "64", "lora_alpha": "8", "lora_target_modules": "q_proj", "use_dora": "true"}
EVERY_LORA = {
    **LORA,
    **{"lora_dropout": "0.1", "lora_target_parameters": "w", "lora_modules_to_save": "lm_head"},
    **{"lora_task_type": "SEQ_CLS", "use_rslora": "true"},
}
QUANTISED = {"bnb_4bit_quant_type": "fp4", "use_bnb_nested_quant": "true", "bnb_4bit_quant_storage": "uint8"}


def words_of(flags: dict[str, str]) -> list[str]:
    return [word for name, value in flags.items() for word in (f"--{name}", value)]


def unread(words: Sequence[str], **facts: Any) -> dict[str, str]:
    """The warning of each flag of a command line, by its name."""
    parser = Parser((ScriptArguments, ModelConfig), "test", "")
    arguments = parser.read(words)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_of_unread_flags(parser.named, *arguments, **facts)
    return {str(each.message).split("`")[1].removeprefix("--"): str(each.message) for each in caught}


def names_read(function: Any) -> set[str]:
    """The fields that a function of TRL's reads."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    return {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)} & names_of(ModelConfig)


def names_of(kind: Any) -> set[str]:
    return {each.name for each in fields(kind)}


def test_every_field_of_trl_has_one_rule() -> None:
    """Where this fails, TRL has a field that it had not: look who reads it, and name it in `RULES`."""
    named = Counter(name for rule in RULES for name in rule.names)
    assert set(named) == names_of(ModelConfig) | names_of(ScriptArguments)
    assert set(named.values()) == {1}


def test_what_trl_reads_beside_another_flag_is_called_so() -> None:
    assert names_read(get_peft_config) == {"use_peft", *EVERY_LORA}
    assert names_read(get_quantization_config) == {"load_in_4bit", "load_in_8bit", "dtype", *QUANTISED}


def test_lora_without_peft_is_named() -> None:
    """Without a word the whole model would be trained."""
    found = unread(words_of(EVERY_LORA))
    assert found.keys() == EVERY_LORA.keys()
    assert found["lora_r"] == f"`--lora_r` is 64 and does nothing here: it is read {WHOLE}. Drop it."
    assert unread([*words_of(EVERY_LORA), "--use_peft"]) == {}
    assert unread([]) == {}


def test_a_default_that_is_typed_is_meant() -> None:
    assert unread(["--lora_r", "16", "--lora_alpha=32"]).keys() == {"lora_r", "lora_alpha"}
    assert unread(["--use_dora", "false"]) == {}


def test_a_file_names_flags_too(tmp_path: Path) -> None:
    (tmp_path / "flags.yaml").write_text("use_peft: false\nlora_r: 16\nlora_modules_to_save: null\nuse_rslora: no\n")
    words = ["--config", str(tmp_path / "flags.yaml")]
    assert unread(words).keys() == {"lora_r"}
    assert unread([*words, "--use_peft", "true"]) == {}


def test_the_kind_of_quantisation_is_read_in_4_bits() -> None:
    for beside in ([], ["--load_in_8bit"]):
        found = unread([*words_of(QUANTISED), *beside])
        assert found.keys() == QUANTISED.keys()
        assert all("it is read with `--load_in_4bit`. Drop it." in each for each in found.values())
    assert unread([*words_of(QUANTISED), "--load_in_4bit"]) == {}


@pytest.mark.parametrize("name", ["data.jsonl", "some/data.parquet"])
def test_a_file_has_no_configurations(name: str) -> None:
    found = unread(["--dataset_name", name, "--dataset_config", "main"])
    assert found.keys() == {"dataset_config"}
    assert "'main' and does nothing here: it is read of a data set on the Hub or in a" in found["dataset_config"]
    for other in ("openai/gsm8k", "some/folder"):
        assert unread(["--dataset_name", other, "--dataset_config", "main"]) == {}


def test_a_split_to_evaluate_on_is_read_where_there_is_an_evaluation() -> None:
    words = ["--dataset_test_split", "validation"]
    assert "by a training that evaluates" in unread(words)["dataset_test_split"]
    assert unread(words, evaluates=True) == {}


def test_what_is_for_another_script_is_never_read() -> None:
    assert "for DPO alone" in unread(["--ignore_bias_buffers", "true"])["ignore_bias_buffers"]
    sources = [path.read_text() for path in Path(optimal_sampling_trl.__file__).parent.rglob("*.py")]
    assert not [source for source in sources if ".ignore_bias_buffers" in source]


@pytest.mark.parametrize("command", [distill, grpo, probe, raft, rloo, sample], ids=lambda command: command.__name__)
def test_each_command_names_them(command: Any, tmp_path: Path) -> None:
    """Before the models, of which there is none here, are loaded."""
    (tmp_path / "data.jsonl").write_text('{"prompt": "1="}\n')
    of_data = {"dataset_config": "main", "dataset_test_split": "validation", "ignore_bias_buffers": "true"}
    words = {"dataset_name": str(tmp_path / "data.jsonl"), "teacher": str(tmp_path), **of_data}
    words |= {"model_name_or_path": str(tmp_path / "nowhere"), "backend": "transformers"}
    if command not in (distill, sample):
        words["reward_funcs"] = "optimal_sampling_trl.demo.pair.reward"
    trains = command not in (probe, sample)
    if trains:
        words |= {**LORA, "output_dir": str(tmp_path), "use_cpu": "true", "bf16": "false", "report_to": "none"}
    with pytest.warns(UserWarning, match="does nothing here") as caught, pytest.raises((ValueError, SystemExit)):
        command.run(words_of(words))
    told = "\n".join(str(each.message) for each in caught)
    for name in (*of_data, *(LORA if trains else ())):
        assert told.count(f"`--{name}` is ") == 1, told
