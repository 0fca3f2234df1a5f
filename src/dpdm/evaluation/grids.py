"""Many small images as one picture, and pictures as text inside a page."""

import base64
import io

import numpy as np
from PIL import Image

from dpdm.errors import InputError

GAP = 2  # pixels of white between images, after scaling
JPEG_QUALITIES = (92, 80, 65, 50, 35, 20)


def check_images(name: str, images: np.ndarray) -> None:
    """Raises ``InputError`` unless images are (n, 1 or 3, H, W) uint8 with n >= 1."""
    if images.ndim != 4 or images.dtype != np.uint8 or images.size == 0 or images.shape[1] not in (1, 3):
        raise InputError(
            f"Expected {name} (n >= 1, 1 or 3, H, W) uint8, got {images.shape} {images.dtype}: "
            "pass grey or colour pixels from 0 to 255."
        )


def image_grid(images: np.ndarray, columns: int, scale: int) -> Image.Image:
    """Lays images out row by row, each pixel drawn as a square so that 8x8 images can be seen.

    Args:
        images: (n, C, H, W) uint8, n >= 1, C 1 or 3.
        columns: images per row, at least 1; fewer images make a narrower picture.
        scale: side of one pixel's square, at least 1.

    Returns:
        A picture of mode L or RGB, white where there is no image.

    Raises:
        InputError: if shape, type, ``columns`` or ``scale`` is wrong.
    """
    check_images("images", images)
    if columns < 1 or scale < 1:
        raise InputError(f"Expected columns >= 1 and scale >= 1, got {columns} and {scale}: use 10 and 4, say.")
    n, channels, height, width = images.shape
    columns = min(columns, n)
    rows = -(-n // columns)
    cell_height, cell_width = height * scale + GAP, width * scale + GAP
    canvas = np.full((rows * cell_height - GAP, columns * cell_width - GAP, channels), 255, dtype=np.uint8)
    for i, image in enumerate(images):
        top, left = i // columns * cell_height, i % columns * cell_width
        enlarged = image.transpose(1, 2, 0).repeat(scale, axis=0).repeat(scale, axis=1)
        canvas[top : top + height * scale, left : left + width * scale] = enlarged
    return Image.fromarray(canvas[:, :, 0] if channels == 1 else canvas)


def thumbnails(images: np.ndarray, max_side: int) -> np.ndarray:
    """Returns images averaged down so that no side is longer than ``max_side``; smaller ones unchanged."""
    check_images("images", images)
    height, width = images.shape[2:]
    if max(height, width) <= max_side:
        return images
    factor = max_side / max(height, width)
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    small = [
        np.stack([np.asarray(Image.fromarray(channel).resize(size, Image.Resampling.BOX)) for channel in image])
        for image in images
    ]
    return np.stack(small)


def data_uri(image: Image.Image, max_bytes: int) -> str:
    """Returns a picture as a ``data:`` address: PNG, or JPEG if the PNG has more than ``max_bytes``.

    A page with everything inside must stay small enough to mail; photographs do not fit as PNG. The
    lowest JPEG quality is taken even if it does not fit.
    """
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    if buffer.tell() <= max_bytes:
        return _encode("png", buffer)
    for quality in JPEG_QUALITIES:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=quality)
        if buffer.tell() <= max_bytes:
            break
    return _encode("jpeg", buffer)


def _encode(kind: str, buffer: io.BytesIO) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
