"""The prepared archive: a zip of PNGs with labels, which StyleGAN and EDM tools read as well.

``00000/img00000000.png`` ... in folders of 1,000, stored without further compression, and ``dataset.json``
with ``{"labels": [[name, class], ...]}`` or ``{"labels": null}``; ``class_names`` beside it is ours, and so is
``groups``, the number of each image's group in the order of the images; others ignore them.
"""

import contextlib
import hashlib
import io
import json
import zlib
from array import array
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Literal, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from dpdm.data.records import list_names
from dpdm.data.table import LABELS_NAME, parse_table
from dpdm.data.transforms import IMAGE_SUFFIXES, MAX_RESOLUTION, load_pixels, open_image, to_array
from dpdm.data.zips import ZipReader, directory, local_header
from dpdm.errors import InputError, RunError
from dpdm.files import atomic_path

MAX_BYTES_IN_MEMORY = 256 * 2**20
IMAGES_PER_FOLDER = 1000
PNG_LEVEL = 2  # of zlib: on 32x32 photos as small as 6, and faster; on large ones a few percent larger
MODES = {1: "L", 3: "RGB"}
Unit = Literal["image", "group"]


def member_name(index: int) -> str:
    """Returns the name of image ``index`` in an archive."""
    return f"{index // IMAGES_PER_FOLDER:05d}/img{index:08d}.png"


def encode_png(image: Image.Image) -> bytes:
    """Returns an image as a PNG file."""
    png = io.BytesIO()
    image.save(png, format="PNG", compress_level=PNG_LEVEL)
    return png.getvalue()


class ArchiveBody:
    """The images of a growing archive, 16 bytes of memory for each, in a file that is open for writing.

    The file is a zip only after ``finish``; what is before holds for itself, image by image.

    Args:
        file: to write to, from its position on.
        class_names: one name per class, also for classes without images; None if there are no names.
        groups: the number of each image's group, in order; None if there are no groups.
    """

    def __init__(
        self, file: BinaryIO, class_names: Sequence[str] | None = None, groups: Sequence[int] | None = None
    ) -> None:
        self.file = file
        self._groups = None if groups is None else array("q", groups)
        self._class_names = None if class_names is None else list(class_names)
        self._labels, self._sizes, self._crcs = array("q"), array("I"), array("I")

    @property
    def num_images(self) -> int:
        return len(self._sizes)

    def add(self, png: bytes, label: int | None) -> None:
        """Appends one image.

        Raises:
            ValueError: if there are labels for others and none for this one, or the reverse, or there is no such
                class.
        """
        self._note(label, len(png), zlib.crc32(png))
        self.file.write(local_header(member_name(self.num_images - 1), self._sizes[-1], self._crcs[-1]) + png)

    def take(self, label: int | None) -> bool:
        """Takes over the image that stands at the file's position; False, and nothing else, if none stands there."""
        start = self.file.tell()
        name = member_name(self.num_images)
        length = len(local_header(name, 0, 0))
        head = self.file.read(length)
        size, crc = int.from_bytes(head[18:22], "little"), int.from_bytes(head[14:18], "little")
        if head == local_header(name, size, crc):
            png = self.file.read(size)
            if len(png) == size and zlib.crc32(png) == crc:
                self._note(label, size, crc)
                return True
        self.file.seek(start)
        return False

    def finish(self) -> None:
        """Writes labels and directory; nothing may be added any more.

        Raises:
            ValueError: if there are not as many groups as images.
        """
        if self._groups is not None and len(self._groups) != self.num_images:
            raise ValueError(f"Expected the groups of {self.num_images} images, got {len(self._groups)}.")
        table = self._label_table()
        self.file.write(local_header(LABELS_NAME, len(table), zlib.crc32(table)) + table)
        names = chain(map(member_name, range(self.num_images)), [LABELS_NAME])
        for part in directory(names, chain(self._sizes, [len(table)]), chain(self._crcs, [zlib.crc32(table)])):
            self.file.write(part)

    def _note(self, label: int | None, size: int, crc: int) -> None:
        if self._sizes and (label is None) == bool(self._labels):
            raise ValueError(f"Expected a label for all images or for none, got {label} at {self.num_images}.")
        num_classes = None if self._class_names is None else len(self._class_names)
        if label is not None:
            if label < 0 or (num_classes is not None and label >= num_classes):
                raise ValueError(f"Expected 0 <= label={label} < {num_classes or 'number of classes'}.")
            self._labels.append(label)
        self._sizes.append(size)
        self._crcs.append(crc)

    def _label_table(self) -> bytes:
        """Returns ``dataset.json``, put together as text: a list object per image would take ten times as much."""
        groups = "" if self._groups is None else f', "groups": {self._groups.tolist()}'
        if not self._labels:
            return f'{{"labels": null{groups}}}'.encode()
        pairs = ", ".join(f'["{member_name(index)}", {label}]' for index, label in enumerate(self._labels))
        names = "" if self._class_names is None else f', "class_names": {json.dumps(self._class_names)}'
        return f'{{"labels": [{pairs}]{names}{groups}}}'.encode()


