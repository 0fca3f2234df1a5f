"""The warm-up: ordinary training on central images that were bought with noise. It costs no privacy of its own."""

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dpdm.data.archive import ImageArchive
from dpdm.diffusion.denoiser import Denoiser
from dpdm.diffusion.ema import ema_decay, update_ema
from dpdm.diffusion.loss import LossConfig, diffusion_loss, noise_level
from dpdm.privacy.central import WarmupConfig, default_clipping_norm, noisy_class_means
from dpdm.privacy.noise import derive_key, random_words, to_uniform
from dpdm.progress import Progress

PIECE = 1024  # images decoded at a time


def central_images(
    archive: ImageArchive, config: WarmupConfig, *, num_classes: int, key: bytes
) -> tuple[np.ndarray, np.ndarray]:
    """Returns noisy class means as images, and their labels; see ``noisy_class_means`` for the guarantee.

    Of a group of images one takes part, chosen by the key.

    Guarantee: a record, an image or a group, adds one vector, a function of this record, its number and the key.

    Args:
        archive: the private images.
        config: its noise multiplier, cells and clipping norm.
        num_classes: 0 without classes.
        key: of this purpose alone.

    Returns:
        (cells, C, H, W) float64, pixels about [0, 1] but not limited to it, and (cells,) int64.
    """
    shape = (archive.num_channels, archive.resolution, archive.resolution)
    count = archive.num_records
    chosen = archive.choose_images(np.arange(count), to_uniform(random_words(derive_key(key, "images"), count)))
    pieces = (
        archive.read(chosen[start : start + PIECE]).reshape(-1, math.prod(shape)) / 255.0
        for start in range(0, count, PIECE)
    )
    means = noisy_class_means(
        pieces,
        archive.labels[chosen] if num_classes and archive.labels is not None else None,
        dataset_size=count,
        num_classes=max(num_classes, 1),
        means_per_class=config.means_per_class,
        clipping_norm=config.clipping_norm or default_clipping_norm(math.prod(shape)),
        noise_multiplier=config.noise_multiplier,
        key=key,
    )
    labels = np.repeat(np.arange(max(num_classes, 1)), config.means_per_class)
    return means.reshape(-1, *shape), labels


def train_on_central_images(
    denoiser: Denoiser,
    means: np.ndarray,
    labels: np.ndarray,
    config: WarmupConfig,
    loss_config: LossConfig,
    *,
    seed: int,
) -> dict[str, Tensor]:
    """Trains ``denoiser`` in place on augmented central images; returns the weights' moving average.

    Everything here is a function of the released means and of public randomness: post-processing.
    """
    device = next(denoiser.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    images = torch.from_numpy(means.clip(0, 1) * 2 - 1).float().to(device)
    classes = torch.from_numpy(labels).to(device) if denoiser.network.num_classes else None
    parameters = dict(denoiser.network.named_parameters())
    ema = {name: p.detach().clone() for name, p in parameters.items()}
    optimizer = torch.optim.Adam(denoiser.parameters(), lr=config.learning_rate)
    size = config.batch_size
    with Progress("Warm-up", config.num_iterations, unit="steps") as progress:
        for step in range(config.num_iterations):
            optimizer.param_groups[0]["lr"] = (
                config.learning_rate * 0.5 * (1 + math.cos(math.pi * step / config.num_iterations))
            )
            rows = torch.randint(len(images), (size,), generator=generator).to(device)
            batch = augment(images[rows], config, generator)
            u = torch.rand(1, size, generator=generator, dtype=torch.float64).clamp(1e-9, 1 - 1e-9)
            loss = diffusion_loss(
                denoiser,
                batch,
                None if classes is None else classes[rows],
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


def augment(images: Tensor, config: WarmupConfig, generator: torch.Generator) -> Tensor:
    """Returns each image moved, blurred and re-contrasted at random, (n, C, H, W) in [-1, 1]; looks at no data.

    The distortions are those between two drawings of one class: rotation and shear up to 0.2, scale up to 15 %, shift
    up to an eighth of the side, all times ``config.augmentation``.
    """

    def uniform(limit: float) -> Tensor:
        return (2 * torch.rand(len(images), generator=generator) - 1).to(images.device) * limit

    a = config.augmentation
    angle, shear, scale_x, scale_y = (uniform(a * limit) for limit in (0.2, 0.2, 0.15, 0.15))
    shift_x, shift_y = uniform(0.25 * a), uniform(0.25 * a)  # affine_grid measures from -1 to 1
    cos, sin = angle.cos(), angle.sin()
    rows = (
        torch.stack([cos * (1 + scale_x), shear - sin, shift_x], 1),
        torch.stack([sin, cos * (1 + scale_y), shift_y], 1),
    )
    grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    moved = F.grid_sample(images, grid, mode="bicubic", padding_mode="border", align_corners=False)
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
