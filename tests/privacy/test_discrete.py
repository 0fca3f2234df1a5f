import hashlib
import math
from decimal import Decimal, localcontext
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special, stats

from dpdm.errors import InputError
from dpdm.privacy import discrete
from dpdm.privacy.noise import derive_key, gaussian_noise, random_words

KEY = bytes(range(32))
CELLS = discrete._cells()
WEIGHT = 786
SIZE = 600_000


def density(y: Decimal) -> Decimal:
    return (-y * y / 2).exp()


def probability_of(cell: int, magnitude: int) -> Decimal:
    """Returns the probability with which a proposal is kept, at the left end of what its bits leave open."""
    return WEIGHT * density(Decimal(magnitude) / 2**53) / int(CELLS.slots[cell])


def proposals(cells: np.ndarray, seed: int) -> np.ndarray:
    """Returns a magnitude at random in each of the given cells."""
    places = np.random.default_rng(seed).integers(0, 2**49, len(cells))
    return (cells.astype(np.int64) << 49) + places


def log_probabilities(edges: np.ndarray) -> np.ndarray:
    """Returns the log of the standard normal mass of each cell between ``edges``, precise in both tails."""
    left, right = np.minimum(edges[:-1], -edges[1:]), np.minimum(edges[1:], -edges[:-1])
    mirrored = edges[:-1] >= 0
    low, high = np.where(mirrored, left, edges[:-1]), np.where(mirrored, right, edges[1:])
    return special.log_ndtr(high) + np.log1p(-np.exp(special.log_ndtr(low) - special.log_ndtr(high)))


def chi_square_pvalue(counts: np.ndarray, probabilities: np.ndarray) -> float:
    """Returns the p-value, with cells of small expectation merged from both ends."""
    expected = probabilities * counts.sum()
    large = np.flatnonzero(expected >= 10)
    first, last = large[0], large[-1]
    merge = [slice(0, first + 1), *(slice(i, i + 1) for i in range(first + 1, last)), slice(last, None)]
    observed = np.array([counts[part].sum() for part in merge])
    wanted = np.array([expected[part].sum() for part in merge])
    return float(stats.chisquare(observed, wanted * observed.sum() / wanted.sum()).pvalue)


# The distribution


def test_cells_cover_the_density() -> None:
    """Every probability of keeping must be at most 1, and 'surely' below all those of its cell."""
    assert CELLS.slots.sum() == len(CELLS.of_slot) == 2**14
    assert np.array_equal(np.bincount(CELLS.of_slot, minlength=256), CELLS.slots)
    with localcontext(prec=80):
        for cell in range(256):
            left, right = Decimal(cell) / 16, Decimal(cell + 1) / 16
            assert int(CELLS.slots[cell]) >= WEIGHT * density(left)
            surely = 2**64 * WEIGHT * density(right) / int(CELLS.slots[cell])
            assert surely - 2 <= int(CELLS.surely_kept[cell]) <= max(surely - 1, Decimal(0))


def test_what_is_never_proposed_is_within_the_stated_distance() -> None:
    assert math.erfc(len(CELLS.slots) / 16 / math.sqrt(2)) < discrete.TOTAL_VARIATION
    assert 2.0**60 * discrete.TOTAL_VARIATION < 2e-39


def test_decisions_near_a_tie_are_those_of_exact_arithmetic() -> None:
    """Floats alone would be wrong here: the distances are from 2^-64 up to beyond the margin, in every cell."""
    distances = [sign * 2**k for k in (0, 4, 8, 10, 12, 16, 20, 23, 25, 30) for sign in (-1, 1)]
    cells = np.repeat(np.arange(256), len(distances))
    magnitudes = proposals(cells, 1)
    chances, expected = [], []
    with localcontext(prec=200):
        for i, (cell, magnitude) in enumerate(zip(cells.tolist(), magnitudes.tolist(), strict=True)):
            more = random_words(derive_key(KEY, i), 8).tobytes()
            y = (magnitude + Fraction(int.from_bytes(more[:32]), 2**256)) / 2**53
            probability = WEIGHT * density(Decimal(y.numerator) / y.denominator) / int(CELLS.slots[cell])
            chances.append(max(int(2**64 * probability) + distances[i % len(distances)], 0))
            uniform = (chances[-1] + Fraction(int.from_bytes(more[32:]), 2**256)) / 2**64
            expected.append(Decimal(uniform.numerator) / uniform.denominator < probability)
    words = np.array(chances, dtype=np.uint64)
    kept = discrete._decide(cells, magnitudes, words, np.arange(len(cells)), KEY)
    assert kept.tolist() == expected


