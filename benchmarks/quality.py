"""How good the images of a release are: classifiers, Frechet distances, precision, recall, copies.

    python benchmarks/quality.py --release runs/demo/release --data digits
    python benchmarks/quality.py --pretrained mnist_eps_1.0 --data FOLDER_OF_IDX_FILES --device cuda --docs
    python benchmarks/quality.py --pretrained mnist_eps_1.0 --data FOLDER_OF_IDX_FILES --quick --json

As many images as there are real training images are drawn (60,000 for MNIST) by the release's own sampler; keys behind
--, such as sampler.guidance_scale=1, change it. Each figure carries its protocol, its number of samples, epochs and
seconds:

- quick: 3,000 samples and scikit-learn's logistic regression on pixels;
- logreg, mlp, cnn, wrn-40-4: see dpdm.evaluation.downstream; one image in twelve, at most 5,000, is held out of the
  drawn ones to choose the epoch;
- frechet: on 64 features of a classifier that is trained here on the real training images, on one thread of the CPU
  from a fixed seed (dpdm.evaluation.features); precision and recall on 10,000 images of each set, by the same features;
- inception: the same on Inception's features, where its weights are at hand (see docs/evaluation.md);
- copies: nearest training images of all drawn ones (dpdm.evaluation.copies).

Real test images are read by the classifiers alone, once each, after all choices are made. With --keep or --docs figures
are kept in a file per model, and what is there is not measured again. With --drawn images are kept as they come, for on
a CPU 60,000 take an hour and more.

All of it is computed on real images without noise: for models of private images it is as private as they are.
"""

import argparse
import hashlib
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from _charts import ROOT
from quality_page import figures_table, write_page

from dpdm import config as configs
from dpdm import pretrained
from dpdm.data.archive import ImageArchive, is_archive
from dpdm.data.prepare import prepare
from dpdm.device import pick_device
from dpdm.diffusion.denoiser import Denoiser
from dpdm.diffusion.image_noise import image_labels
from dpdm.diffusion.sampling import SamplerConfig
from dpdm.errors import InputError, RunError
from dpdm.evaluation.classifiers import logistic_regression_accuracy
from dpdm.evaluation.copies import find_copies
from dpdm.evaluation.downstream import PROTOCOLS, RECIPES, accuracy_on_test, train_classifier
from dpdm.evaluation.features import Extractor, train_feature_extractor
from dpdm.evaluation.fid import Images, Statistics, fid, pooled_features
from dpdm.evaluation.inception import INCEPTION_FILE, open_extractor
from dpdm.evaluation.quality import precision_recall
from dpdm.fetching import DEFAULT_CACHE, file_sha256
from dpdm.fidelity import COMPARED, NOTE
from dpdm.files import atomic_path, write_json
from dpdm.generate import draw_some
from dpdm.release import load_config, load_denoiser

PAGE = ROOT / "docs" / "results.md"
QUICK_SAMPLES = 3000
PIECE = 2500  # images to a file of --drawn
PICTURED = 500  # from so many the picture takes ten of each class
CLASSIFIERS = (*PROTOCOLS["paper"], *PROTOCOLS["wrn"])
PARTS = ("quick", "frechet", "inception", "copies", *CLASSIFIERS)  # the slow ones last
Figure = dict[str, Any]


@dataclass(frozen=True)
class Labelled:
    """Images (n, C, H, W) uint8 and their labels (n,)."""

    images: np.ndarray
    labels: np.ndarray

    def as_images(self, name: str) -> Images:
        return Images.of(name, self.images)


