import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpdm.errors import InputError
from dpdm.privacy import central
from dpdm.privacy.central import (
    GRID,
    LARGEST_DATASET,
    ClassMeans,
    WarmupConfig,
    class_sizes,
    largest_norm,
    noisy_class_means,
)
from dpdm.privacy.noise import derive_key

KEY = bytes(32)


def released(
    images: np.ndarray,
    labels: np.ndarray | None,
    *,
    sigma: float = 1e-12,
    per_class: int = 2,
    key: bytes = KEY,
    count_weight: float = 0.2,
) -> ClassMeans:
    return noisy_class_means(
        iter(np.array_split(images, 3)),
        labels,
        dataset_size=len(images),
        num_classes=3,
        means_per_class=per_class,
        clipping_norm=2.0,
        noise_multiplier=sigma,
        key=key,
        count_weight=count_weight,
    )


def means(images: np.ndarray, labels: np.ndarray | None, **arguments: Any) -> np.ndarray:
    """Returns the means without counts: with public denominators."""
    return released(images, labels, **arguments, count_weight=0.0).means


def data(n: int = 60) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.random((n, 25)) * rng.random((n, 1)), rng.integers(0, 3, n)


def test_means_against_a_loop_with_public_denominators() -> None:
    images, labels = data()
    result = means(images, labels, per_class=1)
    for label in range(3):
        total = sum(x * min(1, 2.0 / np.linalg.norm(x)) for x in images[labels == label])
        assert np.allclose(result[label], total / (60 / 3), atol=1e-6)  # 60/3, not the realised class size


@settings(max_examples=30, deadline=None)
@given(removed=st.integers(0, 59), brightness=st.floats(0, 1))
def test_one_record_moves_one_cell_by_at_most_the_clipping_norm(removed: int, brightness: float) -> None:
    images, labels = data()
    images[removed] = brightness
    blank = images.copy()
    blank[removed] = 0.0  # contributes nothing: the sums without the record
    difference = (means(images, labels) - means(blank, labels)) * (60 / 6)
    assert np.linalg.norm(difference) <= 2.0
    assert (np.abs(difference).sum(axis=1) > 0).sum() <= 1
    if brightness == 1.0:
        assert np.linalg.norm(difference) == pytest.approx(2.0, rel=1e-6)


def test_means_are_sums_over_noisy_sizes() -> None:
    images, labels = data()
    labels = np.minimum(labels + np.arange(60) % 2, 2)  # classes as unequal as 1 to 2 to 3
    exact = released(images, labels, sigma=1e-6)
    assert np.allclose(exact.sizes, np.bincount(labels), atol=1e-3)
    assert exact.frequencies is not None
    assert np.allclose(exact.frequencies, np.bincount(labels), atol=1e-3)
    noisy = released(images, labels, sigma=1.0)
    again = released(images, labels, sigma=1.0, key=derive_key(KEY, 1))
    assert noisy.frequencies is not None
    assert again.frequencies is not None
    assert not np.allclose(noisy.frequencies, again.frequencies)
    assert not np.allclose(noisy.sizes, again.sizes)  # what is random are the counts, not only what is done with them
    sums = means(images, labels, sigma=1e-12) * (60 / 6)
    found = exact.means * np.repeat(exact.sizes / 2, 2)[:, None]
    assert np.allclose(found, sums, atol=1e-3)


