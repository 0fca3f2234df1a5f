"""Central images: noisy means of each class and its noisy size, bought once, to warm a model up before DP-SGD.

What else the warm-up may buy is in ``covariance.py``.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from dpdm.errors import InputError
from dpdm.privacy.accounting import Mechanism
from dpdm.privacy.discrete import secure_gaussian
from dpdm.privacy.noise import derive_key, random_words

GRID = 2.0**40
LARGEST_DATASET = 2**22  # so many vectors in [0, 1], in units of the grid, fit 63 bits
SMALLEST_COUNT_WEIGHT = 0.01  # with less, counts are noise alone
LARGEST_COUNT_WEIGHT = 1.0  # so that the margin of 1e-7 in the norm of the pixels pays for the rounding of counts
# More of these than so much cannot be computed, or is a slip; of noise multipliers account.py says what is too much.
MOST_ABOVE_ZERO = {
    "noise_multiplier": 1e30,
    "means_per_class": 1e4,
    "clipping_norm": 1e6,
    "covariance_noise_multiplier": 1e30,
    "cell_noise_multiplier": 1e30,
    "covariance_clipping_norm": 1e6,
    "covariance_side": 1e6,
    "covariance_rank": 1e6,
    "covariance_scale": 1e3,
    "batch_size": 1e6,
    "learning_rate": 1e6,
}
MOST_FROM_ZERO = {"count_weight": 1e6, "num_iterations": 1e9, "augmentation": 1e3, "blur": 1.0, "contrast": 1e3}
MOST_SPLITS = 10
# What counts an image in its cell's moments, as a share of the norm to which its distance is clipped: enough to know a
# cell's mean by, and little enough not to make the noise of its covariance much more.
CELL_WEIGHT = 0.5
# What the warm-up may buy, in this order, and the key of the noise that each mechanism has.
MECHANISMS = {
    "central images": "noise_multiplier",
    "central covariances": "covariance_noise_multiplier",
    "central cells": "cell_noise_multiplier",
}
LARGEST_PIXEL_NOISE = 0.3  # of a mean, whose pixels run from 0 to 1, that a small class's own size may bring about


@dataclass(frozen=True)
class WarmupConfig:
    """Warm-up on central images (the idea: FETA-Pro, USENIX Security 2026; the accounting is our own).

    Attributes:
        enabled: buy the means and train on them first.
        noise_multiplier: noise standard deviation / sensitivity of the one release of all means and sizes, where the
            sensitivity is clipping_norm * sqrt(1 + count_weight^2).
        means_per_class: cells per class.
        clipping_norm: bound on one image's vector, pixels in [0, 1]; None: half the norm of an all-white image.
        count_weight: what an image counts for in the size of its class, as a share of clipping_norm; 0: classes are
            taken to be equally large; else in [0.01, 1]. It adds to every image's vector, so more of it means more
            noise in the means.
        covariance_noise_multiplier: noise standard deviation / covariance_clipping_norm^2 of the one release of all
            classes' covariances; None: they are not bought.
        covariance_clipping_norm: bound on an image's distance from its class's noisy mean, pixels in [0, 1], by its
            lowest frequencies (see ``central_model.deviations``), or from where its cell is expected; None: a fifth of
            the norm of an all-white image.
        covariance_side: most frequencies each way by which deviations are measured.
        covariance_rank: most directions of each class, and of each cell.
        covariance_scale: how much farther images are drawn from their mean than was bought: clipping shortens what is
            bought, and directions are missing. 1: not at all.
        splits: how often each class is split in two, by the side of one of its first principal directions on which an
            image lies: into 2^splits cells with a mean and a covariance of their own; 0: not at all.
        cell_noise_multiplier: of the one release of all cells' moments, noise standard deviation / (1.25
            covariance_clipping_norm^2); given with ``splits``, and None without.
        num_iterations: training steps on the noisy means; they cost no privacy.
        batch_size: images per such step.
        learning_rate: of Adam, for these steps.
        ema_rate: of the weights' moving average, with which DP-SGD begins.
        augmentation: strength of the random rotations, shears, scalings and shifts of a mean; 0 is off.
        blur: largest standard deviation of its random Gaussian blur, as a share of the side.
        contrast: largest relative change of its contrast.
    """

    enabled: bool = False
    noise_multiplier: float = 5.0
    means_per_class: int = 1
    clipping_norm: float | None = None
    count_weight: float = 0.0
    covariance_noise_multiplier: float | None = None
    covariance_clipping_norm: float | None = None
    covariance_side: int = 16
    covariance_rank: int = 30
    covariance_scale: float = 1.0
    splits: int = 0
    cell_noise_multiplier: float | None = None
    num_iterations: int = 1000
    batch_size: int = 64
    learning_rate: float = 1e-3
    ema_rate: float = 0.99
    augmentation: float = 1.0
    blur: float = 0.09
    contrast: float = 0.2

    def __post_init__(self) -> None:
        for name, most in MOST_ABOVE_ZERO.items():
            value = getattr(self, name)
            if value is not None and not 0 < value <= most:
                raise InputError(f"Expected train.warmup.{name} > 0 and <= {most:g}, got {value}.")
        for name, most in MOST_FROM_ZERO.items():
            value = getattr(self, name)
            if not 0 <= value <= most:
                raise InputError(f"Expected train.warmup.{name} >= 0 and <= {most:g}, got {value}.")
        if self.count_weight and not SMALLEST_COUNT_WEIGHT <= self.count_weight <= LARGEST_COUNT_WEIGHT:
            raise InputError(
                f"Expected train.warmup.count_weight=0, or in [{SMALLEST_COUNT_WEIGHT}, {LARGEST_COUNT_WEIGHT:g}], got "
                f"{self.count_weight}: 0.2 is what the recipe has."
            )
        if not 0 <= self.splits <= min(MOST_SPLITS, self.covariance_rank):
            raise InputError(
                f"Expected 0 <= train.warmup.splits <= {MOST_SPLITS} and <= train.warmup.covariance_rank, got "
                f"{self.splits}: 3 is what the recipe has at most."
            )
        if self.splits and (self.covariance_noise_multiplier is None or self.means_per_class > 1):
            raise InputError(
                "Expected train.warmup.splits=0 without covariances or with several means per class, got "
                f"{self.splits}: classes are split by their covariances; set train.warmup.covariance_noise_multiplier "
                "and train.warmup.means_per_class=1, or train.warmup.splits=0 and "
                "train.warmup.cell_noise_multiplier=null."
            )
        if bool(self.splits) != (self.cell_noise_multiplier is not None):
            raise InputError(
                "Expected both train.warmup.splits and train.warmup.cell_noise_multiplier, or neither, got "
                f"{self.splits} and {'null' if self.cell_noise_multiplier is None else self.cell_noise_multiplier}: "
                "give a noise multiplier with splits, and null without."
            )
        if not 0 <= self.ema_rate < 1:
            raise InputError(f"Expected 0 <= train.warmup.ema_rate < 1, got {self.ema_rate}.")

    def mechanisms(self) -> tuple[Mechanism, ...]:
        """Returns what the warm-up buys, in this order: full-batch Gaussian mechanisms; none if it is not enabled."""
        if not self.enabled:
            return ()
        noise = {name: getattr(self, key) for name, key in MECHANISMS.items()}
        return tuple(Mechanism(name, 1.0, value, 1) for name, value in noise.items() if value is not None)

    def counts(self, num_classes: int) -> bool:
        """Whether noisy sizes of the classes are among what it buys; that of a single class is N, which is public."""
        return self.enabled and self.count_weight > 0 and num_classes > 1


@dataclass(frozen=True)
class ClassMeans:
    """What one Gaussian mechanism released of the classes: free to use.

    Attributes:
        means: one image per (class, cell), (num_classes * cells, D) float64, class-major; not limited to [0, 1].
        noise: standard deviation of a pixel of each, (num_classes * cells,) float64.
        sizes: records of each class, (num_classes,) float64, above 0: what sums are divided by, and so none is small.
        frequencies: the same by the counts alone, however small, (num_classes,) float64; None without counts.
    """

    means: np.ndarray
    noise: np.ndarray
    sizes: np.ndarray
    frequencies: np.ndarray | None = None


def largest_norm(clipping_norm: float) -> float:
    """Returns the norm to which an image's pixels are clipped: less than asked for, by what rounding may add."""
    return clipping_norm * (1 - 1e-7)


