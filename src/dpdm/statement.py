"""``privacy.json`` of a release, which may be a stranger's: its numbers recomputed, its words compared with our own.

Two accountants that share no code must find the stated epsilon. Every other number must follow from epsilon, delta and
the released config; every sentence must be the one that dpdm writes for such a run, if the same version wrote it.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from typing import Any

from dpdm import account
from dpdm.config import Config
from dpdm.errors import InputError
from dpdm.evaluation.guarantee import UNITS
from dpdm.initial import Source, read_sources
from dpdm.own_statement import GROUPS, LIBRARIES, WORDS, make_statement, public_statement
from dpdm.plan import planned_steps
from dpdm.privacy import accounting, second_accountant, second_selection
from dpdm.privacy.accounting import Mechanism, Selection, Spend, parts, spend_from
from dpdm.privacy.central import MECHANISMS
from dpdm.recipes import score_noise_multiplier
from dpdm.released_files import ALLOWED
from dpdm.untrusted import clean

KNOWN_MECHANISMS = ("DP-SGD", *MECHANISMS)
SCORE = "noisy score"  # of a run that a private selection chooses by
# A statement's epsilon is the first accountant's own number: the rounding of floats apart they are equal. The second
# accountant is within 0.1 % of the truth and, like the first, never below it; so a second number that is larger by more
# than that shows that the first is wrong. Where a use costs next to nothing the first is far above the truth.
FIRST_TOLERANCE = 1e-6
SECOND_TOLERANCE = 1e-3
FAR_ABOVE = 1e-2  # a stated epsilon beyond what both found is no lie, but it was not computed from the mechanisms
# Beyond it the first accountant takes ever longer, for a promise that is empty.
LARGEST_EPSILON = account.EPSILON_RANGE[1]


@dataclass
class Recomputed:
    """What became of a statement.

    Attributes:
        epsilons: by dp-accounting and by the second accountant; None where it was not computed.
        problems: a line for each thing that does not fit.
        notices: a line for each thing that could not be compared and is no problem.
    """

    epsilons: tuple[float | None, float | None] = (None, None)
    problems: list[str] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)


def parse(statement: Any) -> list[Spend]:
    """Returns the statement's mechanisms, after a look at all that is counted with; none if its weights were converted.

    Raises:
        ValueError: with the reason, if a number that matters is none, or is out of range.
    """
    if not isinstance(statement, dict):
        raise ValueError("it is no JSON object")
    missing = {"mechanisms", "files", "epsilon", "delta", "clipping_norm", "dataset_size"} - set(statement)
    if missing:
        raise ValueError(f"it lacks {', '.join(sorted(missing))}")
    entries, files = statement["mechanisms"], statement["files"]
    if not isinstance(entries, list):
        raise ValueError("mechanisms is no list")
    if not isinstance(files, dict) or set(files) != set(ALLOWED) - {"privacy.json"}:
        raise ValueError("files does not name the three files beside it")
    mechanisms = [_spend(entry) for entry in entries]
    if mechanisms:
        for name in ("epsilon", "delta", "clipping_norm"):
            if not _is_number(statement[name]) or not statement[name] > 0:
                raise ValueError(f"{name} is no number above 0")
        if not statement["delta"] < 1:
            raise ValueError("delta is not below 1")
        size = statement["dataset_size"]
        if type(size) is not int or not 1 <= size <= account.LARGEST_DATASET:
            raise ValueError("dataset_size is no number of images or persons")
    return mechanisms


def recompute(statement: dict[str, Any], mechanisms: list[Spend], config: Config) -> Recomputed:
    """Holds a statement with mechanisms, after ``parse``, against accountants, config and our own words."""
    found = Recomputed()
    what = _unknown(mechanisms)
    if what is not None:
        found.problems.append(f"{what}, so epsilon cannot be recomputed")
        return found
    stated, delta = float(statement["epsilon"]), float(statement["delta"])
    try:
        second = _second(mechanisms, delta)
    except InputError as error:
        found.problems.append(f"epsilon cannot be recomputed: {clean(error)}")
        return found
    found.epsilons = (None, second)
    if second > stated * (1 + SECOND_TOLERANCE):
        found.problems.append(_differs(second, stated, "the second accountant"))
    if second > LARGEST_EPSILON * (1 + SECOND_TOLERANCE):
        found.problems.append(f"an epsilon above {LARGEST_EPSILON:g} promises nothing and is not recomputed twice")
        return found
    if sum(mechanism.num_steps for mechanism in parts(mechanisms)) > account.LARGEST_STEPS:
        found.problems.append(f"an epsilon of more than {account.LARGEST_STEPS} steps is not recomputed twice")
        return found
    size = statement["dataset_size"]
    plan = {"dataset_size": size, "num_iterations": planned_steps(config, size)}
    sources, problems = check_sources(statement, config)
    found.problems += problems
    half = "rounding" in statement
    try:
        stated_for = replace(config, dp=replace(config.dp, delta=delta))
        expected = make_statement(stated_for, mechanisms, plan, sources, half=half)
    except InputError as error:
        found.problems.append(f"epsilon cannot be recomputed: {clean(error)}")
        return found
    first = expected["epsilon"]
    found.epsilons = (first, second)
    if first > stated * (1 + FIRST_TOLERANCE):
        found.problems.append(_differs(first, stated, "dp-accounting"))
    if stated > max(first, second) * (1 + FAR_ABOVE):
        found.problems.append(_differs(max(first, second), stated, "both accountants"))
    found.problems += against_config(statement, mechanisms, config)
    _compare_words(statement, expected, found)
    return found


def against_config(statement: dict[str, Any], mechanisms: list[Spend], config: Config) -> list[str]:
    """Returns what in a statement is not as the config would have it."""
    dp, train, size = config.dp, config.train, statement["dataset_size"]
    delta, used = statement["delta"], {m.name: m for m in parts(mechanisms)}
    bought = {m.name: m for m in train.warmup.mechanisms()}
    low, high = account.EPSILON_RANGE
    budget = dp.epsilon if dp.epsilon is not None and low <= dp.epsilon <= high else None
    facts: list[tuple[str, Any, Any]] = [
        ("differential privacy", True, dp.enabled),
        ("unit", statement.get("unit"), UNITS[config.data.unit]),
        ("adjacency", statement.get("adjacency"), WORDS[config.data.unit].adjacency),
        ("delta", delta, dp.delta),
        ("clipping_norm", statement["clipping_norm"], dp.clipping_norm),
    ]
    for name in MECHANISMS:
        facts.append((f"the mechanism of {name}", used.get(name), bought.get(name)))
    unit = config.data.unit
    problems = [] if delta * size < 1 else [f"delta {delta:g} allows publishing one of {size} {unit}s as it is"]
    if steps := used.get("DP-SGD"):
        planned = planned_steps(config, size)
        facts.append(("sampling_rate", steps.sampling_rate, train.expected_batch_size / size))
        if dp.noise_multiplier is not None:
            facts.append(("noise_multiplier", steps.noise_multiplier, dp.noise_multiplier))
        selects = any(isinstance(spend, Selection) for spend in mechanisms)
        if steps.num_steps > planned or (selects and steps.num_steps < planned):  # a run of a selection is never cut
            problems.append(f"{steps.num_steps} steps of DP-SGD are stated, config.json asks for {planned}")
    if score := used.get(SCORE):
        wanted = None if budget is None else Mechanism(SCORE, 1.0, score_noise_multiplier(size, budget, delta), 1)
        facts.append(("the mechanism of the score", score, wanted))
    weights, num_classes = config.sampler.class_weights, config.data.num_classes or 0
    if len(set(weights)) > 1 and not train.warmup.counts(num_classes):
        problems.append("sampler.class_weights in config.json tell how frequent classes are, which was not bought")
    if (weights and len(weights) != num_classes) or any(weight != float(f"{weight:.4g}") for weight in weights):
        problems.append("sampler.class_weights in config.json are not one number of four digits for each class")
    if not config.model.use_ema:
        problems.append("model.use_ema in config.json is false, but a release holds an average")
    if dp.epsilon != budget:
        problems.append(f"dp.epsilon in config.json is {dp.epsilon:g}, a budget that no run has")
    if dp.epsilon is not None and statement["epsilon"] > dp.epsilon * (1 + FIRST_TOLERANCE):
        problems.append(f"epsilon {statement['epsilon']:.9g} is above the budget in config.json, {dp.epsilon:.9g}")
    differ = ((name, a, b) for name, a, b in facts if type(a) is not type(b) or a != b)  # for ==, True is 1
    return problems + [f"{name} is {clean(a)}, by config.json it is {clean(b)}" for name, a, b in differ]


def is_public(statement: Mapping[str, Any]) -> bool:
    """Whether a statement, after ``parse``, says of itself that it is a public model's, without any guarantee."""
    return not statement["mechanisms"] and "public_images" in statement


