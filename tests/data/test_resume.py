"""Preparation is stopped at any instant and goes on; the oracle is the run that was not stopped."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dpdm.data import prepare as prepare_module
from dpdm.data import resume
from dpdm.data.archive import ArchiveBody
from dpdm.data.prepare import prepare, prepare_with_holdout
from dpdm.errors import InputError, RunError

KEY = bytes(range(32))
COUNT = 60


@pytest.fixture
def source(tmp_path: Path) -> Path:
    random = np.random.default_rng(0)
    for index in range(COUNT):
        path = tmp_path / f"in/{'ab'[index % 2]}/{index:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (6, 6, 3), np.uint8)).save(path)
    return tmp_path / "in"


class StoppedError(BaseException):
    """As Ctrl-C is: no Exception."""


def stop_after(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Makes the preparation stop in the middle of writing record ``count``, which is left half written."""
    real, done = ArchiveBody.add, iter(range(10**9))

    def add(self: ArchiveBody, png: bytes, label: int | None) -> None:
        if next(done) == count:
            real(self, png, label)
            self.file.flush()
            self.file.truncate(self.file.tell() - len(png) // 2)
            raise StoppedError
        real(self, png, label)

    monkeypatch.setattr(ArchiveBody, "add", add)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("count", [0, 1, 16, 37, COUNT - 1])
def test_stopped_anywhere_it_ends_with_the_same_bytes(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], count: int
) -> None:
    prepare(str(source), tmp_path / "whole/a.zip")
    with monkeypatch.context() as patch:
        stop_after(patch, count)
        with pytest.raises(StoppedError):
            prepare(str(source), tmp_path / "out/a.zip")
    assert names(tmp_path / "out") == [".a.zip.journal", ".a.zip.partial"]
    capsys.readouterr()
    loaded = []
    real = prepare_module._Recipe.load
    monkeypatch.setattr(prepare_module._Recipe, "load", lambda self, n, i: loaded.append(i) or real(self, n, i))
    prepare(str(source), tmp_path / "out/a.zip")
    assert names(tmp_path / "out") == ["a.zip"]
    assert (tmp_path / "out/a.zip").read_bytes() == (tmp_path / "whole/a.zip").read_bytes()
    # The first one is decoded again, for the size that all must have.
    assert sorted(loaded) == [*([0] if count else []), *range(count, COUNT)]
    assert (f"going on after {count} of {COUNT}" in capsys.readouterr().err) == (count > 0)


@pytest.mark.parametrize("count", [1, 30, 45])
def test_both_sides_go_on(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    def run(folder: str) -> list[bytes]:
        dests = [tmp_path / folder / name for name in ("train.zip", "holdout.zip")]
        prepare_with_holdout(str(source), *dests, holdout_key=KEY, fraction=0.4, overwrite=True)
        assert names(tmp_path / folder) == ["holdout.zip", "train.zip"]
        return [dest.read_bytes() for dest in dests]

    whole = run("whole")
    with monkeypatch.context() as patch:
        stop_after(patch, count)
        with pytest.raises(StoppedError):
            run("out")
    assert run("out") == whole


def test_whatever_was_lost_it_ends_with_the_same_bytes(tmp_path: Path, source: Path) -> None:
    """Cuts and zeros in any of the unfinished files, as after a power failure."""
    whole = [tmp_path / f"whole/{name}.zip" for name in ("train", "holdout")]
    prepare_with_holdout(str(source), *whole, holdout_key=KEY, fraction=0.4)
    dests = [tmp_path / f"out/{name}.zip" for name in ("train", "holdout")]
    unfinished = [
        resume._beside(dests[0], "partial"),
        resume._beside(dests[1], "partial"),
        resume._beside(dests[0], "journal"),
    ]
    journal = stopped_journal(tmp_path, source)
    random = np.random.default_rng(0)
    for _ in range(12):
        for path, content in zip(unfinished, [*(path.read_bytes() for path in whole), journal], strict=True):
            cut = int(random.integers(len(content) + 1))
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content[:cut] + bytes(int(random.integers(2)) * (len(content) - cut)))
        prepare_with_holdout(str(source), *dests, holdout_key=KEY, fraction=0.4, overwrite=True)
        assert [path.read_bytes() for path in dests] == [path.read_bytes() for path in whole]
        assert names(tmp_path / "out") == ["holdout.zip", "train.zip"]


