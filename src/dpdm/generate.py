"""From a model to files of images.

However many images, one batch of them is in memory at a time, beside eight bytes of label for each; with several
processes each draws its share.
"""

import csv
import shutil
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from dpdm import config as configs
from dpdm import distributed
from dpdm.checkpoint import TrainState
from dpdm.config import Config
from dpdm.data.archive import ArchiveWriter
from dpdm.device import pick_device, use_full_precision, use_threads
from dpdm.diffusion.adapters import merged
from dpdm.diffusion.denoiser import Denoiser
from dpdm.diffusion.image_noise import image_labels
from dpdm.diffusion.sampling import sample
from dpdm.errors import InputError, RunError
from dpdm.evaluation.grids import image_grid
from dpdm.files import fsync, locked
from dpdm.progress import Progress
from dpdm.recorded import recorded
from dpdm.signals import ends_interrupt

GRID_IMAGES = 100
GRID_COLUMNS = 10
GRID_PIXELS = 640
GRID_SIDE = 4096  # of the largest picture that verify takes
GRID_CHOICE = 10_000  # the grid is chosen from the first images, which are enough for 100 classes
BYTES_PER_READ = 2**22


def as_drawn(config: Config, state: TrainState) -> Config:
    """Returns a run's config with the class weights by which its release draws images.

    They are equal if the config has equal ones, or the noisy frequencies of the classes, to four digits, or none. A run
    without privacy keeps its own.
    """
    if not config.dp.enabled:
        return config
    asked = config.sampler.class_weights
    weights = tuple(float(f"{frequency:.4g}") for frequency in state.central.get("frequencies", ()))
    if asked and len(set(asked)) == 1:
        weights = (1.0,) * len(asked)
    return replace(config, sampler=replace(config.sampler, class_weights=weights))


def denoiser_with(config: Config, weights: Mapping[str, Tensor]) -> Denoiser:
    """Returns a config's denoiser with ``weights`` of its run, in which adapters are merged if there are any."""
    denoiser = configs.build_denoiser(config)
    denoiser.network.load_state_dict(merged(weights))
    return denoiser.eval()


def draw(denoiser: Denoiser, config: Config, *, num_images: int | None = None) -> tuple[np.ndarray, np.ndarray | None]:
    """Draws images 0 .. num_images - 1 of the sampler's seed into memory, in this process alone.

    Image i is a function of (weights, config, seed, i): it does not depend on how many are drawn or at a time.

    Returns:
        (n, C, H, W) uint8 and labels (n,) int64, None for an unconditional model.
    """
    total = num_images or config.sampler.num_images
    return draw_some(denoiser, config, range(total)), _labels(denoiser, config, total)


def draw_some(denoiser: Denoiser, config: Config, indices: range) -> np.ndarray:
    """Draws the images of ``indices`` alone, (n, C, H, W) uint8; n may be 0."""
    network = denoiser.network
    nothing = np.empty((0, network.num_channels, network.resolution, network.resolution), np.uint8)
    return np.concatenate([nothing, *_batches(denoiser, config, indices)])


def make_samples(
    denoiser: Denoiser,
    config: Config,
    *,
    folder: Path | None = None,
    archive: Path | None = None,
    num_images: int | None = None,
) -> int:
    """Draws the same images as ``draw`` into files; to be called by all processes, of which each draws its share.

    Files appear whole or not at all; several processes need a file system that all of them see.

    Args:
        denoiser: draws them.
        config: its sampler says how, how many and, by ``output``, as which files.
        folder: gets PNGs (and, of a model with classes, ``labels.csv``), or ``images.zip``, or ``images.npz``; and
            always ``grid.png``.
        archive: gets the images as a zip of PNGs with ``dataset.json``. One of ``folder`` and ``archive`` is needed.
        num_images: None takes the sampler's.

    Returns:
        The number of images.

    Raises:
        InputError: if there is something in the folder, or the sampler's settings do not fit the model.
        RunError: if drawing or writing fails, here or (PeerError) in another process.
    """
    beside = folder or archive
    if beside is None:
        raise ValueError("Expected folder or archive, got neither.")
    config = replace(config, sampler=replace(config.sampler, num_images=num_images or config.sampler.num_images))
    with distributed.together():
        labels = _labels(denoiser, config, config.sampler.num_images)
        if folder is not None:
            check_empty(folder)
    with _workspace(beside.parent) as workspace:
        with distributed.together():
            _draw_share(denoiser, config, workspace, pngs=folder is not None and config.sampler.output == "folder")
        with distributed.together():
            if distributed.is_main():
                shape = (denoiser.network.num_channels, denoiser.network.resolution, denoiser.network.resolution)
                _assemble(config, workspace, labels, shape, folder, archive)
    return config.sampler.num_images


