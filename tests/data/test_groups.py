"""Whose an image is: read from a CSV file or from names, kept in the archive, and on one side of the hold-out."""

import json
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dpdm.data.archive import ArchiveBody, ArchiveWriter, ImageArchive
from dpdm.data.groups import group_is_held_out
from dpdm.data.prepare import prepare, prepare_with_holdout
from dpdm.errors import InputError

KEY = bytes(range(32))
PERSONS = [f"Ada {number}" for number in range(12)]


def write_images(root: Path, count: int, folder: str = "") -> list[str]:
    """Writes images of which each has its own grey level; returns their names."""
    names = [f"{folder}{index:02d}.png" for index in range(count)]
    (root / folder).mkdir(parents=True, exist_ok=True)
    for level, name in enumerate(names):
        Image.fromarray(np.full((4, 4), level, np.uint8)).save(root / name)
    return names


def write_csv(path: Path, groups: dict[str, str], head: str = "file,group\n") -> str:
    path.write_text(head + "".join(f"{name},{group}\n" for name, group in groups.items()), encoding="utf-8")
    return str(path)


def levels(archive: ImageArchive) -> list[int]:
    return archive.read(np.arange(archive.num_images))[:, 0, 0, 0].tolist()


def test_persons_as_classes_are_refused(tmp_path: Path) -> None:
    """Their names would be published as those of classes."""
    for person in ("anna", "bert", "cleo"):
        write_images(tmp_path / "in", 2, f"{person}/")
    with pytest.raises(InputError) as caught:
        prepare(str(tmp_path / "in"), tmp_path / "a.zip", groups=r"^([^/]+)/")
    assert "names of classes are published" in str(caught.value)
    assert "anna" not in str(caught.value)
    who = {f"{p}/{i:02d}.png": p.upper() for p in ("anna", "bert", "cleo") for i in range(2)}
    with pytest.raises(InputError, match="3 classes each of one group alone"):
        prepare(str(tmp_path / "in"), tmp_path / "a.zip", groups=write_csv(tmp_path / "g.csv", who))
    assert not (tmp_path / "a.zip").exists()
    who["anna/01.png"] = "BERT"  # a class that two persons share: folders are no persons
    assert prepare(str(tmp_path / "in"), tmp_path / "a.zip", groups=write_csv(tmp_path / "g.csv", who)).num_groups == 3


def test_an_archive_keeps_numbers_and_no_names(tmp_path: Path) -> None:
    names = write_images(tmp_path / "in", 6)
    who = dict(zip(names, ["Zoe", "Ada", "Zoe", "Bob", "Ada", "Zoe"], strict=True))
    for head in ("file,group\n", "\ufeffFile,Group\n", ""):
        archive = prepare(str(tmp_path / "in"), tmp_path / "a.zip", groups=write_csv(tmp_path / "g.csv", who, head))
        assert archive.groups is not None
        assert archive.groups.tolist() == [0, 1, 0, 2, 1, 0]
        assert (archive.num_groups, archive.num_records) == (3, 6)
        assert ImageArchive(archive.path, "group").num_records == 3
        (tmp_path / "a.zip").rename(tmp_path / "b.zip")
    with zipfile.ZipFile(tmp_path / "b.zip") as file:
        assert json.loads(file.read("dataset.json")) == {"labels": None, "groups": [0, 1, 0, 2, 1, 0]}
    assert not re.search(b"Zoe|Ada|Bob", (tmp_path / "b.zip").read_bytes())
    again = prepare(str(tmp_path / "b.zip"), tmp_path / "c.zip")
    assert again.path.read_bytes() == (tmp_path / "b.zip").read_bytes()
    plain = prepare(str(tmp_path / "in"), tmp_path / "plain.zip")
    assert plain.groups is None
    assert plain.fingerprint() != again.fingerprint()
    with pytest.raises(InputError, match=r"data\.unit=group.*dpdm prepare --groups"):
        ImageArchive(plain.path, "group")


