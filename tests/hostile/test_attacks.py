"""Each attack that has a name, once, through the command that would meet it; what it is after must not happen."""

import gzip
import io
import os
import pickle
import struct
import subprocess
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file
from tests.hostile.given import make_cifar
from tests.hostile.harness import Sandbox, stopped_before_the_work
from tests.made_release import KEYS, edit, hash_again, png_chunk

from dpdm.cli import run_command
from dpdm.data.zips import CENTRAL, END, LOCAL

PREPARE = ("prepare", "@work/a.zip", "@work/new.zip")
GIGABYTES = 4 * 2**30 - 2**20


@pytest.fixture
def box(given: Path, tmp_path: Path) -> Iterator[Sandbox]:
    with stopped_before_the_work():
        yield Sandbox(tmp_path, given)


def refused(box: Sandbox, hint: str, *words: object, status: int = 2) -> None:
    outcome = box.attempt(*words)
    assert not outcome.problems, str(outcome)
    assert outcome.status == status, str(outcome)
    assert hint in outcome.told, str(outcome)
    assert "Not enough memory" not in outcome.err
    assert not [path for path in box.work.iterdir() if path.name.startswith("new")]


def a_png(width: int = 8, height: int = 8, pixels: bytes | None = None) -> bytes:
    """Returns a grey PNG that says it is so large."""
    raw = b"".join(b"\0" + bytes(width) for _ in range(height)) if pixels is None else pixels
    head = struct.pack(">2L5B", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + png_chunk(b"IHDR", head)
        + png_chunk(b"IDAT", zlib.compress(raw))
        + png_chunk(b"IEND", b"")
    )


