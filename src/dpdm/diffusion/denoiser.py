"""Preconditioning: how a raw network F becomes a denoiser D(x; sigma).

D(x; sigma) = c_skip x + c_out F(c_in x; c_noise), Karras et al. 2022 (arXiv 2206.00364), equation 7. Images
have pixels in [-1, 1]; x = image + sigma * standard normal noise.
"""

import math
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from dpdm.diffusion.unet import UNet
from dpdm.errors import InputError

DenoiserKind = Literal["edm", "v", "vp", "ve"]

SIGMA_DATA = math.sqrt(1 / 3)  # standard deviation of a uniform distribution on [-1, 1]
BETA_MIN = 0.1
BETA_D = 19.9
VP_STEPS = 1000  # M, the number of steps for which the VP network's time axis was laid out


def preconditioning(
    kind: DenoiserKind,
    sigma: Tensor,
    *,
    sigma_data: float = SIGMA_DATA,
    beta_min: float = BETA_MIN,
    beta_d: float = BETA_D,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns (c_skip, c_out, c_in, c_noise), each of sigma's shape.

    edm, vp and ve: Karras et al. 2022, table 1. v: Salimans & Ho 2022 (arXiv 2202.00512), written for
    x = image + sigma * noise.

    Args:
        kind: which preconditioning.
        sigma: noise levels > 0.
        sigma_data: standard deviation of the data (edm).
        beta_min: of the variance-preserving process (vp).
        beta_d: of the variance-preserving process (vp).

    Raises:
        InputError: if ``kind`` is unknown.
    """
    one = torch.ones_like(sigma)
    unit = (sigma**2 + 1).sqrt()
    match kind:
        case "edm":
            total = (sigma**2 + sigma_data**2).sqrt()
            c_skip = sigma_data**2 / (sigma**2 + sigma_data**2)
            return c_skip, sigma * sigma_data / total, 1 / total, sigma.log() / 4
        case "v":
            # arctan(sigma) would keep more digits, but the original has the arccosine. In float32 its error is
            # below 1e-4 at sigma > 0.001, which is nothing to the network: its fastest sinusoid has frequency 1.
            return 1 / (sigma**2 + 1), sigma / unit, 1 / unit, (1 / unit).arccos() * 2 / math.pi
        case "vp":
            c_noise = (VP_STEPS - 1) * vp_time(sigma, beta_min=beta_min, beta_d=beta_d)
            return one, -sigma, 1 / unit, c_noise
        case "ve":
            return one, sigma, one, (sigma / 2).log()
    raise InputError(f"Expected model.denoiser to be one of {list(get_args(DenoiserKind))}, got {kind!r}.")


def loss_weight(kind: DenoiserKind, sigma: Tensor, *, sigma_data: float = SIGMA_DATA) -> Tensor:
    """Returns lambda(sigma), the weight of the squared error, of sigma's shape.

    It is 1 / c_out^2: the network's own output then has about the same error at every noise level.

    Raises:
        InputError: if ``kind`` is unknown.
    """
    match kind:
        case "edm":
            return (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2
        case "v":
            return (sigma**2 + 1) / sigma**2
        case "vp" | "ve":
            return 1 / sigma**2
    raise InputError(f"Expected loss.type to be one of {list(get_args(DenoiserKind))}, got {kind!r}.")


def vp_sigma(t: Tensor, *, beta_min: float = BETA_MIN, beta_d: float = BETA_D) -> Tensor:
    """Returns sigma(t) = sqrt(exp(beta_d t^2 / 2 + beta_min t) - 1), Karras et al. 2022, table 1."""
    return torch.expm1(beta_d * t**2 / 2 + beta_min * t).sqrt()


def vp_time(sigma: Tensor, *, beta_min: float = BETA_MIN, beta_d: float = BETA_D) -> Tensor:
    """Returns the t at which ``vp_sigma(t)`` is sigma."""
    log_variance = torch.log1p(sigma**2)
    # The root (sqrt(beta_min^2 + 2 beta_d l) - beta_min) / beta_d, rationalised: it cancels at small sigma.
    return 2 * log_variance / ((beta_min**2 + 2 * beta_d * log_variance).sqrt() + beta_min)


class Denoiser(nn.Module):
    """D(x; sigma, label), an estimate of the image in x = image + sigma * noise."""

    kind: DenoiserKind

    def __init__(
        self,
        network: UNet,
        kind: DenoiserKind = "edm",
        *,
        sigma_data: float = SIGMA_DATA,
        beta_min: float = BETA_MIN,
        beta_d: float = BETA_D,
    ) -> None:
        """Wraps a network; ``sigma_data`` matters to edm, ``beta_min`` and ``beta_d`` to vp.

        Raises:
            InputError: if ``kind`` is unknown or a constant is not positive.
        """
        super().__init__()
        if kind not in get_args(DenoiserKind):
            raise InputError(f"Expected model.denoiser to be one of {list(get_args(DenoiserKind))}, got {kind!r}.")
        for name, value in {"sigma_data": sigma_data, "beta_min": beta_min, "beta_d": beta_d}.items():
            if not value > 0:
                raise InputError(f"Expected {name} > 0, got {value}.")
        self.network, self.kind = network, kind
        self.sigma_data, self.beta_min, self.beta_d = sigma_data, beta_min, beta_d

    def forward(self, x: Tensor, sigma: Tensor | float, labels: Tensor | None = None) -> Tensor:
        """Returns the denoised images.

        Args:
            x: (N, C, H, W) noisy images in the network's dtype.
            sigma: noise level > 0, one for all or (N,).
            labels: (N,) int64, ``network.num_classes`` being the null label; None is null for all.

        Returns:
            (N, C, H, W) in x's dtype.
        """
        # The factors span many orders of magnitude: never in less than float32, even if the images are.
        dtype = torch.promote_types(x.dtype, torch.float32)
        sigma = torch.as_tensor(sigma, dtype=dtype, device=x.device).expand(x.shape[0])
        factors = preconditioning(
            self.kind, sigma, sigma_data=self.sigma_data, beta_min=self.beta_min, beta_d=self.beta_d
        )
        c_skip, c_out, c_in = (factor[:, None, None, None] for factor in factors[:3])
        output = self.network((c_in * x).to(x.dtype), factors[3], labels)
        return (c_skip * x + c_out * output).to(x.dtype)
