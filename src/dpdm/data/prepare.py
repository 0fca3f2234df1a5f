"""``dpdm prepare``: a source becomes one archive, or one of private and one of held-out records.

Records are prepared one by one: no step, the choice of held-out records included, looks at two of them (at two
groups, if the images have groups, which are held out as a whole). What
is taken from all together (number of channels, common size, class names) is treated as public and named in
the statement.
"""

import contextlib
import hashlib
import json
import os
import struct
import sys
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import PIL
from numpy.typing import NDArray
from PIL import features

from dpdm.data.archive import ImageArchive, encode_png
from dpdm.data.groups import below, group_is_held_out, with_groups
from dpdm.data.records import Split, list_names
from dpdm.data.resume import Unfinished, unfinished
from dpdm.data.sources import open_source, source_path
from dpdm.data.transforms import (
    MAX_GREY_BITS,
    MAX_RESOLUTION,
    Resolution,
    Transform,
    check_grey_bits,
    check_resolution,
    decode,
    fit,
    is_grey,
    open_image,
    to_array,
)
from dpdm.errors import InputError
from dpdm.progress import Progress

SIZES_SHOWN = 5
MIN_KEY_BYTES = 16
RECORDS_PER_TASK = 16  # a task for each record would cost as much as a small image
TRAIN, HOLDOUT = 0, 1  # the two archives
LARGE_PIXELS = 2**24
_LARGE_ONE = threading.Lock()


def prepare(
    source: str,
    dest: Path,
    *,
    resolution: Resolution | None = None,
    transform: Transform | None = None,
    grey_bits: int = MAX_GREY_BITS,
    split: Literal["train", "holdout"] = "train",
    attribute: str | None = None,
    groups: str | None = None,
    overwrite: bool = False,
    cache_dir: Path | None = None,
) -> ImageArchive:
    """Writes one split of a source as an archive; goes on where an earlier call with these arguments was stopped.

    Args:
        source: see ``open_source``.
        dest: the zip to write.
        resolution: side of the result; None keeps the size, which must then be common to all. "center-crop-wide"
            takes (width, height), and the result's side is the width.
        transform: see ``fit``; None expects square images.
        grey_bits: of 16-bit grey images, how many are used, see ``decode``; a public fact.
        split: the source's "train" split (all of it where it has no own hold-out), or its own "holdout".
        attribute: see ``open_source``.
        groups: see ``with_groups``.
        overwrite: replace an existing ``dest``.
        cache_dir: where downloads are kept.

    Raises:
        InputError: naming all images that cannot be used, in one line; nothing is written then.
        RunError: if a download or writing fails.
    """
    _check_dest(source, dest, overwrite)
    check_resolution(resolution, transform)
    check_grey_bits(grey_bits)
    splits = with_groups(open_source(source, cache_dir=cache_dir, attribute=attribute), groups)
    if split not in splits:
        raise InputError(f"Expected split={split!r} to be one of {', '.join(splits)}: {source} has no other.")
    chosen = [splits[split]]
    recipe = _Recipe(source, chosen, [TRAIN], _num_channels(source, chosen), resolution, transform, grey_bits)
    with unfinished([dest], chosen[0].class_names, recipe.groups_of_archives()[:1]) as work:
        _write(recipe, work)
    return ImageArchive(dest)


