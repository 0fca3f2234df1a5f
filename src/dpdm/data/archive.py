"""The prepared archive: a zip of PNGs with labels, which StyleGAN and EDM tools read as well.

``00000/img00000000.png`` ... in folders of 1,000, stored without further compression, and ``dataset.json``
with ``{"labels": [[name, class], ...]}`` or ``{"labels": null}``; ``class_names`` beside it is ours, others
ignore it.
"""

import contextlib
import hashlib
import io
import json
import lzma
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from dpdm.data.records import list_names
from dpdm.data.transforms import IMAGE_SUFFIXES, load_pixels, open_image, to_array
from dpdm.errors import InputError, RunError
from dpdm.files import atomic_path

LABELS_NAME = "dataset.json"
MAX_MEMBER_BYTES = 256 * 2**20
MAX_BYTES_IN_MEMORY = 256 * 2**20
MAX_CLASSES = 1_000_000  # a label beyond it is a mistake, and would ask for an embedding of its size
IMAGES_PER_FOLDER = 1000
IMAGES_PER_PASS = 1024
# The zip format's first day: without a fixed time two runs would give different bytes.
ZIP_TIME = (1980, 1, 1, 0, 0, 0)
MODES = {1: "L", 3: "RGB"}


class ArchiveWriter:
    """Writes an archive image by image; the file appears only when the ``with`` block succeeds.

    The same images and labels give the same bytes (with the same Pillow and zlib).

    Args:
        path: the file to write.
        class_names: one name per class, also for classes without images; None if there are no names.

    Raises:
        RunError: if the disk is full or not writable; an older file at ``path`` is then as it was.
    """

    def __init__(self, path: Path, class_names: Sequence[str] | None = None) -> None:
        self.path = path
        self.num_images = 0
        self._class_names = None if class_names is None else list(class_names)
        self._labels: list[int | None] = []
        self._shape: tuple[int, ...] | None = None

    def __enter__(self) -> Self:
        self._context = self._writing()
        return self._context.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        return self._context.__exit__(kind, error, trace)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[Self]:
        try:
            with (
                atomic_path(self.path) as temporary,
                zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as self._zip,
            ):
                yield self
                self._write_labels()
        except OSError as error:
            raise RunError(f"Cannot write {self.path}: {error}; nothing was written there.") from error

    def add(self, image: NDArray[np.uint8], label: int | None = None) -> None:
        """Appends one image.

        Args:
            image: (C, H, H) uint8 with C 1 or 3, the same shape for all images.
            label: class index, for all images or for none.

        Raises:
            ValueError: if shape, type or label do not fit.
        """
        shape = self._shape = self._shape or image.shape
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[0] not in MODES or shape[1] != shape[2]:
            raise ValueError(f"Expected image to be uint8 (1|3, H, H), got {image.dtype} {image.shape}.")
        if image.shape != shape:
            raise ValueError(f"Expected image of shape {shape} as the first one, got {image.shape}.")
        if self._labels and (label is None) != (self._labels[0] is None):
            raise ValueError(f"Expected a label for all images or for none, got {label} at {self.num_images}.")
        num_classes = None if self._class_names is None else len(self._class_names)
        if label is not None and (label < 0 or (num_classes is not None and label >= num_classes)):
            raise ValueError(f"Expected 0 <= label={label} < {num_classes or 'number of classes'}.")
        pixels = image[0] if image.shape[0] == 1 else image.transpose(1, 2, 0)
        png = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(pixels)).save(png, format="PNG")
        self._write(self._member_name(self.num_images), png.getvalue())
        self._labels.append(label)
        self.num_images += 1

    @staticmethod
    def _member_name(index: int) -> str:
        return f"{index // IMAGES_PER_FOLDER:05d}/img{index:08d}.png"

    def _write(self, name: str, content: bytes) -> None:
        info = zipfile.ZipInfo(name, ZIP_TIME)
        info.external_attr = 0o644 << 16
        self._zip.writestr(info, content)

    def _write_labels(self) -> None:
        labelled = bool(self._labels) and self._labels[0] is not None
        pairs = [[self._member_name(index), label] for index, label in enumerate(self._labels)]
        table: dict[str, Any] = {"labels": pairs if labelled else None}
        if labelled and self._class_names is not None:
            table["class_names"] = self._class_names
        self._write(LABELS_NAME, json.dumps(table).encode())


