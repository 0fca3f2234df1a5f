"""``dpdm account``: noise for a budget, epsilon for a noise, the total of several runs. Imports no torch."""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from dpdm.errors import InputError
from dpdm.evaluation.guarantee import UNITS
from dpdm.privacy import accounting
from dpdm.privacy.accounting import Mechanism, Spend, parts, spend_from
from dpdm.privacy.ledger import Ledger
from dpdm.untrusted import MAX_WORDS_BYTES, parse_json, read_bytes

# Beyond these the accountant needs minutes and gigabytes for an answer that means nothing: an epsilon of 100 promises
# no more than an epsilon of 1000, and one below 0.001 is less than the accountant resolves.
EPSILON_RANGE = (1e-3, 100.0)
NOISE_MULTIPLIER_RANGE = (accounting.SMALLEST_NOISE_MULTIPLIER, 1e5)
LARGEST_STEPS = 10**6
LARGEST_DATASET = 10**10
PRIVATE_RELEASE = "private release"  # as ``initial.Source.kind``
MAX_MECHANISMS = 100  # in one total; a run has four at most
PUBLIC = (
    "Expected runs on private images, got {file} of a public model: it spends nothing of theirs and protects nobody on "
    "the public ones; leave it out."
)


@dataclass(frozen=True)
class Question:
    """What to account for; the names are those of the command line's options.

    Attributes:
        dataset_size, batch_size: N and q N, of images or, where persons are protected, of persons.
        epochs, iterations: exactly one of the two.
        epsilon, noise_multiplier: exactly one of the two; the other one is the answer.
        delta: None: the power of ten at or below min(1e-5, 1/(10 N)).
        warmup_noise_multiplier: of what a warm-up buys beside: central images, covariances, cells.
    """

    dataset_size: int | None
    batch_size: int | None
    epochs: float | None
    iterations: int | None
    epsilon: float | None
    noise_multiplier: float | None
    delta: float | None
    warmup_noise_multiplier: tuple[float, ...]


def answer(question: Question) -> dict[str, Any]:
    """Returns noise multiplier, epsilon, delta, sampling rate and number of steps.

    Raises:
        InputError: for what is missing, given twice or out of range.
    """
    size, batch = question.dataset_size, question.batch_size
    if size is None or batch is None:
        raise InputError("Expected --dataset-size and --batch-size, got not both: give both, or --compose FILE.")
    if not 1 <= size <= LARGEST_DATASET:
        raise InputError(f"Expected --dataset-size >= 1 and <= {LARGEST_DATASET}, got {size}.")
    if (question.epochs is None) == (question.iterations is None):
        given = "neither" if question.epochs is None else "both"
        raise InputError(f"Expected one of --epochs and --iterations, got {given}: give exactly one.")
    check_target(question.epsilon, question.noise_multiplier, "--epsilon", "--noise-multiplier")
    delta = accounting.default_delta(size) if question.delta is None else question.delta
    warning = accounting.check_delta_for(delta, size)
    if warning:
        print(f"dpdm: warning: {warning}", file=sys.stderr)
    if not 1 <= batch <= size:
        raise InputError(f"Expected 1 <= --batch-size <= --dataset-size {size}, got {batch}.")
    rate = accounting.sampling_rate(batch, size)
    steps = question.iterations
    if steps is None:
        steps = steps_of("--epochs", question.epochs or 0.0, size, batch)
    check_steps(steps, "--iterations")
    others = []
    for warmup in question.warmup_noise_multiplier:
        check_noise_multiplier(warmup, "--warmup-noise-multiplier")
        others.append(Mechanism("warm-up", 1.0, warmup, 1))
    noise_multiplier = question.noise_multiplier
    if noise_multiplier is None:
        assert question.epsilon is not None  # exactly one of the two is given
        noise_multiplier = accounting.calibrate_noise_multiplier(question.epsilon, delta, rate, steps, others=others)
    mechanisms = [*others, Mechanism("DP-SGD", rate, noise_multiplier, steps)]
    if question.noise_multiplier is not None:  # what was calibrated has its epsilon
        check_worth(mechanisms, delta)
    spent = accounting.epsilon_spent(mechanisms, delta)
    return {
        "noise_multiplier": noise_multiplier,
        "epsilon": spent,
        "delta": delta,
        "sampling_rate": rate,
        "num_steps": steps,
    }


