"""Two pages about a run: ``report.html`` for the holder of the images, ``shareable.html`` for all others.

Each page is one file that loads nothing from elsewhere. ``SharedReport`` has room only for what the release's
allow-list holds, so a private value cannot reach the shareable page by mistake.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from dpdm.errors import InputError
from dpdm.evaluation.charts import bin_means, line_chart, thin
from dpdm.evaluation.grids import check_images, data_uri, image_grid, thumbnails
from dpdm.evaluation.guarantee import Guarantee, attack_power, odds, percent_up, round_up
from dpdm.files import write_text

# Pages stay under 500 KB: base64 adds a third to the two figures, words and charts take some 60 KB.
FIGURE_BYTES = 140_000
FIGURE_PIXELS = 102_400  # a hundred images of 32x32
MAX_SIDE = 64
MAX_IMAGES = 100
MAX_CLASSES = 12
STRIP_LENGTH = 6
FALSE_ALARM_RATES = (0.01, 0.05)


@dataclass(frozen=True)
class Measurement:
    """One row of a table of results; ``note`` names the extractor or says how many images were used."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Section:
    """A table of results; ``outside_guarantee`` marks what was computed on private data without noise."""

    title: str
    rows: tuple[Measurement, ...]
    explanation: str = ""
    outside_guarantee: bool = True


@dataclass(frozen=True)
class Strip:
    """A row of images as a data address, and the share of the row's width that it fills."""

    address: str
    percent: int


@dataclass(frozen=True, eq=False)
class PrivateReport:
    """Everything that ``report.html`` shows; it holds private images and must stay where they are.

    Args:
        title: heading of the page.
        source: where the images came from.
        guarantee: None for a run without differential privacy; the page then says that there is none.
        real, synthetic: (n, C, H, W) uint8 of one shape; some of each, the page picks from the front.
        real_labels, synthetic_labels: (n,) class numbers; None for images without classes.
        class_names: one per class number; empty to show the numbers.
        loss, clip_fraction: (S,) per step, private; empty if not recorded.
        spent_steps, spent_epsilon: (P,) public; empty if not recorded.
        sections: the tables of results.
        declared_public: whether the real images are those of a public model, and nobody's secret.
        config: the resolved configuration as YAML.
        environment, timing: names and values.

    Raises:
        InputError: if arrays do not fit together.
    """

    title: str
    source: str
    guarantee: Guarantee | None
    real: np.ndarray
    synthetic: np.ndarray
    real_labels: np.ndarray | None = None
    synthetic_labels: np.ndarray | None = None
    class_names: tuple[str, ...] = ()
    loss: np.ndarray = field(default_factory=lambda: np.empty(0))
    clip_fraction: np.ndarray = field(default_factory=lambda: np.empty(0))
    spent_steps: np.ndarray = field(default_factory=lambda: np.empty(0))
    spent_epsilon: np.ndarray = field(default_factory=lambda: np.empty(0))
    sections: tuple[Section, ...] = ()
    declared_public: bool = False
    config: str = ""
    environment: Mapping[str, Any] = field(default_factory=dict)
    timing: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_labelled("real", self.real, self.real_labels)
        _check_labelled("synthetic", self.synthetic, self.synthetic_labels)
        if self.real.shape[1:] != self.synthetic.shape[1:]:
            raise InputError(
                f"Expected synthetic images of the real shape {self.real.shape[1:]}, "
                f"got {self.synthetic.shape[1:]}: report a run beside its own data."
            )
        if (self.real_labels is None) != (self.synthetic_labels is None):
            raise InputError("Expected labels for real and synthetic images or for neither: pass both or None twice.")
        if len(self.spent_steps) != len(self.spent_epsilon):
            raise InputError(
                f"Expected as many spent_steps as spent_epsilon, got {len(self.spent_steps)} and "
                f"{len(self.spent_epsilon)}: pass one epsilon per step."
            )


@dataclass(frozen=True, eq=False)
class SharedReport:
    """What ``shareable.html`` may show: the release's own content and nothing else.

    Args:
        statement: the released ``privacy.json``.
        synthetic: (n, C, H, W) uint8 synthetic images.
        config: the text of the released ``config.json``.
        versions: library names and versions.
        synthetic_labels: (n,) the synthetic images' class numbers, or None.
        class_names: the public list of classes; empty to show the numbers.

    Raises:
        InputError: if the statement lacks a part of the guarantee, or arrays do not fit together.
    """

    statement: Mapping[str, Any]
    synthetic: np.ndarray
    config: str
    versions: Mapping[str, str]
    synthetic_labels: np.ndarray | None = None
    class_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        Guarantee.from_statement(self.statement)
        _check_labelled("synthetic", self.synthetic, self.synthetic_labels)


def write_private_report(path: Path, report: PrivateReport) -> None:
    """Writes ``report.html``: guarantee, real beside synthetic images, results, curves, configuration."""
    page = _environment().get_template("report.html.j2")
    words = page.render(
        report=report,
        guarantee=report.guarantee,
        attacks=_attacks(report.guarantee),
        comparison=_comparison(report),
        classes_left_out=_classes_left_out(report),
        synthetic=_figure(report.synthetic, report.synthetic_labels),
        curves=_curves(report),
        spent=_spent(report),
    )
    write_text(path, words, mode=0o600)


