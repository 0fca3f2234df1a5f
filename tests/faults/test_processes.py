"""Two trainings in one folder, one of two processes that is killed, clocks that jump."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path

import pytest
from tests.faults.struck import TINY, Chain, Server, assert_same_end, beginning_of, copied, hidden, the_line

from dpdm.privacy.accounting import epsilon_spent
from dpdm.privacy.ledger import Ledger
from dpdm.workdir import Workdir


def test_a_second_training_in_one_folder_is_refused(server: Server, stopped: Workdir, tmp_path: Path) -> None:
    run = copied(stopped, tmp_path)
    with run.lock():
        before = {path: path.read_bytes() for path in run.root.rglob("*") if path.is_file()}
        for command in (["train", "--resume"], ["release"]):
            status, said = server(*command, "--workdir", run.root)
            assert status == 2
            assert "no other run" in the_line(said)
        assert {path: path.read_bytes() for path in run.root.rglob("*") if path.is_file()} == before


def test_clocks_that_jump_change_nothing(server: Server, stopped: Workdir, finished: Workdir, tmp_path: Path) -> None:
    run = copied(stopped, tmp_path)
    status, said = server("train", "--resume", "--workdir", run.root, clock=0)
    assert status == 0, said
    assert_same_end(run, finished)


# Races


@pytest.fixture
def rivals(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Server]]:
    another = Server(tmp_path_factory.mktemp("server"))
    yield server, another
    another.close()


def race(chain: Chain, rivals: tuple[Server, Server], seconds: float) -> list[tuple[int, str]]:
    """Starts the same training twice, so many seconds apart; whoever goes on waits until the other has ended."""
    first_has_ended = chain.run.root.with_name("first has ended")
    with ThreadPoolExecutor(2) as pool:

        def start(server: Server, later: float) -> tuple[int, str]:
            time.sleep(later)
            return chain.start(server, hold=str(first_has_ended))

        both = [pool.submit(start, server, later) for server, later in zip(rivals, (0, seconds), strict=True)]
        wait(both, return_when=FIRST_COMPLETED)
        first_has_ended.touch()
    return sorted((one.result() for one in both), key=lambda outcome: outcome[0])


def check_races(rivals: tuple[Server, Server], images: Path, folder: Path, count: int) -> None:
    """Half of them for a folder that is not there yet, half for a run that was begun."""
    chance = random.Random(0)
    for number in range(count):
        chain = Chain(rivals[0], folder / str(number), str(images))
        if number % 2:
            assert chain.go_on(kill=45, how="after")[0] < 0
            assert chain.run.ledger.exists()
        (won, said), (lost, complaint) = race(chain, rivals, chance.choice([0, 0, 0.01, 0.05]))
        assert (won, lost) == (0, 2), (said, complaint)
        assert "no other run" in the_line(complaint)
        chain.check_accounted()
        chain.check_ended_as_undisturbed()


@pytest.mark.slow  # one that runs keeps others out, above
def test_two_trainings_that_start_at_once(rivals: tuple[Server, Server], images: Path, tmp_path: Path) -> None:
    check_races(rivals, images, tmp_path, 4)


@pytest.mark.slow
def test_many_trainings_that_start_at_once(rivals: tuple[Server, Server], images: Path, tmp_path: Path) -> None:
    check_races(rivals, images, tmp_path, 20)


# Two processes, one of which is killed

TWO = (*TINY, "train.num_iterations=40", "train.checkpoint_every=7", "setup.n_gpus_per_node=2")
NOTE_DRAWS = """
import hashlib, os
if os.environ.get("RANK") == "0":
    import dpdm.train
    step_keys = dpdm.train.step_keys
    def noted(key):
        with open(os.environ["DRAWS"], "a") as file:
            file.write(hashlib.sha256(key).hexdigest() + "\\n")
        return step_keys(key)
    dpdm.train.step_keys = noted
