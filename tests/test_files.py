"""Files appear whole or not at all, whatever fails on the way; a lock admits one writer."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from optimal_sampling_trl.files import Lock, write_atomically


@pytest.mark.parametrize("durable", [False, True])
def test_a_file_is_replaced_and_its_folder_made(tmp_path: Path, durable: bool) -> None:
    path = tmp_path / "new" / "folder" / "file"
    for content in (b"first", b"", b"second"):
        write_atomically(path, content, durable=durable)
        assert path.read_bytes() == content
        assert [each.name for each in path.parent.iterdir()] == ["file"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~current_umask()


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize("durable", [False, True])
def test_a_failure_leaves_the_old_file_alone(tmp_path: Path, durable: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old", durable=durable)

    def fail(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, b"new", durable=durable)
    assert {each.name: each.read_bytes() for each in tmp_path.iterdir()} == {"file": b"old"}


def test_a_durable_file_is_flushed_before_it_gets_its_name_and_its_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[tuple[str, bool]] = []
    path, true = tmp_path / "file", os.fsync

    def watch(descriptor: int) -> None:
        flushed.append((os.readlink(f"/proc/self/fd/{descriptor}"), path.exists()))
        true(descriptor)

    monkeypatch.setattr(os, "fsync", watch)
    write_atomically(path, b"content")
    assert flushed == []
    path.unlink()
    write_atomically(path, b"content", durable=True)
    assert flushed == [(str(tmp_path / ".file.tmp"), False), (str(tmp_path), True)]


def test_a_name_of_any_length_the_system_takes(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 255)
    write_atomically(path, b"content")
    assert path.read_bytes() == b"content"


def test_a_lock_names_its_holder_and_is_free_after(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with (
        Lock(path, "the book"),
        pytest.raises(RuntimeError, match=rf"\(process {os.getpid()} on .*\) has the book open; wanted one at a time"),
    ):
        Lock(path, "the book").__enter__()
    with Lock(path, "the book"):
        pass


HOLDER = """
import os, sys, time
from pathlib import Path
from optimal_sampling_trl.files import Lock

with Lock(Path(sys.argv[1]), "the book"):
    if not os.fork():
        print(os.getpid(), flush=True)  # by the child, once it runs: until then it holds the lock as well
    time.sleep(600)
"""


def test_a_killed_holders_child_does_not_hold_the_lock(tmp_path: Path) -> None:
    """As a loader of data, forked while a trainer has its folder open."""
    path = tmp_path / "lock"
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    child = int(holder.stdout.readline())
    try:
        with pytest.raises(RuntimeError, match=rf"process {holder.pid} on"):
            Lock(path, "the book").__enter__()
        holder.kill()
        holder.wait()
        os.kill(child, 0)  # it lives
        with Lock(path, "the book"):
            pass
    finally:
        holder.kill()
        os.kill(child, signal.SIGKILL)


def test_a_child_that_ends_leaves_its_parents_lock(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with Lock(path, "the book") as lock:
        child = os.fork()
        if not child:
            lock.__exit__()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        with pytest.raises(RuntimeError, match="has the book open"):
            Lock(path, "the book").__enter__()