def noisy_class_means(
    images: Iterable[np.ndarray],
    labels: np.ndarray | None,
    *,
    dataset_size: int,
    num_classes: int,
    means_per_class: int,
    clipping_norm: float,
    noise_multiplier: float,
    key: bytes,
    count_weight: float = 0.0,
) -> ClassMeans:
    """Returns one noisy mean image per (class, cell), and the classes' noisy sizes.

    Each record is scaled to norm at most C_w and added to *one* cell: of its own class, and chosen at random for
    it, from the record's position and the key alone. Beside it, count_weight * C_w is added to the cell's count.
    Gaussian noise is added to every coordinate of every cell and to every count, each sum is divided by its class's
    noisy size (see ``class_sizes``) over the number of the class's cells.

    Guarantee: seen as one vector over all cells and counts, adding or removing one record moves the sums by that
    record's vector in one cell, so by at most C_w in L2 norm, and one count by count_weight * C_w: together by at most
    S = C_w sqrt(1 + count_weight^2). Noise of standard deviation noise_multiplier * S in all coordinates makes it one
    Gaussian mechanism with the given noise multiplier, whatever the number of classes and cells. Sizes and
    frequencies are computed from noisy counts and public numbers alone; realised ones enter nowhere else. Without
    counts (count_weight 0, or one class) sizes are the public N / num_classes. Vectors are rounded towards zero to
    multiples of 2^-40 and summed as integers, and records are counted, so sums are exact and do not depend on order;
    the margin of 1e-7 in the norm covers the float64 norm and the conversion of sums and counts.

    Args:
        images: pieces of (n, D) float64 in [0, 1], in record order, N rows in all.
        labels: (N,) in [0, num_classes), or None for a single class.
        dataset_size: N, public.
        num_classes: number of classes, at least 1.
        means_per_class: cells per class.
        clipping_norm: C_w > 0.
        noise_multiplier: noise standard deviation / S.
        key: of this purpose alone.
        count_weight: 0, or as ``WarmupConfig`` allows it.
    """
    if dataset_size > LARGEST_DATASET:
        raise InputError(
            f"Expected at most {LARGEST_DATASET} images for central images, got {dataset_size}: turn off train.warmup."
        )
    cells = (random_words(derive_key(key, "cells"), dataset_size) % np.uint64(means_per_class)).astype(np.int64)
    if labels is not None:
        cells += labels.astype(np.int64) * means_per_class
    num_cells = num_classes * means_per_class
    sums: np.ndarray | None = None
    start = 0
    for piece in images:
        norms = np.sqrt(np.square(piece).sum(axis=1))
        scale = np.minimum(1.0, largest_norm(clipping_norm) / np.maximum(norms, 1e-300))
        if sums is None:
            sums = np.zeros((num_cells, piece.shape[1]), dtype=np.int64)
        np.add.at(sums, cells[start : start + len(piece)], (piece * scale[:, None] * GRID).astype(np.int64))
        start += len(piece)
    if sums is None or start != dataset_size:
        raise ValueError(f"Expected {dataset_size} images, got {start}.")
    counted = count_weight if num_classes > 1 else 0.0
    counts = np.bincount(cells, minlength=num_cells).reshape(num_classes, means_per_class).sum(1)
    sensitivity = clipping_norm * math.hypot(1.0, counted)
    noisy = secure_gaussian(
        np.concatenate([(sums / GRID).ravel(), counts * (counted * clipping_norm)]),
        sensitivity=sensitivity,
        noise_multiplier=noise_multiplier,
        key=derive_key(key, "noise"),
    )
    noisy_sums, noisy_counts = noisy[:-num_classes].reshape(sums.shape), noisy[-num_classes:]
    sizes, frequencies = np.full(num_classes, dataset_size / num_classes), None
    if counted:
        unit = counted * clipping_norm
        deviation = noise_multiplier * sensitivity
        least = means_per_class * deviation / LARGEST_PIXEL_NOISE
        sizes = class_sizes(noisy_counts / unit, deviation / unit, dataset_size, least=least)
        frequencies = class_sizes(noisy_counts / unit, deviation / unit, dataset_size)
    of_cell = np.repeat(sizes / means_per_class, means_per_class)
    return ClassMeans(noisy_sums / of_cell[:, None], noise_multiplier * sensitivity / of_cell, sizes, frequencies)


