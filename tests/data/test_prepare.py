import hashlib
import io
import itertools
import struct
import tempfile
import time
import tracemalloc
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from dpdm.data import prepare as prepare_module
from dpdm.data.archive import ImageArchive
from dpdm.data.prepare import is_held_out, prepare, prepare_with_holdout
from dpdm.data.resume import Unfinished
from dpdm.data.sources import open_source
from dpdm.errors import InputError

KEY = bytes(range(32))


def random_images(count: int, size: int = 4, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), np.uint8)


def write_folder(root: Path, images: Mapping[str, NDArray[np.uint8] | bytes]) -> str:
    for name, image in images.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(image, bytes):
            path.write_bytes(image)
        else:
            Image.fromarray(image).save(path)
    return str(root)


def contents(archive: ImageArchive) -> list[tuple[bytes, int | None]]:
    labels = [None] * archive.num_images if archive.labels is None else archive.labels.tolist()
    return [(archive.read([i])[0].tobytes(), labels[i]) for i in range(archive.num_images)]


def test_a_folder_becomes_an_archive_in_order_of_names(tmp_path: Path) -> None:
    images = random_images(150)  # more than are decoded ahead
    names = [f"{'cat' if index % 3 else 'dog'}/{index:03d}.png" for index in range(150)]
    source = write_folder(tmp_path / "in", dict(zip(names, images, strict=True)))
    archive = prepare(source, tmp_path / "out.zip")
    order = sorted(range(150), key=names.__getitem__)
    expected = [(images[i].transpose(2, 0, 1).tobytes(), int(names[i].startswith("dog"))) for i in order]
    assert contents(archive) == expected
    assert archive.class_names == ["cat", "dog"]
    assert (archive.resolution, archive.num_channels, archive.num_classes) == (4, 3, 2)


def test_folder_zip_and_archive_give_the_same_data(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "in", {f"{i % 2}/{i}.png": x for i, x in enumerate(random_images(6))})
    with zipfile.ZipFile(tmp_path / "in.zip", "w") as file:
        for path in sorted((tmp_path / "in").rglob("*.png")):
            file.write(path, path.relative_to(tmp_path / "in"))
    first = prepare(source, tmp_path / "1.zip")
    second = prepare(str(tmp_path / "in.zip"), tmp_path / "2.zip")
    third = prepare(str(tmp_path / "1.zip"), tmp_path / "3.zip")
    assert first.path.read_bytes() == second.path.read_bytes() == third.path.read_bytes()


def test_digits_bring_their_holdout(tmp_path: Path) -> None:
    train, held_out = prepare_with_holdout("digits", tmp_path / "t.zip", tmp_path / "h.zip", holdout_key=KEY)
    assert (train.num_images, held_out.num_images) == (1497, 300)
    assert (train.resolution, train.num_channels, train.num_classes, held_out.num_classes) == (8, 1, 10, 10)
    assert prepare("digits", tmp_path / "t2.zip").fingerprint() == train.fingerprint()
    assert prepare("digits", tmp_path / "h2.zip", split="holdout").fingerprint() == held_out.fingerprint()


def test_split_folders_keep_their_sides(tmp_path: Path) -> None:
    images = random_images(20)
    names = [f"{'train' if i < 14 else 'test'}/{i % 2}/{i:02d}.png" for i in range(20)]
    source = write_folder(tmp_path / "in", dict(zip(names, images, strict=True)))
    train, held_out = prepare_with_holdout(source, tmp_path / "t.zip", tmp_path / "h.zip", holdout_key=KEY)
    sides = ({x.transpose(2, 0, 1).tobytes() for x in part} for part in (images[:14], images[14:]))
    assert tuple({pixels for pixels, _ in contents(part)} for part in (train, held_out)) == tuple(sides)


