"""``dpdm tune``: settings for ``dpdm train``, from public facts alone or by trying them on public stand-in images."""

import contextlib
import io
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import yaml

from dpdm import account
from dpdm import config as configs
from dpdm.checkpoint import TrainState
from dpdm.config import Config
from dpdm.data.archive import ArchiveWriter, ImageArchive, Unit
from dpdm.data.prepare import prepare_with_holdout
from dpdm.data.sources import source_path
from dpdm.data.transforms import Resolution, Transform
from dpdm.errors import InputError
from dpdm.evaluate import ImageSet, accuracy, distance, extractor_for, read_set
from dpdm.evaluation.features import extract
from dpdm.evaluation.frechet import feature_statistics
from dpdm.evaluation.guarantee import round_up
from dpdm.files import write_text
from dpdm.generate import as_drawn, denoiser_with, draw
from dpdm.plain_yaml import read_overrides, read_yaml, sets
from dpdm.plan import Plan, make_plan
from dpdm.privacy import accounting
from dpdm.recipes import recipe
from dpdm.synthesize import HOLDOUT_FRACTION
from dpdm.train import train
from dpdm.workdir import Workdir

MAX_CANDIDATES = 100
FIXED_DP = ("dp.epsilon", "dp.noise_multiplier", "dp.delta", "dp.seed", "dp.enabled")  # or a section that holds one
SCORE_IMAGES = 2000  # synthetic images that a candidate is judged by
HOLDOUT_KEY = bytes(32)  # of public images: anybody may know which were held out

Utility = Literal["accuracy", "frechet"]
UTILITIES = {
    "accuracy": "accuracy on held-out images of logistic regression that learned from synthetic ones",
    "frechet": "Frechet distance of synthetic images to the stand-in's training images",
}


def _check_budget(dataset_size: int, epsilon: float, delta: float | None, unit: Unit = "image") -> None:
    """Raises InputError unless the options' N, epsilon and delta can be accounted for; a delta of None always can."""
    if not 1 <= dataset_size <= account.LARGEST_DATASET:
        raise InputError(f"Expected --dataset-size >= 1 and <= {account.LARGEST_DATASET}, got {dataset_size}.")
    account.check_target(epsilon, None, "--epsilon", "dp.noise_multiplier")
    if delta is not None:
        accounting.check_delta_for(delta, dataset_size, unit)


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
        _check_budget(self.dataset_size, self.epsilon, self.delta, self.unit)
        if self.channels not in (1, 3):
            raise InputError(f"Expected --channels to be 1 (grey) or 3 (RGB), got {self.channels}.")
        configs.load([], self.of_data())

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
    sections = read_overrides(overrides)
    lines = [
        *comments,
        "Train: dpdm train --config THIS_FILE --workdir DIR -- data.path=IMAGES",
        "Who changes a key here says so in dp.selection; of keys behind -- dpdm train says it by itself.",
    ]
    return "".join(f"# {line}\n" for line in lines) + yaml.safe_dump(sections, sort_keys=False, allow_unicode=True)


def write_yaml(text: str, path: Path) -> None:
    """Writes a config file.

    Raises:
        InputError: if there is a file.
    """
    check_new(path)
    write_text(path, text)


def check_new(path: Path) -> None:
    """Raises InputError if there is something at ``path``, or no folder that could hold it."""
    if path.exists():
        raise InputError(f"Expected no file at {path}, got one: choose another name for --yaml.")
    if not path.absolute().parent.is_dir():
        raise InputError(f"Expected --yaml in a folder, got {path}: {path.parent} is none; make it first.")


