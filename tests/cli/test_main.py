"""The command `optimal-sampling`: what it lists, what it refuses, and each command that no recipe runs."""

from __future__ import annotations

import json
import re
import sys
from importlib import import_module
from pathlib import Path

import pytest

import optimal_sampling_trl
from helpers.children import run as run_to_its_end
from helpers.models import make_model
from helpers.paths import ROOT
from optimal_sampling_trl import OptimalSamplingV1, Sampling, sample_to_folder
from optimal_sampling_trl.cli.main import commands, main

WANTED = {"demo", "distill", "env", "grpo", "page", "probe", "raft", "rloo", "sample", "serve"}


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line with which a command is refused."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as error:
        main(words)
    assert error.value.code == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith(f"optimal-sampling {words[0]}: ")
    return told


def test_the_help_lists_the_commands_and_loads_nothing() -> None:
    code = "import sys; from optimal_sampling_trl.cli.main import main; main([]); assert 'torch' not in sys.modules"
    done = run_to_its_end([sys.executable, "-c", code], environment={"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    for name, line in commands().items():
        assert f"  {name:8} {line}\n" in done.stdout
        assert line.endswith(".")
        assert len(line) <= 105


@pytest.mark.parametrize("name", sorted({*WANTED, *commands()}))
def test_a_command_is_one_file(name: str) -> None:
    assert callable(import_module(f"optimal_sampling_trl.cli.commands.{name}").run)


def test_what_is_no_command_is_told_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        main(["grp"])
    assert error.value.code == 2
    told = capsys.readouterr().err
    assert told.startswith("optimal-sampling: Unknown command 'grp'. Known: ")
    assert told.endswith("Did you mean 'grpo'?\n")
    main(["--version"])
    assert capsys.readouterr().out == f"{optimal_sampling_trl.__version__}\n"


def test_env_is_for_a_bug_report(capsys: pytest.CaptureFixture[str]) -> None:
    main(["env"])
    told = capsys.readouterr().out
    for name in ("optimal-sampling-trl", "platform", "torch", "trl", "vllm", "devices", "engine vllm"):
        assert f"- {name}: " in told
    assert refused(["env", "--all"], capsys) == "optimal-sampling env: '--all' is not known; wanted no flags. Drop it."


def test_a_page_of_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    teacher, student = (make_model(tmp_path / role, "llama", seed) for seed, role in enumerate(("teacher", "student")))
    with OptimalSamplingV1(str(teacher), str(student), backend="transformers") as sampler:
        sample_to_folder(sampler, ["3 + 4 ="], tmp_path / "run", n=3, sampling=Sampling(max_tokens=4), use_tqdm=False)
    page = tmp_path / "page.html"
    main(["page", str(tmp_path / "run"), "-o", str(page), "--title", "Three"])
    assert capsys.readouterr().out == f"3 rollouts are in {page}.\n"
    assert "<title>Three</title>" in page.read_text()
    for words, told in ((["nowhere"], "nowhere"), (["run", "--most", "0"], "`most` is 0; wanted a whole number of")):
        assert told in refused(["page", str(tmp_path / words[0]), *words[1:]], capsys)


def test_a_probe_prints_its_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, student = (make_model(tmp_path / role, "llama", seed) for seed, role in enumerate(("teacher", "student")))
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "3 + 4 ="}\n' * 3)
    (tmp_path / "judge.py").write_text(
        "def even(completions, **_):\n    return [len(c) % 2 for c in completions]\n\n\n"
        "def broken(completions, **_):\n    return int('one')\n"
    )
    monkeypatch.chdir(tmp_path)
    flags = [
        "--backend",
        "transformers",
        "--dataset_name",
        "prompts.jsonl",
        "--prompts",
        "2",
        "--n",
        "2",
        "--max_tokens",
        "3",
        "-o",
        "new/probe.html",
    ]
    pair = ["--teacher", str(teacher), "--model_name_or_path", str(student)]
    main(["probe", *pair, *flags, "--reward_funcs", "judge.even"])
    told = capsys.readouterr().out
    assert "2 prompts, 2 completions each." in told
    assert re.search(r"^student .*\n.*\n.*\n.*\n.*\n", told, re.MULTILINE)
    assert "<table>" in (tmp_path / "new" / "probe.html").read_text()
    main(["probe", *pair, *flags[:-1], "numbers.json", "--reward_funcs", "judge.even"])
    assert json.loads((tmp_path / "numbers.json").read_text())["prompts"] == 2
    twice = ["probe", *pair, *flags, "--reward_funcs", "judge.even", "judge.even"]
    assert "`--reward_funcs` names 2 functions; wanted one" in refused(twice, capsys)
    for flag, value, wanted in (
        ("prompts", "-1", "`prompts` is -1; "),
        ("temperature", "0", "`temperature` is 0"),
        ("n", "0", "optimal-sampling probe: probe: `n` is 0; wanted a whole number"),
    ):
        words = ["probe", *pair, *flags, "--reward_funcs", "judge.even", f"--{flag}", value]
        assert wanted in refused(words, capsys)
    with pytest.raises(ValueError, match="invalid literal"):  # not this package's: it keeps its traceback
        main(["probe", *pair, *flags, "--reward_funcs", "judge.broken"])


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["--temperature", "-1"], "`temperature` is -1.0; wanted a finite number of at least 0"),
        (["--dense_scalars", "x"], "Unknown dense scalar 'x'. Known: "),
        (["--max_samples", "0"], "`max_samples` is 0; wanted a whole number of at least 1. Drop it for all prompts."),
        (["--alpha_min", "3"], "`alpha_min` is 3.0; wanted a number in [0, 1]"),
        (["--engine_arguments", "{"], "`--engine_arguments` is '{'; wanted a JSON object"),
    ],
)
def test_what_sample_refuses_is_one_line(
    words: list[str], wanted: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before a model is looked for."""
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "3 + 4 ="}\n')
    monkeypatch.chdir(tmp_path)
    pair = ["--teacher", "no_model", "--model_name_or_path", "no_model", "--dataset_name", "prompts.jsonl"]
    assert wanted in refused(["sample", *pair, *words], capsys)


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ([], "`--model_name_or_path` is missing"),
        (["--model_name_or_path", "small"], "`--dataset_name` is missing"),
        (["--model_name_or_path", "small", "--dataset_name", "nowhere.jsonl"], "no data was found there"),
        (["--studnt", "small"], "Unknown flag '--studnt'"),
    ],
)
def test_every_refusal_of_a_command_names_it_and_ends_with_2(
    words: list[str], wanted: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert wanted in refused(["sample", "--teacher", "large", *words], capsys)


def test_demo_and_serve_say_their_flags(capsys: pytest.CaptureFixture[str]) -> None:
    for name, flag in (("demo", "--steps"), ("serve", "--theta"), ("page", "--title"), ("sample", "--teacher")):
        with pytest.raises(SystemExit):
            main([name, "--help"])
        assert flag in capsys.readouterr().out
