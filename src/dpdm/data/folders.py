"""A folder or a zip of images: class subfolders, or none; optionally under train/ and test/ (or val/)."""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dpdm.data.records import Split, list_names
from dpdm.data.table import LABELS_NAME, parse_table
from dpdm.data.transforms import IMAGE_SUFFIXES
from dpdm.data.zips import MAX_MEMBER_BYTES, ZipReader
from dpdm.errors import InputError

DEPTH = 3  # a folder around everything, train or test, a class
TRAIN_FOLDERS = ("train", "training")  # in capitals or not, as are the next
HOLDOUT_FOLDERS = ("test", "testing", "val", "validation")


@dataclass(frozen=True)
class Tree:
    """What a folder or zip holds; paths are relative to it, with forward slashes.

    Attributes:
        where: the folder or zip, for messages.
        images: files with an image's suffix, sorted.
        folders: all folders but hidden ones; of a zip those that may be classes, at most ``DEPTH`` deep.
        others: everything else that was found.
        read: content of a file. Raises InputError naming it.
        stamp: see ``Split``; of a file.
    """

    where: str
    images: list[str]
    folders: set[str]
    others: list[str]
    read: Callable[[str], bytes]
    stamp: Callable[[str], bytes]


def folder_tree(root: Path) -> Tree:
    """Lists a folder.

    Raises:
        InputError: if it cannot be listed, or naming all links to folders, to places outside of it, or to images in
            it. Such a link would put images into the data set that are not in the folder the user means, or one
            image twice, which would then be protected less.
    """
    real_root = root.resolve()
    images: list[str] = []
    folders: set[str] = set()
    others: list[str] = []
    refused: list[str] = []
    links: dict[str, str] = {}
    prefix = len(f"{real_root}/".replace("//", "/"))  # of a million names; Path objects would take ten times as long
    try:
        for entry in _walk(str(real_root)):
            relative = entry.path[prefix:]
            if _is_hidden(relative):
                others.append(relative)
            elif entry.is_symlink() and (entry.is_dir() or not Path(entry.path).resolve().is_relative_to(real_root)):
                refused.append(relative)
            elif entry.is_dir():
                folders.add(relative)
            elif entry.is_file() and relative.lower().endswith(IMAGE_SUFFIXES):
                images.append(relative)
                if entry.is_symlink():
                    links[relative] = str(Path(entry.path).resolve())[prefix:]
            else:
                others.append(relative)
    except OSError as error:
        raise InputError(f"Cannot list {root}: {error}.") from error
    counted = set(images) if links else set()
    twice = sorted(link for link, target in links.items() if target in counted)
    if refused:
        raise InputError(
            f"{root}: {len(refused)} links to folders or to outside: {list_names(sorted(refused))}: "
            "replace each by a copy of what it points to."
        )
    if twice:
        raise InputError(
            f"{root}: {len(twice)} links to images that are in it themselves: {list_names(twice)}: remove them, as an "
            "image that is there twice is protected less."
        )

    def read(relative: str) -> bytes:
        path = real_root / relative
        try:
            if path.stat().st_size > MAX_MEMBER_BYTES:
                raise InputError(f"{relative}: {path.stat().st_size} bytes, expected at most {MAX_MEMBER_BYTES}")
            return path.read_bytes()
        except OSError as error:
            raise InputError(f"{relative}: cannot be read ({error.strerror})") from error

    def stamp(relative: str) -> bytes:
        try:
            found = (real_root / relative).stat()
        except OSError:
            return b"absent"  # decoding names it with all others
        return f"{found.st_size} {found.st_mtime_ns}".encode()

    images.sort()
    return Tree(str(root), images, folders, sorted(others), read, stamp)


def _walk(root: str) -> Iterator[os.DirEntry[str]]:
    folders = [root]  # a call for each level would end where Python's stack does
    while folders:
        with os.scandir(folders.pop()) as entries:
            for entry in entries:
                yield entry
                if entry.is_dir(follow_symlinks=False) and not _is_hidden(entry.name):
                    folders.append(entry.path)


def zip_tree(path: Path) -> Tree:
    """Lists a zip; its members are only ever read in memory.

    Raises:
        InputError: if it is no zip, or naming all members with absolute, upward or backslash paths, or that are
            too large.
    """
    archive = ZipReader(path)
    names = archive.names
    odd = [name for name in names if name.startswith("/") or "\\" in name or ".." in name.split("/")]
    if odd:
        raise InputError(f"{path}: members with unusable paths: {list_names(odd)}: write the zip anew.")
    large = [name for name in names if archive.is_too_large(name)]
    if large:
        raise InputError(
            f"{path}: members of more than {MAX_MEMBER_BYTES} bytes, or packed too tightly for images: "
            f"{list_names(large)}"
        )
    images: list[str] = []
    others: list[str] = []
    folders: set[str] = set()
    for name in names:
        hidden = _is_hidden(name)
        folders.update(parent for parent in _parents(name) if not (hidden and _is_hidden(parent)))
        if not name.endswith("/"):
            (images if not hidden and name.lower().endswith(IMAGE_SUFFIXES) else others).append(name)

    def stamp(name: str) -> bytes:
        return f"{archive.size(name)} {archive.checksum(name)}".encode()

    return _unwrap(Tree(str(path), images, folders, others, lambda name: archive.read(name, name), stamp))


def _parents(name: str) -> list[str]:
    parts = name.split("/", DEPTH)
    return ["/".join(parts[:depth]) for depth in range(1, len(parts))]


def _is_hidden(relative: str) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in relative.split("/"))


