"""Gaussian noise without floating point: what is released is a vector of integers, times a public spacing.

The low digits of a float sum plus float noise depend on the sum, because floats are unevenly spaced: Mironov 2012 ("On
significance of the least significant bits for differential privacy") for Laplace noise, Jin et al. 2022 (arXiv
2112.05307) for Gaussian noise and DP-SGD. Here a sum x of P numbers is rounded to a grid of spacing g, and the noise
is added in integers:

    k = round(x / g) + round(2^b Z),    Z standard normal, independent in every coordinate;    released: g k

**Why it is private.** Let n = round(x / g), a vector of integers. As round(n + t) = n + round(t) for every real t but
the halves, which 2^b Z hits with probability 0, k is round(n + 2^b Z): a function of the *ideal* Gaussian mechanism
over the real numbers, applied to n. So its privacy, under Poisson sampling and composition too, is that of the
Gaussian mechanism whose noise multiplier is 2^b over the sensitivity of n: nothing changes for the accountant.
Whatever is made of k later (floats, division by the expected batch size, Adam) is a function of k.

**Sensitivity of n.** Rounding moves each of two neighbouring sums by at most 3/4 of a spacing in a coordinate (1/2 by
rounding, 1/4 by the float64 division), so n moves by at most C / g + 1.5 sqrt(P) in L2 norm. ``grid_for`` chooses g
and b such that 2^b is at least the noise multiplier times that, for 1e-6 more noise. To round each example's
contribution towards zero would leave the norm at C, but is a pass over all examples' gradients where this one is over
their sum.

**Why the integers are right.** Z is sampled by rejection, with binary places that are taken from the stream as they
are: the idea of Karney 2016 ("Sampling exactly from the normal distribution", arXiv 1303.6257). A proposal for |Z| is
a cell and places within it; a uniform number U decides whether it is kept. Floats only help to compare U with a
probability: within ``MARGIN`` of a tie, far more than they err, 256 more places of each side are drawn and the
comparison is made in 120 decimal digits. So the integers are the same on every processor, and their distribution is
the right one, but for |Z| >= 16, which is never proposed: a total variation distance below ``TOTAL_VARIATION`` per
number. The 2^60 numbers that no training draws would add less than 2e-39 (1 + e^epsilon) to delta.

**Why not** the discrete Gaussian of Canonne, Kamath and Steinke 2020 (arXiv 2004.00010)? It is as private in
concentrated DP, but not symmetric under rotations: we know of no proof that the one-dimensional privacy loss which
accountants compose for sampled batches bounds that of a vector. The sum of several float Gaussians of Holohan and
Braghin 2021 (arXiv 2107.10138) makes the attack expensive; it is a heuristic.

**Time.** How long sampling takes depends on the stream, never on the sums: on how many of 2^15 proposals were kept,
and so on no single number (Jin et al. measure single draws). Timings stay private all the same.
"""

import math
from dataclasses import dataclass
from decimal import Decimal, localcontext
from functools import cache

import numpy as np

from dpdm.errors import InputError
from dpdm.privacy.noise import derive_key, random_words

# A proposal is one word: SLOT_BITS choose the cell, one is the sign, the rest are binary places within the cell.
SLOT_BITS = 14
CELL_BITS = 4  # a cell is 2^-4 wide
CELLS = 256  # they reach to 16
FRACTION_BITS = 64 - SLOT_BITS - 1
PLACES = CELL_BITS + FRACTION_BITS  # binary places of |Z| in a proposal: 53
# Slots per unit of density: the largest whole number with which all cells fit 2^SLOT_BITS slots. 96.2 % are kept.
WEIGHT = 786
PROPOSALS = 2**15  # at a time; they stay in a core's cache
# 64 times what float64 errs in comparing U with a probability: below 2^-46, of which 2^-48 comes from rounding y^2 / 2
# and 2^-47 is left for exp, which errs by an ulp or so.
MARGIN = 2.0**-40
MORE_WORDS = 4  # words by which each side of a comparison within the margin is extended
TOTAL_VARIATION = 1.3e-57  # P(|Z| >= 16) = 1.278e-57
LARGEST_BITS = PLACES - 1
LARGEST_VALUE = 2.0**51  # in units of the grid: there float64 still has quarters
SLACK_BITS = 20  # rounding costs 2^-20 of the noise


@dataclass(frozen=True)
class Grid:
    """A public grid and the noise on it.

    Attributes:
        spacing: g, in units of what is released.
        bits: b; the noise has standard deviation 2^b spacings.
    """

    spacing: float
    bits: int


