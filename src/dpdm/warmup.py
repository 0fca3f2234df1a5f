"""The warm-up: ordinary training on what was bought with noise. It costs no privacy of its own."""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from scipy.fft import dct
from torch import Tensor
from torch.nn import functional as F

from dpdm.data.archive import ImageArchive
from dpdm.diffusion.augmentation import NUM_DISTORTIONS, distort
from dpdm.diffusion.denoiser import Denoiser
from dpdm.diffusion.ema import ema_decay, update_ema
from dpdm.diffusion.loss import LossConfig, diffusion_loss, noise_level
from dpdm.privacy.central import (
    WarmupConfig,
    default_clipping_norm,
    default_covariance_clipping_norm,
    noisy_class_means,
)
from dpdm.privacy.covariance import check_size, noisy_class_covariances, principal_factors
from dpdm.privacy.noise import derive_key, random_words, to_uniform
from dpdm.progress import Progress

PIECE = 1024  # images decoded at a time
FINE = 2.0**15  # steps of which a deviation and a cosine are whole numbers
CENTRE = 2.0**10  # steps of a centre: what hardware changes in its last bits is nearly always rounded away


@dataclass(frozen=True)
class Central:
    """What the warm-up bought: with noise, so that it may be used in any way.

    Attributes:
        means: (cells, C, H, W) float64, pixels about [0, 1] but not limited to it.
        labels: (cells,) int64.
        class_sizes: images of each class, (num_classes,) float64.
        frequencies: of the classes, by which images are to be drawn, (num_classes,) float64; None if not counted.
        factors: of each class's covariance, (num_classes, rank, C, H, W) float64, or None.
    """

    means: np.ndarray
    labels: np.ndarray
    class_sizes: np.ndarray
    frequencies: np.ndarray | None = None
    factors: np.ndarray | None = None

    def centres(self) -> np.ndarray:
        """Returns the mean of each class's cells, in [0, 1] and in steps of 1 / CENTRE, (num_classes, C, H, W)."""
        cells = len(self.labels) // len(self.class_sizes)
        return np.rint(self.means.reshape(-1, cells, *self.means.shape[1:]).mean(1).clip(0, 1) * CENTRE) / CENTRE


def central_images(archive: ImageArchive, config: WarmupConfig, *, num_classes: int, key: bytes) -> Central:
    """Returns noisy class means as images, and class sizes; see ``noisy_class_means`` for the guarantee.

    Of a group of images one takes part, chosen by the key.

    Guarantee: a record, an image or a group, adds one vector and is counted once, in a cell that is, like the vector, a
    function of this record, its number and the key.

    Args:
        archive: the private images.
        config: its noise multiplier, cells, clipping norm and weight of counts.
        num_classes: 0 without classes.
        key: of this purpose alone.
    """
    shape = (archive.num_channels, archive.resolution, archive.resolution)
    chosen = _choose(archive, key)
    found = noisy_class_means(
        (piece.reshape(len(piece), -1) for _, piece in _pieces(archive, chosen)),
        archive.labels[chosen] if num_classes and archive.labels is not None else None,
        dataset_size=len(chosen),
        num_classes=max(num_classes, 1),
        means_per_class=config.means_per_class,
        clipping_norm=config.clipping_norm or default_clipping_norm(math.prod(shape)),
        noise_multiplier=config.noise_multiplier,
        key=key,
        count_weight=config.count_weight,
    )
    labels = np.repeat(np.arange(max(num_classes, 1)), config.means_per_class)
    means = found.means.reshape(-1, *shape)
    if config.covariance_noise_multiplier is not None:  # means that will only be distorted do better with their noise
        means = with_less_noise(means, found.noise)
    return Central(means, labels, found.sizes, found.frequencies)


