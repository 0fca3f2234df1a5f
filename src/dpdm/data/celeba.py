"""CelebA's two lists: which image belongs to which split, and 40 attributes of each.

Liu, Luo, Wang and Tang, "Deep Learning Face Attributes in the Wild", 2015. ``list_eval_partition.txt`` has a line
"000001.jpg 0" for each image: 0 training, 1 validation, 2 test. ``list_attr_celeba.txt`` has the number of images, the
names of the attributes, and then lines "000001.jpg -1 1 ...". Both lie in the folder of the images or in its parent.
"""

import difflib
import sys
from pathlib import Path

import numpy as np

from dpdm.data.folders import Tree, tree_split
from dpdm.data.records import Split, list_names
from dpdm.errors import InputError

PARTITION_NAME = "list_eval_partition.txt"
ATTRIBUTES_NAME = "list_attr_celeba.txt"
PARTS = {"train": "0", "validation": "1", "holdout": "2"}
MAX_BYTES = 64 * 2**20  # the larger one has 27 MB


def find_list(source: Path, name: str) -> Path | None:
    """Returns the path of a list in the folder ``source`` or beside it, or None."""
    for folder in (source, source.absolute().parent):
        if (folder / name).is_file():
            return folder / name
    return None


def celeba_splits(tree: Tree, source: Path, partition: Path | None, attribute: str | None) -> dict[str, Split]:
    """Returns the splits of a tree of CelebA's images.

    Args:
        tree: of the images; they are known by their file names, whatever folder they are in.
        source: where the lists are looked for.
        partition: list of the splits: "train" and "holdout" (the test images) are taken, validation images left
            out. None: all are "train".
        attribute: of ``list_attr_celeba.txt``, which then gives the classes 0 (without) and 1 (with); None: no
            classes.

    Raises:
        InputError: naming the images that a list lacks, the attribute if there is no such one, or the line that
            cannot be read.
    """
    if not tree.images:
        raise InputError(f"Expected images in {tree.where}, found none.")
    parts = {} if partition is None else _read_partition(partition)
    classes = {} if attribute is None else _read_attribute(source, attribute)
    for path, known in ((partition, parts), (ATTRIBUTES_NAME, classes)):
        lacking = [name for name in tree.images if _file_name(name) not in known] if known else []
        if lacking:
            raise InputError(f"{tree.where}: {len(lacking)} images are not in {path}: {list_names(lacking)}.")
    splits = {}
    for split, number in PARTS.items():
        names = [name for name in tree.images if parts.get(_file_name(name), PARTS["train"]) == number]
        if not names:
            continue
        if split == "validation":
            print(f"note: {tree.where}: {len(names)} validation images are left out", file=sys.stderr)
            continue
        labels = np.array([classes[_file_name(name)] for name in names], np.int64) if classes else None
        splits[split] = tree_split(tree, names, labels, [f"not {attribute}", str(attribute)] if classes else None)
    if "train" not in splits:
        raise InputError(f"Expected training images in {tree.where}, found none: {partition} has no other of them.")
    return splits


def _file_name(name: str) -> str:
    return name.rpartition("/")[2]


def _read_partition(path: Path) -> dict[str, str]:
    parts = {}
    for line in _lines(path):
        words = line.split()
        if len(words) != 2 or words[1] not in PARTS.values():
            raise InputError(f"{path}: expected lines like '000001.jpg 0' with 0, 1 or 2, got {line[:80]!r}.")
        parts[words[0]] = words[1]
    return parts


def _read_attribute(source: Path, attribute: str) -> dict[str, int]:
    path = find_list(source, ATTRIBUTES_NAME)
    if path is None:
        raise InputError(
            f"Expected {ATTRIBUTES_NAME} in {source} or beside it, as attribute={attribute!r} is asked for: add it."
        )
    lines = _lines(path)
    names = lines[1].split() if len(lines) > 1 else []
    if attribute not in names:
        near = difflib.get_close_matches(attribute, names, n=3, cutoff=0.0)
        raise InputError(f"Expected attribute={attribute!r} to be one of those in {path}, such as {', '.join(near)}.")
    column = 1 + names.index(attribute)
    found = {}
    for line in lines[2:]:
        words = line.split()
        if len(words) != 1 + len(names) or words[column] not in ("-1", "1"):
            raise InputError(f"{path}: expected a name and {len(names)} values of -1 or 1, got {line[:80]!r}.")
        found[words[0]] = int(words[column] == "1")
    return found


def _lines(path: Path) -> list[str]:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise InputError(f"{path}: expected at most {MAX_BYTES} bytes, got {path.stat().st_size}.")
        return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error}).") from error