@dataclass(frozen=True)
class _Total:
    """What one file says: of a run its ledger, or its statement.

    Attributes:
        name: of a ledger that of its key, of a statement the hash of its weights.
        spends: what was bought.
        delta: at which epsilon was promised.
        dataset_size: N.
        persons: whether they are protected, not images.
        begun: hashes of the private releases with whose weights the run began.
    """

    name: str
    spends: list[Spend]
    delta: float
    dataset_size: int
    persons: bool
    begun: list[str]


def compose(files: Sequence[Path], delta: float | None) -> dict[str, Any]:
    """Returns the total of several ledgers (.jsonl) and statements (privacy.json), at the largest of their deltas.

    Warns of a private release that a run began with, if it is not among them, and of files that say the same.

    Raises:
        InputError: naming the file that is neither, or a public model's; or if some protect images and others persons:
            the epsilon of one is none of the other.
        RunError: if a ledger is damaged.
    """
    totals = [_read(file) for file in files]
    if len({total.persons for total in totals}) > 1:
        raise InputError("Expected runs that protect the same, got images in some and persons in others: add up each.")
    delta = delta if delta is not None else max(total.delta for total in totals)
    size, unit = max(total.dataset_size for total in totals), "group" if totals[0].persons else "image"
    warnings = [accounting.check_delta_for(delta, size, unit) or ""]
    mechanisms = [spend for total in totals for spend in total.spends]
    if len(parts(mechanisms)) > MAX_MECHANISMS:
        raise InputError(f"Expected at most {MAX_MECHANISMS} mechanisms in a total, got {len(parts(mechanisms))}.")
    for mechanism in parts(mechanisms):
        check_noise_multiplier(mechanism.noise_multiplier, f"noise_multiplier of {mechanism.name}")
    check_worth(mechanisms, delta)
    begun = {name: file for file, total in zip(files, totals, strict=True) for name in total.begun}
    warnings += [
        f"the run of {begun[missing]} began with a private release whose statement is not among the files: if that was "
        "trained on the same images, add it."
        for missing in begun.keys() - {total.name for total in totals}
    ]
    warnings += [
        f"{files[first]} and {files[second]} say the same: if they are of one run, give one of them; here both count."
        for first, second in combinations(range(len(files)), 2)
        if totals[first].name == totals[second].name
        or (totals[first].spends == totals[second].spends and (files[first].suffix != files[second].suffix))
    ]
    for warning in filter(None, warnings):
        print(f"dpdm: warning: {warning}", file=sys.stderr)
    return {"epsilon": accounting.epsilon_spent(mechanisms, delta), "delta": delta, "num_runs": len(files)}


def _read(file: Path) -> _Total:
    """Returns what a ledger or a statement says; raises as ``compose`` does."""
    if not file.is_file():
        raise InputError(f"Expected a ledger or a statement at {file}, found none: check --compose.")
    try:
        if file.suffix == ".jsonl":
            ledger = Ledger(file)
            plan, sources = ledger.header["plan"], ledger.header.get("initial_weights", [])
            if plan["noise_multiplier"] == 0:
                raise InputError(PUBLIC.format(file=file))
            name, spends = str(ledger.header.get("key", file)), ledger.mechanisms()
            delta, size, persons = plan["delta"], int(plan["dataset_size"]), plan.get("unit", "image") == "group"
        else:
            statement = parse_json(read_bytes(file.resolve(), MAX_WORDS_BYTES))
            if not statement["mechanisms"] and "public_images" in statement:
                raise InputError(PUBLIC.format(file=file))
            if not statement["mechanisms"]:  # of converted weights
                raise ValueError("one without mechanisms: what its weights give away is unknown")
            name, sources = str(statement["files"]["model.safetensors"]), statement.get("initial_weights", [])
            spends = [_spend(entry) for entry in statement["mechanisms"]]
            delta, size, persons = statement["delta"], statement["dataset_size"], statement["unit"] == UNITS["group"]
            if type(size) is not int or not 1 <= size <= LARGEST_DATASET:
                raise ValueError(f"dataset_size {size}")
        begun = [source["sha256"] for source in sources if source["kind"] == PRIVATE_RELEASE]
        return _Total(name, spends, float(delta), size, persons, begun)
    except InputError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"Expected a ledger (.jsonl) or a privacy.json in {file}, got {error!r}.") from None


