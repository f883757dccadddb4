"""Files appear whole or not at all, whatever fails on the way; a lock admits one writer."""

from __future__ import annotations

import os
import stat
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
