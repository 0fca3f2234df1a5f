"""From a model to files of images."""

import csv
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from dpdm.config import Config
from dpdm.data.archive import ArchiveWriter
from dpdm.device import pick_device
from dpdm.diffusion.denoiser import Denoiser
from dpdm.diffusion.sampling import sample
from dpdm.errors import InputError
from dpdm.evaluation.grids import image_grid
from dpdm.files import fsync
from dpdm.progress import Progress

GRID_IMAGES = 100
GRID_COLUMNS = 10
GRID_PIXELS = 640


def draw(denoiser: Denoiser, config: Config, *, num_images: int | None = None) -> tuple[np.ndarray, np.ndarray | None]:
    """Draws images 0 .. num_images - 1 of the sampler's seed.

    Image i is a function of (weights, config, seed, i): it does not depend on how many are drawn or at a time.

    Returns:
        (n, C, H, W) uint8 and labels (n,) int64, None for an unconditional model.
    """
    total = num_images or config.sampler.num_images
    device = pick_device(config.setup.device)
    network = denoiser.to(device).network
    images, labels = [], []
    with Progress("Sampling", total, unit="images") as progress:
        for start in range(0, total, config.sampler.batch_size):
            indices = range(start, min(start + config.sampler.batch_size, total))
            drawn, classes = sample(
                denoiser,
                config.sampler,
                seed=config.sampler.seed,
                indices=indices,
                num_classes=network.num_classes,
                resolution=network.resolution,
                num_channels=network.num_channels,
                device=device,
            )
            images.append(drawn.numpy())
            if classes is not None:
                labels.append(classes.numpy())
            progress.advance(len(indices))
    return np.concatenate(images), np.concatenate(labels) if labels else None


def write_samples(folder: Path, images: np.ndarray, labels: np.ndarray | None, *, output: str = "folder") -> None:
    """Writes images to ``folder``: PNGs and ``labels.csv``, or ``images.zip``, or ``images.npz``; always ``grid.png``.

    The folder appears as a whole or not at all.

    Raises:
        InputError: if it holds something already.
    """
    check_empty(folder)
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        if output == "folder":
            names = [f"{index:06d}.png" for index in range(len(images))]
            for name, image in zip(names, images, strict=True):
                to_image(image).save(temporary / name)
            if labels is not None:
                with (temporary / "labels.csv").open("w", newline="", encoding="utf-8") as file:
                    csv.writer(file).writerows([("file", "label"), *zip(names, labels.tolist(), strict=True)])
        elif output == "zip":
            write_archive(temporary / "images.zip", images, labels)
        else:
            path = temporary / "images.npz"
            np.savez(path, images=images) if labels is None else np.savez(path, images=images, labels=labels)
        grid(images, labels).save(temporary / "grid.png")
        if folder.exists():
            folder.rmdir()
        temporary.rename(folder)
        fsync(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_empty(folder: Path) -> None:
    """Raises InputError if ``folder`` exists and holds anything."""
    if folder.exists() and any(folder.iterdir()):
        raise InputError(f"Expected an empty folder {folder}, got one with files: choose another --workdir.")


def write_archive(path: Path, images: np.ndarray, labels: np.ndarray | None) -> None:
    """Writes a zip of PNGs with ``dataset.json``, the layout that StyleGAN and EDM tools read."""
    with ArchiveWriter(path) as writer:
        for index, image in enumerate(images):
            writer.add(image, None if labels is None else int(labels[index]))


def to_image(image: np.ndarray) -> Image.Image:
    """Returns a (C, H, W) uint8 array as an image of mode L or RGB."""
    return Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0))


def grid(images: np.ndarray, labels: np.ndarray | None) -> Image.Image:
    """Returns up to 100 images as one picture, by class where there are classes."""
    chosen: Sequence[int] = range(min(GRID_IMAGES, len(images)))
    if labels is not None:
        rank = np.zeros(len(labels), dtype=np.int64)
        for label in np.unique(labels):
            rank[labels == label] = np.arange((labels == label).sum())
        rows = max(1, GRID_IMAGES // max(1, len(np.unique(labels))))
        chosen = [i for i in np.lexsort((rank, labels)) if rank[i] < rows][:GRID_IMAGES]
    columns = min(GRID_COLUMNS, len(chosen))
    scale = max(1, GRID_PIXELS // (columns * images.shape[-1]))
    return image_grid(images[list(chosen)], columns, scale)