def prepare_with_holdout(
    source: str,
    train_dest: Path,
    holdout_dest: Path,
    *,
    holdout_key: bytes,
    fraction: float = 1 / 6,
    resolution: Resolution | None = None,
    transform: Transform | None = None,
    grey_bits: int = MAX_GREY_BITS,
    groups: str | None = None,
    overwrite: bool = False,
    cache_dir: Path | None = None,
) -> tuple[ImageArchive, ImageArchive]:
    """Writes a private and a held-out archive; goes on where an earlier call with these arguments was stopped.

    A source with a split of its own (digits, t10k files, train/ and test/ folders) keeps it; of any other
    each record goes to the side that ``is_held_out`` says or, if images have groups, ``group_is_held_out``.

    Args:
        source: see ``open_source``.
        train_dest: the zip of the records to train on.
        holdout_dest: the zip of the held-out records.
        holdout_key: at least 16 random bytes, to be kept as private as the images.
        fraction: expected part of the records that is held out, in (0, 1).
        resolution: see ``prepare``.
        transform: see ``prepare``.
        grey_bits: see ``prepare``.
        groups: see ``with_groups``.
        overwrite: replace existing archives.
        cache_dir: where downloads are kept.

    Raises:
        InputError: as ``prepare``; also if a side would get no record.
        RunError: if a download or writing fails.
    """
    for dest in (train_dest, holdout_dest):
        _check_dest(source, dest, overwrite)
    if train_dest.resolve() == holdout_dest.resolve():
        raise InputError(f"Expected two different archives, got {train_dest} twice.")
    if not 0 < fraction < 1:
        raise InputError(f"Expected 0 < fraction={fraction} < 1: it is the part of the images that is held out.")
    _check_key(holdout_key)
    check_resolution(resolution, transform)
    check_grey_bits(grey_bits)
    splits = with_groups(open_source(source, cache_dir=cache_dir), groups)
    parts = list(splits.values())
    sides = [HOLDOUT if name == "holdout" else TRAIN for name in splits] if "holdout" in splits else None
    channels = _num_channels(source, parts)
    recipe = _Recipe(source, parts, sides, channels, resolution, transform, grey_bits, holdout_key, fraction)
    with unfinished([train_dest, holdout_dest], splits["train"].class_names, recipe.groups_of_archives()) as work:
        _write(recipe, work)
        train, held_out = (body.num_images for body in work.bodies)
        if not (train and held_out):
            raise InputError(
                f"{source}: expected images on both sides, got {train} to train on and {held_out} held out: give "
                "more images, or folders train/ and test/."
            )
    return ImageArchive(train_dest), ImageArchive(holdout_dest)


def is_held_out(image: NDArray[np.uint8], key: bytes, fraction: float) -> bool:
    """Whether a record is held out: its keyed hash, read as a number in [0, 1), is below ``fraction``.

    HMAC-SHA256 over shape and pixels, so that equal images are on one side whatever their names, labels and
    order.

    Guarantee: depends on this record and the key alone. Adding or removing a record moves no other one, so
    training on one side has the sensitivity of training on a fixed set; who lacks the key cannot tell the
    side of an image.

    Args:
        image: (C, H, W) uint8 with C 1 or 3.
        key: at least 16 bytes.
        fraction: in (0, 1).
    """
    _check_key(key)
    # As RGB: whether the set as a whole is stored as grey depends on other records, the side must not.
    rgb = np.ascontiguousarray(np.broadcast_to(image, (3, *image.shape[1:])))
    message = b"dpdm hold-out, version 1" + struct.pack("<3Q", *rgb.shape) + rgb.tobytes()
    return below(key, message, fraction)


@dataclass(frozen=True)
class _Record:
    """A prepared record.

    Attributes:
        side: the archive that it belongs to.
        png: its file there.
        size: width and height.
    """

    side: int
    png: bytes
    size: tuple[int, int]


