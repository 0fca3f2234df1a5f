"""From any image file to square 8-bit pixels, one record at a time.

Nothing here looks at more than one image: what becomes of a record never depends on another one.
"""

import io
import re
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from dpdm.errors import InputError

# Only these decoders are ever given a user's bytes; Pillow's others are rarer and less tested.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm")
MAX_PIXELS = 89_478_485  # Pillow's own limit, at which it merely warns
MAX_RESOLUTION = 4096
MIN_GREY_BITS, MAX_GREY_BITS = 9, 16

BITS_PER_SAMPLE, PHOTOMETRIC, SAMPLE_FORMAT = 258, 262, 339  # TIFF's tags
WHITE_IS_ZERO, SIGNED = 0, (2,)
GREY_16_BIT_MODES = ("I;16", "I;16L", "I;16B", "I;16N", "I")  # "I": how older Pillows open 16-bit PNGs
GREY_MODES = ("1", "L", "LA", "La", *GREY_16_BIT_MODES)

Transform = Literal["center-crop", "center-crop-wide"]
Resolution = int | tuple[int, int]  # side of a square, or (width, height), which center-crop-wide alone takes


def open_image(name: str, content: bytes) -> Image.Image:
    """Reads the header of an image file; the pixels are not decoded yet.

    Raises:
        InputError: naming the image, if it is none, is animated, or is larger than ``MAX_PIXELS``.
    """
    try:
        image = Image.open(io.BytesIO(content), formats=FORMATS)
        # An MPO file is a phone's JPEG with a second view behind it: its first image is the photo.
        animated = getattr(image, "is_animated", False) and image.format != "MPO"
    except Exception as error:
        # Damaged bytes make Pillow's decoders raise nearly anything (SyntaxError and struct.error included).
        raise InputError(f"{name}: not a readable image ({_reason(error)})") from error
    if not 1 <= image.width * image.height <= MAX_PIXELS:
        raise InputError(f"{name}: {image.width}x{image.height}, expected 1 to {MAX_PIXELS} pixels")
    if animated:
        raise InputError(f"{name}: has several frames, expected a single still image")
    return image


def load_pixels(name: str, image: Image.Image) -> Image.Image:
    """Decodes an opened image as it is.

    Raises:
        InputError: naming the image, if it is truncated or damaged.
    """
    try:
        image.load()
    except Exception as error:  # as above
        raise InputError(f"{name}: cannot be decoded ({_reason(error)})") from error
    return image


def is_grey(name: str, content: bytes | NDArray[np.uint8]) -> bool:
    """Whether the image's *format* is grey (its pixels are not looked at: a grey photo in RGB is colour)."""
    if isinstance(content, np.ndarray):
        return content.ndim == 2
    return open_image(name, content).mode in GREY_MODES


def decode(
    name: str, content: bytes | NDArray[np.uint8], num_channels: int, *, grey_bits: int = MAX_GREY_BITS
) -> Image.Image:
    """Decodes to mode L (``num_channels`` 1) or RGB (3), upright by its EXIF orientation.

    Transparent parts are composited on black. 16-bit grey v becomes round(v 255 / (2^b - 1)), where b, ``grey_bits``,
    is how many bits a scanner uses of 16; so does 12-bit grey, whose b is 12 whatever is asked. Of 16-bit RGB Pillow
    keeps the upper 8 bits. Palettes, CMYK and YCbCr become RGB, without regard to colour profiles. What the file says
    beside the pixels is left behind.

    Raises:
        InputError: naming the image, if it is truncated, damaged, animated, too large, or of floating-point or signed
            pixels, or brighter than ``grey_bits`` can say.
    """
    if isinstance(content, np.ndarray):
        return Image.fromarray(content).convert("L" if num_channels == 1 else "RGB")
    image = open_image(name, content)
    try:
        grey = image.mode in GREY_MODES
        # Grey first becomes L and then RGB, so that both renditions of a grey image hold the same values.
        image = _to_8_bit(_upright(image), "L" if grey else "RGB", grey_bits)
        image = _convert(image, "L" if num_channels == 1 else "RGB")
        image.info.clear()  # a place, a date, a camera's number: Pillow would save some of it with the pixels
        return image
    except Exception as error:  # as above: third-party decoders on damaged bytes
        raise InputError(f"{name}: cannot be decoded ({_reason(error)})") from error


def _upright(image: Image.Image) -> Image.Image:
    ImageOps.exif_transpose(image, in_place=True)  # not in place it would copy every image that is upright already
    return image