def seen_by_the_noise(
    images: np.ndarray, labels: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> tuple[np.ndarray, float]:
    """Returns the vector to which noise is added, and the sensitivity for which it is."""
    seen: list[tuple[np.ndarray, float]] = []

    def add_no_noise(values: np.ndarray, *, sensitivity: float, noise_multiplier: float, key: bytes) -> np.ndarray:
        seen.append((values, sensitivity))
        return values

    monkeypatch.setattr(central, "secure_gaussian", add_no_noise)
    released(images, labels, count_weight=0.7)
    return seen[0]


@pytest.mark.parametrize("row", [0, 17, 59])
def test_a_record_and_its_count_move_the_vector_by_at_most_the_sensitivity(
    row: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a record as bright as can be, which is clipped, and which counts: removed, together with its count."""
    images, labels = data()
    images[row] = 1.0
    without = images.copy()
    without[row] = 0.0
    whole, sensitivity = seen_by_the_noise(images, labels, monkeypatch)
    pixels = whole - seen_by_the_noise(without, labels, monkeypatch)[0]
    assert not pixels[-3:].any()
    moved_class = labels.copy()
    moved_class[row] = (labels[row] + 1) % 3  # takes its count along: once out of a class, once into another
    counts = (whole - seen_by_the_noise(without, moved_class, monkeypatch)[0])[-3:]
    assert np.count_nonzero(counts) == 2
    count = counts[labels[row]]
    assert np.hypot(np.linalg.norm(pixels), count) <= sensitivity
    assert np.hypot(np.linalg.norm(pixels), count) == pytest.approx(sensitivity, rel=1e-6)
    assert count == pytest.approx(0.7 * 2.0)


def test_counts_have_the_noise_that_is_said_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = data()
    found: list[np.ndarray] = []

    def note(counts: np.ndarray, noise: float, dataset_size: int, *, least: float = 0.0) -> np.ndarray:
        assert least == pytest.approx(2 * 5.0 * np.hypot(1, 0.2) * 2.0 / 0.3) or least == 0  # 2 cells; frequencies
        assert noise == pytest.approx(5.0 * np.hypot(1, 0.2) / 0.2)  # of a record's count, by the definition
        assert dataset_size == 60
        found.append(counts - np.bincount(labels))
        return np.ones(3)

    monkeypatch.setattr(central, "class_sizes", note)
    blank = [released(images * 0, labels, sigma=5.0, key=derive_key(KEY, i)).means for i in range(300)]
    assert np.std(found) == pytest.approx(5.0 * np.hypot(1, 0.2) / 0.2, rel=0.15)
    assert np.std(blank) == pytest.approx(5.0 * np.hypot(1, 0.2) * 2.0 * 2, rel=0.02)  # 2.0: clipping norm; 2 cells


def test_a_rare_class_is_divided_by_no_small_number_and_yet_is_rare() -> None:
    """The floor that keeps the mean of a small class from being all noise is none of its frequency."""
    labels = np.repeat([0, 1, 2], [490, 490, 20])
    found = released(np.full((1000, 12), 0.5), labels, sigma=3.0, count_weight=1.0)
    assert found.frequencies is not None
    assert found.sizes[2] == pytest.approx(2 * 3.0 * np.sqrt(2) * 2.0 / 0.3)  # 57, for 2 cells
    assert found.frequencies == pytest.approx([490, 490, 20], abs=5 * 3.0 * np.sqrt(2))  # deviations of a count


def test_sizes_without_noise_are_the_counts() -> None:
    assert np.allclose(class_sizes(np.array([10.0, 50.0, 0.5]), 0.0, 60), [9.8333, 49.8333, 0.3333], atol=1e-3)
    assert class_sizes(np.full(3, 20.0), 0.0, 60).tolist() == [20.0] * 3


def test_sizes_of_equal_classes_are_nearer_to_each_other_than_their_counts() -> None:
    counts = 100 + 20 * np.random.default_rng(0).standard_normal((200, 10))
    sizes = np.stack([class_sizes(row, 20.0, 1000) for row in counts])
    assert np.abs(sizes - 100).mean() < 0.4 * np.abs(counts - 100).mean()


def test_sizes_of_unequal_classes_are_kept() -> None:
    true = np.array([900.0, 60.0, 40.0])
    counts = true + 10 * np.random.default_rng(0).standard_normal((200, 3))
    sizes = np.stack([class_sizes(row, 10.0, 1000) for row in counts])
    assert np.abs(sizes.mean(0) - true).max() < 3
    assert np.allclose(sizes[(sizes > 10).all(1)].sum(1), 1000)


@settings(max_examples=100, deadline=None)
@given(
    counts=st.lists(st.floats(-1e4, 1e4), min_size=2, max_size=10),
    noise=st.floats(1e-3, 1e4),
    least=st.floats(0, 1e3),
    n=st.integers(10, 1000),
)
def test_sizes_are_between_the_floor_and_what_it_leaves(
    counts: list[float], noise: float, least: float, n: int
) -> None:
    sizes = class_sizes(np.array(counts), noise, n, least=least)
    equal = n / len(counts)
    assert sizes.min() >= (1 - 1e-12) * min(max(noise, least), equal) > 0
    assert sizes.max() <= n
    if noise >= equal or least >= equal:
        assert np.allclose(sizes, equal)


@pytest.mark.parametrize("weight", [0.01, 0.2, 1.0])
def test_rounding_of_the_largest_counts_is_paid_for(weight: float) -> None:
    """In exact arithmetic: the largest norm of pixels, and what one record moves the float64 count by.

    And pixels whose norm was computed 1e-8 too small, relative, are still no longer than C_w.
    """
    assert all(Fraction(largest_norm(norm)) * (1 + Fraction(1, 10**8)) < Fraction(norm) for norm in (1e-3, 0.7, 55.4))
    for norm in (0.7, 14.0, 55.426):
        unit = weight * norm
        sensitivity = Fraction(norm * math.hypot(1.0, weight))
        for total in (LARGEST_DATASET, LARGEST_DATASET - 1, 3_000_001, 2_796_203):
            count = Fraction(total * unit) - Fraction((total - 1) * unit)
            assert Fraction(largest_norm(norm)) ** 2 + count**2 < sensitivity**2


@pytest.mark.parametrize("weight", [-0.2, 0.009, 1.1, 1e-155, math.inf])
def test_a_weight_for_which_nothing_is_proved_is_refused(weight: float) -> None:
    with pytest.raises(InputError, match=r"train\.warmup\.count_weight"):
        WarmupConfig(count_weight=weight)


def test_the_cell_of_a_record_depends_on_no_other_record() -> None:
    images, labels = data()
    for row in (0, 17, 59):
        alone = np.zeros_like(images)
        alone[row] = images[row]
        changed = np.flatnonzero(means(alone, labels).round(6).sum(1))
        assert len(changed) == 1
        assert changed[0] // 2 == labels[row]


def test_noise_has_the_accounted_scale_in_every_coordinate() -> None:
    images, labels = data()
    clean = means(images, labels)
    noise = np.stack([means(images, labels, sigma=5.0, key=derive_key(KEY, i)) for i in range(200)])
    # The cells differ by key, so compare on images without content.
    blank = np.stack([means(images * 0, labels, sigma=5.0, key=derive_key(KEY, i)) for i in range(200)])
    expected = 5.0 * 2.0 / (60 / 6)
    assert blank.std() == pytest.approx(expected, rel=5 / np.sqrt(2 * blank.size))
    assert np.abs(blank.std(axis=0) / expected - 1).max() < 0.3
    assert noise.shape[1:] == clean.shape == (6, 25)


def test_without_labels_there_is_one_class() -> None:
    images, _ = data()
    result = noisy_class_means(
        [images], None, dataset_size=60, num_classes=1, means_per_class=1, clipping_norm=50.0, noise_multiplier=1e-12,
        key=KEY, count_weight=0.2,
    )  # fmt: skip
    assert np.allclose(result.means[0], images.mean(0))
    assert result.sizes.tolist() == [60.0]  # N is public, and nothing is counted
    assert result.frequencies is None


def test_missing_records_are_noticed() -> None:
    with pytest.raises(ValueError, match="Expected 70 images, got 60"):
        noisy_class_means(
            [data()[0]], None, dataset_size=70, num_classes=1, means_per_class=1, clipping_norm=1.0,
            noise_multiplier=1.0, key=KEY,
        )  # fmt: skip


def test_its_cost_is_one_full_batch_gaussian() -> None:
    (mechanism,) = WarmupConfig(enabled=True, noise_multiplier=7.0).mechanisms()
    assert (mechanism.sampling_rate, mechanism.noise_multiplier, mechanism.num_steps) == (1.0, 7.0, 1)


def test_more_images_than_the_sums_hold_are_refused() -> None:
    assert LARGEST_DATASET * GRID < 2**63  # white images, unclipped, all in one cell
    with pytest.raises(InputError, match="turn off"):
        noisy_class_means(
            [], None, dataset_size=2**23, num_classes=1, means_per_class=1, clipping_norm=1.0, noise_multiplier=1.0,
            key=KEY,
        )  # fmt: skip


@pytest.mark.parametrize("values", [{"ema_rate": 1.0}, {"blur": float("nan")}, {"noise_multiplier": float("inf")}])
def test_config_names_the_wrong_key(values: dict[str, float]) -> None:
    with pytest.raises(InputError, match=next(iter(values))):
        WarmupConfig(**values)  # type: ignore[arg-type]