def test_one_name_in_two_forms_of_unicode_is_one_person(tmp_path: Path) -> None:
    """They look the same: macOS writes a letter and its accent as two characters, a spreadsheet as one."""
    composed, decomposed = "Zo\u00eb", "Zoe\u0308"
    write_images(tmp_path / "in", 3, f"scans {decomposed}/")
    persons = (composed, "Ada", decomposed)
    groups: dict[str, str] = {f"scans {composed}/0{number}.png": person for number, person in enumerate(persons)}
    archive = prepare(str(tmp_path / "in"), tmp_path / "a.zip", groups=write_csv(tmp_path / "a.csv", groups))
    assert archive.groups is not None
    assert archive.groups.tolist() == [0, 1, 0]
    write_images(tmp_path / "other", 1, f"scans/{composed}-")
    write_images(tmp_path / "other", 2, f"scans/{decomposed}-")
    archive = prepare(str(tmp_path / "other"), tmp_path / "b.zip", groups="/(.*)-")
    assert (archive.num_images, archive.num_groups) == (3, 1)


def test_a_pattern_finds_groups_in_names(tmp_path: Path) -> None:
    for person in ("p7", "p12"):
        write_images(tmp_path / "in", 2, f"scans/{person}/")
    archive = prepare(str(tmp_path / "in/scans/p7"), tmp_path / "a.zip", groups=r"(\d+)\.png")
    assert archive.num_groups == 2
    archive = prepare(str(tmp_path / "in"), tmp_path / "b.zip", groups=r"/p(\d+)/")
    assert archive.groups is not None
    assert archive.groups.tolist() == [0, 0, 1, 1]
    for pattern, hint in (
        ("p7", "no such file"),
        ("(p)(7)", "one"),
        ("(p7", "pattern"),
        ("(p7)", "not in scans/p12/00"),
    ):
        with pytest.raises(InputError, match=hint):
            prepare(str(tmp_path / "in"), tmp_path / "c.zip", groups=pattern)
    assert not (tmp_path / "c.zip").exists()


@pytest.mark.parametrize(
    ("lines", "hint"),
    [
        ("00.png,a\n01.png,b\n", r"1 images without a line: 02\.png"),
        ("00.png,a\n01.png,b\n02.png,b\n9.png,c\n", r"1 lines of no image: 9\.png"),
        ("00.png,a\n01.png,b\n02.png,b\n00.png,b\n", r"1 images with several lines: 00\.png"),
        ("00.png,a\n01.png,\n02.png,b\n", r"1 lines without a group: 01\.png"),
        ("00.png,a,x\n01.png,b\n02.png,b\n", "of the form file,group"),
        ('00.png,"a\n', "CSV file"),
        ("00.png,\udcff\n", "CSV file in UTF-8"),
    ],
)
def test_every_image_has_one_group(tmp_path: Path, lines: str, hint: str) -> None:
    write_images(tmp_path / "in", 3)
    (tmp_path / "g.csv").write_text(lines, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(InputError, match=hint) as caught:
        prepare(str(tmp_path / "in"), tmp_path / "a.zip", groups=str(tmp_path / "g.csv"))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "a.zip").exists()


@pytest.mark.parametrize(
    ("groups", "hint"),
    [([0, 1], "groups of 3 images, got 2"), ([0, 1, -1], "whole numbers"), ([0, 1, True], "whole"), ("01a", "whole")],
)
def test_damaged_groups_of_an_archive_are_named(tmp_path: Path, groups: object, hint: str) -> None:
    write_images(tmp_path / "in", 3)
    (tmp_path / "in/dataset.json").write_text(json.dumps({"labels": None, "groups": groups}))
    with pytest.raises(InputError, match=hint):
        prepare(str(tmp_path / "in"), tmp_path / "a.zip")


def test_as_many_groups_as_images_are_written(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match="groups of 1 images, got 2"),
        ArchiveWriter(tmp_path / "a.zip", None, [0, 1]) as a,
    ):
        a.add(np.zeros((1, 4, 4), np.uint8))


def sides(tmp_path: Path, who: dict[str, str], name: str) -> dict[str, set[str]]:
    """Returns for each person the archives that hold an image of theirs."""
    csv = write_csv(tmp_path / "g.csv", who)
    dests = [tmp_path / f"{name}.{side}.zip" for side in ("train", "holdout")]
    archives = prepare_with_holdout(str(tmp_path / "in"), *dests, holdout_key=KEY, fraction=0.5, groups=csv)
    found: dict[str, set[str]] = {}
    for archive, dest in zip(archives, dests, strict=True):
        own = [who[f"{level:02d}.png"] for level in levels(archive)]
        assert archive.groups is not None
        for group in range(archive.num_groups):  # an archive's groups are persons
            assert len({person for person, number in zip(own, archive.groups, strict=True) if number == group}) == 1
        assert archive.num_groups == len(set(own))
        for person in own:
            found.setdefault(person, set()).add(dest.name.split(".")[1])
    return found


