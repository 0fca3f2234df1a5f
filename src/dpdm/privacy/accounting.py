"""Mechanisms -> (epsilon, delta), and the noise multiplier that a budget allows.

Adjacency throughout: *add or remove one record*, with the number of records N treated as public. Imports no torch.

The accountant is the privacy loss distribution (PLD) of Google's ``dp-accounting`` with pessimistic rounding of losses,
so every epsilon returned here is an upper bound on the mechanism's true one (Koskela et al. 2020, arXiv 1906.03049;
Doroshenko et al. 2022, arXiv 2207.04380). It adds losses up by Fourier transforms, whose own rounding it leaves out: an
error of delta, of either sign, that does not get smaller with delta. So it is asked for epsilon at a delta that is
smaller by ``ROUNDING`` for each use, and deltas of which that would be much are refused.

Where a private selection is among the mechanisms, all are counted in Renyi differential privacy, in which alone its
cost is known (Papernot and Steinke 2022, arXiv 2110.03620).
"""

import functools
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from dpdm.errors import InputError

ACCOUNTANT = "PLD (dp-accounting, pessimistic discretisation)"
SELECTION_ACCOUNTANT = "RDP (dp-accounting; for repeating and selecting Papernot and Steinke 2022, arXiv 2110.03620)"
ADJACENCY = "add or remove one record"
NOISE_MULTIPLIER_DIGITS = 5  # calibrated noise multipliers are rounded up to so many significant digits

LARGEST_DELTA = 0.1
SMALLEST_DELTA = 1e-13  # with less the accountant's cut tails alone make epsilon infinite
# What Fourier transforms of 2^20 points may add to delta or take from it, for each use that is added up: a relative
# error of log2(2^20) u in every coefficient, u = 2^-53, grows linearly with the power it is raised to. Errors found,
# against exact values, were 100 times smaller and less (tests/privacy/test_small_deltas.py).
ROUNDING = 20 * 2.0**-53
LARGEST_ROUNDING = 0.5  # of delta, in all

MUCH_NOISE = 1e6
SMALLEST_NOISE_MULTIPLIER = 0.1  # calibration stops here: with less, one use alone passes an epsilon of 90

# The grid of the PLD accountant's losses. Each grid gives an upper bound; a coarser one is quicker, and hardly above.
GRID = 1e-4
GRID_POINTS = 2**18  # of one use, at most, in one direction; with more the grid is coarser, by powers of two
TAIL_DEVIATIONS = 8.0  # of the noise, within which the losses are that a grid has to hold
QUICK_EPSILON = 10.0  # a calibration to more than that searches on a grid that is coarser in proportion
CLOSE = 5e-3  # how far below the budget, relative, such a search may end

LARGEST_EXPONENT = 700.0  # e to this power is still a float

RDP_ORDERS = (*range(2, 33), 40, 48, 64, 96, 128, 256)  # integers: no series that may not converge
# Of a selection, where an order that is left out costs up to a tenth of the noise. A fractional order whose series does
# not converge counts as infinite, others as a bound that is above the truth.
SELECTION_ORDERS = (
    *(1.02, 1.05, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7, 1.8, 1.9),
    *(2 + i / 8 for i in range(16)),
    *(4 + i / 4 for i in range(16)),
    *range(8, 33),
    *(36, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 256, 384, 512),
)

# How the number of runs is distributed, as the shape of a truncated negative binomial distribution; infinite: Poisson.
Distribution = Literal["logarithmic", "geometric", "poisson"]
SHAPES: dict[str, float] = {"logarithmic": 0.0, "geometric": 1.0, "poisson": math.inf}
MEAN_RUNS = (1.01, 100.0)
SELECTION = "private selection"


