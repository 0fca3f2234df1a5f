"""The guarantee as a reader meets it: the statement's facts, and what epsilon means in numbers."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from dpdm.errors import InputError

REQUIRED = (
    "epsilon",
    "delta",
    "unit",
    "adjacency",
    "accountant",
    "dataset_size",
    "clipping_norm",
    "mechanisms",
    "assumptions",
    "not_covered",
)
COUNTED = "noisy sizes of the classes"  # words of a statement whose central images counted
UNITS = {"image": "one image", "group": "one person (all of their images)"}  # as data.unit says


@dataclass(frozen=True)
class Mechanism:
    """One kind of access to the private images; its noise is ``noise_multiplier`` times its clip bound."""

    name: str
    sampling_rate: float
    noise_multiplier: float
    num_steps: int


@dataclass(frozen=True)
class Guarantee:
    """(epsilon, delta) differential privacy: for whom, against what, and by which mechanisms."""

    epsilon: float
    delta: float
    unit: str
    adjacency: str
    accountant: str
    dataset_size: int
    clipping_norm: float
    mechanisms: tuple[Mechanism, ...]
    assumptions: tuple[str, ...]
    not_covered: tuple[str, ...]
    repeated: str = ""  # how often all mechanisms were run, where a private selection kept the best run

    def __post_init__(self) -> None:
        _check_parameters(self.epsilon, self.delta)

    @property
    def noun(self) -> str:
        """What ``dataset_size`` counts, in the singular."""
        return "person" if self.unit == UNITS["group"] else "image"

    @classmethod
    def from_statement(cls, statement: Mapping[str, Any]) -> Self:
        """Reads the top level of ``privacy.json``; other keys are left alone.

        Raises:
            InputError: if a key is missing, no mechanism is named, or epsilon or delta is out of range.
        """
        missing = [key for key in REQUIRED if key not in statement]
        if missing:
            raise InputError(f"Expected a privacy statement with {', '.join(missing)}: make the release again.")
        if not statement["mechanisms"]:
            raise InputError(
                "Expected a privacy statement with mechanisms, got one without: it gives no guarantee to show; the "
                "weights were converted from elsewhere, or nothing was trained."
            )
        mechanisms = tuple(
            Mechanism(m["name"], m["sampling_rate"], m["noise_multiplier"], m["num_steps"])
            for entry in statement["mechanisms"]
            for m in entry.get("base", [entry])
        )
        repeated = [f"{m['mean_runs']:g} ({m['distribution']})" for m in statement["mechanisms"] if "base" in m]
        return cls(
            epsilon=statement["epsilon"],
            delta=statement["delta"],
            unit=statement["unit"],
            adjacency=statement["adjacency"],
            accountant=statement["accountant"],
            dataset_size=statement["dataset_size"],
            clipping_norm=statement["clipping_norm"],
            mechanisms=mechanisms,
            assumptions=tuple(statement["assumptions"]),
            not_covered=tuple(statement["not_covered"]),
            repeated=", ".join(repeated),
        )


def attack_power(epsilon: float, delta: float, false_positive_rate: float) -> float:
    """Returns the largest true positive rate that any membership test can have.

    min(1, e^epsilon a + delta, 1 - e^-epsilon (1 - delta - a)) at false positive rate a: the trade-off curve
    of (epsilon, delta) differential privacy, Kairouz, Oh and Viswanath 2015, arXiv 1311.0776.

    Args:
        epsilon: >= 0.
        delta: in [0, 1).
        false_positive_rate: in [0, 1].

    Returns:
        A number in [false_positive_rate, 1].

    Raises:
        InputError: if a value is out of range.
    """
    _check_parameters(epsilon, delta)
    a = false_positive_rate
    if not 0 <= a <= 1:
        raise InputError(f"Expected 0 <= false_positive_rate <= 1, got {a}: give a share, such as 0.01 for 1 %.")
    growth = math.exp(min(epsilon, 700.0))  # e^700 is near the largest float; the bound is 1 long before
    return min(1.0, growth * a + delta, 1 - (1 - delta - a) / growth)


def round_up(value: float, digits: int = 4) -> str:
    """Writes a bound with ``digits`` significant digits, never smaller than it is: 9.99987 becomes 10."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    unit = 10.0 ** (math.floor(math.log10(abs(value))) - digits + 1)
    # 1e-9 forgives what binary floats add to a number such as 0.3.
    text = f"{math.ceil(value / unit * (1 - 1e-9)) * unit:.{digits}g}"
    return text.replace("e-0", "e-").replace("e+0", "e+")


def percent_up(share: float) -> str:
    """Writes a share as a percentage that is never smaller than it is, with more digits close to 100 %."""
    digits = 3 if share > 0.99 else 1
    return f"{math.ceil(share * 100 * 10**digits - 1e-6) / 10**digits:.{digits}f}".rstrip("0").rstrip(".") + " %"


def odds(delta: float) -> str:
    """Writes a small probability as ``1 in 100,000``, never smaller than it is."""
    return f"1 in {math.floor(1 / delta * (1 + 1e-9)):,}" if delta > 0 else "never"


def _check_parameters(epsilon: float, delta: float) -> None:
    if not (math.isfinite(epsilon) and epsilon >= 0):
        raise InputError(f"Expected a finite epsilon >= 0, got {epsilon}: without one there is no guarantee to show.")
    if not 0 <= delta < 1:
        raise InputError(f"Expected 0 <= delta < 1, got {delta}: it is a probability, such as 1e-5.")
