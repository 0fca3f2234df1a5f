"""Kills, full disks, damaged and exchanged files, moved clocks: nothing is lost but unsaved steps, and epsilon is never
under-reported.

Commands run in forks of one process, see ``fault_server.py``. The oracle is the same run (same key, same images), never
disturbed: a run that was must end on the same bits.
"""

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests.made_release import make_release

from dpdm import checkpoint, train
from dpdm import config as configs
from dpdm.checkpoint import TrainState
from dpdm.cli import run_command
from dpdm.errors import RunError
from dpdm.privacy.accounting import epsilon_spent
from dpdm.privacy.ledger import Ledger
from dpdm.verify import verify
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
Flip = Callable[[bytes], bytes]


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


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"))
    yield server
    server.close()


def write_images(folder: Path, seed: int = 0) -> Path:
    noise = np.random.default_rng(seed)
    for index in range(40):
        path = folder / "ab"[index % 2] / f"{index:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise.integers(0, 256, (8, 8), np.uint8)).save(path)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images") / "in")


class Chain:
    """One run that faults strike again and again: the same command goes on, until it is done."""

    def __init__(self, server: Server, root: Path, source: str, overrides: tuple[str, ...] = TINY) -> None:
        self.run, self._server = Workdir(root / "w"), server
        self._draws, self._keys = root / "draws", ["--", f"data.path={source}", *overrides]

    def go_on(self, **fault: Any) -> tuple[int, str]:
        resume = ["--resume"] if self.run.ledger.exists() else []
        command = ["train", "--workdir", self.run.root, *resume, *self._keys]
        status, said = self._server(*command, draws=str(self._draws), **fault)
        self.check_accounted()
        return status, said

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
        other = Workdir(self.run.root.with_name("undisturbed"))
        other.make_private()
        for old, new in ((self.run.config, other.config), (self.run.key, other.key)):
            shutil.copy(old, new)
        if self.run.train_archive.exists():
            shutil.copy(self.run.train_archive, other.train_archive)
        other.ledger.write_bytes(self.run.ledger.read_bytes().splitlines(keepends=True)[0])
        status, said = self._server("train", "--resume", "--workdir", other.root)
        assert status == 0, said
        assert_same_end(self.run, other)
        assert hidden(self.run.root) == []


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


# Kills


def test_a_run_that_is_killed_again_and_again_ends_on_the_same_bits(
    server: Server, images: Path, tmp_path: Path
) -> None:
    chain = Chain(server, tmp_path, str(images))
    for number, how in KILLS:
        assert chain.go_on(kill=number, how=how)[0] == KILLED
    status, said = chain.go_on()
    assert status == 0, said
    chain.check_ended_as_undisturbed()


# In turn: the archive is written, not renamed; the key; the ledger; half of its first purchase; of the first
# checkpoint; of a step's purchase; of the next checkpoint; it has its name, its folder is not synced; a step is bought,
# not drawn.
KILLS = (
    (13, "before"),
    (23, "before"),
    (32, "before"),
    (37, "half"),
    (10, "half"),
    (12, "half"),
    (19, "half"),
    (14, "after"),
    (18, "after"),
)


@pytest.mark.slow
def test_fifty_kills_at_random_moments(server: Server, tmp_path: Path) -> None:
    """Half of them at a random time, half at a random write; runs on real digits, as many as it takes."""
    overrides = (*TINY, "train.num_iterations=24", "train.expected_batch_size=60", "train.checkpoint_every=5")
    chance, kills, chains = random.Random(0), 0, 0
    while kills < 50:
        chains += 1
        chain = Chain(server, tmp_path / str(chains), "digits", overrides)
        whole_run = 3.0
        done = False
        while not done:
            if kills % 2:
                status, said = chain.go_on(kill=chance.randint(1, 60), how=chance.choice(["before", "half", "after"]))
            else:
                status, said = chain.go_on(seconds=chance.uniform(0, whole_run))
            assert status in (0, KILLED), said
            done = status == 0
            kills += not done
        chain.check_ended_as_undisturbed()
    print(f"{kills} kills of {chains} runs")


@pytest.mark.slow
def test_kills_at_every_write_one_after_the_other(server: Server, images: Path, tmp_path: Path) -> None:
    """The n-th process dies at its n-th write: all of a start, then step by step."""
    for how in ("before", "half", "after"):
        chain, number, status, said = Chain(server, tmp_path / how, str(images)), 0, KILLED, ""
        while status == KILLED:
            number += 1
            status, said = chain.go_on(kill=number, how=how)
        assert status == 0, said
        assert number > 20
        chain.check_ended_as_undisturbed()
        print(f"{number - 1} kills {how} a write")


