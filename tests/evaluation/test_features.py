"""Extractors on real digits, and the within-class variance against a loop."""

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from dpdm.errors import InputError
from dpdm.evaluation.features import (
    CLASSIFIER_NAME,
    Extractor,
    extract,
    pixel_extractor,
    train_feature_extractor,
    within_class_variance,
)
from dpdm.evaluation.frechet import feature_statistics, frechet_distance


@pytest.fixture(scope="module")
def digits() -> tuple[np.ndarray, np.ndarray]:
    bunch: Any = load_digits()
    return (bunch.images / 16 * 255).astype(np.uint8)[:, None], bunch.target


@pytest.fixture(scope="module")
def extractor(digits: tuple[np.ndarray, np.ndarray]) -> Extractor:
    images, labels = digits
    return train_feature_extractor(images[::2], labels[::2], num_classes=10)


def test_features_separate_classes_they_were_not_trained_on(
    digits: tuple[np.ndarray, np.ndarray], extractor: Extractor
) -> None:
    images, labels = digits
    known, new = extract(extractor, images[::2]), extract(extractor, images[1::2])
    assert new.shape == (len(images[1::2]), 64)
    assert new.dtype == np.float64
    assert extractor.name == CLASSIFIER_NAME
    centres = np.stack([known[labels[::2] == c].mean(axis=0) for c in range(10)])
    nearest = ((new[:, None] - centres) ** 2).sum(axis=2).argmin(axis=1)
    assert np.mean(nearest == labels[1::2]) > 0.93


def test_distance_orders_real_blurred_and_noise(digits: tuple[np.ndarray, np.ndarray], extractor: Extractor) -> None:
    images, labels = digits
    real = feature_statistics(extract(extractor, images[::2]))
    means = np.stack([images[labels == c].mean(axis=0) for c in labels[1::2]]).astype(np.uint8)
    noise = np.random.default_rng(0).integers(0, 256, images[1::2].shape).astype(np.uint8)
    held_out, averaged, random = (
        frechet_distance(*real, *feature_statistics(extract(extractor, x))) for x in (images[1::2], means, noise)
    )
    assert held_out < averaged / 3 < random / 3


def test_the_seed_alone_decides_and_the_global_state_stays(digits: tuple[np.ndarray, np.ndarray]) -> None:
    images, labels = digits[0][:200], digits[1][:200]
    torch.manual_seed(1)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    first = extract(train_feature_extractor(images, labels, num_classes=10, seed=3), images)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads
    torch.manual_seed(2)
    again = extract(train_feature_extractor(images, labels, num_classes=10, seed=3), images)
    other = extract(train_feature_extractor(images, labels, num_classes=10, seed=4), images)
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other)


@pytest.mark.parametrize("shape", [(5, 3, 1, 1), (5, 1, 3, 3), (5, 3, 96, 96)])
def test_any_size_of_image_is_taken(shape: tuple[int, ...]) -> None:
    images = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    trained = train_feature_extractor(images, np.array([0, 1, 0, 1, 0]), num_classes=2)
    assert extract(trained, images).shape == (5, 64)


def test_pixels_are_averages_of_blocks() -> None:
    images = np.random.default_rng(0).integers(0, 256, (1500, 3, 32, 32)).astype(np.uint8)  # more than one chunk
    pixels = pixel_extractor(32, 3)
    blocks = images.reshape(1500, 3, 8, 4, 8, 4).mean(axis=(3, 5)).reshape(1500, -1) / 255
    np.testing.assert_allclose(extract(pixels, images), blocks, atol=1e-6)
    assert pixels.name == "pixels averaged to 8x8"
    assert pixel_extractor(5, 1).dimension == 25


def test_within_class_variance_equals_a_loop_over_pixels() -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (1300, 2, 3, 3)).astype(np.uint8)
    labels = np.r_[np.zeros(1200, int), rng.integers(1, 4, 99), 9]  # a class of more than one chunk, a class of one
    images[labels == 0] //= 4
    expected = sum(
        np.sum(labels == c)
        * np.mean([np.var(images[labels == c][:, i, j, k] / 255) for i, j, k in np.ndindex(2, 3, 3)])
        for c in np.unique(labels)
    ) / (1300 - 5)
    assert within_class_variance(images, labels) == pytest.approx(expected, rel=1e-12)
    assert within_class_variance(images) == pytest.approx(np.var(images / 255, axis=0, ddof=1).mean(), rel=1e-12)


def test_few_images_do_not_look_more_alike_than_many() -> None:
    rng = np.random.default_rng(1)
    images, labels = rng.integers(0, 256, (4000, 1, 4, 4)).astype(np.uint8), np.arange(4000) % 10
    few = [within_class_variance(images[i : i + 20], labels[i : i + 20]) for i in range(0, 4000, 20)]
    assert np.mean(few) == pytest.approx(within_class_variance(images, labels), rel=0.02)
    assert within_class_variance(images[:10], labels[:10]) == 0


def test_images_that_are_all_class_means_have_no_variance() -> None:
    images = np.repeat(np.arange(3, dtype=np.uint8), 5).reshape(15, 1, 1, 1) * np.uint8(100)
    assert within_class_variance(images, np.repeat(np.arange(3), 5)) == 0
    assert within_class_variance(images) > 0.1


def test_refuses_images_and_labels_that_do_not_fit(extractor: Extractor) -> None:
    images, labels = np.zeros((4, 1, 8, 8), np.uint8), np.arange(4)
    with pytest.raises(InputError, match="uint8"):
        extract(extractor, images.astype(np.float32))
    with pytest.raises(InputError, match="one size"):
        extract(extractor, np.zeros((4, 1, 9, 9), np.uint8))
    with pytest.raises(InputError, match="number the classes from 0"):
        train_feature_extractor(images, labels + 7, num_classes=10)
    with pytest.raises(InputError, match="num_classes >= 2"):
        train_feature_extractor(images, labels * 0, num_classes=1)
    with pytest.raises(InputError, match="one class number per image"):
        within_class_variance(images, labels[:3])
    with pytest.raises(InputError, match="resolution >= 1"):
        pixel_extractor(0, 1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_trains_and_extracts_on_a_gpu(digits: tuple[np.ndarray, np.ndarray]) -> None:
    images, labels = digits
    on_gpu = train_feature_extractor(images[::2], labels[::2], num_classes=10, device="cuda")
    distance = frechet_distance(
        *feature_statistics(extract(on_gpu, images[::2])), *feature_statistics(extract(on_gpu, images[1::2]))
    )
    assert 0 < distance < 5
