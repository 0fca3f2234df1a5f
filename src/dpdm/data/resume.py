"""Unfinished archives: a preparation that was stopped goes on, and ends with the bytes of one that was not.

Beside an archive ``a.zip`` there are, until it is finished, ``.a.zip.partial``, its images so far, and
``.a.zip.journal``: a line that identifies source and options, then one digit per record: the archive, 0 or 1, that it
went to. An image's header in the partial file holds its length and checksum, so whatever instant the process was killed
at, going on takes over the records whose digit and whole image are there, in order, and cuts off the rest.
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from dpdm.data.archive import ArchiveBody
from dpdm.errors import InputError, RunError
from dpdm.files import fsync, locked


class Unfinished:
    """The archives that one preparation writes. Use ``unfinished`` to make one.

    Attributes:
        bodies: one or two.
        num_done: records that are in them already.
    """

    def __init__(self, bodies: Sequence[ArchiveBody], journal: BinaryIO) -> None:
        self.bodies = bodies
        self.num_done = 0
        self._journal = journal

    def add(self, side: int, png: bytes, label: int | None) -> None:
        """Appends the next record to archive ``side``."""
        self.bodies[side].add(png, label)
        self._journal.write(b"%d" % side)
        self.num_done += 1

    def flush(self) -> None:
        """Hands what was added to the operating system: it survives the end of this process."""
        for file in (*(body.file for body in self.bodies), self._journal):
            file.flush()

    def go_on(self, identity: str, label_of: Callable[[int], int | None]) -> bool:
        """Takes over what an earlier process finished; False if it worked on something else.

        Args:
            identity: of source and options, one line.
            label_of: class of a record.
        """
        head = identity.encode() + b"\n"
        earlier = self._journal.read(len(head))
        same = earlier == head
        while same and (digit := self._journal.read(1)) in (b"0", b"1")[: len(self.bodies)]:
            if not self.bodies[int(digit)].take(label_of(self.num_done)):
                break
            self.num_done += 1
        for body in self.bodies:
            body.file.truncate()
        self._journal.seek(0)
        self._journal.write(head)
        self._journal.seek(len(head) + self.num_done)
        self._journal.truncate()
        self.flush()
        return same or not earlier


@contextlib.contextmanager
def unfinished(
    dests: Sequence[Path], class_names: list[str] | None, groups: Sequence[Sequence[int] | None]
) -> Iterator[Unfinished]:
    """Opens the unfinished archives of ``dests``; they become the archives when the block ends.

    ``groups`` are those of all images that each will hold, or None.

    If it ends by an InputError they are removed; after any other failure they stay, and the next call finds them.

    Raises:
        InputError: if another process is writing one of them.
        RunError: if the disk is full or not writable.
    """
    partials = [_beside(dest, "partial") for dest in dests]
    journal = _beside(dests[0], "journal")
    try:
        dests[0].parent.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as files:
            opened = [files.enter_context(_locked(path, dest)) for path, dest in zip(partials, dests, strict=True)]
            try:
                bodies = [ArchiveBody(file, class_names, own) for file, own in zip(opened, groups, strict=True)]
                work = Unfinished(bodies, files.enter_context(_open(journal)))
                yield work
                for body in work.bodies:
                    body.finish()
                work.flush()
                for file in opened:
                    os.fsync(file.fileno())
                journal.unlink()  # first: killed after this, all begins anew, but nothing is left behind for good
                for partial, dest in zip(partials, dests, strict=True):
                    partial.replace(dest)
                    fsync(dest.parent)
            except InputError:
                for partial in partials:
                    partial.unlink(missing_ok=True)
                journal.unlink(missing_ok=True)
                raise
    except OSError as error:
        raise RunError(
            f"Cannot write {dests[0]}: {error}; what was finished is kept, and the same command goes on."
        ) from error


def _beside(dest: Path, what: str) -> Path:
    return dest.with_name(f".{dest.name}.{what}")


def _open(path: Path) -> BinaryIO:
    return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b")


@contextlib.contextmanager
def _locked(path: Path, dest: Path) -> Iterator[BinaryIO]:
    """Opens a file for this process alone; see ``locked``. Another may have made an archive of this very file."""
    with contextlib.ExitStack() as held:
        try:
            file = held.enter_context(locked(path))
        except BlockingIOError:
            raise InputError(f"Expected no other process that writes {dest}, got one: wait for it.") from None
        yield file
