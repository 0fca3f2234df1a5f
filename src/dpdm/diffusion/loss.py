"""The training loss of one example, and the noise levels at which it is measured.

DP-SGD clips the gradient of what ``diffusion_loss`` returns for one example. So the mean over the K draws is
taken inside an example (it costs no privacy) and nothing here may depend on two examples at once.

Randomness is handed in: uniform numbers become noise levels by an inverse distribution function, so that one
keyed stream of a step decides everything, whatever the batch is split into.
"""

import math
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from dpdm.diffusion.augmentation import MAX_AUGMENTATION
from dpdm.diffusion.denoiser import (
    BETA_D,
    BETA_MIN,
    SIGMA_DATA,
    Denoiser,
    DenoiserKind,
    loss_weight,
    vp_sigma,
)
from dpdm.errors import InputError

MAX_DRAWS = 10_000
LARGEST = 1e6  # of a standard deviation, or of a rate of noise


@dataclass(frozen=True)
class LossConfig:
    """Noise levels and draws of the training loss.

    Attributes:
        type: whose noise levels and weight to take; None: the denoiser's own.
        noise_multiplicity: K, draws averaged inside one example's loss.
        label_dropout: probability that a draw sees the null label, which is what guidance needs.
        augmentation: strength of a random distortion of the image in each draw (see ``augmentation.distort``).
        flip: mirror the image in half of the draws.
        p_mean: mean of ln(sigma) (edm).
        p_std: standard deviation of ln(sigma) (edm).
        logsnr_min: lowest logSNR = -2 ln(sigma) (v).
        logsnr_max: highest logSNR (v).
        beta_min: of the variance-preserving process (vp).
        beta_d: of the variance-preserving process, its beta_max - beta_min (vp).
        eps_t: earliest time (vp).
        sigma_min: lowest noise level (ve).
        sigma_max: highest noise level (ve).
        sigma_data: standard deviation of the pixels (edm).
    """

    type: DenoiserKind | None = None
    noise_multiplicity: int = 1
    label_dropout: float = 0.1
    augmentation: float = 0.0
    flip: bool = False
    p_mean: float = -1.2
    p_std: float = 1.2
    logsnr_min: float = -9.0
    logsnr_max: float = 13.0
    beta_min: float = BETA_MIN
    beta_d: float = BETA_D
    eps_t: float = 1e-5
    sigma_min: float = 0.02
    sigma_max: float = 100.0
    sigma_data: float = SIGMA_DATA

    def __post_init__(self) -> None:
        if self.type is not None and self.type not in get_args(DenoiserKind):
            raise InputError(
                f"Expected loss.type to be one of {list(get_args(DenoiserKind))} or null, got {self.type!r}."
            )
        if not 1 <= self.noise_multiplicity <= MAX_DRAWS:
            raise InputError(
                f"Expected loss.noise_multiplicity >= 1 and <= {MAX_DRAWS}, got {self.noise_multiplicity}: the "
                "paper: 8 or 32."
            )
        if not 0.0 <= self.label_dropout <= 1.0:
            raise InputError(f"Expected 0 <= loss.label_dropout <= 1, got {self.label_dropout}: the paper uses 0.1.")
        if not 0.0 <= self.augmentation <= MAX_AUGMENTATION:
            raise InputError(
                f"Expected 0 <= loss.augmentation <= {MAX_AUGMENTATION}, got {self.augmentation}: 1 is strong."
            )
        for name in ("p_std", "beta_min", "beta_d", "sigma_data"):
            if not 0.0 < getattr(self, name) <= LARGEST:
                raise InputError(f"Expected loss.{name} > 0 and <= {LARGEST:g}, got {getattr(self, name)}.")
        if not math.isfinite(self.p_mean):
            raise InputError(f"Expected loss.p_mean to be finite, got {self.p_mean}: the paper uses -1.2.")
        if not -math.inf < self.logsnr_min < self.logsnr_max < math.inf:
            raise InputError(
                f"Expected loss.logsnr_min < loss.logsnr_max, got {self.logsnr_min} and {self.logsnr_max}."
            )
        if not 0.0 < self.eps_t < 1.0:
            raise InputError(f"Expected 0 < loss.eps_t < 1, got {self.eps_t}: time runs from eps_t to 1.")
        if not 0.0 < self.sigma_min < self.sigma_max < math.inf:
            raise InputError(
                f"Expected 0 < loss.sigma_min < loss.sigma_max, got {self.sigma_min} and {self.sigma_max}."
            )