def _to_8_bit(image: Image.Image, mode: Literal["L", "RGB"], grey_bits: int) -> Image.Image:
    tags = getattr(image, "tag_v2", {}) if image.format == "TIFF" else {}
    if tags.get(BITS_PER_SAMPLE) == (32,) and image.mode == "I":
        raise ValueError("32-bit pixels, expected 8 or 16 bits")
    if tags.get(SAMPLE_FORMAT) == SIGNED:  # what stands for black is not said
        raise ValueError("signed pixels, expected 8 or 16 bits without a sign")
    if image.mode in GREY_16_BIT_MODES:
        values = np.asarray(image).astype(np.int32)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("pixel values outside 0..65535")
        transparent = image.info.get("transparency")
        if transparent is not None:
            values[values == transparent] = 0
        white = 2 ** (12 if tags.get(BITS_PER_SAMPLE) == (12,) else grey_bits) - 1
        if values.max() > white:
            raise ValueError(f"a pixel of {values.max()}, expected at most {white} by --grey-bits {grey_bits}")
        if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO:  # as X-rays are; Pillow turns those of 8 bits alone
            values = white - values
        return Image.fromarray(((2 * 255 * values + white) // (2 * white)).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("floating-point pixels, expected 8 or 16 bits")
    if image.has_transparency_data:
        black = Image.new("RGBA", image.size, (0, 0, 0, 255))
        image = Image.alpha_composite(black, _convert(image, "RGBA"))
    return _convert(image, mode)


def _convert(image: Image.Image, mode: Literal["L", "RGB", "RGBA"]) -> Image.Image:
    return image if image.mode == mode else image.convert(mode)  # which would copy it


def fit(image: Image.Image, resolution: Resolution | None, transform: Transform | None) -> Image.Image:
    """Crops to the central part if asked, then resizes.

    ``center-crop`` takes the central square. ``center-crop-wide`` takes the largest central part of shape
    width:height, scales it to width x height and puts it between black bars of equal height (one row more below if
    they are odd) into a square of width x width. Without a transform an image that is not square is returned as it
    is; the caller compares the sizes of all images.

    Resizing is Pillow's LANCZOS, whose filter widens with the factor, so that shrinking does not alias.
    """
    if transform == "center-crop-wide":
        width, height = _sides(resolution or image.width)
        image = _resize(_central(image, width, height), width, height)
        square = Image.new(image.mode, (width, width))
        square.paste(image, (0, (width - height) // 2))
        return square
    if transform == "center-crop":
        image = _central(image, 1, 1)
    if isinstance(resolution, int) and image.width == image.height:
        image = _resize(image, resolution, resolution)
    return image


def _sides(resolution: Resolution) -> tuple[int, int]:
    return (resolution, resolution) if isinstance(resolution, int) else resolution


def _central(image: Image.Image, width: int, height: int) -> Image.Image:
    """Cuts out the largest central part whose sides are as width to height, to the nearest pixel."""
    across = min(image.width, max(1, (2 * image.height * width + height) // (2 * height)))
    down = min(image.height, max(1, (2 * image.width * height + width) // (2 * width)))
    if (across, down) == image.size:
        return image
    left, top = (image.width - across) // 2, (image.height - down) // 2
    return image.crop((left, top, left + across, top + down))


def _resize(image: Image.Image, width: int, height: int) -> Image.Image:
    return image if image.size == (width, height) else image.resize((width, height), Image.Resampling.LANCZOS)


def to_array(image: Image.Image) -> NDArray[np.uint8]:
    """Returns the pixels of an L or RGB image as (C, H, W) uint8."""
    pixels = np.asarray(image, dtype=np.uint8)
    return pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def parse_resolution(text: str) -> Resolution:
    """Reads ``32x32`` or ``32`` as 32, and ``64x48``, width x height, as (64, 48).

    Raises:
        InputError: if it is anything else, or is not in 1..4096.
    """
    match = re.fullmatch(r"(\d{1,5})(?:[xX](\d{1,5}))?", text.strip(), flags=re.ASCII)
    width, height = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not (1 <= width <= MAX_RESOLUTION and 1 <= height <= MAX_RESOLUTION):
        raise InputError(f"Expected resolution={text!r} to be WIDTHxHEIGHT, like 32x32, of at most {MAX_RESOLUTION}.")
    return width if width == height else (width, height)


def check_grey_bits(grey_bits: int) -> None:
    """Raises InputError for bits that no 16-bit image has."""
    if not MIN_GREY_BITS <= grey_bits <= MAX_GREY_BITS:
        raise InputError(
            f"Expected --grey-bits from {MIN_GREY_BITS} to {MAX_GREY_BITS}, got {grey_bits}: a scanner's are often 12."
        )


def check_resolution(resolution: Resolution | None, transform: Transform | None) -> None:
    """Raises InputError unless every image becomes a square by these two."""
    if transform == "center-crop-wide" and resolution is None:
        raise InputError("Expected resolution with center-crop-wide, got none: give --resolution 64x48, say.")
    width, height = _sides(resolution or 1)
    if transform == "center-crop-wide" and width < height:
        raise InputError(
            f"Expected width >= height with center-crop-wide, got resolution={width}x{height}: give "
            f"--resolution {height}x{width}."
        )
    if transform != "center-crop-wide" and width != height:
        raise InputError(
            f"Expected resolution={width}x{height} to be square: give --resolution {width}x{width}, or "
            "--transform center-crop-wide."
        )


def _reason(error: Exception) -> str:
    # A line of the message per image: an identification error's text repeats the bytes object's address.
    if isinstance(error, Image.UnidentifiedImageError):
        return "its format is not one of " + ", ".join(FORMATS)
    return (str(error).splitlines() or [type(error).__name__])[0]