def stopped_journal(tmp_path: Path, source: Path) -> bytes:
    """Returns the journal as it is when everything is written and nothing renamed."""
    dests = [tmp_path / f"j/{name}.zip" for name in ("train", "holdout")]

    def stop(*_: object) -> None:
        raise StoppedError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ArchiveBody, "finish", stop)
        with pytest.raises(StoppedError):
            prepare_with_holdout(str(source), *dests, holdout_key=KEY, fraction=0.4)
    journal = resume._beside(dests[0], "journal").read_bytes()
    assert len(journal) == 65 + COUNT
    return journal


@pytest.mark.parametrize(
    ("change", "options"),
    [
        ("resolution", {"resolution": 3}),
        ("transform", {"transform": "center-crop"}),
        ("content", {}),
        ("time", {}),
        ("more", {}),
        ("pillow", {}),
    ],
)
def test_after_a_change_it_begins_anew(
    tmp_path: Path,
    source: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    change: str,
    options: dict,
) -> None:
    with monkeypatch.context() as patch:
        stop_after(patch, 40)
        with pytest.raises(StoppedError):
            prepare(str(source), tmp_path / "out/a.zip")
    if change == "content":
        Image.new("RGB", (6, 6)).save(source / "a/000.png")
    elif change == "time":
        os.utime(source / "b/059.png", ns=(1, 1))
    elif change == "more":
        Image.new("RGB", (6, 6)).save(source / "a/000x.png")
    elif change == "pillow":
        monkeypatch.setattr("PIL.__version__", "0.0")
    prepare(str(source), tmp_path / "out/a.zip", **options)
    assert "anew" in capsys.readouterr().err
    prepare(str(source), tmp_path / "whole/a.zip", **options)
    assert (tmp_path / "out/a.zip").read_bytes() == (tmp_path / "whole/a.zip").read_bytes()


def test_bad_images_are_all_named_after_going_on_too(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a/058.png", "b/001.png", "b/059.png"):
        (source / name).write_bytes(b"")
    with monkeypatch.context() as patch:
        stop_after(patch, 20)
        with pytest.raises(StoppedError):
            prepare(str(source), tmp_path / "out/a.zip")
    Image.new("RGB", (7, 7)).save(source / "b/003.png")
    with pytest.raises(InputError, match=r"3 images cannot be used.*6x6 .a/000.png., 7x7 .b/003.png.") as caught:
        prepare(str(source), tmp_path / "out/a.zip")
    assert all(name in str(caught.value) for name in ("a/058.png", "b/001.png", "b/059.png"))
    assert names(tmp_path / "out") == []


def test_a_full_disk_keeps_what_is_done(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        real = resume.Unfinished.flush
        count = iter(range(100))

        def flush(self: resume.Unfinished) -> None:
            real(self)
            if next(count) == 2:
                raise OSError(28, "No space left on device")

        patch.setattr(resume.Unfinished, "flush", flush)
        with pytest.raises(RunError, match=r"No space left.*goes on"):
            prepare(str(source), tmp_path / "out/a.zip")
    assert not (tmp_path / "out/a.zip").exists()
    prepare(str(source), tmp_path / "whole/a.zip")
    prepare(str(source), tmp_path / "out/a.zip")
    assert (tmp_path / "out/a.zip").read_bytes() == (tmp_path / "whole/a.zip").read_bytes()


def test_two_processes_do_not_write_one_archive(tmp_path: Path, source: Path) -> None:
    dest = tmp_path / "out/a.zip"
    dest.parent.mkdir()
    with resume._locked(resume._beside(dest, "partial"), dest):
        with pytest.raises(InputError, match="no other process"):
            prepare(str(source), dest)
        assert names(dest.parent) == [".a.zip.partial"]
    prepare(str(source), dest)


PROGRAM = """
import sys, time
from pathlib import Path
from dpdm.data import prepare as module
real = module._Recipe.load
def slow(self, number, index):
    time.sleep(0.01)
    return real(self, number, index)
module._Recipe.load = slow
module.prepare(sys.argv[1], Path(sys.argv[2]), resolution=4)
"""


def test_a_killed_process_goes_on(tmp_path: Path, source: Path) -> None:
    prepare(str(source), tmp_path / "whole/a.zip", resolution=4)
    command = [sys.executable, "-c", PROGRAM, str(source), str(tmp_path / "out/a.zip")]
    partial = tmp_path / "out/.a.zip.partial"
    for least in (1, 2500):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        for _ in range(2000):
            if partial.exists() and partial.stat().st_size >= least:
                break
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert not (tmp_path / "out/a.zip").exists()
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "going on after" in result.stderr
    assert (tmp_path / "out/a.zip").read_bytes() == (tmp_path / "whole/a.zip").read_bytes()
