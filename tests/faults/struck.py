"""Runs that faults strike: commands in forks of one process, and what holds of a run whatever struck it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dpdm import checkpoint, train
from dpdm import config as configs
from dpdm.checkpoint import TrainState
from dpdm.privacy.accounting import epsilon_spent
from dpdm.privacy.ledger import Ledger
from dpdm.workdir import Workdir

STEPS, SAVED, RESERVED = 6, 2, 4  # of a run; when the stopped one was saved last; what it had bought when it died
KILLED = -9
TINY = (
    "dp.noise_multiplier=20",  # the accountant is quick
    f"train.num_iterations={STEPS}",
    "train.expected_batch_size=10",
    "train.checkpoint_every=2",
    "train.warmup.enabled=true",
    "train.warmup.num_iterations=2",
    "train.warmup.batch_size=8",
    "train.warmup.noise_multiplier=20",
    "model.network.width=4",
    "model.network.channel_multipliers=[1]",
    "model.network.num_res_blocks=1",
    "setup.device=cpu",
    "setup.num_threads=1",
)


class Server:
    """Runs commands, each in a process of its own that a fault may strike."""

    def __init__(self, folder: Path) -> None:
        self._log, program = folder / "log", Path(__file__).with_name("fault_server.py")
        self._process = subprocess.Popen(
            [sys.executable, str(program)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def __call__(self, *arguments: object, **fault: Any) -> tuple[int, str]:
        """Returns the exit status of dpdm with ``arguments``, negative if it was killed, and what it printed."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        job = {"arguments": [str(argument) for argument in arguments], "log": str(self._log), **fault}
        stdin.write(json.dumps(job) + "\n")
        stdin.flush()
        return int(stdout.readline()), self._log.read_text(encoding="utf-8")

    def close(self) -> None:
        self._process.communicate()


def write_images(folder: Path, seed: int = 0) -> Path:
    noise = np.random.default_rng(seed)
    for index in range(40):
        path = folder / "ab"[index % 2] / f"{index:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise.integers(0, 256, (8, 8), np.uint8)).save(path)
    return folder


class Chain:
    """One run that faults strike again and again: the same command goes on, until it is done."""

    def __init__(self, server: Server, root: Path, source: str, overrides: tuple[str, ...] = TINY) -> None:
        self.run, self._server = Workdir(root / "w"), server
        self._draws, self._keys = root / "draws", ["--", f"data.path={source}", *overrides]

    def go_on(self, **fault: Any) -> tuple[int, str]:
        status, said = self.start(self._server, **fault)
        self.check_accounted()
        return status, said

    def start(self, server: Server, **fault: Any) -> tuple[int, str]:
        resume = ["--resume"] if self.run.ledger.exists() else []
        return server("train", "--workdir", self.run.root, *resume, *self._keys, draws=str(self._draws), **fault)

    def check_accounted(self) -> None:
        """Whatever randomness was ever about to be drawn is in the ledger, and never more than was planned."""
        drawn = sorted(set(self._draws.read_text().split("\n")[:-1])) if self._draws.exists() else []
        if not self.run.ledger.exists():
            assert drawn == []
            return
        ledger = Ledger(self.run.ledger)
        for what in ("DP-SGD", "central images"):
            assert sum(line.startswith(what) for line in drawn) <= ledger.spent(what)
        assert epsilon_spent(ledger.mechanisms(), 1e-5) <= ledger.header["plan"]["epsilon"]

    def check_ended_as_undisturbed(self) -> None:
        """Runs once more with the same key from the ledger's first line on, undisturbed, and compares."""
        other = beginning_of(self.run, self.run.root.with_name("undisturbed"))
        status, said = self._server("train", "--resume", "--workdir", other.root)
        assert status == 0, said
        assert_same_end(self.run, other)
        assert hidden(self.run.root) == []


def beginning_of(run: Workdir, folder: Path) -> Workdir:
    """Returns a copy of a run, in a new folder, as it was before it bought anything."""
    other = Workdir(folder)
    other.make_private()
    for old, new in ((run.config, other.config), (run.key, other.key)):
        shutil.copy(old, new)
    if run.train_archive.exists():
        shutil.copy(run.train_archive, other.train_archive)
    other.ledger.write_bytes(run.ledger.read_bytes().splitlines(keepends=True)[0])
    return other


def assert_same_end(run: Workdir, other: Workdir) -> None:
    (found, _), (expected, _) = (checkpoint.load(each.checkpoint) for each in (run, other))
    assert found.step == expected.step
    assert found.digest() == expected.digest()  # weights and moments, bit for bit
    for name in expected.ema:
        assert torch.equal(found.ema[name], expected.ema[name])
    assert found.curves == expected.curves
    assert Ledger(run.ledger).mechanisms() == Ledger(other.ledger).mechanisms()  # replayed steps were free


def hidden(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob(".*"))


def the_line(said: str) -> str:
    """Returns the one line in which a command says what is wrong."""
    lines = [line for line in said.splitlines() if line.startswith("dpdm: ")]
    assert len(lines) == 1, said
    assert lines == said.splitlines()[-1:], said
    assert "Traceback" not in said
    assert "Unexpected" not in said
    return lines[0]


class DiedError(Exception):
    """Stands for a process that dies."""


def stop_early(images: Path, folder: Path) -> Workdir:
    torch.set_num_threads(1)
    run, step, calls = Workdir(folder / "w"), train.private_step, 0
    save = checkpoint.save

    def dying(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == RESERVED:
            raise DiedError
        return step(*arguments)

    def save_all(path: Path, state: TrainState, facts: dict[str, Any]) -> None:
        save(path, state, facts)
        shutil.copy(path, folder / f"saved at {state.step}")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "private_step", dying)
        patch.setattr(checkpoint, "save", save_all)
        with pytest.raises(DiedError):
            train.train(configs.load([], [*TINY, f"data.path={images}"]), run)
    assert Ledger(run.ledger).spent("DP-SGD") == RESERVED
    assert checkpoint.load(run.checkpoint)[0].step == SAVED
    return run


def copied(run: Workdir, folder: Path) -> Workdir:
    shutil.copytree(run.root, folder / "w")
    return Workdir(folder / "w")