def check_empty(folder: Path) -> None:
    """Raises InputError if ``folder`` exists and is no folder or holds anything."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"Expected an empty folder {folder}, got one with files: choose another --workdir.")


def write_archive(path: Path, images: Iterable[np.ndarray], labels: np.ndarray | None) -> None:
    """Writes (C, H, W) images as a zip of PNGs with ``dataset.json``, the layout that StyleGAN and EDM tools read."""
    with ArchiveWriter(path) as writer:
        for index, image in enumerate(images):
            writer.add(image, None if labels is None else int(labels[index]))


def write_npz(path: Path, images: Iterable[np.ndarray], labels: np.ndarray | None, shape: Sequence[int]) -> None:
    """Writes (C, H, W) images as ``arr_0``, (n, H, W, C), and labels as ``arr_1``: what guided-diffusion's tools read.

    Args:
        path: the file to write.
        images: n of them, taken one by one.
        labels: (n,) or None: then there is no ``arr_1``.
        shape: (n, C, H, W).
    """
    count, channels, height, width = shape
    with zipfile.ZipFile(path, "w") as file:
        with file.open("arr_0.npy", "w", force_zip64=True) as member:
            form = {"descr": "|u1", "fortran_order": False, "shape": (count, height, width, channels)}
            np.lib.format.write_array_header_1_0(member, form)
            for image in images:
                member.write(image.transpose(1, 2, 0).tobytes())
        if labels is not None:
            with file.open("arr_1.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, labels)
    fsync(path)


def to_image(image: np.ndarray) -> Image.Image:
    """Returns a (C, H, W) uint8 array as an image of mode L or RGB."""
    return Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0))


def grid(images: np.ndarray, labels: np.ndarray | None) -> Image.Image:
    """Returns up to 100 images as one picture, by class where there are classes."""
    return _lay_out(images[_choose(len(images), labels)])


def _choose(count: int, labels: np.ndarray | None) -> list[int]:
    """Which of ``count`` images a grid shows, in its order."""
    if labels is None:
        return list(range(min(GRID_IMAGES, count)))
    nth = np.zeros(count, dtype=np.int64)  # of its class
    for label in np.unique(labels):
        nth[labels == label] = np.arange((labels == label).sum())
    rows = max(1, GRID_IMAGES // len(np.unique(labels)))
    return [int(i) for i in np.lexsort((nth, labels)) if nth[i] < rows][:GRID_IMAGES]


def _lay_out(images: np.ndarray) -> Image.Image:
    columns = min(GRID_COLUMNS, len(images))
    step = -(-images.shape[-1] // (GRID_SIDE // GRID_COLUMNS - 2))  # of large images every nth pixel is shown
    images = images[..., ::step, ::step]
    return image_grid(images, columns, max(1, GRID_PIXELS // (columns * images.shape[-1])))


def _labels(denoiser: Denoiser, config: Config, count: int) -> np.ndarray | None:
    sampler = config.sampler
    classes = denoiser.network.num_classes
    labels = image_labels(sampler.labels, sampler.seed, range(count), classes, sampler.class_weights)
    return None if labels is None else labels.numpy()


def _batches(denoiser: Denoiser, config: Config, indices: range, unit: str = "images") -> Iterator[np.ndarray]:
    """Yields the images of ``indices`` as (n, C, H, W) uint8, ``sampler.batch_size`` at a time."""
    use_threads(config.setup.num_threads)
    use_full_precision()  # with TF32 an image would depend on its batch by more than one grey level
    device = pick_device(config.setup.device)
    denoiser = recorded(denoiser.to(device))
    network = denoiser.network
    with Progress("Sampling", len(indices), unit=unit) as progress:
        for start in range(0, len(indices), config.sampler.batch_size):
            part = indices[start : start + config.sampler.batch_size]
            images, _ = sample(
                denoiser,
                config.sampler,
                seed=config.sampler.seed,
                indices=part,
                num_classes=network.num_classes,
                resolution=network.resolution,
                num_channels=network.num_channels,
                device=device,
            )
            yield images.numpy()
            progress.advance(len(part))


def _draw_share(denoiser: Denoiser, config: Config, workspace: Path, *, pngs: bool) -> None:
    """Draws this process's share into ``workspace``: its pixels as they are, and if wanted PNGs in ``samples/``."""
    if not workspace.is_dir():
        raise RunError(f"Expected every process to see {workspace}, this one does not: put --workdir on a shared disk.")
    indices = distributed.share(config.sampler.num_images)
    index = indices.start
    with _pixels(workspace, distributed.rank()).open("wb") as file:
        unit = "images" if distributed.size() == 1 else f"images in each of {distributed.size()} processes"
        for images in _batches(denoiser, config, indices, unit):
            file.write(images.tobytes())
            for image in images if pngs else ():
                to_image(image).save(workspace / "samples" / _png_name(index, config.sampler.num_images))
                index += 1