def a_zip(path: Path, members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as file:
        for name, content in members.items():
            file.writestr(name, content)
    return path


def packed(head: bytes, zeros: int) -> bytes:
    """Returns a deflate stream of ``head`` and so many zeros, without taking the time to pack them."""
    stream = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    first = stream.compress(head) + stream.flush(zlib.Z_FULL_FLUSH)
    megabyte = stream.compress(bytes(2**20)) + stream.flush(zlib.Z_FULL_FLUSH)
    rest = stream.compress(bytes(zeros % 2**20)) + stream.flush()
    return first + megabyte * (zeros // 2**20) + rest


def a_bomb(heads: dict[str, bytes], zeros: int) -> bytes:
    """Returns a zip whose members are ``heads``, each before so many zeros; its checksums are wrong."""
    local, central = b"", b""
    for name, head in heads.items():
        content, raw = packed(head, zeros), name.encode()
        sizes = (0, len(content), len(head) + zeros, len(raw))
        central += CENTRAL.pack(b"PK\1\2", 20, 3, 20, 0, 0, 8, 0, 33, *sizes, 0, 0, 0, 0, 0, len(local)) + raw
        local += LOCAL.pack(b"PK\3\4", 20, 0, 0, 8, 0, 33, *sizes, 0) + raw + content
    return local + central + END.pack(b"PK\5\6", 0, 0, len(heads), len(heads), len(central), len(local), 0)


# Zips


@pytest.mark.parametrize(
    "name", ["../escaped.png", "@root/escaped.png", "a/../../escaped.png", "a\\..\\..\\escaped.png"]
)
def test_zip_slip(name: str, box: Sandbox) -> None:
    a_zip(box.work / "a.zip", {"a/1.png": a_png(), name.replace("@root", str(box.root)): a_png()})
    refused(box, "unusable paths", *PREPARE)


def test_a_link_in_a_zip_is_a_file_of_its_targets_name(box: Sandbox) -> None:
    link = zipfile.ZipInfo("a/link.png")
    link.create_system, link.external_attr = 3, 0o120777 << 16
    with zipfile.ZipFile(box.work / "a.zip", "w") as file:
        file.writestr("a/1.png", a_png())
        file.writestr(link, str(box.given / "images" / "a" / "0.png"))
    refused(box, "a/link.png", *PREPARE)


def test_zip_bombs(box: Sandbox) -> None:
    (box.work / "a.zip").write_bytes(a_bomb({"a/1.png": a_png(), "a/2.png": b""}, 200 * 2**20))
    refused(box, "a/2.png", *PREPARE)
    a_zip(box.work / "a.zip", {"dataset.json": b'{"labels": [' + b"[]," * (30 * 2**20) + b"[]]}", "1.png": a_png()})
    refused(box, "dataset.json", *PREPARE)
    refused(box, "dataset.json", "train", "--workdir", "@work/new", "--", "data.path=@work/a.zip", *KEYS[5:])


def test_a_zip_whose_members_overlap(box: Sandbox) -> None:
    """Each of 500 members is the same megabyte; there could be millions of them."""
    path = a_zip(box.work / "a.zip", {f"{i:03}.png": b"" for i in range(500)} | {"bomb.png": os.urandom(2**20)})
    content = path.read_bytes()
    start = content.index(b"PK\1\2")
    with zipfile.ZipFile(path) as file:
        bomb = file.getinfo("bomb.png")
    entries = bytearray(content[start:])
    position = 0
    while entries[position : position + 4] == b"PK\1\2":
        struct.pack_into("<3L", entries, position + 16, bomb.CRC, bomb.compress_size, bomb.file_size)
        struct.pack_into("<L", entries, position + 42, bomb.header_offset)
        position += 46 + struct.unpack_from("<H", entries, position + 28)[0]
    path.write_bytes(content[:start] + entries)
    refused(box, "overlap", *PREPARE)


def test_a_zip_in_a_zip_is_no_image(box: Sandbox) -> None:
    a_zip(box.work / "b.zip", {"a/1.png": a_png()})
    a_zip(box.work / "a.zip", {f"a/{i}.png": (box.work / "b.zip").read_bytes() for i in range(3)})
    refused(box, "not a readable image", *PREPARE)


def test_names_that_are_thirty_thousand_folders_deep(box: Sandbox) -> None:
    a_zip(box.work / "a.zip", {f"{i}/" + "a/" * 30_000 + "1.png": a_png() for i in range(20)})
    outcome = box.attempt(*PREPARE)
    assert (outcome.problems, outcome.status) == ([], 0), str(outcome)


# Images


@pytest.mark.parametrize("side", [60_000, 2**31 - 1])
def test_an_image_that_says_it_is_huge(side: int, box: Sandbox) -> None:
    a_zip(box.work / "a.zip", {"a/1.png": a_png(), "a/2.png": a_png(side, side, b"\0" * 1000)})
    refused(box, "a/2.png", *PREPARE)


@pytest.mark.slow
def test_images_as_large_as_may_be_are_not_all_decoded_at_once(box: Sandbox) -> None:
    """80 megapixels with transparency, a gigabyte each while it is composited on black, in 100 kB."""
    written = io.BytesIO()
    Image.new("LA", (8944, 8944)).save(written, "PNG")
    for index in range(3):
        path = box.work / "large" / f"{index}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(written.getvalue())
    refused(box, "expected at most 4096", "prepare", "@work/large", "@work/new.zip")


def test_a_folder_a_thousand_levels_deep(box: Sandbox) -> None:
    root = box.work / "deep"
    here = root
    root.mkdir()
    (root / "1.png").write_bytes(a_png())
    try:
        descriptor = os.open(root, os.O_RDONLY)
        for _ in range(1100):
            os.mkdir("d", dir_fd=descriptor)
            below = os.open("d", os.O_RDONLY, dir_fd=descriptor)
            os.close(descriptor)
            descriptor = below
        os.close(descriptor)
        refused(box, "at least 2 images", "prepare", "@work/deep", "@work/new.zip")
    finally:
        subprocess.run(["rm", "-rf", here], check=True)  # shutil.rmtree calls itself for each level


def test_links_and_pipes_in_a_folder(box: Sandbox) -> None:
    folder = box.work / "images"
    folder.mkdir()
    (folder / "1.png").write_bytes(a_png())
    os.mkfifo(folder / "pipe.png")
    refused(box, "at least 2 images", "prepare", "@work/images", "@work/new.zip")
    (folder / "2.png").symlink_to(box.given / "images" / "a" / "0.png")
    (folder / "loop").symlink_to(folder)
    refused(box, "2.png, loop", "prepare", "@work/images", "@work/new.zip")


def test_names_that_would_move_the_cursor(box: Sandbox) -> None:
    for name in ("\x1b[2J\x1b]0;owned\x07.png", "a\nb.png", "\u202e.png", "é.txt\x1b[31m"):
        path = box.work / "images" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"no image")
    outcome = box.attempt("prepare", "@work/images", "@work/new.zip")
    assert (outcome.problems, outcome.status) == ([], 2), str(outcome)
    assert all(line.isprintable() for line in outcome.err.splitlines())


# Code


class Touch:
    """Unpickled by Python's own pickle, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.path}",)


def test_pickles_that_would_run_code(box: Sandbox) -> None:
    marker = box.work / "marker"
    evil = pickle.dumps({b"data": Touch(marker), b"label_names": [Touch(marker)]}, protocol=2)
    pickle.loads(evil)
    assert marker.exists()  # it would
    marker.unlink()
    (box.work / "evil.pth").write_bytes(evil)
    torch.save({"ema": Touch(marker)}, box.work / "zipped.pth")
    torch.save({"ema": Touch(marker)}, box.work / "old.pth", _use_new_zipfile_serialization=False)
    reasons = {
        "evil.pth": "nothing was loaded",
        "zipped.pth": "which could run code",
        "old.pth": "which could run code",
    }
    for name, reason in reasons.items():
        refused(
            box,
            reason,
            "release",
            "--from",
            f"@work/{name}",
            "--config",
            "@given/model.yaml",
            "--workdir",
            "@work/new",
        )
        words = ("sample", "--config", "@given/model.yaml", "--workdir", "@work/new", "--", f"model.ckpt=@work/{name}")
        refused(box, reason, *words)
    for member in ("batches.meta", "data_batch_1"):
        (box.work / "cifar.tar.gz").write_bytes(make_cifar(lambda members, name=member: members.update({name: evil})))
        refused(box, member, "prepare", "@work/cifar.tar.gz", "@work/new.zip")
    np.savez(box.work / "stats.npz", mu=np.array([Touch(marker)]), sigma=np.eye(1))
    np.savez(box.work / "images.npz", np.array([Touch(marker)]))
    refused(box, "stats.npz", "evaluate", "--fid", "@work/stats.npz", "--samples", "@given/images")
    refused(box, "images.npz", "evaluate", "--fid", "@given/stats.npz", "--samples", "@work/images.npz")
    (box.work / "a.yaml").write_text(f"data: !!python/object/apply:os.system ['touch {marker}']")
    refused(box, "a.yaml", "train", "--config", "@work/a.yaml", "--workdir", "@work/new")
    assert not marker.exists()


def test_a_pickle_whose_hash_takes_for_ever(box: Sandbox) -> None:
    """A tuple that holds a tuple twice that holds a tuple twice, fifty times over, as a dictionary's key."""
    endless = b"\x80\x02}(K\x00" + b"".join(b"q%ch%ch%c\x86" % (i, i, i) for i in range(50)) + b"K\x01u."
    (box.work / "cifar.tar").write_bytes(gzip.decompress(make_cifar(lambda m: m.update({"batches.meta": endless}))))
    refused(box, "batches.meta", "prepare", "@work/cifar.tar", "@work/new.zip")


def a_checkpoint(path: Path, content: bytes, *, old: bool) -> None:
    """Writes a pickle as the object in a checkpoint of torch's newer format, a zip, or of its older one."""
    if old:
        before = (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})
        path.write_bytes(b"".join(pickle.dumps(part, protocol=2) for part in before) + content + b"\x80\x02].")
    else:
        a_zip(path, {"x/data.pkl": content, "x/version": b"3\n", "x/byteorder": b"little"}, zipfile.ZIP_STORED)


