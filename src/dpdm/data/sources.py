"""From what the user names to splits of records: data set names, idx folders, tars of CIFAR-10, trees of images."""

from pathlib import Path

import numpy as np

from dpdm.data.celeba import PARTITION_NAME, celeba_splits, find_list
from dpdm.data.cifar import SUFFIXES, cifar_splits
from dpdm.data.download import CIFAR10, PUBLISHED, fetch, fetch_cifar10
from dpdm.data.folders import folder_tree, tree_splits, zip_tree
from dpdm.data.idx import array_split, find_idx, idx_splits
from dpdm.data.records import Split
from dpdm.errors import InputError
from dpdm.fetching import DEFAULT_CACHE

DIGITS = "digits"
NAMES = (DIGITS, *PUBLISHED, CIFAR10)
DIGITS_HOLDOUT_EVERY = 6


def open_source(source: str, *, cache_dir: Path | None = None, attribute: str | None = None) -> dict[str, Split]:
    """Opens a source; images are read later, one by one.

    Args:
        source: ``digits``, ``mnist``, ``fashion_mnist`` or ``cifar10`` (a folder of such a name is given as
            ``./mnist``), or the path of an idx folder, of CIFAR-10's original tar, of a folder or zip of images,
            with CelebA's lists beside it or without, or of a prepared archive.
        cache_dir: where downloads are kept; ~/.cache/dpdm unless given.
        attribute: of CelebA's images, to be their class.

    Returns:
        ``{"train": Split}``, and "holdout" beside it if the source brings its own.

    Raises:
        InputError: if there is no such source, it is damaged, or a name is that of a file or folder here as well.
        RunError: if a download fails.
    """
    if source in NAMES and Path(source).exists():
        raise InputError(
            f"Expected a source with one meaning, got {source!r}, which names a data set and is here as well: give "
            f"./{source} for what is here, or work in another folder to get the data set."
        )
    path = source_path(source)
    if path is not None and path.exists() and not path.name.endswith(SUFFIXES):
        return _open_path(path, attribute)
    if attribute is not None:
        raise InputError(f"Expected a folder or zip of CelebA's images with attribute={attribute!r}, got {source!r}.")
    if path is not None and path.exists():
        return cifar_splits(path)
    cache = cache_dir or DEFAULT_CACHE.expanduser()
    if source == DIGITS:
        return _digits()
    if source == CIFAR10:
        return cifar_splits(fetch_cifar10(cache / source))
    if source in PUBLISHED:
        return idx_splits(fetch(source, PUBLISHED[source], cache / source), list(PUBLISHED[source].class_names))
    raise InputError(f"Expected source={source!r} to be {', '.join(NAMES)}, a folder or a zip; there is no such file.")


def _open_path(path: Path, attribute: str | None) -> dict[str, Split]:
    if path.is_dir() and (find_idx(path, "train", "images") or find_idx(path, "train", "labels")):
        return idx_splits(path)
    tree = folder_tree(path) if path.is_dir() else zip_tree(path)
    partition = find_list(path, PARTITION_NAME)
    if partition is not None or attribute is not None:
        return celeba_splits(tree, path, partition, attribute)
    return tree_splits(tree)


def source_path(source: str) -> Path | None:
    """Returns the path that a source is read from, or None for a data set's name."""
    return None if source in NAMES or not source else Path(source).expanduser()


def _digits() -> dict[str, Split]:
    """The 1,797 digits that scikit-learn brings, 8x8; held out are the 300 whose index is a multiple of 6."""
    # Imported here because it takes a second, which no other source should wait for.
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    pixels = np.rint(images / 16 * 255).astype(np.uint8).reshape(-1, 8, 8)
    held_out = np.arange(len(pixels)) % DIGITS_HOLDOUT_EVERY == 0
    names = [str(digit) for digit in range(10)]
    return {
        split: array_split(f"{DIGITS} ({split})", pixels[chosen], labels[chosen].astype(np.int64), names)
        for split, chosen in {"train": ~held_out, "holdout": held_out}.items()
    }