@dataclass(frozen=True)
class Mechanism:
    """``num_steps`` adaptive uses of the Poisson-subsampled Gaussian mechanism.

    Attributes:
        name: what bought it, for the statement.
        sampling_rate: probability that a record takes part in one use; 1 is the plain Gaussian mechanism.
        noise_multiplier: noise standard deviation / L2 sensitivity.
        num_steps: how often it was used.
    """

    name: str
    sampling_rate: float
    noise_multiplier: float
    num_steps: int

    def __post_init__(self) -> None:
        if not 0 < self.sampling_rate <= 1:
            raise InputError(f"Expected 0 < sampling_rate <= 1, got {self.sampling_rate} ({self.name}).")
        if not (self.noise_multiplier > 0 and math.isfinite(self.noise_multiplier)):
            raise InputError(f"Expected a finite noise_multiplier > 0, got {self.noise_multiplier} ({self.name}).")
        if self.num_steps < 0:
            raise InputError(f"Expected num_steps >= 0, got {self.num_steps} ({self.name}).")

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Repeats:
    """How often a selection runs what it selects from: a secret random number.

    Attributes:
        mean_runs: its expectation, from 1.01 to 100.
        distribution: of the truncated negative binomial family logarithmic (shape 0) or geometric (shape 1), which are
            at least 1; or poisson, which may be 0: then nothing is selected.
    """

    mean_runs: float
    distribution: Distribution = "logarithmic"

    def __post_init__(self) -> None:
        low, high = MEAN_RUNS
        if not low <= self.mean_runs <= high:
            raise InputError(f"Expected {low:g} <= mean_runs <= {high:g}, got {self.mean_runs}: 3 is usual.")
        if self.distribution not in get_args(Distribution):
            raise InputError(
                f"Expected distribution to be one of {list(get_args(Distribution))}, got {self.distribution!r}."
            )


@dataclass(frozen=True)
class Selection:
    """Private selection: ``base`` runs a random number of times, and only what the run of the best score gave is seen.

    Attributes:
        name: what bought it, for the statement.
        base: what each single run uses, its score included; each run has its own randomness.
        repeats: how many runs there are.
    """

    name: str
    base: tuple[Mechanism, ...]
    repeats: Repeats

    def __post_init__(self) -> None:
        if not any(mechanism.num_steps for mechanism in self.base):
            raise InputError(f"Expected a base that uses something, got {self.base} ({self.name}).")

    def as_dict(self) -> dict[str, Any]:
        return {"name": self.name, **asdict(self.repeats), "base": [mechanism.as_dict() for mechanism in self.base]}


Spend = Mechanism | Selection


def spend_from(entry: Mapping[str, Any]) -> Spend:
    """Returns what ``as_dict`` made an entry of.

    Raises:
        TypeError: if a name is missing, or one too many.
        InputError: if a value is out of range.
    """
    if "base" not in entry:
        return Mechanism(**entry)
    entry = dict(entry)
    base, name = tuple(Mechanism(**part) for part in entry.pop("base")), entry.pop("name", None)
    if not isinstance(name, str):
        raise TypeError("a selection without a name")
    return Selection(name, base, Repeats(**entry))


def parts(spends: Sequence[Spend]) -> list[Mechanism]:
    """Returns the mechanisms themselves, those that a selection repeats once: what a selected model was made by."""
    return [part for spend in spends for part in (spend.base if isinstance(spend, Selection) else (spend,))]


def accountant_of(spends: Sequence[Spend]) -> str:
    """Returns which accountant ``epsilon_spent`` asks about them."""
    return SELECTION_ACCOUNTANT if any(isinstance(spend, Selection) for spend in spends) else ACCOUNTANT


def epsilon_spent(mechanisms: Sequence[Spend], delta: float) -> float:
    """Returns an upper bound on epsilon of the adaptive composition of all mechanisms, at ``delta``.

    Guarantee: the joint output of the mechanisms is (returned epsilon, delta)-differentially private with respect to
    adding or removing one record, if each is what its description says.

    Args:
        mechanisms: in any order; none, or none with a step, gives 0.
        delta: in [1e-13, 1), and not so small that the accountant's rounding would be much of it: at least
            4.4e-15 for each use of a mechanism on batches.

    Raises:
        InputError: for another delta.
    """
    _check_delta(delta)
    return _epsilon(tuple(mechanisms), delta, accountant="pld")


def rough_epsilon(mechanisms: Sequence[Spend], delta: float) -> float:
    """Returns a looser upper bound than ``epsilon_spent``, by Renyi differential privacy, in a moment."""
    _check_delta(delta)
    return _epsilon(tuple(mechanisms), delta, accountant="rdp")


