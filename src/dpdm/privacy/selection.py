"""Private selection: a mechanism runs a secret random number of times, and only the result of the best score is kept.

Papernot and Steinke 2022 (arXiv 2110.03620). Knows nothing of images: it is handed a function that does one run.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal, localcontext
from functools import cache
from typing import Generic, TypeVar

from dpdm.privacy.accounting import Repeats
from dpdm.privacy.noise import derive_key, random_words

T = TypeVar("T")
DIGITS = 120  # of the arithmetic that draws the number of runs
UNIFORM_WORDS = 4  # a uniform number has 256 bits
GAMMA_BITS = 200  # of bisection for the logarithmic distribution


@dataclass(frozen=True)
class Best(Generic[T]):
    """The run of the highest score: its candidate's number, its noisy score, its result."""

    candidate: int
    score: float
    result: T


def repeat_and_select(
    run: Callable[[int, bytes], tuple[float, T]], num_candidates: int, repeats: Repeats, key: bytes
) -> Best[T] | None:
    """Runs randomly chosen candidates a random number of times; returns the best run, None if the number was 0.

    Guarantee: let each call of ``run`` be a mechanism whose randomness is its key alone, and that costs no more than a
    ``base``, whichever candidate it is of. A call with a random candidate is then a mechanism that costs no more than
    ``base``; the calls' keys are independent; and so what is returned is the output of ``accounting.Selection`` of
    ``base`` and ``repeats`` (theorems 2 and 6 of the paper), if nothing else is seen: no other run, no number of runs.
    Of equal scores the first run wins, which has the distribution of a random one among them, as the runs are
    independent and alike. Everything is a function of (``key``, data): who repeats it gets the same output, and has
    seen no more.

    Args:
        run: called with the candidate's number and the key of all of the run's randomness; returns a finite score,
            with noise, and whatever else its mechanism releases.
        num_candidates: >= 1. Which one a run takes is uniform but for 2^-40, and independent of the data.
        repeats: how many runs there are.
        key: of this selection alone.
    """
    best: Best[T] | None = None
    for number in range(draw_number_of_runs(repeats, derive_key(key, "number of runs"))):
        candidate = int(random_words(derive_key(key, "candidate", number), 1)[0] % num_candidates)
        score, result = run(candidate, derive_key(key, "run", number))
        if not math.isfinite(score):
            raise ValueError("Expected a finite score, got another.")
        if best is None or score > best.score:
            best = Best(candidate, score, result)
    return best


def draw_number_of_runs(repeats: Repeats, key: bytes) -> int:
    """Returns a number of runs, by inversion of its distribution function; a function of the arguments alone.

    Geometric: g (1 - g)^(k - 1), g = 1 / mean. Logarithmic: (1 - g)^k / (k ln(1/g)). Poisson: e^-mean mean^k / k!.

    Guarantee: the exact distribution, but for a total variation below 1e-75 (a uniform number of 256 bits, 120 digits),
    of a mean that is at most the stated one.

    Args:
        repeats: which distribution.
        key: of this purpose alone.
    """
    words = random_words(key, UNIFORM_WORDS).tobytes()
    number, mass, gamma = _first_mass(repeats)
    with localcontext(prec=DIGITS):
        uniform = Decimal(int.from_bytes(words)) / 2 ** (8 * len(words))
        while uniform >= mass:
            uniform -= mass
            number += 1
            match repeats.distribution:
                case "geometric":
                    mass *= 1 - gamma
                case "logarithmic":
                    mass *= (1 - gamma) * (number - 1) / number
                case "poisson":
                    mass *= Decimal(repeats.mean_runs) / number
    return number


@cache
def _first_mass(repeats: Repeats) -> tuple[int, Decimal, Decimal]:
    """Returns the least number of runs, its probability, and the parameter g (1 where there is none)."""
    with localcontext(prec=DIGITS):
        mean = Decimal(repeats.mean_runs)
        match repeats.distribution:
            case "geometric":
                return 1, 1 / mean, 1 / mean
            case "logarithmic":
                gamma = _logarithmic_parameter(mean)
                return 1, (1 - gamma) / -gamma.ln(), gamma
            case "poisson":
                return 0, (-mean).exp(), Decimal(1)


def _logarithmic_parameter(mean: Decimal) -> Decimal:
    """Returns the smallest g, rounded up, at which the logarithmic mean (1/g - 1) / ln(1/g) is at most ``mean``."""
    low, high = Decimal(0), Decimal(1)
    for _ in range(GAMMA_BITS):
        middle = (low + high) / 2
        low, high = (low, middle) if (1 / middle - 1) <= mean * -middle.ln() else (middle, high)
    return high
