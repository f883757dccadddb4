"""Scripts in processes that are forked off one which has imported the libraries: a start without 10 s of imports.

Else each is a process of its own: arguments, variables, folder, path, output and exit code are what a shell gives it.
For what imports vLLM, whose settings are read at its import, and for what starts processes in the same manner, Python
itself is the one to ask.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import runpy
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import IO

import torch

from helpers.paths import SEARCHED

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "torch",
        "transformers.trainer",
        "transformers.models.llama.modeling_llama",
        "datasets",
        "trl.trainer.grpo_trainer",
    ]
)


class Forked:
    """A forked process, with what `helpers.children` asks of a `subprocess.Popen`."""

    def __init__(self, process: BaseProcess) -> None:
        process.start()
        assert process.pid is not None
        self.process, self.pid = process, process.pid

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self) -> int | None:
        self.process.join()
        return self.process.exitcode


def start(
    command: Sequence[str],
    output: IO[str],
    errors: IO[str],
    *,
    cwd: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> Forked:
    """Start a script of Python, as `helpers.children.start` does.

    Args:
        command: the interpreter, the script and its flags.
    """
    variables = dict(os.environ) | dict(environment or {})
    arguments = (list(command[1:]), output.name, errors.name, str(cwd or Path.cwd()), variables)
    return Forked(CONTEXT.Process(target=_run, args=arguments))


def _run(command: list[str], output: str, errors: str, cwd: str, variables: dict[str, str]) -> None:
    """The process itself."""
    os.setsid()
    for number, path in ((1, output), (2, errors)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), number)
    faulthandler.enable()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(variables)
    torch.set_num_threads(1)
    given = [path for path in variables.get("PYTHONPATH", "").split(os.pathsep) if path]
    searched = {str(path) for path in SEARCHED}
    sys.path[:] = [str(Path(command[0]).parent), *given, *(path for path in sys.path if path not in searched)]
    sys.argv[:] = command
    runpy.run_path(command[0], run_name="__main__")