ENDLESS = b"".join(b"q%ch%ch%c\x86" % (i, i, i) for i in range(50))  # holds what lies before it 2^50 times
DEEP = b"\x85" * 1_000_000
ORDERED = b"ccollections\nOrderedDict\n"
LARGE = b"}q\x00(" + b"".join(b"J%sN" % struct.pack("<i", i) for i in range(100_000)) + b"u"
FOR_EVER = {
    "a key": (b"}(K\x00" + ENDLESS + b"K\x01u", "more than 1000 values"),
    "one key": (b"}K\x00" + ENDLESS + b"K\x01s", "more than 1000 values"),
    "a small tuple as a key": (b"}K\x00K\x00\x86K\x01s", "other keys than texts"),
    "a deep key": (b"}()" + DEEP + b"K\x01u", "more than 1000 values"),
    "a key made by a call": (ORDERED + b"](K\x00" + ENDLESS + b"K\x01\x86e\x85R", "more than 1000 values"),
    "a storage": (b"(X\x07\0\0\0storageNK\x00" + ENDLESS + b"NNtQ", "more than 1000 values"),
    "a storage's list": (b"(X\x07\0\0\0storageN]NNtQ", "whose storage has more than"),
    "no function": (b"](K\x00" + b"".join(b"q%c](h%ch%ce" % (i, i, i) for i in range(50)) + b"e)R", "no function"),
    "no class": (b"](K\x00" + b"".join(b"q%c](h%ch%ce" % (i, i, i) for i in range(50)) + b"e)\x81", "no function"),
    "many copies": (
        b"](" + LARGE + (ORDERED + b"h\x00\x85R") * 200 + b"e",
        "more work than any checkpoint",
    ),
    "many states": (ORDERED + b")R" + LARGE + b"b" + b"h\x00b" * 200, "more work than any checkpoint"),
    "a copy of a copy": (
        b"](" + LARGE + ORDERED + b"h\x00\x85Rq\x01" + (ORDERED + b"h\x01\x85R") * 200 + b"e",
        "more work than any checkpoint",
    ),
}