@dataclass
class _Recipe:
    """How each record is prepared, and what went wrong so far.

    Attributes:
        source: for messages.
        splits: the records are all of the first split, then all of the next.
        sides: the archive of each split; None: of each record, by its keyed hash.
        num_channels, resolution, transform, grey_bits: see ``decode`` and ``fit``.
        key, fraction: see ``is_held_out``.
        bad: a message for each record that cannot be used.
        sizes: each size with the first record that has it.
    """

    source: str
    splits: list[Split]
    sides: list[int] | None
    num_channels: int
    resolution: Resolution | None
    transform: Transform | None
    grey_bits: int
    key: bytes = b""
    fraction: float = 0.0
    bad: list[str] = field(default_factory=list)
    sizes: dict[tuple[int, int], str] = field(default_factory=dict)

    def identity(self) -> str:
        """Returns SHA-256, in hex, over everything that the archives' bytes depend on.

        Files are taken to be the same if name, size and time of change are; members of zips, if name, size and
        checksum are.
        """
        code = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
        libraries = [PIL.__version__, *(features.version(name) for name in ("jpg", "zlib", "webp", "libtiff"))]
        options = [self.sides, self.num_channels, self.resolution, self.transform, self.grey_bits]
        options += [self.key.hex(), self.fraction]
        shapes = [[split.num_images, split.class_names, split.labels is not None] for split in self.splits]
        digest = hashlib.sha256(json.dumps([options, shapes, libraries]).encode() + hashlib.sha256(code).digest())
        for split in self.splits:
            if split.labels is not None:
                digest.update(split.labels.astype("<i8").tobytes())
            if split.groups is not None:
                digest.update(json.dumps(list(split.groups)).encode())
            for index, name in enumerate(split.names):
                stamp = split.stamp(index)
                digest.update(f"{len(name)} {len(stamp)} {name}".encode(errors="surrogateescape") + stamp)
        return digest.hexdigest()

    def load(self, number: int, index: int) -> _Record | InputError:
        """Prepares record ``index`` of split ``number``; returns the error, as an exception would end all of a task."""
        split = self.splits[number]
        name = split.names[index]
        try:
            content = split.read(index)
            with _LARGE_ONE if _is_large(name, content) else contextlib.nullcontext():
                image = fit(
                    decode(name, content, self.num_channels, grey_bits=self.grey_bits), self.resolution, self.transform
                )
            if max(image.size) > MAX_RESOLUTION:
                raise InputError(f"{name}: {image.width}x{image.height}, expected at most {MAX_RESOLUTION} a side")
        except InputError as error:
            return error
        side = self.group_side(number, index)
        if side is None:
            side = HOLDOUT if is_held_out(to_array(image), self.key, self.fraction) else TRAIN
        return _Record(side, encode_png(image), image.size)

    def group_side(self, number: int, index: int) -> int | None:
        """Returns the archive of record ``index`` of split ``number``, or None if its pixels decide."""
        if self.sides is not None:
            return self.sides[number]
        groups = self.splits[number].groups
        if groups is None:
            return None
        return HOLDOUT if group_is_held_out(groups[index], self.key, self.fraction) else TRAIN

    def groups_of_archives(self) -> list[list[int] | None]:
        """Returns for both archives the number of each image's group, in order; None if images have no groups."""
        found: list[list[int]] = [[], []]
        numbers: dict[str, int] = {}
        for number, split in enumerate(self.splits):
            if split.groups is None:
                return [None, None]
            for index, group in enumerate(split.groups):
                found[self.group_side(number, index) or TRAIN].append(numbers.setdefault(group, len(numbers)))
        return list(found)

    def label(self, record: int) -> int | None:
        """Returns the class of a record, counted over all splits."""
        for split in self.splits:
            if record < split.num_images:
                return split.label(record)
            record -= split.num_images
        raise IndexError(record)

    def accepts(self, name: str, record: _Record | InputError) -> bool:
        """Notes a record's problem or size; False once anything stands against writing."""
        if isinstance(record, InputError):
            self.bad.append(str(record))
        else:
            self.sizes.setdefault(record.size, name)
        return not self.bad and self._sizes_agree()

    def _sizes_agree(self) -> bool:
        return len(self.sizes) == 1 and all(width == height for width, height in self.sizes)

    def finish(self) -> None:
        """Raises one InputError that names everything that was found."""
        problems = []
        if self.bad:
            problems.append(f"{len(self.bad)} images cannot be used: {list_names(self.bad)}")
        if self.sizes and not self._sizes_agree():
            shown = [f"{width}x{height} ({name})" for (width, height), name in self.sizes.items()]
            more = f" and {len(shown) - SIZES_SHOWN} more" if len(shown) > SIZES_SHOWN else ""
            remedy = "--transform center-crop" if self.resolution else "--resolution 32x32 --transform center-crop"
            problems.append(
                f"expected square images of one size, got {', '.join(shown[:SIZES_SHOWN])}{more}: "
                f"give dpdm prepare or synthesize {remedy}"
            )
        if problems:
            raise InputError(f"{self.source}: {'; '.join(problems)}")


