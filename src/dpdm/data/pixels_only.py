"""Whether image files hold pixels and labels and nothing else: no text, no camera's data, no byte that nobody reads.

What ``dpdm sample`` writes is known byte by byte, up to the compressed pixels themselves. Files are read as a stream,
in bounded memory, and nothing in them is trusted. What pixel values or a compressor's choices encode cannot be seen.
"""

import io
import json
import re
import struct
import zipfile
import zlib
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import BinaryIO

import numpy as np

from dpdm.data.archive import member_name
from dpdm.data.table import LABELS_NAME
from dpdm.data.zips import LOCAL, directory, local_header
from dpdm.untrusted import open_regular, parse_json, read_bytes

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
COLOUR_TYPES = {1: 0, 3: 2}  # channels -> colour type
# JPEG's quantisation and Huffman tables, baseline frame, restart interval, scan: what decoding needs.
JPEG_SEGMENTS = {0xDB, 0xC4, 0xC0, 0xDD, 0xDA}
MAX_PICTURE_PIXELS = 4096**2
MAX_PICTURE_BYTES = 64 * 2**20
MAX_TABLE_BYTES = 256 * 2**20
MAX_ARCHIVE_BYTES = 2**42
ENOUGH = 20  # problems of one set, after which nobody needs more


@dataclass(frozen=True)
class Form:
    """What a model draws: (C, H, H) images; labels 0 .. num_classes - 1, none if it is 0."""

    num_channels: int
    resolution: int
    num_classes: int


def check_png(content: bytes, *, num_channels: int | None = None, resolution: int | None = None) -> None:
    """Raises ValueError, with the reason, unless a PNG is a header, compressed pixels and an end, whole and no more.

    Args:
        content: the file.
        num_channels: 1 or 3; None allows both.
        resolution: side length; None allows any shape of at most 4096 x 4096 pixels.
    """
    chunks = _png_chunks(content)
    kinds = [kind for kind, _ in chunks]
    others = sorted({kind.decode("latin-1") for kind in kinds} - {"IHDR", "IDAT", "IEND"})
    if others:
        raise ValueError(f"holds {', '.join(others)} beside its pixels")
    if kinds != [b"IHDR", *[b"IDAT"] * (len(kinds) - 2), b"IEND"] or len(chunks[0][1]) != 13 or chunks[-1][1]:
        raise ValueError("is not made of one header, pixels and one end")
    width, height, depth, colour, *methods = struct.unpack(">2L5B", chunks[0][1])
    channels = next((number for number, kind in COLOUR_TYPES.items() if kind == colour), 0)
    if depth != 8 or not channels or any(methods) or num_channels not in (None, channels):
        raise ValueError(f"is of depth {depth} and colour type {colour}, which the model does not draw")
    if resolution is not None and (width, height) != (resolution, resolution):
        raise ValueError(f"is of {width}x{height} pixels, the model draws {resolution}x{resolution}")
    if not 1 <= width * height <= MAX_PICTURE_PIXELS:
        raise ValueError(f"is of {width}x{height} pixels, which are too many")
    row = 1 + width * channels
    unpacker = zlib.decompressobj()
    try:
        # One byte more than the pixels need: what unpacks to gigabytes is not unpacked.
        pixels = unpacker.decompress(b"".join(data for _, data in chunks[1:-1]), height * row + 1)
    except zlib.error as error:
        raise ValueError(f"cannot be unpacked ({error})") from None
    if len(pixels) != height * row or not unpacker.eof or unpacker.unused_data:
        raise ValueError("packs more or fewer bytes than its pixels need")
    if max(pixels[::row]) > 4:  # the filter of each row
        raise ValueError("is damaged")


def check_jpeg(content: bytes) -> None:
    """Raises ValueError, with the reason, unless a JPEG is tables, a frame and one scan: no comment, no thumbnail."""
    position, kind = 2, 0
    if content[:2] != b"\xff\xd8":
        raise ValueError("is no JPEG")
    while kind != 0xDA:
        if len(content) < position + 4:
            raise ValueError("ends too early")
        marker, kind, length = struct.unpack_from(">BBH", content, position)
        plain_jfif = kind == 0xE0 and length == 16 and content[position + 4 : position + 9] == b"JFIF\0"
        if marker != 0xFF or length < 2 or not (kind in JPEG_SEGMENTS or plain_jfif):
            raise ValueError(f"holds a segment {kind:02X} beside its pixels")
        position += 2 + length
    # In a scan 0 or a restart marker follows 0xFF: the first other one must be the end, and the file's.
    end = re.search(rb"\xff[^\x00\xd0-\xd7]", content[position:], flags=re.DOTALL)
    if end is None or end[0] != b"\xff\xd9" or position + end.end() != len(content):
        raise ValueError("has more behind its pixels, or no end")


