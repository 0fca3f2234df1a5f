"""Against closed forms, a quadrature, and dp-accounting: never below the truth, and close to it."""

import math
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.stats import norm

from dpdm import config as configs
from dpdm.errors import InputError
from dpdm.plan import make_plan
from dpdm.privacy import second_accountant
from dpdm.privacy.accounting import Mechanism, epsilon_spent
from dpdm.privacy.second_accountant import epsilon_upper_bound

ROOT = Path(__file__).parents[2]
CLOSE = 1e-3  # how far above the truth the second accountant may be, relative
IMAGES = {"mnist": 60_000, "fmnist": 60_000, "cifar10": 50_000, "celeba": 162_770, "imagenet": 1_281_167}


def uses(sampling_rate: float, noise_multiplier: float, num_steps: int) -> Mechanism:
    return Mechanism("x", sampling_rate, noise_multiplier, num_steps)


def solve(delta_at: Callable[[float], float], delta: float) -> float:
    """Returns the epsilon at which a falling delta(epsilon) is ``delta``."""
    if delta_at(0.0) <= delta:
        return 0.0
    return float(brentq(lambda epsilon: math.log(max(delta_at(epsilon), 1e-300) / delta), 0.0, 500.0, xtol=1e-12))  # type: ignore[arg-type]


def gaussian(mu: float, delta: float) -> float:
    """Gaussian mechanisms together: exact, Balle and Wang 2018 (arXiv 1805.06530), theorem 8."""

    def delta_at(epsilon: float) -> float:
        a, b = mu / 2 - epsilon / mu, -mu / 2 - epsilon / mu
        return float(norm.cdf(a) - math.exp(epsilon + norm.logcdf(b)))

    return solve(delta_at, delta)


def one_sampled_use(q: float, sigma: float, delta: float) -> float:
    """One use on a Poisson sample: exact. The ratio rises with x, so where it passes e^epsilon is one point."""

    def removing(epsilon: float) -> float:
        if math.exp(epsilon) <= 1 - q:
            return 1 - math.exp(epsilon)
        x = 0.5 + sigma**2 * math.log((math.exp(epsilon) - (1 - q)) / q)
        without = norm.sf(x / sigma)
        return float((1 - q) * without + q * norm.sf((x - 1) / sigma) - math.exp(epsilon) * without)

    def adding(epsilon: float) -> float:
        if math.exp(-epsilon) <= 1 - q:
            return 0.0
        x = 0.5 + sigma**2 * math.log((math.exp(-epsilon) - (1 - q)) / q)
        without = norm.cdf(x / sigma)
        with_it = (1 - q) * without + q * norm.cdf((x - 1) / sigma)
        return float(without - math.exp(epsilon) * with_it)

    return max(solve(removing, delta), solve(adding, delta))


def two_sampled_uses(first: Mechanism, second: Mechanism, delta: float) -> float:
    """Two different uses, by the midpoint rule over the first one's outcome and in closed form over the second's."""
    q, sigma = first.sampling_rate, first.noise_multiplier
    x = np.linspace(-12 * sigma, 1 + 12 * sigma, 200_001)
    dx = x[1] - x[0]
    without = norm.pdf(x / sigma) / sigma * dx
    with_it = (1 - q) * without + q * norm.pdf((x - 1) / sigma) / sigma * dx
    loss = np.log(with_it) - np.log(without)

    def removing(epsilon: float) -> float:
        return float(np.dot(with_it, hockey_stick(second, epsilon - loss, adding=False)))

    def adding(epsilon: float) -> float:
        return float(np.dot(without, hockey_stick(second, epsilon + loss, adding=True)))

    return max(solve(removing, delta), solve(adding, delta))


def hockey_stick(use: Mechanism, epsilons: np.ndarray, *, adding: bool) -> np.ndarray:
    """sup_S P(S) - e^epsilon Q(S) of one use, for epsilons of either sign."""
    q, sigma = use.sampling_rate, use.noise_multiplier
    growth = np.exp(epsilons)
    ratio = 1 / growth if adding else growth  # of with to without, at the edge of the best S
    with np.errstate(invalid="ignore", divide="ignore"):
        x = np.where(ratio > 1 - q, 0.5 + sigma**2 * np.log((ratio - (1 - q)) / q), -np.inf)
    if adding:
        without, with_it = norm.cdf(x / sigma), (1 - q) * norm.cdf(x / sigma) + q * norm.cdf((x - 1) / sigma)
        return without - growth * with_it
    without, with_it = norm.sf(x / sigma), (1 - q) * norm.sf(x / sigma) + q * norm.sf((x - 1) / sigma)
    return with_it - growth * without


def assert_tight(found: float, true: float) -> None:
    assert true * (1 - 1e-7) <= found <= true * (1 + CLOSE)