def check_public(statement: dict[str, Any], config: Config) -> Recomputed:
    """Holds a public model's statement against config and our own words: nothing in it may read as a promise."""
    found = Recomputed()
    if config.dp.enabled or not config.data.public:
        found.problems.append("it is said to be of a public model, by config.json it is not (dp.enabled, data.public)")
    for name in ("epsilon", "delta", "unit", "accountant"):
        if statement.get(name) is not None:
            found.problems.append(f"a public model has no {name}, {clean(statement[name], 40)} is stated")
    images = statement["public_images"]
    number = images.get("number") if isinstance(images, dict) else None
    if type(number) is not int or number < 1 or images != {"name": config.data.name, "number": number}:
        found.problems.append("public_images does not tell the name in config.json and a number of images")
        return found
    sources, problems = check_sources(statement, config)
    found.problems += problems
    _compare_words(statement, public_statement(config, number, sources, half="rounding" in statement), found)
    return found


def check_sources(statement: Mapping[str, Any], config: Config) -> tuple[tuple[Source, ...], list[str]]:
    """Returns the releases with which a statement says that training began, and what does not fit the config."""
    try:
        sources = read_sources(statement.get("initial_weights", []))
    except ValueError as error:
        return (), [clean(error)]
    named = sources[0].sha256 if sources else None
    if named != config.model.init_sha256:
        return sources, ["the weights with which training began are not those that config.json names"]
    return sources, []