def class_sizes(counts: np.ndarray, noise: float, dataset_size: int, *, least: float = 0.0) -> np.ndarray:
    """Returns how large the classes are, by noisy counts and the public total.

    Counts are shifted so that they add up to N. As far as they differ from N / num_classes by no more than their noise
    does, they are drawn back to it: by the share of the noise's variance in that of the differences (empirical Bayes;
    Efron and Morris 1973). No size is below the noise and ``least``, or N / num_classes if that is less, nor so large
    that the others would have to be. Where noise hides all sizes, they are thus equal. Looks at no data.

    Args:
        counts: (num_classes >= 2,), noisy.
        noise: their standard deviation, above 0.
        dataset_size: N.
        least: below which a size would make too much of the noise in what is divided by it.

    Returns:
        (num_classes,) float64.
    """
    equal = dataset_size / len(counts)
    differences = counts - counts.mean()  # those of counts that add up to N, from ``equal``
    spread = np.square(differences).sum() / (len(counts) - 1)
    kept = max(0.0, 1.0 - noise**2 / spread) if spread else 0.0
    floor = min(max(noise, least), equal)
    return np.clip(equal + kept * differences, floor, dataset_size - (len(counts) - 1) * floor)


def default_clipping_norm(num_pixels: int) -> float:
    """Returns half the norm of an all-white image: above most digits' norm, from public facts alone."""
    return 0.5 * math.sqrt(num_pixels)


def default_covariance_clipping_norm(num_pixels: int) -> float:
    """Returns a fifth of the norm of an all-white image, from public facts alone.

    Handwriting and clothes differ from their class's mean by more; clipping then keeps directions and lowers the noise.
    """
    return math.sqrt(num_pixels) / 5
