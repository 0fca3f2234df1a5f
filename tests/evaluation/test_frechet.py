"""The Frechet distance against closed forms, scipy's matrix root and torchmetrics."""

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance

from dpdm.errors import InputError
from dpdm.evaluation.frechet import Moments, feature_statistics, frechet_distance


def random_covariance(rng: np.random.Generator, dimension: int, rank: int) -> np.ndarray:
    factor = rng.normal(size=(dimension, rank))
    return factor @ factor.T / rank


def sqrtm_distance(mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray) -> float:
    root = scipy.linalg.sqrtm(sigma1 @ sigma2)
    return float(np.sum((mu1 - mu2) ** 2) + np.trace(sigma1 + sigma2) - 2 * np.trace(np.real(root)))


@given(seed=st.integers(0, 2**32 - 1), dimension=st.integers(1, 12))
@settings(max_examples=30, deadline=None)
def test_equals_scipys_matrix_root_and_is_symmetric(seed: int, dimension: int) -> None:
    rng = np.random.default_rng(seed)
    first = rng.normal(size=dimension), random_covariance(rng, dimension, dimension + 5)
    second = rng.normal(size=dimension), random_covariance(rng, dimension, dimension + 5)
    value = frechet_distance(*first, *second)
    assert value == pytest.approx(sqrtm_distance(*first, *second), rel=1e-6)
    assert value == pytest.approx(frechet_distance(*second, *first), rel=1e-6)


def test_closed_form_of_diagonal_gaussians() -> None:
    mu1, mu2 = np.array([0.0, 1.0, 2.0]), np.array([1.0, 1.0, -1.0])
    deviation1, deviation2 = np.array([1.0, 2.0, 0.5]), np.array([3.0, 2.0, 0.0])
    expected = np.sum((mu1 - mu2) ** 2) + np.sum((deviation1 - deviation2) ** 2)
    assert frechet_distance(mu1, np.diag(deviation1**2), mu2, np.diag(deviation2**2)) == pytest.approx(expected)


def test_equal_singular_gaussians_are_at_zero() -> None:
    sigma = random_covariance(np.random.default_rng(0), 20, 3)
    assert 0 <= frechet_distance(np.zeros(20), sigma, np.zeros(20), sigma) < 1e-6


def test_singular_gaussians_in_a_common_plane() -> None:
    # Both live in the first two dimensions, so the closed form of those is the answer.
    rotation, _ = np.linalg.qr(np.random.default_rng(1).normal(size=(6, 6)))
    sigma1 = rotation @ np.diag([4.0, 1.0, 0, 0, 0, 0]) @ rotation.T
    sigma2 = rotation @ np.diag([1.0, 9.0, 0, 0, 0, 0]) @ rotation.T
    assert frechet_distance(np.zeros(6), sigma1, np.zeros(6), sigma2) == pytest.approx(1 + 4, abs=1e-6)


def test_fewer_samples_than_dimensions_agrees_with_the_dual_form() -> None:
    rng = np.random.default_rng(2)
    a, b = rng.normal(size=(10, 40)), rng.normal(1.0, 2.0, size=(12, 40))
    (mu1, sigma1), (mu2, sigma2) = feature_statistics(a), feature_statistics(b)
    # tr (S1 S2)^(1/2) is the sum of the singular values of A B^T, with A, B centred and scaled by their rows.
    cross = ((a - mu1) / np.sqrt(9)) @ ((b - mu2) / np.sqrt(11)).T
    nuclear = np.linalg.svd(cross, compute_uv=False).sum()
    expected = np.sum((mu1 - mu2) ** 2) + np.trace(sigma1) + np.trace(sigma2) - 2 * nuclear
    assert frechet_distance(mu1, sigma1, mu2, sigma2) == pytest.approx(expected, rel=1e-6)


class FlatPixels(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1).double() / 255


def test_equals_torchmetrics_with_a_custom_extractor() -> None:
    rng = np.random.default_rng(3)
    real = rng.integers(0, 256, (80, 3, 3, 3)).astype(np.uint8)
    fake = rng.integers(0, 200, (90, 3, 3, 3)).astype(np.uint8)
    metric = FrechetInceptionDistance(feature=FlatPixels(), input_img_size=(3, 3, 3)).set_dtype(torch.float64)
    metric.update(torch.from_numpy(real), real=True)
    metric.update(torch.from_numpy(fake), real=False)
    ours = frechet_distance(
        *feature_statistics(real.reshape(80, -1) / 255), *feature_statistics(fake.reshape(90, -1) / 255)
    )
    assert ours == pytest.approx(float(metric.compute()), rel=1e-6)


def test_statistics_equal_numpys() -> None:
    features = np.random.default_rng(4).normal(size=(50, 7)).astype(np.float32)
    mu, sigma = feature_statistics(features)
    np.testing.assert_allclose(mu, features.astype(np.float64).mean(axis=0))
    np.testing.assert_allclose(sigma, np.cov(features.astype(np.float64), rowvar=False))


@given(seed=st.integers(0, 2**32 - 1), cuts=st.lists(st.integers(0, 40), min_size=1, max_size=4))
@settings(max_examples=30, deadline=None)
def test_moments_of_parts_merge_into_those_of_the_whole(seed: int, cuts: list[int]) -> None:
    # A mean of 1e6 beside a spread of 1: sums of squares would lose all but four digits of the covariance.
    features = np.random.default_rng(seed).normal(1e6, 1.0, size=(40, 3))
    merged = Moments.of(features[:0])
    for part in np.split(features, sorted(cuts)):
        merged = merged.merged(Moments.of(part))
    mu, sigma = merged.gaussian()
    np.testing.assert_allclose(mu, features.mean(axis=0), rtol=1e-14)
    np.testing.assert_allclose(sigma, np.cov(features - 1e6, rowvar=False), rtol=1e-8, atol=1e-9)


def test_refuses_what_is_no_gaussian() -> None:
    zero, one = np.zeros(2), np.eye(2)
    with pytest.raises(InputError, match="at least two images"):
        feature_statistics(np.ones((1, 3)))
    with pytest.raises(InputError, match="got 1 values"):
        feature_statistics(np.array([[1.0, np.nan], [0.0, 1.0]]))
    with pytest.raises(InputError, match="one feature extractor for both"):
        frechet_distance(zero, one, np.zeros(3), np.eye(3))
    with pytest.raises(InputError, match="asymmetric"):
        frechet_distance(zero, np.array([[1.0, 0.5], [0.0, 1.0]]), zero, one)
