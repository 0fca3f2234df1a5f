import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dpdm.data import folders, zips
from dpdm.data.archive import ArchiveWriter
from dpdm.data.folders import Tree, folder_tree, tree_splits, zip_tree
from dpdm.errors import InputError

Make = Callable[[list[str]], Tree]


@pytest.fixture(params=["folder", "zip"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Make:
    """Builds a tree out of paths, as a folder or as a zip; the content of a file is its path."""

    def build(names: list[str]) -> Tree:
        if request.param == "zip":
            with zipfile.ZipFile(tmp_path / "images.zip", "w", zipfile.ZIP_DEFLATED) as file:
                for name in names:
                    file.writestr(name, "" if name.endswith("/") else name)
            return zip_tree(tmp_path / "images.zip")
        for name in names:
            path = tmp_path / "images" / name
            if name.endswith("/"):
                path.mkdir(parents=True)
            else:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(name)
        return folder_tree(tmp_path / "images")

    return build


def listed(tree: Tree) -> dict[str, list[tuple[str, object, int | None]]]:
    return {
        name: [(split.names[i], split.read(i), split.label(i)) for i in range(split.num_images)]
        for name, split in tree_splits(tree).items()
    }


def test_classes_are_the_top_folders_by_name(make: Make) -> None:
    tree = make(["dog/2.png", "cat/1.JPG", "dog/deep/er/3.webp", "ant/"])
    assert listed(tree) == {
        "train": [
            ("cat/1.JPG", b"cat/1.JPG", 1),
            ("dog/2.png", b"dog/2.png", 2),
            ("dog/deep/er/3.webp", b"dog/deep/er/3.webp", 2),
        ]
    }
    assert tree_splits(tree)["train"].class_names == ["ant", "cat", "dog"]


def test_a_class_without_images_is_noted(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    tree_splits(make(["cat/1.png", "ant/"]))
    assert "classes without images: ant" in capsys.readouterr().err


def test_images_without_folders_have_no_labels(make: Make) -> None:
    tree = make(["b.png", "a.png"])
    assert listed(tree) == {"train": [("a.png", b"a.png", None), ("b.png", b"b.png", None)]}
    assert tree_splits(tree)["train"].class_names is None


def test_a_mix_is_refused(make: Make) -> None:
    with pytest.raises(InputError, match=r"loose\.png"):
        tree_splits(make(["loose.png", "cat/1.png"]))


@pytest.mark.parametrize("holdout", ["test", "val", "validation"])
def test_split_folders(make: Make, holdout: str) -> None:
    tree = make(["train/cat/1.png", "train/dog/2.png", f"{holdout}/cat/3.png", f"{holdout}/emu/4.png"])
    assert {name: [(n, label) for n, _, label in records] for name, records in listed(tree).items()} == {
        "train": [("train/cat/1.png", 0), ("train/dog/2.png", 1)],
        "holdout": [(f"{holdout}/cat/3.png", 0), (f"{holdout}/emu/4.png", 2)],
    }
    assert {tuple(split.class_names or ()) for split in tree_splits(tree).values()} == {("cat", "dog", "emu")}


def test_split_folders_without_classes(make: Make) -> None:
    found = listed(make(["train/1.png", "test/2.png"]))
    assert found == {
        "train": [("train/1.png", b"train/1.png", None)],
        "holdout": [("test/2.png", b"test/2.png", None)],
    }


@pytest.mark.parametrize(("train", "test"), [("Training", "Testing"), ("Train", "Test"), ("TRAIN", "val")])
def test_split_folders_in_other_spellings(make: Make, train: str, test: str) -> None:
    splits = tree_splits(make([f"{train}/cat/1.png", f"{train}/dog/2.png", f"{test}/cat/3.png"]))
    assert {name: split.names for name, split in splits.items()} == {
        "train": [f"{train}/cat/1.png", f"{train}/dog/2.png"],
        "holdout": [f"{test}/cat/3.png"],
    }
    assert splits["train"].class_names == ["cat", "dog"]


def test_folders_in_classes_are_told(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    """Or who has a folder around everything would train on one class and not know."""
    tree_splits(make(["a/1.png", "b/3.png"]))
    assert "outer" not in capsys.readouterr().err
    assert tree_splits(make(["a/cat/1.png", "a/dog/2.png", "b/3.png"]))["train"].class_names == ["a", "b"]
    assert "the outer folders are the classes, a, b; those in them are not told apart" in capsys.readouterr().err


def test_train_alone_is_stepped_into(make: Make) -> None:
    splits = tree_splits(make(["train/cat/1.png", "train/dog/2.png"]))
    assert list(splits) == ["train"]
    assert splits["train"].class_names == ["cat", "dog"]


def test_train_may_be_a_class(make: Make) -> None:
    splits = tree_splits(make(["bus/1.png", "train/2.png"]))
    assert list(splits) == ["train"]
    assert splits["train"].class_names == ["bus", "train"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["train/1.png", "test/2.png", "val/3.png"], "val"),
        (["train/1.png", "test/2.png", "cat/3.png"], "cat"),
        (["train/1.png", "test/2.png", "3.png"], "3.png"),
        (["train/1.png", "test/"], "test/, found none"),
        (["train/cat/1.png", "test/2.png"], "both or in none"),
        (["notes.txt", "cat/a.heic"], "found none"),
        ([".png", ".hidden/1.png"], "found none"),
    ],
)
def test_unclear_trees_are_refused(make: Make, names: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        tree_splits(make(names))
    assert "\n" not in str(caught.value)


def test_what_is_no_image_is_counted_and_named(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    odd = ["cat/.DS_Store", "cat/Thumbs.db", "labels.csv", "cat/notes.txt", "__MACOSX/cat/._1.png"]
    splits = tree_splits(make(["cat/1.png", *odd]))
    assert splits["train"].num_images == 1
    note = capsys.readouterr().err
    assert note.count("\n") == 1
    assert "skipped 5 " in note
    assert all(name.split("/")[0 if name.startswith("__") else -1] in note for name in odd)


def test_a_clean_tree_prints_nothing(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    tree_splits(make(["cat/1.png"]))
    assert capsys.readouterr().err == ""


def test_labels_beside_the_images_are_used(make: Make) -> None:
    tree = make(["00000/a.png", "00000/b.png", "dataset.json"])
    table = json.dumps({"labels": [["00000/b.png", 0], ["00000/a.png", 1]], "class_names": ["x", "y"]}).encode()
    read = tree.read
    tree = Tree(
        tree.where,
        tree.images,
        tree.folders,
        tree.others,
        lambda n: table if n == "dataset.json" else read(n),
        tree.stamp,
    )
    split = tree_splits(tree)["train"]
    assert [(split.names[i], split.label(i)) for i in range(2)] == [("00000/a.png", 1), ("00000/b.png", 0)]
    assert split.class_names == ["x", "y"]


def zip_of(path: Path, names: list[str]) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        for name in names:
            file.writestr(zipfile.ZipInfo(name), name)
    return path


def test_a_wrapping_folder_of_a_zip_is_noted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = zip_of(tmp_path / "a.zip", ["photos/", "photos/cat/1.png", "photos/dog/2.png", "photos/x.txt"])
    split = tree_splits(zip_tree(path))["train"]
    assert (split.class_names, split.read(1)) == (["cat", "dog"], b"photos/dog/2.png")
    assert "inside photos/" in capsys.readouterr().err
    flat = zip_of(tmp_path / "b.zip", ["photos/1.png", "photos/more/2.png"])
    assert tree_splits(zip_tree(flat))["train"].class_names == ["photos"]


def test_labels_in_a_zip_are_relative_to_their_file(tmp_path: Path) -> None:
    for top, wrap in (("", "set/00000/1.png"), ("set/", "00000/1.png")):
        table = json.dumps({"labels": [[wrap, 3]]})
        with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
            file.writestr(f"{top}dataset.json", table)
            file.writestr("set/00000/1.png", b"pixels")
        split = tree_splits(zip_tree(tmp_path / "a.zip"))["train"]
        assert (list(split.names), split.label(0), split.read(0)) == ([wrap], 3, b"pixels")


def test_unusable_zip_members_are_all_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = zip_of(tmp_path / "a.zip", ["../1.png", "/2.png", "a\\3.png", "cat/../4.png", "cat/5.png"])
    with pytest.raises(InputError) as caught:
        zip_tree(path)
    assert [name for name in "12345" if f"{name}.png" in str(caught.value)] == ["1", "2", "3", "4"]
    monkeypatch.setattr(zips, "MAX_MEMBER_BYTES", 9)
    with pytest.raises(InputError, match=r"large\.png"):
        zip_tree(zip_of(tmp_path / "b.zip", ["a/1.png", "a/large.png"]))


def test_a_damaged_member_is_named_when_read(tmp_path: Path) -> None:
    path = zip_of(tmp_path / "a.zip", ["cat/1.png", "cat/2.png"])
    path.write_bytes(path.read_bytes().replace(b"cat/1.pngcat/1.png", b"cat/1.pngcat/1.pnG", 1))
    split = tree_splits(zip_tree(path))["train"]
    assert split.read(1) == b"cat/2.png"
    with pytest.raises(InputError, match=r"cat/1\.png"):
        split.read(0)


def test_links_out_of_the_folder_are_refused(tmp_path: Path) -> None:
    root = tmp_path / "images"
    (root / "cat").mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    for path in (root / "cat/1.png", tmp_path / "secret.png", tmp_path / "outside/2.png"):
        path.write_text(path.name)
    (root / ".store").mkdir()
    (root / ".store/3.png").write_text("3.png")
    (root / "cat/inside.png").symlink_to(root / ".store/3.png")  # which is no image of the folder itself
    (tmp_path / "alias").symlink_to(root)
    assert folder_tree(tmp_path / "alias").images == ["cat/1.png", "cat/inside.png"]
    (root / "cat/out.png").symlink_to(tmp_path / "secret.png")
    (root / "dog").symlink_to(tmp_path / "outside")
    (root / "cat/loop").symlink_to(root)
    with pytest.raises(InputError) as caught:
        folder_tree(root)
    assert "3 links" in str(caught.value)
    assert all(name in str(caught.value) for name in ("cat/out.png", "dog", "cat/loop"))


def test_no_image_is_there_twice_by_a_link(tmp_path: Path) -> None:
    """Or it would weigh twice, and epsilon would not hold for it."""
    (tmp_path / "1.png").write_text("1")
    (tmp_path / "again.png").symlink_to(tmp_path / "1.png")
    with pytest.raises(InputError, match=r"1 links to images that are in it themselves: again\.png"):
        folder_tree(tmp_path)


def test_a_pipe_is_no_image(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")  # reading it would wait for ever
    assert folder_tree(tmp_path).others == ["pipe.png"]


def test_an_absent_or_large_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("1.png", "2.png"):
        (tmp_path / name).write_text("content")
    tree = folder_tree(tmp_path)
    (tmp_path / "1.png").unlink()
    with pytest.raises(InputError, match=r"1\.png"):
        tree.read("1.png")
    monkeypatch.setattr(folders, "MAX_MEMBER_BYTES", 3)
    with pytest.raises(InputError, match=r"2.png: 7 bytes"):
        tree.read("2.png")


def test_an_archive_is_a_source(tmp_path: Path) -> None:
    with ArchiveWriter(tmp_path / "a.zip", ["x", "y"]) as writer:
        for value, label in ((5, 1), (6, 0)):
            writer.add(np.full((1, 2, 2), value, np.uint8), label)
    split = tree_splits(zip_tree(tmp_path / "a.zip"))["train"]
    assert [split.label(i) for i in range(2)] == [1, 0]
    assert split.class_names == ["x", "y"]
