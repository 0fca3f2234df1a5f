import functools
import io
import math
import struct
import zlib
from typing import get_args

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from dpdm.data.archive import encode_png
from dpdm.data.transforms import (
    Resolution,
    Transform,
    check_grey_bits,
    check_resolution,
    decode,
    fit,
    is_grey,
    open_image,
    parse_resolution,
    to_array,
)
from dpdm.errors import InputError
from dpdm.options import TRANSFORMS


def encode(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)  # type: ignore[arg-type]
    return buffer.getvalue()


def random_pixels(*shape: int) -> NDArray[np.uint8]:
    return np.random.default_rng(1).integers(0, 256, shape, np.uint8)


def pixels(content: bytes | NDArray[np.uint8], channels: int = 3) -> NDArray[np.int64]:
    return to_array(decode("x", content, channels)).astype(np.int64)


@pytest.mark.parametrize(
    ("mode", "kind", "grey"),
    [
        ("1", "PNG", True),
        ("L", "PNG", True),
        ("LA", "PNG", True),
        ("I;16", "PNG", True),
        ("I;16", "TIFF", True),
        ("L", "JPEG", True),
        ("L", "PPM", True),
        ("P", "PNG", False),
        ("RGB", "JPEG", False),
        ("RGBA", "PNG", False),
        ("CMYK", "JPEG", False),
    ],
)
def test_grey_is_a_property_of_the_format(mode: str, kind: str, grey: bool) -> None:
    content = encode(Image.new(mode, (4, 4)), kind)
    assert is_grey("x", content) is grey
    assert pixels(content, 1).shape == (1, 4, 4)
    assert pixels(content, 3).shape == (3, 4, 4)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "I;16"])
def test_grey_images_hold_the_same_values_in_both_renditions(mode: str) -> None:
    values = random_pixels(6, 6)
    image = Image.fromarray(values.astype(np.uint16) * 251) if mode == "I;16" else Image.fromarray(values).convert(mode)
    content = encode(image)
    grey, rgb = (fit(decode("x", content, channels), 4, None) for channels in (1, 3))
    np.testing.assert_array_equal(np.repeat(to_array(grey), 3, axis=0), to_array(rgb))


def test_arrays_are_images() -> None:
    values = random_pixels(4, 4)
    assert is_grey("x", values)
    np.testing.assert_array_equal(pixels(values, 1)[0], values)
    np.testing.assert_array_equal(pixels(values, 3), np.stack([values] * 3))
    colour = random_pixels(4, 5, 3)
    assert not is_grey("x", colour)
    np.testing.assert_array_equal(pixels(colour, 3), colour.transpose(2, 0, 1))


def test_rgb_keeps_its_pixels() -> None:
    values = random_pixels(5, 7, 3)
    np.testing.assert_array_equal(pixels(encode(Image.fromarray(values))), values.transpose(2, 0, 1))


def test_16_bits_are_rounded_to_8() -> None:
    values = np.array([[0, 1, 128, 129, 255], [256, 257, 32767, 65406, 65407], [65408, 65534, 65535, 40000, 7]])
    expected = [[math.floor(v / 257 + 0.5) for v in row] for row in values.tolist()]
    for kind in ("PNG", "TIFF"):
        content = encode(Image.fromarray(values.astype(np.uint16)), kind)
        np.testing.assert_array_equal(pixels(content, 1)[0], expected)


def tiff(strip: bytes, width: int, *, bits: int, photometric: int = 1, sample_format: int = 1) -> bytes:
    """A grey TIFF of one row."""
    tags = {256: width, 257: 1, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: 1, 279: len(strip)}
    tags[339] = sample_format
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(tags.items()))
    strip += bytes(len(strip) % 2)
    return b"II*\0" + struct.pack("<I", 8 + len(strip)) + strip + struct.pack("<H", len(tags)) + entries + bytes(4)


