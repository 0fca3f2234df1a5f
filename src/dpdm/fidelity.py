"""``dpdm fid-stats`` and ``dpdm evaluate --fid``: statistics of a data set, and synthetic images against them."""

import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dpdm import distributed
from dpdm.data.archive import ImageArchive, is_archive
from dpdm.data.folders import Tree, folder_tree, zip_tree
from dpdm.data.prepare import prepare
from dpdm.data.transforms import (
    MAX_GREY_BITS,
    MAX_RESOLUTION,
    Resolution,
    Transform,
    decode,
    is_grey,
    to_array,
)
from dpdm.device import pick_device, use_full_precision
from dpdm.errors import InputError
from dpdm.evaluation.arrays import read_arrays
from dpdm.evaluation.features import Extractor
from dpdm.evaluation.fid import (
    Images,
    Pooled,
    Statistics,
    check_comparable,
    fid,
    load_statistics,
    pooled_features,
    save_statistics,
)
from dpdm.evaluation.inception import open_extractor
from dpdm.evaluation.quality import (
    KERNEL_SUBSET_SIZE,
    KERNEL_SUBSETS,
    NEIGHBOURS,
    SCORE_SPLITS,
    inception_score,
    kernel_distance,
    precision_recall,
)
from dpdm.signals import ends_interrupt

MAX_PACKED_BYTES = 512 * 2**20  # of images in an npz file that is smaller than they are
COMPARED = 10_000  # features of each set that are kept for kernel distance, precision and recall
NOTE = "computed on real images without noise: where they are private, outside the guarantee, not to be shared"


@dataclass(frozen=True)
class Source:
    """What to compute statistics of: as ``dpdm prepare`` takes it."""

    source: str
    split: Literal["train", "holdout"] = "train"
    resolution: Resolution | None = None
    transform: Transform | None = None
    grey_bits: int = MAX_GREY_BITS


def make_statistics(source: Source, dest: Path, extractor: str) -> Statistics:
    """Computes the statistics of a data set's features and writes them to ``dest``.

    A source that is no archive yet is prepared into a folder beside ``dest`` that only its owner can read, and
    which is removed at the end. Several processes share the work; they must see that folder.

    Args:
        source: of the images.
        dest: a new file that ends in .npz.
        extractor: see ``open_extractor``.

    Raises:
        InputError: if ``dest`` exists, or source or extractor cannot be used.
        RunError: if a download or writing fails.
    """
    distributed.on_main(lambda: _check_new(dest))
    use_full_precision()
    with ends_interrupt():  # a scheduler's SIGTERM may leave no private images behind
        return _make_statistics(source, dest, extractor)


def _make_statistics(source: Source, dest: Path, extractor: str) -> Statistics:
    temporary = None
    try:
        path = _own_archive(source)
        if path is None:
            temporary = distributed.on_main(lambda: _temporary_folder(dest))
            path = temporary / "images.zip"
            distributed.on_main(lambda: _prepare(source, path))
        with distributed.together():
            images = archive_images(source.source, ImageArchive(path))
        opened = open_extractor(extractor, images.shape, device=pick_device("auto"))
        statistics = Statistics.of(pooled_features(opened, images).moments, opened)
        distributed.on_main(lambda: save_statistics(dest, statistics))
    finally:
        if temporary is not None and distributed.is_main():
            shutil.rmtree(temporary, ignore_errors=True)
    return statistics


def measure(path: Path, synthetic: Images, real: Images | None, extractor: str) -> dict[str, Any]:
    """Returns FID to the statistics in ``path``, and what else the same features tell.

    Kernel distance, precision and recall need real images themselves, and look at no more than 10,000 evenly chosen
    ones of each set. The Inception score needs an extractor with class probabilities.

    Args:
        path: file of statistics.
        synthetic: the images to judge.
        real: to compare with, of the same shape; None leaves three numbers out.
        extractor: see ``open_extractor``.

    Raises:
        InputError: if a file cannot be used, or does not fit the others.
    """
    if real is not None and real.shape != synthetic.shape:
        raise InputError(
            f"Expected {real.name} images of shape {synthetic.shape} as the synthetic ones, got {real.shape}: give "
            "images of one size."
        )
    with distributed.together():
        reference = load_statistics(path)
    use_full_precision()
    opened = open_extractor(extractor, synthetic.shape, device=pick_device("auto"))
    with distributed.together():
        check_comparable(path, reference, opened)
    found = pooled_features(opened, synthetic, keep=COMPARED)
    result: dict[str, Any] = {
        "note": NOTE,
        "fid": fid(found.moments, reference),
        "statistics": str(path),
        "statistics_extractor": reference.extractor,
        "statistics_images": reference.count,
        "extractor": opened.name,
        "num_synthetic": synthetic.count,
    }
    if real is not None:
        result |= _compare(opened, real, found)
    if found.score is not None:
        mean, deviation = inception_score(found.score)
        result["inception_score"] = {"mean": mean, "std": deviation}
    return result


def summary(result: dict[str, Any]) -> str:
    """Returns what ``measure`` found as lines for the terminal."""
    return "\n".join(
        ["Measured on real images; where they are private, outside the guarantee:"]
        + [f"  {name}: {value} ({note})" if note else f"  {name}: {value}" for name, value, note in rows(result)]
    )