@dataclass(frozen=True)
class PublicChoice:
    """What a user asked for: which settings do best on public images, as they would be used on the private ones.

    Attributes:
        source: the public stand-in: a data set that is known by name, or anything else that is declared ``public``.
        dataset_size, epsilon, delta: of the private images; see ``Facts``.
        utility: by which candidates are compared.
        candidates: overrides of each; None: ``built_in_candidates``.
        overrides: of all candidates, on top of the recipe.
        resolution, transform: how to bring the stand-in to the private images' size.
    """

    source: str
    public: bool
    dataset_size: int
    epsilon: float
    delta: float | None = None
    utility: Utility = "accuracy"
    candidates: tuple[tuple[str, ...], ...] | None = None
    overrides: tuple[str, ...] = ()
    resolution: Resolution | None = None
    transform: Transform | None = None

    def __post_init__(self) -> None:
        if source_path(self.source) is not None and not self.public:
            raise InputError(
                f"Expected a data set that is known by name, or --public, got {self.source}: a choice on private "
                "images has to be charged (--mean-runs)."
            )
        _check_budget(self.dataset_size, self.epsilon, self.delta)
        for override in (*self.overrides, *(value for values in self.candidates or () for value in values)):
            key = override.partition("=")[0]
            if key == "data" or key.startswith("data.") or any(sets(override, fixed) for fixed in FIXED_DP):
                raise InputError(f"Expected no {key} here, got {override!r}: give the options.")

    @property
    def name(self) -> str:
        return self.source if source_path(self.source) is None else Path(self.source).stem


def choose_on_public(asked: PublicChoice) -> str:
    """Trains each candidate on the stand-in and returns the best as YAML; prints how each did.

    A candidate is trained as it would be on the private images: with the sampling rate, the steps and the noise
    multipliers that the plan for N, epsilon and delta gives. Of more than N stand-in images N are taken. Of fewer, a
    batch has fewer images under the same noise, so that training is harder than it will be.

    Raises:
        InputError: for images that are not public, or without labels where accuracy is wanted.
    """
    with tempfile.TemporaryDirectory(prefix="dpdm-tune-") as folder:
        training, held_out = _stand_in(asked, Path(folder))
        if asked.utility == "accuracy" and (training.labels is None or held_out.labels is None):
            raise InputError(
                f"Expected images with labels for accuracy, got none in {asked.source}: --utility frechet."
            )
        classes = training.num_classes if training.labels is not None else 0
        size, shape = asked.dataset_size, (training.resolution, training.num_channels, classes)
        facts = Facts(size, *shape, asked.epsilon, asked.delta)
        base = [*facts.overrides(), *asked.overrides]
        candidates = asked.candidates or built_in_candidates(configs.load([], base), same_cost=False)
        if training.num_images < size:
            print(
                f"dpdm: {training.num_images} stand-in images for {size} private ones: noise weighs more here than it "
                "will there.",
                file=sys.stderr,
            )
        plans = [_plan_of(configs.load([], [*base, *values]), size) for values in candidates]
        values_found = []
        for number, (values, (config, plan)) in enumerate(zip(candidates, plans, strict=True), 1):
            trained = _train_on_stand_in(config, plan, training, Path(folder) / f"candidate {number}")
            values_found.append(_utility(asked.utility, *trained, training, held_out))
            told = f"{values_found[-1]:.4g}  {' '.join(values) or 'the recipe as it is'}"
            print(f"{number} of {len(candidates)}: {asked.utility} {told}", file=sys.stderr, flush=True)
    best = int(np.argmax(values_found) if asked.utility == "accuracy" else np.argmin(values_found))
    config, plan = plans[best]
    given = "" if asked.candidates is None else " (a list that the user gave, which is not accounted for)"
    selection = (
        f"chosen among {len(candidates)} candidates{given} on public images {asked.name}, by "
        f"{UTILITIES[asked.utility]}; the candidates are variations of settings chosen {config.dp.selection}"
    )
    before = configs.values([], facts.overrides())
    if changed := configs.changed_settings(before, configs.values([], base)):
        selection += f"; the user changed {', '.join(changed)} in all of them, which is not accounted for"
    comments = [
        f"Best of {len(candidates)} candidates on public images {asked.name}, for {size} private images at epsilon "
        f"{facts.epsilon:g}, delta {facts.the_delta:g}.",
        f"By {UTILITIES[asked.utility]}: {values_found[best]:.4g}. No private image was read.",
        *_plan_lines(config, plan),
    ]
    return to_yaml([*base, *candidates[best], f"dp.selection={json.dumps(selection)}"], comments)