class ArchiveWriter:
    """Writes an archive image by image; the file appears only when the ``with`` block succeeds.

    The same images and labels give the same bytes (with the same Pillow and zlib).

    Args:
        path: the file to write.
        class_names: one name per class, also for classes without images; None if there are no names.
        groups: the number of each image's group; None if there are no groups.

    Raises:
        RunError: if the disk is full or not writable; an older file at ``path`` is then as it was.
    """

    def __init__(
        self, path: Path, class_names: Sequence[str] | None = None, groups: Sequence[int] | None = None
    ) -> None:
        self.path = path
        self._class_names, self._groups = class_names, groups
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
            with atomic_path(self.path) as temporary, temporary.open("wb") as file:
                self._body = ArchiveBody(file, self._class_names, self._groups)
                yield self
                self._body.finish()
        except OSError as error:
            raise RunError(f"Cannot write {self.path}: {error}; nothing was written there.") from error

    @property
    def num_images(self) -> int:
        return self._body.num_images

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
        pixels = image[0] if image.shape[0] == 1 else image.transpose(1, 2, 0)
        self._body.add(encode_png(Image.fromarray(np.ascontiguousarray(pixels))), label)


class ImageArchive:
    """Reads a prepared archive; members are decoded in memory and never extracted.

    Sets of at most 256 MiB of pixels keep each image once it was decoded; larger ones are decoded at every
    read. For one thread.

    What is sampled and clipped in training is a *record*: an image, or with ``unit="group"`` a group of images.

    Args:
        path: the file.
        unit: what a record is.

    Attributes:
        num_images: >= 1.
        num_records: N, the number of images or, with ``unit="group"``, of groups.
        resolution: height and width in pixels.
        num_channels: 1 (grey) or 3 (RGB).
        num_classes: number of class names, or without them the largest label + 1; 0 without labels.
        labels: (num_images,) int64, or None.
        class_names: one per class, or None.
        groups: (num_images,) int64 in [0, num_groups), each of which occurs, or None.

    Raises:
        InputError: if the file is absent, damaged or not a prepared archive, or has no groups for ``unit="group"``.
    """

    def __init__(self, path: Path, unit: Unit = "image") -> None:
        self.path, self.unit = path, unit
        self._zip = ZipReader(path)
        if LABELS_NAME not in self._zip:
            raise InputError(f"Expected {path} to hold {LABELS_NAME}: make an archive of it by dpdm prepare.")
        self._names = [name for name in self._zip.names if name.lower().endswith(IMAGE_SUFFIXES)]
        if not self._names:
            raise InputError(f"Expected {path} to hold images, found none: make it anew by dpdm prepare.")
        table = self._zip.read(LABELS_NAME, f"{path}: {LABELS_NAME}")
        self.labels, self.class_names, groups = parse_table(table, self._names, str(path))
        self.num_images = len(self._names)
        if unit == "group" and groups is None:
            raise InputError(
                f"Expected groups for data.unit=group, got none in {path}: make the archive by dpdm prepare --groups."
            )
        # Groups count from 0 without gaps here: those of the held-out images are missing in the file.
        self.groups = None if groups is None else np.unique(groups, return_inverse=True)[1].reshape(-1).astype(np.int64)
        self.num_groups = 0 if self.groups is None else int(self.groups.max()) + 1
        self.num_records = self.num_groups if unit == "group" else self.num_images
        if self.groups is not None:
            self._by_group = np.argsort(self.groups, kind="stable")  # a group's images are together here
            self._group_sizes = np.bincount(self.groups)
            self._group_starts = np.cumsum(self._group_sizes) - self._group_sizes
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
            indices: (n,) integers in [0, num_images); n may be 0.

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

    def choose_images(self, records: NDArray[np.int64], u: NDArray[np.float64]) -> NDArray[np.int64]:
        """Returns for each record one of its images, chosen uniformly by ``u``; a record that is an image is itself.

        Guarantee: an entry depends on its record, the images of that record and its own entry of ``u`` alone.

        Args:
            records: (n,) in [0, num_records).
            u: (..., n) in [0, 1).

        Returns:
            (..., n) in [0, num_images).
        """
        if self.unit == "image":
            return np.broadcast_to(records, u.shape)
        sizes = self._group_sizes[records]
        return self._by_group[self._group_starts[records] + np.minimum((u * sizes).astype(np.int64), sizes - 1)]

    def group_table(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Returns the images sorted by group (num_images,), and where a group begins there, and its size (num_groups,).

        Raises:
            ValueError: if there are no groups.
        """
        if self.groups is None:
            raise ValueError(f"Expected groups in {self.path}, got none.")
        return self._by_group, self._group_starts, self._group_sizes

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
        """Returns SHA-256, in hex, over labels, groups and the images' files in order; it identifies private data.

        Raises:
            InputError: naming the first image whose file differs from its checksum.
        """
        if self._fingerprint is None:
            head = {"images": self.num_images, "labelled": self.labels is not None, "grouped": self.groups is not None}
            digest = hashlib.sha256(json.dumps(head).encode())
            for numbers in (self.labels, self.groups):
                if numbers is not None:
                    digest.update(numbers.astype("<i8").tobytes())
            for index in range(self.num_images):  # not decoded: of 60,000 images that would take seconds
                content = self._bytes(index)
                digest.update(len(content).to_bytes(8, "little") + content)
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
            if image.width > MAX_RESOLUTION:
                raise InputError(
                    f"{self._where(index)}: expected at most {MAX_RESOLUTION}x{MAX_RESOLUTION}, got "
                    f"{image.width}x{image.height}: prepare it with --resolution."
                )
            return 1 if image.mode == "L" else 3, image.width
        raise InputError(f"{self.path}: none of its {self.num_images} images can be read: make it anew.")

    def _where(self, index: int) -> str:
        return f"{self.path}: {self._names[index]}"

    def _bytes(self, index: int) -> bytes:
        return self._zip.read(self._names[index], self._where(index))

    def _decode(self, index: int) -> NDArray[np.uint8]:
        image = open_image(self._where(index), self._bytes(index))
        expected = (MODES[self.num_channels], self.resolution, self.resolution)
        if (image.mode, *image.size) != expected:
            found = f"{image.mode} {image.width}x{image.height}"
            raise InputError(f"{self._where(index)}: {found}, expected {expected[0]} {expected[1]}x{expected[2]}")
        return to_array(load_pixels(self._where(index), image))


def is_archive(path: Path) -> bool:
    """Whether a zip has the layout of a prepared archive.

    Raises:
        InputError: if it is absent or no zip.
    """
    with ZipReader(path) as members:
        return LABELS_NAME in members
