"""One process a folder, where the file system can say so. Network drives (Google Drive in Colab) often cannot."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from minigad.config import say

__all__ = ["can_lock", "held", "warn_without_locks"]


def held(file: Path, meanwhile: Callable[[], None] | None = None) -> contextlib.AbstractContextManager[Any]:
    """Take the lock of a file and return what releases it; nothing, with a warning, where there are no locks.

    Taken by another process it raises filelock.Timeout or, if given something to do meanwhile, does it and waits. The folder must exist; OSError if it
    cannot be written. A lock dies with its process.
    """
    from filelock import FileLock, Timeout

    if not can_lock(file.parent):
        warn_without_locks(file.parent)
        return contextlib.nullcontext()
    lock = FileLock(file)
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        if meanwhile is None:
            raise
    meanwhile()
    return lock.acquire()


def can_lock(folder: str | os.PathLike[str]) -> bool:
    """Try both kinds of lock on a file that no other process has, so that a refusal is told from a lock that is taken.

    Not left to filelock and SQLite: by release and errno, these call the refusal a taken lock, or wait, or leave a file that outlives a kill.
    True where nothing can be written either: whoever writes next says that better.
    """
    try:
        import fcntl
    except ImportError:  # Windows, which has locks
        return True
    with contextlib.suppress(OSError), tempfile.TemporaryFile(dir=folder) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            fcntl.flock(file, fcntl.LOCK_UN)
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
    return True


def warn_without_locks(folder: Path) -> None:
    """Say that nothing keeps a second process out."""
    say(f"{folder} is on a file system without locks: see that no second process writes there")
