"""Private selection: its cost against exact distributions, the number of runs, and what is kept."""

import json
import math
from collections.abc import Callable
from decimal import Decimal, localcontext
from fractions import Fraction

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.optimize import brentq
from scipy.stats import norm

from dpdm.errors import InputError
from dpdm.privacy import accounting, selection
from dpdm.privacy.accounting import (
    Distribution,
    Mechanism,
    Repeats,
    Selection,
    calibrate_noise_multiplier,
    epsilon_spent,
    spend_from,
)
from dpdm.privacy.noise import derive_key, test_key
from dpdm.privacy.second_selection import _log_moment, epsilon_with_selections
from dpdm.privacy.selection import draw_number_of_runs, repeat_and_select

DISTRIBUTIONS: tuple[Distribution, ...] = ("logarithmic", "geometric", "poisson")
DELTA = 1e-5


def select(mean: float, distribution: Distribution, *base: Mechanism) -> Selection:
    return Selection("private selection", base, Repeats(mean, distribution))


def gaussian(noise_multiplier: float, steps: int = 1, sampling_rate: float = 1.0) -> Mechanism:
    return Mechanism("x", sampling_rate, noise_multiplier, steps)


def gamma_of(mean: float) -> float:
    """The logarithmic distribution's parameter, by a root finder."""
    return float(brentq(lambda g: (1 / g - 1) / math.log(1 / g) - mean, 1e-9, 1 - 1e-9))  # type: ignore[arg-type]


def masses(repeats: Repeats, count: int) -> np.ndarray:
    """P(K = 0), P(K = 1), ..., from the definitions."""
    k = np.arange(count)
    if repeats.distribution == "poisson":
        return np.exp(-repeats.mean_runs + k * math.log(repeats.mean_runs) - [math.lgamma(n + 1) for n in k])
    if repeats.distribution == "geometric":
        g = 1 / repeats.mean_runs
        return np.where(k > 0, g * (1 - g) ** (k - 1.0), 0)
    g = gamma_of(repeats.mean_runs)
    return np.where(k > 0, (1 - g) ** k / (np.maximum(k, 1) * math.log(1 / g)), 0)


def exact_epsilon(noise_multiplier: float, repeats: Repeats, delta: float) -> float:
    """The smallest true epsilon of the largest of K draws of N(0, s^2) or N(1, s^2): what is seen is a score alone.

    Its density is E[K F(y)^(K-1)] f(y), and nothing is seen with probability P(K = 0), whatever the data.
    """
    k = np.arange(400)
    y, step = np.linspace(-9 * noise_multiplier, 1 + 9 * noise_multiplier, 20_001, retstep=True)
    slope = np.polynomial.Polynomial((masses(repeats, 400) * k)[1:])  # sum of P(K = k) k s^(k - 1)

    def density(mean: float) -> np.ndarray:
        z = (y - mean) / noise_multiplier
        return slope(norm.cdf(z)) * norm.pdf(z) / noise_multiplier

    def solve(first: np.ndarray, second: np.ndarray) -> float:
        def excess(epsilon: float) -> float:
            return float(np.maximum(0.0, first - math.exp(epsilon) * second).sum() * step) - delta

        return float(brentq(excess, 0.0, 30.0))  # type: ignore[arg-type]

    return max(solve(density(1.0), density(0.0)), solve(density(0.0), density(1.0)))


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_epsilon_is_never_below_that_of_the_largest_of_some_gaussians(distribution: Distribution) -> None:
    """The bound is for every mechanism; for this one it is known what is right."""
    selection = select(6.0, distribution, gaussian(1.0))
    exact = exact_epsilon(1.0, selection.repeats, 1e-3)
    single = epsilon_spent([gaussian(1.0)], 1e-3)
    assert single < exact
    for found in (epsilon_spent([selection], 1e-3), epsilon_with_selections([selection], [], 1e-3)):
        assert exact <= found <= 3 * exact


