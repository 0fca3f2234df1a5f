"""``dpdm prepare``: a source becomes one archive, or one of private and one of held-out records.

Records are prepared one by one: no step, the choice of held-out records included, looks at two of them. What
is taken from all together (number of channels, common size, class names) is treated as public and named in
the statement.
"""

import contextlib
import hashlib
import hmac
import os
import struct
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from dpdm.data.archive import ArchiveWriter, ImageArchive
from dpdm.data.records import Split, list_names
from dpdm.data.sources import open_source, source_path
from dpdm.data.transforms import Transform, decode, fit, is_grey, to_array
from dpdm.errors import InputError
from dpdm.progress import Progress

SIZES_SHOWN = 5
MIN_KEY_BYTES = 16
DECODED_AHEAD = 64  # images in flight: enough for the threads, little memory even for large photos


def prepare(
    source: str,
    dest: Path,
    *,
    resolution: int | None = None,
    transform: Transform | None = None,
    split: Literal["train", "holdout"] = "train",
    overwrite: bool = False,
    cache_dir: Path | None = None,
) -> ImageArchive:
    """Writes one split of a source as an archive.

    Args:
        source: see ``open_source``.
        dest: the zip to write.
        resolution: height and width of the result; None keeps the size, which must then be common to all.
        transform: "center-crop" takes the central square first; None expects square images.
        split: the source's "train" split (all of it where it has no own hold-out), or its own "holdout".
        overwrite: replace an existing ``dest``.
        cache_dir: where downloads are kept.

    Raises:
        InputError: naming all images that cannot be used, in one line; nothing is written then.
        RunError: if a download or writing fails.
    """
    _check_dest(source, dest, overwrite)
    splits = open_source(source, cache_dir=cache_dir)
    if split not in splits:
        raise InputError(f"Expected split={split!r} to be one of {', '.join(splits)}: {source} has no other.")
    chosen = splits[split]
    _check_enough(source, chosen.num_images)
    recipe = _Recipe(source, _num_channels([chosen]), resolution, transform)
    with ArchiveWriter(dest, chosen.class_names) as writer:
        _write(recipe, [chosen], lambda image, part: writer)
    return ImageArchive(dest)


def prepare_with_holdout(
    source: str,
    train_dest: Path,
    holdout_dest: Path,
    *,
    holdout_key: bytes,
    fraction: float = 1 / 6,
    resolution: int | None = None,
    transform: Transform | None = None,
    overwrite: bool = False,
    cache_dir: Path | None = None,
) -> tuple[ImageArchive, ImageArchive]:
    """Writes a private and a held-out archive.

    A source with a split of its own (digits, t10k files, train/ and test/ folders) keeps it; of any other
    each record goes to the side that ``is_held_out`` says.

    Args:
        source: see ``open_source``.
        train_dest: the zip of the records to train on.
        holdout_dest: the zip of the held-out records.
        holdout_key: at least 16 random bytes, to be kept as private as the images.
        fraction: expected part of the records that is held out, in (0, 1).
        resolution: see ``prepare``.
        transform: see ``prepare``.
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
    splits = open_source(source, cache_dir=cache_dir)
    parts = list(splits.values())
    _check_enough(source, sum(part.num_images for part in parts))
    recipe = _Recipe(source, _num_channels(parts), resolution, transform)
    class_names = splits["train"].class_names
    with (
        ArchiveWriter(holdout_dest, class_names) as held_out,
        ArchiveWriter(train_dest, class_names) as train,
    ):

        def side(image: NDArray[np.uint8], part: Split) -> ArchiveWriter:
            if "holdout" in splits:
                return held_out if part is splits["holdout"] else train
            return held_out if is_held_out(image, holdout_key, fraction) else train

        _write(recipe, parts, side)
        if not (train.num_images and held_out.num_images):
            raise InputError(
                f"{source}: expected images on both sides, got {train.num_images} to train on and "
                f"{held_out.num_images} held out: give more images, or folders train/ and test/."
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
    digest = hmac.new(key, message, hashlib.sha256).digest()
    # Whole numbers: 64 random bits divided in floating point could round up to 1.
    return int.from_bytes(digest[:8], "big") < int(fraction * 2**64)


@dataclass
class _Recipe:
    """How each record is prepared, and what went wrong so far."""

    source: str
    num_channels: int
    resolution: int | None
    transform: Transform | None
    bad: list[str] = field(default_factory=list)
    sizes: dict[tuple[int, int], str] = field(default_factory=dict)

    def load(self, split: Split, index: int) -> NDArray[np.uint8] | InputError:
        """Returns (C, H, W), or the error: an exception would end the generator that decodes ahead."""
        name = split.names[index]
        try:
            return to_array(fit(decode(name, split.read(index), self.num_channels), self.resolution, self.transform))
        except InputError as error:
            return error

    def accepts(self, name: str, image: NDArray[np.uint8] | InputError) -> bool:
        """Notes a record's problem or size; False once anything stands against writing."""
        if isinstance(image, InputError):
            self.bad.append(str(image))
        else:
            self.sizes.setdefault((image.shape[2], image.shape[1]), name)
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


def _write(
    recipe: _Recipe, splits: list[Split], writer_of: Callable[[NDArray[np.uint8], Split], ArchiveWriter]
) -> None:
    """Prepares all records and adds each to its writer; goes on after a bad one, to name all of them."""
    with Progress("prepare", sum(split.num_images for split in splits), unit="images") as progress:
        for split in splits:
            for index, image in enumerate(_decoded(recipe, split)):
                if recipe.accepts(split.names[index], image) and not isinstance(image, InputError):
                    writer_of(image, split).add(image, split.label(index))
                progress.advance()
    recipe.finish()


def _decoded(recipe: _Recipe, split: Split) -> Iterator[NDArray[np.uint8] | InputError]:
    """Decodes on several threads (Pillow releases the interpreter lock), in order, a bounded number ahead."""
    pending: deque[Future[NDArray[np.uint8] | InputError]] = deque()
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for index in range(split.num_images):
            pending.append(pool.submit(recipe.load, split, index))
            if len(pending) >= DECODED_AHEAD:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def _num_channels(splits: list[Split]) -> int:
    """Returns 1 if every image's format is grey, else 3; reads headers until the first colour image."""
    for split in splits:
        for index, name in enumerate(split.names):
            # An unreadable image has no say here; decoding names it with all others.
            with contextlib.suppress(InputError):
                if not is_grey(name, split.read(index)):
                    return 3
    return 1


def _check_enough(source: str, num_images: int) -> None:
    if num_images < 2:
        raise InputError(f"Expected at least 2 images in {source}, got {num_images}.")


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
