"""What the warm-up buys is worth by itself: a classifier that learns from images drawn from it, without any network.

    python benchmarks/central.py --data path/to/mnist --noise-multiplier 15 --covariance-noise-multiplier 6

Buys noisy class means (and covariances) of the images with a fresh key, draws images as the warm-up does, and tests
a classifier that learned from them on 5,000 of the same training images, whose part in the means is noise-bounded:
logistic regression from 3,000, or with ``--cnn`` the paper's CNN from 20,000, 5 epochs. The figure is computed on real
images without noise: of private images it is private.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from dpdm.central_model import central_images, split_classes, with_cells, with_covariances
from dpdm.data.archive import ArchiveWriter, ImageArchive, is_archive
from dpdm.data.prepare import prepare
from dpdm.evaluation.classifiers import logistic_regression_accuracy
from dpdm.evaluation.downstream import accuracy_on_test, train_classifier
from dpdm.privacy.central import WarmupConfig
from dpdm.privacy.noise import new_key
from dpdm.warmup import augment, draw_cells, sampler

NUM_DRAWN, NUM_DRAWN_FOR_CNN, EPOCHS, NUM_TESTED = 3000, 20_000, 5, 5000


def measure(archive: ImageArchive, tested: ImageArchive, config: WarmupConfig, *, cnn: bool) -> float:
    """Returns the accuracy on images of ``tested`` of a classifier that learned from drawn ones."""
    if archive.labels is None or tested.labels is None:
        raise SystemExit("expected images with classes in --data, got none")
    central = central_images(archive, config, num_classes=archive.num_classes, key=new_key())
    if config.covariance_noise_multiplier is not None:
        central = with_covariances(central, archive, config, key=new_key())
    if config.splits:
        central = with_cells(central, split_classes(central, config), archive, config, key=new_key())
    generator = torch.Generator().manual_seed(0)
    labels = np.arange(NUM_DRAWN_FOR_CNN if cnn else NUM_DRAWN) % archive.num_classes
    draw = sampler(central, generator, torch.device("cpu"), scale=config.covariance_scale)
    cells = draw_cells(central, torch.from_numpy(labels), generator)
    images = ((augment(draw(cells), config, generator) + 1) * 127.5).round().byte().numpy()
    rows = np.unique(np.linspace(0, tested.num_images - 1, NUM_TESTED).astype(np.int64))
    test = tested.read(rows), tested.labels[rows].astype(np.int64)
    if not cnn:
        return logistic_regression_accuracy(images, labels, *test).value
    trained = train_classifier("cnn", images, labels, num_classes=archive.num_classes, epochs=EPOCHS)
    return accuracy_on_test(trained, *test).value


def unequal(archive: ImageArchive, path: Path) -> ImageArchive:
    """Writes ``path`` and returns it, an archive with the first 1 / (c + 1) of the images of each class c."""
    assert archive.labels is not None
    kept = [
        rows[: len(rows) // (c + 1)]
        for c in range(archive.num_classes)
        for rows in [np.flatnonzero(archive.labels == c)]
    ]
    with ArchiveWriter(path) as writer:
        for row in np.sort(np.concatenate(kept)):
            writer.add(archive.read(np.array([row]))[0], int(archive.labels[row]))
    return ImageArchive(path)


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description="What noisy means and covariances of each class are worth.")
    parser.add_argument("--data", type=Path, required=True, help="archive, or what dpdm prepare takes")
    parser.add_argument("--noise-multiplier", type=float, required=True, help="of the means")
    parser.add_argument(
        "--count-weight", type=float, default=WarmupConfig.count_weight, help="0: classes taken as equal"
    )
    parser.add_argument("--covariance-noise-multiplier", type=float, help="of the covariances; left out: none")
    parser.add_argument("--clipping-norm", type=float, help="of an image in the means; left out: the default")
    parser.add_argument("--covariance-clipping-norm", type=float, help="of a deviation; left out: the default")
    parser.add_argument("--covariance-side", type=int, default=WarmupConfig.covariance_side, help="frequencies")
    parser.add_argument("--covariance-scale", type=float, default=WarmupConfig.covariance_scale, help="of samples")
    parser.add_argument("--splits", type=int, default=0, help="of each class, by its covariance")
    parser.add_argument("--cell-noise-multiplier", type=float, help="of the cells, with --splits")
    parser.add_argument("--cnn", action="store_true", help="by a CNN: two minutes on one core")
    parser.add_argument("--augmentation", type=float, default=0.0, help="strength of distortions")
    parser.add_argument("--unequal", action="store_true", help="of class c keep the first 1 / (c + 1) of the images")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    options = parser.parse_args(arguments)
    config = WarmupConfig(
        enabled=True,
        noise_multiplier=options.noise_multiplier,
        clipping_norm=options.clipping_norm,
        count_weight=options.count_weight,
        covariance_noise_multiplier=options.covariance_noise_multiplier,
        covariance_clipping_norm=options.covariance_clipping_norm,
        covariance_side=options.covariance_side,
        covariance_scale=options.covariance_scale,
        splits=options.splits,
        cell_noise_multiplier=options.cell_noise_multiplier,
        augmentation=options.augmentation,
        blur=0.0,
        contrast=0.0,
    )
    with tempfile.TemporaryDirectory() as folder:
        path = options.data
        if not (path.suffix == ".zip" and is_archive(path)):
            path = prepare(str(path), Path(folder) / "images.zip").path
        archive = ImageArchive(path)
        given = unequal(archive, Path(folder) / "unequal.zip") if options.unequal else archive
        accuracy = measure(given, archive, config, cnn=options.cnn)
    settings = {name: value for name, value in vars(options).items() if name not in ("data", "json")}
    print(json.dumps({**settings, "accuracy": accuracy}) if options.json else f"{settings}: {100 * accuracy:.1f} %")


if __name__ == "__main__":
    main(sys.argv[1:])
