"""Damaged, exchanged and rolled back files: refused in one line, or the same bits."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.faults.struck import RESERVED, SAVED, assert_same_end, copied, the_line, write_images

from dpdm import checkpoint
from dpdm.cli import run_command
from dpdm.errors import RunError
from dpdm.workdir import Workdir

Flip = Callable[[bytes], bytes]


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
