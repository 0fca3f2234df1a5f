"""Kernel distance, precision, recall and Inception score against loops, torchmetrics and sets whose answer is known."""

import numpy as np
import pytest
import torch
from torch import nn
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance

from dpdm.errors import InputError
from dpdm.evaluation import quality
from dpdm.evaluation.quality import inception_score, kernel_distance, precision_recall, score_sums


class Numbers(nn.Module):
    """Images (N, 1, 1, D) uint8 whose pixels, divided by 100, are the features."""

    num_features = 7

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1).float() / 100


def pixels(seed: int, count: int, *, high: int = 256) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, high, (count, 1, 1, 7)).astype(np.uint8)


def features(images: np.ndarray) -> np.ndarray:
    return images.reshape(len(images), -1) / 100


def test_kernel_distance_equals_a_double_loop() -> None:
    x, y = features(pixels(0, 12)), features(pixels(1, 12, high=150))

    def kernel(a: np.ndarray, b: np.ndarray) -> float:
        return (float(a @ b) / 7 + 1) ** 3

    pairs = [(i, j) for i in range(12) for j in range(12) if i != j]
    within = np.mean([kernel(x[i], x[j]) + kernel(y[i], y[j]) for i, j in pairs])
    expected = within - 2 * np.mean([kernel(a, b) for a in x for b in y])
    assert kernel_distance(x, y, num_subsets=3) == (pytest.approx(expected, rel=1e-10), pytest.approx(0, abs=1e-9))


def test_kernel_distance_equals_torchmetrics() -> None:
    real, fake = pixels(2, 60), pixels(3, 60, high=200)
    metric = KernelInceptionDistance(feature=Numbers(), subsets=1, subset_size=60)
    metric.update(torch.from_numpy(real), real=True)
    metric.update(torch.from_numpy(fake), real=False)
    ours, _ = kernel_distance(features(real), features(fake), num_subsets=1)
    assert ours == pytest.approx(float(metric.compute()[0]), rel=1e-3)


def test_kernel_distance_has_no_bias_and_its_subsets_vary() -> None:
    random = np.random.default_rng(4)
    same = [
        kernel_distance(random.normal(size=(40, 5)), random.normal(size=(40, 5)), num_subsets=1)[0] for _ in range(400)
    ]
    assert abs(np.mean(same)) < 4 * np.std(same) / 20
    assert min(same) < 0  # a biased estimate cannot be negative
    x, y = random.normal(size=(90, 5)), random.normal(1.0, 1.0, size=(80, 5))
    mean, deviation = kernel_distance(x, y, subset_size=20)
    assert mean == pytest.approx(kernel_distance(x, y, subset_size=80, num_subsets=1)[0], rel=0.15)
    assert deviation > 0
    assert (mean, deviation) == kernel_distance(x, y, subset_size=20)
    assert (mean, deviation) != kernel_distance(x, y, subset_size=20, seed=1)


def naive_share(points: np.ndarray, manifold: np.ndarray, k: int) -> float:
    radii = [sorted(np.linalg.norm(m - other) for other in manifold)[k] for m in manifold]
    inside = [any(np.linalg.norm(p - m) <= r for m, r in zip(manifold, radii, strict=True)) for p in points]
    return float(np.mean(inside))


@pytest.mark.parametrize("neighbours", [1, 3])
def test_precision_and_recall_equal_a_loop(neighbours: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality, "ROWS_AT_A_TIME", 13)
    random = np.random.default_rng(5)
    real, fake = random.normal(size=(50, 2)), random.normal(1.5, 0.6, size=(40, 2))
    expected = naive_share(fake, real, neighbours), naive_share(real, fake, neighbours)
    assert precision_recall(real, fake, neighbours=neighbours) == pytest.approx(expected, abs=1e-12)
    assert 0 < expected[1] < expected[0] < 1