def test_places_beyond_the_words_decide_in_the_far_tail() -> None:
    """At 15.97 a proposal is kept with probability 2^-174, so that the first word says nothing."""
    cell, magnitude = 255, (255 << 49) + 2**48
    with localcontext(prec=80):
        tie = int(2**320 * probability_of(cell, magnitude))
    assert 2**140 < tie < 2**150
    for chance, kept in ((0, True), (tie * 99 // 100, True), (tie * 101 // 100, False), (2**256 - 1, False)):
        assert discrete._decide_exactly(cell, magnitude, 0, bytes(32) + chance.to_bytes(32)) is kept
    nought = np.zeros(1, dtype=np.uint64)
    assert not discrete._decide(np.array([cell]), np.array([magnitude]), nought, np.array([0]), KEY)[0]


def test_floats_err_far_less_than_the_margin() -> None:
    cells = np.repeat(np.arange(256), 8)
    magnitudes = proposals(cells, 2)
    floats = np.exp(-0.5 * np.square(magnitudes * 2.0**-53)) * (WEIGHT / CELLS.slots[cells])
    with localcontext(prec=60):
        errors = [
            abs(Decimal(float(p)) - probability_of(int(cell), int(magnitude)))
            for p, cell, magnitude in zip(floats, cells, magnitudes, strict=True)
        ]
    assert max(errors) < 2.0**-48
    assert discrete.MARGIN >= 64 * 2.0**-46


def one_by_one(count: int, bits: int) -> list[int]:
    """Returns what the first ``count`` proposals become, in exact arithmetic alone; ties of 53 places do not occur."""
    words = random_words(derive_key(KEY, "proposals", 0), 2 * discrete.PROPOSALS).tolist()
    numbers = []
    with localcontext(prec=60):
        for word, chance in zip(words[:count], words[discrete.PROPOSALS :], strict=False):
            cell = int(CELLS.of_slot[word >> 50])
            z = Fraction(cell, 16) + Fraction(word % 2**49, 2**53)
            if chance < 2**64 * probability_of(cell, int(z * 2**53)):
                numbers.append((-1 if word >> 49 & 1 else 1) * math.floor(z * 2**bits + Fraction(1, 2)))
    return numbers


@pytest.mark.parametrize("bits", [0, 35, 52])
def test_numbers_are_those_of_a_loop_in_exact_arithmetic(bits: int) -> None:
    expected = one_by_one(3000, bits)
    assert 2800 < len(expected) < 2950
    assert discrete.rounded_gaussian(KEY, len(expected), bits).tolist() == expected


def test_a_wider_margin_changes_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = discrete.rounded_gaussian(KEY, 20_000, 35)
    calls = []
    exactly = discrete._decide_exactly
    monkeypatch.setattr(discrete, "_decide_exactly", lambda *given: calls.append(given) or exactly(*given))
    monkeypatch.setattr(discrete, "MARGIN", 0.1)
    assert np.array_equal(discrete.rounded_gaussian(KEY, 20_000, 35), expected)
    assert len(calls) > 1000
    assert len({more for *_, more in calls}) == len(calls)  # no two proposals share the places that follow


@pytest.mark.parametrize("bits", [0, 2, 4, 7])
def test_probabilities_of_the_integers(bits: int) -> None:
    numbers = discrete.rounded_gaussian(derive_key(KEY, bits), SIZE, bits)
    largest = 6 * 2**bits
    assert np.abs(numbers).max() <= largest
    edges = (np.arange(-largest, largest + 2) - 0.5) / 2**bits
    counts = np.bincount(numbers + largest, minlength=2 * largest + 1)
    assert chi_square_pvalue(counts, np.exp(log_probabilities(edges))) > 1e-3


@pytest.mark.parametrize("bits", [35, 52])
def test_numbers_on_a_fine_grid_are_normal_down_to_their_last_digits(bits: int) -> None:
    numbers = discrete.rounded_gaussian(derive_key(KEY, bits), SIZE, bits)
    assert stats.kstest(numbers * 2.0**-bits, "norm").pvalue > 1e-3
    edges = np.append(np.append(-np.inf, stats.norm.ppf(np.arange(1, 1000) / 1000)), np.inf)
    counts, _ = np.histogram(numbers * 2.0**-bits, edges)
    assert stats.chisquare(counts).pvalue > 1e-3
    for shift in (0, bits // 2):
        assert stats.chisquare(np.bincount((numbers >> shift) & 255, minlength=256)).pvalue > 1e-3
    for lag in (1, 2, 256, discrete.PROPOSALS):
        assert abs(np.corrcoef(numbers[:-lag], numbers[lag:])[0, 1]) < 5 / math.sqrt(SIZE)
    for beyond in (3.0, 4.0):
        wanted = 2 * stats.norm.sf(beyond) * SIZE
        assert abs((np.abs(numbers) > beyond * 2.0**bits).sum() - wanted) < 5 * math.sqrt(wanted)


def test_numbers_are_a_function_of_the_key_on_every_machine() -> None:
    numbers = discrete.rounded_gaussian(KEY, 100_000, 35)
    assert hashlib.sha256(numbers.astype("<i8").tobytes()).hexdigest() == (
        "3e71a693f2dba114c5e29785b9b3884e43408810a9e97ec4c887cdb4d61a6701"
    )
    assert np.array_equal(discrete.rounded_gaussian(KEY, 40_000, 35), numbers[:40_000])  # across a seam
    assert not np.array_equal(discrete.rounded_gaussian(derive_key(KEY, 1), 40_000, 35), numbers[:40_000])
    finer = discrete.rounded_gaussian(KEY, 1000, 45)  # of the same real numbers
    assert np.abs(finer / 2**10 - numbers[:1000]).max() <= 0.5 + 2.0**-11
    assert len(np.unique(numbers)) > 99_990  # no block is repeated
    assert discrete.rounded_gaussian(KEY, 0, 35).shape == (0,)


# The grid


@settings(max_examples=200, deadline=None)
@given(st.floats(1e-30, 1e9), st.floats(1e-3, 1e4), st.integers(1, 90_000_000))
def test_the_rounding_is_counted_in_the_sensitivity(sensitivity: float, noise_multiplier: float, size: int) -> None:
    grid = discrete.grid_for(sensitivity, noise_multiplier, size)
    # 2^b >= noise_multiplier (C / g + 1.5 sqrt(P)) in exact arithmetic.
    left = Fraction(2) ** grid.bits / Fraction(noise_multiplier) - Fraction(sensitivity) / Fraction(grid.spacing)
    assert left > 0
    assert left**2 >= Fraction(9, 4) * size
    added = Fraction(2) ** grid.bits * Fraction(grid.spacing) / (Fraction(noise_multiplier) * Fraction(sensitivity))
    assert 1 < added < 1 + Fraction(1, 10**6)
    # The clipped sum of a batch of 47,000 stays on the grid.
    assert size > 1e8 or 47_000 * sensitivity / grid.spacing < discrete.LARGEST_VALUE


@pytest.mark.parametrize("noise_multiplier", [0.7, 16.9])
def test_neighbours_that_round_apart_are_within_the_noise(noise_multiplier: float) -> None:
    """Two sums at the largest distance, every number of which is rounded away from the other's."""
    size, clipping_norm = 10_000, 1.5
    grid = discrete.grid_for(clipping_norm, noise_multiplier, size)
    step = clipping_norm / math.sqrt(size)  # in every number: C in L2 norm
    steps = step / grid.spacing
    start = (np.floor(steps) + 0.51 - steps) * grid.spacing  # rounds down, and start + step up
    here, there = (discrete.to_grid(np.full(size, x), grid.spacing) for x in (start, start + step))
    moved = math.sqrt(float(np.square(there - here).sum()))
    assert moved > clipping_norm / grid.spacing + 0.2 * math.sqrt(size)
    assert noise_multiplier * moved <= 2.0**grid.bits


@settings(max_examples=200, deadline=None)
@given(st.floats(-(2.0**50), 2.0**50), st.floats(1e-40, 1e10))
def test_integers_are_within_three_quarters_of_the_quotient(quotient: float, spacing: float) -> None:
    value = quotient * spacing
    (integer,) = discrete.to_grid(np.array([value]), spacing).tolist()
    assert abs(Fraction(value) / Fraction(spacing) - integer) <= Fraction(3, 4)


def test_values_beyond_the_grid_are_cut_off() -> None:
    assert discrete.to_grid(np.array([1e300, -1e300, 2.0**52]), 1.0).tolist() == [2**51, -(2**51), 2**51]


# The release


def test_what_is_released_is_a_whole_multiple_of_the_spacing() -> None:
    values = np.random.default_rng(0).normal(size=(40, 50))
    out = discrete.secure_gaussian(values, sensitivity=0.7, noise_multiplier=2.3, key=KEY)
    grid = discrete.grid_for(0.7, 2.3, 2000)
    integers = np.rint(out / grid.spacing).astype(np.int64)
    assert out.shape == values.shape
    assert np.array_equal(integers * grid.spacing, out)
    noise = discrete.rounded_gaussian(KEY, 2000, grid.bits).reshape(40, 50)
    assert np.array_equal(integers - noise, discrete.to_grid(values, grid.spacing))
    # Another sum on the grid moves the integers and nothing else: no digit says which of the two it was.
    moved = values + 3 * grid.spacing * 2.0**20
    other = discrete.secure_gaussian(moved, sensitivity=0.7, noise_multiplier=2.3, key=KEY)
    shift = discrete.to_grid(moved, grid.spacing) - discrete.to_grid(values, grid.spacing)
    assert np.array_equal(np.rint(other / grid.spacing).astype(np.int64), integers + shift)


def test_the_noise_has_the_stated_strength() -> None:
    out = discrete.secure_gaussian(np.full(SIZE, 0.25), sensitivity=0.3, noise_multiplier=4.0, key=KEY)
    scaled = (out - 0.25) / 1.2
    assert stats.kstest(scaled, "norm").pvalue > 1e-3
    assert abs(scaled.std() - 1) < 4 / math.sqrt(2 * SIZE)


def finer_than(released: np.ndarray, unit: float) -> np.ndarray:
    """Returns which numbers are near 0 and no whole multiple of ``unit``."""
    return (np.abs(released) < 0.25) & (released / unit != np.rint(released / unit))


def test_floats_tell_two_sums_apart_and_the_grid_does_not() -> None:
    """The attack that this module is for: 1 + z is a multiple of 2^-53 near 0, but 0 + z mostly is not."""
    noise = gaussian_noise(KEY, 100_000)
    assert finer_than(0.0 + noise, 2.0**-53).mean() > 0.15  # each says for certain that the sum was 0
    assert not finer_than(1.0 + noise, 2.0**-53).any()
    released = [
        discrete.secure_gaussian(np.full(100_000, x), sensitivity=1.0, noise_multiplier=1.0, key=KEY)
        for x in (0.0, 1.0)
    ]
    spacing = discrete.grid_for(1.0, 1.0, 100_000).spacing
    for out in released:
        integers = np.rint(out / spacing).astype(np.int64)
        assert np.array_equal(integers * spacing, out)
        assert stats.chisquare(np.bincount(integers & 255, minlength=256)).pvalue > 1e-3


def test_an_empty_vector_is_released_as_it_is() -> None:
    assert discrete.secure_gaussian(np.zeros(0), sensitivity=1.0, noise_multiplier=1.0, key=KEY).shape == (0,)


# What is refused


@pytest.mark.parametrize(
    ("sensitivity", "noise_multiplier"),
    [(0.0, 1.0), (1.0, 0.0), (math.nan, 1.0), (1.0, math.inf), (-1.0, -1.0), (1e-150, 1e-150), (1.0, 1e300)],
)
def test_noise_that_no_grid_can_hold_is_refused(sensitivity: float, noise_multiplier: float) -> None:
    with pytest.raises(InputError, match="Expected a noise multiplier"):
        discrete.grid_for(sensitivity, noise_multiplier, 100)


def test_the_strongest_noise_is_named() -> None:
    with pytest.raises(InputError, match="for 90000000 numbers") as error:
        discrete.grid_for(1.0, 1e6, 90_000_000)
    strongest = float(str(error.value).split("<=")[1].split()[0])
    assert strongest > 1e5
    assert discrete.grid_for(1.0, strongest, 90_000_000).bits <= discrete.LARGEST_BITS
    with pytest.raises(InputError):
        discrete.grid_for(1.0, 2.1 * strongest, 90_000_000)


@pytest.mark.parametrize("bits", [-1, 53])
def test_grids_that_a_proposal_cannot_fill_are_refused(bits: int) -> None:
    with pytest.raises(ValueError, match="bits"):
        discrete.rounded_gaussian(KEY, 1, bits)


@pytest.mark.parametrize("values", [np.array([np.nan]), np.array([np.inf]), np.zeros(1, dtype=np.float32)])
def test_values_that_are_no_sums_are_refused(values: np.ndarray) -> None:
    with pytest.raises(ValueError, match="finite float64"):
        discrete.secure_gaussian(values, sensitivity=1.0, noise_multiplier=1.0, key=KEY)
