"""What dpdm writes passes, whatever it is; every byte more is found."""

import io
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin
from tests.made_release import png_chunk

from dpdm.data.pixels_only import Form, check_jpeg, check_png, scan_archive, scan_samples
from dpdm.generate import write_archive, write_npz

GREY = Form(num_channels=1, resolution=8, num_classes=3)
COLOUR = Form(num_channels=3, resolution=8, num_classes=0)


def draw(form: Form, count: int) -> np.ndarray:
    shape = (count, form.num_channels, form.resolution, form.resolution)
    return np.random.default_rng(count).integers(0, 256, shape, np.uint8)


def encode(image: np.ndarray, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    pixels = image[0] if len(image) == 1 else image.transpose(1, 2, 0)
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, kind, **options)  # type: ignore[arg-type]
    return buffer.getvalue()


def labels_of(form: Form, count: int) -> np.ndarray | None:
    return np.arange(count) % form.num_classes if form.num_classes else None


@pytest.fixture(params=[GREY, COLOUR], ids=["grey", "colour"])
def form(request: pytest.FixtureRequest) -> Form:
    return request.param


@pytest.fixture
def archive(form: Form, tmp_path: Path) -> Path:
    write_archive(tmp_path / "synthetic.zip", draw(form, 5), labels_of(form, 5))
    return tmp_path / "synthetic.zip"


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    """A folder of grey images with labels, as ``dpdm sample`` writes it."""
    folder = tmp_path / "samples"
    folder.mkdir()
    lines = ["file,label"]
    for index, image in enumerate(draw(GREY, 4)):
        (folder / f"{index:06d}.png").write_bytes(encode(image))
        lines.append(f"{index:06d}.png,{index % 3}")
    (folder / "labels.csv").write_bytes("".join(f"{line}\r\n" for line in lines).encode())
    (folder / "grid.png").write_bytes(encode(draw(Form(1, 40, 0), 1)[0]))
    return folder


# PNG


def test_what_pillow_writes_is_pixels_only(form: Form) -> None:
    for level in (0, 1, 6, 9):
        png = encode(draw(form, 1)[0], compress_level=level)
        check_png(png, num_channels=form.num_channels, resolution=form.resolution)
    check_png(encode(np.zeros((3, 700, 900), np.uint8)))  # several IDAT chunks are one stream
    check_png(encode(draw(Form(3, 300, 0), 1)[0]))


def parts(png: bytes) -> tuple[bytes, bytes, bytes]:
    """Signature with header, pixels unpacked, end, of a small PNG of one IDAT."""
    return png[:33], zlib.decompress(png[41 : 41 + int.from_bytes(png[33:37], "big")]), png[-12:]


