"""The attacker's bound against mechanisms whose trade-off is known; numbers that are never rounded down."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm

from dpdm.errors import InputError
from dpdm.evaluation.guarantee import Guarantee, attack_power, odds, percent_up, round_up

RATES = st.floats(0, 1)
EPSILONS = st.floats(0, 15)  # above, 1 - power is lost to rounding
DELTAS = st.floats(0, 0.5)


@given(epsilon=EPSILONS, delta=DELTAS, rate=RATES)
def test_power_is_consistent_with_both_definitions(epsilon: float, delta: float, rate: float) -> None:
    power = attack_power(epsilon, delta, rate)
    assert rate - 1e-12 <= power <= 1
    assert power <= math.exp(epsilon) * rate + delta + 1e-12
    # The same for the opposite test: a miss is the false alarm of whoever asks whether the image was absent.
    assert 1 - rate <= math.exp(epsilon) * (1 - power) + delta + 1e-9
    assert power <= attack_power(epsilon + 1, delta, rate) + 1e-12


@given(epsilon=st.floats(0, 20), rate=RATES)
def test_randomised_response_meets_the_bound(epsilon: float, rate: float) -> None:
    # One bit is told truly with probability e^eps / (1 + e^eps): the best tests are a corner and mixtures.
    corner = 1 / (1 + math.exp(epsilon))
    best = (1 - corner) * rate / corner if rate <= corner else 1 - corner * (1 - rate) / (1 - corner)
    assert attack_power(epsilon, 0.0, rate) == pytest.approx(best, abs=1e-9)


@given(mu=st.floats(0.1, 4), epsilon=st.floats(0, 10), rate=st.floats(1e-6, 1 - 1e-6))
def test_no_gaussian_mechanism_exceeds_the_bound(mu: float, epsilon: float, rate: float) -> None:
    delta = float(norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * norm.cdf(-mu / 2 - epsilon / mu))
    power = float(norm.cdf(norm.ppf(rate) + mu))
    assert power <= attack_power(epsilon, min(max(delta, 0.0), 0.999), rate) + 1e-9


def test_known_values_and_no_overflow() -> None:
    assert attack_power(1.0, 1e-5, 0.01) == pytest.approx(math.e * 0.01 + 1e-5)
    assert attack_power(0.0, 0.0, 0.3) == pytest.approx(0.3)
    assert attack_power(10.0, 0.0, 0.05) == pytest.approx(1 - math.exp(-10) * 0.95)
    assert attack_power(10_000.0, 0.0, 0.05) == 1.0


@given(value=st.floats(1e-9, 1e6))
def test_rounding_never_understates(value: float) -> None:
    assert value * (1 - 2e-9) <= float(round_up(value)) <= value * 1.0011
    if value <= 1:
        assert value * 100 - 1e-5 <= float(percent_up(value).removesuffix(" %")) <= value * 100 + 0.1001


def test_numbers_as_words() -> None:
    assert [round_up(v) for v in (10.0, 9.99987, 1.00001, 0.3, 1e-5, 0)] == [
        "10",
        "10",
        "1.001",
        "0.3",
        "1e-5",
        "0",
    ]
    assert [percent_up(v) for v in (0.01, 0.0272, 0.999955, 1.0)] == ["1 %", "2.8 %", "99.996 %", "100 %"]
    assert [odds(v) for v in (1e-5, 3e-6, 0.0)] == ["1 in 100,000", "1 in 333,333", "never"]


def test_refuses_numbers_out_of_range_and_half_a_statement() -> None:
    with pytest.raises(InputError, match="epsilon >= 0"):
        attack_power(-1, 0, 0.1)
    with pytest.raises(InputError, match="epsilon >= 0"):
        attack_power(math.inf, 0, 0.1)
    with pytest.raises(InputError, match="delta < 1"):
        attack_power(1, 1, 0.1)
    with pytest.raises(InputError, match="false_positive_rate"):
        attack_power(1, 0, 1.1)
    with pytest.raises(InputError, match="delta, unit"):
        Guarantee.from_statement({"epsilon": 1.0})
