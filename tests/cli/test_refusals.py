"""The end of a command that refuses: one line and exit status 2, and no other error is touched."""

from __future__ import annotations

import sys

import pytest

from helpers.children import run as run_to_its_end
from helpers.paths import ROOT
from optimal_sampling_trl import Mixture
from optimal_sampling_trl.cli.refusals import refusals


def test_a_refusal_of_ours_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error, refusals("a command"):
        Mixture(alpha_min=3)
    assert error.value.code == 2
    assert capsys.readouterr().err == "a command: Mixture: `alpha_min` is 3; wanted a number in [0, 1]. Pass one.\n"


def test_errors_of_other_lines_keep_their_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="invalid literal"), refusals("a command"):
        int("one")
    with pytest.raises(KeyError), refusals("a command"):
        Mixture().own()["epsilon"]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("script", "command", "told"),
    [
        ("recipes/grpo.py", "optimal-sampling grpo", "`--teacher` is missing"),
        ("recipes/sample.py", "optimal-sampling sample", "`--model_name_or_path` is missing"),
        ("recipes/prompt_distillation.py", "prompt_distillation.py", "`--teacher` is missing"),
    ],
)
def test_a_script_refuses_as_its_command(script: str, command: str, told: str, tmp_path: object) -> None:
    words = ["--output_dir", str(tmp_path)]
    if "sample" not in script:
        words += ["--use_cpu", "--bf16", "False", "--report_to", "none"]
    done = run_to_its_end([sys.executable, str(ROOT / script), *words], environment={"PYTHONPATH": str(ROOT)})
    assert done.returncode == 2, done.stderr[-2000:]
    assert done.stderr.splitlines()[-1].startswith(f"{command}: {told}")
