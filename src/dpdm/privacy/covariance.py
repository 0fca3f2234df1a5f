"""Central covariances: how the images of each class differ from its noisy mean, by few frequencies, bought once.

With the noisy means they make a Gaussian model of each class, whose samples show a model in warm-up the directions in
which images vary, where means alone show one image. The release is DP-PCA's (Dwork, Talwar, Thakurta, Zhang 2014,
"Analyze Gauss"): a sum of squares with symmetric Gaussian noise.
"""

import math
from collections.abc import Iterable

import numpy as np

from dpdm.errors import InputError
from dpdm.privacy.discrete import secure_gaussian

# Vectors are scaled to norm 1 - MARGIN and rounded towards zero to multiples of 1 / UNIT. So sums of their products
# are sums of integers below 2^30 times LARGEST_DATASET records = 2^52: float64 computes them exactly, in any order.
UNIT = 2.0**15
LARGEST_DATASET = 2**22
LARGEST_SIZE = 2**22  # numbers in all matrices together
# Multiplying a sum by sqrt(2) rounds it by at most 2^-53 of itself. For two neighbouring sums over LARGEST_DATASET
# records, of LARGEST_SIZE numbers, that is below 2 * 2^22 * 2^-53 * 2^11 < 2e-6 in L2 norm; 1 - (1 - MARGIN)^2 pays it.
MARGIN = 1.1e-6


def check_size(num_classes: int, size: int, *, cells: bool = False) -> None:
    """Raises InputError if the covariances of classes, or cells, of vectors of ``size`` numbers are too many to sum."""
    if (total := num_classes * num_entries(size)) > LARGEST_SIZE:
        what, key = ("cells", "train.warmup.splits or ") if cells else ("covariances", "")
        raise InputError(
            f"Expected at most {LARGEST_SIZE} numbers in all central {what}, got {total}: lower "
            f"{key}train.warmup.covariance_side."
        )


def noisy_class_covariances(
    pieces: Iterable[np.ndarray],
    labels: np.ndarray | None,
    *,
    dataset_size: int,
    num_classes: int,
    clipping_norm: float,
    noise_multiplier: float,
    key: bytes,
    class_sizes: np.ndarray,
) -> np.ndarray:
    """Returns, for each class, a noisy sum of r r^T over its records' vectors r, divided by the class's size.

    Each r is clipped to norm C_r. Gaussian noise of standard deviation noise_multiplier C_r^2 is added to every entry
    on the diagonal, and 1 / sqrt(2) of that to every pair of equal entries beside it.

    Guarantee: one record, added or removed, adds or removes the matrix r r^T of one class, whose Frobenius norm is
    ||r||^2 <= C_r^2. That is the L2 norm of the vector of all classes' upper triangles with the entries beside the
    diagonal times sqrt(2), to which ``secure_gaussian`` adds noise of noise_multiplier C_r^2 in every coordinate: one
    full-batch Gaussian mechanism, whatever the number of classes. Realised class sizes never enter: ``class_sizes`` are
    public, or were released before. Sums are exact integers and do not depend on order; MARGIN pays for the factor's
    rounding. What r is measured from must not depend on other records but through what was released before.

    Args:
        pieces: of (n, D) float64, in record order, N rows in all.
        labels: (N,) in [0, num_classes), or None for a single class.
        dataset_size: N, public.
        num_classes: at least 1.
        clipping_norm: C_r > 0.
        noise_multiplier: noise standard deviation / C_r^2.
        key: of this purpose alone.
        class_sizes: (num_classes,), above 0.

    Returns:
        (num_classes, D, D) float64, symmetric; with noise it may have negative eigenvalues.

    Raises:
        InputError: for more records or numbers than the sums are exact for.
    """
    if dataset_size > LARGEST_DATASET:
        raise InputError(
            f"Expected at most {LARGEST_DATASET} images for central covariances, got {dataset_size}: set "
            "train.warmup.covariance_noise_multiplier=null, and train.warmup.splits=0 with its noise multiplier null."
        )
    sums: np.ndarray | None = None
    start = 0
    for piece in pieces:
        if sums is None:
            check_size(num_classes, piece.shape[1])
            sums = np.zeros((num_classes, piece.shape[1], piece.shape[1]))
        norms = np.sqrt(np.square(piece).sum(axis=1))
        scale = (1 - MARGIN) / np.maximum(norms, clipping_norm)
        rows = np.trunc(piece * scale[:, None] * UNIT)
        classes = np.zeros(len(piece), np.int64) if labels is None else labels[start : start + len(piece)]
        for label in np.unique(classes):
            of_class = rows[classes == label]
            sums[label] += of_class.T @ of_class
        start += len(piece)
    if sums is None or start != dataset_size:
        raise ValueError(f"Expected {dataset_size} images, got {start}.")
    upper = np.triu_indices(sums.shape[1])
    factor = np.where(upper[0] == upper[1], 1.0, math.sqrt(2))
    flat = (sums[:, *upper] * factor).ravel() / UNIT**2
    noisy = secure_gaussian(flat, sensitivity=1.0, noise_multiplier=noise_multiplier, key=key)
    found = np.zeros_like(sums)
    found[:, *upper] = noisy.reshape(num_classes, -1) / factor
    found[:, upper[1], upper[0]] = found[:, *upper]
    return found * (clipping_norm**2 / class_sizes)[:, None, None]


def num_entries(size: int) -> int:
    """Returns how many different numbers a symmetric (size, size) matrix has."""
    return size * (size + 1) // 2


def principal_factors(covariances: np.ndarray, noise: np.ndarray, rank: int) -> np.ndarray:
    """Returns factors F with F F^T near the covariances, made of the directions that stand out from the noise.

    Symmetric noise of standard deviation s beside the diagonal has eigenvalues up to 2 s sqrt(D); a true eigenvalue l
    > s sqrt(D) shows as l + s^2 D / l (Capitaine, Donati-Martin, Feral 2009, arXiv 0706.0136), which is solved for l.
    Looks at no data: its arguments are released or public.

    Args:
        covariances: (n, D, D), noisy.
        noise: s of each, (n,), standard deviation of an entry beside the diagonal.
        rank: most directions of each.

    Returns:
        (n, D, rank), zeros where fewer stand out.
    """
    edge = 2 * noise[:, None] * math.sqrt(covariances.shape[1])
    values, vectors = np.linalg.eigh(covariances)
    values, vectors = values[:, ::-1][:, :rank], vectors[:, :, ::-1][:, :, :rank]
    found = np.where(values > edge, (values + np.sqrt(np.maximum(values**2 - edge**2, 0))) / 2, 0.0)
    return vectors * np.sqrt(found)[:, None, :]