def writer(statement: Mapping[str, Any]) -> Any:
    """Returns the version of dpdm that a statement says it is from; anything at all."""
    versions = statement.get("versions")
    return versions.get("dpdm") if isinstance(versions, dict) else None


def no_guarantee(statement: Mapping[str, Any]) -> str:
    """Returns what is to be said of a statement without mechanisms."""
    claim = statement.get("claim")
    claim = claim if isinstance(claim, dict) and statement["epsilon"] is None else statement
    return (
        f"no mechanism is named, so its claim (epsilon {clean(claim.get('epsilon'), 40)}, delta "
        f"{clean(claim.get('delta'), 40)}) cannot be recomputed: there is no guarantee that could be verified"
    )


def _unknown(mechanisms: list[Spend]) -> str | None:
    """Returns what in the mechanisms dpdm would not write of a run; None if there is nothing."""
    known: set[str] = set(KNOWN_MECHANISMS)
    selections = [spend for spend in mechanisms if isinstance(spend, Selection)]
    if selections:
        known.add(SCORE)
        if len(mechanisms) > 1 or selections[0].name != accounting.SELECTION:
            return "beside a private selection there is something else"
        if not {"DP-SGD", SCORE} <= {part.name for part in selections[0].base}:
            return "a private selection lacks its training or its score"
    names = [part.name for part in parts(mechanisms)]
    unknown = sorted(set(names) - known)
    if unknown:
        return f"what {clean(unknown[0], 60)} does is not known here"
    return "a mechanism is named twice" if len(names) != len(set(names)) else None


def _second(mechanisms: list[Spend], delta: float) -> float:
    """Returns epsilon by the second accountant, which has a part of its own for selections."""
    selections = [spend for spend in mechanisms if isinstance(spend, Selection)]
    others = [spend for spend in mechanisms if isinstance(spend, Mechanism)]
    if selections:
        return second_selection.epsilon_with_selections(selections, others, delta)
    return second_accountant.epsilon_upper_bound(others, delta)


def _spend(entry: Any) -> Spend:
    if not isinstance(entry, dict) or "base" not in entry:
        return _mechanism(entry)
    if set(entry) != {"name", "mean_runs", "distribution", "base"}:
        raise ValueError("a selection is not made of name, mean_runs, distribution and base")
    if not isinstance(entry["name"], str) or not isinstance(entry["distribution"], str):
        raise ValueError("a selection has a name or a distribution that is no word")
    if not _is_number(entry["mean_runs"]) or not isinstance(entry["base"], list):
        raise ValueError("a selection has a number that is none, or a base that is no list")
    for part in entry["base"]:
        _mechanism(part)
    return spend_from(entry)


