"""Defaults for a data set, from public facts alone: (N, resolution, channels, classes, epsilon, delta).

Everything here was found on scikit-learn's 8x8 digits at epsilon 10 and, for large data sets, on MNIST and
Fashion-MNIST (docs/levers.md), and extended by argument to other sizes; no rule looks at an image.
"""

import math

from scipy.optimize import brentq
from scipy.stats import norm

from dpdm.privacy.central import CELL_WEIGHT, default_clipping_norm
from dpdm.privacy.covariance import LARGEST_SIZE, num_entries

SELECTION = (
    "by a recipe from the number of {unit}s, the size of the images, the number of classes, epsilon and delta alone; "
    "the recipe was developed on scikit-learn's digits, MNIST and Fashion-MNIST, so for those images themselves this "
    "choice is not accounted for"
)
LARGE = 10_000  # images, or groups of them, from which a larger network pays
CENTRAL_NOISE = 0.13  # wanted standard deviation of a noisy mean's pixels, which run from 0 to 1
FINE_CENTRAL_NOISE = 0.03  # the same for large data sets, which can afford it
COARSEST = 4  # smallest side, in pixels, that the network works at
SCORE_NOISE = 0.01  # wanted standard deviation of a selection's score, as a share of N
COUNT_WEIGHT = 0.2  # makes the noise of the means 2 % more, and of a class's size five of their noise multipliers
# Their noise multiplier, in ones of a release that would spend all of epsilon: a sixth of it; two fifths where with a
# sixth noise would hide the finest frequencies. There DP-SGD has little to tell.
COVARIANCE_COSTS = (2.4, 1.6)
FINEST_COVARIANCE = 0.54  # of an image's frequencies each way, those that are bought: strokes and seams are in them
FEWEST_FREQUENCIES = 8  # but as many at least, or all: in a few pixels strokes are at all of them
COARSEST_COVARIANCE = 1 / 7  # with fewer nothing but blots is told apart
# The noise multipliers of covariances by which classes are split, and of their cells, in the same ones: a thirty-sixth
# and a sixth. Classes are split as often as the noise allows it, up to three times (tried at epsilon 1 and 10), and as
# the numbers in all cells can be summed: not for CIFAR-10, whose colours make thrice as many.
SPLIT_COSTS = (6.0, 2.4)
MOST_SPLITS = 3
CELL_NOISE = 0.05  # as COVARIANCE_NOISE, of a cell
CELL_SCALE = 1.3  # of draws: of a cell, with few images, fewer directions stand out
COVARIANCE_NOISE = 0.12  # largest eigenvalue of their noise, as a share of the largest total variance of a class; tried