def test_channels_follow_the_formats(tmp_path: Path) -> None:
    grey = random_images(3)[..., 0]
    source = write_folder(tmp_path / "grey", {f"{i}.png": image for i, image in enumerate(grey)})
    archive = prepare(source, tmp_path / "grey.zip")
    np.testing.assert_array_equal(archive.read([0, 1, 2])[:, 0], grey)
    write_folder(tmp_path / "grey", {"colour.png": random_images(1)[0]})
    mixed = prepare(source, tmp_path / "mixed.zip")
    assert mixed.num_channels == 3
    np.testing.assert_array_equal(mixed.read([0, 1, 2]), np.stack([grey] * 3, axis=1))


def test_crop_and_resize(tmp_path: Path) -> None:
    image = np.zeros((8, 20, 3), np.uint8)
    image[:, 6:14] = [10, 20, 30]  # the central square
    source = write_folder(tmp_path / "in", {"a.png": image, "b.png": image.transpose(1, 0, 2)})
    archive = prepare(source, tmp_path / "out.zip", resolution=4, transform="center-crop")
    expected = np.broadcast_to(np.array([10, 20, 30])[:, None, None], (2, 3, 4, 4))
    np.testing.assert_array_equal(archive.read([0, 1]), expected)
    cropped = prepare(source, tmp_path / "crop.zip", transform="center-crop")
    assert cropped.resolution == 8


def test_a_scanners_bits_are_those_of_all_archives(tmp_path: Path) -> None:
    source = tmp_path / "scans"
    source.mkdir()
    for index in range(12):
        values = np.full((4, 4), 4095 - index, np.uint16)
        Image.fromarray(values).save(source / f"{index}.png")
    plain = prepare(str(source), tmp_path / "plain.zip")
    bright = prepare(str(source), tmp_path / "bright.zip", grey_bits=12)
    assert plain.read([0]).max() == 16  # nearly black
    assert bright.read([0]).min() == 255
    both = prepare_with_holdout(
        str(source), tmp_path / "t.zip", tmp_path / "h.zip", holdout_key=bytes(32), fraction=0.5, grey_bits=12
    )
    assert all(archive.read(np.arange(archive.num_images)).min() >= 254 for archive in both)
    with pytest.raises(InputError, match="Expected --grey-bits from 9 to 16, got 8"):
        prepare(str(source), tmp_path / "other.zip", grey_bits=8)


@pytest.mark.parametrize("resolution", [None, 4])
def test_sizes_that_differ_are_listed_with_the_remedy(tmp_path: Path, resolution: int | None) -> None:
    sizes = [(4, 4), (4, 4), (6, 9), (5, 4), (4, 7), (8, 5), (9, 2), (3, 4)]
    images = {f"{i}.png": np.zeros((h, w, 3), np.uint8) for i, (w, h) in enumerate(sizes)}
    source = write_folder(tmp_path / "in", images)
    with pytest.raises(InputError, match="--transform center-crop") as caught:
        prepare(source, tmp_path / "out.zip", resolution=resolution)
    assert "4x4 (0.png), 6x9 (2.png)" in str(caught.value)
    assert "and 2 more" in str(caught.value)
    assert not (tmp_path / "out.zip").exists()
    assert ("--resolution" in str(caught.value)) == (resolution is None)


def test_oblong_images_are_refused_even_if_all_alike(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "in", {f"{i}.png": np.zeros((4, 5), np.uint8) for i in range(2)})
    with pytest.raises(InputError, match="5x4"):
        prepare(source, tmp_path / "out.zip")


