"""Attacks on the real step and on a whole training run, and the lower bounds on epsilon that they prove.

A guarantee is an upper bound on what can be learned about one record. An audit is an attack by somebody who sees more
than anybody will (every noisy gradient) and puts records of his own choice, canaries, among the others. What he learns
bounds epsilon from below. A bound above the claim proves an error in the code; a bound below it proves nothing, but
the closer the two are, the less room an error has.
"""

from typing import Any, Protocol

from dpdm.config import Config
from dpdm.errors import InputError, RunError

GAIN = 4.0  # a canary's gradient has a norm of at least 3 C


class Audit(Protocol):
    """What an audit found, of a step or of a run."""

    @property
    def claimed_epsilon(self) -> float: ...

    @property
    def confidence(self) -> float: ...

    @property
    def is_violation(self) -> bool: ...

    def as_dict(self) -> dict[str, Any]: ...


def check(audit: Audit) -> None:
    """Raises RunError if an audit contradicts the claim."""
    if audit.is_violation:
        raise RunError(
            f"Expected bounds within the claimed epsilon={audit.claimed_epsilon:.4g}, got one above it: the guarantee "
            f"is broken, or this was one of the {1 - audit.confidence:.2g} of all audits that may be wrong: repeat it."
        )


def check_private(config: Config) -> None:
    if not config.dp.enabled:
        raise InputError("Expected dp.enabled=true for an audit, got false: without privacy there is no claim to test.")


def check_confidence(confidence: float) -> None:
    if not 0.5 < confidence < 1:
        raise InputError(f"Expected 0.5 < --confidence < 1, got {confidence}: 0.95 is the default.")