class Subject:
    """A release, the images it draws, and the real ones; each is made or read when it is first asked for."""

    def __init__(self, release: Path, arguments: argparse.Namespace, folder: Path) -> None:
        self.release, self.arguments, self.folder = release, arguments, folder
        self.device = pick_device(arguments.device)
        self.most, self.drawing_seconds = 0, 0.0
        self.drawn: Labelled | None = None
        self.config = configs.load([release / "config.json"], [*arguments.words, f"setup.device={arguments.device}"])
        if not load_config(release).data.num_classes:
            raise InputError(f"Expected a model with classes in {release}, got one without: classifiers need labels.")

    @cached_property
    def train(self) -> Labelled:
        return read_real(self.arguments.data, "train", self.folder)

    @cached_property
    def test(self) -> Labelled:
        if self.arguments.test is not None:
            return read_real(self.arguments.test, "train", self.folder / "test")
        return read_real(self.arguments.data, "holdout", self.folder)

    def first(self, count: int) -> Labelled:
        """Returns the model's first ``count`` images; at once as many are drawn as any part needs."""
        if self.drawn is None or len(self.drawn.images) < count:
            start, total = time.monotonic(), max(count, self.most)
            images = np.concatenate([self._piece(range(i, min(i + PIECE, total))) for i in range(0, total, PIECE)])
            sampler, classes = self.config.sampler, self.config.data.num_classes or 0
            labels = image_labels(sampler.labels, sampler.seed, range(total), classes, sampler.class_weights)
            assert labels is not None  # the model has classes
            self.drawn, self.drawing_seconds = Labelled(images, labels.numpy()), time.monotonic() - start
        return Labelled(self.drawn.images[:count], self.drawn.labels[:count])

    def _piece(self, indices: range) -> np.ndarray:
        """Returns the images of ``indices``, from --drawn if they are there, and puts them there else."""
        folder: Path | None = self.arguments.drawn
        if folder is None:
            return draw_some(self._denoiser, self.config, indices)
        facts = {**self.facts(), "model": None, "device": _device_name(self.device)}  # whatever its name
        drawn_by = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
        file = folder / f"{drawn_by}-{indices.start}-{indices.stop}.npy"
        if not file.exists():
            with atomic_path(file) as temporary, temporary.open("wb") as stream:
                np.save(stream, draw_some(self._denoiser, self.config, indices))
        images: np.ndarray = np.load(file)
        return images

    @cached_property
    def _denoiser(self) -> Denoiser:
        return load_denoiser(self.release, self.config)

    def facts(self) -> dict[str, Any]:
        """Returns what the figures are of; what is equal in two runs needs no second measurement."""
        statement = json.loads((self.release / "privacy.json").read_text(encoding="utf-8"))
        sampler = asdict(self.config.sampler)
        for name in ("num_images", "batch_size", "output"):  # which change no image
            del sampler[name]
        usual = SamplerConfig()
        for name in ("class_weights", "precision", "augmentation", "guidance_min", "guidance_max"):
            if sampler[name] == getattr(usual, name):  # as figures from before there was such a key have it
                del sampler[name]
        return {
            "model": self.arguments.name,
            "weights_sha256": file_sha256(self.release / "model.safetensors"),
            "epsilon": statement["epsilon"],
            "delta": statement["delta"],
            "data": self.config.data.name,
            "sampler": {k: str(v) if v == float("inf") else v for k, v in sampler.items()},
        }


def read_real(source: str, split: Literal["train", "holdout"], folder: Path) -> Labelled:
    """Returns one half of a source: an archive as it is, or anything else that ``dpdm prepare`` takes."""
    path = Path(source)
    given = path.is_file() and is_archive(path)
    if given and split == "holdout":
        raise InputError(f"Expected --test with the archive {source}, got none: give the real test images' archive.")
    archive = ImageArchive(path) if given else prepare(source, folder / f"{split}.zip", split=split)
    if archive.labels is None:
        raise InputError(f"Expected labels in {source}, got none: classifiers need them.")
    return Labelled(archive.read(np.arange(archive.num_images)), archive.labels)


def samples_of(part: str, subject: Subject) -> int:
    """Returns how many drawn images a part looks at."""
    wanted = subject.arguments.num_images
    if part == "quick":
        return QUICK_SAMPLES if wanted is None else min(QUICK_SAMPLES, wanted)
    return len(subject.train.images) if wanted is None else wanted


