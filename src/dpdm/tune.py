"""``dpdm tune``: settings for ``dpdm train``, from public facts alone or by trying them on public stand-in images."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from dpdm import account
from dpdm import config as configs
from dpdm.config import Config
from dpdm.data.archive import Unit
from dpdm.errors import InputError
from dpdm.files import write_text
from dpdm.plain_yaml import parse_yaml
from dpdm.plan import Plan, make_plan
from dpdm.privacy import accounting
from dpdm.recipes import recipe
from dpdm.untrusted import read_bytes

MAX_CANDIDATES = 100


@dataclass(frozen=True)
class Facts:
    """What is public of private images; the names are those of the command line's options.

    Attributes:
        dataset_size: N, images, or groups of them as ``unit`` says.
        resolution, channels, classes: of the images; 0 classes: without labels.
        epsilon: the budget.
        delta: None: the power of ten at or below min(1e-5, 1/(10 N)).
    """

    dataset_size: int
    resolution: int
    channels: int
    classes: int
    epsilon: float
    delta: float | None = None
    unit: Unit = "image"

    def __post_init__(self) -> None:
        if not 1 <= self.dataset_size <= account.LARGEST_DATASET:
            raise InputError(f"Expected --dataset-size >= 1 and <= {account.LARGEST_DATASET}, got {self.dataset_size}.")
        account.check_target(self.epsilon, None, "--epsilon", "dp.noise_multiplier")
        if self.channels not in (1, 3):
            raise InputError(f"Expected --channels to be 1 (grey) or 3 (RGB), got {self.channels}.")
        configs.load([], self.of_data())
        accounting.check_delta_for(self.the_delta, self.dataset_size, self.unit)

    @property
    def the_delta(self) -> float:
        return accounting.default_delta(self.dataset_size) if self.delta is None else self.delta

    def of_data(self) -> list[str]:
        return [
            f"data.resolution={self.resolution}",
            f"data.num_channels={self.channels}",
            f"data.num_classes={self.classes}",
        ]

    def overrides(self) -> list[str]:
        """Returns the recipe for these facts, with budget and facts, as ``key=value``."""
        found = recipe(
            dataset_size=self.dataset_size,
            resolution=self.resolution,
            num_channels=self.channels,
            num_classes=self.classes,
            epsilon=self.epsilon,
            delta=self.the_delta,
            unit=self.unit,
        )
        return [*found, *self.of_data(), f"dp.epsilon={self.epsilon!r}", f"dp.delta={self.the_delta!r}"]


def recommend(facts: Facts) -> str:
    """Returns the recipe for ``facts`` as YAML, with what it is based on in comments. Reads no image."""
    overrides = facts.overrides()
    config = configs.load([], overrides)
    classes = f"{facts.classes} classes" if facts.classes else "no classes"
    colour = "grey" if facts.channels == 1 else "colour"
    based_on = [
        f"The recipe for {facts.dataset_size} {facts.unit}s, {facts.resolution} x {facts.resolution} pixels, {colour}, "
        f"{classes}, at epsilon {facts.epsilon:g}, delta {facts.the_delta:g}.",
        "It follows from these numbers alone (src/dpdm/recipes.py); no image was read. It was developed on public data",
        "sets: for these themselves dp.selection says that this choice is not accounted for.",
        *_plan_lines(config, make_plan(config, facts.dataset_size)),
    ]
    return to_yaml(overrides, based_on)


def to_yaml(overrides: Sequence[str], comments: Sequence[str]) -> str:
    """Returns ``key=value`` pairs as YAML that ``dpdm train --config`` takes, under lines of comments."""
    sections = configs.read_overrides(overrides)
    lines = [*comments, "Train: dpdm train --config THIS_FILE --workdir DIR -- data.path=IMAGES"]
    return "".join(f"# {line}\n" for line in lines) + yaml.safe_dump(sections, sort_keys=False, allow_unicode=True)


def write_yaml(text: str, path: Path) -> None:
    """Writes a config file.

    Raises:
        InputError: if there is a file.
    """
    check_new(path)
    write_text(path, text)


def check_new(path: Path) -> None:
    """Raises InputError if there is something at ``path``."""
    if path.exists():
        raise InputError(f"Expected no file at {path}, got one: choose another name for --yaml.")


def built_in_candidates(config: Config) -> tuple[tuple[str, ...], ...]:
    """Returns variations of ``config`` that cost the same privacy: itself, learning rates, draws, preconditioning."""
    rate, draws = config.optim.learning_rate, config.loss.noise_multiplicity
    return (
        (),
        (f"optim.learning_rate={rate / 2:g}",),
        (f"optim.learning_rate={2 * rate:g}",),
        (f"loss.noise_multiplicity={4 * draws}",),
        (f"model.denoiser={'v' if config.model.denoiser == 'edm' else 'edm'}",),
    )


def read_candidates(path: Path) -> tuple[tuple[str, ...], ...]:
    """Returns the candidates in a YAML file, a list of lists of ``key=value``; an empty list is the recipe itself.

    Raises:
        InputError: if it is something else, holds fewer than two, one of them twice, or a key that is not known.
    """
    try:
        content = parse_yaml(read_bytes(path.resolve(), configs.MAX_CONFIG_BYTES).decode("utf-8-sig"))
    except ValueError as error:
        raise InputError(f"Expected a YAML file at {path}, could not read it: {error}.") from None
    if not isinstance(content, list) or not all(
        isinstance(values, list) and all(isinstance(value, str) for value in values) for values in content
    ):
        raise InputError(
            f"Expected a list of lists of key=value in {path}, got something else: - [optim.schedule=linear]"
        )
    found = tuple(tuple(values) for values in content)
    if not 2 <= len(found) <= MAX_CANDIDATES or len(set(found)) != len(found):
        raise InputError(
            f"Expected 2 to {MAX_CANDIDATES} different candidates in {path}, got {len(found)}, or twice one."
        )
    for values in found:
        configs.load([], values)
    return found


def _plan_lines(config: Config, plan: Plan) -> list[str]:
    lines = [
        f"Plan: {plan.num_iterations} steps on batches of {plan.expected_batch_size} (sampling rate "
        f"{plan.sampling_rate:.4g}), noise multiplier {plan.noise_multiplier:g}, clipping norm "
        f"{config.dp.clipping_norm:g}: epsilon {plan.epsilon:.4g}.",
    ]
    if plan.warmup is not None:
        lines.append(f"Before them central images, noise multiplier {plan.warmup.noise_multiplier:g}.")
    return lines
