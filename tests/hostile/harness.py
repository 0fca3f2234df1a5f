"""Runs a command as a stranger may mean it to go wrong, and says what it should not have done.

A case may take 10 s of computing (or 60 s of waiting) and 2 GiB beyond what the process has already. It ends with exit
status 0, 1 or 2, and with a failure by exactly one line of complaint; a traceback is none, wherever it is written. It
writes below its own folder alone.
"""

import contextlib
import functools
import io
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import pytest

from dpdm.cli import run_command
from dpdm.data import sources
from dpdm.data.records import Split
from dpdm.errors import RunError
from dpdm.privacy import accounting

SECONDS = 10
SECONDS_OF_WAITING = 60
BYTES = 2 * 2**30
NOTES = ("dpdm: warning", "dpdm: keys that mean nothing here")
STOPPED = "the test stops here what would go on to train or draw"


class TooSlowError(BaseException):
    """A case took longer than it may; no handler of the product's catches it."""


@dataclass(frozen=True)
class Outcome:
    """How a case ended; ``problems`` holds a line for everything that should not have happened."""

    arguments: Sequence[str]
    status: int | None
    err: str
    problems: list[str]

    @property
    def told(self) -> str:
        """The last line of standard error: the complaint."""
        return (self.err.splitlines() or [""])[-1]

    def __str__(self) -> str:
        words = [word if len(word) < 300 else f"{word[:300]}... ({len(word)} characters)" for word in self.arguments]
        return f"{self.problems} of {words}: status {self.status}: {self.err[-1500:]!r}"


