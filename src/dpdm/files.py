"""Writing files so that a reader sees the old content or the new, never a part of either; locks."""

import errno
import fcntl
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from dpdm.errors import InputError


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside ``path``; on success makes it durable and renames it to ``path``.

    On an error the temporary file is removed and ``path`` is as it was; an OSError without a file's name gets this one.
    Its name is new each time: a process that was killed may have left one, and in containers the next has its number.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        yield temporary
        fsync(temporary)
        temporary.replace(path)
        fsync(path.parent)
    except OSError as error:
        if error.errno is not None:  # that of a network's time limit is not about a file
            error.filename = error.filename or str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def fsync(path: Path) -> None:
    """Waits until a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked(path: Path) -> Iterator[BinaryIO]:
    """Opens a file, made if there is none, for this process alone; the kernel ends the lock when the process ends.

    By flock. On NFS Linux turns it into a lock at the server, which holds between machines unless the disk is mounted
    with ``nolock`` or ``local_lock``: then it holds on each machine for itself.

    Raises:
        BlockingIOError: if another process has it.
        InputError: if the file system has no locks.
    """
    with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError as error:
            raise InputError(
                f"Expected a file system that can lock {path}, got: {error.strerror}: choose a folder on another disk."
            ) from None
        # Between opening and locking, its last holder may have removed or renamed it: what is locked is not this file.
        if not path.exists() or not os.path.samestat(os.fstat(file.fileno()), path.stat()):
            raise BlockingIOError(errno.EWOULDBLOCK, os.strerror(errno.EWOULDBLOCK), str(path))
        yield file


def write_text(path: Path, text: str, *, mode: int = 0o644) -> None:
    """Writes a file that is never readable by more than ``mode`` (and the process' umask) allow."""
    with atomic_path(path) as temporary:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
