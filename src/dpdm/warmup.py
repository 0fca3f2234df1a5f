"""The warm-up: ordinary training on what was bought with noise. It costs no privacy of its own."""

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dpdm.central_model import Central, cosines
from dpdm.diffusion.augmentation import NUM_DISTORTIONS, distort
from dpdm.diffusion.denoiser import Denoiser
from dpdm.diffusion.ema import ema_decay, update_ema
from dpdm.diffusion.loss import LossConfig, diffusion_loss, noise_level
from dpdm.errors import DivergedError
from dpdm.privacy.central import WarmupConfig
from dpdm.progress import Progress

STEPS_BETWEEN_CHECKS = 100  # of the weights, for which a GPU is waited for


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

    Raises:
        DivergedError: if weights become infinite or NaN, so that no step of DP-SGD is bought with them.
    """
    device = next(denoiser.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    classes = torch.from_numpy(central.labels).to(device)
    parameters = dict(denoiser.network.named_parameters())
    ema = {name: p.detach().clone() for name, p in parameters.items()}
    optimizer = torch.optim.Adam(denoiser.parameters(), lr=config.learning_rate)
    size, num_classes = config.batch_size, len(central.class_sizes)
    draw = sampler(central, generator, device, scale=config.covariance_scale)
    with Progress("Warm-up", config.num_iterations, unit="steps") as progress:
        for step in range(config.num_iterations):
            before_step()
            optimizer.param_groups[0]["lr"] = (
                config.learning_rate * 0.5 * (1 + math.cos(math.pi * step / config.num_iterations))
            )
            rows = draw_cells(central, torch.randint(num_classes, (size,), generator=generator), generator).to(device)
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
            if step % STEPS_BETWEEN_CHECKS == 0 or step + 1 == config.num_iterations:
                _check_finite(ema)
            progress.advance()
    return ema


def _check_finite(weights: Mapping[str, Tensor]) -> None:
    if not all(bool(weight.isfinite().all()) for weight in weights.values()):
        raise DivergedError(
            "Expected finite weights in the warm-up, got others: it has diverged; begin another run with a lower "
            "train.warmup.learning_rate, or other noise levels (loss.p_mean and its kin)."
        )


def draw_cells(central: Central, labels: Tensor, generator: torch.Generator) -> Tensor:
    """Returns a cell for each of some labels, (n,): of this class, by the shares of its cells."""
    cells = len(central.labels) // len(central.class_sizes)
    if cells == 1:
        return labels
    shares = torch.ones(len(central.labels)) if central.shares is None else torch.from_numpy(central.shares)
    return labels * cells + torch.multinomial(shares.view(-1, cells)[labels], 1, generator=generator)[:, 0]


def sampler(
    central: Central, generator: torch.Generator, device: torch.device, *, scale: float = 1.0
) -> Callable[[Tensor], Tensor]:
    """Returns a function that draws an image of each cell (n,): its mean, moved along its or its class's directions.

    ``scale`` times as far as was bought.
    """
    means = torch.from_numpy(central.means.clip(0, 1)).float().to(device)
    if central.factors is None:
        return lambda cells: means[cells] * 2 - 1
    factors = torch.from_numpy(scale * central.factors).float().to(device)
    low = torch.from_numpy(cosines(means.shape[-1])[: factors.shape[-1]]).float().to(device)
    each = len(means) // len(factors)

    def draw(cells: Tensor) -> Tensor:
        along = torch.randn(len(cells), factors.shape[1], generator=generator).to(device)
        waves = torch.einsum("nr,nrcfg->ncfg", along, factors[cells // each])
        return (means[cells] + low.T @ waves @ low).clamp(0, 1) * 2 - 1

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
