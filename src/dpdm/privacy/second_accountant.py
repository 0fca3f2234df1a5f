"""A second opinion on epsilon, for ``dpdm verify``: shares no code with ``dp-accounting`` nor with ``accounting.py``.

For two neighbouring inputs let P and Q be the distributions of what one use of a mechanism shows; its *privacy loss* is
L = ln dP/dQ under P. Losses of several uses add up, to S, and

    delta(epsilon) = E[max(0, 1 - e^(epsilon - S))]                 (Koskela et al. 2020, arXiv 1906.03049).

**The pair.** For the Gaussian mechanism of sensitivity 1 and noise sigma on a Poisson sample of rate q, one record is
never easier to see than between W = (1 - q) N(0, sigma^2) + q N(1, sigma^2) with it and B = N(0, sigma^2) without it,
and so for adaptive compositions (Zhu, Dong and Wang 2022, arXiv 2106.08567). Removing it is (P, Q) = (W, B), adding it
is (B, W); epsilon is the larger of the two.

**Every rounding is upward.** ln dW/dB rises along the real line: cut the line into bins where it passes a multiple of a
step h. Split each bin with its masses (w, b) into two outcomes of ratios e^(ih) and e^((i+1)h), so that both masses are
kept. Whoever merges the two outcomes has the original again, so the original is post-processing of the split one, use
by use and in compositions: the split one is never more private. Likewise all that is below the lowest bin becomes an
outcome at its edge and one that only B has, all above the highest bin one at its edge and one that only W has (infinite
loss). So what is computed is at least the true delta for every h, which decides by how much alone: the variance of a
use's loss grows by about h^2 / 6. (That masses are kept at both ends is the idea of "connect the dots", Doroshenko et
al. 2022, arXiv 2207.04380; the argument here needs no more than post-processing.)

**The composition** is a convolution, by Fourier transforms on a ring of multiples of h. Before it the masses are
multiplied by e^(theta L) and normalised (Esscher's tilting), with theta from Chernoff's bound, so that the ring's mass
is around the epsilon that is looked for, and rounding is relative to delta however small it is. What wraps around the
ring from below is counted too high, never too low. What lies above the ring is bounded by Chernoff, the rounding of the
transforms by its usual first-order bound, and both are added.

Imports numpy alone (the normal distribution is the C library's erfc): no torch, no scipy.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from dpdm.errors import InputError

FINENESS = 1 / 16  # the first step h, as a share of the root mean square of a use's loss
SETTLED = 5e-4  # h is fine enough once its half lowers epsilon by less, relative
MAX_BINS = 2**20  # of one use
MAX_RING = 2**22
TAIL_SHARE = 1e-7  # of delta, at most, lies beyond the bins of all uses together
RING_DEVIATIONS, RING_TILTS = 12.0, 40.0  # half of the ring: 12 standard deviations and 40 / theta
# Within these nothing overflows and the answer takes seconds.
NOISE_MULTIPLIERS = (0.05, 1e6)
SAMPLING_RATES = (1e-9, 1.0)
DELTAS = (1e-100, 0.1)
MAX_STEPS = 10_000_000


class Uses(Protocol):
    """``num_steps`` uses of the Gaussian mechanism on Poisson samples; ``accounting.Mechanism`` is one."""

    @property
    def sampling_rate(self) -> float: ...

    @property
    def noise_multiplier(self) -> float: ...

    @property
    def num_steps(self) -> int: ...


@dataclass(frozen=True)
class _Outcomes:
    """One use, in outcomes of W / B = e^(index h), index = first, first + 1, ...; see the module's head.

    Attributes:
        first: index of the lowest outcome.
        masses: (n,) what W has of each; B has e^(-index h) of it.
        only_w, only_b: what is left of W and of B.
    """

    first: int
    masses: np.ndarray
    only_w: float
    only_b: float


@dataclass(frozen=True)
class _Losses:
    """``count`` uses in one direction: masses (n,) of losses that are ``indices`` (n,) times h, the rest infinite."""

    indices: np.ndarray
    masses: np.ndarray
    infinite: float
    count: int


def epsilon_upper_bound(mechanisms: Sequence[Uses], delta: float) -> float:
    """Returns an upper bound on epsilon of the adaptive composition of all ``mechanisms``, at ``delta``.

    Guarantee: never below the smallest true epsilon for adding or removing one record (see the module's head; the
    masses of outcomes are float64 numbers, exact to about 1e-10). Above it by less than 0.1 %, where it is above 0.01.

    Args:
        mechanisms: in any order; none, or none with a step, gives 0.
        delta: in [1e-100, 0.1].

    Raises:
        InputError: if a number is out of the range for which this was made.
    """
    check_uses(mechanisms, delta)
    used = [m for m in mechanisms if m.num_steps > 0]
    if not used:
        return 0.0
    total = sum(m.num_steps for m in used)
    # Beyond z standard deviations a use has less than e^(-z^2 / 2) / 2.
    z = math.sqrt(2 * math.log(total / (2 * TAIL_SHARE * delta)))
    finest = max((_loss(m, 1 + z * m.noise_multiplier) - _loss(m, -z * m.noise_multiplier)) for m in used) / MAX_BINS
    step = max(finest, FINENESS * math.sqrt(sum(m.num_steps * _mean_square(m) for m in used) / total))
    epsilon = _epsilon(used, delta, step, z)
    while step > finest:
        step = max(finest, step / 2)
        coarser, epsilon = epsilon, _epsilon(used, delta, step, z)
        if math.isfinite(epsilon) and epsilon >= coarser * (1 - SETTLED):
            break
    return epsilon


def check_uses(mechanisms: Sequence[Uses], delta: float) -> None:
    """Raises InputError if a number is out of the range for which the second accountants were made."""
    values = [("delta", delta, DELTAS)]
    for mechanism in mechanisms:
        values.append(("noise_multiplier", mechanism.noise_multiplier, NOISE_MULTIPLIERS))
        values.append(("sampling_rate", mechanism.sampling_rate, SAMPLING_RATES))
    values.append(("num_steps", sum(m.num_steps for m in mechanisms), (0, MAX_STEPS)))
    for name, value, (low, high) in values:
        if not low <= value <= high:
            raise InputError(f"Expected {low:g} <= {name} <= {high:g} for the second accountant, got {value:g}.")


def _epsilon(used: Sequence[Uses], delta: float, step: float, z: float) -> float:
    """Returns the larger epsilon of the two directions, with losses in multiples of ``step``."""
    removing, adding = [], []
    for mechanism in used:
        o = _outcomes(mechanism, step, z)
        indices = o.first + np.arange(len(o.masses))
        removing.append(_Losses(indices, o.masses, o.only_w, mechanism.num_steps))
        adding.append(_Losses(-indices, o.masses * np.exp(-step * indices), o.only_b, mechanism.num_steps))
    return max(_compose(removing, delta, step), _compose(adding, delta, step))


def _loss(mechanism: Uses, x: float) -> float:
    """Returns ln dW/dB at x: ln(1 - q + q e^((2 x - 1) / (2 sigma^2)))."""
    q, full_batch = mechanism.sampling_rate, (2 * x - 1) / (2 * mechanism.noise_multiplier**2)
    return full_batch if q == 1 else math.log1p(q * math.expm1(full_batch))


def _mean_square(mechanism: Uses) -> float:
    """Returns about what a use's squared loss is on average; decides how fine the first step is, and nothing else."""
    inverse = mechanism.noise_multiplier**-2
    return min(inverse, mechanism.sampling_rate**2 * math.expm1(inverse))