def test_preparing_that_is_killed_ends_with_the_same_bytes(server: Server, images: Path, tmp_path: Path) -> None:
    assert server("prepare", images, tmp_path / "whole.zip")[0] == 0
    number, status = 0, KILLED
    while status == KILLED:
        number += 1
        dest = tmp_path / "out" / "a.zip"
        status, _ = server("prepare", images, dest, kill=number, how="after")
        if status == KILLED and dest.exists():  # killed when all was done
            break
    assert number > 5
    assert (tmp_path / "out" / "a.zip").read_bytes() == (tmp_path / "whole.zip").read_bytes()
    assert hidden(tmp_path / "out") == []


def test_sampling_that_is_killed_leaves_nothing_for_good(server: Server, tmp_path: Path) -> None:
    make_release(tmp_path)
    command = ["sample", "--workdir", tmp_path, "--", "sampler.num_images=6", "sampler.num_steps=2"]
    for number, how in ((4, "after"), (9, "after"), (13, "before")):
        assert server(*command, kill=number, how=how)[0] == KILLED
        assert not (tmp_path / "samples").exists()
    assert hidden(tmp_path) == [".samples.tmp"]
    status, said = server(*command)
    assert status == 0, said
    assert hidden(tmp_path) == []
    assert len(list((tmp_path / "samples").glob("0*.png"))) == 6
    assert (tmp_path / "synthetic.zip").exists()


def test_a_release_that_is_killed_appears_whole_or_not_at_all(server: Server, stopped: Workdir, tmp_path: Path) -> None:
    run, number = copied(stopped, tmp_path), 0
    while not run.release.exists():
        number += 3
        status, said = server("release", "--workdir", run.root, kill=number, how="after")
        assert status == KILLED, (number, said)
    assert verify(run.release).problems == []
    status, said = server("release", "--workdir", run.root)
    assert status == 2
    assert "released once" in the_line(said)
    assert not run.key.exists()
    assert hidden(run.root) == []


@pytest.mark.slow
def test_the_whole_way_under_kills(server: Server, images: Path, tmp_path: Path) -> None:
    keys = [key for key in TINY if "noise_multiplier" not in key or "warmup" in key]
    run, chance, kills, status, said = Workdir(tmp_path / "w"), random.Random(0), 0, KILLED, ""
    command = ["synthesize", images, "--epsilon", 1, "--workdir", run.root, "--num-images", 8, "--", *keys]
    while status == KILLED:
        fault = {"kill": chance.randint(1, 20 + 10 * kills), "how": chance.choice(["before", "half", "after"])}
        status, said = server(*command, "sampler.num_steps=2", "train.num_epochs=null", **fault)
        kills += status == KILLED
    assert (run.shareable.exists(), kills > 5) == (True, True), said
    print(f"{kills} kills")
    assert verify(run.release).problems == []
    assert Ledger(run.ledger).spent("DP-SGD") == STEPS
    assert hidden(run.root) == []


# No room on the disk


def test_a_full_disk_is_named_and_the_run_goes_on_when_there_is_room(
    server: Server, images: Path, tmp_path: Path
) -> None:
    chain = Chain(server, tmp_path, str(images))
    for number in FULL:
        check_full(*chain.go_on(full=number), chain)
    status, said = chain.go_on()
    assert status == 0, said
    chain.check_ended_as_undisturbed()


@pytest.mark.parametrize("room", [0, 100])
def test_a_disk_that_is_full_in_the_middle_of_a_purchase(
    server: Server, stopped: Workdir, finished: Workdir, tmp_path: Path, room: int
) -> None:
    run = copied(stopped, tmp_path)
    largest = run.ledger.stat().st_size + room
    command = ["train", "--resume", "--workdir", run.root, "--", "train.checkpoint_every=100"]
    status, said = server(*command, largest=largest)
    assert status == 1
    assert f"{run.ledger}: {'No space left' if room else 'File too large'}" in the_line(said)
    assert run.ledger.stat().st_size == largest
    assert server(*command)[0] == 0
    assert_same_end(run, finished)


FULL = (2, 5, 9, 14, 20, 26, 33, 36)  # of the calls that need room


def check_full(status: int, said: str, chain: Chain) -> None:
    assert status == 1, said
    line = the_line(said)
    assert "No space left" in line, line
    assert [name for name in hidden(chain.run.root) if "train.zip" not in name] == []  # the archive's is to go on with


@pytest.mark.slow
def test_no_room_from_any_write_on(server: Server, images: Path, tmp_path: Path) -> None:
    chain, number, status = Chain(server, tmp_path, str(images)), 0, 1
    while status:
        number += 1
        status, said = chain.go_on(full=number)
        if status:
            check_full(status, said, chain)
    assert number > 20
    chain.check_ended_as_undisturbed()
    print(f"{number - 1} times no room")