def scan_archive(path: Path, form: Form) -> tuple[int, list[str]]:
    """Returns how many images are in an archive of synthetic images, and what should not be there.

    Every byte outside the compressed pixels must be the one that ``ArchiveWriter`` writes for these images and labels:
    no comments, dates, further members or gaps.

    Raises:
        ValueError: with the reason, if the file cannot be read.
    """
    sizes, crcs = array("I"), array("I")
    problems: list[str] = []
    with open_regular(path, MAX_ARCHIVE_BYTES) as file:
        while len(problems) < ENOUGH and (png := _member(file, member_name(len(sizes)), _longest_png(form))):
            problems += _told(member_name(len(sizes)), lambda png=png: _check_drawn(png, form))
            sizes.append(len(png))
            crcs.append(zlib.crc32(png))
        if len(problems) >= ENOUGH:
            return len(sizes), [*problems, "and perhaps more"]
        table = _member(file, LABELS_NAME, MAX_TABLE_BYTES)
        if table is None:
            return len(sizes), [*problems, f"what follows {len(sizes)} images is not what dpdm writes"]
        problems += _told(LABELS_NAME, lambda: _check_table(table, len(sizes), form))
        names = chain(map(member_name, range(len(sizes))), [LABELS_NAME])
        expected = directory(names, chain(sizes, [len(table)]), chain(crcs, [zlib.crc32(table)]))
        if any(file.read(len(part)) != part for part in expected) or file.read(1):
            problems.append("its directory is not what dpdm writes, or something follows it")
    return len(sizes), problems


def scan_npz(path: Path, form: Form) -> int:
    """Returns how many images an npz file holds.

    Raises:
        ValueError: with the reason, unless it is images, labels and what zip needs for them.
    """
    with open_regular(path, MAX_ARCHIVE_BYTES) as file:
        try:
            with zipfile.ZipFile(file) as members:
                infos = members.infolist()
                names = [info.filename for info in infos]
                if names not in (["arr_0.npy"], ["arr_0.npy", "arr_1.npy"]) or members.comment:
                    raise ValueError("holds other members than images and labels")
                images = _array_shape(members, infos[0])
                labels = _array_shape(members, infos[1]) if len(infos) == 2 else ("<i8", images[1][:1])
        except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError, RuntimeError) as error:
            raise ValueError(f"cannot be read ({error})") from None
        count = images[1][0] if images[1] else 0
        shape = (count, form.resolution, form.resolution, form.num_channels)
        if images != ("|u1", shape) or labels != ("<i8", (count,)):
            raise ValueError("holds arrays of another form than the model's images and labels")
        # A member's local header has 20 bytes of sizes in 64 bits; without them in the directory nothing else is left.
        size = sum(30 + 20 + 46 + 2 * len(info.filename) + len(info.extra) + info.file_size for info in infos) + 22
        wide = any(info.extra for info in infos)
        if file.seek(0, io.SEEK_END) not in ((size, size + 76) if wide else (size,)):
            raise ValueError("holds bytes beside its images and labels")
    return count


def scan_samples(folder: Path, form: Form) -> tuple[int, list[str]]:
    """Returns how many images are in a folder that ``dpdm sample`` wrote, and what should not be there.

    Raises:
        ValueError: with the reason, if the folder cannot be read.
    """
    try:
        names = sorted(path.name for path in folder.iterdir())
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror})") from None
    images = [name for name in names if re.fullmatch(r"[0-9]{6,}\.png", name)]
    width = max(6, len(str(len(images) - 1)))
    checks: dict[str, Callable[[], None]] = {
        "grid.png": lambda: check_png(read_bytes(folder / "grid.png", MAX_PICTURE_BYTES))
    }
    counts = [len(images)]
    if images:
        checks["labels.csv"] = lambda: _check_csv(read_bytes(folder / "labels.csv", MAX_TABLE_BYTES), images, form)
    else:
        checks["images.zip"] = lambda: counts.append(_raise_problems(*scan_archive(folder / "images.zip", form)))
        checks["images.npz"] = lambda: counts.append(scan_npz(folder / "images.npz", form))
    problems: list[str] = []
    for number, name in enumerate(images):
        if name != f"{number:0{width}d}.png":
            problems.append(f"{name} stands where image {number} should")
            break
    for name in names:
        if len(problems) >= ENOUGH:
            return max(counts), [*problems, "and perhaps more"]
        if name in checks:
            problems += _told(name, checks[name])
        elif re.fullmatch(r"[0-9]{6,}\.png", name):
            problems += _told(name, lambda name=name: _check_drawn(read_bytes(folder / name, _longest_png(form)), form))
        else:
            problems.append(f"{name} is not on the allow-list")
    return max(counts), problems