def write_shareable_report(path: Path, report: SharedReport) -> None:
    """Writes ``shareable.html``: guarantee, synthetic images, how to verify, limits of use."""
    guarantee = Guarantee.from_statement(report.statement)
    page = _environment().get_template("shareable.html.j2")
    words = page.render(
        report=report,
        guarantee=guarantee,
        attacks=_attacks(guarantee),
        synthetic=_figure(report.synthetic, report.synthetic_labels),
        statement=json.dumps(report.statement, indent=2, ensure_ascii=False),
    )
    write_text(path, words)


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("dpdm.evaluation"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters.update(round_up=round_up, percent_up=percent_up, odds=odds)
    return environment


def _attacks(guarantee: Guarantee | None) -> list[tuple[str, list[float]]]:
    """Rows of the attacker's table: the bound of this run between two that make its size felt."""
    if guarantee is None:
        return []
    rows = [("without any release (guessing)", 0.0, 0.0)]
    rows.append((f"this release, ε = {round_up(guarantee.epsilon)}", guarantee.epsilon, guarantee.delta))
    rows.extend((f"for comparison, ε = {e:g}", e, guarantee.delta) for e in (1.0, 3.0))
    return [(name, [attack_power(e, d, rate) for rate in FALSE_ALARM_RATES]) for name, e, d in rows]


def _comparison(report: PrivateReport) -> list[tuple[str, Strip | None, Strip | None]]:
    """Returns (class, real strip, synthetic strip); a strip is None without images."""
    if report.real_labels is None or report.synthetic_labels is None:
        limit = _affordable(report.real, 4 * STRIP_LENGTH)
        strips = [_strip(images[:limit], FIGURE_BYTES // 2) for images in (report.real, report.synthetic)]
        return [("all images", strips[0], strips[1])]
    rows = []
    classes = np.union1d(report.real_labels, report.synthetic_labels)[:MAX_CLASSES].tolist()
    budget = FIGURE_BYTES // (2 * len(classes))
    for label in classes:
        name = report.class_names[label] if label < len(report.class_names) else str(label)
        real = report.real[report.real_labels == label][:STRIP_LENGTH]
        synthetic = report.synthetic[report.synthetic_labels == label][:STRIP_LENGTH]
        rows.append((name, _strip(real, budget), _strip(synthetic, budget)))
    return rows


def _classes_left_out(report: PrivateReport) -> int:
    if report.real_labels is None or report.synthetic_labels is None:
        return 0
    return max(0, len(np.union1d(report.real_labels, report.synthetic_labels)) - MAX_CLASSES)


def _strip(images: np.ndarray, max_bytes: int) -> Strip | None:
    if len(images) == 0:
        return None
    small = thumbnails(images, MAX_SIDE)
    address = data_uri(image_grid(small, STRIP_LENGTH, _scale(small)), max_bytes)
    return Strip(address, 100 * min(len(images), STRIP_LENGTH) // STRIP_LENGTH)


def _figure(images: np.ndarray, labels: np.ndarray | None) -> str:
    """Returns a grid of images as a data address; with labels, as many of each class, in order, if there are."""
    limit, columns = _affordable(images, MAX_IMAGES), 10
    if labels is None:
        chosen = images[:limit]
    else:
        classes = np.unique(labels)[:limit]
        each = max(1, limit // len(classes))
        if len(classes) > 1 and each > 1:
            columns = min(each, 2 * columns)
        chosen = images[np.concatenate([np.flatnonzero(labels == label)[:each] for label in classes])]
    small = thumbnails(chosen, MAX_SIDE)
    return data_uri(image_grid(small, columns, _scale(small)), FIGURE_BYTES)


def _affordable(images: np.ndarray, most: int) -> int:
    """How many images fit a figure: all that are small, fewer that are large."""
    side = min(MAX_SIDE, max(images.shape[2:]))
    return min(most, max(10, FIGURE_PIXELS // side**2))


def _scale(images: np.ndarray) -> int:
    return max(1, 32 // max(images.shape[2:]))


def _curves(report: PrivateReport) -> list[tuple[str, Markup]]:
    curves = []
    shown = [
        ("Training loss", "loss", report.loss, None),
        ("Share of images whose gradient was clipped", "share", report.clip_fraction, (0.0, 1.0)),
    ]
    for title, y_label, values, y_range in shown:
        x, y, size = bin_means(values)
        if len(x):
            x_label = "step" if size == 1 else f"step (each point: mean of {size} steps)"
            chart = line_chart(x, y, title=title, x_label=x_label, y_label=y_label, y_range=y_range)
            curves.append((title, chart))
    return curves


def _spent(report: PrivateReport) -> Markup | None:
    if len(report.spent_steps) == 0 or report.guarantee is None:
        return None
    x, y = thin(report.spent_steps, report.spent_epsilon)
    total = report.guarantee.epsilon
    return line_chart(
        x,
        y,
        title="Epsilon spent",
        x_label="step",
        y_label="ε spent so far",
        y_range=(0.0, max(total, float(y[-1]))),
        limit=(total, f"stated ε = {round_up(total)}"),
    )


def _check_labelled(name: str, images: np.ndarray, labels: np.ndarray | None) -> None:
    check_images(name, images)
    if labels is not None and labels.shape != (len(images),):
        raise InputError(
            f"Expected {name} labels of shape ({len(images)},), got {labels.shape}: give one class number per image."
        )