def _outcomes(mechanism: Uses, step: float, z: float) -> _Outcomes:
    """Returns one use's outcomes; what is beyond ``z`` standard deviations is put at the ends."""
    q, sigma = mechanism.sampling_rate, mechanism.noise_multiplier
    first = math.floor(_loss(mechanism, -z * sigma) / step)
    last = math.ceil(_loss(mechanism, 1 + z * sigma) / step)
    ratios = step * np.arange(first, last + 1)
    if q == 1:
        edges = 0.5 + sigma**2 * ratios
    else:  # ratios from 1 - q on; e^ratio - (1 - q) without cancellation
        lowest = math.log1p(-q)
        reached = ratios > lowest
        rest = np.expm1(np.where(reached, ratios - lowest, 1.0)) * ((1 - q) / q)
        edges = np.where(reached, 0.5 + sigma**2 * np.log(rest), -np.inf)
    b = _normal_masses(edges / sigma)  # below the lowest edge, the bins, above the highest edge
    shifted = _normal_masses((edges - 1) / sigma)
    w = (1 - q) * b + q * shifted
    # The part of a bin's w that goes to its upper end, so that b is kept: (w - b e^low) / (1 - e^-h).
    up = (q * shifted[1:-1] - (np.expm1(ratios[:-1]) + q) * b[1:-1]) / -math.expm1(-step)
    up = np.clip(up, 0.0, w[1:-1])
    masses = np.zeros(len(ratios))
    masses[:-1] += w[1:-1] - up
    masses[1:] += up
    masses[0] += w[0]
    masses[-1] += b[-1] * math.exp(ratios[-1])
    only_w = max(0.0, w[-1] - b[-1] * math.exp(ratios[-1]))
    only_b = max(0.0, b[0] - w[0] * math.exp(-ratios[0]))
    return _Outcomes(first, masses, float(only_w), float(only_b))


def _normal_masses(edges: np.ndarray) -> np.ndarray:
    """Returns what the standard normal distribution has below, between and above rising ``edges`` (n,): (n + 1,)."""
    edges = np.concatenate([[-np.inf], edges, [np.inf]])
    beyond = 0.5 * np.array([math.erfc(t) for t in (np.abs(edges) / math.sqrt(2)).tolist()])
    low, high = edges[:-1], edges[1:]
    # Differences of tails, on the side where they are small.
    masses = np.where(low >= 0, beyond[:-1] - beyond[1:], beyond[1:] - beyond[:-1])
    return np.where((low < 0) & (high > 0), 1 - beyond[:-1] - beyond[1:], masses)


