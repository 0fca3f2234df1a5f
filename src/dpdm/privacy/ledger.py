"""What has been bought from the data: an append-only file, written and synced before each purchase.

One JSON object a line. Each holds the SHA-256 of the line before it and one of itself, so that a changed, removed or
reordered line is noticed. That lines are missing at the end only the checkpoint can tell, which names the last one of
its time; a consistent rollback of the whole folder nothing can. Imports no torch.
"""

import errno
import hashlib
import json
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

from dpdm.errors import RunError
from dpdm.files import write_text
from dpdm.privacy.accounting import Mechanism, Selection, Spend, parts, spend_from

GENESIS = "0" * 64


class Ledger:
    """The purchases of one run, on one data set.

    Guarantee: when ``reserve`` returns, the purchase is on the disk. So randomness drawn afterwards is always accounted
    for, whenever the process dies. A step that is replayed with the same identity uses the same randomness on the same
    inputs: the same release, which is free. Whatever differs has another identity and is charged.

    Attributes:
        path: of the file.
        header: what the purchases are about: fingerprint of the data, plan, hash of the config, name of the key;
            private.
    """

    def __init__(self, path: Path, *, repair: bool = False) -> None:
        """Opens an existing ledger; ``repair`` cuts off a line that was being written, which needs the folder's lock.

        Raises:
            RunError: if it is missing or damaged.
        """
        self.path = path
        self._identities: set[str] = set()
        self._counts: Counter[Spend] = Counter()  # of single uses, and of whole selections
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            raise RunError(f"Expected a ledger at {path}, found none: without it what was spent is unknown.") from None
        lines = content.split(b"\n")
        # A last line without its end was being written when the process died: its reservation had not returned, so
        # nothing was drawn for it.
        torn = lines.pop()
        self._last = GENESIS
        self._hashes: set[str] = set()
        for number, line in enumerate(lines, start=1):
            self._read(line, number)
        if not lines:
            raise RunError(f"Expected ledger {path} to begin with a header, found none: it is damaged.")
        self._torn = bool(torn) and not repair
        if torn and repair:
            with path.open("r+b") as file:
                file.truncate(len(content) - len(torn))
                os.fsync(file.fileno())

    @classmethod
    def create(cls, path: Path, header: dict[str, Any]) -> "Ledger":
        """Starts a ledger, which appears with its header or not at all; the file must not exist.

        Whoever calls this holds the folder's lock, so nobody else makes the file meanwhile.
        """
        if path.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
        write_text(path, _line({"previous": GENESIS, "header": header}).decode() + "\n")
        return cls(path)

    def reserve(self, mechanism: Spend, identity: str) -> bool:
        """Charges one use of ``mechanism``, unless this very use was charged before; returns whether it was charged.

        Args:
            mechanism: what is bought; its ``num_steps`` must be 1. A selection is bought as a whole, all its runs.
            identity: of everything that the outcome depends on, randomness included.

        Raises:
            RunError: if it cannot be written; then nothing may be drawn.
        """
        if isinstance(mechanism, Mechanism) and mechanism.num_steps != 1:
            raise ValueError(f"Expected a purchase of one step, got {mechanism.num_steps}.")
        if identity in self._identities:
            return False
        if self._torn:
            raise RunError(f"Expected ledger {self.path} to end with a whole line: open it with repair=True.")
        entry = {"previous": self._last, "spend": mechanism.as_dict(), "identity": identity}
        line = _line(entry)
        try:
            self._append(line + b"\n")
        except OSError as error:
            self._torn = True  # part of the line may be there
            raise RunError(
                f"Could not write {self.path}: {error.strerror}; nothing was drawn for this step. Free some space and "
                "go on with the same command (dpdm train: add --resume)."
            ) from None
        self._read(line, number=-1)
        return True

    def _append(self, line: bytes) -> None:
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND)
        try:
            if os.write(descriptor, line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def spent(self, name: str) -> int:
        """Returns how many uses of the mechanism called ``name`` were charged; of a selection those of a single run."""
        counts = self._counts.items()
        return sum(count * part.num_steps for spend, count in counts for part in parts([spend]) if part.name == name)

    def was_charged(self, identity: str) -> bool:
        return identity in self._identities

    @property
    def last_line(self) -> str:
        """Hash of the last line, and through it of everything before."""
        return self._last

    def has_line(self, line_hash: str) -> bool:
        return line_hash in self._hashes

    def mechanisms(self) -> list[Spend]:
        """Returns everything that was charged, for the accountant."""
        found: list[Spend] = []
        for spend, count in self._counts.items():
            found += [spend] * count if isinstance(spend, Selection) else [replace(spend, num_steps=count)]
        return found

    def _read(self, line: bytes, number: int) -> None:
        try:
            entry = json.loads(line)
            if not isinstance(entry, dict):
                raise ValueError("it is no JSON object")
            del entry["checksum"]
            if _line(entry) != line:
                raise ValueError("its checksum differs")
            if entry["previous"] != self._last:
                raise ValueError("its chain of hashes is broken")
            if self._last == GENESIS:
                self.header: dict[str, Any] = dict(entry["header"])
            else:
                spend = spend_from(entry["spend"])
                self._identities.add(entry["identity"])
                if isinstance(spend, Selection):
                    self._counts[spend] += 1
                else:
                    self._counts[replace(spend, num_steps=1)] += spend.num_steps
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise RunError(
                f"Expected ledger {self.path} to be whole, line {number} is damaged ({error}): "
                "what was spent is unknown, so the run cannot go on; start a new one."
            ) from None
        self._last = hashlib.sha256(line).hexdigest()
        self._hashes.add(self._last)


def _line(entry: dict[str, Any]) -> bytes:
    """Returns an entry as JSON with a checksum of itself: nothing else vouches for the last line."""
    checksum = hashlib.sha256(json.dumps(entry, sort_keys=True).encode()).hexdigest()
    return json.dumps({**entry, "checksum": checksum}, sort_keys=True).encode()