def ihdr(*values: int) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", struct.pack(">2L5B", *values))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda png: png + b"secret", "bytes behind its end"),
        (lambda png: png + png_chunk(b"IDAT", b"x"), "not made of one header"),
        (lambda png: png + png[-12:], "not made of one header"),
        (lambda png: png[:-12] + png_chunk(b"tEXt", b"Author\0Ada") + png[-12:], "holds tEXt beside its pixels"),
        (lambda png: png[:33] + png_chunk(b"eXIf", b"II*\0") + png[33:], "holds eXIf"),
        (lambda png: png[:33] + png_chunk(b"iCCP", b"x\0\0" + zlib.compress(b"y")) + png[33:], "holds iCCP"),
        (lambda png: png[:33] + png_chunk(b"tIME", b"\x07\xea\1\1\1\1\1") + png[33:], "holds tIME"),
        (lambda png: png[:33] + png_chunk(b"\x1b[2J", b"") + png[33:], "beside its pixels"),
        (lambda png: png[:-12] + png_chunk(b"IEND", b"secret"), "not made of one header"),
        (lambda png: png[:-12], "not made of one header"),
        (lambda png: png[:-4] + b"\0\0\0\0", "a damaged part"),
        (lambda png: png[:20], "a damaged part"),
        (lambda png: b"", "no PNG"),
        (lambda png: b"GIF89a", "no PNG"),
        (lambda png: png[:33] + png_chunk(b"IDAT", zlib.compress(parts(png)[1] + b"x")) + png[-12:], "more or fewer"),
        (lambda png: png[:33] + png_chunk(b"IDAT", zlib.compress(parts(png)[1][:-1])) + png[-12:], "more or fewer"),
        (lambda png: png[:33] + png_chunk(b"IDAT", zlib.compress(parts(png)[1]) + b"s") + png[-12:], "more or fewer"),
        (lambda png: png[:33] + png_chunk(b"IDAT", zlib.compress(bytes(10**7))) + png[-12:], "more or fewer"),
        (lambda png: png[:33] + png_chunk(b"IDAT", b"no zlib") + png[-12:], "cannot be unpacked"),
        (lambda png: png[:33] + png_chunk(b"IDAT", zlib.compress(b"\x09" * 72)) + png[-12:], "is damaged"),
        (lambda png: ihdr(8, 8, 16, 0, 0, 0, 0) + png[33:], "depth 16"),
        (lambda png: ihdr(8, 8, 8, 2, 0, 0, 0) + png[33:], "colour type 2"),
        (lambda png: ihdr(8, 8, 8, 0, 0, 0, 1) + png[33:], "depth 8"),
        (lambda png: ihdr(8, 9, 8, 0, 0, 0, 0) + png[33:], "8x9 pixels"),
    ],
)
def test_whatever_is_more_or_other_than_pixels_is_named(change: Callable[[bytes], bytes], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        check_png(change(encode(draw(GREY, 1)[0])), num_channels=1, resolution=8)


def test_a_png_that_would_unpack_to_gigabytes_is_not_unpacked() -> None:
    bomb = png_chunk(b"IDAT", zlib.compress(bytes(10**6), 9))
    with pytest.raises(ValueError, match="too many"):
        check_png(ihdr(2**31 - 1, 2**31 - 1, 8, 0, 0, 0, 0) + bomb + png_chunk(b"IEND", b""))


# JPEG, of which the page to be shared may hold one


def test_a_plain_jpeg_passes_and_one_with_more_does_not() -> None:
    jpeg = encode(draw(COLOUR, 1)[0], "JPEG", quality=80)
    check_jpeg(jpeg)
    exif = Image.Exif()
    exif[0x010E] = "Ada, ward 3"
    for more in (
        jpeg + b"secret",
        jpeg[:-2] + b"\xff\xfe\0\x08secret" + jpeg[-2:],
        jpeg[:2] + b"\xff\xfe\0\x08secret" + jpeg[2:],
        encode(draw(COLOUR, 1)[0], "JPEG", exif=exif),
        encode(draw(COLOUR, 1)[0], "JPEG", comment=b"Ada"),
        jpeg[:-2],
        jpeg[:40],
        b"",
    ):
        with pytest.raises(ValueError, match=r"beside its pixels|behind its pixels|ends too early|no JPEG"):
            check_jpeg(more)


# Archives


def test_an_archive_as_dpdm_writes_it_passes(archive: Path, form: Form) -> None:
    assert scan_archive(archive, form) == (5, [])


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_byte_outside_the_pixels_can_be_changed(data: st.DataObject, tmp_path: Path) -> None:
    """Nor inside, but for pixel values themselves, which then have another checksum."""
    path = tmp_path / "synthetic.zip"
    write_archive(path, draw(GREY, 2), labels_of(GREY, 2))
    content = bytearray(path.read_bytes())
    position = data.draw(st.integers(0, len(content) - 1))
    content[position] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    assert scan_archive(path, GREY)[1] != []


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), more=st.binary(min_size=1, max_size=30))
def test_no_byte_can_be_added_anywhere(data: st.DataObject, more: bytes, tmp_path: Path) -> None:
    path = tmp_path / "synthetic.zip"
    write_archive(path, draw(GREY, 2), labels_of(GREY, 2))
    content = path.read_bytes()
    position = data.draw(st.integers(0, len(content)))
    path.write_bytes(content[:position] + more + content[position:])
    assert scan_archive(path, GREY)[1] != []


