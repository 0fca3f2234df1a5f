import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpdm.errors import InputError
from dpdm.privacy.central import GRID, LARGEST_DATASET, WarmupConfig, noisy_class_means
from dpdm.privacy.noise import derive_key

KEY = bytes(32)


def means(images: np.ndarray, labels: np.ndarray | None, *, sigma: float = 1e-12, per_class: int = 2, key: bytes = KEY):
    return noisy_class_means(
        iter(np.array_split(images, 3)),
        labels,
        dataset_size=len(images),
        num_classes=3,
        means_per_class=per_class,
        clipping_norm=2.0,
        noise_multiplier=sigma,
        key=key,
    )


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
        key=KEY,
    )  # fmt: skip
    assert np.allclose(result[0], images.mean(0))


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
