"""The Frechet distance between two sets of features, each summarised as a Gaussian."""

from dataclasses import dataclass
from typing import Self

import numpy as np

from dpdm.errors import InputError

# Rounding stays far below this; a covariance that differs from its transpose by more was built wrongly.
SYMMETRY_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Moments:
    """What a Gaussian needs to know of features, in float64; moments of parts merge into those of the whole.

    The covariances of parts do not: their mean lacks the spread between the parts' means.

    Attributes:
        count: number N >= 0 of rows.
        mean: (D,), zeros for no rows.
        scatter: (D, D), sum of (x - mean)(x - mean)^T.
    """

    count: int
    mean: np.ndarray
    scatter: np.ndarray

    @classmethod
    def of(cls, features: np.ndarray) -> Self:
        """Returns the moments of (N, D) features.

        Raises:
            InputError: if the shape is another, or a value is not finite.
        """
        features = np.asarray(features, dtype=np.float64)
        if features.ndim != 2:
            raise InputError(f"Expected features of shape (N, D), got {features.shape}: give one row per image.")
        _check_finite("features", features)
        mean = features.mean(axis=0) if len(features) else np.zeros(features.shape[1])
        centred = features - mean
        return cls(len(features), mean, centred.T @ centred)

    def merged(self, other: Self) -> Self:
        """Returns the moments of both sets of rows together.

        n = n_a + n_b, d = mean_b - mean_a, mean = mean_a + d n_b / n, S = S_a + S_b + d d^T n_a n_b / n: Chan,
        Golub and LeVeque 1979. Sums of squares, from which a large mean would have to be taken away again, are
        never formed.
        """
        count = self.count + other.count
        if count == 0:
            return self
        difference = other.mean - self.mean
        mean = self.mean + difference * (other.count / count)
        between = np.outer(difference, difference) * (self.count * other.count / count)
        return type(self)(count, mean, self.scatter + other.scatter + between)

    def gaussian(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns the mean (D,) and the unbiased covariance (D, D).

        Raises:
            InputError: if there are fewer than 2 rows.
        """
        if self.count < 2:
            raise InputError(
                f"Expected features of shape (N >= 2, D), got {(self.count, len(self.mean))}: a covariance needs at "
                "least two images."
            )
        return self.mean, self.scatter / (self.count - 1)


def feature_statistics(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the mean and the unbiased covariance of features, in float64.

    Args:
        features: (N, D) finite numbers, N >= 2. N < D is allowed: the covariance is then singular.

    Returns:
        (D,) and (D, D).

    Raises:
        InputError: if there are fewer than 2 rows, or a value is not finite.
    """
    return Moments.of(features).gaussian()


def frechet_distance(mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray) -> float:
    """Returns the squared Frechet (2-Wasserstein) distance between two Gaussians.

    |mu1 - mu2|^2 + tr(S1) + tr(S2) - 2 tr((S1^(1/2) S2 S1^(1/2))^(1/2)), Dowson and Landau 1982; with
    Inception features it is the FID of Heusel et al. 2017, arXiv 1706.08500. The product is symmetric and
    positive, so its eigenvalues are real and singular covariances need no added diagonal.

    Args:
        mu1, mu2: (D,).
        sigma1, sigma2: (D, D), symmetric and positive semi-definite.

    Returns:
        A number >= 0, in squared units of the features; 0 for equal Gaussians.

    Raises:
        InputError: if shapes do not fit, a value is not finite, or a covariance is not symmetric.
    """
    mu1, mu2 = np.asarray(mu1, dtype=np.float64), np.asarray(mu2, dtype=np.float64)
    sigma1, sigma2 = np.asarray(sigma1, dtype=np.float64), np.asarray(sigma2, dtype=np.float64)
    check_gaussian("1", mu1, sigma1)
    check_gaussian("2", mu2, sigma2)
    if mu1.shape != mu2.shape:
        raise InputError(
            f"Expected mu1 and mu2 of one shape, got {mu1.shape} and {mu2.shape}: use one feature extractor for both."
        )
    eigenvalues, vectors = np.linalg.eigh(sigma1)
    root = (vectors * np.sqrt(np.maximum(eigenvalues, 0))) @ vectors.T
    product = root @ sigma2 @ root
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh((product + product.T) / 2), 0)).sum()
    distance = np.sum((mu1 - mu2) ** 2) + np.trace(sigma1) + np.trace(sigma2) - 2 * cross
    # Rounding may leave equal Gaussians a hair below zero.
    return max(0.0, float(distance))


def check_gaussian(which: str, mu: np.ndarray, sigma: np.ndarray) -> None:
    """Raises InputError unless mu is (D,) and sigma (D, D), symmetric, and both are finite."""
    if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
        raise InputError(
            f"Expected mu{which} (D,) and sigma{which} (D, D), got {mu.shape} and {sigma.shape}: "
            "compute both with feature_statistics."
        )
    _check_finite(f"mu{which}", mu)
    _check_finite(f"sigma{which}", sigma)
    scale = float(np.abs(sigma).max(initial=0.0))
    if float(np.abs(sigma - sigma.T).max(initial=0.0)) > SYMMETRY_TOLERANCE * scale:
        raise InputError(
            f"Expected sigma{which} to equal its transpose, got an asymmetric matrix: "
            "compute it with feature_statistics."
        )


def _check_finite(name: str, values: np.ndarray) -> None:
    bad = int(np.size(values) - np.isfinite(values).sum())
    if bad:
        raise InputError(
            f"Expected finite {name}, got {bad} values that are not: look for images that the extractor cannot read."
        )