def noise_level(config: LossConfig, kind: DenoiserKind, u: Tensor) -> Tensor:
    """Returns the noise levels at the quantiles u of the training distribution.

    edm: ln(sigma) is normal (Karras et al. 2022, table 1). v: the cosine schedule, truncated to
    logsnr_min .. logsnr_max (Salimans & Ho 2022). vp: sigma(t), t uniform on [eps_t, 1]. ve: ln(sigma) is
    uniform.

    Args:
        config: of the loss.
        kind: used unless ``config.type`` says otherwise.
        u: uniform on (0, 1), both ends excluded, any shape.

    Returns:
        sigma, of u's shape and dtype; it rises with u.

    Raises:
        InputError: if ``kind`` is unknown.
    """
    kind = config.type or kind
    quantile = u.double()  # float32 has too few digits next to 1
    match kind:
        case "edm":
            sigma = torch.exp(config.p_mean + config.p_std * torch.special.ndtri(quantile))
        case "v":
            # logSNR = -2 ln tan(angle), therefore sigma = exp(-logSNR / 2) = tan(angle).
            first = math.atan(math.exp(-config.logsnr_max / 2))
            last = math.atan(math.exp(-config.logsnr_min / 2))
            sigma = torch.tan(first + (last - first) * quantile)
        case "vp":
            t = config.eps_t + (1 - config.eps_t) * quantile
            sigma = vp_sigma(t, beta_min=config.beta_min, beta_d=config.beta_d)
        case "ve":
            sigma = config.sigma_min * (config.sigma_max / config.sigma_min) ** quantile
        case _:
            raise InputError(f"Expected loss.type to be one of {list(get_args(DenoiserKind))}, got {kind!r}.")
    return sigma.to(u.dtype)


def diffusion_loss(
    denoiser: Denoiser,
    images: Tensor,
    labels: Tensor | None,
    *,
    sigma: Tensor,
    noise: Tensor,
    drop_label: Tensor | None = None,
    kind: DenoiserKind | None = None,
) -> Tensor:
    """Returns every example's loss: the mean over its K draws of weight(sigma) * mean squared error.

    Denoising score matching (Karras et al. 2022, equation 2) with noise multiplicity (Dockhorn et al. 2022).
    The squared error is the *mean* over channels and pixels, not the sum: the scale decides which gradients
    the clipping norm reaches, and with the mean the same clipping norm suits every resolution.

    Guarantee: entry b depends on the images, labels and draws of example b alone, so that adding or removing another
    example does not change it.

    Args:
        denoiser: evaluated once, on K * B images; draw k of example b is row k * B + b.
        images: (B, C, H, W) in [-1, 1], or (K, B, C, H, W), an example's own image for each draw; B may be 0, as
            Poisson sampling allows.
        labels: (B,) or (K, B) int64, or None for an unconditional network.
        sigma: (K, B) noise levels.
        noise: (K, B, C, H, W) standard normal.
        drop_label: (K, B) bool, where to show the null label; None: nowhere. Not used without labels.
        kind: whose weight to take; None: the denoiser's own. It is ``LossConfig.type``.

    Returns:
        (B,).

    Raises:
        InputError: if the shapes do not fit each other.
    """
    draws, batch = sigma.shape
    if noise.shape != (draws, batch, *images.shape[-3:]) or images.shape[:-3] not in ((batch,), (draws, batch)):
        raise InputError(
            f"Expected noise of shape (K, B, C, H, W) for images {tuple(images.shape)} and sigma "
            f"{tuple(sigma.shape)}, got {tuple(noise.shape)}."
        )
    noisy = images + sigma[:, :, None, None, None] * noise
    row_labels = None
    if labels is not None:
        row_labels = labels.expand(draws, batch)
        if drop_label is not None:
            row_labels = row_labels.masked_fill(drop_label, denoiser.network.num_classes)
        row_labels = row_labels.flatten()
    denoised = denoiser(noisy.flatten(0, 1), sigma.flatten(), row_labels).unflatten(0, (draws, batch))
    weight = loss_weight(kind or denoiser.kind, sigma, sigma_data=denoiser.sigma_data)
    return (weight * (denoised - images).square().mean(dim=(2, 3, 4))).mean(dim=0)