@pytest.mark.parametrize("delta", [1e-2, 1e-5, 1e-10, 1e-30])
@pytest.mark.parametrize(("noise_multiplier", "steps"), [(0.5, 1), (1.0, 1), (2.0, 30), (50.0, 1), (300.0, 5000)])
def test_full_batches_against_the_exact_gaussian_mechanism(noise_multiplier: float, steps: int, delta: float) -> None:
    found = epsilon_upper_bound([uses(1.0, noise_multiplier, steps)], delta)
    true = gaussian(math.sqrt(steps) / noise_multiplier, delta)
    assert found == 0.0 if true == 0 else found > 0
    assert_tight(found, true)


def test_different_gaussian_mechanisms_add_up_exactly() -> None:
    found = epsilon_upper_bound([uses(1.0, 5.0, 1), uses(1.0, 2.0, 3), uses(1.0, 40.0, 100)], 1e-6)
    assert_tight(found, gaussian(math.sqrt(1 / 25 + 3 / 4 + 100 / 1600), 1e-6))


@pytest.mark.parametrize("delta", [1e-4, 1e-6, 1e-9])
@pytest.mark.parametrize(
    ("q", "sigma"), [(0.5, 1.0), (0.1, 0.5), (0.01, 0.6), (0.9, 3.0), (1e-3, 0.3), (0.07, 2.4), (1 - 1e-6, 1.0)]
)
def test_one_sampled_use_against_its_closed_form(q: float, sigma: float, delta: float) -> None:
    assert_tight(epsilon_upper_bound([uses(q, sigma, 1)], delta), one_sampled_use(q, sigma, delta))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (uses(0.2, 1.0, 1), uses(0.2, 1.0, 1)),
        (uses(0.05, 0.7, 1), uses(0.5, 2.0, 1)),
        (uses(0.3, 0.8, 1), uses(1.0, 3.0, 1)),
    ],
)
def test_two_uses_against_a_quadrature(first: Mechanism, second: Mechanism) -> None:
    assert_tight(epsilon_upper_bound([first, second], 1e-5), two_sampled_uses(first, second, 1e-5))


def test_both_directions_count() -> None:
    """Removing a record is easier to see than adding it here, by far; neither is always the worse one."""
    removing_is_worse = one_sampled_use(0.01, 0.5, 1e-6)
    assert epsilon_upper_bound([uses(0.01, 0.5, 1)], 1e-6) >= removing_is_worse > 1
    # Adding is bounded by -ln(1 - q), which a delta of nearly q leaves far behind for removing.
    assert_tight(epsilon_upper_bound([uses(0.2, 30.0, 1)], 1e-3), one_sampled_use(0.2, 30.0, 1e-3))


PUBLISHED = [
    pytest.param(
        path, id=f"{path.parent.name}-{path.stem}", marks=[] if "mnist" in path.parent.name else [pytest.mark.slow]
    )
    for path in sorted((ROOT / "configs").rglob("train_*.yaml"))
]


@pytest.mark.parametrize("path", PUBLISHED)
def test_the_papers_runs_against_dp_accounting(path: Path) -> None:
    config = configs.load([path], quiet=True)
    plan = make_plan(config, IMAGES[path.parent.name.partition("_")[0]])
    runs = [uses(plan.sampling_rate, plan.noise_multiplier, plan.num_iterations)]
    start = time.perf_counter()
    found = epsilon_upper_bound(runs, plan.delta)
    assert time.perf_counter() - start < 5
    assert plan.epsilon * 0.99 <= found <= plan.epsilon * (1 + CLOSE)


RUNS = {
    "log_rate": st.floats(-3, 0),
    "log_sigma": st.floats(-0.4, 1.8),
    "steps": st.integers(1, 3000),
    "log_delta": st.floats(-10, -3),
    "central": st.sampled_from([None, 3.0, 30.0]),
}


def agree(log_rate: float, log_sigma: float, steps: int, log_delta: float, central: float | None) -> None:
    runs = [uses(10**log_rate, 10**log_sigma, steps)] + ([] if central is None else [uses(1.0, central, 1)])
    found = epsilon_upper_bound(runs, 10**log_delta)
    assume(0.1 < found < 30)  # below, the steps of 1e-4 in which dp-accounting counts losses cost it more than 1 %
    other = epsilon_spent(runs, 10**log_delta)
    assert other * 0.99 <= found <= other * (1 + CLOSE)


@settings(max_examples=8, deadline=None)
@given(**RUNS)
def test_any_run_against_dp_accounting(**run: Any) -> None:
    agree(**run)


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(**RUNS)
def test_many_runs_against_dp_accounting(**run: Any) -> None:
    agree(**run)