def test_precision_and_recall_of_known_sets() -> None:
    random = np.random.default_rng(6)
    wide, far = random.normal(size=(60, 3)), random.normal(100.0, 1.0, size=(60, 3))
    assert precision_recall(wide, wide) == (1, 1)
    assert precision_recall(wide, far) == (0, 0)
    collapsed = wide[:5] + 1e-3 * random.normal(size=(12, 5, 3))  # five real images, over and over
    precision, recall = precision_recall(wide, collapsed.reshape(-1, 3))
    assert precision == 1
    assert recall < 0.2


def test_copies_are_found_where_all_radii_are_zero() -> None:
    # Only with care for the rounding of the squares is a copy in the manifold.
    for seed in range(30):
        random = np.random.default_rng(seed)
        few = random.normal(3.0, 1.0, size=(7, 129))
        copies = np.repeat(few, 5, axis=0)[random.permutation(35)]
        assert precision_recall(np.repeat(few, 4, axis=0), copies) == (1, 1)


def test_copies_far_from_the_origin_are_found() -> None:
    real = np.repeat(1e7 + np.random.default_rng(7).normal(size=(6, 4)), 4, axis=0)
    assert precision_recall(real, real.copy()) == (1, 1)
    assert precision_recall(real, real + 0.1) == (0, 0)


WEIGHTS = np.random.default_rng(8).normal(size=(5, 7))


def test_inception_score_equals_torchmetrics() -> None:
    images = pixels(9, 80)

    class Logits(Numbers):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return super().forward(images) @ torch.from_numpy(WEIGHTS).float().T

    metric = InceptionScore(feature=Logits(), splits=1)
    metric.update(torch.from_numpy(images))
    sums = score_sums(features(images), WEIGHTS, np.arange(80), 80, num_splits=1)
    assert inception_score(sums)[0] == pytest.approx(float(metric.compute()[0]), rel=1e-5)


def test_inception_score_of_splits_equals_a_loop_whatever_the_parts() -> None:
    x = features(pixels(10, 47))
    p = np.exp(x @ WEIGHTS.T)
    p /= p.sum(axis=1, keepdims=True)
    order = np.random.default_rng(0).permutation(47)
    parts = [p[order * 10 // 47 == split] for split in range(10)]
    scores = [np.exp(np.mean([np.sum(q * np.log(q / part.mean(axis=0))) for q in part])) for part in parts]
    sums = sum(score_sums(x[rows], WEIGHTS, rows, 47) for rows in np.split(np.arange(47), [3, 11, 30]))
    assert isinstance(sums, np.ndarray)
    assert inception_score(sums) == pytest.approx((np.mean(scores), np.std(scores)), rel=1e-9)


def test_inception_score_does_not_depend_on_the_order_of_the_classes() -> None:
    labels = np.repeat(np.arange(5), 200)
    by_class = 1e4 * np.eye(5)[labels]
    assert inception_score(score_sums(by_class, np.eye(5), np.arange(1000), 1000))[0] > 4.8
    mixed = by_class[np.random.default_rng(3).permutation(1000)]
    assert inception_score(score_sums(mixed, np.eye(5), np.arange(1000), 1000))[0] > 4.8


def test_inception_score_between_its_bounds() -> None:
    certain = 1e4 * np.eye(5)[np.arange(50) % 5]  # one-hot: every class surely, and as often as the others
    assert inception_score(score_sums(certain, np.eye(5), np.arange(50), 50, num_splits=1)) == pytest.approx((5, 0))
    equal = np.zeros((50, 5))
    assert inception_score(score_sums(equal, np.eye(5), np.arange(50), 50)) == pytest.approx((1, 0))
    one = 1e4 * np.eye(5)[np.zeros(3, int)]  # fewer images than splits, four classes never
    assert inception_score(score_sums(one, np.eye(5), np.arange(3), 3)) == pytest.approx((1, 0))


def test_refuses_sets_that_do_not_fit() -> None:
    with pytest.raises(InputError, match="one dimension"):
        kernel_distance(np.zeros((5, 2)), np.zeros((5, 3)))
    with pytest.raises(InputError, match="at least 4"):
        precision_recall(np.zeros((5, 2)), np.zeros((3, 2)))
