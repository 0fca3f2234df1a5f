"""Progress of long work: a bar on a terminal, a line now and then elsewhere."""

import os
import sys
import time
from contextlib import suppress
from types import TracebackType
from typing import Self

from tqdm.auto import tqdm

SECONDS_BETWEEN_LINES = 15.0


def speaks() -> bool:
    """Whether this process speaks to the user: of several, the first does."""
    # torchrun's name for a process; asking torch.distributed would load torch.
    return os.environ.get("RANK", "0") == "0"


def say(text: str) -> None:
    """Prints a line on standard error, if anybody hears it: what runs for days may outlive its terminal."""
    with suppress(OSError):
        print(text, file=sys.stderr, flush=True)


class Progress:
    """Counts to ``total`` on standard error; use as a context manager and call ``advance``.

    Shows counts and time alone: nothing that is computed from private data passes through here.
    """

    def __init__(self, what: str, total: int, *, start: int = 0, unit: str = "it") -> None:
        self.what, self.total, self.done, self.unit = what, total, start, unit
        shows_bar = sys.stderr.isatty() and speaks()
        self._bar = tqdm(total=total, initial=start, desc=what, unit=unit) if shows_bar else None
        self._last_line, self._printed = time.monotonic(), -1

    def advance(self, count: int = 1) -> None:
        self.done += count
        if self._bar is not None:
            with suppress(OSError):
                self._bar.update(count)
        elif time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES:
            self._print()

    def _print(self) -> None:
        if not speaks():
            return
        self._last_line, self._printed = time.monotonic(), self.done
        say(f"{self.what}: {self.done} of {self.total} {self.unit}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            with suppress(OSError):
                self._bar.close()
        elif self._printed != self.done:
            self._print()