def _compose(parts: Sequence[_Losses], delta: float, step: float) -> float:
    """Returns the smallest epsilon with delta(epsilon) <= ``delta``, upward, of all parts' uses; or infinity."""
    infinite = sum(part.count * part.infinite for part in parts)
    tilt = _chernoff(parts, delta, step)
    log_mgf, mean, deviation = _tilted_sum(parts, tilt, step)
    half = RING_DEVIATIONS * deviation + RING_TILTS / tilt
    size = min(MAX_RING, 2 ** math.ceil(math.log2(max(2 * half / step, 16))))
    bottom = math.floor(mean / step) - size // 2
    losses = step * (bottom + np.arange(size))
    masses, rounding = _ring(parts, tilt, step, size)
    masses = np.roll(masses, -(bottom % size))
    above = math.exp(min(log_mgf - tilt * step * (bottom + size), 0.0))  # Chernoff's bound on P(S >= end of the ring)
    with np.errstate(over="ignore"):
        weights = np.exp(log_mgf - tilt * losses) * (np.maximum(masses, 0.0) + rounding)

    def delta_at(epsilon: float) -> float:
        start = np.searchsorted(losses, epsilon, side="right")
        return infinite + above + float(np.dot(-np.expm1(epsilon - losses[start:]), weights[start:]))

    low, high = max(0.0, float(losses[0])), float(losses[-1])
    if delta_at(low) <= delta:
        return low
    if high <= low or delta_at(high) > delta:  # infinite losses alone pass delta: no epsilon would do
        return math.inf
    while high - low > 1e-6 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if delta_at(middle) <= delta else (middle, high)
    return high


def _chernoff(parts: Sequence[_Losses], delta: float, step: float) -> float:
    """Returns about the theta > 0 for which (ln E e^(theta S) + ln 1/delta) / theta is smallest; any would be valid.

    Where it is smallest the tilted mean of S is the bound itself: theta K' - K = ln 1/delta, which rises with theta.
    """

    def excess(tilt: float) -> float:
        log_mgf, mean, _ = _tilted_sum(parts, tilt, step)
        return tilt * mean - log_mgf + math.log(delta)

    low, high = 1e-6, 1.0
    while excess(high) < 0 and high * step < 30:
        low, high = high, 2 * high
    while high / low > 1.02:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if excess(middle) >= 0 else (middle, high)
    return high


def _tilted_sum(parts: Sequence[_Losses], tilt: float, step: float) -> tuple[float, float, float]:
    """Returns ln E e^(tilt S) over finite S, and mean and standard deviation of S under the tilted distribution."""
    log_mgf = mean = variance = 0.0
    for part in parts:
        tilted, scale = _tilted(part, tilt, step)
        total = float(tilted.sum())
        one = float(np.dot(tilted, part.indices)) / total
        two = float(np.dot(tilted, (part.indices - one) ** 2)) / total
        log_mgf += part.count * (math.log(total) + scale)
        mean += part.count * step * one
        variance += part.count * step**2 * two
    return log_mgf, mean, math.sqrt(variance)


def _tilted(part: _Losses, tilt: float, step: float) -> tuple[np.ndarray, float]:
    """Returns masses times e^(tilt loss - scale), of which the largest is about 1, and the scale."""
    with np.errstate(divide="ignore"):
        exponents = np.log(part.masses) + tilt * step * part.indices
    scale = float(exponents.max())
    return np.exp(exponents - scale), scale


def _ring(parts: Sequence[_Losses], tilt: float, step: float, size: int) -> tuple[np.ndarray, float]:
    """Returns the tilted distribution of S on a ring, (size,) from index 0 on, and a bound on the rounding of each.

    A transform's error is at most about 4 u log2(n) times its input's norm, u = 2^-53 (Higham 2002, "Accuracy and
    Stability of Numerical Algorithms", theorem 24.2); the power multiplies that of a use by how often it is used.
    """
    product = np.ones(size // 2 + 1, complex)
    error = 1.0
    for part in parts:
        tilted, _ = _tilted(part, tilt, step)
        tilted /= tilted.sum()
        use = np.bincount(part.indices % size, weights=tilted, minlength=size)
        product *= _power(np.fft.rfft(use), part.count)
        error += part.count * float(np.linalg.norm(use))
    return np.fft.irfft(product, size), 8 * 2.0**-53 * math.log2(size) * error


def _power(values: np.ndarray, exponent: int) -> np.ndarray:
    """Returns integer powers by squaring: no logarithm whose angle would have to be exact."""
    result = np.ones_like(values)
    while exponent:
        if exponent & 1:
            result = result * values
        values = values * values
        exponent >>= 1
    return result
