"""Names of what a run's folder holds, and the lock that keeps two runs out of one folder."""

import errno
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from dpdm.errors import InputError
from dpdm.files import locked


@dataclass(frozen=True)
class Workdir:
    """Paths of one run; ``private/`` is for the owner of the data alone (mode 0700)."""

    root: Path

    @property
    def config(self) -> Path:
        return self.root / "config.yaml"

    @property
    def private(self) -> Path:
        return self.root / "private"

    @property
    def key(self) -> Path:
        return self.private / "key"

    @property
    def holdout_key(self) -> Path:
        return self.private / "holdout_key"

    @property
    def ledger(self) -> Path:
        return self.private / "ledger.jsonl"

    @property
    def checkpoint(self) -> Path:
        return self.private / "checkpoint.safetensors"

    @property
    def released(self) -> Path:
        return self.private / "released"

    @property
    def train_archive(self) -> Path:
        return self.private / "train.zip"

    @property
    def holdout_archive(self) -> Path:
        return self.private / "holdout.zip"

    @property
    def evaluation(self) -> Path:
        return self.private / "evaluation.json"

    @property
    def request(self) -> Path:
        return self.private / "request.json"

    @property
    def selection(self) -> Path:
        return self.private / "selection.json"

    @property
    def candidate(self) -> Path:
        return self.private / "run"

    @property
    def snapshots(self) -> Path:
        return self.private / "snapshots"

    @property
    def averages(self) -> Path:
        return self.private / "averages"

    @property
    def fid(self) -> Path:
        return self.private / "fid.csv"

    @property
    def release(self) -> Path:
        return self.root / "release"

    @property
    def samples(self) -> Path:
        return self.root / "samples"

    @property
    def synthetic(self) -> Path:
        return self.root / "synthetic.zip"

    @property
    def report(self) -> Path:
        return self.root / "report.html"

    @property
    def shareable(self) -> Path:
        return self.root / "shareable.html"

    @property
    def products(self) -> tuple[Path, ...]:
        """All that a run and its release write."""
        return (
            self.config,
            self.private,
            self.release,
            self.samples,
            self.synthetic,
            self.report,
            self.shareable,
        )

    def make_private(self) -> None:
        """Makes ``private/``.

        Raises:
            InputError: if there is no folder to be made or written there.
        """
        check_folder(self.root)
        try:
            self.private.mkdir(parents=True, exist_ok=True, mode=0o700)
            self.private.chmod(0o700)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise
            raise InputError(
                f"Expected --workdir {self.root} to be a folder that can be written to, got: {error.strerror}."
            ) from None

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Holds the folder for this process; the lock is gone when the process is (see ``locked``). May be nested.

        Files that a killed process was writing are removed first. What it made itself is removed again if an error
        comes before anything else was written.

        Guarantee: two processes never buy from one ledger at a time, unless they are on machines whose locks do not
        hold for each other. So what one has read of the ledger stays all that was bought.

        Raises:
            InputError: if another process holds the folder, or it cannot be written to.
        """
        root = self.root.resolve()
        if root in _held:
            yield
            return
        new = [path for path in (self.private, self.root, *self.root.parents) if not path.exists()]
        self.make_private()
        path = self.private / "lock"
        with ExitStack() as held:
            try:
                held.enter_context(locked(path))
            except (BlockingIOError, FileNotFoundError):  # or its holder has just removed what it had made
                raise InputError(
                    f"Expected no other run in {self.root}, got one that is at work: wait for it or choose another "
                    "--workdir."
                ) from None
            except InputError:
                _remove_if_empty(path, new)
                raise
            self._remove_unfinished()
            _held.add(root)
            try:
                yield
            except BaseException:
                _remove_if_empty(path, new)
                raise
            finally:
                _held.discard(root)

    def _remove_unfinished(self) -> None:
        """Removes what ``atomic_path`` had begun in a process that was killed; for the holder of the lock."""
        unfinished = list(self.private.rglob(".*.tmp"))
        for path in (self.config, self.report, self.shareable):
            unfinished += path.parent.glob(f".{path.name}.*.tmp")
        for path in unfinished:
            path.unlink(missing_ok=True)


_held: set[Path] = set()  # folders that this process has locked


def _remove_if_empty(lock: Path, new: list[Path]) -> None:
    """Removes the folders in ``new``, innermost first, as long as they hold nothing but ``lock``."""
    if new and lock.parent.exists() and [path.name for path in lock.parent.iterdir()] == [lock.name]:
        lock.unlink()
    for folder in new:
        if folder.exists() and not any(folder.iterdir()):
            folder.rmdir()


def check_folder(folder: Path) -> None:
    """Raises InputError unless ``folder`` is a folder that can be written to, or could be made."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise InputError(f"Expected {folder} to be a folder, got {existing}, which is a file: choose another one.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise InputError(f"Expected {folder} to be a folder that can be written to, got no permission in {existing}.")