def grid_for(sensitivity: float, noise_multiplier: float, size: int) -> Grid:
    """Returns a grid on which the noise is right for a change by ``sensitivity`` *before* rounding.

    Guarantee: 2^bits >= noise_multiplier (sensitivity / spacing + 1.5 sqrt(size)), this function's own roundings
    included, and 2^bits spacing <= (1 + 1e-6) noise_multiplier sensitivity. The grid depends on public values alone.

    Args:
        sensitivity: L2, > 0, of the float64 vector that will be rounded.
        noise_multiplier: noise standard deviation / sensitivity, > 0.
        size: numbers in the vector, >= 0.

    Raises:
        InputError: if the noise is too strong for a grid that is fine enough, or out of a float's range.
    """
    if not (sensitivity > 0 and noise_multiplier > 0 and 1e-200 < noise_multiplier * sensitivity < 1e200):
        raise InputError(
            "Expected a noise multiplier and a clipping norm > 0 whose product is in (1e-200, 1e200), "
            f"got {noise_multiplier} and {sensitivity}."
        )
    bits = max(0, math.ceil(SLACK_BITS + math.log2(1.5 * noise_multiplier) + math.log2(max(size, 1)) / 2))
    if bits > LARGEST_BITS:
        most = 0.99 * noise_multiplier * 2.0 ** (LARGEST_BITS - bits)  # still so when rounded to three digits
        raise InputError(
            f"Expected a noise multiplier <= {most:.3g} for {size} numbers with dp.secure_noise, "
            f"got {noise_multiplier:.3g}: set dp.secure_noise=false."
        )
    rounding = 1.5 * noise_multiplier * math.sqrt(size)
    # Solves 2^b g = noise_multiplier * (sensitivity + 1.5 g sqrt(P)) for g; 2^-40 covers the rounding of this line.
    spacing = noise_multiplier * sensitivity / (2.0**bits - rounding) * (1 + 2.0**-40)
    return Grid(spacing, bits)


def secure_gaussian(values: np.ndarray, *, sensitivity: float, noise_multiplier: float, key: bytes) -> np.ndarray:
    """Returns ``values`` with Gaussian noise, each a whole multiple of ``grid_for(...).spacing``.

    Guarantee: where one record moves ``values`` by at most ``sensitivity`` in L2 norm, a function of the Gaussian
    mechanism with the given noise multiplier, as argued at the top of this module: rounding counted, floats included.

    Args:
        values: float64, P numbers in any shape. Cut off at 2^51 spacings, which takes 7e8 / sqrt(P) records that push
            the same number as far as they can.
        sensitivity: L2, of ``values`` as computed.
        noise_multiplier: noise standard deviation / sensitivity.
        key: of this one release alone.

    Returns:
        float64 in the shape of ``values``: the integers times the spacing.

    Raises:
        ValueError: if ``values`` are not finite float64.
        InputError: see ``grid_for``.
    """
    grid = grid_for(sensitivity, noise_multiplier, values.size)
    integers = to_grid(values, grid.spacing)
    integers += rounded_gaussian(key, values.size, grid.bits).reshape(values.shape)
    return integers * grid.spacing


def to_grid(values: np.ndarray, spacing: float) -> np.ndarray:
    """Returns values / spacing as integers, int64, each within 3/4 of the real quotient, cut off at +-2^51."""
    if values.dtype != np.float64 or not np.isfinite(values).all():
        raise ValueError(f"Expected finite float64 values, got dtype {values.dtype}, or some that are not finite.")
    quotient = values / spacing
    np.clip(quotient, -LARGEST_VALUE, LARGEST_VALUE, out=quotient)  # moves no two values apart
    return np.rint(quotient, out=quotient).astype(np.int64)


def rounded_gaussian(key: bytes, size: int, bits: int) -> np.ndarray:
    """Returns (size,) int64, independent: 2^bits Z, rounded to the nearest integer, Z standard normal over the reals.

    Guarantee: the exact distribution but for ``TOTAL_VARIATION`` per number, given a stream of independent uniform
    bits. The numbers are a function of the arguments alone, on every machine.

    Args:
        key: of this purpose alone.
        size: how many, >= 0.
        bits: from 0 to 52.
    """
    if not 0 <= bits <= LARGEST_BITS:
        raise ValueError(f"Expected 0 <= bits <= {LARGEST_BITS}, got {bits}.")
    numbers = np.empty(size, dtype=np.int64)
    filled = block = 0
    while filled < size:
        words = random_words(derive_key(key, "proposals", block), 2 * PROPOSALS)
        kept = _kept_of(words, bits, derive_key(key, "more places", block))[: size - filled]
        numbers[filled : filled + len(kept)] = kept
        filled += len(kept)
        block += 1
    return numbers


