"""How good the synthetic images are, measured on real ones: private figures, and the two report pages."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dpdm import checkpoint, distributed, fidelity
from dpdm import config as configs
from dpdm.config import Config
from dpdm.data.archive import ImageArchive
from dpdm.data.records import list_names
from dpdm.device import environment, pick_device
from dpdm.errors import InputError
from dpdm.evaluation.classifiers import Accuracy, logistic_regression_accuracy, majority_accuracy
from dpdm.evaluation.downstream import PROTOCOLS, accuracy_on_test, train_classifier
from dpdm.evaluation.features import Extractor, extract, pixel_extractor, train_feature_extractor, within_class_variance
from dpdm.evaluation.frechet import feature_statistics, frechet_distance
from dpdm.evaluation.guarantee import Guarantee
from dpdm.evaluation.report import (
    Measurement,
    PrivateReport,
    Section,
    SharedReport,
    write_private_report,
    write_shareable_report,
)
from dpdm.files import write_json
from dpdm.generate import denoiser_with, draw
from dpdm.privacy import accounting
from dpdm.privacy.accounting import Mechanism, spend_from
from dpdm.release import sampling_config
from dpdm.workdir import Workdir

PRIVATE_NOTE = "computed on private images without noise: outside the guarantee, not to be shared"
PUBLIC_NOTE = "computed on images that are declared public"
LARGEST_SET = 65_000  # images of one kind that are measured: the paper trains on 60,000, and 5,000 are held out
REPORT_IMAGES = 600
CURVE_POINTS = 12


@dataclass(frozen=True)
class Classifiers:
    """Downstream classifiers that are wanted: a protocol of ``downstream.PROTOCOLS``, None for its epochs."""

    protocol: str
    epochs: int | None = None
    device: str = "auto"


@dataclass(frozen=True)
class Fid:
    """Wish for FID to a file of statistics, by an extractor (see ``open_extractor``)."""

    statistics: Path
    extractor: str


@dataclass(frozen=True)
class ImageSet:
    """Images (n, C, H, W) uint8 and labels (n,) int64 or None, under the name that the tables give them."""

    name: str
    images: np.ndarray
    labels: np.ndarray | None


def evaluate_run(
    workdir: Workdir,
    fid: Fid | None = None,
    classifiers: Classifiers | None = None,
    *,
    real: Path | None = None,
    holdout: Path | None = None,
) -> dict[str, Any]:
    """Measures a run's synthetic images, on archives that are its own unless given, and writes both report pages.

    To be called by all processes; see ``evaluate`` for what is measured.
    """
    held_out = holdout or (workdir.holdout_archive if workdir.holdout_archive.exists() else None)
    with distributed.together():
        training = _training_images(real, workdir)
        synthetic = read_synthetic(workdir, configs.load([workdir.config]))
        if classifiers:
            _check_classifiers(synthetic, training, held_out)  # before FID, which takes its time
    found = None
    if fid is not None:
        images = fidelity.archive_images("synthetic", ImageArchive(workdir.synthetic))
        found = fidelity.measure(fid.statistics, images, fidelity.archive_images("real", training), fid.extractor)

    def measure() -> dict[str, Any]:
        test = ImageArchive(held_out) if held_out else None
        result = evaluate(workdir, synthetic, training, test, found, classifiers)
        if workdir.release.exists() and workdir.checkpoint.exists():
            write_reports(workdir, synthetic, training, {})
        return result

    return distributed.on_main(measure)


def evaluate_samples(samples: Path, fid: Fid, workdir: Workdir | None, *, real: Path | None = None) -> dict[str, Any]:
    """Returns FID and its kin of any images, see ``fidelity.measure``; real ones from ``real`` or a run, if given."""
    with distributed.together():
        archive = None if real is None and workdir is None else _training_images(real, workdir)
        compared = None if archive is None else fidelity.archive_images("real", archive)
        given = fidelity.open_samples(samples)
    return fidelity.measure(fid.statistics, given, compared, fid.extractor)


def _training_images(real: Path | None, workdir: Workdir | None) -> ImageArchive:
    """Returns the archive ``real``, or else the run's own training images."""
    if workdir is not None and not workdir.config.exists():
        raise InputError(f"Expected a run in {workdir.root}, found none: check --workdir.")
    if real is not None or workdir is None:
        return ImageArchive(Path(real or ""))
    config, own = configs.load([workdir.config]), workdir.train_archive
    return ImageArchive(own if own.exists() else Path(config.data.path or ""), config.data.unit)


