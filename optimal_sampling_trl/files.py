"""One writer at a time: a lock on a file, which the system frees however the process that holds it ends."""

from __future__ import annotations

import os
import socket
from pathlib import Path


class Lock:
    """Held while its context lasts. Two in one process exclude each other, too.

    Args:
        path: the file that is locked; made if need be, and left there.
        what: what is written to under the lock, for the error.
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
            fcntl.flock(self._file, fcntl.LOCK_UN)  # closing alone leaves it to a child that was forked meanwhile
            os.close(self._file)
            self._file = None
