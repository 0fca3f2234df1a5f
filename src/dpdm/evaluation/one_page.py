"""The privacy statement on one page of plain text, for whoever has to answer for a release and is no mathematician."""

import math
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from dpdm.evaluation.guarantee import COUNTED, Guarantee, Mechanism, attack_power, odds, percent_up, round_up

WIDTH = 110  # characters in a line; the page then has about 65 lines
FALSE_ALARMS = 0.01
MEANING = {
    "DP-SGD": "DP-SGD (training in noisy steps)",
    "central images": "Central images (a noisy average of each class)",
    "central covariances": "Central covariances (noisy measures of how each class's images differ)",
    "central cells": "Central cells (noisy size, average and measures of difference of each part of a class)",
    "noisy score": "Noisy score (how many are told right by a classifier that learned from synthetic images)",
}
RESTS_ON = {
    "threat_model": "Who attacks",
    "randomness": "Randomness",
    "floating_point": "Rounding",
    "rounding": "Weights",
}
NOT_COVERED = {
    "composition_scope": "Scope",
    "hyperparameters": "How the settings were chosen",
    "holdout": "Images held out",
}


def one_page(statement: Mapping[str, Any], checks: Sequence[str], limits: Sequence[str]) -> str:
    """Returns the page.

    Args:
        statement: the content of ``privacy.json``, after it was checked; its words are shown as they are.
        checks: what was checked, a sentence each.
        limits: what could not be, likewise.

    Raises:
        InputError: if the statement gives no guarantee.
    """
    guarantee = Guarantee.from_statement(statement)
    sections = [
        ("WHAT IS PROMISED", _promise(guarantee, statement)),
        (
            "WHAT WAS DONE WITH THE PRIVATE IMAGES",
            _mechanisms(guarantee, counted=COUNTED in str(statement.get("warmup"))),
        ),
        ("WHAT THE PROMISE RESTS ON", [*guarantee.assumptions, *_said(statement, RESTS_ON)]),
        ("WHAT IT DOES NOT COVER", [*guarantee.not_covered, *_said(statement, NOT_COVERED)]),
        ("WHAT WAS CHECKED HERE", checks),
        ("WHAT NO CHECK OF A RELEASE CAN SHOW", limits),
    ]
    headline = f"PRIVACY STATEMENT: epsilon {round_up(guarantee.epsilon)}, delta {round_up(guarantee.delta)}"
    return _lay_out(headline, sections)


def public_page(statement: Mapping[str, Any], checks: Sequence[str], limits: Sequence[str]) -> str:
    """Returns the page of a public model, which says that there is no guarantee; arguments as of ``one_page``."""
    images = statement["public_images"]
    what = (
        f"This model was trained without differential privacy on {images['number']:,} images called {images['name']}, "
        "which are declared public. No guarantee is given for them, and nobody else gets one from this page."
    )
    sections = [
        ("WHAT THIS IS", [what, *statement["assumptions"]]),
        ("WHAT IS NOT COVERED", statement["not_covered"]),
        ("WHAT WAS CHECKED HERE", checks),
        ("WHAT NO CHECK OF A RELEASE CAN SHOW", limits),
    ]
    return _lay_out("PUBLIC MODEL, NO GUARANTEE", sections)


def _lay_out(headline: str, sections: Sequence[tuple[str, Iterable[str]]]) -> str:
    lines = [headline]
    for title, items in sections:
        lines += ["", title, *(line for item in items for line in _wrap(item))]
    return "\n".join(lines)


def _promise(guarantee: Guarantee, statement: Mapping[str, Any]) -> Iterator[str]:
    factor = round_up(math.exp(guarantee.epsilon), 3) if guarantee.epsilon < 20 else "more than 400 million"
    power = percent_up(attack_power(guarantee.epsilon, guarantee.delta, FALSE_ALARMS))
    unit, noun, size = guarantee.unit, guarantee.noun, f"{guarantee.dataset_size:,}"
    whom = f"{unit}, with its label, of the {size}" if noun == "image" else f"{unit}, of the {size} persons"
    yield (
        f"Protected is {whom} that the model learned from: the released model, and every image drawn from it, would "
        f"have come out much the same without {'it' if noun == 'image' else 'them'}."
    )
    yield (
        "How much the same: the chance that the release shows a certain thing, whatever one looks for, is with "
        f"{unit} at most e to the power epsilon, which is {factor}, times what it is without, plus delta, which is "
        f"{odds(guarantee.delta)}; and the other way round. Smaller numbers protect better."
    )
    yield (
        f"For an attacker this means: whoever wants to tell whether a certain {noun} took part, and to be wrong "
        f"for at most 1 % of the {noun}s that did not, recognises at most {power} of those that did, whatever else "
        "they know."
    )
    groups = statement.get("group_privacy") or {}
    if groups:
        several = "Several images of one person" if noun == "image" else "Several persons"
        told = "; ".join(_group(size, group, noun) for size, group in groups.items())
        yield f"{several} are protected less: {told}."
    yield f"In the terms of the field: (epsilon, delta)-differential privacy; neighbours: {guarantee.adjacency}."


def _group(size: str, group: Mapping[str, Any], noun: str) -> str:
    if group["epsilon"] is None:
        return f"{size} {noun}s together not at all"
    return f"{size} together by epsilon {round_up(group['epsilon'])}, delta {round_up(group['delta'])}"


def _mechanisms(guarantee: Guarantee, *, counted: bool) -> Iterator[str]:
    if guarantee.repeated:
        yield (
            "Private selection: all of this was done a secret random number of times, on average "
            f"{guarantee.repeated}, each time anew, with settings drawn from a list, and only the model of the best "
            "noisy score was kept. Epsilon counts all of it."
        )
    for mechanism in guarantee.mechanisms:
        meaning = MEANING.get(mechanism.name, mechanism.name)
        if counted and mechanism.name == "central images":
            meaning = "Central images (a noisy average of each class, and its noisy size)"
        yield f"{meaning}: {_use(mechanism, guarantee.noun)}"
    yield f"In a step of training the pull of {guarantee.unit} was cut to length {guarantee.clipping_norm:g}."


def _use(mechanism: Mechanism, noun: str) -> str:
    times = "once" if mechanism.num_steps == 1 else f"{mechanism.num_steps:,} times"
    part = f"all {noun}s" if mechanism.sampling_rate == 1 else f"each {noun} with chance {mechanism.sampling_rate:.4g}"
    noise = f"noise of {mechanism.noise_multiplier:.5g} times the largest pull that one of them can have"
    return f"{times}, {part}, under random {noise}."


def _said(statement: Mapping[str, Any], names: Mapping[str, str]) -> list[str]:
    return [f"{title}: {statement[name]}." for name, title in names.items() if name in statement]


def _wrap(item: str) -> list[str]:
    return textwrap.wrap(item, WIDTH, initial_indent="- ", subsequent_indent="  ", break_on_hyphens=False)
