"""Covariances of each class: against a loop, what one record can move, the noise of each entry, and what stands out."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dpdm.errors import InputError
from dpdm.privacy import covariance
from dpdm.privacy.central import WarmupConfig
from dpdm.privacy.covariance import LARGEST_DATASET, UNIT, noisy_class_covariances, principal_factors
from dpdm.privacy.noise import derive_key

KEY, CLIP, COUNT, SIZE = bytes(32), 1.5, 60, 6


def found(
    vectors: np.ndarray,
    labels: np.ndarray | None,
    *,
    sigma: float = 1e-9,
    key: bytes = KEY,
    num_classes: int = 3,
    class_sizes: np.ndarray | None = None,
) -> np.ndarray:
    return noisy_class_covariances(
        np.array_split(vectors, 3),
        labels,
        dataset_size=len(vectors),
        num_classes=num_classes,
        clipping_norm=CLIP,
        noise_multiplier=sigma,
        key=key,
        class_sizes=np.full(num_classes, len(vectors) / num_classes) if class_sizes is None else class_sizes,
    )


def data() -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    return random.normal(size=(COUNT, SIZE)) * random.random((COUNT, 1)), random.integers(0, 3, COUNT)


def test_covariances_against_a_loop_with_public_denominators() -> None:
    vectors, labels = data()
    for label, matrix in enumerate(found(vectors, labels)):
        clipped = [r * min(1, CLIP / np.linalg.norm(r)) for r in vectors[labels == label]]
        total = np.sum([np.outer(r, r) for r in clipped], axis=0)
        assert np.allclose(matrix, total / (COUNT / 3), atol=1e-4)  # COUNT / 3, not the realised class size
    sizes = np.array([10.0, 20.0, 40.0])  # as released before
    expected = found(vectors, labels) * (COUNT / 3 / sizes)[:, None, None]
    assert np.allclose(found(vectors, labels, class_sizes=sizes), expected)


def test_without_labels_there_is_one_class() -> None:
    vectors, _ = data()
    clipped = vectors * np.minimum(1, CLIP / np.linalg.norm(vectors, axis=1))[:, None]
    assert np.allclose(found(vectors, None, num_classes=1)[0], clipped.T @ clipped / COUNT, atol=1e-4)


@settings(max_examples=30, deadline=None)
@given(removed=st.integers(0, COUNT - 1), length=st.floats(0, 100))
@example(removed=3, length=100.0)  # far longer than the clipping norm, so clipped to just below it
def test_one_record_moves_one_matrix_by_at_most_the_squared_norm(removed: int, length: float) -> None:
    vectors, labels = data()
    vectors[removed] *= length / np.linalg.norm(vectors[removed])
    without = vectors.copy()
    without[removed] = 0.0  # adds nothing: the sums without the record
    moved = (found(vectors, labels) - found(without, labels)) * (COUNT / 3)
    assert np.linalg.norm(moved) <= CLIP**2 * (1 + 1e-7)  # the noise of 1e-9 of it is the same on both sides
    assert (np.abs(moved).sum(axis=(1, 2)) > 1e-6).sum() <= 1
    if length > CLIP:
        assert np.linalg.norm(moved) == pytest.approx(CLIP**2, rel=1e-3)


def seen_by_the_noise(vectors: np.ndarray, labels: np.ndarray | None, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """Returns the vector to which noise is added."""
    seen: list[np.ndarray] = []

    def add_no_noise(values: np.ndarray, *, sensitivity: float, noise_multiplier: float, key: bytes) -> np.ndarray:
        assert sensitivity == 1.0
        seen.append(values)
        return values

    monkeypatch.setattr(covariance, "secure_gaussian", add_no_noise)
    found(vectors, labels, num_classes=1 if labels is None else 3)
    return seen[0]


def test_what_is_released_has_the_norm_that_is_accounted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A record of any direction moves the vector by its squared length, in units of the clipping norm's square."""
    vectors, labels = data()
    for row in range(5):
        alone = np.zeros_like(vectors)
        alone[row] = vectors[row]
        length = min(1.0, float(np.linalg.norm(vectors[row])) / CLIP)
        moved = np.linalg.norm(seen_by_the_noise(alone, labels, monkeypatch))
        assert moved == pytest.approx(length**2, rel=1e-3)
        assert moved <= 1.0 - 2e-6  # what rounding may add


