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
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm")
MAX_PIXELS = 89_478_485  # Pillow's own limit, at which it merely warns
MAX_RESOLUTION = 4096

GREY_16_BIT_MODES = ("I;16", "I;16L", "I;16B", "I;16N", "I")  # "I": how older Pillows open 16-bit PNGs
GREY_MODES = ("1", "L", "LA", "La", *GREY_16_BIT_MODES)

Transform = Literal["center-crop"]


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
    return isinstance(content, np.ndarray) or open_image(name, content).mode in GREY_MODES


def decode(name: str, content: bytes | NDArray[np.uint8], num_channels: int) -> Image.Image:
    """Decodes to mode L (``num_channels`` 1) or RGB (3), upright by its EXIF orientation.

    Transparent parts are composited on black; 16-bit grey v becomes round(v / 257); palettes, CMYK and YCbCr
    become RGB.

    Raises:
        InputError: naming the image, if it is truncated, damaged, animated, too large, or of floating point.
    """
    if isinstance(content, np.ndarray):
        return Image.fromarray(content).convert("L" if num_channels == 1 else "RGB")
    image = open_image(name, content)
    try:
        grey = image.mode in GREY_MODES
        # Grey first becomes L and then RGB, so that both renditions of a grey image hold the same values.
        image = _to_8_bit(ImageOps.exif_transpose(image), "L" if grey else "RGB")
        return image.convert("L" if num_channels == 1 else "RGB")
    except Exception as error:  # as above: third-party decoders on damaged bytes
        raise InputError(f"{name}: cannot be decoded ({_reason(error)})") from error


def _to_8_bit(image: Image.Image, mode: Literal["L", "RGB"]) -> Image.Image:
    if image.mode in GREY_16_BIT_MODES:
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("pixel values outside 0..65535")
        transparent = image.info.get("transparency")
        if transparent is not None:
            values[values == transparent] = 0
        return Image.fromarray(((values + 128) // 257).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("floating-point pixels, expected 8 or 16 bits")
    if image.has_transparency_data:
        black = Image.new("RGBA", image.size, (0, 0, 0, 255))
        image = Image.alpha_composite(black, image.convert("RGBA"))
    return image.convert(mode)


def fit(image: Image.Image, resolution: int | None, transform: Transform | None) -> Image.Image:
    """Crops to the central square if asked, then resizes a square image to ``resolution``.

    An image that is still not square is returned as it is; the caller compares the sizes of all images.
    Resizing is Pillow's LANCZOS, whose filter widens with the factor, so that shrinking does not alias.
    """
    width, height = image.size
    if transform == "center-crop" and width != height:
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        image = image.crop((left, top, left + side, top + side))
    if resolution is not None and image.width == image.height != resolution:
        image = image.resize((resolution, resolution), Image.Resampling.LANCZOS)
    return image


def to_array(image: Image.Image) -> NDArray[np.uint8]:
    """Returns the pixels of an L or RGB image as (C, H, W) uint8."""
    pixels = np.asarray(image, dtype=np.uint8)
    return pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def parse_resolution(text: str) -> int:
    """Reads ``32x32`` or ``32``.

    Raises:
        InputError: if it is anything else, is not square, or is not in 1..4096.
    """
    match = re.fullmatch(r"(\d{1,5})(?:[xX](\d{1,5}))?", text.strip(), flags=re.ASCII)
    width, height = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if width != height or not 1 <= width <= MAX_RESOLUTION:
        raise InputError(f"Expected resolution={text!r} to be square, like 32x32, of at most {MAX_RESOLUTION}.")
    return width


def _reason(error: Exception) -> str:
    # A line of the message per image: an identification error's text repeats the bytes object's address.
    if isinstance(error, Image.UnidentifiedImageError):
        return "its format is not one of " + ", ".join(FORMATS)
    return (str(error).splitlines() or [type(error).__name__])[0]
