"""The command `optimal-sampling`: what it lists, what it refuses, and each command that no recipe runs."""

from __future__ import annotations

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
    with pytest.raises(SystemExit, match=r"Unknown command 'grp'\. Known: .*Did you mean 'grpo'\?"):
        main(["grp"])
    main(["--version"])
    assert capsys.readouterr().out == f"{optimal_sampling_trl.__version__}\n"


def test_env_is_for_a_bug_report(capsys: pytest.CaptureFixture[str]) -> None:
    main(["env"])
    told = capsys.readouterr().out
    for name in ("optimal-sampling-trl", "platform", "torch", "trl", "vllm", "devices", "engine vllm"):
        assert f"- {name}: " in told
    with pytest.raises(SystemExit, match="'--all' is not known; wanted no flags"):
        main(["env", "--all"])


def test_a_page_of_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    teacher, student = (make_model(tmp_path / role, "llama", seed) for seed, role in enumerate(("teacher", "student")))
    with OptimalSamplingV1(str(teacher), str(student), backend="transformers") as sampler:
        sample_to_folder(sampler, ["3 + 4 ="], tmp_path / "run", n=3, sampling=Sampling(max_tokens=4), use_tqdm=False)
    page = tmp_path / "page.html"
    main(["page", str(tmp_path / "run"), "-o", str(page), "--title", "Three"])
    assert capsys.readouterr().out == f"3 rollouts are in {page}.\n"
    assert "<title>Three</title>" in page.read_text()
    with pytest.raises(SystemExit, match=r"optimal-sampling page: .*nowhere"):
        main(["page", str(tmp_path / "nowhere")])


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
    with pytest.raises(SystemExit, match="`--reward_funcs` names 2 functions; wanted one"):
        main(["probe", *pair, *flags, "--reward_funcs", "judge.even", "judge.even"])
    with pytest.raises(SystemExit, match=r"^optimal-sampling probe: probe: `n` is 0; wanted a whole number"):
        main(["probe", *pair, *flags, "--reward_funcs", "judge.even", "--n", "0"])
    with pytest.raises(ValueError, match="invalid literal"):  # not this package's: it keeps its traceback
        main(["probe", *pair, *flags, "--reward_funcs", "judge.broken"])


def test_demo_and_serve_say_their_flags(capsys: pytest.CaptureFixture[str]) -> None:
    for name, flag in (("demo", "--steps"), ("serve", "--theta"), ("page", "--title"), ("sample", "--teacher")):
        with pytest.raises(SystemExit):
            main([name, "--help"])
        assert flag in capsys.readouterr().out