def test_all_bad_images_are_named_and_nothing_is_written(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.fromarray(random_images(1, 40)[0]).save(buffer, "JPEG")
    bad = {"cat/01.png": b"", "dog/07.jpg": buffer.getvalue()[:700], "cat/09.gif": b"text"}
    good = {f"cat/x{i}.png": image for i, image in enumerate(random_images(80))}
    source = write_folder(tmp_path / "in", good | bad)
    (tmp_path / "out").mkdir()
    for run in (
        lambda: prepare(source, tmp_path / "out/a.zip"),
        lambda: prepare_with_holdout(source, tmp_path / "out/a.zip", tmp_path / "out/b.zip", holdout_key=KEY),
    ):
        with pytest.raises(InputError, match="3 images") as caught:
            run()
        assert all(name in str(caught.value) for name in bad)
        assert "\n" not in str(caught.value)
        assert list((tmp_path / "out").iterdir()) == []
    many = write_folder(tmp_path / "many", {f"{i:02d}.png": b"" for i in range(23)})
    with pytest.raises(InputError, match=r"19\.png.* and 3 more$") as caught:
        prepare(many, tmp_path / "out/a.zip")
    assert "20.png" not in str(caught.value)


def test_destinations_are_checked(tmp_path: Path) -> None:
    images = {f"{i}.png": image for i, image in enumerate(random_images(2))}
    source = write_folder(tmp_path / "in", images)
    prepare(source, tmp_path / "out.zip")
    before = (tmp_path / "out.zip").read_bytes()
    (tmp_path / "folder.zip").mkdir()
    (tmp_path / "alias").symlink_to(tmp_path / "in")
    for dest, message in (
        ("out.zip", "exists"),
        ("folder.zip", "exists"),
        ("in/out.zip", "outside"),
        ("alias/sub/out.zip", "outside"),
        ("out.png", "end in .zip"),
    ):
        with pytest.raises(InputError, match=message):
            prepare(source, tmp_path / dest)
    with pytest.raises(InputError, match="outside"):
        prepare(str(tmp_path / "out.zip"), tmp_path / "out.zip", overwrite=True)
    assert (tmp_path / "out.zip").read_bytes() == before
    write_folder(tmp_path / "in", {"3.png": images["0.png"]})
    assert prepare(source, tmp_path / "out.zip", overwrite=True).num_images == 3


def test_too_few_images_are_refused(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "in", {"cat/0.png": random_images(1)[0]})
    with pytest.raises(InputError, match="at least 2 images"):
        prepare(source, tmp_path / "out.zip")
    with pytest.raises(InputError, match="split='holdout'"):
        prepare(source, tmp_path / "out.zip", split="holdout")
    same = write_folder(tmp_path / "same", {f"{i}.png": np.zeros((4, 4), np.uint8) for i in range(5)})
    with pytest.raises(InputError, match="both sides"):  # duplicates are all on one side
        prepare_with_holdout(same, tmp_path / "t.zip", tmp_path / "h.zip", holdout_key=KEY)
    assert not list(tmp_path.glob("*.zip"))
    for key, fraction in ((KEY, 0.0), (KEY, 1.0), (b"short", 0.5)):
        with pytest.raises(InputError, match="Expected"):
            prepare_with_holdout(same, tmp_path / "t.zip", tmp_path / "h.zip", holdout_key=key, fraction=fraction)
    with pytest.raises(InputError, match="twice"):
        prepare_with_holdout(same, tmp_path / "t.zip", tmp_path / "t.zip", holdout_key=KEY)


def test_the_keyed_hash_is_hmac_sha256() -> None:
    image = np.arange(12, dtype=np.uint8).reshape(3, 2, 2)
    message = b"dpdm hold-out, version 1" + struct.pack("<QQQ", 3, 2, 2) + bytes(range(12))
    padded = KEY.ljust(64, b"\0")  # RFC 2104, by its definition
    inner = hashlib.sha256(bytes(b ^ 0x36 for b in padded) + message).digest()
    outer = hashlib.sha256(bytes(b ^ 0x5C for b in padded) + inner).digest()
    position = int.from_bytes(outer[:8], "big") / 2**64
    assert not is_held_out(image, KEY, position - 1e-9)
    assert is_held_out(image, KEY, position + 1e-9)


def test_the_expected_part_is_held_out_and_the_key_matters() -> None:
    images = random_images(6000, 2).transpose(0, 3, 1, 2)
    sides = np.array([[is_held_out(image, key, 1 / 6) for image in images] for key in (KEY, KEY[::-1])])
    deviation = (6000 * (1 / 6) * (5 / 6)) ** 0.5
    assert np.all(np.abs(sides.sum(axis=1) - 1000) < 4.5 * deviation)
    both = np.logical_and(*sides).sum()  # independent: a 36th
    assert abs(both - 6000 / 36) < 4.5 * (6000 / 36) ** 0.5
    grey = images[:100, :1]
    repeated = np.repeat(grey, 3, axis=1)
    assert [is_held_out(x, KEY, 0.5) for x in grey] == [is_held_out(x, KEY, 0.5) for x in repeated]


def sides_of(root: Path, images: NDArray[np.uint8], labels: NDArray[np.uint8], key: bytes) -> dict[bytes, set[str]]:
    """Prepares an idx folder; returns for each image the sides on which it was found."""
    root.mkdir()
    (root / "train-images-idx3-ubyte").write_bytes(struct.pack(">4B3I", 0, 0, 8, 3, *images.shape) + images.tobytes())
    (root / "train-labels-idx1-ubyte").write_bytes(struct.pack(">4BI", 0, 0, 8, 1, len(labels)) + labels.tobytes())
    dests = [root.with_suffix(f".{side}.zip") for side in ("train", "holdout")]
    archives = prepare_with_holdout(str(root), *dests, holdout_key=key, fraction=0.5)
    found: dict[bytes, set[str]] = {}
    for side, archive in zip(("train", "holdout"), archives, strict=True):
        for pixels, _ in contents(archive):
            found.setdefault(pixels, set()).add(side)
    assert sum(archive.num_images for archive in archives) == len(images)
    return found


def moved_records(seed: int, key: bytes, removed: int) -> int:
    """Counts images whose side changes when one record is removed and order and labels are others."""
    random = np.random.default_rng(seed)
    images = random.integers(0, 256, (50, 2, 2), np.uint8)
    images[45:] = images[:5]  # duplicates
    labels = random.integers(0, 3, 50).astype(np.uint8)
    kept = random.permutation(np.delete(np.arange(50), removed))
    with tempfile.TemporaryDirectory() as folder:
        before = sides_of(Path(folder) / "all", images, labels, key)
        after = sides_of(Path(folder) / "fewer", images[kept], 2 - labels[kept], key)
    return sum(before[pixels] != sides for pixels, sides in after.items()) + sum(len(s) > 1 for s in before.values())


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 2**32), key=st.binary(min_size=32, max_size=32), removed=st.integers(0, 49))
@example(seed=0, key=KEY, removed=10)
def test_no_record_moves_another(seed: int, key: bytes, removed: int) -> None:
    assert moved_records(seed, key, removed) == 0