def test_a_person_is_on_one_side_and_moves_no_other(tmp_path: Path) -> None:
    names = write_images(tmp_path / "in", 48)
    who = dict(zip(names, np.random.default_rng(0).choice(PERSONS, 48).tolist(), strict=True))
    before = sides(tmp_path, who, "all")
    assert all(len(found) == 1 for found in before.values())
    assert set.union(*before.values()) == {"train", "holdout"}
    removed = who[names[0]]  # the first, so that all numbers are others
    for name in [name for name in names if who[name] == removed]:
        (tmp_path / "in" / name).unlink()
    kept = {name: person for name, person in reversed(who.items()) if person != removed}
    assert sides(tmp_path, kept, "fewer") == {person: side for person, side in before.items() if person != removed}


def test_a_preparation_goes_on_with_its_own_groups_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = write_images(tmp_path / "in", 40)
    first, second = (dict(zip(names, [f"{index // size}" for index in range(40)], strict=True)) for size in (4, 5))
    real = ArchiveBody.add

    def add(self: ArchiveBody, png: bytes, label: int | None) -> None:
        if self.num_images == 12:
            raise KeyboardInterrupt
        real(self, png, label)

    with monkeypatch.context() as patch:
        patch.setattr(ArchiveBody, "add", add)
        with pytest.raises(KeyboardInterrupt):
            sides(tmp_path, first, "a")
    assert (tmp_path / ".a.train.zip.partial").stat().st_size > 0
    assert sides(tmp_path, second, "a") == sides(tmp_path, second, "b")
    assert (tmp_path / "a.train.zip").read_bytes() == (tmp_path / "b.train.zip").read_bytes()


def test_a_held_out_share_of_all_groups_by_a_secret_key() -> None:
    chosen = [group_is_held_out(str(number), KEY, 0.25) for number in range(4000)]
    assert abs(sum(chosen) - 1000) < 5 * (4000 * 0.25 * 0.75) ** 0.5
    assert chosen != [group_is_held_out(str(number), bytes(32), 0.25) for number in range(4000)]


def test_a_person_on_both_sides_of_a_source_is_refused(tmp_path: Path) -> None:
    for side in ("train", "test"):
        write_images(tmp_path / "in", 3, f"{side}/")
    who = {f"{side}/{index:02d}.png": f"{side}{index}" for side in ("train", "test") for index in range(3)}
    source, dests = str(tmp_path / "in"), (tmp_path / "t.zip", tmp_path / "h.zip")
    csv = write_csv(tmp_path / "g.csv", who | {"test/01.png": "train2"})
    with pytest.raises(InputError, match=r"1 images with another of their group.*train/02\.png and test/01\.png"):
        prepare_with_holdout(source, *dests, holdout_key=KEY, groups=csv)
    archives = prepare_with_holdout(source, *dests, holdout_key=KEY, groups=write_csv(tmp_path / "g.csv", who))
    assert [archive.num_groups for archive in archives] == [3, 3]


def test_a_record_is_any_of_its_images_and_of_no_others(tmp_path: Path) -> None:
    groups = np.random.default_rng(1).integers(0, 5, 40)
    with ArchiveWriter(tmp_path / "a.zip", None, (3 * groups).tolist()) as writer:  # with gaps, as after a hold-out
        for _ in groups:
            writer.add(np.zeros((1, 4, 4), np.uint8))
    archive = ImageArchive(tmp_path / "a.zip", "group")
    u = (np.arange(4000) + 0.5) / 4000
    for group in range(5):
        own = np.flatnonzero(groups == group)
        chosen = archive.choose_images(np.full(4000, group), u)
        found, counts = np.unique(chosen, return_counts=True)
        assert found.tolist() == own.tolist()
        assert np.ptp(counts) <= 1
        assert archive.choose_images(np.array([group]), np.array([1 - 2.0**-53]))[0] == own[-1]
    assert archive.choose_images(np.array([2, 0]), np.zeros((7, 2))).shape == (7, 2)