def test_no_vector_is_longer_than_the_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounding towards zero makes no vector longer; to the nearest, many small numbers would be rounded up."""
    alone = np.zeros((COUNT, 1000))
    alone[0] = 1.0  # the clipped vector has entries of 1035.9 / UNIT
    alone[0, :300] = 1.001  # and of 1036.9
    assert np.linalg.norm(seen_by_the_noise(alone, None, monkeypatch)) <= 1.0 - 2e-6


def test_noise_is_symmetric_and_of_the_accounted_scale_in_every_entry() -> None:
    vectors, labels = data()
    noise = np.stack([found(vectors * 0, labels, sigma=5.0, key=derive_key(KEY, i)) for i in range(400)])
    assert np.array_equal(noise, noise.swapaxes(-1, -2))
    deviation = noise.std(axis=0) / (5.0 * CLIP**2 / (COUNT / 3))
    diagonal = np.eye(SIZE, dtype=bool)
    assert np.abs(deviation[:, diagonal] - 1).max() < 0.2
    assert np.abs(deviation[:, ~diagonal] * np.sqrt(2) - 1).max() < 0.2
    upper = np.triu_indices(SIZE)
    together = np.corrcoef(noise[:, :, *upper].reshape(400, -1).T)
    assert np.abs(together - np.eye(len(together))).max() < 0.3  # independent entries, in all classes


def test_sums_do_not_depend_on_order() -> None:
    vectors, labels = data()
    order = np.random.default_rng(1).permutation(COUNT)
    assert np.array_equal(found(vectors, labels), found(vectors[order], labels[order]))


def test_sums_are_exact_up_to_the_largest_data_set() -> None:
    assert LARGEST_DATASET * UNIT**2 <= 2.0**53
    with pytest.raises(InputError, match="covariance_noise_multiplier=null"):
        noisy_class_covariances(
            [],
            None,
            dataset_size=2**23,
            num_classes=1,
            clipping_norm=1.0,
            noise_multiplier=1.0,
            key=KEY,
            class_sizes=np.ones(1),
        )


def test_too_many_numbers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(covariance, "LARGEST_SIZE", 3 * SIZE * (SIZE + 1) // 2 - 1)
    with pytest.raises(InputError, match="covariance_side"):
        found(*data())


def test_missing_records_are_noticed() -> None:
    with pytest.raises(ValueError, match="Expected 70 images, got 60"):
        noisy_class_covariances(
            [data()[0]],
            None,
            dataset_size=70,
            num_classes=1,
            clipping_norm=1.0,
            noise_multiplier=1.0,
            key=KEY,
            class_sizes=np.ones(1),
        )


def symmetric_noise(size: int, deviation: float) -> np.ndarray:
    noise = np.random.default_rng(0).normal(size=(size, size)) * deviation
    return (noise + noise.T) / np.sqrt(2)


def test_noise_alone_has_no_directions() -> None:
    assert not principal_factors(1.1 * symmetric_noise(150, 0.9)[None], np.ones(1), 10).any()


def test_directions_are_found_at_their_true_strength() -> None:
    basis = np.linalg.qr(np.random.default_rng(1).normal(size=(150, 150)))[0]
    true = np.array([60.0, 30.0, 3.0])  # the last one below sqrt(150), where noise hides it
    covariance = (basis[:, :3] * true) @ basis[:, :3].T + symmetric_noise(150, 1.0)
    both = principal_factors(np.stack([covariance, covariance]), np.array([1.0, 1.5]), 5)
    assert both[1, :, 0].any()
    assert not both[1, :, 1].any()  # 30 does not stand out from twice 1.5 sqrt(150)
    factors = both[0]
    strength = np.square(factors).sum(0)
    assert strength[:2] == pytest.approx(true[:2], rel=0.1)
    assert not strength[2:].any()
    assert np.abs(factors[:, 0] @ basis[:, 0]) ** 2 > 0.9 * strength[0]
    assert principal_factors(covariance[None], np.ones(1), 1).shape == (1, 150, 1)


def test_its_cost_is_one_full_batch_gaussian_more() -> None:
    off, on = WarmupConfig(enabled=True), WarmupConfig(enabled=True, covariance_noise_multiplier=7.0)
    assert [m.name for m in off.mechanisms()] == ["central images"]
    mechanism = on.mechanisms()[1]
    assert (mechanism.sampling_rate, mechanism.noise_multiplier, mechanism.num_steps) == (1.0, 7.0, 1)
    assert WarmupConfig(covariance_noise_multiplier=7.0).mechanisms() == ()
