"""Names of what a run's folder holds, and the lock that keeps two runs out of one folder."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from dpdm.errors import InputError


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
    def train_archive(self) -> Path:
        return self.private / "train.zip"

    @property
    def holdout_archive(self) -> Path:
        return self.private / "holdout.zip"

    @property
    def evaluation(self) -> Path:
        return self.private / "evaluation.json"

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

    def make_private(self) -> None:
        self.private.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.private.chmod(0o700)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Holds the folder for this process; the lock is gone when the process is.

        Raises:
            InputError: if another process holds it.
        """
        self.make_private()
        with (self.private / "lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(
                    f"Expected no other run in {self.root}, got one that is at work: wait for it or choose another "
                    "--workdir."
                ) from None
            yield
