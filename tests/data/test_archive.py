import errno
import hashlib
import io
import json
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from dpdm.data import archive as archive_module
from dpdm.data import zips
from dpdm.data.archive import ArchiveWriter, ImageArchive, is_archive
from dpdm.errors import InputError, RunError


def random_images(count: int, channels: int = 3, size: int = 5) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (count, channels, size, size), np.uint8)


def write(path: Path, images: NDArray[np.uint8], labels: list[int] | None = None) -> Path:
    with ArchiveWriter(path) as writer:
        for index, image in enumerate(images):
            writer.add(image, None if labels is None else labels[index])
    return path


def rewrite(path: Path, changes: dict[str, bytes | None]) -> Path:
    """Copies an archive with some members replaced, added, or (None) left out."""
    with zipfile.ZipFile(path) as old:
        members = {name: old.read(name) for name in old.namelist()} | changes
    with zipfile.ZipFile(path, "w") as new:
        for name, content in members.items():
            if content is not None:
                new.writestr(name, content)
    return path


def png(mode: str, size: tuple[int, int]) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("channels", [1, 3])
def test_an_edm_style_reader_reads_what_is_written(tmp_path: Path, channels: int) -> None:
    images = random_images(1003, channels, 3)
    labels = [index % 7 for index in range(1003)]
    path = write(tmp_path / "a.zip", images, labels)
    with zipfile.ZipFile(path) as file:
        assert {info.compress_type for info in file.infolist()} == {zipfile.ZIP_STORED}
        names = sorted(name for name in file.namelist() if name.endswith(".png"))
        table = json.loads(file.read("dataset.json"))
        pixels = [np.asarray(Image.open(file.open(name))) for name in names]
    assert [names[0], names[999], names[1000]] == [
        "00000/img00000000.png",
        "00000/img00000999.png",
        "00001/img00001000.png",
    ]
    assert table == {"labels": [[name, label] for name, label in zip(names, labels, strict=True)]}
    expected = images[:, 0] if channels == 1 else images.transpose(0, 2, 3, 1)
    np.testing.assert_array_equal(np.stack(pixels), expected)


@pytest.mark.parametrize("bytes_in_memory", [0, 2**20])
def test_read_returns_any_indices_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bytes_in_memory: int
) -> None:
    monkeypatch.setattr(archive_module, "MAX_BYTES_IN_MEMORY", bytes_in_memory)
    images = random_images(9)
    archive = ImageArchive(write(tmp_path / "a.zip", images, [2] * 9))
    index = np.array([8, 0, 3, 3, 0])
    for _ in range(2):
        np.testing.assert_array_equal(archive.read(index), images[index])
    archive.read(index)[:] = 0  # a copy: what was read before must not change what is read later
    np.testing.assert_array_equal(archive.read(np.arange(9)), images)
    assert archive.read([]).shape == (0, 3, 5, 5)
    assert (archive.num_images, archive.resolution, archive.num_channels) == (9, 5, 3)
    for wrong in ([9], [-1], [0.5], [[1]]):
        with pytest.raises(ValueError, match="Expected"):
            archive.read(wrong)


@pytest.mark.parametrize(("bytes_in_memory", "expected"), [(0, 6), (2**20, 3)])
def test_only_small_sets_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bytes_in_memory: int, expected: int
) -> None:
    monkeypatch.setattr(archive_module, "MAX_BYTES_IN_MEMORY", bytes_in_memory)
    archive = ImageArchive(write(tmp_path / "a.zip", random_images(3)))
    opened = []
    real = archive_module.open_image
    monkeypatch.setattr(archive_module, "open_image", lambda name, content: opened.append(name) or real(name, content))
    archive.read([0, 1, 2])
    archive.read([2, 1, 0])
    assert len(opened) == expected


def test_classes(tmp_path: Path) -> None:
    images = random_images(3)
    unlabelled = ImageArchive(write(tmp_path / "a.zip", images))
    assert (unlabelled.labels, unlabelled.num_classes, unlabelled.class_names) == (None, 0, None)
    unnamed = ImageArchive(write(tmp_path / "b.zip", images, [0, 4, 1]))
    assert (unnamed.num_classes, unnamed.class_names) == (5, None)
    with ArchiveWriter(tmp_path / "c.zip", ["cat", "dög", "emu"]) as writer:
        for image, label in zip(images, [1, 0, 1], strict=True):
            writer.add(image, label)
    named = ImageArchive(tmp_path / "c.zip")
    assert (named.num_classes, named.class_names) == (3, ["cat", "dög", "emu"])
    assert named.labels is not None
    assert named.labels.dtype == np.int64
    assert named.labels.tolist() == [1, 0, 1]


