"""CIFAR-10's tar, built by hand in the published files' layout: pickles of protocol 2 as Python 2 wrote them."""

import io
import os
import pickle
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.cifar_file import batch, meta, tar

from dpdm.data import cifar, download
from dpdm.data.cifar import cifar_splits
from dpdm.data.pickles import read_pickle
from dpdm.data.prepare import prepare, prepare_with_holdout
from dpdm.data.sources import open_source
from dpdm.errors import InputError


def batches() -> dict[str, tuple[NDArray[np.uint8], list[int]]]:
    random = np.random.default_rng(0)
    found = {}
    for index, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        count = 3 + index
        found[name] = random.integers(0, 256, (count, 3072), np.uint8), random.integers(0, 3, count).tolist()
    return found


def files(**changes: bytes) -> dict[str, bytes]:
    content = {name: batch(*found) for name, found in batches().items()}
    content |= {"batches.meta": meta(), "readme.html": b"<html>"} | changes
    return {f"cifar-10-batches-py/{name}": value for name, value in content.items()}


def test_the_bytes_made_by_hand_are_what_pickle_understands() -> None:
    """Otherwise this file would test our reader against itself."""
    pixels, labels = batches()["data_batch_1"]
    for order in ("data first", "data last"):
        value = pickle.loads(batch(pixels, labels, order=order), encoding="bytes")
        np.testing.assert_array_equal(value[b"data"], pixels)
        assert value[b"labels"] == labels
        found = read_pickle(batch(pixels, labels, order=order))
        np.testing.assert_array_equal(found.pop(b"data"), value.pop(b"data"))
        assert found == value
    assert read_pickle(meta()) == pickle.loads(meta(), encoding="bytes")


def test_splits_labels_and_pixels(tmp_path: Path) -> None:
    path = tar(tmp_path / "cifar-10-python.tar.gz", files())
    splits = open_source(str(path))
    assert list(splits) == ["train", "holdout"]
    known = batches()
    for split, parts in {"train": [f"data_batch_{i}" for i in range(1, 6)], "holdout": ["test_batch"]}.items():
        rows = np.concatenate([known[name][0] for name in parts])
        found = splits[split]
        assert found.num_images == len(rows)
        assert [found.label(i) for i in range(len(rows))] == [label for name in parts for label in known[name][1]]
        assert found.class_names == ["airplane", "automobile", "bird"]
        for index, row in enumerate(rows):
            content = np.asarray(found.read(index))
            # Red, green and blue planes of 32 rows of 32.
            assert [content[5, 7, c] for c in range(3)] == [row[c * 1024 + 5 * 32 + 7] for c in range(3)]
    assert splits["train"].names[3] == "data_batch_2[0]"


def test_prepared_it_is_an_archive_with_its_own_holdout(tmp_path: Path) -> None:
    path = str(tar(tmp_path / "cifar-10-python.tar.gz", files()))
    train, held_out = prepare_with_holdout(path, tmp_path / "t.zip", tmp_path / "h.zip", holdout_key=bytes(32))
    rows = np.concatenate([pixels for name, (pixels, _) in batches().items() if name != "test_batch"])
    np.testing.assert_array_equal(train.read(np.arange(len(rows))), rows.reshape(-1, 3, 32, 32))
    assert (train.num_classes, held_out.num_images) == (3, 8)
    assert prepare(path, tmp_path / "h2.zip", split="holdout").fingerprint() == held_out.fingerprint()


class _Hostile:
    def __reduce__(self) -> tuple:
        return os.system, ("touch executed",)


def chained() -> bytes:
    """Reaches os.system by attributes of harmless modules, as pickle scanners overlook."""
    return b"\x80\x04\x8c\x08builtins\x8c\x07getattr\x93\x8c\x02os\x8c\x06system\x86R."