def _png_chunks(content: bytes) -> list[tuple[bytes, bytes]]:
    """Returns kind and data of all chunks; ValueError unless they fill the file and their checksums hold."""
    if not content.startswith(PNG_SIGNATURE):
        raise ValueError("is no PNG")
    position, chunks = len(PNG_SIGNATURE), []
    while position < len(content):
        length = int.from_bytes(content[position : position + 4], "big")
        kind, data = content[position + 4 : position + 8], content[position + 8 : position + 8 + length]
        crc = content[position + 8 + length : position + 12 + length]
        if len(crc) != 4 or zlib.crc32(kind + data) != int.from_bytes(crc, "big"):
            raise ValueError("has bytes behind its end, or a damaged part")
        chunks.append((kind, data))
        position += 12 + length
    return chunks


def _longest_png(form: Form) -> int:
    """Returns more bytes than any compressor makes of one image."""
    return 2 * form.resolution * (1 + form.resolution * form.num_channels) + 4096


def _check_drawn(png: bytes, form: Form) -> None:
    check_png(png, num_channels=form.num_channels, resolution=form.resolution)


def _told(name: str, check: Callable[[], object]) -> list[str]:
    try:
        check()
    except ValueError as error:
        return [f"{name} {error}"]
    return []


def _raise_problems(count: int, problems: list[str]) -> int:
    if problems:
        raise ValueError(f"({'; '.join(problems[:3])})")
    return count


def _member(file: BinaryIO, name: str, max_bytes: int) -> bytes | None:
    """Returns the stored member that stands at the file's position, None (and goes nowhere) if it is not ``name``."""
    start = file.tell()
    head = file.read(LOCAL.size + len(name))
    crc, size = int.from_bytes(head[14:18], "little"), int.from_bytes(head[18:22], "little")
    if size <= max_bytes and head == local_header(name, size, crc):
        content = file.read(size)
        if len(content) == size and zlib.crc32(content) == crc:
            return content
    file.seek(start)
    return None


def _check_table(content: bytes, count: int, form: Form) -> None:
    """Raises ValueError unless ``dataset.json`` holds the labels of ``count`` images and nothing else."""
    table = parse_json(content)
    if not isinstance(table, dict) or set(table) != {"labels"} or json.dumps(table).encode() != content:
        raise ValueError("holds more than labels")
    pairs = table["labels"]
    if pairs is None:
        return
    if not isinstance(pairs, list) or len(pairs) != count:
        raise ValueError(f"does not hold one label for each of {count} images")
    for index, pair in enumerate(pairs):
        if not isinstance(pair, list) or len(pair) != 2 or pair[0] != member_name(index):
            raise ValueError(f"does not name image {index} where it should")
        _check_label(pair[1], form)


def _check_label(label: object, form: Form) -> None:
    if type(label) is not int or not 0 <= label < form.num_classes:
        raise ValueError(f"holds a label that is not one of {form.num_classes} classes")


def _check_csv(content: bytes, images: list[str], form: Form) -> None:
    """Raises ValueError unless ``labels.csv`` is a head and one line ``file,label`` for each image."""
    lines = content.decode("ascii", errors="replace").split("\r\n")
    if lines[0] != "file,label" or lines[-1] or len(lines) != len(images) + 2:
        raise ValueError(f"does not hold one label for each of {len(images)} images")
    for name, line in zip(images, lines[1:-1], strict=True):
        label = line.removeprefix(f"{name},")
        if label == line or not re.fullmatch(r"0|[1-9][0-9]{0,8}", label):
            raise ValueError(f"does not name {name} where it should")
        _check_label(int(label), form)


def _array_shape(members: zipfile.ZipFile, info: zipfile.ZipInfo) -> tuple[str, tuple[int, ...]]:
    """Returns type and shape of a stored array; ValueError unless it is a plain head and the numbers, and no more."""
    if info.comment or info.compress_type != zipfile.ZIP_STORED or info.date_time != (1980, 1, 1, 0, 0, 0):
        raise ValueError(f"holds {info.filename} with a comment, a date or compression")
    with members.open(info) as file:
        if np.lib.format.read_magic(file) != (1, 0):
            raise ValueError(f"holds {info.filename} in another format")
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
        head = io.BytesIO()
        form = {"descr": dtype.str, "fortran_order": fortran, "shape": shape}
        np.lib.format.write_array_header_1_0(head, form)
        start = file.tell()
        file.seek(0)
        if fortran or file.read(start) != head.getvalue():
            raise ValueError(f"holds {info.filename} with an odd head")
        numbers = dtype.itemsize
        for side in shape:
            numbers *= side
        if info.file_size != start + numbers:
            raise ValueError(f"holds {info.filename} of another length than its numbers")
    return dtype.str, tuple(shape)
