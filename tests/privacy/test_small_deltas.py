"""Epsilon at deltas so small that the accountant's own rounding would show, against exact values; small epsilons.

The exact delta is a contour integral of the moment function of the privacy loss L, M(z) = E[e^(z L)]:

    delta(epsilon) = 1 / (2 pi i) int e^(-epsilon z) M(z) / (z (z + 1)) dz      along Re z = theta > 0,

the inverse Laplace transform of E[max(0, 1 - e^(epsilon - S))]. M of one use is an integral over the real line by the
trapezoidal rule. No Fourier transform of masses, no grid of losses: nothing of what the accountants do.
"""

import math

import numpy as np
import pytest
from scipy.optimize import brentq, minimize_scalar
from tests.privacy.test_accounting import gaussian_delta

from dpdm.errors import InputError
from dpdm.privacy.accounting import Mechanism, calibrate_noise_multiplier, epsilon_spent

POINTS_PER_DEVIATION, TAIL = 32, 40
RUNS = [(0.0683, 2.38, 4394), (0.003543, 0.6, 14314), (0.01, 5.0, 100_000)]


class Loss:
    """The privacy loss of ``num_steps`` uses, removing a record or adding it."""

    def __init__(self, rate: float, sigma: float, num_steps: int, *, adding: bool) -> None:
        x = np.linspace(-TAIL * sigma, 1 + TAIL * sigma, 2 * TAIL * POINTS_PER_DEVIATION)
        log_b = -0.5 * (x / sigma) ** 2 - math.log(sigma * math.sqrt(2 * math.pi)) + math.log(x[1] - x[0])
        ratio = np.logaddexp(math.log1p(-rate), math.log(rate) + (x - 0.5) / sigma**2)
        self.log_masses, self.losses = (log_b, -ratio) if adding else (log_b + ratio, ratio)
        self.num_steps = num_steps

    def log_moments(self, theta: float, t: np.ndarray) -> tuple[float, float, float, np.ndarray]:
        """Returns ln M(theta), mean and variance of the tilted sum, and ln of M(theta + it) / M(theta) around it."""
        exponents = self.log_masses + theta * self.losses
        top = float(exponents.max())
        masses = np.exp(exponents - top)
        used = masses > 1e-22
        masses, losses = masses[used], self.losses[used]
        total = float(masses.sum())
        masses /= total
        mean = float(masses @ losses)
        rest = losses - mean
        turned = np.array([np.log((masses * np.exp(1j * angle * rest)).sum()) for angle in t])
        n = self.num_steps
        return n * (top + math.log(total)), n * mean, n * float(masses @ rest**2), n * turned


def exact_delta(loss: Loss, epsilon: float) -> float:
    def bound(log_theta: float) -> float:
        theta = math.exp(log_theta)
        return loss.log_moments(theta, np.zeros(0))[0] - theta * epsilon - math.log(theta) - math.log1p(theta)

    theta = math.exp(minimize_scalar(bound, bounds=(math.log(1e-2), math.log(1e4)), method="bounded").x)  # type: ignore[attr-defined]
    log_moment, mean, variance, _ = loss.log_moments(theta, np.zeros(0))
    deviation = math.sqrt(variance)
    step = min(1 / deviation, theta) / 12
    t = np.arange(0.5, 9 / deviation / step) * step
    z = theta + 1j * t
    turned = np.exp(loss.log_moments(theta, t)[3] + 1j * t * (mean - epsilon)) / (z * (z + 1))
    return math.exp(log_moment - theta * epsilon) * float(turned.real.sum()) * step / math.pi


def exact_epsilon(rate: float, sigma: float, num_steps: int, delta: float, near: float) -> float:
    found = []
    for adding in (False, True):
        loss = Loss(rate, sigma, num_steps, adding=adding)
        if exact_delta(loss, 0.8 * near) > delta:  # else this direction's epsilon is far below the other's
            gap = lambda epsilon, loss=loss: math.log(exact_delta(loss, epsilon) / delta)  # noqa: E731
            found.append(brentq(gap, 0.8 * near, 1.2 * near, xtol=1e-8))
    return float(max(found))  # type: ignore[arg-type]


def test_the_oracle_against_the_closed_form() -> None:
    """30 full batches with noise 10 are one with noise 10 / sqrt(30)."""
    sigma = 10 / math.sqrt(30)
    epsilon = exact_epsilon(1 - 1e-13, 10.0, 30, 1e-9, near=3.7)
    assert math.isclose(gaussian_delta(epsilon, sigma), 1e-9, rel_tol=1e-5)


@pytest.mark.parametrize(("rate", "sigma", "num_steps"), RUNS)
def test_epsilon_is_an_upper_bound_down_to_the_smallest_delta(rate: float, sigma: float, num_steps: int) -> None:
    """And pays for the accountant's rounding, which may be half of that delta."""
    mechanism = Mechanism("DP-SGD", rate, sigma, num_steps)
    delta = 1.001 * 20 * 2.0**-53 * num_steps / 0.5
    spent = epsilon_spent([mechanism], delta)
    assert spent >= exact_epsilon(rate, sigma, num_steps, 0.7 * delta, near=spent)
    assert spent <= 1.01 * exact_epsilon(rate, sigma, num_steps, 0.5 * delta, near=spent)


@pytest.mark.parametrize(("rate", "sigma", "num_steps"), RUNS)
def test_a_delta_that_rounding_would_swallow_is_refused(rate: float, sigma: float, num_steps: int) -> None:
    """At 1e-13 the accountant alone said 16.35 for a true 16.48."""
    with pytest.raises(InputError, match=r"Expected delta >= .*e-\d+ for so many steps, got 1e-1[13]"):
        epsilon_spent([Mechanism("DP-SGD", rate, sigma, num_steps)], 1e-11 if num_steps > 4394 else 1e-13)


def test_full_batches_alone_are_added_up_exactly_at_any_delta() -> None:
    spent = epsilon_spent([Mechanism("x", 1.0, 10.0, 30)], 1e-13)
    assert gaussian_delta(spent, 10 / math.sqrt(30)) <= 1e-13


@pytest.mark.parametrize(
    ("epsilon", "delta", "rate", "num_steps", "warmup"),
    [
        (0.02, 1e-5, 1000 / 60_000, 100, ()),
        (0.01, 1e-5, 1000 / 60_000, 100, ()),
        (0.02, 1e-7, 4096 / 1_300_000, 1000, ()),
        (0.02, 1e-5, 4096 / 60_000, 732, ()),
        (0.015, 1e-4, 256 / 1497, 200, ()),
        (0.001, 1e-5, 1000 / 60_000, 5000, ()),
        (0.02, 1e-7, 4096 / 1_000_000, 1000, (480.0, 380.0)),  # which cost half of it
    ],
)
def test_a_small_epsilon_takes_no_more_noise_than_it_must(
    epsilon: float, delta: float, rate: float, num_steps: int, warmup: tuple[float, ...]
) -> None:
    """Renyi divergences, where the search begins, say nothing of such epsilons: it once ended 100 times too high."""
    others = [Mechanism("warm-up", 1.0, noise, 1) for noise in warmup]
    sigma = calibrate_noise_multiplier(epsilon, delta, rate, num_steps, others=others)
    spent = epsilon_spent([*others, Mechanism("DP-SGD", rate, sigma, num_steps)], delta)
    assert not others or epsilon_spent(others, delta) > 0.4 * epsilon
    assert 0.99 * epsilon < spent <= epsilon