def epochs_of(part: str, arguments: argparse.Namespace) -> int | None:
    """Returns how many epochs a classifier is trained for; None where there is no such thing."""
    return (arguments.epochs or RECIPES[part].epochs) if part in CLASSIFIERS else None


def quick(subject: Subject, drawn: Labelled, _part: str) -> Figure:
    found = logistic_regression_accuracy(drawn.images, drawn.labels, subject.test.images, subject.test.labels)
    protocol = "scikit-learn's logistic regression, to convergence"
    return {"value": found.value, "protocol": protocol, "tested_on": found.num_test, "note": found.note}


def classifier(subject: Subject, drawn: Labelled, part: str) -> Figure:
    trained = train_classifier(
        part,
        drawn.images,
        drawn.labels,
        num_classes=subject.config.data.num_classes or 0,
        device=subject.device,
        epochs=epochs_of(part, subject.arguments),
    )
    found = accuracy_on_test(trained, subject.test.images, subject.test.labels)
    return {
        "value": found.value,
        "protocol": found.training.protocol,
        "trained_on": found.training.num_train,
        "chosen_epoch": found.training.chosen_epoch,
        "tested_on": found.num_test,
        "note": found.training.note,
    }


def frechet(subject: Subject, drawn: Labelled, _part: str) -> Figure:
    train = subject.train
    # Always on the CPU: a GPU rounds otherwise, and the extractor would be another one.
    classes = subject.config.data.num_classes or 0
    return distances(train_feature_extractor(train.images, train.labels, num_classes=classes), subject, drawn)


def inception(subject: Subject, drawn: Labelled, _part: str) -> Figure:
    _, *shape = subject.train.images.shape
    extractor = open_extractor(str(subject.arguments.inception), (shape[0], shape[1], shape[2]), device=subject.device)
    return distances(extractor, subject, drawn)


def distances(extractor: Extractor, subject: Subject, drawn: Labelled) -> Figure:
    """Returns the Frechet distance to the real training images, precision and recall."""
    ours = pooled_features(extractor, drawn.as_images("drawn"), keep=COMPARED)
    theirs = pooled_features(extractor, subject.train.as_images("real"), keep=COMPARED)
    precision, recall = precision_recall(theirs.sample, ours.sample)
    return {
        "value": fid(ours.moments, Statistics.of(theirs.moments, extractor)),
        "precision": precision,
        "recall": recall,
        "protocol": f"to {len(subject.train.images):,} real training images; {extractor.name}",
        "compared": [len(ours.sample), len(theirs.sample)],
    }


def copies(subject: Subject, drawn: Labelled, _part: str) -> Figure:
    found = find_copies(drawn.as_images("drawn"), subject.train.as_images("real"), device=subject.device)
    return {
        "value": found.copies,
        "protocol": f"each with {found.num_training:,} training images; near: half as far as the 50 nearest on average",
        "equal": len(found.synthetic.exact) + len(found.synthetic.shared),
        "near": len(found.synthetic.very_near) + len(found.synthetic.near),
        "real_near": len(found.real.very_near) + len(found.real.near) + len(found.real.exact) + len(found.real.shared),
        "real_looked_at": found.real.total,
    }


MEASURES: dict[str, Callable[[Subject, Labelled, str], Figure]] = {
    "quick": quick,
    "frechet": frechet,
    "inception": inception,
    "copies": copies,
    **dict.fromkeys(CLASSIFIERS, classifier),
}


