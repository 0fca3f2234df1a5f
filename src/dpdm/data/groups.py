"""Who an image belongs to: a CSV file, or a pattern of the images' names, gives each image the name of a group.

A group is what ``data.unit=group`` protects as a whole: a person, say, with all of their images.
"""

import csv
import hashlib
import hmac
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from dpdm.data.records import Split, list_names
from dpdm.errors import InputError

HEADER = ("file", "group")


def with_groups(splits: Mapping[str, Split], groups: str | None) -> dict[str, Split]:
    """Returns the splits of a source with the group of each image, its own ones if ``groups`` is None.

    Args:
        splits: all splits of a source.
        groups: a CSV file with the lines ``file,group``, one for each image, or a regular expression that finds the
            group in an image's name by its one ``(...)``.

    Raises:
        InputError: if an image has no group or several, a line names no image, or a group is on both sides.
    """
    if groups is not None:
        names = [name for split in splits.values() for name in split.names]
        found = _from_csv(Path(groups), names) if Path(groups).is_file() else _from_pattern(groups, names)
        splits = {side: replace(split, groups=[found[name] for name in split.names]) for side, split in splits.items()}
    _check_classes(splits)
    seen: dict[str, tuple[str, str]] = {}
    both = []
    for side, split in splits.items():
        for image, group in zip(split.names, split.groups or (), strict=bool(split.groups)):
            other, first = seen.setdefault(group, (side, image))
            if other != side:
                both.append(f"{first} and {image}")
    if both:
        raise InputError(
            f"Expected all images of a group in one of {' and '.join(splits)}, got {len(both)} images with another of "
            f"their group in the other: {list_names(both)}: move them."
        )
    return dict(splits)


def _check_classes(splits: Mapping[str, Split]) -> None:
    """Raises InputError if classes are groups: their names, which would be published, are then those of persons."""
    pairs = {(split.label(index), group) for split in splits.values() for index, group in enumerate(split.groups or ())}
    classes, groups = {label for label, _ in pairs if label is not None}, {group for _, group in pairs}
    if len(groups) > 1 and len(pairs) == len(groups) == len(classes):
        raise InputError(
            f"Expected classes that groups share, got {len(classes)} classes each of one group alone: names of classes "
            "are published, and here they would name the groups; put the groups' folders into folders of classes, or "
            "all images into one folder and whose they are into a CSV file."
        )


def group_is_held_out(group: str, key: bytes, fraction: float) -> bool:
    """Whether a group is held out, with all of its images: its name's keyed hash, in [0, 1), is below ``fraction``.

    Guarantee: depends on the group's name and the key alone. Adding or removing a group moves no other one, and no
    group is on both sides; who lacks the key cannot tell the side of a group. (A prepared archive has numbers in place
    of names: prepared anew without a group, the numbers of those after it are others.)
    """
    message = b"dpdm hold-out of groups, version 1" + group.encode(errors="surrogateescape")
    return below(key, message, fraction)


def below(key: bytes, message: bytes, fraction: float) -> bool:
    """Whether the keyed hash of a message, HMAC-SHA256 read as a number in [0, 1), is below ``fraction``."""
    digest = hmac.new(key, message, hashlib.sha256).digest()
    # Whole numbers: 64 random bits divided in floating point could round up to 1.
    return int.from_bytes(digest[:8], "big") < int(fraction * 2**64)


def _from_csv(path: Path, names: Sequence[str]) -> dict[str, str]:
    """Returns the group of each image that a CSV file names."""
    found: dict[str, str] = {}
    twice, empty = [], []
    spelled = {_composed(name): name for name in names}
    if len(spelled) < len(names):  # two files that look alike: each is to be named as it is
        spelled = {}
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            for row in csv.reader(file, strict=True):
                if not row or (not found and tuple(word.strip().lower() for word in row) == HEADER):
                    continue
                if len(row) != 2:
                    raise InputError(f"{path}: expected lines of the form file,group, got {','.join(row)[:80]!r}.")
                name, group = spelled.get(_composed(row[0]), row[0]), _composed(row[1].strip())
                if name in found:
                    twice.append(name)
                elif not group:
                    empty.append(name)
                found[name] = group
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"Expected a CSV file in UTF-8 with the lines file,group at {path}: {error}.") from None
    known = set(names)
    problems = {
        "images without a line": [name for name in names if name not in found],
        "lines of no image": [name for name in found if name not in known],
        "images with several lines": twice,
        "lines without a group": empty,
    }
    told = [f"{len(bad)} {what}: {list_names(bad)}" for what, bad in problems.items() if bad]
    if told:
        raise InputError(f"{path}: expected each image once, by its path in the source, got {'; '.join(told)}")
    return found


def _from_pattern(pattern: str, names: Sequence[str]) -> dict[str, str]:
    """Returns the group of each name: what the pattern's one ``(...)`` matches."""
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise InputError(f"Expected groups to be a CSV file or a pattern, got {pattern!r}: {error}.") from None
    if compiled.groups != 1:
        raise InputError(
            f"Expected groups to be a CSV file or a pattern with one (...), got {pattern!r}: there is no such file."
        )
    matches = {name: compiled.search(name) for name in names}
    without = [name for name, match in matches.items() if not (match and match[1])]
    if without:
        raise InputError(f"Expected {pattern!r} to find a group in each name, not in {list_names(without)}")
    return {name: _composed(match[1]) for name, match in matches.items() if match}


def _composed(name: str) -> str:
    """Returns a name in Unicode's form C: one machine writes e and its accent as two characters, another as one."""
    return unicodedata.normalize("NFC", name)
