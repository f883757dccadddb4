"""Files that appear whole or not at all, and a lock that admits one writer at a time."""

from __future__ import annotations

import os
import socket
import uuid
import weakref
from pathlib import Path


def write_atomically(path: Path, content: bytes, durable: bool = False) -> None:
    """Replace the file at `path` by `content` in one step, and make its folder. A failure leaves the old file.

    Args:
        path: the file to write.
        content: all that it will hold.
        durable: return only when the content is on the disk. The scratch file is then called `.NAME.tmp`, so that the
            next writer can remove what a kill left: its caller has to hold a lock. Otherwise two may write at once.

    Raises:
        OSError: where the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Opened by hand, not through `tempfile`, whose files only their owner may read.
    scratch = path.with_name(f".{path.name}.tmp" if durable else f".{path.name[:100]}.{uuid.uuid4().hex}.tmp")
    try:
        with scratch.open("wb") as file:
            file.write(content)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)
    if durable:
        _flush_folder(path.parent)


def _flush_folder(folder: Path) -> None:
    """Bring the names of a folder's files to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


_held: weakref.WeakSet[Lock] = weakref.WeakSet()
"""The locks of this process."""


class Lock:
    """Exclusive right to write, held while its context lasts. The system frees it however its process ends.

    Two locks on one path exclude each other in one process, too. A process that is forked meanwhile, such as a loader
    of data, does not hold it, so that one which outlives a killed parent is in nobody's way.

    Args:
        path: the file that is locked; made if it is missing, and left there.
        what: names what is written to under the lock, for the error.
    """

    def __init__(self, path: Path, what: str) -> None:
        self.path, self.what = path, what
        self._file: int | None = None

    def __enter__(self) -> Lock:
        """Take the lock.

        Raises:
            OSError: where the file cannot be made, or its file system has no locks.
            RuntimeError: where another writer holds it.
        """
        import fcntl  # not on Windows, where a folder can be read

        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        _held.add(self)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.read(self._file, 200).decode(errors="replace") or "unknown"
            self.__exit__()
            raise RuntimeError(
                f"Another writer ({holder}) has {self.what} open; wanted one at a time. Wait until it ends, or name "
                "another folder."
            ) from error
        except BaseException:
            self.__exit__()
            raise
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        return self

    def __exit__(self, *exception: object) -> None:
        import fcntl

        if self._file is not None:
            fcntl.flock(self._file, fcntl.LOCK_UN)  # closing alone leaves it to a child that C code forked meanwhile
            os.close(self._file)
            self._file = None
            _held.discard(self)


def _let_go() -> None:
    """Close what a forked process has of its parent's locks; unlocking them would take them from the parent."""
    for lock in list(_held):
        if lock._file is not None:
            os.close(lock._file)
            lock._file = None
    _held.clear()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_let_go)