@pytest.mark.parametrize(("mean", "delta"), [(1.5, 1e-5), (3.0, 1e-5), (20.0, 1e-8)])
def test_theorem_2_in_closed_form(mean: float, delta: float) -> None:
    """Of full batches r(a) = c a, and so all minima are known: min_b is at b = sqrt(ln(1/g) / c)."""
    c = 30 / (2 * 8.0**2)
    cases: list[tuple[Distribution, int, float]] = [("geometric", 1, 1 / mean), ("logarithmic", 0, gamma_of(mean))]
    for distribution, shape, g in cases:
        b = max(1.0, math.sqrt(math.log(1 / g) / c))
        constant = (1 + shape) * ((1 - 1 / b) * c * b + math.log(1 / g) / b)
        a = np.linspace(1.01, 400, 200_000)
        bound = c * a + constant + math.log(mean) / (a - 1)
        expected = float((bound + np.log1p(-1 / a) - np.log(delta * a) / (a - 1)).min())
        selection = select(mean, distribution, gaussian(8.0, 30))
        assert epsilon_spent([selection], delta) == pytest.approx(expected, rel=4e-3)
        assert epsilon_with_selections([selection], [], delta) == pytest.approx(expected, rel=5e-4)


def test_theorem_6_by_a_fine_grid() -> None:
    """Of full batches r(a) = c a; delta at ln(1 + 1/(a - 1)) by the same conversion as epsilon, on a finer grid."""
    c, mean, delta = 30 / (2 * 8.0**2), 20.0, 1e-5
    b = np.linspace(1.01, 400, 20_000)
    found = math.inf
    for a in np.linspace(1.05, 30, 600):
        logs = (b - 1) * (c * b - math.log(a / (a - 1)) + np.log1p(-1 / b)) - np.log(b)
        bound = c * a + mean * math.exp(min(0.0, logs.min())) + math.log(mean) / (a - 1)
        found = min(found, bound + math.log1p(-1 / a) - math.log(delta * a) / (a - 1))
    selection = select(mean, "poisson", gaussian(8.0, 30))
    assert epsilon_spent([selection], delta) == pytest.approx(found, rel=4e-3)
    assert epsilon_with_selections([selection], [], delta) == pytest.approx(found, rel=1e-3)


@pytest.mark.parametrize(("q", "sigma"), [(0.2, 1.3), (0.01, 0.5), (0.9, 20.0), (1.0, 2.0)])
def test_moments_against_the_binomial_sum(q: float, sigma: float) -> None:
    """Of integer orders E[(W/B)^a] is a sum of a + 1 terms."""
    for a in range(2, 12):
        total = sum(
            math.comb(a, k)
            * Fraction(1 - q) ** (a - k)
            * Fraction(q) ** k
            * Fraction(math.exp(k * (k - 1) / 2 / sigma**2))
            for k in range(a + 1)
        )
        assert _log_moment(gaussian(sigma, 1, q), a) == pytest.approx(math.log(total), rel=1e-9)


def test_moments_of_the_other_direction_against_a_quadrature() -> None:
    q, sigma = 0.3, 0.9

    def integrand(x: float, power: float) -> float:
        return float(norm.pdf(x / sigma) / sigma * (1 - q + q * math.exp((2 * x - 1) / 2 / sigma**2)) ** power)

    for power in (-0.5, -3.0, -12.0, 1.25, 3.5):
        exact = math.log(quad(integrand, -15, 25, args=(power,), points=[0, 1, 3], limit=200)[0])
        assert _log_moment(gaussian(sigma, 1, q), power) == pytest.approx(exact, rel=1e-7)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize(
    "base",
    [
        (gaussian(2.5, 200, 0.25), gaussian(15.0)),
        (gaussian(11.0, 732, 0.068), gaussian(100.0), gaussian(100.0)),
        (gaussian(0.7, 500, 0.01),),
        (gaussian(4.0, 3),),
    ],
)
def test_both_accountants_agree(base: tuple[Mechanism, ...], distribution: Distribution) -> None:
    """The first is looser where its series of fractional orders are; the second is at most 0.1 % above it."""
    selection, beside = select(3.0, distribution, *base), [gaussian(9.0)]
    first = epsilon_spent([selection, *beside], DELTA)
    second = epsilon_with_selections([selection], beside, DELTA)
    assert 0.85 * first <= second <= first * 1.001


