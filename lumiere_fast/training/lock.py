"""One process at a time trains in a folder: a lock that the kernel gives back however the process ends."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

LOCK_NAME = "training.lock"
# What a file system without such locks answers, as some of the network do: better unguarded than not at all.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Within the block no other process trains in `folder`, which is made, and removed again if it is left empty.

    The lock is `flock`'s on a file in the folder: a process that is killed holds it no longer, and the file that it
    leaves hinders nobody. Without `fcntl` (Windows) or locks on the file system there is none.

    Raises:
        FileExistsError: `folder` is a file.
        BlockingIOError: another process trains in it.
    """
    check_no_file(folder)
    created = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with _locked_file(folder):
            yield
    finally:
        if created:
            with suppress(OSError):  # it holds a run now
                folder.rmdir()


def check_no_file(folder: Path) -> None:
    """A FileExistsError if `folder` is there and is none."""
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file; a run needs a folder")


@contextmanager
def _locked_file(folder: Path) -> Iterator[None]:
    try:
        import fcntl
    except ImportError:
        yield
        return
    path = folder / LOCK_NAME
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(file)
            raise BlockingIOError(f"another process is training in {folder}: wait for it, or stop it") from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                os.close(file)
                raise
        if _is_at(path, file):
            break
        os.close(file)  # its last holder removed it between the two calls
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is locked, so that nobody locks what is about to go
        os.close(file)


def _is_at(path: Path, file: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file))
    except FileNotFoundError:
        return False