def rows(result: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Returns name, value and remark of everything that ``measure`` found."""
    known = "" if result["statistics_extractor"] else "; the file does not name its extractor"
    count = f" of {result['statistics_images']} images" if result["statistics_images"] else ""
    found = [
        (
            "FID",
            f"{result['fid']:.4g}",
            f"{result['num_synthetic']} synthetic images to {Path(result['statistics']).name}{count}; "
            f"{result['extractor']}{known}",
        )
    ]
    if "kid" in result:
        compared = f"{result['num_compared'][0]} synthetic and {result['num_compared'][1]} real images"
        kid = result["kid"]
        differ = "" if kid["subset"] >= min(result["num_compared"]) else f", which differ by {kid['std']:.2g}"
        subsets = f"mean of {KERNEL_SUBSETS} subsets of {kid['subset']}{differ}"
        found.append(("KID", f"{kid['mean']:.3g}", subsets))
        found.append(("Precision", f"{result['precision']:.3f}", compared))
        found.append(("Recall", f"{result['recall']:.3f}", compared))
    if "inception_score" in result:
        score = result["inception_score"]
        found.append(
            (
                "Inception score",
                f"{score['mean']:.4g}",
                f"synthetic images alone, mean of {SCORE_SPLITS} parts, which differ by {score['std']:.2g}",
            )
        )
    return found


def archive_images(name: str, archive: ImageArchive) -> Images:
    """Returns a prepared archive's images."""
    shape = (archive.num_channels, archive.resolution, archive.resolution)
    return Images(name, archive.num_images, shape, archive.read)


def open_samples(path: Path) -> Images:
    """Opens given images: an npz file, or a folder or zip with any tree of them.

    Raises:
        InputError: if there are none, or (once they are read) not all are of one size.
    """
    if path.suffix == ".npz":
        return _array_file(path)
    if not path.exists():
        raise InputError(f"Expected images at {path}, found nothing: give a folder, a zip or an npz file.")
    tree = folder_tree(path) if path.is_dir() else zip_tree(path)
    names = _without_overview(tree)
    if not names:
        raise InputError(f"Expected images in {path}, found none.")
    channels = 1 if all(is_grey(name, tree.read(name)) for name in names) else 3
    first = to_array(decode(names[0], tree.read(names[0]), channels))
    if max(first.shape) > MAX_RESOLUTION:
        raise InputError(
            f"Expected images of at most {MAX_RESOLUTION}x{MAX_RESOLUTION} in {path}, got {first.shape[2]}x"
            f"{first.shape[1]} ({names[0]}): bring them to the size of the real ones."
        )

    def read(rows: np.ndarray) -> np.ndarray:
        images = np.empty((len(rows), *first.shape), np.uint8)
        for position, row in enumerate(rows):
            image = to_array(decode(names[row], tree.read(names[row]), channels))
            if image.shape != first.shape:
                raise InputError(
                    f"Expected images of one size in {path}, got {image.shape[2]}x{image.shape[1]} ({names[row]}) and "
                    f"{first.shape[2]}x{first.shape[1]}: bring them to one size with dpdm prepare."
                )
            images[position] = image
        return images

    return Images("synthetic", len(names), (first.shape[0], first.shape[1], first.shape[2]), read)


def _compare(extractor: Extractor, real: Images, found: Pooled) -> dict[str, Any]:
    sample = pooled_features(extractor, real, keep=COMPARED).sample
    size = min(KERNEL_SUBSET_SIZE, len(sample), len(found.sample))

    def compare() -> dict[str, Any]:
        mean, deviation = kernel_distance(found.sample, sample)
        precision, recall = precision_recall(sample, found.sample, neighbours=NEIGHBOURS)
        return {
            "kid": {"mean": mean, "std": deviation, "subset": size},
            "precision": precision,
            "recall": recall,
            "num_compared": [len(found.sample), len(sample)],
            "real": real.name,
        }

    return distributed.on_main(compare)


def _check_new(dest: Path) -> None:
    if dest.suffix != ".npz" or dest.exists():
        raise InputError(f"Expected DEST to be a new file that ends in .npz, got {dest}: choose another name.")


def _own_archive(source: Source) -> Path | None:
    """Returns the source's path if it is a prepared archive that is to be taken as it is."""
    path = Path(source.source).expanduser()
    if source.split != "train" or source.resolution or source.transform or not path.is_file():
        return None
    try:
        return path if is_archive(path) else None
    except InputError:
        return None  # no zip: preparing it says what is wrong


def _temporary_folder(dest: Path) -> Path:
    dest.parent.mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(prefix=f".{dest.stem}.", dir=dest.parent))


def _prepare(source: Source, dest: Path) -> None:
    prepare(
        source.source,
        dest,
        resolution=source.resolution,
        transform=source.transform,
        grey_bits=source.grey_bits,
        split=source.split,
    )


def _without_overview(tree: Tree) -> list[str]:
    """Returns the names of the images, less the overview that ``dpdm sample`` puts beside 000000.png."""
    ours = any(re.fullmatch(r"0+\.png", name) for name in tree.images)
    return [name for name in tree.images if not (ours and name == "grid.png")]


def _array_file(path: Path) -> Images:
    """Reads uint8 ``arr_0`` (N, H, W, C), as ``dpdm sample`` and others write it."""
    try:
        found = read_arrays(path, ("arr_0",), MAX_PACKED_BYTES)
        if "arr_0" not in found:
            raise ValueError("it holds no arr_0")
        images = found["arr_0"]
    except (OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"Expected an npz file with images arr_0 at {path}, could not read one ({reason}).") from None
    if images.ndim != 4 or images.shape[3] not in (1, 3) or images.dtype != np.uint8 or images.size == 0:
        raise InputError(
            f"Expected arr_0 in {path} to be (N, H, W, C) uint8 with C 1 or 3, got {images.shape} {images.dtype}."
        )
    return Images.of("synthetic", images.transpose(0, 3, 1, 2))