def test_white_may_be_zero_in_8_and_in_16_bits() -> None:
    """As X-rays are stored: one data set may hold both."""
    values = np.array([0, 257, 12850, 65535])
    expected = [[255, 254, 205, 0]]
    wide = tiff(values.astype("<u2").tobytes(), 4, bits=16, photometric=0)
    narrow = tiff((values // 257).astype(np.uint8).tobytes(), 4, bits=8, photometric=0)
    for content in (wide, narrow):
        np.testing.assert_array_equal(pixels(content, 1)[0], expected)
    upright = tiff(values.astype("<u2").tobytes(), 4, bits=16)
    np.testing.assert_array_equal(pixels(upright, 1)[0], [[0, 1, 50, 255]])


def test_12_bits_are_scaled_to_8() -> None:
    packed = bytes([0x00, 0x0F, 0xFF, 0x80, 0x00, 0x80])  # 0, 4095, 2048, 128: as TIFF packs them
    np.testing.assert_array_equal(pixels(tiff(packed, 4, bits=12), 1)[0], [[0, 255, 128, 8]])


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_a_scanners_bits_fill_the_range(kind: str) -> None:
    content = encode(Image.fromarray(np.array([[0, 8, 9, 2048, 4094, 4095]], np.uint16)), kind)
    found = to_array(decode("a", content, 1, grey_bits=12))
    np.testing.assert_array_equal(found[0], [[0, 0, 1, 128, 255, 255]])  # round(v 255 / 4095)
    colour = to_array(decode("a", content, 3, grey_bits=12))
    np.testing.assert_array_equal(colour, np.repeat(found, 3, axis=0))


def test_a_scanners_bits_and_white_at_zero() -> None:
    content = tiff(np.array([0, 4095, 2048], "<u2").tobytes(), 3, bits=16, photometric=0)
    np.testing.assert_array_equal(to_array(decode("a", content, 1, grey_bits=12))[0], [[255, 0, 127]])


def test_bits_change_nothing_where_a_file_says_how_many_it_has() -> None:
    eight = encode(Image.fromarray(np.array([[0, 7, 255]], np.uint8)))
    np.testing.assert_array_equal(to_array(decode("a", eight, 1, grey_bits=12))[0], [[0, 7, 255]])
    packed = bytes([0x00, 0x0F, 0xFF, 0x80, 0x00, 0x80])
    np.testing.assert_array_equal(
        to_array(decode("a", tiff(packed, 4, bits=12), 1, grey_bits=10))[0], [[0, 255, 128, 8]]
    )


def test_a_pixel_beyond_the_bits_is_named() -> None:
    content = encode(Image.fromarray(np.array([[0, 4096]], np.uint16)))
    with pytest.raises(InputError, match=r"scan\.png: .*a pixel of 4096, expected at most 4095 by --grey-bits 12"):
        decode("scan.png", content, 1, grey_bits=12)


@pytest.mark.parametrize("bits", [8, 17])
def test_bits_that_no_16_bit_image_has_are_refused(bits: int) -> None:
    with pytest.raises(InputError, match=f"Expected --grey-bits from 9 to 16, got {bits}"):
        check_grey_bits(bits)


def test_signed_pixels_are_named() -> None:
    for values in ([0, 32767], [-1, 5]):  # whatever an image holds
        with pytest.raises(InputError, match="signed pixels"):
            pixels(tiff(np.array(values, "<i2").tobytes(), 2, bits=16, sample_format=2), 1)


def test_32_bits_are_named() -> None:
    content = encode(Image.fromarray(np.arange(16, dtype=np.int32).reshape(4, 4)), "TIFF")
    with pytest.raises(InputError, match="32-bit pixels, expected 8 or 16 bits"):
        pixels(content, 1)


def test_transparency_is_composited_on_black() -> None:
    values = random_pixels(8, 8, 4)
    values[0, :, 3], values[1, :, 3] = 0, 255
    found = pixels(encode(Image.fromarray(values)))
    expected = values[..., :3] * (values[..., 3:] / 255)
    np.testing.assert_allclose(found.transpose(1, 2, 0), expected, atol=1)
    assert not found[:, 0].any()
    np.testing.assert_array_equal(found[:, 1].T, values[1, :, :3])
    grey = np.ascontiguousarray(values[..., [0, 3]])
    found = pixels(encode(Image.fromarray(grey)), 1)[0]
    np.testing.assert_allclose(found, grey[..., 0] * (grey[..., 1] / 255), atol=1)


def test_a_transparent_colour_becomes_black() -> None:
    values = np.array([[10, 200, 10, 30]], np.uint8)
    for image in (Image.fromarray(values), Image.fromarray(values.astype(np.uint16) * 257)):
        transparent = 10 if image.mode == "L" else 2570
        np.testing.assert_array_equal(pixels(encode(image, transparency=transparent), 1)[0], [[0, 200, 0, 30]])
    palette = Image.fromarray(np.array([[0, 1, 2, 1]], np.uint8))
    palette.putpalette([9, 8, 7, 50, 60, 70, 3, 2, 1])
    found = pixels(encode(palette, transparency=1))
    np.testing.assert_array_equal(found[:, 0].T, [[9, 8, 7], [0, 0, 0], [3, 2, 1], [0, 0, 0]])


def test_palette_and_cmyk_become_rgb() -> None:
    palette = Image.fromarray(np.array([[0, 1], [1, 0]], np.uint8))
    palette.putpalette([9, 8, 7, 50, 60, 70])
    np.testing.assert_array_equal(pixels(encode(palette))[:, 0, 1], [50, 60, 70])
    ink = np.full((8, 8, 4), [40, 90, 200, 60], np.uint8)
    expected = [(255 - c) * (255 - 60) / 255 for c in (40, 90, 200)]
    for kind in ("JPEG", "TIFF"):
        found = pixels(encode(Image.frombytes("CMYK", (8, 8), ink.tobytes()), kind))
        np.testing.assert_allclose(found[:, 4, 4], expected, atol=4)


@pytest.mark.parametrize(
    ("orientation", "expected"),
    [  # EXIF 2.3, tag 0x0112: where the stored first row and first column belong
        (1, [[1, 2, 3], [4, 5, 6]]),
        (2, [[3, 2, 1], [6, 5, 4]]),
        (3, [[6, 5, 4], [3, 2, 1]]),
        (4, [[4, 5, 6], [1, 2, 3]]),
        (5, [[1, 4], [2, 5], [3, 6]]),
        (6, [[4, 1], [5, 2], [6, 3]]),
        (7, [[6, 3], [5, 2], [4, 1]]),
        (8, [[3, 6], [2, 5], [1, 4]]),
    ],
)
def test_exif_orientation(orientation: int, expected: list[list[int]]) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(np.array([[1, 2, 3], [4, 5, 6]], np.uint8))
    assert pixels(encode(image, exif=exif), 1)[0].tolist() == expected


@functools.cache
def damaged() -> dict[str, bytes]:
    photo = Image.fromarray(random_pixels(40, 40, 3))
    frames = [Image.fromarray(frame) for frame in random_pixels(2, 4, 4)]  # two equal frames would be merged
    return {
        "empty": b"",
        "text": b"hello",
        "svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        "cut png": encode(photo)[:900],
        "cut jpeg": encode(photo, "JPEG")[:900],
        "png header": encode(photo)[:20],
        "gif": encode(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "apng": encode(frames[0], "PNG", save_all=True, append_images=frames[1:]),
        "pages": encode(frames[0], "TIFF", save_all=True, append_images=frames[1:]),
        "float": encode(Image.new("F", (4, 4)), "TIFF"),
        "jpeg 2000": b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(40),
        "cmyk jpeg cut": encode(photo.convert("CMYK"), "JPEG")[:1500],
        "webp animation": encode(frames[0], "WEBP", save_all=True, append_images=frames[1:]),
        "32 bit": encode(Image.fromarray(np.full((4, 4), 70000, np.int32)), "TIFF"),
        "bomb": encode(Image.new("1", (20000, 20000))),
        "no width": b"P5 0 4 255\n",
    }


@pytest.mark.parametrize("kind", damaged())
def test_what_cannot_be_used_is_named(kind: str) -> None:
    with pytest.raises(InputError, match=r"^some/name\.png: ") as caught:
        decode("some/name.png", damaged()[kind], 3)
    assert "\n" not in str(caught.value)


def test_a_phone_photo_with_a_second_view_is_still() -> None:
    first, second = (Image.fromarray(view) for view in random_pixels(2, 8, 8, 3))
    content = encode(first, "MPO", save_all=True, append_images=[second])
    assert open_image("x", content).format == "MPO"
    assert pixels(content).shape == (3, 8, 8)


@pytest.mark.parametrize(("height", "width"), [(6, 6), (4, 9), (9, 4), (5, 8)])
def test_center_crop_takes_the_central_square(height: int, width: int) -> None:
    values = random_pixels(height, width)
    side = min(height, width)
    top, left = math.floor((height - side) / 2), math.floor((width - side) / 2)
    found = np.asarray(fit(Image.fromarray(values), None, "center-crop"))
    np.testing.assert_array_equal(found, values[top : top + side, left : left + side])


def lanczos(values: NDArray[np.float64], size: int) -> NDArray[np.float64]:
    """Windowed-sinc resampling of the columns by its definition, one output at a time."""
    scale = max(len(values) / size, 1.0)
    rows = []
    for position in range(size):
        centre = (position + 0.5) * len(values) / size
        offsets = (np.arange(len(values)) + 0.5 - centre) / scale
        weights = np.where(np.abs(offsets) < 3, np.sinc(offsets) * np.sinc(offsets / 3), 0)
        rows.append((weights[:, None] * values).sum(0) / weights.sum())
    return np.stack(rows)


@pytest.mark.parametrize(("size", "resolution"), [(40, 16), (37, 8), (8, 20)])
def test_resizing_does_not_alias(size: int, resolution: int) -> None:
    y, x = np.mgrid[:size, :size]
    values = np.round(127 + 60 * np.sin(x * y / 9.0) + 50 * ((x + y) % 2)).astype(np.uint8)
    found = np.asarray(fit(Image.fromarray(values), resolution, None)).astype(float)
    expected = lanczos(lanczos(values.astype(float), resolution).T, resolution).T
    np.testing.assert_allclose(found, np.clip(expected, 0, 255), atol=1.5)


def test_an_oblong_image_is_left_to_the_caller() -> None:
    assert fit(Image.new("L", (6, 4)), 2, None).size == (6, 4)
    assert fit(Image.new("L", (6, 4)), 2, "center-crop").size == (2, 2)


def test_parse_resolution() -> None:
    assert [parse_resolution(text) for text in ("32x32", "64", " 28X28 ")] == [32, 64, 28]
    assert parse_resolution("64x48") == (64, 48)
    for text in ("", "0", "0x0", "32x0", "-4", "32x", "a", "99999", "32x4097", "3.5", "٣"):
        with pytest.raises(InputError, match="resolution"):
            parse_resolution(text)


@pytest.mark.parametrize(
    ("resolution", "transform", "message"),
    [
        ((64, 48), None, "64x48 to be square.*center-crop-wide"),
        ((64, 48), "center-crop", "64x48 to be square"),
        ((48, 64), "center-crop-wide", "--resolution 64x48"),
        (None, "center-crop-wide", "got none"),
    ],
)
def test_results_are_square(resolution: Resolution | None, transform: Transform | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_resolution(resolution, transform)
    check_resolution(32, "center-crop-wide")
    check_resolution((64, 48), "center-crop-wide")
    check_resolution(32, None)
    check_resolution(None, "center-crop")


@pytest.mark.parametrize(
    ("width", "height", "box"),
    [  # 16:9 of each image, by hand
        (32, 18, (0, 0, 32, 18)),
        (40, 18, (4, 0, 36, 18)),
        (32, 40, (0, 11, 32, 29)),
        (41, 18, (4, 0, 36, 18)),
    ],
)
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_center_crop_wide_puts_the_central_part_between_bars(
    width: int, height: int, box: tuple[int, int, int, int], mode: str
) -> None:
    image = Image.fromarray(random_pixels(height, width, 3)).convert(mode)
    found = np.asarray(fit(image, (32, 18), "center-crop-wide"))
    assert found.shape[:2] == (32, 32)
    np.testing.assert_array_equal(found[7:25], np.asarray(image)[box[1] : box[3], box[0] : box[2]])
    assert not found[:7].any()
    assert not found[25:].any()


def test_center_crop_wide_scales_and_leaves_the_odd_row_below() -> None:
    found = np.asarray(fit(Image.new("L", (90, 50), 200), (16, 9), "center-crop-wide"))
    assert found.shape == (16, 16)
    assert (found[3:12] == 200).all()
    assert found.sum() == 200 * 9 * 16
    square = fit(Image.fromarray(random_pixels(20, 30)), 10, "center-crop-wide")
    expected = fit(Image.fromarray(random_pixels(20, 30)), 10, "center-crop")
    np.testing.assert_array_equal(np.asarray(square), np.asarray(expected))


def test_the_command_line_names_the_same_transforms() -> None:
    assert get_args(Transform) == TRANSFORMS


def png_file(head: bytes, raw: bytes) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")


def interlaced_png(values: NDArray[np.uint8]) -> bytes:
    """Writes grey 8 x 8 pixels in the seven passes of Adam7 (PNG specification, 8.2), which Pillow cannot write."""
    passes = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
    rows = [row for top, left, down, right in passes for row in values[top::down, left::right] if len(row)]
    raw = b"".join(b"\0" + row.tobytes() for row in rows)
    return png_file(struct.pack(">IIBBBBB", 8, 8, 8, 0, 0, 0, 1), raw)


def test_rarer_files_of_the_right_kind() -> None:
    grey = random_pixels(8, 8)
    np.testing.assert_array_equal(pixels(interlaced_png(grey), 1)[0], grey)
    bilevel = Image.fromarray((grey > 127).astype(np.uint8) * 255)
    np.testing.assert_array_equal(pixels(encode(bilevel.convert("1")), 1)[0], np.where(grey > 127, 255, 0))
    np.testing.assert_array_equal(pixels(encode(bilevel.convert("1"), "TIFF"), 1)[0], np.where(grey > 127, 255, 0))
    photo = Image.fromarray(np.full((16, 16, 3), [200, 60, 30], np.uint8))
    for options in ({"progressive": True}, {"quality": 100, "subsampling": 0}):
        np.testing.assert_allclose(pixels(encode(photo, "JPEG", **options))[:, 8, 8], [200, 60, 30], atol=2)
    np.testing.assert_allclose(pixels(encode(photo.convert("YCbCr"), "TIFF"))[:, 8, 8], [200, 60, 30], atol=2)
    still = Image.fromarray(np.array([[0, 1], [1, 0]], np.uint8))
    still.putpalette([9, 8, 7, 50, 60, 70])
    np.testing.assert_array_equal(pixels(encode(still, "GIF"))[:, 0, 1], [50, 60, 70])
    alpha = Image.fromarray(random_pixels(6, 6, 4))
    found = pixels(encode(alpha, "WEBP", lossless=True, exact=True))
    np.testing.assert_allclose(
        found.transpose(1, 2, 0), np.asarray(alpha)[..., :3] * (np.asarray(alpha)[..., 3:] / 255), atol=1
    )


def test_16_bits_of_colour_lose_the_lower_ones() -> None:
    values = np.array([[[0, 255, 256], [65535, 32768, 4660]]], np.uint16)
    raw = b"\0" + values.astype(">u2").tobytes()
    png = png_file(struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0), raw)
    np.testing.assert_array_equal(pixels(png).transpose(1, 2, 0), values >> 8)


def test_nothing_but_pixels_is_kept() -> None:
    exif = Image.Exif()
    exif[0x010F] = "a camera"
    photo = Image.fromarray(random_pixels(8, 8, 3))
    content = encode(photo, "JPEG", exif=exif, icc_profile=b"profile", dpi=(300, 300), comment=b"secret")
    assert {"exif", "icc_profile", "dpi", "comment"} <= set(Image.open(io.BytesIO(content)).info)
    for channels in (1, 3):
        png = encode_png(decode("x", content, channels))
        assert kinds(png) == [b"IHDR", b"IDAT", b"IEND"]


def kinds(png: bytes) -> list[bytes]:
    """Returns the types of a PNG's chunks."""
    position, found = 8, []
    while position < len(png):
        found.append(png[position + 4 : position + 8])
        position += 12 + int.from_bytes(png[position : position + 4], "big")
    return found
