"""Locks and files that appear whole."""

import errno
import fcntl
import os
import shutil
from pathlib import Path

import pytest

from dpdm import files
from dpdm.errors import InputError
from dpdm.files import atomic_path, locked
from dpdm.workdir import Workdir


def test_a_lock_is_held_by_one(tmp_path: Path) -> None:
    with locked(tmp_path / "lock"):
        for _ in range(2):  # being refused does not end the lock
            with pytest.raises(BlockingIOError), locked(tmp_path / "lock"):
                pass
    with locked(tmp_path / "lock"):
        pass


def test_a_lock_on_a_file_that_was_removed_meanwhile_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its holder removes it between another's opening and locking: a third process would lock the new file."""
    flock = fcntl.flock

    def slow_flock(file: int, how: int) -> None:
        monkeypatch.setattr(files.fcntl, "flock", flock)
        (tmp_path / "lock").unlink()
        flock(file, how)

    monkeypatch.setattr(files.fcntl, "flock", slow_flock)
    with pytest.raises(BlockingIOError), locked(tmp_path / "lock"):
        pass


def test_a_disk_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(file: int, how: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(files.fcntl, "flock", flock)
    with pytest.raises(InputError, match=r"lock.*No locks available"), Workdir(tmp_path / "w").lock():
        pass
    assert not (tmp_path / "w").exists()


def test_what_a_killed_process_was_writing_is_removed_by_the_next(tmp_path: Path) -> None:
    run = Workdir(tmp_path / "w")
    run.make_private()
    for path in (run.key, run.checkpoint, run.config, run.report):
        with atomic_path(path) as temporary:
            temporary.touch()
            shutil.copy(temporary, f"{temporary}.tmp")  # as if killed here
        path.unlink()
    (run.root / ".mine.tmp").touch()
    with run.lock():
        assert sorted(path.name for path in run.root.rglob("*") if path.is_file()) == [".mine.tmp", "lock"]


def test_a_disk_error_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="No space left") as caught:
        files.write_text(tmp_path / "a.txt", "text")
    assert caught.value.filename == str(tmp_path / "a.txt")
    assert list(tmp_path.iterdir()) == []