def _stand_in(asked: PublicChoice, folder: Path) -> tuple[ImageArchive, ImageArchive]:
    """Returns at most N public images to train on, and others to measure with."""
    training, held_out = prepare_with_holdout(
        asked.source,
        folder / "all.zip",
        folder / "holdout.zip",
        holdout_key=HOLDOUT_KEY,
        fraction=HOLDOUT_FRACTION,
        resolution=asked.resolution,
        transform=asked.transform,
    )
    if training.num_images <= asked.dataset_size:
        return training, held_out
    with ArchiveWriter(folder / "train.zip", training.class_names) as writer:
        for row in np.arange(asked.dataset_size) * training.num_images // asked.dataset_size:
            writer.add(training.read([row])[0], None if training.labels is None else int(training.labels[row]))
    return ImageArchive(folder / "train.zip"), held_out


def _plan_of(config: Config, dataset_size: int) -> tuple[Config, Plan]:
    return config, make_plan(config, dataset_size)


def _train_on_stand_in(config: Config, plan: Plan, training: ImageArchive, folder: Path) -> tuple[Config, TrainState]:
    """Trains with the private run's sampling rate, steps and noise."""
    batch = max(1, round(plan.sampling_rate * training.num_images))
    config = replace(
        config,
        data=replace(config.data, path=str(training.path)),
        dp=replace(config.dp, epsilon=None, noise_multiplier=plan.noise_multiplier),
        train=replace(config.train, expected_batch_size=batch, num_epochs=None, num_iterations=plan.num_iterations),
    )
    with silence():
        return train(config, Workdir(folder))


def _utility(
    utility: Utility, config: Config, state: TrainState, training: ImageArchive, held_out: ImageArchive
) -> float:
    with silence():
        images, labels = draw(denoiser_with(config, state.ema), as_drawn(config, state), num_images=SCORE_IMAGES)
    drawn = ImageSet("synthetic", images, labels)
    real = read_set("stand-in", training if utility == "frechet" else held_out)
    if utility == "accuracy":
        return accuracy(drawn, real).value
    extractor = extractor_for(real, training.num_classes)
    return distance(extractor, drawn, feature_statistics(extract(extractor, real.images)))


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Drops what is printed meanwhile."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def built_in_candidates(config: Config, *, same_cost: bool) -> tuple[tuple[str, ...], ...]:
    """Returns variations of ``config``: itself, learning rates, draws, preconditioning; of other cost: the warm-up."""
    rate, draws = config.optim.learning_rate, config.loss.noise_multiplicity
    found: tuple[tuple[str, ...], ...] = (
        (),
        (f"optim.learning_rate={rate / 2:g}",),
        (f"optim.learning_rate={2 * rate:g}",),
        (f"loss.noise_multiplicity={4 * draws}",),
        (f"model.denoiser={'v' if config.model.denoiser == 'edm' else 'edm'}",),
    )
    if same_cost or not config.train.warmup.enabled:
        return found
    share = config.train.warmup.noise_multiplier / 3**0.5  # three times the share of the budget
    return (*found, (f"train.warmup.noise_multiplier={share:.3g}",))


def read_candidates(path: Path) -> tuple[tuple[str, ...], ...]:
    """Returns the candidates in a YAML file, a list of lists of ``key=value``; an empty list is the recipe itself.

    Raises:
        InputError: if it is something else, holds fewer than two, one of them twice, or a key that is not known.
    """
    content = read_yaml(path)
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
        f"{config.dp.clipping_norm:g}: epsilon {round_up(plan.epsilon)}.",
    ]
    lines += [f"Before them {m.name}, noise multiplier {m.noise_multiplier:g}." for m in plan.warmup]
    return lines