def recipe(
    *,
    dataset_size: int,
    resolution: int,
    num_channels: int,
    num_classes: int,
    epsilon: float,
    delta: float,
    unit: str = "image",
) -> list[str]:
    """Returns overrides ``key=value`` for ``config.load``; ``dataset_size`` counts what ``unit`` says.

    Batches are a quarter of the data, at most 4,096: at equal epsilon few steps with large batches beat many with
    small ones. Training is 50 passes. A small data set gets a small network, because noise grows with the number of
    weights.
    """
    large = dataset_size >= LARGE
    batch = max(1, min(dataset_size // 4, 4096))
    levels = 1
    while levels < 3 and resolution % 2**levels == 0 and resolution // 2**levels >= COARSEST:
        levels += 1
    whole = gaussian_noise_multiplier(epsilon, delta)
    central = central_noise_multiplier(dataset_size, resolution, num_channels, num_classes, whole)
    facts = (dataset_size, resolution, num_channels, num_classes)
    covariances, most = (cost * whole for cost in COVARIANCE_COSTS)
    if covariance_side(*facts, covariances) != covariance_side(*facts, noise_multiplier=0.0):
        covariances = most
    side = covariance_side(*facts, covariances)
    by, cells = (cost * whole for cost in SPLIT_COSTS)
    splits = num_splits(dataset_size, num_channels, num_classes, side, cells) if side else 0
    if splits:
        covariances = by
    return [
        f"model.network.width={32 if large else 16}",
        f"model.network.channel_multipliers={[1] + [2 if large else 1] * (levels - 1)}",
        f"model.network.num_res_blocks={2 if large else 1}",
        f"model.network.attention_resolutions={[resolution // 2 ** (levels - 1)] if large and levels == 3 else []}",
        "model.ema_rate=0.95",
        "loss.p_mean=-0.5",
        f"loss.noise_multiplicity={4 if large else 2}",
        "optim.learning_rate=2e-3",
        "optim.schedule=linear",
        f"train.expected_batch_size={batch}",
        "train.num_epochs=50",
        "train.warmup.enabled=true",
        f"train.warmup.noise_multiplier={central}",
        *((f"train.warmup.count_weight={COUNT_WEIGHT}",) if num_classes > 1 else ()),
        *(("train.warmup.learning_rate=3e-3", "train.warmup.num_iterations=4000") if large else ()),
        *(_covariances(side, covariances) if large and side else ()),
        *(_cells(splits, cells) if large and splits else ()),
        "sampler.type=dpm_solver_pp",
        "sampler.num_steps=20",
        f"data.unit={unit}",
        f"dp.selection={SELECTION.format(unit=unit)!r}",
    ]


def central_noise_multiplier(
    dataset_size: int, resolution: int, num_channels: int, num_classes: int, whole: float
) -> float:
    """Returns the noise of the central images: what the eye tolerates, but never more than a small share of the budget.

    With a noise multiplier of 10 (or 3) times ``whole``, which would spend the budget in one full-batch Gaussian
    release, the central images take 1 % (11 %) of it, by the sum of squares that Gaussian mechanisms compose by.
    """
    norm_bound = default_clipping_norm(num_channels * resolution**2)
    tolerated = CENTRAL_NOISE if dataset_size < LARGE else FINE_CENTRAL_NOISE
    wanted = tolerated * dataset_size / max(num_classes, 1) / norm_bound
    return float(f"{min(max(wanted, 3 * whole), 30 * whole):.3g}")


def covariance_side(
    dataset_size: int, resolution: int, num_channels: int, num_classes: int, noise_multiplier: float
) -> int | None:
    """Returns the most frequencies each way at which covariances with this noise show directions; None if too few.

    The noise of a class's covariance has eigenvalues up to sqrt(2 D) noise_multiplier C_r^2 / (N / classes), where D is
    channels * side^2; the true one's are at most C_r^2 in all, and images put much of it in the first.
    """
    classes = max(num_classes, 1)
    finest, coarsest = (max(1, round(share * resolution)) for share in (FINEST_COVARIANCE, COARSEST_COVARIANCE))
    finest = max(finest, min(resolution, FEWEST_FREQUENCIES))
    for side in range(finest, coarsest - 1, -1):
        size = num_channels * side**2
        small = classes * num_entries(size) <= LARGEST_SIZE
        if small and math.sqrt(2 * size) * noise_multiplier * classes / dataset_size <= COVARIANCE_NOISE:
            return side
    return None


def num_splits(dataset_size: int, num_channels: int, num_classes: int, side: int, noise_multiplier: float) -> int:
    """Returns how often each class can be split, so that its cells' covariances still show directions.

    By the same measure as ``covariance_side``, of cells of average size.
    """
    classes, size = max(num_classes, 1), num_channels * side**2 + 1
    noise = math.sqrt(2 * size) * noise_multiplier * (1 + CELL_WEIGHT**2) * classes / dataset_size
    for splits in range(min(MOST_SPLITS, size - 1), 0, -1):
        if 2**splits * classes * num_entries(size) <= LARGEST_SIZE and 2**splits * noise <= CELL_NOISE:
            return splits
    return 0


def _cells(splits: int, noise_multiplier: float) -> list[str]:
    return [
        f"train.warmup.splits={splits}",
        f"train.warmup.cell_noise_multiplier={noise_multiplier:.3g}",
        f"train.warmup.covariance_scale={CELL_SCALE}",
    ]


def _covariances(side: int, noise_multiplier: float) -> list[str]:
    """Samples of each class's Gaussian vary by themselves: distortions on top would spoil what was bought."""
    return [
        f"train.warmup.covariance_noise_multiplier={noise_multiplier:.3g}",
        f"train.warmup.covariance_side={side}",
        *(f"train.warmup.{name}=0" for name in ("augmentation", "blur", "contrast")),
    ]


def score_noise_multiplier(dataset_size: int, epsilon: float, delta: float) -> float:
    """Returns the noise of the score: 1 % of N, but never more than a small share of the budget.

    With 10 (30) times what would spend the whole budget in one Gaussian release the score takes 1 % (0.1 %) of a run's.
    """
    whole = gaussian_noise_multiplier(epsilon, delta)
    return float(f"{min(max(SCORE_NOISE * dataset_size, 10 * whole), 30 * whole):.3g}")


def gaussian_noise_multiplier(epsilon: float, delta: float) -> float:
    """Returns the noise multiplier at which one Gaussian release is (epsilon, delta)-private.

    Balle and Wang 2018 (arXiv 1805.06530), theorem 8. Used to choose, never to account.
    """

    def excess(log_sigma: float) -> float:
        a, b = 0.5 / math.exp(log_sigma), epsilon * math.exp(log_sigma)
        second = math.exp(min(epsilon + norm.logcdf(-a - b), 700.0))
        return float(norm.cdf(a - b)) - second - delta

    return math.exp(brentq(excess, math.log(1e-3), math.log(1e9)))  # type: ignore[arg-type]