class ImageArchive:
    """Reads a prepared archive; members are decoded in memory and never extracted.

    Sets of at most 256 MiB of pixels keep each image once it was decoded; larger ones are decoded at every
    read. For one thread.

    Attributes:
        num_images: N >= 1.
        resolution: height and width in pixels.
        num_channels: 1 (grey) or 3 (RGB).
        num_classes: number of class names, or without them the largest label + 1; 0 without labels.
        labels: (N,) int64, or None.
        class_names: one per class, or None.

    Raises:
        InputError: if the file is absent, damaged or not a prepared archive.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._zip = open_zip(path)
        members = {info.filename: info for info in self._zip.infolist()}
        if LABELS_NAME not in members:
            raise InputError(f"Expected {path} to hold {LABELS_NAME}: make an archive of it by dpdm prepare.")
        self._names = sorted(name for name in members if name.lower().endswith(IMAGE_SUFFIXES))
        if not self._names:
            raise InputError(f"Expected {path} to hold images, found none: make it anew by dpdm prepare.")
        self._infos = [members[name] for name in self._names]
        table = read_member(self._zip, members[LABELS_NAME], f"{path}: {LABELS_NAME}")
        self.labels, self.class_names = parse_labels(table, self._names, str(path))
        self.num_images = len(self._names)
        self.num_classes = 0 if self.labels is None else int(self.labels.max()) + 1
        if self.class_names is not None:
            self.num_classes = len(self.class_names)
        self.num_channels, self.resolution = self._image_form()
        shape = (self.num_channels, self.resolution, self.resolution)
        keeps = self.num_images * int(np.prod(shape)) <= MAX_BYTES_IN_MEMORY
        # Pages of np.empty cost nothing until an image is decoded into them.
        self._pixels = np.empty((self.num_images, *shape), np.uint8) if keeps else None
        self._decoded = np.zeros(self.num_images, bool)
        self._fingerprint: str | None = None

    def read(self, indices: ArrayLike) -> NDArray[np.uint8]:
        """Returns images in the order asked for, repetitions included.

        Args:
            indices: (n,) integers in [0, N); n may be 0.

        Returns:
            (n, C, H, H) uint8, a copy.

        Raises:
            ValueError: if an index is out of range.
            InputError: naming the image, if its member is damaged or of another shape.
        """
        index = np.asarray(indices)
        index = index.astype(np.int64) if index.size == 0 else index
        if index.ndim != 1 or not np.issubdtype(index.dtype, np.integer):
            raise ValueError(f"Expected indices to be (n,) integers, got {index.dtype} {index.shape}.")
        if index.size and not 0 <= index.min() <= index.max() < self.num_images:
            raise ValueError(f"Expected 0 <= index < {self.num_images}, got {index.min()} to {index.max()}.")
        if self._pixels is not None:
            for i in np.unique(index[~self._decoded[index]]):
                self._pixels[i] = self._decode(int(i))
                self._decoded[i] = True
            return self._pixels[index]
        images = np.empty((index.size, self.num_channels, self.resolution, self.resolution), np.uint8)
        for position, i in enumerate(index):
            images[position] = self._decode(int(i))
        return images

    def check(self) -> None:
        """Decodes every image.

        Raises:
            InputError: naming all damaged or odd images (the first 20, then how many more).
        """
        problems = []
        for i in range(self.num_images):
            try:
                self.read([i])
            except InputError as error:
                problems.append(str(error).removeprefix(f"{self.path}: "))
        if problems:
            raise InputError(f"{self.path}: {len(problems)} bad images: {list_names(problems)}")

    def fingerprint(self) -> str:
        """Returns SHA-256, in hex, over shape, labels and pixels in order; it identifies private data."""
        if self._fingerprint is None:
            shape = [self.num_images, self.num_channels, self.resolution, self.resolution]
            head = json.dumps({"shape": shape, "labelled": self.labels is not None})
            digest = hashlib.sha256(head.encode())
            if self.labels is not None:
                digest.update(self.labels.astype("<i8").tobytes())
            for start in range(0, self.num_images, IMAGES_PER_PASS):
                images = self.read(np.arange(start, min(start + IMAGES_PER_PASS, self.num_images)))
                digest.update(images.tobytes())
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    def _image_form(self) -> tuple[int, int]:
        """Returns channels and resolution of the first readable image; ``check`` names the others."""
        for index in range(self.num_images):
            try:
                image = open_image(self._where(index), self._bytes(index))
            except InputError:
                continue
            if image.mode not in MODES.values() or image.width != image.height:
                raise InputError(
                    f"{self._where(index)}: expected a square 8-bit grey or RGB image, got {image.mode} "
                    f"{image.width}x{image.height}: make the archive anew by dpdm prepare."
                )
            return 1 if image.mode == "L" else 3, image.width
        raise InputError(f"{self.path}: none of its {self.num_images} images can be read: make it anew.")

    def _where(self, index: int) -> str:
        return f"{self.path}: {self._names[index]}"

    def _bytes(self, index: int) -> bytes:
        return read_member(self._zip, self._infos[index], self._where(index))

    def _decode(self, index: int) -> NDArray[np.uint8]:
        image = open_image(self._where(index), self._bytes(index))
        expected = (MODES[self.num_channels], self.resolution, self.resolution)
        if (image.mode, *image.size) != expected:
            found = f"{image.mode} {image.width}x{image.height}"
            raise InputError(f"{self._where(index)}: {found}, expected {expected[0]} {expected[1]}x{expected[2]}")
        return to_array(load_pixels(self._where(index), image))


def open_zip(path: Path) -> zipfile.ZipFile:
    """Opens a zip for reading.

    Raises:
        InputError: if it is absent, is no zip, or names a member twice (which one counts?).
    """
    try:
        archive = zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise InputError(f"Cannot open {path} as a zip: {error}.") from error
    names = archive.namelist()
    if len(set(names)) != len(names):
        twice = sorted(name for name, count in Counter(names).items() if count > 1)
        raise InputError(f"{path}: members that occur more than once: {list_names(twice)}")
    return archive


def read_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo, where: str) -> bytes:
    """Returns a member's content; its checksum is verified.

    Raises:
        InputError: with ``where``, if it is damaged, encrypted, or of more than 256 MiB.
    """
    if info.file_size > MAX_MEMBER_BYTES:
        raise InputError(f"{where}: {info.file_size} bytes, expected at most {MAX_MEMBER_BYTES}")
    try:
        return archive.read(info)
    except (OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error, lzma.LZMAError) as error:
        raise InputError(f"{where}: cannot be read from the zip ({error})") from error


def parse_labels(content: bytes, names: Sequence[str], where: str) -> tuple[NDArray[np.int64] | None, list[str] | None]:
    """Reads ``dataset.json``: labels (N,) in the order of ``names``, or None; class names, or None.

    Raises:
        InputError: if it has another form, or names other images than ``names``.
    """
    where = f"{where}: {LABELS_NAME}"
    try:
        table = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not valid JSON ({error})") from error
    if not isinstance(table, dict) or "labels" not in table:
        raise InputError(f'{where}: expected {{"labels": [[name, class], ...]}} or {{"labels": null}}')
    if table["labels"] is None:
        return None, None
    pairs = table["labels"]
    if not isinstance(pairs, list) or not all(_is_pair(pair) for pair in pairs):
        raise InputError(f"{where}: expected labels to be a list of [name, class] with classes 0, 1, 2, ...")
    label_of = dict(pairs)
    wrong = sorted(set(label_of) ^ set(names))
    if wrong:
        raise InputError(f"{where}: labels and images differ in {len(wrong)} names: {list_names(wrong)}")
    if len(label_of) != len(pairs):
        raise InputError(f"{where}: {len(pairs) - len(label_of)} images have more than one label")
    labels = np.array([label_of[name] for name in names], np.int64)
    class_names = table.get("class_names")
    if class_names is None:
        return labels, None
    named = isinstance(class_names, list) and all(isinstance(name, str) for name in class_names)
    if not named or len(class_names) <= labels.max():
        raise InputError(f"{where}: expected class_names to be a list of at least {labels.max() + 1} names")
    return labels, class_names


def _is_pair(pair: object) -> bool:
    if not isinstance(pair, list) or len(pair) != 2:
        return False
    name, label = pair
    return isinstance(name, str) and type(label) is int and 0 <= label < MAX_CLASSES