def evaluate(
    workdir: Workdir,
    synthetic: ImageSet,
    real: ImageArchive,
    holdout: ImageArchive | None,
    fid: dict[str, Any] | None = None,
    classifiers: Classifiers | None = None,
) -> dict[str, Any]:
    """Measures synthetic images against real ones, writes ``private/evaluation.json`` and returns its content.

    Everything here is computed on real images without noise: outside the guarantee, for their owner alone.

    Args:
        workdir: of the run; if its checkpoint holds warm-up weights, images of these are measured beside.
        synthetic: the released images.
        real: the training images.
        holdout: real images that took no part in training; None leaves the classifiers out.
        fid: what ``fidelity.measure`` found, to be kept and shown with the rest.
        classifiers: also train these, on synthetic and on real images, and test them on ``holdout``.

    Raises:
        InputError: if sizes or classes differ, or classifiers lack labels or ``holdout``.
    """
    _check_alike(synthetic, real)
    if classifiers:
        _check_classifiers(synthetic, real, holdout)
    config = configs.load([workdir.config]) if workdir.config.exists() else None
    if synthetic.labels is not None:
        _check_classes((config.data.class_names if config else real.class_names) or (), real, holdout)
    train_set = read_set("real", real)
    test_set = None if holdout is None else read_set("held-out real", holdout)
    sets = [synthetic]
    warmup = warmup_images(workdir, len(synthetic.images))
    if warmup is not None:
        sets.append(warmup)
    labelled = synthetic.labels is not None and train_set.labels is not None
    extractor = extractor_for(train_set, real.num_classes if labelled else 0)
    target = feature_statistics(extract(extractor, train_set.images))
    result: dict[str, Any] = {
        "note": PUBLIC_NOTE if config and _declared_public(config, workdir, real, holdout) else PRIVATE_NOTE,
        "extractor": extractor.name,
        "num_synthetic": len(synthetic.images),
        "num_real": len(train_set.images),
        "num_images": {s.name: len(s.images) for s in (sets if test_set is None else [*sets, test_set])},
        "frechet": {s.name: distance(extractor, s, target) for s in sets},
        "variance_share": {s.name: _variance(s, labelled) / max(_variance(train_set, labelled), 1e-12) for s in sets},
    }
    if test_set is not None:
        result["num_holdout"] = len(test_set.images)
        result["frechet"][test_set.name] = distance(extractor, test_set, target)
    if labelled and test_set is not None:
        result["accuracy"] = {s.name: asdict(accuracy(s, test_set)) for s in [*sets, train_set]}
        result["accuracy"]["majority class"] = asdict(majority_accuracy(_labels(train_set), _labels(test_set)))
    if classifiers and test_set is not None:
        result["classifiers"] = {
            s.name: downstream_accuracies(classifiers, s, test_set, real.num_classes) for s in (synthetic, train_set)
        }
    if fid is not None:
        result["fid"] = fid
    write_json(workdir.evaluation, result)
    return result


def _declared_public(config: Config, workdir: Workdir, real: ImageArchive, holdout: ImageArchive | None) -> bool:
    """Whether all these images are those of a run that was declared public: others may be private, as most are."""
    if config.dp.enabled:
        return False
    own = {path.resolve() for path in (workdir.train_archive, Path(config.data.path or ""), workdir.holdout_archive)}
    return all(archive.path.resolve() in own for archive in (real, holdout) if archive is not None)


def write_reports(workdir: Workdir, synthetic: ImageSet, real: ImageArchive, timing: dict[str, str]) -> None:
    """Writes ``report.html``, which is private, and ``shareable.html``, from the release and its images alone."""
    config = configs.load([workdir.config])
    state, facts = checkpoint.load(workdir.checkpoint)
    statement = json.loads((workdir.release / "privacy.json").read_text(encoding="utf-8"))
    result = json.loads(workdir.evaluation.read_text(encoding="utf-8"))
    names = tuple(config.data.class_names)
    sample = np.linspace(0, real.num_images - 1, min(REPORT_IMAGES, real.num_images)).astype(np.int64)
    steps, epsilons = spending(statement)
    labels = None if synthetic.labels is None or real.labels is None else synthetic.labels[:REPORT_IMAGES]
    kind = "Private synthetic" if config.dp.enabled else "Synthetic"
    report = PrivateReport(
        title=f"{kind} images: {config.data.name or 'your images'}",
        source=f"{config.data.name or 'images'}: {real.num_images} for training"
        + (f", of {real.num_groups} groups" if real.groups is not None else ""),
        guarantee=Guarantee.from_statement(statement) if config.dp.enabled else None,
        real=real.read(sample),
        synthetic=synthetic.images[:REPORT_IMAGES],
        real_labels=None if labels is None or real.labels is None else real.labels[sample],
        synthetic_labels=labels,
        class_names=names,
        loss=np.array(state.curves.get("loss", [])),
        clip_fraction=np.array(state.curves.get("clip_fraction", [])),
        spent_steps=steps,
        spent_epsilon=epsilons,
        sections=sections(result),
        declared_public=result["note"] == PUBLIC_NOTE,
        config=configs.to_yaml(config),
        environment=facts.get("environment", environment(torch.device("cpu"))),
        timing=timing,
    )
    write_private_report(workdir.report, report)
    if report.guarantee is None:  # of a public model: the page to be shared shows a guarantee
        return
    shared = SharedReport(
        statement=statement,
        synthetic=synthetic.images[:REPORT_IMAGES],
        config=(workdir.release / "config.json").read_text(encoding="utf-8"),
        versions=statement["versions"],
        # Not the real images' business: what is shared is a function of the release and its images.
        synthetic_labels=None if synthetic.labels is None else synthetic.labels[:REPORT_IMAGES],
        class_names=names,
    )
    write_shareable_report(workdir.shareable, shared)