def test_a_split_by_index_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutation: held out is every other record, in order."""
    count = itertools.count()
    monkeypatch.setattr(prepare_module, "is_held_out", lambda image, key, fraction: next(count) % 2 == 0)
    assert moved_records(0, KEY, 10) > 0


def test_a_colour_record_does_not_move_grey_ones(tmp_path: Path) -> None:
    grey = random_images(40, seed=3)[..., 0]
    source = write_folder(tmp_path / "in", {f"{i:02d}.png": image for i, image in enumerate(grey)})
    before = prepare_with_holdout(
        source, tmp_path / "t.zip", tmp_path / "h.zip", holdout_key=KEY, fraction=0.5, resolution=2
    )
    write_folder(tmp_path / "in", {"zz.png": random_images(1)[0]})
    after = prepare_with_holdout(
        source, tmp_path / "t2.zip", tmp_path / "h2.zip", holdout_key=KEY, fraction=0.5, resolution=2
    )
    assert [part.num_channels for part in after] == [3, 3]
    for old, new in zip(before, after, strict=True):
        as_rgb = {np.repeat(image, 3, axis=0).tobytes() for image in old.read(np.arange(old.num_images))}
        assert as_rgb <= {pixels for pixels, _ in contents(new)}


def encoded(image: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def test_the_tree_of_imagenet(tmp_path: Path) -> None:
    """Folders named by synset, suffixes in capitals, CMYK files, and a PNG that is called .JPEG."""
    colour = Image.new("RGB", (50, 37), (200, 60, 30))
    ink = Image.frombytes("CMYK", (37, 50), np.full((50, 37, 4), [40, 90, 200, 60], np.uint8).tobytes())
    files = {
        "n01440764/n01440764_10026.JPEG": encoded(colour, "JPEG"),
        "n01440764/n01440764_10027.JPEG": encoded(colour, "PNG"),
        "n01443537/n01443537_2.JPEG": encoded(ink, "JPEG"),
        "n01484850/n01484850_7.JPEG": encoded(Image.new("L", (40, 40), 77), "JPEG"),
    }
    source = write_folder(tmp_path / "train", files)
    (tmp_path / "train/n15075141").mkdir()
    archive = prepare(source, tmp_path / "out.zip", resolution=32, transform="center-crop")
    assert archive.class_names == ["n01440764", "n01443537", "n01484850", "n15075141"]
    assert archive.labels is not None
    assert archive.labels.tolist() == [0, 0, 1, 2]
    expected = [(200, 60, 30), (200, 60, 30), tuple((255 - c) * (255 - 60) / 255 for c in (40, 90, 200)), (77,) * 3]
    found = archive.read(np.arange(4)).astype(float)
    np.testing.assert_allclose(found, np.array(expected)[:, :, None, None] * np.ones((32, 32)), atol=4)


def test_center_crop_wide_gives_squares_with_bars(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "in", {f"{i}.png": np.full((30, 40 + i, 3), 90, np.uint8) for i in range(3)})
    archive = prepare(source, tmp_path / "out.zip", resolution=(16, 12), transform="center-crop-wide")
    expected = np.zeros((16, 16), np.uint8)
    expected[2:14] = 90
    np.testing.assert_array_equal(archive.read(np.arange(3)), np.broadcast_to(expected, (3, 3, 16, 16)))
    with pytest.raises(InputError, match="to be square"):
        prepare(source, tmp_path / "2.zip", resolution=(16, 12))
    with pytest.raises(InputError, match="to be square"):
        prepare_with_holdout(source, tmp_path / "2.zip", tmp_path / "3.zip", holdout_key=KEY, resolution=(16, 12))
    assert not (tmp_path / "2.zip").exists()


def test_images_do_not_pile_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_folder(tmp_path / "in", {f"{i:03d}.png": image for i, image in enumerate(random_images(400))})
    loaded, ahead = itertools.count(1), []
    load, add = prepare_module._Recipe.load, Unfinished.add
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    monkeypatch.setattr(prepare_module._Recipe, "load", lambda self, n, i: (next(loaded), load(self, n, i))[1])

    def slow_add(self: Unfinished, side: int, png: bytes, label: int | None) -> None:
        if self.num_done % 50 == 49:
            time.sleep(0.02)  # time for the threads to run ahead
        ahead.append(next(loaded) - self.num_done - len(ahead))
        add(self, side, png, label)

    monkeypatch.setattr(Unfinished, "add", slow_add)
    prepare(source, tmp_path / "out.zip")
    assert len(ahead) == 400
    assert max(ahead) <= 5 * prepare_module.RECORDS_PER_TASK


def test_listing_a_million_files_takes_little(tmp_path: Path) -> None:
    """Bytes for each name, from which the memory for a million follows."""
    count = 3000
    for index in range(count):
        folder = tmp_path / f"in/n{index % 10:08d}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"n{index % 10:08d}_{index}.JPEG").touch()
    open_source(str(tmp_path / "in"))  # so that what Python keeps for later is not counted
    tracemalloc.start()
    try:
        splits = open_source(str(tmp_path / "in"))
        kept, peak = (size / count for size in tracemalloc.get_traced_memory())
    finally:
        tracemalloc.stop()
    assert splits["train"].num_images == count
    assert kept < 150
    assert peak < 400
