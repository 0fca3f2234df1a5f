import numpy as np
import torch
from scipy import stats

from dpdm.diffusion.image_noise import PerImageNoise, random_label


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


def test_random_labels_are_uniform_and_decided_by_seed_and_index_alone() -> None:
    labels = [random_label(7, index, 10) for index in range(5000)]
    assert stats.chisquare(np.bincount(labels, minlength=10)).pvalue > 1e-3
    assert random_label(7, 123, 10) == labels[123]
    assert [random_label(8, index, 10) for index in range(50)] != labels[:50]