def measure(subject: Subject, keep: Path | None) -> dict[str, Any]:
    """Returns facts and figures; what ``keep`` holds of the same model, samples and epochs is taken from there."""
    facts = subject.facts()
    result = {**facts, "note": NOTE, "figures": _kept(keep, facts)}
    wishes = {
        part: {"samples": samples_of(part, subject), "epochs": epochs_of(part, subject.arguments)}
        for part in subject.arguments.parts
    }
    there = result["figures"]
    missing = {part: asked for part, asked in wishes.items() if not asked.items() <= there.get(part, {}).items()}
    subject.most = max((asked["samples"] for asked in missing.values()), default=0)
    for part, asked in missing.items():
        drawn = subject.first(asked["samples"])  # in no part's time
        start = time.monotonic()
        figure = MEASURES[part](subject, drawn, part)
        seconds = {"seconds": time.monotonic() - start, "drawing_seconds": subject.drawing_seconds}
        where = {"device": _device_name(subject.device), "threads": torch.get_num_threads(), "torch": torch.__version__}
        there[part] = {**figure, **asked, **seconds, **where}
        if keep is not None:
            write_json(keep, result)
    return result


def _kept(keep: Path | None, facts: dict[str, Any]) -> dict[str, Figure]:
    if keep is None or not keep.exists():
        return {}
    try:
        content = json.loads(keep.read_text(encoding="utf-8"))
        same = all(content[name] == value for name, value in json.loads(json.dumps(facts)).items())
        return dict(content["figures"]) if same else {}
    except (ValueError, LookupError, TypeError):
        raise InputError(f"Expected figures in {keep}, could not read them: remove the file.") from None


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name() if device.type == "cuda" else device.type


def parse(given: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--release", type=Path, help="release folder")
    model.add_argument("--pretrained", metavar="NAME", help="a release that comes with dpdm")
    parser.add_argument("--name", help="of the model's row and file; default: that of --pretrained, or data.name")
    parser.add_argument("--data", required=True, help="real images: digits, a folder of idx files, or an archive")
    parser.add_argument("--test", metavar="ARCHIVE", help="real test images, if --data is an archive")
    parser.add_argument("--num-images", type=int, help="to draw; default: as many as there are real training images")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--quick", action="store_true", help="3,000 samples and logistic regression alone")
    parser.add_argument("--epochs", type=int, help="of the classifiers; default: their protocols'")
    cached = DEFAULT_CACHE.expanduser() / INCEPTION_FILE
    parser.add_argument("--inception", type=Path, default=cached, help=f"its TorchScript file; default: {cached}")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep figures in FOLDER/NAME.json as they come")
    parser.add_argument("--drawn", type=Path, metavar="FOLDER", help="keep drawn images there as they come")
    parser.add_argument("--json", action="store_true", help="print one object, and nothing else")
    parser.add_argument("--docs", action="store_true", help="keep figures in docs/results/ and write docs/results.md")
    parser.add_argument("words", nargs="*", metavar="sampler.key=value")
    arguments = parser.parse_args(given)
    if arguments.num_images is not None and arguments.num_images < 3:
        parser.error("Expected --num-images >= 3: classifiers hold one of them out.")
    arguments.parts = ["quick"] if arguments.quick else arguments.parts
    if "inception" in arguments.parts and not arguments.inception.is_file():
        print(f"Left out: Inception's distance, for want of {arguments.inception}.", file=sys.stderr)
        arguments.parts = [part for part in arguments.parts if part != "inception"]
    return arguments


def main(given: Sequence[str], page: Path = PAGE) -> None:
    arguments = parse(given)
    release = pretrained.folder(arguments.pretrained) if arguments.pretrained else arguments.release
    if not (release / "privacy.json").is_file():
        raise InputError(f"Expected a release at {release}, found none: check --release.")
    arguments.name = arguments.name or arguments.pretrained or load_config(release).data.name or "unnamed"
    keep = arguments.keep or (page.parent / page.stem if arguments.docs else None)
    with ExitStack() as held:
        subject = Subject(release, arguments, Path(held.enter_context(tempfile.TemporaryDirectory())))
        result = measure(subject, keep / f"{arguments.name}.json" if keep else None)
        if arguments.docs:
            shown = subject.first(PICTURED)
            write_page(page, keep or page.parent, arguments.name, shown.images, shown.labels)
    print(json.dumps(result) if arguments.json else figures_table([result]))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (InputError, RunError) as error:
        sys.exit(str(error))
