"""A lock that a process holds as long as it lives: the system lets go of it, however the process ends."""

from __future__ import annotations

import errno
import os
import sys
from contextlib import suppress
from pathlib import Path

if sys.platform == "win32":
    import msvcrt

    def _lock(handle: int) -> None:
        msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
else:
    import fcntl

    def _lock(handle: int) -> None:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


_HELD_BY_ANOTHER = (errno.EAGAIN, errno.EACCES, errno.EDEADLK)


class Lock:
    """A file that one process at a time can hold. `Lock.take` makes it; `release` lets go of it."""

    def __init__(self, handle: int) -> None:
        self._handle = handle

    @classmethod
    def take(cls, path: Path) -> Lock | None:
        """The lock of a file, which is made where it is missing; None where another has it, or has removed the file.

        Raises OSError where the file cannot be made, and where the file system knows no locks.
        """
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        except FileNotFoundError:  # its folder went
            return None
        try:
            _lock(handle)
            if os.path.samestat(os.fstat(handle), os.stat(path)):
                return cls(handle)
        except FileNotFoundError:
            pass
        except OSError as error:
            if error.errno not in _HELD_BY_ANOTHER:
                os.close(handle)
                raise
        os.close(handle)
        return None

    def release(self) -> None:
        with suppress(OSError):
            os.close(self._handle)