"""


class TwoProcesses:
    """A training of two processes, as a user starts it, in which one may be killed."""

    def __init__(self, folder: Path, images: Path) -> None:
        folder.mkdir(exist_ok=True)
        self.run, self._folder, self._draws = Workdir(folder / "w"), folder, folder / "draws"
        self._keys = [*TWO, f"data.path={images}"]
        (folder / "sitecustomize.py").write_text(NOTE_DRAWS)  # each Python imports it when it starts

    def start(self) -> "subprocess.Popen[str]":
        resume = ["--resume"] if self.run.ledger.exists() else []
        path = os.pathsep.join([str(self._folder), *filter(None, [os.environ.get("PYTHONPATH")])])
        return subprocess.Popen(
            [sys.executable, "-m", "dpdm", "train", "--workdir", str(self.run.root), *resume, "--", *self._keys],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": path, "DRAWS": str(self._draws), "OMP_NUM_THREADS": "1"},
        )

    def worker(self, rank: int) -> int | None:
        """Returns the number of one of the two processes; None if there is none (yet, or any more)."""
        wanted = {f"DRAWS={self._draws}".encode(), f"RANK={rank}".encode()}
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if wanted <= set((folder / "environ").read_bytes().split(b"\0")):
                    return int(folder.name)
        return None

    def kill(self, process: "subprocess.Popen[str]", rank: int, lines: int, seconds: float) -> bool:
        """Kills one process, so many seconds after there are so many lines in the ledger; whether it came to that."""
        worker = None
        while worker is None or self._lines() < lines:
            if process.poll() is not None:
                return False
            worker = worker or self.worker(rank)
            time.sleep(0.005)
        time.sleep(seconds)
        with contextlib.suppress(ProcessLookupError):
            os.kill(worker, signal.SIGKILL)
            return True
        return False

    def check_accounted(self) -> None:
        drawn = set(self._draws.read_text().split()) if self._draws.exists() else set()
        if not self.run.ledger.exists():
            assert not drawn
            return
        ledger = Ledger(self.run.ledger)
        assert len(drawn) <= ledger.spent("DP-SGD")
        assert epsilon_spent(ledger.mechanisms(), 1e-5) <= ledger.header["plan"]["epsilon"]

    def go_on_to_the_end(self) -> None:
        process = self.start()
        said = process.communicate(timeout=300)[1]
        assert process.returncode == 0, said
        self.check_accounted()

    def _lines(self) -> int:
        return self.run.ledger.read_bytes().count(b"\n") if self.run.ledger.exists() else 0


@pytest.mark.slow
def test_one_of_two_processes_is_killed_at_random_moments(images: Path, tmp_path: Path) -> None:
    two, chance, kills = TwoProcesses(tmp_path / "killed", images), random.Random(0), 0
    # While it starts; then after so many of the 42 lines that a whole run has in its ledger.
    moments = [(0, chance.uniform(0, 2)), *((lines, chance.uniform(0, 0.2)) for lines in (1, 2, 9, 20, 33))]
    for number, (lines, seconds) in enumerate(moments):
        process = two.start()
        killed = two.kill(process, (number + 1) % 2, lines, seconds)
        said = process.communicate(timeout=300)[1]
        two.check_accounted()
        if killed and process.returncode:
            kills += 1
            told = [line for line in said.splitlines() if line.startswith("dpdm: ")]
            assert process.returncode == 1, said
            assert said.splitlines()[-1].startswith("dpdm: Of 2 processes one ended early"), said
            assert len(told) <= 2, told  # the survivor may have said that it lost contact
            assert all("lost contact" in line for line in told[:-1]), told
    print(f"{kills} kills")
    assert kills > 3
    two.go_on_to_the_end()
    assert Ledger(two.run.ledger).spent("DP-SGD") == 40  # replayed steps were free
    assert hidden(two.run.root) == []
    undisturbed = TwoProcesses(tmp_path / "undisturbed", images)
    beginning_of(two.run, undisturbed.run.root)
    undisturbed.go_on_to_the_end()
    assert_same_end(two.run, undisturbed.run)