def _drawn(workspace: Path, shape: tuple[int, int, int]) -> Iterator[np.ndarray]:
    """Yields the (C, H, W) images that all processes have drawn, in order."""
    size = int(np.prod(shape))
    for there in range(distributed.size()):
        with _pixels(workspace, there).open("rb") as file:
            while content := file.read(max(1, BYTES_PER_READ // size) * size):
                yield from np.frombuffer(content, np.uint8).reshape(-1, *shape)


def _assemble(
    config: Config,
    workspace: Path,
    labels: np.ndarray | None,
    shape: tuple[int, int, int],
    folder: Path | None,
    archive: Path | None,
) -> None:
    """Makes of what was drawn what was asked for, and moves it to its place."""
    total, output = config.sampler.num_images, config.sampler.output
    samples = workspace / "samples"
    if folder is not None:
        if output == "folder" and labels is not None:
            names = (_png_name(index, total) for index in range(total))
            with (samples / "labels.csv").open("w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows(chain([("file", "label")], zip(names, labels.tolist(), strict=True)))
        elif output == "zip":
            write_archive(samples / "images.zip", _drawn(workspace, shape), labels)
        elif output == "npz":
            write_npz(samples / "images.npz", _drawn(workspace, shape), labels, (total, *shape))
        _sample_grid(_drawn(workspace, shape), total, labels).save(samples / "grid.png")
    if archive is not None:
        write_archive(workspace / "archive.zip", _drawn(workspace, shape), labels)
    if folder is not None:
        try:
            samples.rename(folder)  # replaces an empty folder, and no other
        except OSError:
            check_empty(folder)  # somebody else was faster
            raise
    if archive is not None:
        (workspace / "archive.zip").rename(archive)
    fsync(workspace.parent)


def _sample_grid(images: Iterable[np.ndarray], total: int, labels: np.ndarray | None) -> Image.Image:
    """Returns what ``grid`` would of the first images, without holding more than it shows."""
    chosen = _choose(min(total, GRID_CHOICE), None if labels is None else labels[:GRID_CHOICE])
    wanted = set(chosen)
    shown = {i: image.copy() for i, image in enumerate(islice(images, max(chosen) + 1)) if i in wanted}
    return _lay_out(np.stack([shown[i] for i in chosen]))


def _png_name(index: int, total: int) -> str:
    """Six digits, and more only if there are more than a million images."""
    return f"{index:0{max(6, len(str(total - 1)))}d}.png"


def _pixels(workspace: Path, there: int) -> Path:
    return workspace / f"{there}.pixels"


@contextmanager
def _workspace(parent: Path) -> Iterator[Path]:
    """A new folder in ``parent`` for all processes, with a folder ``samples`` in it; it is removed at the end.

    Removed after Ctrl-C and a request to terminate as well; torchrun makes one when a process of its has failed. What a
    killed process left is removed by the next one.
    """
    held = ExitStack()

    def remove_parent() -> None:
        with suppress(OSError):  # not empty: there are samples
            parent.rmdir()

    def make() -> Path:
        path = parent / ".samples.tmp"
        if not parent.exists():
            held.callback(remove_parent)
        path.mkdir(parents=True, exist_ok=True)
        try:
            held.enter_context(locked(path / "lock"))
        except (BlockingIOError, FileNotFoundError):
            raise InputError(
                f"Expected no other process that draws images into {parent}, got one: wait for it or choose another "
                "--workdir."
            ) from None
        held.callback(shutil.rmtree, path, ignore_errors=True)
        for old in path.iterdir():
            if old.is_dir():
                shutil.rmtree(old)
            elif old.name != "lock":
                old.unlink()
        (path / "samples").mkdir()
        return path

    with ends_interrupt():
        try:
            with held:
                yield distributed.on_main(make)
        except Exception:
            with suppress(RunError):
                distributed.barrier()  # once a process has gone torchrun ends the others, so not while one cleans up
            raise