@settings(max_examples=20, deadline=None)
@given(rate=st.floats(0.01, 1), sigma=st.floats(0.5, 20), steps=st.integers(1, 200))
def test_more_of_anything_costs_more(rate: float, sigma: float, steps: int) -> None:
    base = epsilon_upper_bound([uses(rate, sigma, steps)], 1e-6)
    slack = 1 - CLOSE  # of two upper bounds
    assert epsilon_upper_bound([uses(rate, sigma, 2 * steps)], 1e-6) >= base * slack
    assert epsilon_upper_bound([uses(rate, sigma / 1.1, steps)], 1e-6) >= base * slack
    assert epsilon_upper_bound([uses(min(1.0, 1.1 * rate), sigma, steps)], 1e-6) >= base * slack
    assert epsilon_upper_bound([uses(rate, sigma, steps)], 1e-7) >= base * slack


def test_order_and_grouping_do_not_matter() -> None:
    many = epsilon_upper_bound([uses(0.1, 2.0, 500), uses(1.0, 9.0, 1), uses(0.1, 2.0, 500)], 1e-6)
    few = epsilon_upper_bound([uses(1.0, 9.0, 1), uses(0.1, 2.0, 1000)], 1e-6)
    assert many == pytest.approx(few, rel=1e-5)


def test_nothing_used_costs_nothing() -> None:
    assert epsilon_upper_bound([], 1e-5) == 0.0
    assert epsilon_upper_bound([uses(0.1, 1.0, 0)], 1e-5) == 0.0


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"sigma": 0.01}, "noise_multiplier"),
        ({"sigma": 1e9}, "noise_multiplier"),
        ({"rate": 1e-12}, "sampling_rate"),
        ({"steps": 10**8}, "num_steps"),
        ({"delta": 0.0}, "delta"),
        ({"delta": math.nan}, "delta"),
        ({"delta": 0.5}, "delta"),
    ],
)
def test_what_it_was_not_made_for_is_refused(changes: dict[str, float], name: str) -> None:
    values = {"rate": 0.1, "sigma": 1.0, "steps": 10, "delta": 1e-5, **changes}
    with pytest.raises(InputError, match=f"<= {name} <="):
        epsilon_upper_bound([uses(values["rate"], values["sigma"], int(values["steps"]))], values["delta"])


def test_it_shares_nothing_with_the_first_accountant() -> None:
    """Neither its code nor what that is made of."""
    code = (
        "import sys; from dpdm.privacy.second_accountant import epsilon_upper_bound; "
        "print([m for m in ('dp_accounting', 'scipy', 'torch', 'dpdm.privacy.accounting') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_delta_that_infinite_losses_pass_has_no_epsilon() -> None:
    """Nothing finite is an upper bound then; the end of the ring is none."""
    part = second_accountant._Losses(np.array([0, 1]), np.array([0.5, 0.4]), infinite=0.1, count=1)
    assert second_accountant._compose([part], 0.01, 0.5) == math.inf
    assert second_accountant._compose([part], 0.2, 0.5) < 1
    below = second_accountant._Losses(np.array([-900, -899]), np.array([0.5, 0.4]), infinite=0.1, count=1)
    assert second_accountant._compose([below], 0.01, 0.5) == math.inf
    assert second_accountant._compose([below], 0.2, 0.5) == 0


@pytest.mark.parametrize("adding", [False, True])
def test_both_distributions_keep_all_their_mass(adding: bool) -> None:
    """What is beyond the bins is kept, too, for one of the two alone."""
    for use in (uses(1.0, 1.0, 1), uses(0.1, 0.7, 1), uses(0.9, 3.0, 1)):
        o = second_accountant._outcomes(use, 0.01, 1.0)
        ratios = 0.01 * (o.first + np.arange(len(o.masses)))
        masses, rest = (o.masses * np.exp(-ratios), o.only_b) if adding else (o.masses, o.only_w)
        assert math.isclose(float(masses.sum()) + rest, 1.0, rel_tol=1e-9)
        assert rest > 1e-4


def test_what_lies_above_the_ring_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a ring around the losses' mean, three deviations of them wide, most of what matters lies beyond."""
    truth = gaussian(math.sqrt(100) / 20, 1e-5)
    monkeypatch.setattr(second_accountant, "_chernoff", lambda *given: 0.01)
    monkeypatch.setattr(second_accountant, "RING_DEVIATIONS", 3.0)
    monkeypatch.setattr(second_accountant, "RING_TILTS", 0.0)
    assert epsilon_upper_bound([uses(1.0, 20.0, 100)], 1e-5) > truth


def test_the_rounding_of_the_transforms_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    before, ring = epsilon_upper_bound([uses(0.1, 2.0, 50)], 1e-5), second_accountant._ring

    def coarse(*given: Any) -> tuple[np.ndarray, float]:
        masses, rounding = ring(*given)
        assert 0 < rounding < 1e-10
        return masses, 1e-5

    monkeypatch.setattr(second_accountant, "_ring", coarse)
    assert epsilon_upper_bound([uses(0.1, 2.0, 50)], 1e-5) > 1.0001 * before