def test_everything_about_a_selection_counts() -> None:
    base = (gaussian(3.0, 20, 0.2), gaussian(20.0))
    one = select(3.0, "geometric", *base)
    for epsilon in (
        lambda s: epsilon_spent(s, DELTA),
        lambda s: epsilon_with_selections([x for x in s if isinstance(x, Selection)], [], DELTA),
    ):
        cost = epsilon([one])
        assert epsilon([select(4.0, "geometric", *base)]) > cost
        assert epsilon([select(3.0, "logarithmic", *base)]) < cost
        assert epsilon([select(3.0, "geometric", *base, gaussian(5.0))]) > cost
        assert epsilon([one, one]) > cost
        assert cost > epsilon_spent(base, DELTA)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_calibration_pays_for_all_runs(distribution: Distribution) -> None:
    others, repeats = (gaussian(30.0), gaussian(40.0)), Repeats(3.0, distribution)
    sigma = calibrate_noise_multiplier(4.0, DELTA, 0.2, 30, others=others, repeats=repeats)

    def spent(noise_multiplier: float) -> float:
        base = (*others, Mechanism("DP-SGD", 0.2, noise_multiplier, 30))
        return epsilon_spent([Selection("private selection", base, repeats)], DELTA)

    assert 4.0 * 0.999 < spent(sigma) <= 4.0
    assert spent(0.99 * sigma) > 4.0
    with pytest.raises(InputError, match=r"cost less than epsilon=1\.0"):
        calibrate_noise_multiplier(1.0, DELTA, 0.2, 30, others=(gaussian(2.0),), repeats=repeats)


def test_the_accountant_is_named() -> None:
    assert accounting.accountant_of([gaussian(1.0)]).startswith("PLD")
    assert "Papernot" in accounting.accountant_of([gaussian(1.0), select(2.0, "geometric", gaussian(1.0))])


def test_a_selection_is_written_and_read() -> None:
    selection = select(2.5, "poisson", gaussian(3.0, 20, 0.2), gaussian(20.0))
    assert spend_from(json.loads(json.dumps(selection.as_dict()))) == selection
    assert spend_from(gaussian(3.0).as_dict()) == gaussian(3.0)
    for damage in ({"name": None}, {"mean_runs": 0.5}, {"distribution": "uniform"}, {"base": []}, {"more": 1}):
        with pytest.raises((TypeError, InputError)):
            spend_from({**selection.as_dict(), **damage})


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("mean", [1.3, 3.0, 12.0])
def test_number_of_runs_has_its_distribution(distribution: Distribution, mean: float) -> None:
    """A chi-squared test on fixed keys, so that it cannot fail at random."""
    repeats, count = Repeats(mean, distribution), 3000
    drawn = [draw_number_of_runs(repeats, derive_key(test_key(5), "k", i)) for i in range(count)]
    expected = count * masses(repeats, 4000)
    cells = np.flatnonzero(expected >= 8)
    cells = cells[: np.flatnonzero(np.diff(cells) > 1)[0] + 1] if (np.diff(cells) > 1).any() else cells
    observed = np.array([drawn.count(int(k)) for k in cells])
    rest = count - expected[cells].sum(), count - observed.sum()
    statistic = float(((observed - expected[cells]) ** 2 / expected[cells]).sum())
    statistic += (rest[1] - rest[0]) ** 2 / max(rest[0], 1.0)
    assert statistic < len(cells) + 4 * math.sqrt(2 * len(cells) + 2)
    least = 0 if distribution == "poisson" else 1
    assert min(drawn) == least if mean < 5 else min(drawn) >= least