def _spend(entry: dict[str, Any]) -> Spend:
    """Returns what a statement's entry says was bought.

    Raises:
        ValueError: if a number of steps is none.
    """
    spend = spend_from(entry)
    for part in parts([spend]):
        if type(part.num_steps) is not int or part.num_steps < 1:
            raise ValueError(f"num_steps {part.num_steps}")
    return spend


def check_target(
    epsilon: float | None, noise_multiplier: float | None, epsilon_name: str, noise_multiplier_name: str
) -> None:
    """Raises InputError unless exactly one of budget and noise is given, and is one that can be accounted for."""
    if (epsilon is None) == (noise_multiplier is None):
        given = "neither" if epsilon is None else "both"
        raise InputError(f"Expected one of {epsilon_name} and {noise_multiplier_name}, got {given}: give exactly one.")
    if epsilon is not None:
        low, high = EPSILON_RANGE
        if not low <= epsilon <= high:
            raise InputError(
                f"Expected {low:g} <= {epsilon_name} <= {high:g}, got {epsilon}: less than that no noise reaches, "
                "more protects nobody; 1 to 10 is common."
            )
    if noise_multiplier is not None:
        check_noise_multiplier(noise_multiplier, noise_multiplier_name)


def check_noise_multiplier(noise_multiplier: float, name: str) -> None:
    """Raises InputError for a noise multiplier that cannot be accounted for."""
    low, high = NOISE_MULTIPLIER_RANGE
    if not low <= noise_multiplier <= high:
        raise InputError(
            f"Expected {low:g} <= {name} <= {high:g}, got {noise_multiplier}: less noise protects nobody, more "
            "leaves nothing to learn."
        )


def check_steps(steps: int, name: str) -> None:
    """Raises InputError for a number of steps that cannot be accounted for, under the option's or key's ``name``."""
    if not 1 <= steps <= LARGEST_STEPS:
        raise InputError(f"Expected {name} >= 1 and <= {LARGEST_STEPS}, got {steps}: give another number of steps.")


def check_worth(mechanisms: Sequence[Spend], delta: float) -> None:
    """Raises InputError for mechanisms whose epsilon promises nothing, before the accountant is asked for it."""
    check_steps(max(1, sum(mechanism.num_steps for mechanism in parts(mechanisms))), "the number of steps")
    epsilon = accounting.rough_epsilon(mechanisms, delta)
    if epsilon > EPSILON_RANGE[1]:
        raise InputError(
            f"Expected noise that keeps epsilon below {EPSILON_RANGE[1]:g}, got about {epsilon:.3g}: raise the noise "
            "multiplier, or train for less; 1 to 10 is common."
        )


def steps_of(name: str, num_epochs: float, dataset_size: int, expected_batch_size: int) -> int:
    """Returns the steps of so many epochs; raises InputError under the option's or key's ``name`` if there are none."""
    if not (num_epochs > 0 and math.isfinite(num_epochs)):
        raise InputError(f"Expected a finite {name} > 0, got {num_epochs}.")
    steps = accounting.num_iterations(num_epochs, dataset_size, expected_batch_size)
    if steps < 1:
        raise InputError(f"Expected {name} to be enough for one step, got {num_epochs:g}: train for longer.")
    check_steps(steps, f"the steps of {name}={num_epochs:g}")
    return steps
