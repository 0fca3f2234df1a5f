"""The idx format of MNIST and its relatives: one file of images and one of labels per split.

Format: LeCun, Cortes and Burges, "The MNIST database of handwritten digits". Big-endian: two zero bytes, type
code (8 = uint8), number of dimensions, each dimension as uint32, then the values.
"""

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dpdm.data.records import Split
from dpdm.errors import InputError

UINT8 = 8
MAX_BYTES = 640 * 2**20  # EMNIST's largest file has 548 MB
SPLITS = {"train": "train", "holdout": "t10k"}


def read_idx(path: Path, num_dimensions: int) -> NDArray[np.uint8]:
    """Reads an idx file of bytes, gzipped or not.

    Args:
        path: the file; gzip is recognised by its content, not by its name.
        num_dimensions: 3 for images (N, H, W), 1 for labels (N,).

    Raises:
        InputError: naming the file, if it cannot be read, or header, type and length do not fit together.
    """
    try:
        with path.open("rb") as raw:
            zipped = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            with gzip.open(raw) if zipped else raw as file:
                head = file.read(4 + 4 * num_dimensions)
                if len(head) < 4 + 4 * num_dimensions or head[:4] != bytes([0, 0, UINT8, num_dimensions]):
                    raise InputError(f"{path}: not an idx file of bytes with {num_dimensions} dimensions")
                shape = struct.unpack(f">{num_dimensions}I", head[4:])
                if math.prod(shape) > MAX_BYTES:
                    raise InputError(f"{path}: expected at most {MAX_BYTES} bytes, its header names {math.prod(shape)}")
                content = file.read(math.prod(shape) + 1)  # what unpacks to gigabytes is not unpacked
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: cannot be read ({error}): copy or download it again.") from error
    if len(content) != math.prod(shape):
        raise InputError(
            f"{path}: expected {math.prod(shape)} bytes for {'x'.join(map(str, shape))}, got "
            f"{'more' if len(content) > math.prod(shape) else len(content)}: copy or download it again."
        )
    return np.frombuffer(content, np.uint8).reshape(shape)


def find_idx(folder: Path, prefix: str, kind: str) -> Path | None:
    """Finds e.g. ``train-images-idx3-ubyte``, the same with a dot before idx3, and either gzipped."""
    dimensions = {"images": 3, "labels": 1}[kind]
    for stem in (f"{prefix}-{kind}-idx{dimensions}-ubyte", f"{prefix}-{kind}.idx{dimensions}-ubyte"):
        for name in (stem, f"{stem}.gz"):
            if (folder / name).is_file():
                return folder / name
    return None


def idx_splits(folder: Path, class_names: list[str] | None = None) -> dict[str, Split]:
    """Reads the training pair and, if there is one, the t10k pair as hold-out.

    Args:
        folder: holds the files; their counts and bytes may differ from the published ones.
        class_names: None for "0", "1", ... up to the largest label of both pairs.

    Raises:
        InputError: naming the file that is missing, damaged or does not fit its pair.
    """
    pairs = {}
    for split, prefix in SPLITS.items():
        images_path, labels_path = find_idx(folder, prefix, "images"), find_idx(folder, prefix, "labels")
        if images_path is None and labels_path is None and split != "train":
            continue
        if images_path is None or labels_path is None:
            missing = f"{prefix}-images-idx3-ubyte" if images_path is None else f"{prefix}-labels-idx1-ubyte"
            raise InputError(f"Expected {missing} or {missing}.gz in {folder}, found neither: add it.")
        images, labels = read_idx(images_path, 3), read_idx(labels_path, 1)
        if len(images) != len(labels) or not len(images):
            raise InputError(
                f"{images_path}: expected as many images as {labels_path.name} has labels, and at least one, "
                f"got {len(images)} and {len(labels)}."
            )
        pairs[split] = (images_path.name, images, labels.astype(np.int64))
    largest = max(int(labels.max()) for _, _, labels in pairs.values())
    class_names = class_names or [str(label) for label in range(largest + 1)]
    if largest >= len(class_names):
        raise InputError(f"{folder}: expected labels below {len(class_names)}, got {largest}.")
    return {split: array_split(name, images, labels, class_names) for split, (name, images, labels) in pairs.items()}


def array_split(name: str, images: NDArray[np.uint8], labels: NDArray[np.int64], class_names: list[str]) -> Split:
    """Makes a split of (N, H, W) grey images that are in memory; record i is called ``name[i]``."""
    names = [f"{name}[{index}]" for index in range(len(images))]
    return Split(names, lambda index: images[index], lambda index: images[index].tobytes(), labels, class_names)