PIXELS = np.zeros((2, 3072), np.uint8)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps(_Hostile(), 2), "(posix|nt) system"),
        (pickle.dumps(_Hostile(), 0), "(posix|nt) system"),
        (pickle.dumps(_Hostile(), 4), "FRAME"),
        (chained(), "SHORT_BINUNICODE"),
        (b"\x80\x02c__builtin__\neval\n(U\x011tR.", "__builtin__ eval"),
        (b"\x80\x02cnumpy.core.multiarray\nfromfile\n.", "fromfile"),
        (b"\x80\x02(cos\nsystem\nU\x01xo.", "os system|OBJ"),
        (b"(ios\nsystem\n.", "INST"),
        (b"\x80\x02U\x01xQ.", "BINPERSID"),
        (b"\x80\x02\x82\x01.", "EXT1"),
        (b"\x80\x02cnumpy\nndarray\n)\x81.", "NEWOBJ"),
        (b"\x80\x02cnumpy\nndarray\n)RU\x01xb.", "not of plain bytes"),
        (b"\x80\x02}U\x01xb.", "damaged"),
        (b"\x80\x02cnumpy\ndtype\nU\x01xb.", "damaged"),
        (b"\x80\x02](h\x07e.", "damaged"),
        (b"\x80\x02e.", "damaged"),
        (b"\x80\x02K\x01K\x02.", "values to unpack"),
        (b"\x80\x02.", "values to unpack"),
        (b"", "pickle exhausted"),
        (b"\x80\x02T\xff\xff\xff\x7fabc.", "2147483647"),
        (batch(PIXELS, [0, 1])[:-200], "pickle exhausted|remain"),
        (batch(PIXELS, [0, 1]).replace(b"U\x02u1", b"U\x02O8"), "plain bytes"),
        (batch(PIXELS, [0, 1]).replace(b"M\x00\x0c", b"M\x01\x0c"), "reshape"),
        (batch(PIXELS, [0, 3]), "labels from 0 to 2"),
        (batch(PIXELS, [0]), "a label for each of 2"),
        (batch(PIXELS[:, :3000], [0, 1]), "3072"),
        (meta(), "3072"),
        (b"\x80\x02K\x01.", "dictionary"),
        (b"\x80\x02]q\x01h\x01a.", "dictionary"),  # a list that holds itself
    ],
)
def test_a_hostile_or_damaged_pickle_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tar(tmp_path / "c.tar.gz", files(data_batch_3=content))
    before = sorted(tmp_path.iterdir())
    with pytest.raises(InputError, match=message) as caught:
        cifar_splits(path)
    assert "data_batch_3" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("step", [1, 7])
def test_any_cut_or_flip_is_refused_or_harmless(step: int) -> None:
    content = batch(np.arange(12, dtype=np.uint8).reshape(4, 3), [0, 1, 2, 1])
    for position in range(0, len(content), step):
        for case in (
            content[:position],
            content[:position] + bytes([content[position] ^ step]) + content[position + 1 :],
        ):
            try:
                read_pickle(case)
            except ValueError:
                continue


def test_a_memo_of_4_billion_entries_costs_nothing() -> None:
    """Python's own unpickler would allocate 64 GiB for it."""
    assert read_pickle(b"\x80\x02K\x07r\xff\xff\xff\xff.") == 7


def test_nothing_is_extracted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    odd = {"../escaped": b"1", "/tmp/dpdm-escaped": b"2", "cifar-10-batches-py/../../x": b"3"}
    path = tar(tmp_path / "c.tgz", files() | odd, links={"cifar-10-batches-py/link": "/etc/passwd"})
    assert list(cifar_splits(path)) == ["train", "holdout"]
    assert list(tmp_path.iterdir()) == [path]
    assert not (tmp_path.parent / "escaped").exists()


def test_a_link_in_place_of_a_batch_is_refused(tmp_path: Path) -> None:
    members = files()
    target = members.pop("cifar-10-batches-py/test_batch")
    secret = tmp_path / "secret"
    secret.write_bytes(target)
    for kind in (str(secret), "data_batch_1"):
        path = tar(tmp_path / "c.tar", members, links={"cifar-10-batches-py/test_batch": kind})
        with pytest.raises(InputError, match="test_batch is a link"):
            cifar_splits(path)
    with tarfile.open(tmp_path / "twice.tar", "w") as file:
        for content in (target, target):
            info = tarfile.TarInfo("cifar-10-batches-py/test_batch")
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    with pytest.raises(InputError, match=r"twice\.tar: cifar-10-batches-py/test_batch is a link, or is there twice"):
        cifar_splits(tmp_path / "twice.tar")


def test_another_or_damaged_tar_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="CIFAR-10's Python version alone"):
        cifar_splits(tar(tmp_path / "other.tar.gz", {"images/1.png": b"x"}))
    whole = tar(tmp_path / "c.tar.gz", files()).read_bytes()
    for content in (b"", b"text", whole[: len(whole) // 2], whole[:-9], whole[:5000] + b"x" * 50 + whole[5050:]):
        (tmp_path / "c.tar.gz").write_bytes(content)
        with pytest.raises(InputError, match=r"download it again|expected cifar"):
            cifar_splits(tmp_path / "c.tar.gz")
    monkeypatch.setattr(cifar, "MAX_BYTES", 10_000)
    (tmp_path / "c.tar.gz").write_bytes(whole)
    with pytest.raises(InputError, match="at most 10000"):
        cifar_splits(tmp_path / "c.tar.gz")


def test_the_name_fetches_the_published_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def fetch_file(path: Path, urls: tuple[str, ...], checksum: str, *, max_bytes: int, remedy: str) -> Path:
        asked.append(SimpleNamespace(path=path, urls=urls, checksum=checksum, max_bytes=max_bytes, remedy=remedy))
        path.parent.mkdir()
        return tar(path, files())

    monkeypatch.setattr(download, "fetch_file", fetch_file)
    assert open_source("cifar10", cache_dir=tmp_path)["holdout"].num_images == 8
    (request,) = asked
    assert request.path == tmp_path / "cifar10/cifar-10-python.tar.gz"
    assert request.urls == ("https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",)
    assert request.checksum == "sha256:6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce"
    assert request.max_bytes == 170498071
    assert "cifar-10-python.tar.gz" in request.remedy
