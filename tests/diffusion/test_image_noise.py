import numpy as np
import pytest
import torch
from scipy import stats

from dpdm.diffusion.image_noise import (
    PerImageNoise,
    distortion_numbers,
    image_labels,
    random_label,
    weighted_label,
)
from dpdm.errors import InputError


def test_noise_is_decided_by_seed_and_index_alone() -> None:
    many, one = PerImageNoise(1, [3, 8, 5], (1, 4, 4), "cpu"), PerImageNoise(1, [8], (1, 4, 4), "cpu")
    first = many()
    assert first.shape == (3, 1, 4, 4)
    assert first.dtype == torch.float32
    assert torch.equal(first[1], one()[0])
    second = many()
    assert torch.equal(second[1], one()[0])
    assert not torch.equal(first, second)
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[1], PerImageNoise(2, [8], (1, 4, 4), "cpu")()[0])


def test_noise_is_standard_normal_and_uncorrelated_between_images() -> None:
    noise = PerImageNoise(0, range(400), (1, 8, 8), "cpu")().flatten(1).numpy()
    assert stats.kstest(noise.ravel(), "norm").pvalue > 1e-3
    correlation = np.corrcoef(noise)[np.triu_indices(400, 1)]
    assert np.abs(correlation).max() < 0.7  # 5.6 standard deviations
    assert abs(correlation.mean()) < 0.003


def test_distortions_are_uniform_and_decided_by_seed_and_index_alone() -> None:
    numbers = distortion_numbers(1, range(500))
    assert numbers.shape == (6, 500)
    assert stats.kstest(numbers.numpy().ravel(), "uniform").pvalue > 1e-3
    assert torch.equal(numbers[:, 7:8], distortion_numbers(1, [7]))
    assert not torch.equal(numbers[:, :1], distortion_numbers(2, [0]))
    assert distortion_numbers(1, []).shape == (6, 0)


def test_random_labels_are_uniform_and_decided_by_seed_and_index_alone() -> None:
    labels = [random_label(7, index, 10) for index in range(5000)]
    assert stats.chisquare(np.bincount(labels, minlength=10)).pvalue > 1e-3
    assert random_label(7, 123, 10) == labels[123]
    assert [random_label(8, index, 10) for index in range(50)] != labels[:50]


def test_weighted_labels_have_their_shares_and_are_decided_by_seed_and_index_alone() -> None:
    weights = (30.0, 0.0, 10.0, 0.5, 19.5, 0.0)
    found = image_labels(None, 7, range(6000), 6, weights)
    assert found is not None
    counts = np.bincount(found, minlength=6)
    assert counts[[1, 5]].tolist() == [0, 0]
    shown = np.flatnonzero(weights)
    assert stats.chisquare(counts[shown], 6000 * np.array(weights)[shown] / 60).pvalue > 1e-3
    assert image_labels(6, 7, [123], 6, weights) == found[123]  # their number itself is "random", too
    another, all_of_one = image_labels(None, 8, range(50), 6, weights), image_labels(4, 7, range(3), 6, weights)
    assert another is not None
    assert all_of_one is not None
    assert another.tolist() != found[:50].tolist()
    assert all_of_one.tolist() == [4, 4, 4]


@pytest.mark.parametrize("cumulative", [[0.0, 1.0, 1.0], [0.0, 1e-300, 1e-300], [0.0, 5e-324, 5e-324]])
@pytest.mark.parametrize("place", [0, 2**256 - 1])
def test_the_ends_of_the_scale_are_classes_with_a_weight(
    cumulative: list[float], place: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dpdm.diffusion.image_noise._digest", lambda *_: place)
    assert weighted_label(0, 0, cumulative) == 1


def test_weights_are_one_for_each_class() -> None:
    with pytest.raises(InputError, match=r"Expected one of sampler\.class_weights for each .* 3 classes, got 2"):
        image_labels(None, 0, range(4), 3, (1.0, 2.0))
