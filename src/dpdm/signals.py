"""What asks a process to end: Ctrl-C, a polite kill, the end of its terminal."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


def ending_signals() -> list[signal.Signals]:
    """Returns SIGINT, SIGTERM and, unless it is ignored as under nohup, SIGHUP, the end of the terminal."""
    numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
    return [number for number in numbers if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN]


@contextmanager
def ends_interrupt() -> Iterator[None]:
    """Meanwhile all ``ending_signals`` are what Ctrl-C is, so that what is temporary is removed."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():  # elsewhere signals cannot be received
        yield
        return
    before = {number: signal.signal(number, interrupt) for number in ending_signals() if number != signal.SIGINT}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
