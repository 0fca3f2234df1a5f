"""Grids pixel by pixel, thumbnails as block means, pictures that fit their budget."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

from dpdm.errors import InputError
from dpdm.evaluation.grids import GAP, data_uri, image_grid, thumbnails


@pytest.mark.parametrize("channels", [1, 3])
def test_every_pixel_becomes_a_square_at_its_place(channels: int) -> None:
    images = np.random.default_rng(0).integers(0, 255, (5, channels, 3, 4)).astype(np.uint8)
    grid = image_grid(images, columns=3, scale=2)
    assert grid.mode == ("L" if channels == 1 else "RGB")
    assert grid.size == (3 * 8 + 2 * GAP, 2 * 6 + GAP)
    pixels = np.asarray(grid).reshape(grid.height, grid.width, channels)
    for i, c, y, x in np.ndindex(5, channels, 3, 4):
        top, left = i // 3 * (6 + GAP) + 2 * y, i % 3 * (8 + GAP) + 2 * x
        assert (pixels[top : top + 2, left : left + 2, c] == images[i, c, y, x]).all()
    assert (pixels[6 + GAP :, 2 * (8 + GAP) :] == 255).all()  # the sixth place is empty


def test_fewer_images_than_columns_make_a_narrow_grid() -> None:
    assert image_grid(np.zeros((2, 1, 8, 8), np.uint8), columns=10, scale=1).size == (16 + GAP, 8)


def test_thumbnails_are_means_of_blocks_and_small_images_stay() -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 128, 64)).astype(np.uint8)
    small = thumbnails(images, 64)
    assert small.shape == (2, 3, 64, 32)
    means = images.reshape(2, 3, 64, 2, 32, 2).mean(axis=(3, 5))
    assert np.abs(small - means).max() <= 1
    assert thumbnails(images, 128) is images


def test_data_addresses_are_png_when_it_fits_and_jpeg_when_not() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8))
    exact = base64.b64decode(data_uri(image, 100_000).removeprefix("data:image/png;base64,"))
    assert Image.open(io.BytesIO(exact)).tobytes() == image.tobytes()
    smaller = base64.b64decode(data_uri(image, 5_000).removeprefix("data:image/jpeg;base64,"))
    assert len(smaller) <= 5_000
    assert Image.open(io.BytesIO(smaller)).size == (64, 64)


def test_refuses_what_is_no_picture() -> None:
    images = np.zeros((2, 1, 8, 8), np.uint8)
    for wrong in (images[:0], images[0], images.astype(np.float32), np.zeros((2, 4, 8, 8), np.uint8)):
        with pytest.raises(InputError, match="uint8"):
            image_grid(wrong, 1, 1)
    with pytest.raises(InputError, match="columns >= 1"):
        image_grid(images, 0, 1)