def test_what_other_programs_write_is_told_from_what_dpdm_writes(archive: Path, form: Form, tmp_path: Path) -> None:
    again = tmp_path / "again.zip"
    with zipfile.ZipFile(archive) as old, zipfile.ZipFile(again, "w") as new:
        for info in old.infolist():
            new.writestr(info.filename, old.read(info))  # with a date of its own
    assert scan_archive(again, form)[1] != []
    with zipfile.ZipFile(archive, "a") as file:
        file.comment = b"Ada"
    assert scan_archive(archive, form)[1] == ["its directory is not what dpdm writes, or something follows it"]


@pytest.mark.parametrize(
    ("labels", "problem"),
    [([0, 7], "not one of 3 classes"), ([0, 1], None), (None, None)],
)
def test_labels_are_those_of_the_model(labels: list[int] | None, problem: str | None, tmp_path: Path) -> None:
    write_archive(tmp_path / "a.zip", draw(GREY, 2), None if labels is None else np.array(labels))
    _, problems = scan_archive(tmp_path / "a.zip", GREY)
    assert problems == [] if problem is None else problem in problems[0]


def test_images_of_another_form_are_named_and_not_all_of_them(tmp_path: Path) -> None:
    write_archive(tmp_path / "a.zip", draw(Form(1, 9, 0), 50), None)
    _, problems = scan_archive(tmp_path / "a.zip", GREY)
    assert problems[0] == "00000/img00000000.png is of 9x9 pixels, the model draws 8x8"
    assert len(problems) == 21


def test_what_is_no_archive_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(b"no zip")
    assert scan_archive(tmp_path / "a.zip", GREY) == (0, ["what follows 0 images is not what dpdm writes"])
    (tmp_path / "link.zip").symlink_to(tmp_path / "a.zip")
    for path in (tmp_path / "link.zip", tmp_path / "nowhere", tmp_path):
        with pytest.raises(ValueError, match=r"is a link|cannot be read|no plain file"):
            scan_archive(path, GREY)


# Folders


def test_a_folder_as_dpdm_writes_it_passes(samples: Path) -> None:
    assert scan_samples(samples, GREY) == (4, [])


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda f: (f / "notes.txt").write_text("x"), "notes.txt is not on the allow-list"),
        (lambda f: (f / "000004.jpg").write_text("x"), "000004.jpg is not on the allow-list"),
        (lambda f: (f / "more").mkdir(), "more is not on the allow-list"),
        (lambda f: (f / "000002.png").unlink(), "000003.png stands where image 2 should"),
        (lambda f: (f / "000003.png").rename(f / "0000003.png"), "0000003.png"),
        (lambda f: (f / "000003.png").write_bytes(b"x"), "000003.png is no PNG"),
        (lambda f: (f / "000003.png").write_bytes(bytes(10**6)), "000003.png has 1,000,000 bytes"),
        (lambda f: (f / "grid.png").write_bytes((f / "grid.png").read_bytes() + b"x"), "grid.png has bytes behind"),
        (
            lambda f: (f / "labels.csv").write_bytes((f / "labels.csv").read_bytes() + b"loss,0.3\r\n"),
            "labels.csv does",
        ),
        (lambda f: (f / "labels.csv").write_bytes((f / "labels.csv").read_bytes()[:-4]), "labels.csv does not"),
        (lambda f: (f / "labels.csv").write_text("file,label\n"), "labels.csv does not"),
        (lambda f: replace(f / "labels.csv", b"png,2", b"png,3"), "labels.csv holds a label that is not one of 3"),
        (lambda f: replace(f / "labels.csv", b"png,2", b"png, 2"), "labels.csv does not name 000002.png"),
        (lambda f: replace(f / "labels.csv", b"000002.png,2", b"/scans/ada.png,2"), "labels.csv does not name"),
        (lambda f: (f / "images.zip").write_bytes(b""), "images.zip is not on the allow-list"),
    ],
)
def test_what_a_folder_should_not_hold_is_named(samples: Path, change: Callable[[Path], object], problem: str) -> None:
    change(samples)
    _, problems = scan_samples(samples, GREY)
    assert any(problem in line for line in problems), problems