def _kept_of(words: np.ndarray, bits: int, more_key: bytes) -> np.ndarray:
    """Returns the numbers of the proposals that are kept, in order. Half of ``words`` propose, the others decide.

    With f(z) = exp(-z^2 / 2), cell i = [i/16, (i+1)/16) has n_i >= WEIGHT f(i/16) of the equally likely slots. So
    |Z| = y is proposed with a density proportional to n_i, and kept with probability WEIGHT f(y) / n_i <= 1: the
    product is proportional to f(y), as it must be.
    """
    proposals, chances = words.reshape(2, -1)
    cells = _cells()
    cell = cells.of_slot[(proposals >> np.uint64(64 - SLOT_BITS)).view(np.int64)]
    # |Z| lies in [magnitude, magnitude + 1) 2^-PLACES.
    magnitude = cell.astype(np.int64) << FRACTION_BITS
    magnitude |= (proposals & np.uint64(2**FRACTION_BITS - 1)).view(np.int64)
    keep = chances < cells.surely_kept[cell]
    unsure = np.flatnonzero(~keep)
    keep[unsure] = _decide(cell[unsure], magnitude[unsure], chances[unsure], unsure, more_key)
    rounded = (magnitude + (1 << (LARGEST_BITS - bits))) >> (PLACES - bits)
    sign = ((proposals >> np.uint64(FRACTION_BITS)) & np.uint64(1)).view(np.int64)
    return ((rounded ^ -sign) + sign)[keep]


def _decide(
    cell: np.ndarray, magnitude: np.ndarray, chances: np.ndarray, positions: np.ndarray, more_key: bytes
) -> np.ndarray:
    """Returns whether U < WEIGHT f(y) / n_i, for real numbers U and y that begin with the given bits; (n,) bool.

    Ties are decided by more bits, which belong to a proposal's position in its block, so that no two share them.
    """
    probability = np.exp(-0.5 * np.square(magnitude * 2.0**-PLACES)) * (WEIGHT / _cells().slots[cell])
    above = probability - chances * 2.0**-64
    keep = above > 0
    for i in np.flatnonzero(np.abs(above) < MARGIN):
        more = random_words(derive_key(more_key, int(positions[i])), 2 * MORE_WORDS).tobytes()
        keep[i] = _decide_exactly(int(cell[i]), int(magnitude[i]), int(chances[i]), more)
    return keep


def _decide_exactly(cell: int, magnitude: int, chance: int, more: bytes) -> bool:
    """Returns the same from 120 decimal digits, with the bits of ``more`` appended, half to each side."""
    half = len(more) // 2
    with localcontext(prec=120):
        y = Decimal((magnitude << 8 * half) + int.from_bytes(more[:half])) / 2 ** (PLACES + 8 * half)
        uniform = Decimal((chance << 8 * half) + int.from_bytes(more[half:])) / 2 ** (64 + 8 * half)
        return uniform * int(_cells().slots[cell]) < WEIGHT * (-y * y / 2).exp()


@dataclass(frozen=True)
class _Cells:
    """What is known of each cell.

    Attributes:
        of_slot: the cell of each slot, (2^SLOT_BITS,) uint8.
        slots: n_i, how many slots a cell has, (CELLS,) int64.
        surely_kept: chances below this are below the probability everywhere in the cell, (CELLS,) uint64.
    """

    of_slot: np.ndarray
    slots: np.ndarray
    surely_kept: np.ndarray


@cache
def _cells() -> _Cells:
    with localcontext(prec=60):
        heights = [WEIGHT * (-((Decimal(i) / 2**CELL_BITS) ** 2) / 2).exp() for i in range(CELLS + 1)]
        slots = [math.ceil(height) for height in heights[:CELLS]]
        slots[0] += 2**SLOT_BITS - sum(slots)
        # f falls: the right end of a cell is its least. One less, for the digits behind the 60th.
        surely_kept = [int(2**64 * right / n) - 1 for right, n in zip(heights[1:], slots, strict=True)]
    return _Cells(
        np.repeat(np.arange(CELLS, dtype=np.uint8), slots),
        np.array(slots),
        np.array([max(0, number) for number in surely_kept], dtype=np.uint64),
    )
