import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from dpdm import config
from dpdm.plan import make_plan
from dpdm.privacy.accounting import Mechanism, default_delta, epsilon_spent
from dpdm.privacy.covariance import LARGEST_SIZE, num_entries
from dpdm.recipes import covariance_side, gaussian_noise_multiplier, num_splits, recipe


@settings(max_examples=8, deadline=None)
@given(
    dataset_size=st.integers(10, 2_000_000),
    resolution=st.integers(4, 256),
    num_channels=st.sampled_from([1, 3]),
    num_classes=st.sampled_from([0, 1, 2, 10, 1000]),
    epsilon=st.floats(0.05, 50),
)
def test_every_recipe_is_a_config_that_fits_its_data(
    dataset_size: int, resolution: int, num_channels: int, num_classes: int, epsilon: float
) -> None:
    values = recipe(
        dataset_size=dataset_size,
        resolution=resolution,
        num_channels=num_channels,
        num_classes=num_classes,
        epsilon=epsilon,
        delta=default_delta(dataset_size),
    )
    data = [f"data.resolution={resolution}", f"data.num_channels={num_channels}", f"data.num_classes={num_classes}"]
    loaded = config.load([], [*values, *data])
    assert 1 <= loaded.train.expected_batch_size <= dataset_size
    # The warm-up is affordable: of the sums of squares by which Gaussian mechanisms add up, a ninth and two fifths.
    warmup = loaded.train.warmup
    share = epsilon_spent(warmup.mechanisms(), default_delta(dataset_size))
    assert share < (0.5 if warmup.covariance_noise_multiplier is None else 0.8) * epsilon
    if warmup.covariance_noise_multiplier is not None:
        assert warmup.covariance_side <= resolution
        numbers = num_channels * warmup.covariance_side**2
        assert max(num_classes, 1) * num_entries(numbers) <= LARGEST_SIZE
        assert warmup.splits <= numbers
        assert not warmup.splits or 2**warmup.splits * max(num_classes, 1) * num_entries(numbers + 1) <= LARGEST_SIZE
    if resolution <= 64 and num_channels == 1:
        config.build_denoiser(loaded)


@pytest.mark.slow  # the tests of the demo plan it, too
def test_the_recipe_of_the_digits_can_be_planned() -> None:
    values = recipe(dataset_size=1497, resolution=8, num_channels=1, num_classes=10, epsilon=10, delta=1e-5)
    plan = make_plan(config.load([], [*values, "dp.epsilon=10"]), 1497)
    assert plan.epsilon <= 10
    assert plan.warmup


@pytest.mark.parametrize("epsilon", [0.01, 0.2, 1.0, 10.0, 100.0])
def test_gaussian_noise_multiplier_against_the_accountant(epsilon: float) -> None:
    sigma = gaussian_noise_multiplier(epsilon, 1e-5)
    assert epsilon_spent([Mechanism("x", 1.0, sigma, 1)], 1e-5) == pytest.approx(epsilon, rel=5e-3)
    a, b = 0.5 / sigma, epsilon * sigma
    assert norm.cdf(a - b) - math.exp(epsilon + norm.logcdf(-a - b)) == pytest.approx(1e-5, rel=1e-4)


def test_covariances_are_as_fine_as_their_noise_allows() -> None:
    sides = [covariance_side(60_000, 28, 1, 10, noise) for noise in (1.2, 40.0, 100.0, 200.0, 300.0)]
    assert sides == [15, 12, 5, None, None]
    rng = np.random.default_rng(0)
    for side, noise in zip(sides[:3], (1.2, 40.0, 100.0), strict=True):
        assert side is not None
        size = side**2
        plain = rng.normal(size=(size, size))
        # One class's noise for clipping norm 1, as ``noisy_class_covariances`` describes it.
        found = np.linalg.eigvalsh((plain + plain.T) / 2 * noise / 6000)[-1]
        assert found < 0.13
    assert covariance_side(60_000, 28, 1, 0, 300.0) == 15  # without classes all images share one
    small = (5, 7, 8, 10, 14, 16, 28)
    assert [covariance_side(50_000, side, 1, 10, 8.95) for side in small] == [5, 7, 8, 8, 8, 9, 15]


def test_classes_are_split_as_often_as_noise_allows() -> None:
    """By the largest eigenvalue of the noise of a cell of average size, for clipping norm 1."""
    assert [num_splits(60_000, 1, 10, 15, noise) for noise in (0.1, 1.2, 2.5, 9.0)] == [3, 3, 2, 0]
    plain = np.random.default_rng(0).normal(size=(226, 226))
    for splits, noise in ((3, 1.2), (2, 2.5)):
        found = np.linalg.eigvalsh((plain + plain.T) / 2 * noise * 1.25 / (6000 / 2**splits))[-1]
        assert found < 0.055
    values = {
        epsilon: config.load(
            [], recipe(dataset_size=60_000, resolution=28, num_channels=1, num_classes=10, epsilon=epsilon, delta=1e-5)
        ).train.warmup
        for epsilon in (1.0, 10.0)
    }
    assert [(warmup.splits, warmup.covariance_scale) for warmup in values.values()] == [(0, 1.0), (3, 1.3)]
    split = values[10.0]
    assert split.cell_noise_multiplier is not None
    assert split.covariance_noise_multiplier == pytest.approx(6 / 2.4 * split.cell_noise_multiplier, rel=0.01)


def test_a_large_data_set_warms_up_on_covariances_and_a_small_one_on_distorted_means() -> None:
    for size, bought in ((60_000, True), (9_999, False)):
        values = recipe(dataset_size=size, resolution=28, num_channels=1, num_classes=10, epsilon=1, delta=1e-5)
        warmup = config.load([], values).train.warmup
        assert (warmup.covariance_noise_multiplier is not None) == bought
        assert (warmup.augmentation == 0) == bought
