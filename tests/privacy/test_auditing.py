"""Bounds from scores: exact error probabilities by enumeration, coverage and power on scores of known epsilon."""

import math
from fractions import Fraction
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from dpdm.privacy.accounting import Mechanism, calibrate_noise_multiplier, epsilon_spent
from dpdm.privacy.auditing import (
    GUESS_SHARES,
    Answers,
    epsilon_from_rates,
    gaussian_epsilon,
    lower_probability,
    mu_from_advantage,
    mu_from_rates,
    one_run_bound,
    one_run_p_value,
    two_world_bound,
    upper_probability,
)

DELTA = 1e-5
Phi = NormalDist().cdf
RATES = st.floats(0.02, 0.98)


def counts(n: int, p: float) -> np.ndarray:
    """Returns P(Binomial(n, p) = k), (n + 1,)."""
    return binom.pmf(np.arange(n + 1), n, round(p, 12))  # scipy fails at 1e-308


def scores(seed: int, num_trials: int, sigma: float, sampling_rate: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Returns scores of the (subsampled) Gaussian mechanism without and with the record."""
    random = np.random.default_rng(seed)
    sampled = random.random(num_trials) < sampling_rate
    return random.normal(0, sigma, num_trials), random.normal(0, sigma, num_trials) + sampled


def largest_number_by_chance(trials: int, probability: float) -> int:
    """Returns a number that so many trials pass with a probability of at most 1e-4."""
    return int(binom.isf(1e-4, trials, probability))


# Epsilon of a mechanism.


@pytest.mark.parametrize("sampling_rate", [1.0, 0.3, 0.01])
@pytest.mark.parametrize("sigma", [0.5, 1.0, 4.0])
def test_epsilon_of_a_mechanism_against_the_accountant(sigma: float, sampling_rate: float) -> None:
    claimed = epsilon_spent([Mechanism("", sampling_rate, sigma, 1)], DELTA)
    exact = gaussian_epsilon(1 / sigma, DELTA, sampling_rate)
    assert exact <= claimed + 1e-9  # the accountant rounds up
    assert exact == pytest.approx(claimed, rel=1e-3, abs=1e-4)


def test_epsilon_of_a_mechanism_at_its_ends() -> None:
    assert gaussian_epsilon(0.0, DELTA) == 0
    assert gaussian_epsilon(1e-6, DELTA) == 0  # delta alone allows for it
    assert gaussian_epsilon(1.0, DELTA, sampling_rate=1e-6) == 0
    assert 500 < gaussian_epsilon(math.inf, DELTA) <= 700


# Error probabilities, exactly.


@settings(deadline=None, max_examples=60)
@given(n=st.integers(1, 40), p=RATES, error=st.sampled_from([0.001, 0.05, 0.2]))
def test_bounds_of_a_probability_fail_as_rarely_as_stated(n: int, p: float, error: float) -> None:
    found = counts(n, p)
    low = sum(found[k] for k in range(n + 1) if lower_probability(k, n, error) > p)
    high = sum(found[k] for k in range(n + 1) if upper_probability(k, n, error) < p)
    assert low <= error + 1e-12
    assert high <= error + 1e-12


@settings(deadline=None, max_examples=60)
@given(
    n=st.integers(2, 30),
    mu=st.floats(0.0, 4.0),
    sampling_rate=st.sampled_from([1.0, 0.5, 0.1]),
    share=st.floats(0, 1),
    error=st.sampled_from([0.001, 0.05, 0.2]),
)
def test_mu_from_advantage_fails_as_rarely_as_stated(
    n: int, mu: float, sampling_rate: float, share: float, error: float
) -> None:
    """For every pair of rates whose mean is what mu allows, however unequal."""
    mean = 0.5 + sampling_rate * (Phi(mu / 2) - 0.5)
    with_record = max(0.0, 2 * mean - 1) + share * (1 - max(0.0, 2 * mean - 1))
    joint = np.outer(counts(n, with_record), counts(n, 2 * mean - with_record))  # right with, right without
    failed = sum(
        joint[true, n - false]
        for true in range(n + 1)
        for false in range(n + 1)
        if mu_from_advantage(Answers(false, true, n), sampling_rate, error) > mu + 1e-9
    )
    assert failed <= error + 1e-12


@settings(deadline=None, max_examples=40)
@given(
    n=st.integers(2, 25),
    mu=st.floats(0.0, 4.0),
    sampling_rate=st.sampled_from([1.0, 0.5, 0.1]),
    threshold=st.floats(-2, 4),
    error=st.sampled_from([0.001, 0.05, 0.2]),
)
@example(n=25, mu=3.0, sampling_rate=0.5, threshold=0.5, error=0.2)  # the records left out matter most here
def test_mu_from_rates_fails_as_rarely_as_stated(
    n: int, mu: float, sampling_rate: float, threshold: float, error: float
) -> None:
    false_rate = Phi(-threshold)
    true_rate = (1 - sampling_rate) * false_rate + sampling_rate * Phi(mu - threshold)
    joint = np.outer(counts(n, false_rate), counts(n, true_rate))
    failed = sum(
        joint[false, true]
        for false in range(n + 1)
        for true in range(n + 1)
        if mu_from_rates(Answers(false, true, n), sampling_rate, error) > mu + 1e-9
    )
    assert failed <= error + 1e-12


@settings(deadline=None, max_examples=40)
@given(
    n=st.integers(2, 25),
    epsilon=st.floats(0.0, 3.0),
    delta=st.sampled_from([1e-5, 0.01, 0.2]),
    false_rate=st.floats(0.0, 1.0),
    error=st.sampled_from([0.001, 0.05, 0.2]),
)
def test_epsilon_from_rates_fails_as_rarely_as_stated(
    n: int, epsilon: float, delta: float, false_rate: float, error: float
) -> None:
    """At the edge of the region that (epsilon, delta) allows."""
    true_rate = min(math.exp(epsilon) * false_rate + delta, 1 - math.exp(-epsilon) * (1 - delta - false_rate), 1.0)
    joint = np.outer(counts(n, false_rate), counts(n, max(0.0, true_rate)))
    failed = sum(
        joint[false, true]
        for false in range(n + 1)
        for true in range(n + 1)
        if epsilon_from_rates(Answers(false, true, n), delta, error) > epsilon + 1e-9
    )
    assert failed <= error + 1e-12


@pytest.mark.parametrize("sampling_rate", [1.0, 0.3])
def test_many_trials_find_mu_itself(sampling_rate: float) -> None:
    mu, trials = 1.3, 10**10
    for threshold in (0.65, 2.0):
        false_rate = Phi(-threshold)
        true_rate = (1 - sampling_rate) * false_rate + sampling_rate * Phi(mu - threshold)
        answers = Answers(round(trials * false_rate), round(trials * true_rate), trials)
        assert mu_from_rates(answers, sampling_rate, 0.05) == pytest.approx(mu, abs=1e-3)
        advantage = mu_from_advantage(answers, sampling_rate, 0.05)
        if threshold == mu / 2:
            assert advantage == pytest.approx(mu, abs=1e-3)
        else:
            assert advantage < mu - 0.1


# Two worlds.


@pytest.mark.parametrize(("sigma", "sampling_rate"), [(1.0, 1.0), (0.7, 0.3)])
def test_bounds_of_two_worlds_are_wrong_as_rarely_as_stated(sigma: float, sampling_rate: float) -> None:
    audits, error = 300, 0.2
    truth = gaussian_epsilon(1 / sigma, DELTA, sampling_rate)
    wrong_mu = wrong_epsilon = 0
    for seed in range(audits):
        bound = two_world_bound(
            *scores(seed, 200, sigma, sampling_rate),
            sampling_rate=sampling_rate,
            delta=DELTA,
            confidence=1 - error,
            middle=0.5,
        )
        wrong_mu += bound.mu > 1 / sigma
        wrong_epsilon += bound.epsilon_any > truth
    assert wrong_mu + wrong_epsilon <= largest_number_by_chance(audits, error)
    if sampling_rate == 1:
        assert wrong_mu >= 5  # half the error is spent here: a bound that is never wrong would be a loose one


def test_scores_that_choose_the_threshold_are_not_counted() -> None:
    """The first fifth tells the worlds apart, the others are the same in both: nothing is proved."""
    absent, present = (np.random.default_rng(0).normal(0, 1, 1000) for _ in range(2))
    absent[:200], present[:200] = -10, 10
    numbers = {"delta": DELTA, "confidence": 0.95, "middle": 100.0}
    for sampling_rate in (1.0, 0.5):
        bound = two_world_bound(absent, present, sampling_rate=sampling_rate, **numbers)
        assert (bound.mu, bound.epsilon, bound.epsilon_any) == (0, 0, 0)


@pytest.mark.parametrize("epsilon", [1.0, 4.0, pytest.param(10.0, marks=pytest.mark.slow)])
def test_5000_trials_reach_most_of_epsilon_and_notice_half_the_noise(epsilon: float) -> None:
    """With the seeds of 200 audits; half the noise is far enough from the claim for a few of them."""
    sigma = calibrate_noise_multiplier(epsilon, DELTA, 1.0, 1)

    def audit(seed: int, noise: float) -> float:
        worlds = scores(seed, 5000, noise)
        return two_world_bound(*worlds, sampling_rate=1.0, delta=DELTA, confidence=0.95, middle=0.5).epsilon

    found = [audit(seed, sigma) for seed in range(200)]
    assert np.mean([bound >= 0.6 * epsilon for bound in found]) >= 0.95
    assert sum(bound > epsilon for bound in found) <= 10
    assert all(audit(seed, sigma / 2) > epsilon for seed in range(40))


def test_half_the_noise_is_noticed_in_subsampled_steps() -> None:
    claimed = 1 / 1.0
    bounds = [
        two_world_bound(*scores(seed, 5000, 0.5, 0.25), sampling_rate=0.25, delta=DELTA, confidence=0.95, middle=0.5)
        for seed in range(20)
    ]
    assert all(bound.mu > claimed for bound in bounds)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"delta": 0.0}, "delta"),
        ({"confidence": 0.5}, "confidence"),
        ({"confidence": 1.0}, "confidence"),
        ({"sampling_rate": 0.0}, "sampling_rate"),
        ({"sampling_rate": 1.1}, "sampling_rate"),
    ],
)
def test_two_worlds_refuse_numbers_out_of_range(changes: dict[str, float], message: str) -> None:
    numbers = {"sampling_rate": 1.0, "delta": DELTA, "confidence": 0.95, "middle": 0.5, **changes}
    with pytest.raises(ValueError, match=message):
        two_world_bound(np.zeros(20), np.ones(20), **numbers)


@pytest.mark.parametrize(
    ("absent", "present"),
    [(np.zeros(20), np.zeros(19)), (np.zeros(9), np.zeros(9)), (np.zeros(20), np.full(20, np.nan))],
)
def test_two_worlds_refuse_scores_of_another_form(absent: np.ndarray, present: np.ndarray) -> None:
    with pytest.raises(ValueError, match="scores"):
        two_world_bound(absent, present, sampling_rate=1.0, delta=DELTA, confidence=0.95, middle=0.5)


# One run.


def exact_p_value(m: int, r: int, v: int, odds: Fraction, delta: Fraction) -> Fraction:
    """Returns the theorem's bound in rational arithmetic, for e^epsilon = odds."""
    p = odds / (1 + odds)
    chance = [math.comb(r, k) * p**k * (1 - p) ** (r - k) for k in range(r + 1)]
    gain = max((sum(chance[v - i : v], Fraction(0)) / i for i in range(1, v + 1)), default=Fraction(0))
    return min(Fraction(1), sum(chance[v:], Fraction(0)) + 2 * m * delta * gain)


@pytest.mark.parametrize(("m", "r"), [(12, 12), (40, 10), (40, 1)])
@pytest.mark.parametrize("delta", [Fraction(0), Fraction(1, 10_000)])
def test_the_p_value_against_rational_arithmetic(m: int, r: int, delta: Fraction) -> None:
    for odds in (Fraction(1), Fraction(3), Fraction(50)):
        for v in range(r + 1):
            found = one_run_p_value(m, r, v, math.log(odds), float(delta))
            assert found == pytest.approx(float(exact_p_value(m, r, v, odds, delta)), rel=1e-9)


@settings(deadline=None, max_examples=60)
@given(m=st.integers(1, 60), epsilon=st.floats(0, 5), delta=st.floats(1e-6, 0.05))
def test_no_mechanism_that_is_known_beats_the_p_value(m: int, epsilon: float, delta: float) -> None:
    """Randomised response that tells the truth with probability delta: of each coin, or of all coins at once."""
    p = 1 / (1 + math.exp(-epsilon))
    of_each = counts(m, delta + (1 - delta) * p)
    at_once = (1 - delta) * counts(m, p)
    at_once[m] += delta
    for v in range(m + 1):
        bound = one_run_p_value(m, m, v, epsilon, delta)
        assert of_each[v:].sum() <= bound + 1e-9
        assert at_once[v:].sum() <= bound + 1e-9


def guessed(seed: int, num_canaries: int, accuracy: float) -> tuple[np.ndarray, np.ndarray]:
    """Returns scores and coins of randomised response, with sureness that means nothing."""
    random = np.random.default_rng(seed)
    coins = random.random(num_canaries) < 0.5
    right = random.random(num_canaries) < accuracy
    return random.uniform(0.5, 1, num_canaries) * np.where(coins == right, 1.0, -1.0), coins


@pytest.mark.parametrize("epsilon", [0.0, 1.0, 3.0])
def test_one_run_is_wrong_as_rarely_as_stated(epsilon: float) -> None:
    audits, error = 300, 0.2
    accuracy = 1 / (1 + math.exp(-epsilon))
    bounds = [
        one_run_bound(*guessed(seed, 200, accuracy), delta=DELTA, confidence=1 - error).epsilon
        for seed in range(audits)
    ]
    assert sum(bound > epsilon for bound in bounds) <= largest_number_by_chance(audits, error)
    assert max(bounds) > epsilon  # at this confidence some are


def test_more_is_proved_by_those_that_are_sure() -> None:
    """Scores of the Gaussian mechanism: the tails are surer than the middle, so guessing few gives more."""
    random = np.random.default_rng(0)
    coins = random.random(2000) < 0.5
    values = random.normal(0, 1, 2000) + 2.0 * coins
    bound = one_run_bound(values, coins, delta=DELTA, confidence=0.95)
    all_right = int((coins == (values > np.median(values))).sum())
    assert bound.num_guesses < 2000
    assert bound.num_right / bound.num_guesses > all_right / 2000
    assert 2.0 < bound.epsilon < gaussian_epsilon(2.0, DELTA)


def test_one_run_proves_what_its_best_p_value_does() -> None:
    scores_, coins = guessed(1, 400, 0.95)
    bound = one_run_bound(scores_, coins, delta=DELTA, confidence=0.9)
    error = 0.1 / len(GUESS_SHARES)
    at = [
        one_run_p_value(400, bound.num_guesses, bound.num_right, bound.epsilon + step, DELTA) for step in (-1e-4, 1e-4)
    ]
    assert at[0] < error < at[1]


def test_one_run_with_all_right_or_all_wrong() -> None:
    coins = np.arange(100) % 2 == 0
    assert one_run_bound(np.where(coins, -1.0, 1.0), coins, delta=DELTA, confidence=0.95).epsilon == 0
    best = one_run_bound(np.where(coins, 1.0, -1.0), coins, delta=1e-12, confidence=0.95)
    accuracy = (0.05 / len(GUESS_SHARES)) ** (1 / 100)  # whose 100th power is the error
    assert best.epsilon == pytest.approx(math.log(accuracy / (1 - accuracy)), abs=1e-4)


@pytest.mark.parametrize(
    ("values", "coins"),
    [(np.zeros(1), np.zeros(1, bool)), (np.zeros(5), np.zeros(4, bool)), (np.full(5, np.inf), np.zeros(5, bool))],
)
def test_one_run_refuses_scores_of_another_form(values: np.ndarray, coins: np.ndarray) -> None:
    with pytest.raises(ValueError, match="scores"):
        one_run_bound(values, coins, delta=DELTA, confidence=0.95)


def test_a_p_value_needs_right_guesses_among_guesses_among_canaries() -> None:
    for m, r, v in ((5, 6, 1), (5, 4, 5), (5, 4, -1)):
        with pytest.raises(ValueError, match="canaries"):
            one_run_p_value(m, r, v, 1.0, DELTA)
