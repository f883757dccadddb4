"""Tests wait for a slow process, and not for one that hangs."""

from __future__ import annotations

import re
import sys
import time

import psutil
import pytest

from helpers import children
from helpers.children import StuckError, run

WAITS = "import threading; print('here'); threading.Event().wait()"
PRINTS = "import time\nfor _ in range(8): print('.', flush=True); time.sleep(1)"
CIRCLES = "while True: pass"


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(children, "LOOKS", 5)
    monkeypatch.setattr(children, "WORK", 0.1)


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_what_it_printed_and_its_exit_code() -> None:
    done = run(python("import os, sys; print(os.environ['GIVEN']); sys.exit('broken')"), environment={"GIVEN": "yes"})
    assert (done.returncode, done.stdout, done.stderr) == (1, "yes\n", "broken\n")


def test_a_process_that_hangs_says_where() -> None:
    with pytest.raises(StuckError, match=r"no sign of life in 5 looks\n(.|\n)*in wait"):
        run(python(WAITS))


def test_a_process_that_prints_is_waited_for() -> None:
    """It takes longer than the looks and uses no processor."""
    assert run(python(PRINTS)).stdout == ".\n" * 8


def test_a_process_that_works_is_waited_for_and_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """The work is its child's; it goes on far longer than the looks, and is ended as one that runs in circles."""
    monkeypatch.setattr(children, "MOST", 6.0)
    with pytest.raises(StuckError, match="it runs in circles"):
        run(python(f"import subprocess, sys; subprocess.run([sys.executable, '-c', {CIRCLES!r}])"))


def starts_another(session: bool) -> str:
    return f"""
import subprocess, sys
print(subprocess.Popen([sys.executable, "-c", {WAITS!r}], start_new_session={session}, stdout=2).pid, file=sys.stderr)
"""


def test_nothing_stays_of_one_that_ended() -> None:
    assert_ended(run(python(starts_another(session=False))).stderr)


def test_nothing_stays_of_one_that_hangs() -> None:
    """The other has a session of its own, as torchrun's ranks do."""
    with pytest.raises(StuckError) as told:
        run(python(starts_another(session=True) + WAITS))
    assert_ended(str(told.value))


def assert_ended(printed: str) -> None:
    """Fail where the process whose id was printed is still there."""
    pid = int(re.findall(r"^(\d+)$", printed, re.MULTILINE)[0])
    for _ in range(100):
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return
        time.sleep(0.1)
    pytest.fail(f"process {pid} is still there")