def spending(statement: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Returns steps (P,) and the epsilon spent after each, from a statement; public. None of a selection's steps.

    A selection is paid for as a whole.
    """
    mechanisms = [spend_from(m) for m in statement["mechanisms"]]
    before = [m for m in mechanisms if m.name != "DP-SGD"]
    training = [m for m in mechanisms if isinstance(m, Mechanism) and m.name == "DP-SGD"]
    if not training:
        return np.empty(0), np.empty(0)
    last = training[0]
    steps = np.unique(np.linspace(0, last.num_steps, CURVE_POINTS).astype(np.int64))
    epsilons = [
        accounting.epsilon_spent(
            [*before, Mechanism(last.name, last.sampling_rate, last.noise_multiplier, int(count))], statement["delta"]
        )
        for count in steps
    ]
    return steps, np.array(epsilons)


def downstream_accuracies(wanted: Classifiers, images: ImageSet, test: ImageSet, num_classes: int) -> dict[str, Any]:
    """Returns accuracy and training of each classifier of a protocol, trained on ``images``, by its name."""
    found = {}
    for name in PROTOCOLS[wanted.protocol]:
        trained = train_classifier(
            name,
            images.images,
            images.labels,
            num_classes=num_classes,
            source="real" if images.name == "real" else "synthetic",
            device=pick_device(wanted.device),
            epochs=wanted.epochs,
        )
        found[name] = asdict(accuracy_on_test(trained, test.images, test.labels))
    return found


def sections(result: dict[str, Any]) -> tuple[Section, ...]:
    """Returns the tables of the private report from an evaluation."""
    tables = []
    if "accuracy" in result:
        rows = tuple(
            Measurement(
                f"Trained on {name} images" if name != "majority class" else "Always the most frequent class",
                f"{100 * value['value']:.1f} %",
                value["note"],
            )
            for name, value in result["accuracy"].items()
        )
        tables.append(
            Section(
                "Use for training a classifier",
                rows,
                f"Logistic regression, tested on {result['num_holdout']} held-out real images.",
            )
        )
    if "classifiers" in result:
        tables.append(_classifier_section(result["classifiers"]))
    rows = tuple(
        Measurement(f"{name[0].upper()}{name[1:]} images", f"{v:.3g}", f"{result['num_images'][name]} images")
        for name, v in result["frechet"].items()
    )
    explanation = (
        f"To the {result['num_real']} real training images; lower is closer, fewer images are farther: compare sets of "
        f"one size. Features: {result['extractor']}."
    )
    tables.append(Section("Fréchet distance", rows, explanation))
    rows = tuple(
        Measurement(f"{name[0].upper()}{name[1:]} images", f"{100 * v:.0f} %")
        for name, v in result["variance_share"].items()
    )
    explanation = "Pixel variance inside a class, as a share of that of the real training images."
    tables.append(Section("Variety", rows, explanation))
    if "fid" in result:
        rows = tuple(Measurement(*row) for row in fidelity.rows(result["fid"]))
        tables.append(Section("FID and its kin", rows, f"Features: {result['fid']['extractor']}."))
    return tuple(tables)


def _classifier_section(result: dict[str, Any]) -> Section:
    rows, protocol = [], ""
    for name, found in result.items():
        for classifier, accuracy in found.items():
            training = accuracy["training"]
            protocol = f"Protocol: {training['protocol']}; {accuracy['num_test']} held-out real images."
            remark = f"epoch {training['chosen_epoch']} of {training['epochs']}, {training['num_train']} images"
            remark = f"{remark}; {training['note']}" if training["note"] else remark
            rows.append(
                Measurement(f"{classifier}, trained on {name} images", f"{100 * accuracy['value']:.1f} %", remark)
            )
    return Section("Downstream classifiers", tuple(rows), protocol)


def warmup_images(workdir: Workdir, count: int) -> ImageSet | None:
    """Returns images drawn from the weights after the warm-up alone, as the released ones are; None without one."""
    if not workdir.checkpoint.exists():
        return None
    state, _ = checkpoint.load(workdir.checkpoint)
    if not state.warmup:
        return None
    config = sampling_config(workdir)
    return ImageSet("warm-up", *draw(denoiser_with(config, state.warmup), config, num_images=count))


def read_set(name: str, archive: ImageArchive) -> ImageSet:
    """Returns an archive's images, evenly thinned to at most ``LARGEST_SET``."""
    rows = np.unique(np.linspace(0, archive.num_images - 1, min(LARGEST_SET, archive.num_images)).astype(np.int64))
    return ImageSet(name, archive.read(rows), None if archive.labels is None else archive.labels[rows])


def summary(result: dict[str, Any]) -> str:
    """Returns an evaluation as lines for the terminal."""
    lines = [f"{result['note'][0].upper()}{result['note'][1:]}."]
    if "accuracy" in result:
        values = ", ".join(f"{name} {100 * value['value']:.1f} %" for name, value in result["accuracy"].items())
        lines.append(f"  logistic regression on held-out real images, trained on: {values}")
    for name, found in result.get("classifiers", {}).items():
        values = ", ".join(f"{classifier} {100 * value['value']:.1f} %" for classifier, value in found.items())
        lines.append(f"  classifiers on held-out real images, trained on {name}: {values}")
    values = ", ".join(f"{name} ({result['num_images'][name]}) {v:.3g}" for name, v in result["frechet"].items())
    lines.append(f"  Frechet distance, with the number of images (fewer lie farther): {values}")
    lines.append(f"    ({result['extractor']})")
    shares = ", ".join(f"{name} {100 * v:.0f} %" for name, v in result["variance_share"].items())
    lines.append(f"  within-class variance, share of the real: {shares}")
    if "fid" in result:
        lines.append(fidelity.summary(result["fid"]))
    return "\n".join(lines)


def extractor_for(real: ImageSet, num_classes: int) -> Extractor:
    """Returns the features of a classifier of the real images, or without two classes the pixels."""
    if num_classes >= 2 and real.labels is not None:
        return train_feature_extractor(real.images, real.labels, num_classes=num_classes)
    return pixel_extractor(real.images.shape[-1], real.images.shape[1])


def distance(extractor: Extractor, images: ImageSet, target: tuple[np.ndarray, np.ndarray]) -> float:
    """Returns the Frechet distance of images to statistics of real ones."""
    return frechet_distance(*feature_statistics(extract(extractor, images.images)), *target)


def _variance(images: ImageSet, labelled: bool) -> float:
    return within_class_variance(images.images, images.labels if labelled else None)


def accuracy(train_set: ImageSet, test_set: ImageSet) -> Accuracy:
    """Returns the accuracy on one set of logistic regression that learned from another; both need labels."""
    return logistic_regression_accuracy(train_set.images, _labels(train_set), test_set.images, _labels(test_set))


def _labels(images: ImageSet) -> np.ndarray:
    if images.labels is None:
        raise InputError(f"Expected labels of the {images.name} images, got none.")
    return images.labels


def _check_classifiers(synthetic: ImageSet, real: ImageArchive, holdout: object) -> None:
    if holdout is None or synthetic.labels is None or real.labels is None:
        raise InputError(
            "Expected labels and held-out real images for classifiers, got not both: give --holdout, an archive that "
            "dpdm prepare SOURCE DEST --split holdout wrote."
        )


def _check_alike(synthetic: ImageSet, real: ImageArchive) -> None:
    expected = (real.num_channels, real.resolution, real.resolution)
    if synthetic.images.shape[1:] != expected:
        raise InputError(
            f"Expected synthetic images of shape {expected} as in {real.path}, got {synthetic.images.shape[1:]}."
        )


def _check_classes(names: Sequence[str], *archives: ImageArchive | None) -> None:
    """Raises InputError if an archive numbers classes otherwise than the model: accuracies would mean nothing."""
    for archive in archives:
        if archive is None or archive.labels is None:
            continue
        own = archive.class_names or [str(label) for label in range(archive.num_classes)]
        if names and list(names) != list(own):
            expected, found = list_names(list(names)), list_names(own)
            raise InputError(
                f"Expected the model's classes {expected} in {archive.path}, got {found}: prepare "
                "real and held-out images together, or with the same folders of classes."
            )


def read_synthetic(workdir: Workdir, config: Config) -> ImageSet:
    """Returns the run's synthetic images, from ``synthetic.zip``, evenly thinned to at most ``LARGEST_SET``.

    Raises:
        InputError: if there are none.
    """
    if not workdir.synthetic.exists():
        raise InputError(f"Expected synthetic images at {workdir.synthetic}, found none: run dpdm sample first.")
    found = read_set("synthetic", ImageArchive(workdir.synthetic))
    return found if config.data.num_classes else replace(found, labels=None)