def test_each_run_has_fresh_randomness_and_the_best_alone_is_kept() -> None:
    calls: list[tuple[int, bytes]] = []

    def run(candidate: int, key: bytes) -> tuple[float, str]:
        calls.append((candidate, key))
        return float(key[0]), f"run {len(calls)}"

    for trial in range(30):
        calls.clear()
        key = derive_key(test_key(1), trial)
        best = repeat_and_select(run, 3, Repeats(8.0, "geometric"), key)
        assert len({key for _, key in calls}) == len(calls)
        scores = [key[0] for _, key in calls]
        winner = scores.index(max(scores))  # of equals the first
        assert best is not None
        assert (best.score, best.candidate) == (max(scores), calls[winner][0])
        assert best.result == f"run {winner + 1}"
        before = list(calls)
        calls.clear()
        again = repeat_and_select(run, 3, Repeats(8.0, "geometric"), key)
        assert calls == before
        assert again == best


def test_candidates_are_uniform_and_do_not_depend_on_scores() -> None:
    taken: list[int] = []

    def run_with(score: Callable[[int], float]) -> Callable[[int, bytes], tuple[float, None]]:
        def run(candidate: int, key: bytes) -> tuple[float, None]:
            taken.append(candidate)
            return score(candidate), None

        return run

    found = []
    for score in (lambda c: 0.0, lambda c: float(c)):
        taken.clear()
        for trial in range(400):
            repeat_and_select(run_with(score), 4, Repeats(3.0), derive_key(test_key(2), trial))
        found.append(list(taken))
    assert found[0] == found[1]
    counts = np.bincount(found[0], minlength=4)
    assert ((counts - counts.mean()) ** 2 / counts.mean()).sum() < 16


def test_no_run_gives_nothing_and_a_score_must_be_finite() -> None:
    key = next(k for k in (derive_key(test_key(3), i) for i in range(200)) if _poisson(k) == 0)
    assert repeat_and_select(lambda c, k: (0.0, c), 2, Repeats(1.01, "poisson"), key) is None
    with pytest.raises(ValueError, match="finite score"):
        repeat_and_select(lambda c, k: (math.nan, c), 2, Repeats(2.0), test_key(0))


def _poisson(key: bytes) -> int:
    return draw_number_of_runs(Repeats(1.01, "poisson"), derive_key(key, "number of runs"))


@pytest.mark.parametrize(
    "call",
    [
        lambda: Repeats(1.0),
        lambda: Repeats(math.nan),
        lambda: Repeats(1e6),
        lambda: Repeats(3.0, "binomial"),  # type: ignore[arg-type]
        lambda: Selection("x", (), Repeats(3.0)),
        lambda: epsilon_with_selections([select(3.0, "geometric", gaussian(0.001))], [], DELTA),
    ],
)
def test_bad_arguments_are_named(call: Callable[[], object]) -> None:
    with pytest.raises(InputError, match=r"^Expected "):
        call()


@pytest.mark.parametrize("mean", [1.01, 3.0, 100.0])
def test_the_logarithmic_mean_is_at_most_the_stated_one(mean: float) -> None:
    with localcontext(prec=120):
        g = selection._logarithmic_parameter(Decimal(mean))
        assert (1 / g - 1) / -g.ln() <= Decimal(mean)


def test_both_accountants_agree_where_a_use_costs_next_to_nothing() -> None:
    """Of a Poisson number of runs: there the distance of the two distributions bounds delta better than any order."""
    base = (Mechanism("DP-SGD", 0.00158, 0.5996, 1), Mechanism("noisy score", 1.0, 125.3, 1))
    chosen = Selection("private selection", base, Repeats(8.319, "poisson"))
    first, second = epsilon_spent([chosen], 1e-10), epsilon_with_selections([chosen], [], 1e-10)
    assert 0.97 * first < second <= first * (1 + 1e-3)