def replace(path: Path, old: bytes, new: bytes) -> None:
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new))


def test_links_in_a_folder_are_not_followed(samples: Path, tmp_path: Path) -> None:
    (samples / "000003.png").rename(tmp_path / "elsewhere.png")
    (samples / "000003.png").symlink_to(tmp_path / "elsewhere.png")
    assert scan_samples(samples, GREY)[1] == ["000003.png is a link"]


def test_a_text_that_pillow_writes_is_found(samples: Path) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_itxt("patient", "Ada")
    with Image.open(samples / "000001.png") as image:
        image.load()
    image.save(samples / "000001.png", pnginfo=info)
    assert scan_samples(samples, GREY)[1] == ["000001.png holds iTXt beside its pixels"]


def test_an_archive_in_a_folder(archive: Path, form: Form, tmp_path: Path) -> None:
    (tmp_path / "samples").mkdir()
    archive.rename(tmp_path / "samples" / "images.zip")
    assert scan_samples(tmp_path / "samples", form) == (5, [])
    with (tmp_path / "samples" / "images.zip").open("ab") as file:
        file.write(b"x")
    _, problems = scan_samples(tmp_path / "samples", form)
    assert problems == ["images.zip (its directory is not what dpdm writes, or something follows it)"]


# npz


@pytest.fixture
def arrays(form: Form, tmp_path: Path) -> Path:
    folder = tmp_path / "samples"
    folder.mkdir()
    images = draw(form, 6)
    write_npz(folder / "images.npz", images, labels_of(form, 6), images.shape)
    return folder


def test_arrays_as_dpdm_writes_them_pass(arrays: Path, form: Form) -> None:
    assert scan_samples(arrays, form) == (6, [])


def with_comment(path: Path) -> None:
    with zipfile.ZipFile(path, "a") as file:
        file.comment = b"Ada"


def with_member(path: Path) -> None:
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("loss.npy", b"0.3")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda p: p.write_bytes(p.read_bytes() + b"secret"), "images.npz"),
        (lambda p: p.write_bytes(b"secret" + p.read_bytes()), "bytes beside its images and labels"),
        (with_comment, "other members than images and labels"),
        (with_member, "other members than images and labels"),
        (lambda p: p.write_bytes(p.read_bytes()[:100]), "cannot be read"),
        (lambda p: np.savez_compressed(p, arr_0=np.zeros((6, 8, 8, 1), np.uint8)), "a date or compression"),
        (lambda p: write_npz(p, draw(Form(1, 9, 0), 6), None, (6, 1, 9, 9)), "arrays of another form"),
        (lambda p: write_npz(p, draw(GREY, 5), None, (6, 1, 8, 8)), "another length than its numbers"),
        (lambda p: write_npz(p, draw(GREY, 6), np.zeros(5, np.int64), (6, 1, 8, 8)), "arrays of another form"),
        (lambda p: write_npz(p, draw(GREY, 6), np.zeros(6), (6, 1, 8, 8)), "arrays of another form"),
        (lambda p: p.write_bytes(p.read_bytes().replace(b"'descr'", b"'desrc'", 1)), "images.npz"),
    ],
)
def test_what_arrays_should_not_hold_is_named(tmp_path: Path, change: Callable[[Path], object], problem: str) -> None:
    images = draw(GREY, 6)
    write_npz(tmp_path / "images.npz", images, labels_of(GREY, 6), images.shape)
    change(tmp_path / "images.npz")
    _, problems = scan_samples(tmp_path, GREY)
    assert any(problem in line for line in problems), problems
