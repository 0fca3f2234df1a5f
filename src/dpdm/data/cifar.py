"""CIFAR-10 as its makers publish it: ``cifar-10-python.tar.gz``, of which nothing is extracted and no code is run.

Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009. Each of the files data_batch_1 to _5 and
test_batch is a pickled dictionary; a row of its ``data`` is an image, 1,024 red, then green, then blue values.
"""

import gzip
import io
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpdm.data.pickles import read_pickle
from dpdm.data.records import Split
from dpdm.errors import InputError

SUFFIXES = (".tar.gz", ".tgz", ".tar")
FOLDER = "cifar-10-batches-py"
BATCHES = {"train": [f"data_batch_{number}" for number in range(1, 6)], "holdout": ["test_batch"]}
META = "batches.meta"
MAX_BYTES = 256 * 2**20  # of the whole tar, unpacked; the published one has 186 MB
MAX_MEMBERS = 1000  # it has nine
SIDE = 32


def cifar_splits(path: Path) -> dict[str, Split]:
    """Reads the tar's five training batches and, as hold-out, its test batch.

    Raises:
        InputError: naming the file, if it is damaged, or is not this data set.
    """
    found = _read_members(path)
    meta = _pickled(path, META, found[META])
    class_names = [name.decode("ascii", "replace") for name in _byte_strings(path, META, meta.get(b"label_names"))]
    splits = {}
    for split, batches in BATCHES.items():
        parts = [_batch(path, name, found.pop(name), len(class_names)) for name in batches]
        images = np.concatenate([pixels for pixels, _ in parts])
        labels = np.concatenate([numbers for _, numbers in parts])
        names = [
            f"{name}[{row}]" for name, (pixels, _) in zip(batches, parts, strict=True) for row in range(len(pixels))
        ]
        splits[split] = _split(names, images, labels, class_names)
    return splits


def _split(names: list[str], images: NDArray[np.uint8], labels: NDArray[np.int64], class_names: list[str]) -> Split:
    def read(index: int) -> NDArray[np.uint8]:
        return np.ascontiguousarray(images[index].transpose(1, 2, 0))

    return Split(names, read, lambda index: images[index].tobytes(), labels, class_names)


def _read_members(path: Path) -> dict[str, bytes]:
    """Returns the content of the files that are wanted; others are passed over, whatever their names say."""
    wanted = {f"{FOLDER}/{name}": name for name in (META, *BATCHES["train"], *BATCHES["holdout"])}
    found: dict[str, bytes] = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(_unpacked(path)), mode="r:") as tar:
            for number, member in enumerate(tar):
                # A sparse file names a length of its own.
                if number >= MAX_MEMBERS or member.size > MAX_BYTES:
                    raise InputError(f"{path}: expected fewer and smaller files in a tar: download it again.")
                if member.name not in wanted:
                    continue
                name = wanted[member.name]
                content = tar.extractfile(member) if member.isreg() else None
                if content is None or name in found:
                    raise InputError(f"{path}: {member.name} is a link, or is there twice: download it again.")
                found[name] = content.read()
    except InputError:
        raise
    except (OSError, EOFError, ValueError, OverflowError, tarfile.TarError, zlib.error) as error:
        raise InputError(f"{path}: cannot be read as a tar ({error}): download it again.") from error
    missing = [name for name in wanted if wanted[name] not in found]
    if missing:
        raise InputError(
            f"{path}: expected {', '.join(missing)}, found none: of tars, dpdm reads the original CIFAR-10's Python "
            "version alone; unpack others into a folder."
        )
    return found


def _unpacked(path: Path) -> bytes:
    """Returns the tar, gzipped or not; whole, as gzip's checksum stands behind everything, but never gigabytes."""
    with path.open("rb") as raw:
        zipped = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        with gzip.open(raw) if zipped else raw as file:
            content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise InputError(f"{path}: expected a tar of at most {MAX_BYTES} bytes, got more: download it again.")
    return content


def _batch(path: Path, name: str, content: bytes, num_classes: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    batch = _pickled(path, name, content)
    images, labels = batch.get(b"data"), batch.get(b"labels")
    if not isinstance(images, np.ndarray) or images.ndim != 2 or images.shape[1] != 3 * SIDE * SIDE or not len(images):
        raise InputError(f"{path}: {name}: expected data of shape (n, 3072): download it again.")
    if not isinstance(labels, list) or len(labels) != len(images):
        raise InputError(f"{path}: {name}: expected a label for each of {len(images)} images: download it again.")
    if not all(type(label) is int and 0 <= label < num_classes for label in labels):
        raise InputError(f"{path}: {name}: expected labels from 0 to {num_classes - 1}: download it again.")
    return images.reshape(-1, 3, SIDE, SIDE), np.array(labels, np.int64)


def _pickled(path: Path, name: str, content: bytes) -> dict[Any, Any]:
    try:
        value = read_pickle(content)
    except ValueError as error:
        raise InputError(f"{path}: {name}: {error}; nothing of it was executed: download it again.") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: {name}: expected a dictionary, got {type(value).__name__}: download it again.")
    return value


def _byte_strings(path: Path, name: str, value: Any) -> list[bytes]:
    if not isinstance(value, list) or not value or not all(isinstance(item, bytes) for item in value):
        raise InputError(f"{path}: {name}: expected a list of class names: download it again.")
    return value