def calibrate_noise_multiplier(
    epsilon: float,
    delta: float,
    sampling_rate: float,
    num_steps: int,
    *,
    others: Sequence[Mechanism] = (),
    repeats: Repeats | None = None,
) -> float:
    """Returns the smallest noise multiplier (about; 5 digits, rounded up; 0.1) that keeps the whole within ``epsilon``.

    Guarantee: ``epsilon_spent([*others, Mechanism(sampling_rate, returned, num_steps)], delta) <= epsilon``, or that of
    the selection that ``repeats`` all of these; the returned value itself was checked, not its neighbour before
    rounding.

    Args:
        epsilon: the whole budget, > 0.
        delta: in (0, 1).
        sampling_rate: q in (0, 1].
        num_steps: >= 1.
        others: what else is bought from the same budget (a warm-up, say).
        repeats: how often all of it runs in a private selection; None: once, without one.

    Raises:
        InputError: if ``others`` alone pass the budget, or an argument is out of range.
    """
    _check_epsilon(epsilon)
    _check_delta(delta)
    if delta > LARGEST_DELTA:
        raise InputError(f"Expected delta <= {LARGEST_DELTA}, got {delta}: hardly any noise would do, for no promise.")
    if num_steps < 1:
        raise InputError(f"Expected num_steps >= 1, got {num_steps}: train for longer.")

    def whole(*base: Mechanism) -> tuple[Spend, ...]:
        return base if repeats is None else (Selection(SELECTION, base, repeats),)

    def spent(noise_multiplier: float, accountant: str = "pld", coarser: int = 1) -> float:
        steps = Mechanism("DP-SGD", sampling_rate, noise_multiplier, num_steps)
        return _epsilon(whole(*others, steps), delta, accountant=accountant, coarser=coarser)

    if others and (apart := epsilon_spent(whole(*others), delta)) >= epsilon:
        again = "" if repeats is None else f", selected among {repeats.mean_runs:g} runs on average,"
        remedy = "raise train.warmup.noise_multiplier" if repeats is None else "raise epsilon, or lower --mean-runs"
        raise InputError(
            f"Expected the {' and the '.join(m.name for m in others)}{again} to cost less than epsilon={epsilon}, got "
            f"{apart:.4g}: {remedy}."
        )
    # The Renyi accountant is fast and nearly always above PLD, so its answer is the place to start from.
    low, high = SMALLEST_NOISE_MULTIPLIER, _ceiling(spent, epsilon)
    start = _bisect(lambda sigma: spent(sigma, "rdp"), epsilon, low=low, high=high)
    coarser = 2 ** max(0, math.ceil(math.log2(epsilon / QUICK_EPSILON)))
    # Of a small epsilon its orders tell little, and nothing where by them the others alone pass the budget.
    while start / 2 >= low and spent(start / 2, coarser=coarser) <= epsilon:
        start /= 2
    sigma = _round_up(_secant(lambda sigma: spent(sigma, coarser=coarser), epsilon, start))
    if coarser > 1 and (found := spent(sigma)) < (1 - CLOSE) * epsilon:  # so much above is that grid: allow it more
        more = epsilon * min(2.0, epsilon / max(found, 1e-12))
        less = _round_up(_secant(lambda sigma: spent(sigma, coarser=coarser), more, sigma))
        sigma = less if spent(less) <= epsilon else sigma
    step = 0.5 * 10.0 ** (1 - NOISE_MULTIPLIER_DIGITS)
    while spent(sigma) > epsilon:
        sigma = _round_up(sigma * (1 + step))
        step *= 2
    return sigma


def group_privacy(epsilon: float, delta: float, size: int) -> tuple[float, float]:
    """Returns the guarantee for ``size`` records that change together, from the guarantee for one.

    (k epsilon, delta (e^(k epsilon) - 1)/(e^epsilon - 1)), Vadhan 2017, "The Complexity of Differential Privacy",
    lemma 2.2. A returned delta of 1 or more promises nothing.
    """
    if size * epsilon > LARGEST_EXPONENT:
        return size * epsilon, math.inf
    return size * epsilon, delta * math.expm1(size * epsilon) / math.expm1(epsilon)