class Sandbox:
    """A folder for cases: ``given`` is what they read, ``work`` where they may write; beside it nothing may change.

    In arguments, ``@given`` and ``@work`` stand for these two, and ``@run`` for a fresh copy of ``given/run`` in
    ``work``.
    """

    def __init__(self, root: Path, given: Path) -> None:
        self.root, self.given = root, given
        self.work, self.home, self.cwd = root / "work", root / "home", root / "cwd"
        self.temporary = root / "temporary"
        for folder in (self.work, self.home, self.cwd, self.temporary):
            folder.mkdir(parents=True)

    def place(self, word: str) -> str:
        """Returns a word with real paths in it."""
        run = self.work / "run"
        if "@run" in word and not run.exists():
            shutil.copytree(self.given / "run", run)
        for name, path in (("@run", run), ("@given", self.given), ("@work", self.work)):
            word = word.replace(name, str(path))
        return word

    def attempt(self, *words: object) -> Outcome:
        """Runs a command in this process, up to where it would train or draw."""
        arguments, before = [self.place(str(word)) for word in words], self._outside()
        out, err, problems = io.StringIO(), io.StringIO(), []
        status = None
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), self._here(), limited():
                status = run_command(arguments)
        except TooSlowError:
            problems.append("took too long")
        except BaseException as error:  # whatever comes through is what this looks for
            problems.append(f"let {error!r} through")
        return self._judge(arguments, status, out.getvalue(), err.getvalue(), problems, before)

    def attempt_command(self, *words: object) -> Outcome:
        """Runs a real command in a process of its own."""
        arguments, before = [self.place(str(word)) for word in words], self._outside()
        environment = {
            **os.environ,
            "HOME": str(self.home),
            "TMPDIR": str(self.temporary),
            "https_proxy": "http://[::1]:9",
        }
        try:
            done = subprocess.run(
                [sys.executable, "-m", "dpdm", *arguments],
                cwd=self.cwd,
                env=environment,
                capture_output=True,
                timeout=600,
                check=False,
                stdin=subprocess.DEVNULL,
                preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CPU, (6 * SECONDS, 6 * SECONDS)),
            )
        except subprocess.TimeoutExpired:
            return self._judge(arguments, None, "", "", ["took too long"], before)
        out, err = (text.decode(errors="replace") for text in (done.stdout, done.stderr))
        return self._judge(arguments, done.returncode, out, err, [], before)

    def clear(self) -> None:
        """Empties ``work`` for the next case."""
        for entry in self.work.iterdir():
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()

    def _judge(
        self,
        arguments: Sequence[str],
        status: int | None,
        out: str,
        err: str,
        problems: list[str],
        before: dict[str, Any],
    ) -> Outcome:
        if status is not None and status not in (0, 1, 2):
            problems.append(f"ended with status {status}")
        if "Traceback" in out + err or "dpdm: Unexpected" in err:
            problems.append("failed by an error that nobody foresaw")
        complaints = [line for line in err.split("\n") if line.startswith("dpdm: ") and not line.startswith(NOTES)]
        listed = "verify" in arguments  # it names each problem, then what follows from them
        if status in (1, 2) and not (complaints and err.rstrip("\n").endswith(complaints[-1])):
            problems.append("did not end with its complaint")
        if status in (1, 2) and len(complaints) != 1 and not (listed and complaints):
            problems.append(f"complained {len(complaints)} times")
        if any(not line.isprintable() or len(line) > 5000 for line in complaints):
            problems.append("printed what no terminal should get")
        if before != (after := self._outside()):
            changed = sorted(set(before.items()) ^ set(after.items()))
            problems.append(f"wrote outside of its folder: {changed[:3]}")
        return Outcome(arguments, status, err, problems)

    def _outside(self) -> dict[str, Any]:
        """Returns what is known of every file and folder beside ``work``."""
        found = {}
        for root in {self.root, self.given}:
            for folder, folders, files in os.walk(root):
                if Path(folder) == self.root:
                    folders.remove(self.work.name)
                elif Path(folder) in (
                    self.home,
                    self.temporary,
                ):  # published files are kept in one, torch's in the other
                    folders[:] = [name for name in folders if not name.startswith((".cache", "torchinductor_"))]
                for name in (*folders, *files):
                    path = os.path.join(folder, name)  # noqa: PTH118  # thousands of times
                    stat = os.lstat(path)
                    size = 0 if name in folders else stat.st_size
                    found[path] = (stat.st_mode, size, stat.st_mtime_ns if name not in folders else 0)
        return found

    @contextlib.contextmanager
    def _here(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch, contextlib.chdir(self.cwd):
            patch.setenv("HOME", str(self.home))
            patch.setattr(tempfile, "tempdir", str(self.temporary))
            yield


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """Raises TooSlowError after 10 s of computing or 60 s in all, and lets no more than 2 GiB be asked for.

    Seconds of waiting are counted one by one: a process that is stopped for an hour waits for one of them.
    """
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError("Expected the main thread, which alone hears signals.")
    waited = 0

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal waited
        waited += number == signal.SIGALRM
        if number == signal.SIGPROF or waited >= SECONDS_OF_WAITING:
            raise TooSlowError

    handlers = {number: signal.signal(number, stop) for number in (signal.SIGPROF, signal.SIGALRM)}
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + BYTES, hard))
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    signal.setitimer(signal.ITIMER_REAL, 1, 1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        for number, handler in handlers.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def stopped_before_the_work() -> Iterator[None]:
    """Ends every command where it would train, draw, start processes or use the network; what is before runs as it is.

    But for what would only cost time: there are 60 digits, and noise is calibrated to within a few percent, by an
    accountant that is asked the same question once.
    """

    def stop(*arguments: Any, **keywords: Any) -> NoReturn:
        raise RunError(STOPPED)

    with pytest.MonkeyPatch.context() as patch:
        for place in (
            "dpdm.train.private_step",
            "dpdm.train.train_on_central_images",
            "dpdm.step_audit.private_step",
            "dpdm.run_audit._step_without",
            "dpdm.evaluate.train_feature_extractor",
            "dpdm.generate.sample",
            "dpdm.launch.start",
            "dpdm.fetching._download",
        ):
            patch.setattr(place, stop)
        patch.setattr(sources, "_digits", functools.cache(_few_digits))
        patch.setattr(accounting, "_secant", lambda spent, epsilon, start: start)
        patch.setattr(accounting, "_epsilon", functools.cache(accounting._epsilon))
        yield


def _few_digits(make: Callable[[], dict[str, Split]] = sources._digits) -> dict[str, Split]:
    return {
        name: replace(split, names=split.names[:30], labels=None if split.labels is None else split.labels[:30])
        for name, split in make().items()
    }