def _unwrap(tree: Tree) -> Tree:
    """Steps into the one folder that a zip program put around everything.

    Only if that folder holds nothing but folders: with images of its own it may as well be the only class.
    """
    top = {name.split("/")[0] for name in tree.images}
    if len(top) != 1 or any(name.count("/") < 2 for name in tree.images) or LABELS_NAME in tree.others:
        return tree
    prefix = f"{top.pop()}/"
    _note(tree.where, f"everything is inside {prefix}, which is taken as the data set itself")
    return replace(
        tree,
        where=f"{tree.where}/{prefix[:-1]}",
        images=[name.removeprefix(prefix) for name in tree.images],
        folders={name.removeprefix(prefix) for name in tree.folders if name.startswith(prefix)},
        others=[name.removeprefix(prefix) for name in tree.others],
        read=lambda name: tree.read(prefix + name),
        stamp=lambda name: tree.stamp(prefix + name),
    )


def tree_splits(tree: Tree) -> dict[str, Split]:
    """Turns a tree into the split ``train`` and, if it brings one, ``holdout``.

    With ``dataset.json`` at the top it is an archive with those labels and groups. Otherwise a class is a top-level
    folder (sorted by name, empty ones included), or a folder below train/ and test/ where both exist (or of others of
    ``TRAIN_FOLDERS`` and ``HOLDOUT_FOLDERS``); images without any folder have no labels. What is no image is named in a
    note on standard error.

    Raises:
        InputError: if there are no images, or some are in class folders and some are not.
    """
    if LABELS_NAME in tree.others:
        table = parse_table(tree.read(LABELS_NAME), tree.images, tree.where)
        _note_skipped(tree, [name for name in tree.others if name != LABELS_NAME])
        split = tree_split(tree, tree.images, table.labels, table.class_names)
        names = None if table.groups is None else [str(number) for number in table.groups]
        return {"train": replace(split, groups=names)}
    _note_skipped(tree, tree.others)
    if not tree.images:
        raise InputError(
            f"Expected images in {tree.where}, found none: give files that end in {' '.join(IMAGE_SUFFIXES)}."
        )
    roots = _split_folders(tree)
    classes = {root: _classes(tree, root) for root in roots.values()}
    if len({found is None for found in classes.values()}) > 1:
        raise InputError(f"{tree.where}: expected class folders in both or in none of {' and '.join(classes)}.")
    union = sorted({name for found in classes.values() for name in found or ()})
    class_names = None if None in classes.values() else union
    return {split: _split(tree, root, class_names) for split, root in roots.items()}


def _split_folders(tree: Tree) -> dict[str, str]:
    """Maps split to path prefix: {"train": ""} or {"train": "train/", "holdout": "test/"}."""
    top = {name for name in tree.folders if "/" not in name}
    trains, holdouts = (_called(top, names) for names in (TRAIN_FOLDERS, HOLDOUT_FOLDERS))
    if not trains or not (holdouts or len(top) == 1):
        return {"train": ""}
    split = [trains[0], *holdouts[:1]]
    others = sorted(top - set(split))
    others += [name for name in tree.images if "/" not in name]
    if others:
        raise InputError(
            f"{tree.where}: expected nothing beside {' and '.join(split)}, found {list_names(others)}: move it "
            "elsewhere."
        )
    roots = {part: f"{folder}/" for part, folder in zip(("train", "holdout"), split, strict=False)}
    empty = [root for root in roots.values() if not any(name.startswith(root) for name in tree.images)]
    if empty:
        raise InputError(f"{tree.where}: expected images in {' and '.join(empty)}, found none.")
    return roots


def _called(folders: set[str], names: Sequence[str]) -> list[str]:
    """Returns the folders with one of some names, in capitals or not, in the order of the names."""
    found = sorted(name for name in folders if name.casefold() in names)
    return sorted(found, key=lambda name: names.index(name.casefold()))


def _classes(tree: Tree, root: str) -> set[str] | None:
    """Returns the names of the class folders below ``root``, or None if the images lie there without."""
    below = [name.removeprefix(root) for name in tree.images if name.startswith(root)]
    loose = [name for name in below if "/" not in name]
    if len(loose) == len(below):
        return None
    if loose:
        raise InputError(
            f"{tree.where}/{root}: {len(loose)} images are in no class folder while others are: "
            f"{list_names(loose)}: move them into class folders."
        )
    folders = {name.removeprefix(root) for name in tree.folders if name.startswith(root)}
    classes = {name for name in folders if "/" not in name}
    empty = sorted(classes - {name.split("/")[0] for name in below})
    if empty:
        _note(f"{tree.where}/{root}".rstrip("/"), f"classes without images: {list_names(empty)}")
    if any(name.count("/") > 1 for name in below):
        _note(
            f"{tree.where}/{root}".rstrip("/"),
            f"the outer folders are the classes, {list_names(sorted(classes))}; those in them are not told apart",
        )
    return classes


def _split(tree: Tree, root: str, class_names: list[str] | None) -> Split:
    names = [name for name in tree.images if name.startswith(root)]
    labels = None
    if class_names is not None:
        index = {name: number for number, name in enumerate(class_names)}
        found = (index[name.removeprefix(root).split("/")[0]] for name in names)
        labels = np.fromiter(found, np.int64, len(names))
    return tree_split(tree, names, labels, class_names)


def tree_split(tree: Tree, names: list[str], labels: NDArray[np.int64] | None, class_names: list[str] | None) -> Split:
    """Returns the split of these of a tree's images."""
    return Split(names, lambda i: tree.read(names[i]), lambda i: tree.stamp(names[i]), labels, class_names)


def _note_skipped(tree: Tree, names: list[str]) -> None:
    if names:
        _note(tree.where, f"skipped {len(names)} that are no images: {list_names(names)}")


def _note(where: str, text: str) -> None:
    print(f"note: {where}: {text}", file=sys.stderr)