def test_the_same_images_give_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = write(tmp_path / "a.zip", random_images(4), [0, 1, 2, 3]).read_bytes()
    monkeypatch.setattr("time.time", lambda: 2e9)
    monkeypatch.setattr("time.localtime", lambda *_: (2033, 5, 18, 3, 33, 20, 2, 138, 0))
    assert write(tmp_path / "b.zip", random_images(4), [0, 1, 2, 3]).read_bytes() == first


@pytest.mark.parametrize(
    ("image", "label"),
    [
        (np.zeros((3, 5, 5), np.float32), 0),
        (np.zeros((2, 5, 5), np.uint8), 0),
        (np.zeros((3, 5, 4), np.uint8), 0),
        (np.zeros((5, 5), np.uint8), 0),
        (np.zeros((3, 6, 6), np.uint8), 0),
        (np.zeros((3, 5, 5), np.uint8), None),
        (np.zeros((3, 5, 5), np.uint8), -1),
        (np.zeros((3, 5, 5), np.uint8), 2),
    ],
)
def test_wrong_images_are_refused_and_nothing_stays(tmp_path: Path, image: NDArray, label: int | None) -> None:
    path = tmp_path / "a.zip"

    def write_both() -> None:
        with ArchiveWriter(path, ["a", "b"]) as writer:
            writer.add(np.zeros((3, 5, 5), np.uint8), 1)
            writer.add(image, label)

    with pytest.raises(ValueError, match="Expected"):
        write_both()
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_the_older_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.zip", random_images(2))
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(archive_module, "local_header", full)
    with pytest.raises(RunError, match="No space left"):
        write(path, random_images(3))
    assert [file.name for file in tmp_path.iterdir()] == ["a.zip"]
    assert path.read_bytes() == before


def test_fingerprint_names_the_images_and_labels(tmp_path: Path) -> None:
    images = random_images(3, 1, 2)
    archive = ImageArchive(write(tmp_path / "a.zip", images, [0, 1, 1]))
    head = b'{"images": 3, "labelled": true, "grouped": false}'
    labels = bytes([0] * 8 + [1] + [0] * 7 + [1] + [0] * 7)
    with zipfile.ZipFile(archive.path) as members:
        files = [members.read(f"00000/img{index:08d}.png") for index in range(3)]
    sized = b"".join(len(content).to_bytes(8, "little") + content for content in files)
    expected = hashlib.sha256(head + labels + sized).hexdigest()
    assert archive.fingerprint() == expected

    def other(name: str, images: NDArray[np.uint8], labels: list[int] | None) -> str:
        return ImageArchive(write(tmp_path / name, images, labels)).fingerprint()

    changed = images.copy()
    changed[2, 0, 1, 1] ^= 1
    assert (
        len(
            {
                expected,
                other("b.zip", changed, [0, 1, 1]),
                other("c.zip", images, [0, 1, 0]),
                other("d.zip", images[::-1], [0, 1, 1]),
                other("e.zip", images, None),
            }
        )
        == 5
    )


def test_fingerprint_names_a_damaged_image(tmp_path: Path) -> None:
    path = write(tmp_path / "a.zip", random_images(3))
    content = bytearray(path.read_bytes())
    content[content.rfind(b"IDAT") + 6] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"img00000002\.png: cannot be read from the zip"):
        ImageArchive(path).fingerprint()


def test_check_names_every_bad_image(tmp_path: Path) -> None:
    path = write(tmp_path / "a.zip", random_images(30))
    good = png("RGB", (5, 5))
    odd = {0: b"no image", 3: good[:-30], 5: png("L", (5, 5)), 9: png("RGB", (5, 6)), 29: b""}
    rewrite(path, {f"00000/img{index:08d}.png": content for index, content in odd.items()})
    archive = ImageArchive(path)
    with pytest.raises(InputError) as caught:
        archive.check()
    message = str(caught.value)
    assert "\n" not in message
    assert [index for index in range(30) if f"img{index:08d}.png" in message] == sorted(odd)
    with pytest.raises(InputError, match="img00000009"):
        archive.read([1, 9])
    archive.read([1, 2, 4])

    rewrite(path, {f"00000/img{index:08d}.png": b"" for index in range(25)})
    with pytest.raises(InputError) as caught:
        ImageArchive(path).check()
    assert "img00000019.png" in str(caught.value)
    assert "img00000020.png" not in str(caught.value)
    assert str(caught.value).endswith("and 6 more")
    ImageArchive(write(tmp_path / "good.zip", random_images(3))).check()


def test_a_flipped_bit_is_found_by_the_checksum(tmp_path: Path) -> None:
    path = write(tmp_path / "a.zip", random_images(2))
    content = bytearray(path.read_bytes())
    content[content.index(b"IDAT") + 20] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"img00000000\.png"):
        ImageArchive(path).check()