@pytest.mark.parametrize("old", [False, True], ids=["zip", "old"])
@pytest.mark.parametrize("name", FOR_EVER)
def test_a_checkpoint_that_would_be_read_for_ever(name: str, old: bool, box: Sandbox) -> None:
    pickled, hint = FOR_EVER[name]
    a_checkpoint(box.work / "endless.pth", b"\x80\x02" + pickled + b".", old=old)
    words = ("release", "--from", "@work/endless.pth", "--config", "@given/model.yaml", "--workdir", "@work/new")
    refused(box, hint, *words)


def test_all_pickles_of_an_old_checkpoint_are_looked_at(box: Sandbox) -> None:
    """Five lie one behind the other; the last has the keys of the storages."""
    parts = [pickle.dumps(part, protocol=2) for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}, {}, [])]
    endless = b"\x80\x02}(K\x00" + ENDLESS + b"K\x01u."
    words = ("release", "--from", "@work/endless.pth", "--config", "@given/model.yaml", "--workdir", "@work/new")
    for index in range(len(parts)):
        (box.work / "endless.pth").write_bytes(b"".join([*parts[:index], endless, *parts[index + 1 :]]))
        refused(box, "more than 1000 values", *words)


# Files of numbers


def test_gzip_and_tar_bombs(box: Sandbox) -> None:
    folder = box.work / "idx"
    folder.mkdir()
    (folder / "train-labels-idx1-ubyte").write_bytes(struct.pack(">2L", 0x801, 2) + b"\0\1")
    for shape, hint in (((2, 8, 8), "got more"), ((2, 40_000, 40_000), "its header names")):
        content = struct.pack(">4L", 0x803, *shape)
        (folder / "train-images-idx3-ubyte.gz").write_bytes(b"\x1f\x8b\x08" + bytes(7) + packed(content, GIGABYTES))
        refused(box, hint, "prepare", "@work/idx", "@work/new.zip")
    (box.work / "cifar.tar.gz").write_bytes(b"\x1f\x8b\x08" + bytes(7) + packed(b"", GIGABYTES))
    refused(box, "expected a tar of at most", "prepare", "@work/cifar.tar.gz", "@work/new.zip")


def test_a_tar_of_links_and_of_too_many_files(box: Sandbox) -> None:
    for links in (True, False):
        with tarfile.open(box.work / "cifar.tar", "w") as file:
            for index in range(1 if links else 2000):
                info = tarfile.TarInfo("cifar-10-batches-py/batches.meta" if links else f"x{index}")
                info.type, info.linkname = (tarfile.SYMTYPE, "/etc/passwd") if links else (tarfile.REGTYPE, "")
                file.addfile(info)
        refused(box, "cifar.tar", "prepare", "@work/cifar.tar", "@work/new.zip")


def test_an_npz_bomb(box: Sandbox) -> None:
    """A head that says 8 terabytes, before nothing and before gigabytes."""
    written = io.BytesIO()
    np.lib.format.write_array_header_1_0(written, {"descr": "<f8", "fortran_order": False, "shape": (10**6, 10**6)})
    names = ("mu.npy", "sigma.npy", "arr_0.npy")
    for hint in ("another length", "expected at most"):
        path = a_zip(box.work / "stats.npz", dict.fromkeys(names, written.getvalue()))
        if hint == "expected at most":
            path.write_bytes(a_bomb(dict.fromkeys(names, written.getvalue()), GIGABYTES))
        (box.work / "images.npz").write_bytes(path.read_bytes())
        refused(box, hint, "evaluate", "--fid", "@work/stats.npz", "--samples", "@given/images")
        refused(box, hint, "evaluate", "--fid", "@given/stats.npz", "--samples", "@work/images.npz")


def test_a_checkpoint_that_unpacks_to_gigabytes(box: Sandbox) -> None:
    (box.work / "bomb.pth").write_bytes(a_bomb({"archive/data.pkl": b"", "archive/data/0": b""}, GIGABYTES))
    words = ("release", "--from", "@work/bomb.pth", "--config", "@given/model.yaml", "--workdir", "@work/new")
    refused(box, "unpacks to", *words)


# Releases and configs


