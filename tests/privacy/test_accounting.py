"""Against published figures, a second accountant (Renyi) and the exact Gaussian mechanism."""

import math
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from dpdm.errors import InputError
from dpdm.privacy import accounting
from dpdm.privacy.accounting import Mechanism, calibrate_noise_multiplier, epsilon_spent, group_privacy

STEPS = accounting.num_iterations(300, 60_000, 4096)
RATE = 4096 / 60_000


def gaussian_delta(epsilon: float, noise_multiplier: float) -> float:
    """The Gaussian mechanism's exact trade-off, Balle and Wang 2018, theorem 8."""
    a, b = 1 / (2 * noise_multiplier), epsilon * noise_multiplier
    return float(norm.cdf(a - b) - math.exp(epsilon) * norm.cdf(-a - b))


@pytest.mark.parametrize(("epsilon", "published"), [(0.2, 73.877), (1.0, 16.921), (10.0, 2.3803)])
def test_calibration_of_the_mnist_runs(epsilon: float, published: float) -> None:
    assert STEPS == 4394
    noise_multiplier = calibrate_noise_multiplier(epsilon, 1e-5, RATE, STEPS)
    assert noise_multiplier == pytest.approx(published, rel=1e-3)
    assert 0.999 * epsilon < epsilon_spent([Mechanism("x", RATE, noise_multiplier, STEPS)], 1e-5) <= epsilon


def test_epsilon_of_the_originals_noise_multiplier() -> None:
    # Its Renyi multiplier for epsilon 10, at its own q = 1/15, is really 9.29 (facts of the original work).
    assert epsilon_spent([Mechanism("x", 1 / 15, 2.488, 4500)], 1e-5) == pytest.approx(9.29, abs=0.02)


@pytest.mark.parametrize("noise_multiplier", [0.6, 1.0, 5.0])
def test_full_batch_step_against_the_exact_gaussian_mechanism(noise_multiplier: float) -> None:
    epsilon = epsilon_spent([Mechanism("x", 1.0, noise_multiplier, 1)], 1e-5)
    exact = gaussian_delta(epsilon, noise_multiplier)
    assert exact <= 1e-5  # never below the truth
    assert exact == pytest.approx(1e-5, rel=0.02)


@pytest.mark.parametrize(("epsilon", "warmup"), [(1.0, 4.0), (2.0, 2.05)])
def test_what_a_dear_warmup_leaves_is_spent(epsilon: float, warmup: float) -> None:
    """By the Renyi accountant, where a calibration begins, the warm-up alone is above epsilon: by PLD it is below."""
    others = [Mechanism("warm-up", 1.0, warmup, 1)]
    assert epsilon_spent(others, 1e-5) < epsilon < accounting.rough_epsilon(others, 1e-5)

    def spent(noise_multiplier: float) -> float:
        return epsilon_spent([*others, Mechanism("x", RATE, noise_multiplier, 732)], 1e-5)

    low, high = 1.0, 100.0
    while high / low > 1.0005:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if spent(middle) <= epsilon else (middle, high)
    assert calibrate_noise_multiplier(epsilon, 1e-5, RATE, 732, others=others) == pytest.approx(high, rel=1e-3)


@settings(max_examples=3, deadline=None)
@given(
    epsilon=st.floats(0.1, 5),  # larger ones take longer: below
    rate=st.floats(0.05, 1.0),
    steps=st.integers(5, 100),
    warmup=st.sampled_from([None, 20.0, 100.0]),
)
def test_calibration_never_passes_the_budget(epsilon: float, rate: float, steps: int, warmup: float | None) -> None:
    others = [] if warmup is None else [Mechanism("warm-up", 1.0, warmup, 1)]
    if epsilon_spent(others, 1e-6) >= epsilon:
        with pytest.raises(InputError, match="warm-up"):
            calibrate_noise_multiplier(epsilon, 1e-6, rate, steps, others=others)
        return
    noise_multiplier = calibrate_noise_multiplier(epsilon, 1e-6, rate, steps, others=others)
    assert epsilon_spent([*others, Mechanism("x", rate, noise_multiplier, steps)], 1e-6) <= epsilon
    tight = epsilon_spent([*others, Mechanism("x", rate, noise_multiplier * 0.999, steps)], 1e-6)
    assert tight > epsilon * (1 - 1e-4)  # and nothing is given away


def test_every_part_of_the_ledger_counts() -> None:
    base = epsilon_spent([Mechanism("x", 0.1, 2.0, 100)], 1e-5)
    assert epsilon_spent([Mechanism("x", 0.1, 2.0, 101)], 1e-5) > base
    assert epsilon_spent([Mechanism("x", 0.11, 2.0, 100)], 1e-5) > base
    assert epsilon_spent([Mechanism("x", 0.1, 1.9, 100)], 1e-5) > base
    assert epsilon_spent([Mechanism("x", 0.1, 2.0, 100), Mechanism("w", 1.0, 5.0, 1)], 1e-5) > base
    assert epsilon_spent([], 1e-5) == 0.0