def test_huge_images_and_members_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.zip", random_images(2))
    rewrite(path, {"00000/img00000001.png": png("1", (20000, 20000))})
    with pytest.raises(InputError, match="img00000001"):
        ImageArchive(path).read([1])
    rewrite(path, {"00000/img00000001.png": png("1", (10000, 10000))})  # above our limit, below Pillow's error
    with pytest.raises(InputError, match="img00000001"), pytest.warns(Image.DecompressionBombWarning):
        ImageArchive(path).read([1])
    monkeypatch.setattr(zips, "MAX_MEMBER_BYTES", 10)
    with pytest.raises(InputError, match="expected at most 10"):
        ImageArchive(path)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (b"{", "JSON"),
        (b"[]", "expected"),
        (b'{"labels": 3}', "list"),
        (b'{"labels": [["00000/img00000000.png", 0.5], ["00000/img00000001.png", 1]]}', "list"),
        (b'{"labels": [["00000/img00000000.png", true], ["00000/img00000001.png", 1]]}', "list"),
        (b'{"labels": [["00000/img00000000.png", -1], ["00000/img00000001.png", 1]]}', "list"),
        (b'{"labels": [["00000/img00000000.png", 1e9], ["00000/img00000001.png", 1]]}', "list"),
        (b'{"labels": [["00000/img00000000.png", 0]]}', "img00000001"),
        (
            b'{"labels": [["00000/img00000000.png", 0], ["00000/img00000001.png", 1], ["x.png", 1]]}',
            "differ in 1 names: x.png",
        ),
        (
            b'{"labels": [["00000/img00000000.png", 0], ["00000/img00000001.png", 1], ["00000/img00000001.png", 0]]}',
            "more than one label",
        ),
        (
            b'{"labels": [["00000/img00000000.png", 0], ["00000/img00000001.png", 1]], "class_names": ["a"]}',
            "class_names",
        ),
        (None, "dpdm prepare"),
    ],
)
def test_odd_labels_are_refused(tmp_path: Path, table: bytes | None, message: str) -> None:
    path = rewrite(write(tmp_path / "a.zip", random_images(2)), {"dataset.json": table})
    with pytest.raises(InputError, match=message) as caught:
        ImageArchive(path)
    assert "\n" not in str(caught.value)


def test_an_archive_is_told_from_another_zip(tmp_path: Path) -> None:
    assert is_archive(write(tmp_path / "a.zip", random_images(2)))
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as file:
        file.writestr("a/dataset.json", b"{}")
    assert not is_archive(tmp_path / "b.zip")


def test_memory_for_an_image_that_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a million images need follows from this; the images themselves are at no time in memory together."""
    count = 20_000
    monkeypatch.setattr(archive_module, "MAX_BYTES_IN_MEMORY", 0)
    png_bytes = archive_module.encode_png(Image.new("L", (8, 8)))
    tracemalloc.start()
    try:
        with (tmp_path / "a.zip").open("wb") as file:
            body = archive_module.ArchiveBody(file, ["a", "b"])
            for index in range(count):
                body.add(png_bytes, index % 2)
            writing = tracemalloc.get_traced_memory()[0] / count
            body.finish()
        writing_peak = tracemalloc.get_traced_memory()[1] / count
        tracemalloc.reset_peak()
        archive = ImageArchive(tmp_path / "a.zip")
        reading, reading_peak = (size / count for size in tracemalloc.get_traced_memory())
    finally:
        tracemalloc.stop()
    assert archive.num_images == count
    assert writing < 25
    assert writing_peak < 250
    assert reading < 160
    assert reading_peak < 600


def test_odd_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Cannot open"):
        ImageArchive(tmp_path / "absent.zip")
    (tmp_path / "text.zip").write_text("text")
    with pytest.raises(InputError, match="Cannot open"):
        ImageArchive(tmp_path / "text.zip")
    path = write(tmp_path / "cut.zip", random_images(50))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match="Cannot open"):
        ImageArchive(path)
    for mode, size in (("RGBA", (5, 5)), ("RGB", (4, 5))):
        odd = write(tmp_path / "odd.zip", random_images(1))
        rewrite(odd, {"00000/img00000000.png": png(mode, size)})
        with pytest.raises(InputError, match=f"got {mode} {size[0]}x{size[1]}"):
            ImageArchive(odd)
    with zipfile.ZipFile(tmp_path / "twice.zip", "w") as file:
        file.writestr("a.png", b"1")
        with pytest.warns(UserWarning, match="Duplicate"):
            file.writestr("a.png", b"2")
    with pytest.raises(InputError, match=r"more than once: a\.png"):
        ImageArchive(tmp_path / "twice.zip")
