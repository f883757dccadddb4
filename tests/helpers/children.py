"""Processes that a test starts, waited for as long as they show a sign of life.

A count of seconds says nothing on a loaded machine, where the same work takes ten times as long. A process that hangs
uses no processor and prints nothing, however fast the machine is; one that runs in circles uses too much of it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol

import psutil

from helpers.paths import PROCESSES, ROOT, python_path

LOOKS = 240
"""Looks, a second apart, in which there must be a sign of life."""
WORK = 1.0
"""Processor seconds in so many looks that are a sign of life; what waits and polls uses less."""
MOST = 3600.0
"""Processor seconds after which a process runs in circles."""
TWO_RANKS = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


class StuckError(AssertionError):
    """A process shows no sign of life, or runs in circles."""


class Started(Protocol):
    """A process that was started in a session of its own, such as a `subprocess.Popen`."""

    pid: int

    @property
    def returncode(self) -> Any: ...
    def poll(self) -> Any: ...
    def wait(self) -> Any: ...


class Signs(NamedTuple):
    """Signs of life so far: processor seconds of a process and its descendants, and bytes that they printed."""

    work: float
    printed: int


def spent(pid: int) -> float:
    """Processor seconds of a process, of its descendants, and of those of them that have ended."""
    total = 0.0
    with suppress(psutil.Error):
        process = psutil.Process(pid)
        for each in (process, *process.children(recursive=True)):
            with suppress(psutil.Error):
                total += sum(each.cpu_times()[:4])
    return total


class Pulse:
    """Tells a process that works slowly from one that hangs.

    Args:
        pid: the process, looked at with all of its descendants.
        logs: files that it prints to.
    """

    def __init__(self, pid: int, *logs: Path) -> None:
        self.pid, self.logs = pid, logs
        self.begin = self.last = self._signs()
        self.silent = 0

    def _signs(self) -> Signs:
        return Signs(spent(self.pid), sum(log.stat().st_size for log in self.logs if log.exists()))

    def look(self) -> str | None:
        """Look once; returns the reason where the process is stuck. To be called once a second."""
        signs = self._signs()
        if abs(signs.work - self.last.work) >= WORK or signs.printed != self.last.printed:
            self.last, self.silent = signs, 0  # the sum falls where a grandchild ends that nobody waits for
            if signs.work - self.begin.work > MOST:
                return f"it used {signs.work - self.begin.work:.0f} processor seconds: it runs in circles"
            return None
        self.silent += 1
        return f"no sign of life in {LOOKS} looks" if self.silent >= LOOKS else None


def wait_until(done: Callable[[], Any], pid: int, *logs: Path, pause: float = 1.0) -> None:
    """Wait until `done` is true.

    Args:
        pid: the process that works towards it.
        logs: files that it prints to.
        pause: seconds between two calls of `done`.

    Raises:
        StuckError: the process shows no sign of life.
    """
    pulse, looked = Pulse(pid, *logs), time.monotonic()
    while not done():
        time.sleep(pause)
        if time.monotonic() - looked >= 1:
            looked = time.monotonic()
            if reason := pulse.look():
                raise StuckError(reason)


def run(
    command: Sequence[object],
    *,
    cwd: Path | None = None,
    environment: Mapping[str, str] | None = None,
    by: Callable[..., Started] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, with `environment` beside this process's; returns its exit code and what it printed.

    Args:
        by: what starts it; by default `start`.

    Raises:
        StuckError: it hangs or runs in circles; each of its processes was ended, and says where it stood.
    """
    words = list(map(str, command))
    with tempfile.TemporaryDirectory() as folder:
        output, errors = (Path(folder) / name for name in ("output", "errors"))
        with output.open("w") as first, errors.open("w") as second:
            process = (by or start)(words, first, second, cwd=cwd, environment=environment)
        try:
            wait_until(lambda: process.poll() is not None, process.pid, output, errors, pause=0.1)
        except StuckError as error:
            end(process, signal.SIGABRT)
            raise StuckError(f"{' '.join(words[:6])}: {error}\n{errors.read_text()[-6000:]}") from None
        finally:
            end(process)
        return subprocess.CompletedProcess(words, process.returncode, output.read_text(), errors.read_text())


def run_two_ranks(program: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run one of `tests/processes` as two ranks under torchrun; see `run`."""
    settings = {"OMP_NUM_THREADS": "1", "PYTHONPATH": python_path()} | environment
    return run([*TWO_RANKS, PROCESSES / program, *arguments], cwd=ROOT, environment=settings)


def start(
    command: Sequence[str],
    output: IO[str],
    errors: IO[str],
    *,
    cwd: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> subprocess.Popen[bytes]:
    """Start a process in a session of its own, which says where it stands when it is aborted."""
    settings = os.environ | {"PYTHONFAULTHANDLER": "1"} | dict(environment or {})
    return subprocess.Popen(command, stdout=output, stderr=errors, cwd=cwd, env=settings, start_new_session=True)


def end(process: Started, number: int = signal.SIGKILL) -> None:
    """Send a signal to a process and all that it started, sessions of their own included, and wait for it."""
    started: list[psutil.Process] = []
    with suppress(psutil.Error):
        started = psutil.Process(process.pid).children(recursive=True)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)
    for each in started:  # torchrun gives each rank a session
        with suppress(psutil.Error):
            each.send_signal(number)
    process.wait()
