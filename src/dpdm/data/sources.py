"""From what the user names to splits of records: data set names, idx folders, folders and zips of images."""

from pathlib import Path

import numpy as np

from dpdm.data.download import PUBLISHED, fetch
from dpdm.data.folders import folder_tree, tree_splits, zip_tree
from dpdm.data.idx import array_split, find_idx, idx_splits
from dpdm.data.records import Split
from dpdm.errors import InputError

DIGITS = "digits"
DIGITS_HOLDOUT_EVERY = 6
DEFAULT_CACHE = Path("~/.cache/dpdm")


def open_source(source: str, *, cache_dir: Path | None = None) -> dict[str, Split]:
    """Opens a source; images are read later, one by one.

    Args:
        source: ``digits``, ``mnist`` or ``fashion_mnist`` (a folder of such a name is given as ``./mnist``),
            or the path of an idx folder, a folder or zip of images, or a prepared archive.
        cache_dir: where downloads are kept; ~/.cache/dpdm unless given.

    Returns:
        ``{"train": Split}``, and "holdout" beside it if the source brings its own.

    Raises:
        InputError: if there is no such source, or it is damaged.
        RunError: if a download fails.
    """
    if source == DIGITS:
        return _digits()
    if source in PUBLISHED:
        data_set = PUBLISHED[source]
        folder = fetch(source, data_set, (cache_dir or DEFAULT_CACHE.expanduser()) / source)
        return idx_splits(folder, list(data_set.class_names))
    path = source_path(source)
    if path is None or not path.exists():
        names = ", ".join([DIGITS, *PUBLISHED])
        raise InputError(f"Expected source={source!r} to be {names}, a folder or a zip; there is no such file.")
    if not path.is_dir():
        return tree_splits(zip_tree(path))
    if find_idx(path, "train", "images") or find_idx(path, "train", "labels"):
        return idx_splits(path)
    return tree_splits(folder_tree(path))


def source_path(source: str) -> Path | None:
    """Returns the path that a source is read from, or None for a data set's name."""
    return None if source == DIGITS or source in PUBLISHED or not source else Path(source).expanduser()


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