def test_delta_is_held_against_the_number_of_images() -> None:
    assert accounting.default_delta(1497) == 1e-5
    assert accounting.default_delta(10_000) == 1e-5
    assert accounting.default_delta(10_001) == 1e-6
    assert accounting.default_delta(1_281_167) == 1e-8
    assert accounting.check_delta_for(1e-5, 1497) is None
    with pytest.raises(InputError, match=r"delta < 1/N = 1\.66667e-05 for 60000 images, got 1\.667e-05"):
        accounting.check_delta_for(1.667e-5, 60_000)
    assert "customary" in (accounting.check_delta_for(1e-5, 60_000) or "")
    with pytest.raises(InputError, match="publishing a whole image"):
        accounting.check_delta_for(1 / 1497, 1497)


def test_group_privacy_is_the_chain_of_single_changes() -> None:
    epsilon, delta = accounting.group_privacy(0.5, 1e-6, 3)
    # D0 -> D1 -> D2 -> D3, one record each: P(D0) <= e P(D1) + d <= e (e P(D2) + d) + d ...
    by_hand = 1e-6 * (1 + math.exp(0.5) + math.exp(1.0))
    assert epsilon == 1.5
    assert delta == pytest.approx(by_hand)


@pytest.mark.parametrize(
    "call",
    [
        lambda: calibrate_noise_multiplier(0.0, 1e-5, 0.1, 10),
        lambda: calibrate_noise_multiplier(math.nan, 1e-5, 0.1, 10),
        lambda: calibrate_noise_multiplier(1.0, 0.0, 0.1, 10),
        lambda: calibrate_noise_multiplier(1.0, 1e-5, 1.4, 10),
        lambda: calibrate_noise_multiplier(1.0, 1e-5, 0.1, 0),
        lambda: epsilon_spent([Mechanism("x", 0.1, 0.0, 1)], 1e-5),
        lambda: accounting.sampling_rate(5600, 4000),
    ],
)
def test_bad_arguments_are_named(call) -> None:
    with pytest.raises(InputError, match=r"^Expected "):
        call()


def test_a_group_beyond_all_floats_has_no_promise() -> None:
    assert group_privacy(150.0, 1e-5, 5) == (750.0, math.inf)
    assert group_privacy(math.inf, 1e-5, 2) == (math.inf, math.inf)


@pytest.mark.parametrize(
    ("epsilon", "delta", "rate", "steps", "warmup"),
    [
        (100.0, 1e-5, 0.9, 100_000, 0.11),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                (100.0, 1e-5, 1.0, 1000, None),
                (60.0, 1e-5, RATE, STEPS, None),
                (40.0, 1e-5, 1e-4, 1_000_000, None),
                (100.0, 1e-13, 0.33, 2, None),
                (100.0, 5e-9, 1e-3, 1_000_000, None),
                (99.0, 1e-5, 1e-9, 1, None),
                (100.0, 1e-5, 1e-3, 3, None),
                (100.0, 0.1, 1e-3, 1_000_000, None),
            )
        ),
    ],
)
def test_a_large_epsilon_is_calibrated_to_in_seconds_and_never_passed(
    epsilon: float, delta: float, rate: float, steps: int, warmup: float | None
) -> None:
    """Searching on a coarse grid, checking on the accountant's own."""
    others = [Mechanism("central images", 1.0, warmup, 1)] if warmup else []
    epsilon_spent([Mechanism("x", 0.5, 5.0, 2)], delta)  # loads the library
    start = time.process_time()
    found = calibrate_noise_multiplier(epsilon, delta, rate, steps, others=others)
    spent = epsilon_spent([*others, Mechanism("x", rate, found, steps)], delta)
    assert time.process_time() - start < 20  # half of it, where nothing else runs
    assert spent <= epsilon
    least = 0.97 if delta > 1e-12 else 0.8  # so much do the accountant's own answers jump at the smallest delta
    assert spent > least * epsilon or found < 0.1001  # no less noise is ever asked for


def test_a_coarser_grid_is_an_upper_bound_and_close(monkeypatch: pytest.MonkeyPatch) -> None:
    """The exact Gaussian mechanism lies below every grid's epsilon."""
    for noise in (0.3, 0.5, 1.0):
        for grid in (1e-4, 1e-3, 1e-2):
            monkeypatch.setattr(accounting, "_grid", lambda mechanisms, grid=grid: grid)
            found = epsilon_spent([Mechanism("x", 1.0, noise, 1)], 1e-5)
            assert gaussian_delta(found, noise) <= 1e-5
            assert gaussian_delta(found * (1 - 1e-3), noise) > 1e-5


@pytest.mark.parametrize(("noise", "rate", "steps"), [(0.1, 0.5, 1), (0.11, 1.0, 1), (5.0, 1.0, 10_000), (0.5, 0.1, 9)])
def test_the_grid_holds_all_losses_in_few_points(noise: float, rate: float, steps: int) -> None:
    """Of the published runs it is the finest; where noise is little, a power of two times that."""
    together = noise / math.sqrt(steps) if rate == 1 else noise
    grid = accounting._grid([Mechanism("x", rate, noise, steps)])
    largest = (1 + 16 * together) / (2 * together**2)
    assert largest / grid <= accounting.GRID_POINTS
    assert grid == 1e-4 or largest / grid > accounting.GRID_POINTS / 2
    assert accounting._grid([Mechanism("x", RATE, 2.3803, STEPS), Mechanism("y", 1.0, 5.0, 1)]) == 1e-4
