"""Scores of an attack -> a lower bound on epsilon that holds with a stated probability. Imports no torch.

Two games. *Two worlds* (Nasr et al. 2023, arXiv 2302.07956): a mechanism is run many times without one record and many
times with it; each run gives a score that is larger where the record is more likely to be there. *One run* (Steinke,
Nasr, Jagielski 2023, arXiv 2305.08846): many records each take part by a fair coin in a single run, and are guessed.

All bounds are one-sided and exact for finitely many trials: nothing here rests on a normal approximation. Scores may
come from any attack. A weak attack gives a low bound, never a wrong one.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import betainc, betainccinv, betaincinv, expit, log_ndtr, ndtr, ndtri
from scipy.stats import binom

LARGEST_EPSILON = 700.0  # e^epsilon is still a float; larger ones are not told apart
LARGEST_MU = 30.0  # its epsilon is below that for every delta of use
PILOT = 5  # of two worlds, one in so many scores chooses a threshold and is then left out
QUANTILES = expit(np.linspace(-7.0, 7.0, 64))  # of the pilot, among which it chooses: many in both tails
GUESS_SHARES = (1.0, 0.5, 0.25, 0.125)  # of one run's canaries: how many are guessed, the surest first

Scores = NDArray[np.float64]


@dataclass(frozen=True)
class TwoWorldBound:
    """What the scores of two worlds prove; all of it holds together with the confidence that was asked for.

    Attributes:
        mu: the worlds are at least as far apart as those of the (subsampled) Gaussian mechanism whose sensitivity is mu
            standard deviations of its noise. 0 proves nothing.
        epsilon: of that mechanism, at delta. It is the audited mechanism's if that is of this family.
        epsilon_any: of any mechanism that has such scores, whatever its family.
    """

    mu: float
    epsilon: float
    epsilon_any: float


def two_world_bound(
    absent: Scores, present: Scores, *, sampling_rate: float, delta: float, confidence: float, middle: float
) -> TwoWorldBound:
    """Returns lower bounds from scores of independent trials in two worlds that differ in one record.

    Guarantee: with probability at least ``confidence``, over the mechanism's randomness, both of these hold.
    ``epsilon_any`` is at most the epsilon of *whatever* mechanism was run. And ``mu`` is at most 1 / noise multiplier
    if the mechanism is the Gaussian one, Poisson-subsampled at ``sampling_rate``, or one that is dominated by it (so
    also if its noise is larger or a gradient shorter). Each is computed at half the error probability (union bound).
    ``mu`` is ``mu_from_advantage`` at the threshold ``middle``, which is fixed before there are scores; for q < 1 it is
    the larger of that and ``mu_from_rates``, each again at half. The threshold for rates is chosen by a fifth of the
    scores, and the bound is computed from the others, which are independent of that choice.

    Args:
        absent: scores of the trials without the record, (n,).
        present: scores of the trials with it, (n,); larger where the record shows.
        sampling_rate: q in (0, 1] of the family for ``mu``.
        delta: in (0, 1).
        confidence: in (0.5, 1).
        middle: half-way between the two worlds' scores.

    Raises:
        ValueError: for fewer than 10 trials, unequal numbers of them, or a number out of range.
    """
    _check(delta, confidence)
    if not 0 < sampling_rate <= 1:
        raise ValueError(f"Expected 0 < sampling_rate <= 1, got {sampling_rate}.")
    if absent.shape != present.shape or absent.ndim != 1 or len(absent) < 10:
        raise ValueError(f"Expected two (n,) arrays of n >= 10 scores, got {absent.shape} and {present.shape}.")
    if not (np.isfinite(absent).all() and np.isfinite(present).all()):
        raise ValueError("Expected finite scores, got others.")
    error = (1 - confidence) / 2
    in_the_middle = _answers(absent, present, middle)
    if sampling_rate == 1:
        mu = mu_from_advantage(in_the_middle, 1.0, error)
    else:
        by_rates = _by_pilot(absent, present, lambda answers: mu_from_rates(answers, sampling_rate, error / 2))
        mu = max(mu_from_advantage(in_the_middle, sampling_rate, error / 2), by_rates)
    epsilon_any = _by_pilot(absent, present, lambda answers: epsilon_from_rates(answers, delta, error))
    return TwoWorldBound(mu, gaussian_epsilon(mu, delta, sampling_rate), epsilon_any)


@dataclass(frozen=True)
class Answers:
    """How often a threshold, fixed beforehand, answered "with".

    Attributes:
        num_false: in the trials without the record.
        num_true: in the trials with it.
        num_trials: n, of each world.
    """

    num_false: int
    num_true: int
    num_trials: int


def mu_from_advantage(answers: Answers, sampling_rate: float, error: float) -> float:
    """Returns a lower bound on mu from the number W of right answers in both worlds.

    The worlds of the mechanism are N(0, 1) and (1 - q) N(0, 1) + q N(mu, 1), at total variation distance
    q (2 Phi(mu/2) - 1), so that the mean probability p of a right answer is at most 1/2 + q (Phi(mu/2) - 1/2).
    The result is where this is the Clopper-Pearson bound on p from W right answers of 2n. It suits a threshold in the
    middle, where one number tells more than two.

    Guarantee: it passes mu with probability at most ``error``. Raising the probability of a right answer in a world
    only raises W, so let p be equal to its bound; then p >= 1/2. W is a sum of 2n independent variables, each 0 or 1,
    with mean 2n p, and P(W >= c) <= P(Binomial(2n, p) >= c) for c >= 2n p + 1 (Hoeffding 1956, "On the distribution of
    the number of successes in independent trials", theorem 5). The Clopper-Pearson bound passes p only if
    P(Binomial(2n, p) >= W) <= error < 1/4; since P(Binomial(2n, p) >= 2n p) > 1/4 (Greenberg and Mohri 2014, "Tight
    lower bound on the probability of a binomial exceeding its expectation"), such a W is at least 2n p + 1.

    Args:
        answers: W = num_true + n - num_false, n >= 2.
        sampling_rate: q in (0, 1].
        error: in (0, 0.25).

    Returns:
        mu, infinite where no subsampled Gaussian of rate q gives so many right answers.
    """
    right = answers.num_true + answers.num_trials - answers.num_false
    p = lower_probability(right, 2 * answers.num_trials, error)
    return _double_quantile(0.5 + (p - 0.5) / sampling_rate)


def mu_from_rates(answers: Answers, sampling_rate: float, error: float) -> float:
    """Returns a lower bound on mu from the rates of "with" in both worlds, by the mechanism's trade-off curve.

    The likelihood ratio of the worlds N(0, 1) and (1 - q) N(0, 1) + q N(mu, 1) rises with the score, so by Neyman and
    Pearson's lemma no test with false positive rate x has a true positive rate above

        G(x, mu) = (1 - q) x + q Phi(Phi^-1(x) + mu),

    the curve of the subsampled Gaussian mechanism itself (Dong, Roth, Su 2019, arXiv 1905.02383). The result solves
    y = G(x, mu) for mu, with Clopper-Pearson's upper bound for x and lower bound for y, each at error / 2.

    Guarantee: it passes mu with probability at most ``error``: where the bounds hold, y <= true rate of positives <=
    G(true rate of false ones, mu) <= G(x, mu), because G rises with x, and with mu.

    Args and returns as of ``mu_from_advantage``.
    """
    x, y = _cautious_rates(answers, error)
    if y <= x:
        return 0.0
    share = (y - (1 - sampling_rate) * x) / sampling_rate
    return math.inf if share >= 1 else max(0.0, float(ndtri(share) - ndtri(x)))


def epsilon_from_rates(answers: Answers, delta: float, error: float) -> float:
    """Returns a lower bound on the epsilon of any mechanism from the rates of "with" in both worlds.

    Guarantee: it passes the mechanism's epsilon at ``delta`` with probability at most ``error``. Let x and y be
    Clopper-Pearson's upper and lower bounds on the rates of false and true positives, each at error / 2. Differential
    privacy of the true rates means y' <= e^epsilon x' + delta and 1 - x' <= e^epsilon (1 - y') + delta (Kairouz, Oh,
    Viswanath 2015, arXiv 1311.0776); where the bounds hold, x and y satisfy both as well.

    Args:
        answers: see ``Answers``.
        delta: in (0, 1).
        error: in (0, 1).
    """
    x, y = _cautious_rates(answers, error)
    found = [0.0]
    for larger, smaller in ((y, x), (1 - x, 1 - y)):
        if larger > delta:
            found.append(math.log((larger - delta) / smaller))  # an upper bound of Clopper and Pearson is positive
    return max(found)


def gaussian_epsilon(mu: float, delta: float, sampling_rate: float = 1.0) -> float:
    """Returns epsilon at ``delta`` of one Gaussian mechanism, Poisson-subsampled, when a record is removed.

    For q = 1 it is the root e of Phi(mu/2 - e/mu) - exp(e) Phi(-mu/2 - e/mu) = delta (Balle and Wang 2018, arXiv
    1805.06530, theorem 8). For q < 1 the densities' ratio is 1 - q + q r, with r that of the unsampled mechanism, so
    that it passes exp(epsilon) exactly where r passes exp(e), exp(epsilon) = 1 + q (exp(e) - 1), and the same equation
    holds with delta / q. To *add* a record may ask for a larger epsilon, so this is a lower bound on that for both.

    Args:
        mu: sensitivity / noise standard deviation, >= 0.
        delta: in (0, 1).
        sampling_rate: q in (0, 1].
    """
    target, mu = delta / sampling_rate, min(mu, LARGEST_MU)
    if mu == 0 or 2 * float(ndtr(mu / 2)) - 1 <= target:
        return 0.0

    def excess(e: float) -> float:
        return float(ndtr(mu / 2 - e / mu) - math.exp(e + log_ndtr(-mu / 2 - e / mu))) - target

    root = LARGEST_EPSILON
    if excess(root) < 0:
        root = float(brentq(excess, 0.0, root, xtol=1e-10))  # type: ignore[arg-type]
    return math.log1p(sampling_rate * math.expm1(root))


@dataclass(frozen=True)
class OneRunBound:
    """What the guesses of one run prove.

    Attributes:
        epsilon: lower bound, at delta.
        num_guesses, num_right: of the share of canaries that gave it.
    """

    epsilon: float
    num_guesses: int
    num_right: int


def one_run_bound(scores: Scores, included: NDArray[np.bool_], *, delta: float, confidence: float) -> OneRunBound:
    """Returns a lower bound on epsilon from one run in which each canary took part by its own fair coin.

    The r/2 highest scores are guessed to have taken part, the r/2 lowest not, the others are left open.

    Guarantee: if the run is (epsilon, delta)-differentially private for adding or removing a canary, and the scores
    depend on the coins through the run's output alone, the result passes epsilon with probability at most 1 -
    confidence. For one r, fixed beforehand, it is the epsilon up to which ``one_run_p_value`` refutes; the few r that
    are tried share the error probability (union bound).

    Args:
        scores: (m,); larger where the canary shows.
        included: (m,), the coins.
        delta: in (0, 1).
        confidence: in (0.5, 1).

    Raises:
        ValueError: for fewer than 2 canaries, or a number out of range.
    """
    _check(delta, confidence)
    if scores.shape != included.shape or scores.ndim != 1 or len(scores) < 2:
        raise ValueError(f"Expected scores and coins of m >= 2 canaries, got {scores.shape} and {included.shape}.")
    if not np.isfinite(scores).all():
        raise ValueError("Expected finite scores, got others.")
    order = np.argsort(scores, kind="stable")
    best = OneRunBound(0.0, 0, 0)
    for share in GUESS_SHARES:
        half = max(1, int(share * len(scores) / 2))
        right = int((~included[order[:half]]).sum() + included[order[-half:]].sum())
        found = _unrefuted_epsilon(len(scores), 2 * half, right, delta, (1 - confidence) / len(GUESS_SHARES))
        if found > best.epsilon or best.num_guesses == 0:
            best = OneRunBound(found, 2 * half, right)
    return best


def one_run_p_value(num_canaries: int, num_guesses: int, num_right: int, epsilon: float, delta: float) -> float:
    """Returns the largest probability of at least so many right guesses under (epsilon, delta)-differential privacy.

    Steinke, Nasr, Jagielski 2023, theorem 5.2: with B ~ Binomial(r, e^epsilon / (1 + e^epsilon)),

        P(W >= v) <= P(B >= v) + 2 m delta max_{1 <= i <= v} P(v - i <= B < v) / i.

    Why: for delta = 0 look at the coins one after the other. Given the guesses and the coins before, a coin's odds are
    at most e^epsilon : 1, because its two values were equally likely and the output's probabilities under them differ
    by at most that factor. So each guess is right with probability at most e^epsilon / (1 + e^epsilon), whatever came
    before, and W is stochastically below B. With delta > 0 the odds may be higher on outputs of small probability. The
    theorem shows that this adds F right guesses, with E F <= 2 m delta; of all such F the one that helps most is i
    guesses with probability 2 m delta / i.

    Args:
        num_canaries: m, coins that were tossed.
        num_guesses: r <= m, fixed beforehand.
        num_right: v <= r.
        epsilon: >= 0.
        delta: in [0, 1).
    """
    if not 0 <= num_right <= num_guesses <= num_canaries:
        raise ValueError(f"Expected right <= guesses <= canaries, got {num_right}, {num_guesses}, {num_canaries}.")
    accuracy = 1 / (1 + math.exp(-epsilon))
    tail = float(betainc(num_right, num_guesses - num_right + 1, accuracy)) if num_right else 1.0  # P(B >= v)
    if delta == 0 or num_right == 0:
        return min(1.0, tail)
    below = np.cumsum(binom.pmf(np.arange(num_right - 1, -1, -1), num_guesses, accuracy))  # P(v - i <= B < v)
    failures = 2 * num_canaries * delta * float((below / np.arange(1, num_right + 1)).max())
    return min(1.0, tail + failures)


def lower_probability(successes: int, trials: int, error: float) -> float:
    """Returns the p with P(Binomial(trials, p) >= successes) = error: it passes the true one with at most this chance.

    Clopper and Pearson 1934, one-sided; 0 without successes.
    """
    return float(betaincinv(successes, trials - successes + 1, error)) if successes > 0 else 0.0


def upper_probability(successes: int, trials: int, error: float) -> float:
    """Returns the p with P(Binomial(trials, p) <= successes) = error; 1 if all succeeded. See ``lower_probability``."""
    return float(betainccinv(successes + 1, trials - successes, error)) if successes < trials else 1.0


def _answers(absent: Scores, present: Scores, threshold: float) -> Answers:
    return Answers(int((absent > threshold).sum()), int((present > threshold).sum()), len(absent))


def _cautious_rates(answers: Answers, error: float) -> tuple[float, float]:
    """Returns bounds on the rates of false positives (upper) and true ones (lower), both right but for ``error``."""
    return (
        upper_probability(answers.num_false, answers.num_trials, error / 2),
        lower_probability(answers.num_true, answers.num_trials, error / 2),
    )


def _double_quantile(p: float) -> float:
    """Returns the mu >= 0 with Phi(mu/2) = p."""
    return math.inf if p >= 1 else max(0.0, 2 * float(ndtri(p))) if p > 0 else 0.0


def _by_pilot(absent: Scores, present: Scores, bound: Callable[[Answers], float]) -> float:
    """Returns ``bound`` of the scores without the pilot's, at the threshold that is best for the pilot's."""
    size = max(1, len(absent) // PILOT)
    thresholds = np.quantile(np.concatenate([absent[:size], present[:size]]), QUANTILES)
    # The bound of so few scores is cautious where they say little, unlike a guess at the bound of all.
    best = max(thresholds, key=lambda threshold: bound(_answers(absent[:size], present[:size], threshold)))
    return bound(_answers(absent[size:], present[size:], best))


def _unrefuted_epsilon(num_canaries: int, num_guesses: int, num_right: int, delta: float, error: float) -> float:
    """Returns the smallest epsilon, to 1e-6, under which so many right guesses are not too unlikely."""

    def refuted(epsilon: float) -> bool:
        return one_run_p_value(num_canaries, num_guesses, num_right, epsilon, delta) <= error

    if not refuted(0.0):
        return 0.0
    low, high = 0.0, 1.0
    while refuted(high):
        low, high = high, 2 * high
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low


def _check(delta: float, confidence: float) -> None:
    if not 0 < delta < 1:
        raise ValueError(f"Expected 0 < delta < 1, got {delta}.")
    if not 0.5 < confidence < 1:
        raise ValueError(f"Expected 0.5 < confidence < 1, got {confidence}.")
