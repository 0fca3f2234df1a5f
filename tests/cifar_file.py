"""CIFAR-10's tar in the published files' layout: pickles of protocol 2 as Python 2 wrote them."""

import io
import struct
import tarfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

NAMES = [b"airplane", b"automobile", b"bird"]


def string(text: bytes) -> bytes:
    return b"U" + bytes([len(text)]) + text if len(text) < 256 else b"T" + struct.pack("<i", len(text)) + text


def number(value: int) -> bytes:
    if 0 <= value < 256:
        return b"K" + bytes([value])
    return b"M" + struct.pack("<H", value) if 0 <= value < 65536 else b"J" + struct.pack("<i", value)


class Memo:
    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> bytes:
        self.count += 1
        return b"q" + bytes([self.count]) if self.count < 256 else b"r" + struct.pack("<I", self.count)


def batch(pixels: NDArray[np.uint8], labels: list[int], *, order: str = "data first") -> bytes:
    """Opcodes by PEP 307 and pickletools' documentation, in the order in which Python 2's cPickle gives them."""
    memo = Memo()
    rows, columns = pixels.shape
    dtype = (
        b"cnumpy\ndtype\n" + memo() + string(b"u1") + memo() + number(0) + number(1) + b"\x87" + memo() + b"R" + memo()
        + b"(" + number(3) + string(b"|") + memo() + b"NNN" + number(-1) + number(-1) + number(0) + b"t" + memo() + b"b"
    )  # fmt: skip
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n" + memo() + b"cnumpy\nndarray\n" + memo()
        + number(0) + b"\x85" + memo() + string(b"b") + memo() + b"\x87" + memo() + b"R" + memo()
        + b"(" + number(1) + number(rows) + number(columns) + b"\x86" + memo() + dtype + b"\x89"
        + string(pixels.tobytes()) + memo() + b"t" + memo() + b"b"
    )  # fmt: skip
    items = {
        b"data": array,
        b"labels": b"]" + memo() + b"(" + b"".join(map(number, labels)) + b"e",
        b"batch_label": string(b"training batch 1 of 5") + memo(),
        b"filenames": b"]" + memo() + b"(" + b"".join(string(b"x_%06d.png" % i) + memo() for i in range(rows)) + b"e",
    }
    if order != "data first":
        items = dict(reversed(items.items()))
    body = b"".join(string(key) + memo() + value for key, value in items.items())
    return b"\x80\x02}" + memo() + b"(" + body + b"u."


def meta(names: list[bytes] = NAMES) -> bytes:
    memo = Memo()
    listed = b"]" + memo() + b"(" + b"".join(string(name) + memo() for name in names) + b"e"
    return (
        b"\x80\x02}" + memo() + b"(" + string(b"num_cases_per_batch") + memo() + number(10000)
        + string(b"label_names") + memo() + listed + string(b"num_vis") + memo() + number(3072) + b"u."
    )  # fmt: skip


def tar(path: Path, members: dict[str, bytes], *, links: dict[str, str] | None = None) -> Path:
    with tarfile.open(path, "w:gz") as file:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
        for name, target in (links or {}).items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, target
            file.addfile(info)
    return path