def copied(box: Sandbox) -> Path:
    subprocess.run(["cp", "-r", box.given / "released" / "release", box.work / "release"], check=True)
    return box.work / "release"


def test_a_release_that_asks_for_a_huge_network(box: Sandbox) -> None:
    folder = copied(box)
    edit(folder, "config.json", lambda content: content["model"]["network"].update(width=2048, channel_multipliers=[1]))
    refused(box, "model.safetensors", "sample", "--workdir", "@work/new", "--", "model.ckpt=@work/release")
    refused(box, "does not agree", "verify", "@work/release", status=1)


def test_a_release_that_asks_for_the_environment(box: Sandbox) -> None:
    folder = copied(box)
    edit(folder, "config.json", lambda content: content["data"].update(name="${oc.env:HOME}"))
    refused(box, "data.name", "sample", "--workdir", "@work/new", "--", "model.ckpt=@work/release")
    refused(box, "does not agree", "verify", "@work/release", status=1)


def test_classes_named_like_references_are_not_looked_up(box: Sandbox) -> None:
    """Else the variable's value would be in the released config."""
    for name in ("${oc.env:HOME}", "b"):
        (box.work / "images" / name).mkdir(parents=True)
        for index in range(4):
            (box.work / "images" / name / f"{index}.png").write_bytes(a_png())
    keys = ("data.path=@work/images", *KEYS[5:8], "train.expected_batch_size=2", *KEYS[10:])
    refused(box, "class_names", "train", "--workdir", "@work/new", "--", *keys)


def test_a_statement_that_would_keep_the_accountant_busy(box: Sandbox) -> None:
    for change in ({"noise_multiplier": 1e-3}, {"num_steps": 10**9}, {"noise_multiplier": 0.1, "num_steps": 10**6}):
        folder = copied(box)
        edit(folder, "privacy.json", lambda content, change=change: content["mechanisms"][1].update(change))
        outcome = box.attempt("verify", "@work/release")
        assert (outcome.problems, outcome.status) == ([], 1), str(outcome)
        refused(box, "", "account", "--compose", "@work/release/privacy.json")
        box.clear()


def test_weights_that_are_not_numbers(box: Sandbox) -> None:
    folder = copied(box)
    for content in (b"", b"{}", struct.pack("<Q", 2**63) + b"{}", struct.pack("<Q", 10) + b"[" * 10, os.urandom(64)):
        (folder / "model.safetensors").write_bytes(content)
        hash_again(folder)
        refused(box, "model.safetensors", "sample", "--workdir", "@work/new", "--", "model.ckpt=@work/release")
    save_file({"x": torch.zeros(1)}, folder / "model.safetensors")
    refused(box, "model.safetensors", "sample", "--workdir", "@work/new", "--", "model.ckpt=@work/release")


def test_yaml_bombs(box: Sandbox) -> None:
    lists = [f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]" for a, b in zip("abcdefghi", "bcdefghij", strict=True)]
    bombs: Sequence[str] = (
        "\n".join(["a: &a [x]", *lists]),
        "data: &a [*a]",
        "[" * 50_000,
        "x: 1\n" * 200_000,
        yaml.safe_dump({"data": {"name": "a" * 600_000}}),
    )
    for bomb in bombs:
        (box.work / "a.yaml").write_text(bomb)
        refused(box, "a.yaml", "train", "--config", "@work/a.yaml", "--workdir", "@work/new")
    for file in ("/dev/zero", "/dev/null", "@work"):
        refused(box, "no plain file", "train", "--config", file, "--workdir", "@work/new")
    refused(box, "alias", "train", "--workdir", "@work/new", "--", "data.name=[&a [1, 1], *a, *a]")


def test_a_network_beyond_this_machine(box: Sandbox) -> None:
    keys = ("data.path=@given/archive.zip", *KEYS[5:10], "train.warmup.enabled=false", "train.expected_batch_size=2")
    for network in (
        "width=8192",
        "width=4000000000000",
        "num_res_blocks=1000000000",
        f"channel_multipliers={[1] * 99}",
    ):
        words = (*keys, "model.network.channel_multipliers=[512]", f"model.network.{network}")
        refused(box, "model.network", "train", "--workdir", "@work/new", "--", *words)


def test_a_lack_of_memory_is_one_line(
    box: Sandbox, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for error in (MemoryError(), RuntimeError("[enforce fail at alloc_cpu.cpp:127] can't allocate memory: 12 bytes")):

        def fail(*arguments: object, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr("dpdm.account.answer", fail)
        assert run_command(["account"]) == 1
        assert capfd.readouterr().err.startswith("dpdm: Not enough memory (")