def _is_large(name: str, content: bytes | NDArray[np.uint8]) -> bool:
    """Whether decoding takes hundreds of megabytes, so that it is not to be done on all threads at once."""
    if not isinstance(content, bytes):
        return content.size > LARGE_PIXELS
    image = open_image(name, content)
    return image.width * image.height > LARGE_PIXELS


def _write(recipe: _Recipe, work: Unfinished) -> None:
    """Prepares all records but those that are done; goes on after a bad one, to name all of them."""
    total = sum(split.num_images for split in recipe.splits)
    if not work.go_on(recipe.identity(), recipe.label):
        print("note: the source, the options or dpdm are not those of the unfinished archive: anew", file=sys.stderr)
    if work.num_done:
        print(f"note: going on after {work.num_done} of {total} images", file=sys.stderr)
        recipe.accepts(recipe.splits[0].names[0], recipe.load(0, 0))  # the others' size
    with Progress("prepare", total, start=work.num_done, unit="images") as progress:
        for split, indices, records in _prepared(recipe, work.num_done):
            for index, record in zip(indices, records, strict=True):
                if recipe.accepts(split.names[index], record) and isinstance(record, _Record):
                    work.add(record.side, record.png, split.label(index))
            work.flush()
            progress.advance(len(records))
    recipe.finish()


def _prepared(recipe: _Recipe, start: int) -> Iterator[tuple[Split, range, list[_Record | InputError]]]:
    """Prepares records from ``start`` on, in order, on several threads (Pillow releases the interpreter lock).

    A bounded number of them is ahead: memory does not grow with the source.
    """

    def task(number: int, indices: range) -> tuple[Split, range, list[_Record | InputError]]:
        return recipe.splits[number], indices, [recipe.load(number, index) for index in indices]

    workers = min(8, os.cpu_count() or 1)
    pending: deque[Future[tuple[Split, range, list[_Record | InputError]]]] = deque()
    pool = ThreadPoolExecutor(workers)
    try:
        for number, split in enumerate(recipe.splits):
            for first in range(min(start, split.num_images), split.num_images, RECORDS_PER_TASK):
                indices = range(first, min(first + RECORDS_PER_TASK, split.num_images))
                pending.append(pool.submit(task, number, indices))
                if len(pending) > workers + 1:
                    yield pending.popleft().result()
            start = max(0, start - split.num_images)
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _num_channels(source: str, splits: list[Split]) -> int:
    """Returns 1 if every image's format is grey, else 3; reads headers until the first colour image."""
    num_images = sum(split.num_images for split in splits)
    if num_images < 2:
        raise InputError(f"Expected at least 2 images in {source}, got {num_images}.")
    for split in splits:
        for index, name in enumerate(split.names):
            # An unreadable image has no say here; decoding names it with all others.
            with contextlib.suppress(InputError):
                if not is_grey(name, split.read(index)):
                    return 3
    return 1


def _check_key(key: bytes) -> None:
    if len(key) < MIN_KEY_BYTES:
        raise InputError(f"Expected holdout_key of at least {MIN_KEY_BYTES} bytes, got {len(key)}.")


def _check_dest(source: str, dest: Path, overwrite: bool) -> None:
    if dest.suffix != ".zip":
        raise InputError(f"Expected dest={dest} to end in .zip.")
    if dest.is_dir() or (dest.exists() and not overwrite):
        raise InputError(f"Expected dest={dest} to be a new file, it exists: choose another name.")
    path = source_path(source)
    if path is not None and dest.resolve().is_relative_to(path.resolve()):
        raise InputError(f"Expected dest={dest} outside of the source {source}: choose another place.")