@pytest.mark.slow
def test_a_small_disk(server: Server, images: Path, tmp_path: Path) -> None:
    """A real one, in memory, which grows each time that it was full."""
    disk, size = tmp_path / "disk", 8
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only root can mount a small disk")
    try:
        chain, status, times = Chain(server, disk, str(images)), 1, 0
        chain._draws = tmp_path / "draws"
        while status:
            status, said = chain.go_on()
            if status:
                check_full(status, said, chain)
                times += 1
                size += 4
                subprocess.run(["mount", "-o", f"remount,size={size}k", str(disk)], check=True)
        assert times > 5
        print(f"{times} times full")
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        chain.check_ended_as_undisturbed()
    finally:
        subprocess.run(["umount", str(disk)], check=True)


# Damage


class DiedError(Exception):
    """Stands for a process that dies."""


@pytest.fixture(scope="module")
def stopped(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Workdir:
    """A run that died two steps after its checkpoint, both reserved."""
    return stop_early(images, tmp_path_factory.mktemp("stopped"))


@pytest.fixture(scope="module")
def other(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Workdir:
    """Another run on the same images, by the same config."""
    return stop_early(images, tmp_path_factory.mktemp("other"))


@pytest.fixture(scope="module")
def finished(server: Server, stopped: Workdir, tmp_path_factory: pytest.TempPathFactory) -> Workdir:
    """How the stopped run ends if nothing happens to it."""
    run = copied(stopped, tmp_path_factory.mktemp("finished"))
    assert server("train", "--resume", "--workdir", run.root)[0] == 0
    return run


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


def flip(position: float, bit: int = 0) -> Flip:
    """Returns the change of one bit, at a part of a file's length or, from 1 on, at a byte."""

    def flipped(content: bytes) -> bytes:
        changed = bytearray(content)
        changed[int(position * len(content)) if position < 1 else int(position)] ^= 1 << bit
        return bytes(changed)

    return flipped


def cut(part: float) -> Flip:
    return lambda content: content[: int(part * len(content))]


def cut_before(words: bytes) -> Flip:
    return lambda content: content[: content.index(words)]


def put(old: bytes, new: bytes) -> Flip:
    return lambda content: content.replace(old, new, 1)


DAMAGE: list[tuple[str, str, Flip]] = [
    ("ledger.jsonl", "cut in the header", cut(0.1)),
    ("ledger.jsonl", "cut before what the checkpoint knows of", cut(0.4)),
    ("ledger.jsonl", "emptied", cut(0)),
    ("ledger.jsonl", "a bit of the header", flip(40)),
    ("ledger.jsonl", "a bit in the middle", flip(0.6)),
    ("ledger.jsonl", "a bit of the last line", flip(0.98)),
    ("ledger.jsonl", "less in the last line", lambda content: put(b"0.02", b"0.08")(content[::-1])[::-1]),
    ("checkpoint.safetensors", "cut", cut(0.5)),
    ("checkpoint.safetensors", "emptied", cut(0)),
    ("checkpoint.safetensors", "a bit of its header", flip(60)),
    ("checkpoint.safetensors", "a bit of a weight", flip(0.9)),
    ("key", "cut", cut(0.5)),
    ("key", "another digit", lambda content: bytes([content[0] ^ 1]) + content[1:]),
    ("key", "no digit", flip(7, bit=6)),
    ("config.yaml", "cut between sections", cut_before(b"optim:")),
    ("config.yaml", "cut in a section", cut_before(b"  warmup:")),
    ("config.yaml", "emptied", cut(0)),
    ("config.yaml", "no text", flip(0.5, bit=7)),
    ("config.yaml", "less noise", put(b"noise_multiplier: 20", b"noise_multiplier: 10")),
    ("train.zip", "cut", cut(0.7)),
    ("train.zip", "emptied", cut(0)),
    ("train.zip", "a bit of an image", flip(0.3)),
    ("train.zip", "a bit of the labels", lambda content: flip(content.index(b"labels") + 20.0)(content)),
]


def place(run: Workdir, name: str) -> Path:
    return run.root / name if name == "config.yaml" else run.private / name


def resume(run: Workdir, capfd: pytest.CaptureFixture[str]) -> tuple[int, str]:
    capfd.readouterr()
    return run_command(["train", "--resume", "--workdir", str(run.root)]), capfd.readouterr().err


@pytest.mark.parametrize(("name", "what", "change"), DAMAGE, ids=[f"{name}: {what}" for name, what, _ in DAMAGE])
def test_damage_is_named_in_one_line(
    stopped: Workdir, tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str, what: str, change: Flip
) -> None:
    run = copied(stopped, tmp_path)
    path, before = place(run, name), place(stopped, name).read_bytes()
    damaged = change(before)
    assert damaged != before
    path.write_bytes(damaged)
    ledger = run.ledger.read_bytes()
    status, said = resume(run, capfd)
    assert status in (1, 2)
    assert name in the_line(said)
    assert len(said.splitlines()) == 1
    if "cut" not in what:
        assert run.ledger.read_bytes() == ledger
    assert_release_tells_all(run, capfd)


def assert_release_tells_all(run: Workdir, capfd: pytest.CaptureFixture[str]) -> None:
    """Refused in one line, or with a statement of all that is in the released weights."""
    if run_command(["release", "--workdir", str(run.root)]) != 0:
        the_line(capfd.readouterr().err)
        assert not run.release.exists()
        return
    statement = json.loads((run.release / "privacy.json").read_text(encoding="utf-8"))
    bought = {m["name"]: (m["num_steps"], m["noise_multiplier"]) for m in statement["mechanisms"]}
    assert bought == {"DP-SGD": (RESERVED, 20.0), "central images": (1, 20.0)}


@pytest.mark.parametrize("name", ["ledger.jsonl", "checkpoint.safetensors", "key"])
def test_another_runs_file_is_refused(
    stopped: Workdir, other: Workdir, tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str
) -> None:
    """Of a run on the same images by the same config."""
    run = copied(stopped, tmp_path)
    shutil.copy(place(other, name), place(run, name))
    status, said = resume(run, capfd)
    assert status in (1, 2)
    assert name.partition(".")[0] in the_line(said)
    assert "one of the two is another run's" in said


def test_other_images_and_another_runs_config_are_refused(
    stopped: Workdir, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run, alike = copied(stopped, tmp_path / "a"), copied(stopped, tmp_path / "b")
    prepared = tmp_path / "other.zip"
    assert run_command(["prepare", str(write_images(tmp_path / "in", seed=1)), str(prepared)]) == 0
    shutil.copy(prepared, run.train_archive)
    assert "Expected the images with which the run" in the_line(resume(run, capfd)[1])
    text = alike.config.read_text()
    alike.config.write_text(text.replace("learning_rate: 0.0003", "learning_rate: 0.0004"))
    assert "Expected the config with which the run" in the_line(resume(alike, capfd)[1])


def test_a_ledger_older_than_the_checkpoint_is_refused(
    stopped: Workdir, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    lines = stopped.ledger.read_bytes().splitlines(keepends=True)  # header, central images, then the steps
    assert len(lines) == 2 + RESERVED
    for kept in range(1, len(lines)):
        run = copied(stopped, tmp_path / str(kept))
        run.ledger.write_bytes(b"".join(lines[:kept]))
        if kept < 2 + SAVED:
            assert "ledger.jsonl" in the_line(resume(run, capfd)[1])
            assert run_command(["release", "--workdir", str(run.root)]) == 1


@pytest.mark.parametrize(
    "what",
    ["the checkpoint is older", "no checkpoint", "the ledger lost steps that were never saved", "no archive"],
)
def test_what_can_be_made_good_is(
    stopped: Workdir, finished: Workdir, tmp_path: Path, capfd: pytest.CaptureFixture[str], what: str
) -> None:
    run = copied(stopped, tmp_path)
    if what == "the checkpoint is older":
        shutil.copy(stopped.root.parent / "saved at 0", run.checkpoint)
    elif what == "no checkpoint":
        run.checkpoint.unlink()
    elif what == "no archive":
        run.train_archive.unlink()
    else:
        run.ledger.write_bytes(run.ledger.read_bytes()[:-100])
    status, said = resume(run, capfd)
    assert status == 0
    assert ("found none: 4 steps are done again" in said) == (what == "no checkpoint")
    assert_same_end(run, finished)


def test_a_bit_of_a_checkpoint_changes_nothing_or_is_noticed(stopped: Workdir, tmp_path: Path) -> None:
    content = stopped.checkpoint.read_bytes()
    expected, facts = checkpoint.load(stopped.checkpoint)
    chance, noticed = random.Random(0), 0
    header = 8 + int.from_bytes(content[:8], "little")
    for _ in range(100):
        position = chance.randrange(header) if chance.random() < 0.5 else chance.randrange(len(content))
        (tmp_path / "damaged").write_bytes(flip(float(max(1, position)), chance.randrange(8))(content))
        try:
            state, found = checkpoint.load(tmp_path / "damaged")
        except RunError:
            noticed += 1
            continue
        assert (state.digest(), found, state.curves) == (expected.digest(), facts, expected.curves)
        assert all(torch.equal(state.ema[name], expected.ema[name]) for name in expected.ema)
    assert noticed > 75


# Two at once, and clocks


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