def _mechanism(entry: Any) -> Mechanism:
    if not isinstance(entry, dict) or set(entry) != {"name", "sampling_rate", "noise_multiplier", "num_steps"}:
        raise ValueError("a mechanism is not made of name, sampling_rate, noise_multiplier and num_steps")
    numbers = _is_number(entry["sampling_rate"]) and _is_number(entry["noise_multiplier"])
    if not isinstance(entry["name"], str) or not numbers or type(entry["num_steps"]) is not int:
        raise ValueError("a mechanism has a name that is no word, or a number that is none")
    if not 0 < entry["num_steps"] <= second_accountant.MAX_STEPS:
        raise ValueError(f"num_steps of a mechanism is not in 1..{second_accountant.MAX_STEPS}")
    return Mechanism(**entry)


def _is_number(value: Any) -> bool:
    """Whether a value is a finite number that a float can hold; True is none."""
    return (type(value) is float and math.isfinite(value)) or (type(value) is int and abs(value) < 2**53)


def _differs(found: float, stated: float, whose: str) -> str:
    return f"epsilon is {found:.9g} by the statement's mechanisms and {whose}, {stated:.9g} is claimed"


def _compare_words(statement: dict[str, Any], expected: dict[str, Any], found: Recomputed) -> None:
    """Compares the rest of a statement with the ``expected`` one of this version of dpdm."""
    for name in sorted(set(statement) ^ {*expected, "files"}):
        found.problems.append(f"privacy.json {'holds' if name in statement else 'lacks'} {clean(name, 60)}")
    if "group_privacy" in expected and not _follows(
        statement.get("group_privacy"), float(statement["epsilon"]), float(statement["delta"])
    ):
        found.problems.append("group_privacy does not follow from epsilon and delta")
        return
    words = sorted(set(expected) & set(statement) - {"epsilon", "delta", "mechanisms", "group_privacy", "versions"})
    for name in words:
        if not _is_like(statement[name], expected[name]):
            found.problems.append(f"{name} in privacy.json is not of the kind that dpdm writes")
    versions = statement.get("versions")
    if (
        not isinstance(versions, dict)
        or set(versions) != set(LIBRARIES)
        or not all(map(_is_version, versions.values()))
    ):
        found.problems.append("versions does not name those of the libraries that matter")
        return
    if versions["dpdm"] != version("dpdm"):
        found.notices.append(
            f"The words of the statement and of README.md, by dpdm {versions['dpdm']}, were not compared: this is dpdm "
            f"{version('dpdm')}."
        )
        return
    for name in words:
        if statement[name] != expected[name]:
            found.problems.append(f"{name} in privacy.json is not what dpdm states of such a run")
    if "group_privacy" in expected and _notes(statement["group_privacy"]) != _notes(expected["group_privacy"]):
        found.problems.append("a note in group_privacy is not what dpdm states of such a run")


def _is_like(value: Any, own: Any) -> bool:
    """Whether a part of a statement is what a reader expects there: texts for texts, and the numbers for numbers."""
    if isinstance(own, dict):
        facts = {name: item for name, item in own.items() if not isinstance(item, str)}
        if not isinstance(value, dict):
            return False
        stated = {name: item for name, item in value.items() if name in facts}
        return json.dumps(stated, sort_keys=True) == json.dumps(facts, sort_keys=True)  # for ==, True is 1
    if isinstance(own, list):
        kinds = {str, *map(type, own)}
        return isinstance(value, list) and all(type(item) in kinds for item in value)
    return type(value) is type(own) or not isinstance(own, str)


def _notes(groups: Mapping[str, Any]) -> dict[str, Any]:
    return {size: group.get("note") for size, group in groups.items()}


def _follows(groups: Any, epsilon: float, delta: float) -> bool:
    """Whether ``group_privacy`` is right: k epsilon and delta (1 + e^epsilon + ... + e^((k-1) epsilon)) for each k."""
    if not isinstance(groups, dict) or set(groups) != {str(size) for size in GROUPS}:
        return False
    for size in GROUPS:
        group = groups[str(size)]
        group_delta = sum(delta * math.exp(min(k * epsilon, 700.0)) for k in range(size))
        wanted = (size * epsilon, group_delta) if group_delta < 1 else (None, 1.0)
        if not isinstance(group, dict) or set(group) - {"note"} != {"epsilon", "delta"}:
            return False
        if not isinstance(group.get("note", ""), str):
            return False
        for value, right in zip((group["epsilon"], group["delta"]), wanted, strict=True):
            if not (value is None if right is None else _is_number(value) and math.isclose(value, right)):
                return False
    return True


def _is_version(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[0-9][0-9A-Za-z.+_-]{0,40}", value) is not None
