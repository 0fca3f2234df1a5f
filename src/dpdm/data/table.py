"""``dataset.json`` of a prepared archive: labels, names of classes, groups. It may be a stranger's."""

import json
from collections.abc import Sequence
from operator import itemgetter
from typing import Any, NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray

from dpdm.data.records import list_names
from dpdm.errors import InputError

LABELS_NAME = "dataset.json"
LABEL_BYTES, BYTES_PER_CHARACTER = 256, 6  # of dataset.json, at most: for an image, and for a character of its name
MAX_CLASS_NAMES_BYTES = 16 * 2**20
MAX_CLASSES = 1_000_000  # a label beyond it is a mistake, and would ask for an embedding of its size


class Table(NamedTuple):
    """What ``dataset.json`` says of n images: labels (n,), class names and groups (n,), each or None."""

    labels: NDArray[np.int64] | None
    class_names: list[str] | None
    groups: NDArray[np.int64] | None


def parse_table(content: bytes, names: Sequence[str], where: str) -> Table:
    """Reads ``dataset.json``, for images in the order of the sorted ``names``.

    Raises:
        InputError: if it has another form, or names other images than ``names``.
    """
    where = f"{where}: {LABELS_NAME}"
    # Brackets take ten times as much memory as bytes.
    longest = MAX_CLASS_NAMES_BYTES + sum(LABEL_BYTES + BYTES_PER_CHARACTER * len(name) for name in names)
    if len(content) > longest:
        raise InputError(f"{where}: {len(content)} bytes, expected at most {longest} for {len(names)} images")
    try:
        table = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not valid JSON ({str(error) or 'nested too deeply'})") from error
    if not isinstance(table, dict) or "labels" not in table:
        raise InputError(f'{where}: expected {{"labels": [[name, class], ...]}} or {{"labels": null}}')
    groups = _parse_groups(table.get("groups"), len(names), where)
    if table["labels"] is None:
        return Table(None, None, groups)
    pairs = table["labels"]
    if not isinstance(pairs, list) or not all(_is_pair(pair) for pair in pairs):
        raise InputError(f"{where}: expected labels to be a list of [name, class] with classes 0, 1, 2, ...")
    pairs.sort(key=itemgetter(0))  # of a million images a dictionary beside the list would take another 100 MB
    if len(pairs) != len(names) or any(pair[0] != name for pair, name in zip(pairs, names, strict=True)):
        _explain_names(pairs, names, where)
    labels = np.array([label for _, label in pairs], np.int64)
    class_names = table.get("class_names")
    if class_names is None:
        return Table(labels, None, groups)
    named = isinstance(class_names, list) and all(isinstance(name, str) for name in class_names)
    if not named or len(class_names) <= labels.max():
        raise InputError(f"{where}: expected class_names to be a list of at least {labels.max() + 1} names")
    return Table(labels, class_names, groups)


def _parse_groups(groups: Any, count: int, where: str) -> NDArray[np.int64] | None:
    if groups is None:
        return None
    if not isinstance(groups, list) or not all(type(group) is int and 0 <= group < 2**63 for group in groups):
        raise InputError(f"{where}: expected groups to be a list of whole numbers >= 0")
    if len(groups) != count:
        raise InputError(f"{where}: expected the groups of {count} images, got {len(groups)}")
    return np.array(groups, np.int64)


def _explain_names(pairs: list[list], names: Sequence[str], where: str) -> NoReturn:
    labelled = [pair[0] for pair in pairs]
    wrong = sorted(set(labelled) ^ set(names))
    if wrong:
        raise InputError(f"{where}: labels and images differ in {len(wrong)} names: {list_names(wrong)}")
    raise InputError(f"{where}: {len(labelled) - len(names)} images have more than one label")


def _is_pair(pair: object) -> bool:
    if not isinstance(pair, list) or len(pair) != 2:
        return False
    name, label = pair
    return isinstance(name, str) and type(label) is int and 0 <= label < MAX_CLASSES
