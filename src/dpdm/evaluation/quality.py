"""Beside the Frechet distance, from the same features: kernel distance, precision and recall, Inception score."""

import functools

import numpy as np

from dpdm.errors import InputError

KERNEL_SUBSETS = 100
KERNEL_SUBSET_SIZE = 1000
NEIGHBOURS = 3
SCORE_SPLITS = 10
ROWS_AT_A_TIME = 1000
# Squared distances come from |x|^2 + |y|^2 - 2 xy, which leaves equal points this share of |x|^2 + |y|^2 apart.
ROUNDING = 1e-12


def kernel_distance(
    first: np.ndarray,
    second: np.ndarray,
    *,
    num_subsets: int = KERNEL_SUBSETS,
    subset_size: int = KERNEL_SUBSET_SIZE,
    seed: int = 0,
) -> tuple[float, float]:
    """Returns the kernel distance (KID, with Inception features) and its standard deviation over subsets.

    The unbiased estimate of the squared maximum mean discrepancy under k(x, y) = (x^T y / D + 1)^3, averaged over
    random subsets: Binkowski et al. 2018, arXiv 1801.01401. It may be negative.

    Args:
        first, second: (N, D) and (M, D) features, at least 2 each.
        num_subsets: how many pairs of subsets are drawn, without replacement within one.
        subset_size: rows in each; all rows where there are fewer.
        seed: of the subsets.

    Raises:
        InputError: if shapes do not fit.
    """
    _check_pair(first, second, least=2)
    random = np.random.default_rng(seed)
    size = min(subset_size, len(first), len(second))
    values = [
        _unbiased_discrepancy(
            first[random.choice(len(first), size, replace=False)],
            second[random.choice(len(second), size, replace=False)],
        )
        for _ in range(num_subsets)
    ]
    return float(np.mean(values)), float(np.std(values))


def precision_recall(real: np.ndarray, synthetic: np.ndarray, *, neighbours: int = NEIGHBOURS) -> tuple[float, float]:
    """Returns which share of synthetic images looks real, and which share of real ones the synthetic ones cover.

    A set's manifold is the union of balls around its points, each reaching to the point's k-th nearest neighbour
    in the set; precision is the share of synthetic points in the real manifold, recall the reverse: Kynkaanniemi
    et al. 2019, arXiv 1904.06991. Time and precision depend on the numbers of points: compare equal ones.

    Args:
        real, synthetic: (N, D) and (M, D) features, more than ``neighbours`` each.
        neighbours: k.

    Returns:
        Two numbers in [0, 1].

    Raises:
        InputError: if shapes do not fit.
    """
    _check_pair(real, synthetic, least=neighbours + 1)
    # Far from the origin the rounding of the squares would swallow small distances.
    real, synthetic = real - real.mean(axis=0), synthetic - real.mean(axis=0)
    return _covered(synthetic, real, neighbours), _covered(real, synthetic, neighbours)


def score_sums(
    features: np.ndarray, class_weights: np.ndarray, rows: np.ndarray, total: int, *, num_splits: int = SCORE_SPLITS
) -> np.ndarray:
    """Returns what the Inception score needs to know of some images; of all images it is the sum of the parts'.

    Images are dealt out to the splits by a fixed shuffle, as files are often in the order of their classes.

    Args:
        features: (B, D).
        class_weights: (K, D): p = softmax(features class_weights^T) are the class probabilities.
        rows: (B,) numbers of these images among all, in [0, total).
        total: how many images there are.
        num_splits: parts of equal size of which each gets a score.

    Returns:
        (num_splits, K + 2): per split the sums of p, of sum_k p_k ln p_k, and of images.
    """
    logits = features @ class_weights.T
    logits -= logits.max(axis=1, keepdims=True)
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    p = np.exp(log_p)
    sums = np.zeros((num_splits, len(class_weights) + 2))
    columns = np.concatenate([p, (p * log_p).sum(axis=1, keepdims=True), np.ones((len(p), 1))], axis=1)
    np.add.at(sums, _shuffled(total)[rows] * num_splits // total, columns)
    return sums


def inception_score(sums: np.ndarray) -> tuple[float, float]:
    """Returns the Inception score and its standard deviation over the splits.

    exp(mean KL(p(class | image) || p(class))), averaged over splits: Salimans et al. 2016, arXiv 1606.03498. With
    fewer images it is lower. It looks at one set of images alone.

    Args:
        sums: from ``score_sums``, over all images; splits without images do not count.
    """
    sums = sums[sums[:, -1] > 0]
    means = sums[:, :-1] / sums[:, -1:]
    marginal = means[:, :-1]
    # A class that is never expected, within floating point, adds 0 ln 0 = 0.
    log_marginal = np.log(np.where(marginal > 0, marginal, 1))
    scores = np.exp(means[:, -1] - (marginal * log_marginal).sum(axis=1))
    return float(scores.mean()), float(scores.std())


@functools.lru_cache(maxsize=1)
def _shuffled(total: int) -> np.ndarray:
    return np.random.default_rng(0).permutation(total)


def _unbiased_discrepancy(x: np.ndarray, y: np.ndarray) -> float:
    size, dimension = x.shape

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (a @ b.T / dimension + 1) ** 3

    xx, yy = kernel(x, x), kernel(y, y)
    within = (xx.sum() - np.trace(xx) + yy.sum() - np.trace(yy)) / (size * (size - 1))
    return float(within - 2 * kernel(x, y).mean())


def _covered(points: np.ndarray, manifold: np.ndarray, neighbours: int) -> float:
    """Returns the share of ``points`` inside the balls of ``manifold``."""
    # The nearest is the point itself, so the k-th neighbour is number k from 0.
    radii = np.concatenate(
        [
            np.partition(_squared_distances(chunk, manifold), neighbours, axis=1)[:, neighbours]
            for chunk in _chunks(manifold)
        ]
    )
    norms = (manifold**2).sum(axis=1)
    inside = 0
    for chunk in _chunks(points):
        slack = ROUNDING * ((chunk**2).sum(axis=1)[:, None] + norms)
        inside += int((_squared_distances(chunk, manifold) <= radii + slack).any(axis=1).sum())
    return inside / len(points)


def _squared_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.maximum((a**2).sum(axis=1)[:, None] + (b**2).sum(axis=1) - 2 * a @ b.T, 0)


def _chunks(rows: np.ndarray) -> list[np.ndarray]:
    return [rows[start : start + ROWS_AT_A_TIME] for start in range(0, len(rows), ROWS_AT_A_TIME)]


def _check_pair(first: np.ndarray, second: np.ndarray, *, least: int) -> None:
    if first.ndim != 2 or second.ndim != 2 or first.shape[1] != second.shape[1] or min(len(first), len(second)) < least:
        raise InputError(
            f"Expected two sets of at least {least} features of one dimension, got {first.shape} and {second.shape}: "
            "give more images, and one extractor for both."
        )
