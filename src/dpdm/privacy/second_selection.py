"""A second opinion on epsilon where a private selection is among what was done; see ``second_accountant`` for the rest.

It shares no code with ``dp-accounting`` nor with ``accounting.py``, and imports numpy alone.

**One use.** With W and B as in ``second_accountant``, the Renyi divergence of order a > 1 is

    D_a(W, B) = ln E_B[(W / B)^a] / (a - 1),        D_a(B, W) = ln E_B[(W / B)^(1 - a)] / (a - 1),

and of the two the larger counts (removing a record, adding it). The expectations are integrals over the real line of
smooth functions that fall off like a Gaussian, for which the trapezoidal rule errs by e^(-c / h) (Trefethen and
Weideman 2014, "The exponentially convergent trapezoidal rule"): with 24 points per standard deviation by less than
rounding. Sums and series, as in ``dp-accounting``, are not used. Divergences add up over uses.

**Selecting** (Papernot and Steinke 2022, arXiv 2110.03620). If a single run has a divergence of at most r(a), then a
random number of runs, of which only the one of the best score is seen, has at most

    r(a) + (1 + s) min_b [(1 - 1/b) r(b) + ln(1/g) / b] + ln(m) / (a - 1)                            (theorem 2)

for a truncated negative binomial number of runs of mean m, shape s (0: logarithmic, 1: geometric) and parameter g, and

    r(a) + m d(a) + ln(m) / (a - 1),     where a single run is (ln(1 + 1/(a - 1)), d(a))-private      (theorem 6)

for a Poisson number of mean m.

**Back to (epsilon, delta)**: Canonne, Kamath and Steinke 2020 (arXiv 2004.00010), proposition 12. Every order is
valid by itself, so that a grid of orders loses tightness at most.
"""

import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from dpdm.errors import InputError
from dpdm.privacy.second_accountant import Uses, check_uses

ORDERS = 1 + np.geomspace(0.01, 1000.0, 1440)
POINTS_PER_DEVIATION = 24
TAIL = 14.0  # standard deviations beyond the outermost peak; e^(-98) lies outside
ROUNDING = 1e-9  # added to each divergence, relative
SHAPES = {"logarithmic": 0, "geometric": 1}
LARGEST_MEAN = 1000.0


class RepeatCount(Protocol):
    """How many runs there are; ``accounting.Repeats`` is one."""

    @property
    def mean_runs(self) -> float: ...

    @property
    def distribution(self) -> str: ...


class Selecting(Protocol):
    """``accounting.Selection`` is one."""

    @property
    def base(self) -> Sequence[Uses]: ...

    @property
    def repeats(self) -> RepeatCount: ...


def epsilon_with_selections(selections: Sequence[Selecting], others: Sequence[Uses], delta: float) -> float:
    """Returns an upper bound on epsilon of the composition of ``selections`` and ``others``, at ``delta``.

    Guarantee: as ``second_accountant.epsilon_upper_bound``; not tight, as no exact cost of a selection is known.

    Raises:
        InputError: if a number is out of the range for which this was made.
    """
    total = np.zeros(len(ORDERS))
    check_uses([*others, *(use for selection in selections for use in selection.base)], delta)
    for selection in selections:
        total += _selected(_divergences(selection.base), selection.repeats)
    total += _divergences(others)
    epsilons = total + np.log1p(-1 / ORDERS) - (math.log(delta) + np.log(ORDERS)) / (ORDERS - 1)
    return max(0.0, float(epsilons.min()))


def _selected(base: np.ndarray, repeats: RepeatCount) -> np.ndarray:
    """Returns the divergences (n,) of the selection from those of a single run, at ``ORDERS`` both."""
    mean = repeats.mean_runs
    if not 1 < mean <= LARGEST_MEAN:
        raise InputError(f"Expected 1 < mean_runs <= {LARGEST_MEAN:g} for the second accountant, got {mean:g}.")
    more = base + math.log(mean) / (ORDERS - 1)
    if repeats.distribution == "poisson":
        return more + mean * np.array([_delta_at(base, math.log(a / (a - 1))) for a in ORDERS])
    shape = SHAPES[repeats.distribution]
    again = (1 - 1 / ORDERS) * base - math.log(_parameter(mean, shape)) / ORDERS
    return more + (1 + shape) * again.min()


def _delta_at(base: np.ndarray, epsilon: float) -> float:
    """Returns delta for which divergences ``base`` mean (epsilon, delta)-privacy, by the same proposition 12.

    No delta is above the total variation distance, which is at most sqrt(1 - e^-D) with D the divergence of order 1
    (Bretagnolle and Huber 1979), or of any larger order.
    """
    logs = (ORDERS - 1) * (base - epsilon + np.log1p(-1 / ORDERS)) - np.log(ORDERS)
    return min(math.exp(min(0.0, float(logs.min()))), math.sqrt(-math.expm1(-float(base[0]))))


def _parameter(mean: float, shape: int) -> float:
    """Returns g in (0, 1): the geometric mean is 1 / g, the logarithmic (1/g - 1) / ln(1/g), solved by Newton."""
    if shape == 1:
        return 1 / mean
    t = math.log(2 * mean)  # ln(1/g): (e^t - 1) / t = m
    for _ in range(100):
        value = math.expm1(t) / t - mean
        t -= value / ((math.exp(t) - math.expm1(t) / t) / t)
    return math.exp(-t * (1 + 1e-12))  # a smaller g costs more


def _divergences(uses: Sequence[Uses]) -> np.ndarray:
    total = np.zeros(len(ORDERS))
    for use in uses:
        if use.num_steps:
            one = [max(_log_moment(use, a), _log_moment(use, 1 - a)) / (a - 1) for a in ORDERS]
            total += use.num_steps * np.array(one) * (1 + ROUNDING)
    return total


def _log_moment(use: Uses, power: float) -> float:
    """Returns ln E_B[(W / B)^power], by the trapezoidal rule."""
    q, sigma = use.sampling_rate, use.noise_multiplier
    low, high = min(0.0, power) - TAIL * sigma, max(1.0, power) + TAIL * sigma
    x, step = np.linspace(low, high, 2 + math.ceil((high - low) / sigma * POINTS_PER_DEVIATION), retstep=True)
    loss = (x - 0.5) / sigma**2
    if q < 1:
        loss = np.logaddexp(math.log1p(-q), math.log(q) + loss)
    exponents = power * loss - 0.5 * (x / sigma) ** 2
    top = float(exponents.max())
    density = np.exp(exponents - top).sum() * step / (sigma * math.sqrt(2 * math.pi))
    return max(0.0, top + math.log(density))