def num_iterations(num_epochs: float, dataset_size: int, expected_batch_size: int) -> int:
    """Returns floor(num_epochs / q) with q = expected_batch_size / dataset_size."""
    return int(min(num_epochs * dataset_size, 2.0**53) // expected_batch_size)


def sampling_rate(expected_batch_size: int, dataset_size: int, unit: str = "image") -> float:
    """Returns q = expected_batch_size / N, where ``unit`` is what a record is called.

    Raises:
        InputError: if the batch is empty or larger than the data set.
    """
    if expected_batch_size < 1:
        raise InputError(f"Expected train.expected_batch_size >= 1, got {expected_batch_size}.")
    if expected_batch_size > dataset_size:
        raise InputError(
            f"Expected train.expected_batch_size <= {dataset_size} (the number of {unit}s), got {expected_batch_size}: "
            "choose a smaller batch."
        )
    return expected_batch_size / dataset_size


def check_delta_for(delta: float, dataset_size: int, unit: str = "image") -> str | None:
    """Refuses a delta that allows publishing a record; returns a warning for one that is merely large, or None.

    A mechanism that publishes one random record satisfies (0, 1/N)-differential privacy, so delta >= 1/N says nothing.
    """
    _check_delta(delta)
    if delta >= 1 / dataset_size:
        raise InputError(
            f"Expected delta < 1/N = {1 / dataset_size:.6g} for {dataset_size} {unit}s, got {delta}: such a delta "
            f"permits publishing a whole {unit}; use {default_delta(dataset_size):g}."
        )
    if delta > 1 / (10 * dataset_size):
        return (
            f"delta={delta} is above 1/(10 N) = {1 / (10 * dataset_size):.6g}; "
            f"{default_delta(dataset_size):g} is customary for {dataset_size} {unit}s."
        )
    return None


def default_delta(dataset_size: int) -> float:
    """Returns the power of ten at or below min(1e-5, 1/(10 N))."""
    exponent = -5
    while 10 * dataset_size > 10 ** (-exponent):  # integers: 10.0**x would round
        exponent -= 1
    return float(f"1e{exponent}")


def _check_delta(delta: float) -> None:
    if not 0 < delta < 1:
        raise InputError(f"Expected 0 < delta < 1, got {delta}.")
    if delta < SMALLEST_DELTA:
        raise InputError(
            f"Expected delta >= {SMALLEST_DELTA:g}, got {delta:g}: the accountant resolves no smaller one."
        )


def _check_epsilon(epsilon: float) -> None:
    if not (epsilon > 0 and math.isfinite(epsilon)):
        raise InputError(f"Expected a finite epsilon > 0, got {epsilon}.")


def _epsilon(spends: Sequence[Spend], delta: float, *, accountant: str, coarser: int = 1) -> float:
    """Returns an upper bound on epsilon; that of PLD on a grid that is no finer than ``coarser`` times the finest."""
    used = tuple(spend for spend in spends if isinstance(spend, Selection) or spend.num_steps > 0)
    if not used:
        return 0.0
    if accountant == "rdp":
        return _renyi_epsilon(used, delta, RDP_ORDERS)
    if any(isinstance(spend, Selection) for spend in used):
        return _renyi_epsilon(used, delta, SELECTION_ORDERS)
    mechanisms = tuple(spend for spend in used if isinstance(spend, Mechanism))
    rounding = _rounding(mechanisms)
    if rounding > LARGEST_ROUNDING * delta:
        raise InputError(
            f"Expected delta >= {rounding / LARGEST_ROUNDING:.2g} for so many steps, got {delta:g}: the accountant's "
            "rounding would be much of it; take a larger delta, or fewer steps."
        )
    return _pld_epsilon(mechanisms, delta - rounding, max(_grid(mechanisms), coarser * GRID))


def _rounding(mechanisms: Sequence[Mechanism]) -> float:
    """Returns what the accountant's sums may be wrong by in delta; uses of full batches alone it adds up exactly."""
    on_batches = sum(mechanism.num_steps for mechanism in mechanisms if mechanism.sampling_rate < 1)
    return ROUNDING * (on_batches + len(mechanisms) - 1)


@functools.lru_cache(maxsize=256)  # a command asks for the same figure several times
def _pld_epsilon(mechanisms: tuple[Mechanism, ...], delta: float, grid: float) -> float:
    from dp_accounting import NeighboringRelation, pld

    chosen = pld.PLDAccountant(NeighboringRelation.ADD_OR_REMOVE_ONE, value_discretization_interval=grid)
    for mechanism in mechanisms:
        chosen.compose(_event(mechanism))
    return float(chosen.get_epsilon(delta))


@functools.lru_cache(maxsize=256)
def _renyi_epsilon(spends: tuple[Spend, ...], delta: float, orders: tuple[float, ...]) -> float:
    from dp_accounting import NeighboringRelation, rdp

    chosen = rdp.RdpAccountant(orders=orders, neighboring_relation=NeighboringRelation.ADD_OR_REMOVE_ONE)
    with _without_warnings_of_orders():
        for spend in spends:
            chosen.compose(_event(spend))
        return float(chosen.get_epsilon(delta))


def _grid(mechanisms: Sequence[Mechanism]) -> float:
    """Returns the distance between the accountant's losses: GRID, times a power of two where little noise spreads them.

    At a distance of z standard deviations s of the noise the loss of a full batch is (1 + 2 z s) / (2 s^2), and that of
    a smaller one less. Uses of full batches add up to one with less noise, as which the accountant takes them.
    """
    widest = 0.0
    for mechanism in mechanisms:
        full_batches = mechanism.num_steps if mechanism.sampling_rate == 1 else 1
        noise = max(1e-6, mechanism.noise_multiplier / math.sqrt(full_batches))
        widest = max(widest, (1 + 2 * TAIL_DEVIATIONS * noise) / (2 * noise**2))
    return GRID * 2 ** max(0, math.ceil(math.log2(widest / (GRID * GRID_POINTS))))


def _event(spend: Spend) -> Any:
    from dp_accounting import dp_event

    if isinstance(spend, Selection):
        base = dp_event.ComposedDpEvent([_event(part) for part in spend.base if part.num_steps > 0])
        return dp_event.RepeatAndSelectDpEvent(base, spend.repeats.mean_runs, SHAPES[spend.repeats.distribution])
    event: Any = dp_event.GaussianDpEvent(spend.noise_multiplier)
    if spend.sampling_rate < 1:
        event = dp_event.PoissonSampledDpEvent(spend.sampling_rate, event)
    return dp_event.SelfComposedDpEvent(event, spend.num_steps)


@contextmanager
def _without_warnings_of_orders() -> Iterator[None]:
    """Keeps dp-accounting from naming each order that it leaves out: the others are as valid."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _ceiling(spent: Any, epsilon: float) -> float:
    """Returns noise that is enough; of a small epsilon, which Renyi's orders do not resolve, PLD is asked."""
    high = 1.0
    while spent(high, "rdp") > epsilon:
        high *= 2.0
        if high > MUCH_NOISE and spent(high) > epsilon:
            raise InputError(
                f"Expected an epsilon that a noise multiplier of {MUCH_NOISE:g} reaches, got {epsilon}: raise epsilon."
            )
        if high > MUCH_NOISE:
            break
    return high


def _bisect(spent: Any, epsilon: float, low: float, high: float) -> float:
    """Returns a value in (low, high] with spent(value) <= epsilon, within 1 % of the smallest."""
    while high / low > 1.01:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if spent(middle) <= epsilon else (middle, high)
    return high


def _secant(spent: Any, epsilon: float, start: float) -> float:
    """Returns about where ``spent`` falls to ``epsilon``, or the smallest noise: the secant method on logarithms.

    epsilon is nearly a power of the noise multiplier, so few evaluations (up to seconds each) suffice.
    """

    def gap(log_sigma: float) -> float:
        return math.log(max(spent(math.exp(log_sigma)), 1e-12) / epsilon)

    lowest = math.log(SMALLEST_NOISE_MULTIPLIER)
    old, new = math.log(start), max(math.log(0.95 * start), lowest)
    gap_old, gap_new = gap(old), gap(new)
    for _ in range(8):
        if abs(gap_new) < 3e-6 or gap_new == gap_old or (gap_new < 0 and new == lowest):
            break
        step = gap_new * (new - old) / (gap_new - gap_old)
        old, gap_old, new = new, gap_new, max(new - min(max(step, -0.5), 0.5), lowest)
        gap_new = gap(new)
    return math.exp(new)


def _round_up(value: float) -> float:
    scale = 10.0 ** (NOISE_MULTIPLIER_DIGITS - 1 - math.floor(math.log10(value)))
    return math.ceil(value * scale) / scale