def with_less_noise(means: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """Returns noisy images with each frequency drawn back to 0 as far as its noise hides it.

    By the share of the noise's variance in that of a frequency (empirical Bayes; Efron and Morris 1973). Frequencies
    of one wavelength, to the nearest whole number of half waves, are taken together, and those of all channels and
    images, which count for the less the noisier they are. Looks at no data: its arguments are released or public.

    Args:
        means: (n, C, H, W) float64, H = W.
        noise: standard deviation of each one's pixels, (n,).
    """
    side = means.shape[-1]
    all_waves = cosines(side)
    coefficients = all_waves @ means @ all_waves.T
    lengths = np.rint(np.hypot(np.arange(side)[:, None], np.arange(side))).astype(np.int64)
    variance = np.maximum(np.square(noise), 1e-300)
    for length in range(lengths.max() + 1):
        found = coefficients[:, :, lengths == length]
        signal = max(0.0, float(np.average(np.square(found).mean((1, 2)) - variance, weights=1 / variance)))
        coefficients[:, :, lengths == length] = (signal / (signal + variance))[:, None, None] * found
    return all_waves.T @ coefficients @ all_waves


def with_covariances(central: Central, archive: ImageArchive, config: WarmupConfig, *, key: bytes) -> Central:
    """Returns ``central`` with noisy covariances; see ``noisy_class_covariances`` for the guarantee.

    Of a group of images one takes part, chosen by the key.

    Guarantee: a record adds the product of one vector with itself, a function of this record, the key and
    ``central``, which was released before.

    Args:
        central: the noisy means and sizes.
        archive: the private images.
        config: its noise multiplier, clipping norm, side, rank and scale.
        key: of this purpose alone.
    """
    assert config.covariance_noise_multiplier is not None  # the caller has looked
    centres = central.centres()
    num_classes, channels, side = len(centres), archive.num_channels, archive.resolution
    chosen = _choose(archive, key)
    labels = archive.labels[chosen] if num_classes > 1 and archive.labels is not None else None
    fewer = min(side, config.covariance_side)
    norm = config.covariance_clipping_norm or default_covariance_clipping_norm(channels * side**2)
    of_record = np.zeros(len(chosen), np.int64) if labels is None else labels
    covariances = noisy_class_covariances(
        (deviations(piece, centres[of_record[rows]], fewer) for rows, piece in _pieces(archive, chosen)),
        labels,
        dataset_size=len(chosen),
        num_classes=num_classes,
        clipping_norm=norm,
        noise_multiplier=config.covariance_noise_multiplier,
        key=key,
        class_sizes=central.class_sizes,
    )
    noise = config.covariance_noise_multiplier * norm**2 / math.sqrt(2) / central.class_sizes
    factors = principal_factors(covariances, noise, config.covariance_rank)
    waves = factors.swapaxes(1, 2).reshape(num_classes, -1, channels, fewer, fewer)
    low = cosines(side)[:fewer]
    return replace(central, factors=config.covariance_scale * (low.T @ waves @ low))


def check_covariances(config: WarmupConfig, archive: ImageArchive, num_classes: int) -> None:
    """Raises InputError if the images' covariances, where they are to be bought, have too many numbers in all."""
    if config.enabled and config.covariance_noise_multiplier is not None:
        side = min(archive.resolution, config.covariance_side)
        check_size(max(num_classes, 1), archive.num_channels * side**2)


def deviations(images: np.ndarray, centres: np.ndarray, side: int) -> np.ndarray:
    """Returns images less their centres, (n, C, H, W) both, by their ``side`` lowest frequencies each way, (n, D).

    These are coefficients of the orthonormal cosine transform (Ahmed, Natarajan and Rao 1974). Images put most of their
    variance there; pixels are many more numbers, and so is their noise.

    Guarantee: the same bits on any hardware, where centres are. Both products are of whole numbers, at most 2^30 times
    the side in all, which is below 2^53: so they are exact, in whatever order they are added.
    """
    waves = np.rint(cosines(images.shape[-1])[:side] * FINE)
    upright = np.rint(waves @ np.rint((images - centres) * FINE) / FINE)
    return (upright @ waves.T / FINE**2).reshape(len(images), -1)


def cosines(side: int) -> np.ndarray:
    """Returns the orthonormal cosines over ``side`` pixels, (side, side): a row for each frequency, from 0 on."""
    return np.asarray(dct(np.eye(side), axis=0, norm="ortho"))


def _choose(archive: ImageArchive, key: bytes) -> np.ndarray:
    """Returns for each record the image that takes part."""
    count = archive.num_records
    return archive.choose_images(np.arange(count), to_uniform(random_words(derive_key(key, "images"), count)))


def _pieces(archive: ImageArchive, chosen: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Yields which of the ``chosen`` images come and their pixels in [0, 1], (n, C, H, W) float64."""
    for start in range(0, len(chosen), PIECE):
        rows = slice(start, start + PIECE)
        yield rows, archive.read(chosen[rows]) / 255.0


def train_on_central_images(
    denoiser: Denoiser,
    central: Central,
    config: WarmupConfig,
    loss_config: LossConfig,
    *,
    seed: int,
    autocast: AbstractContextManager[Any] | None = None,
    before_step: Callable[[], None] = lambda: None,
) -> dict[str, Tensor]:
    """Trains ``denoiser`` in place on augmented central images; returns the weights' moving average.

    Everything here is a function of what was released and of public randomness: post-processing.
    ``autocast`` is entered around each loss, ``before_step`` may end it by an exception.
    """
    device = next(denoiser.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    classes = torch.from_numpy(central.labels).to(device)
    parameters = dict(denoiser.network.named_parameters())
    ema = {name: p.detach().clone() for name, p in parameters.items()}
    optimizer = torch.optim.Adam(denoiser.parameters(), lr=config.learning_rate)
    size = config.batch_size
    draw = sampler(central, generator, device)
    with Progress("Warm-up", config.num_iterations, unit="steps") as progress:
        for step in range(config.num_iterations):
            before_step()
            optimizer.param_groups[0]["lr"] = (
                config.learning_rate * 0.5 * (1 + math.cos(math.pi * step / config.num_iterations))
            )
            rows = torch.randint(len(classes), (size,), generator=generator).to(device)
            batch = augment(draw(rows), config, generator)
            u = torch.rand(1, size, generator=generator, dtype=torch.float64).clamp(1e-9, 1 - 1e-9)
            with autocast or nullcontext():
                loss = diffusion_loss(
                    denoiser,
                    batch,
                    classes[rows] if denoiser.network.num_classes else None,
                    sigma=noise_level(loss_config, denoiser.kind, u).float().to(device),
                    noise=torch.randn(1, *batch.shape, generator=generator).to(device),
                    drop_label=(torch.rand(1, size, generator=generator) < loss_config.label_dropout).to(device),
                    kind=loss_config.type,
                ).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            update_ema(ema, parameters, ema_decay(config.ema_rate, step))
            progress.advance()
    return ema


def sampler(central: Central, generator: torch.Generator, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Returns a function that draws an image of each cell (n,): its mean, moved along the class's directions."""
    means = torch.from_numpy(central.means.clip(0, 1)).float().to(device)
    if central.factors is None:
        return lambda cells: means[cells] * 2 - 1
    factors = torch.from_numpy(central.factors).float().to(device)
    labels = torch.from_numpy(central.labels).to(device)

    def draw(cells: Tensor) -> Tensor:
        along = torch.randn(len(cells), factors.shape[1], generator=generator).to(device)
        moved = torch.einsum("nr,nrchw->nchw", along, factors[labels[cells]])
        return (means[cells] + moved).clamp(0, 1) * 2 - 1

    return draw


def augment(images: Tensor, config: WarmupConfig, generator: torch.Generator) -> Tensor:
    """Returns each image moved, blurred and re-contrasted at random, (n, C, H, W) in [-1, 1]; looks at no data.

    Moved by ``distort`` at the strength ``config.augmentation``.
    """

    def uniform(limit: float) -> Tensor:
        return (2 * torch.rand(len(images), generator=generator) - 1).to(images.device) * limit

    u = torch.rand(NUM_DISTORTIONS, len(images), generator=generator)
    moved = distort(images, u.to(images.device), config.augmentation)
    largest = config.blur * images.shape[-1]  # in pixels
    deviation = uniform(0.5 * largest) + 0.5 * largest + 1e-3
    contrast = 1 + uniform(config.contrast)
    return (
        (gaussian_blur(moved, deviation, radius=max(1, round(3 * largest))) + 1) * contrast[:, None, None, None] - 1
    ).clamp(-1, 1)


def gaussian_blur(images: Tensor, deviation: Tensor, radius: int) -> Tensor:
    """Returns (n, C, H, W) images, each blurred by its own standard deviation in pixels, (n,)."""
    offsets = torch.arange(-radius, radius + 1, device=images.device)
    kernel = torch.exp(-(offsets**2) / (2 * deviation[:, None] ** 2))
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(images.shape[1], 0)
    flat = F.pad(images, [radius] * 4, mode="replicate").flatten(0, 1)[None]
    flat = F.conv2d(flat, kernel[:, None, :, None], groups=len(kernel))
    return F.conv2d(flat, kernel[:, None, None, :], groups=len(kernel))[0].view(images.shape)
