"""From noise to images: noise schedule, solvers and guidance, each a plain function.

A solver takes ``(denoiser, x, sigmas)`` with x at noise level ``sigmas[0]`` and solves
dx/dsigma = (x - D(x; sigma)) / sigma (Karras et al. 2022, arXiv 2206.00364, equation 1) or its stochastic
counterpart down to ``sigmas[-1]``, which is positive; the image is the denoised x there.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

import torch
from torch import Tensor

from dpdm.diffusion.augmentation import MAX_AUGMENTATION, distort
from dpdm.diffusion.denoiser import Denoiser
from dpdm.diffusion.image_noise import PerImageNoise, distortion_numbers, image_labels
from dpdm.errors import DivergedError, InputError

MAX_STEPS, MAX_IMAGES = 10_000, 10**8
LARGEST_SIGMA, SMALLEST_RHO = 1e6, 0.1
LARGEST_GUIDANCE = 1e3  # either way; more is a slip
SHIFT_OF_DRAWN = 0.025  # of the side, at sampler.augmentation=1
SamplerType = Literal["ddim", "edm", "dpm_solver_pp"]
OutputType = Literal["folder", "zip", "npz"]
PrecisionType = Literal["float32", "bf16"]
# Lowest noise level and rho: those of Karras et al. 2022; DPM-Solver++, whose variable is ln(sigma), does best with
# levels even in it, and few evaluations are better spent above 0.02 than below (measured in docs/samplers.md).
SCHEDULES = {"ddim": (0.002, 7.0), "edm": (0.002, 7.0), "dpm_solver_pp": (0.02, math.inf)}


@dataclass(frozen=True)
class SamplerConfig:
    """How images are drawn.

    Attributes:
        type: solver.
        num_steps: noise levels, and denoiser calls of ddim and dpm_solver_pp; edm makes about twice as many.
        sigma_min: lowest noise level; None is the solver's own of ``SCHEDULES``.
        sigma_max: highest noise level, where x is nothing but noise.
        rho: how strongly the levels crowd at the low end; None is the solver's own of ``SCHEDULES``.
        guidance_scale: w in (1 + w) conditional - w unconditional; 0 is off.
        guidance_min: lowest noise level at which images are guided.
        guidance_max: highest noise level at which images are guided.
        labels: class of all images; None or the number of classes: a random one for each.
        class_weights: how often each class is drawn at random, in proportion; empty: all equally often. A release has
            the noisy sizes of the private classes here, if they were bought (train.warmup.count_weight).
        num_images: to be drawn.
        batch_size: images denoised at a time.
        precision: of the network; bf16 by torch.autocast, with the solver's own arithmetic in float32 all the same. It
            moves pixels by some grey levels, and makes them depend by as much on which images are in a batch.
        stochastic: fresh noise in every step (ddim).
        s_churn: noise added back over all steps (edm).
        s_min: lowest noise level with churn (edm).
        s_max: highest noise level with churn (edm).
        s_noise: standard deviation of the added noise (edm).
        augmentation: strength of a random distortion of each image when it is done (see ``distorted``); 0 is off. A
            classifier may learn more from such images; they are less like the real ones.
        seed: of the images; it has nothing to do with privacy.
        output: how the images are stored.
    """

    type: SamplerType = "ddim"
    num_steps: int = 50
    sigma_min: float | None = None
    sigma_max: float = 80.0
    rho: float | None = None
    guidance_scale: float = 0.0
    guidance_min: float = 0.0
    guidance_max: float = math.inf
    labels: int | None = None
    class_weights: tuple[float, ...] = ()
    num_images: int = 16
    batch_size: int = 500
    precision: PrecisionType = "float32"
    stochastic: bool = False
    s_churn: float = 0.0
    s_min: float = 0.0
    s_max: float = math.inf
    s_noise: float = 1.0
    augmentation: float = 0.0
    seed: int = 0
    output: OutputType = "folder"

    def __post_init__(self) -> None:
        object.__setattr__(self, "class_weights", tuple(self.class_weights))
        chosen = {"type": SamplerType, "precision": PrecisionType, "output": OutputType}
        for name, choices in ((name, get_args(choice)) for name, choice in chosen.items()):
            if getattr(self, name) not in choices:
                raise InputError(f"Expected sampler.{name} to be one of {list(choices)}, got {getattr(self, name)!r}.")
        for name, most in (("num_steps", MAX_STEPS), ("num_images", MAX_IMAGES), ("batch_size", MAX_IMAGES)):
            if not 1 <= getattr(self, name) <= most:
                raise InputError(f"Expected sampler.{name} >= 1 and <= {most}, got {getattr(self, name)}.")
        if self.labels is not None and self.labels < 0:
            raise InputError(f"Expected sampler.labels >= 0 or null, got {self.labels}: null draws classes.")
        if not all(0 <= weight < math.inf for weight in self.class_weights) or (
            self.class_weights and not 0 < sum(self.class_weights) < math.inf
        ):
            raise InputError(
                f"Expected sampler.class_weights >= 0 and finite, one of them above 0, got {list(self.class_weights)}."
            )
        levels = self.sigmas()
        if not (bool(levels.isfinite().all()) and bool((levels[1:] < levels[:-1]).all()) and float(levels[-1]) > 0):
            raise InputError(
                f"Expected noise levels that fall and fit a float, got others by sampler.rho={self.rho}, "
                f"sigma_min={self.sigma_min} and sigma_max={self.sigma_max}: the paper uses 7, 0.002 and 80."
            )
        if not abs(self.guidance_scale) <= LARGEST_GUIDANCE:
            raise InputError(
                f"Expected sampler.guidance_scale of at most {LARGEST_GUIDANCE:g}, got {self.guidance_scale}: 0 is off."
            )
        if not 0.0 <= self.guidance_min <= self.guidance_max:
            raise InputError(
                "Expected 0 <= sampler.guidance_min <= sampler.guidance_max, got "
                f"{self.guidance_min} and {self.guidance_max}: 0 and .inf are all noise levels."
            )
        if not 0.0 <= self.augmentation <= MAX_AUGMENTATION:
            raise InputError(
                f"Expected 0 <= sampler.augmentation <= {MAX_AUGMENTATION}, got {self.augmentation}: 1.5 suits digits."
            )
        _check_churn(self.s_churn, self.s_min, self.s_max, self.s_noise)
        if self.type != "ddim" and self.stochastic:
            raise InputError(
                f"Expected sampler.stochastic=false with sampler.type={self.type}, got true: "
                "sampler.type=ddim has a stochastic form, sampler.type=edm has sampler.s_churn."
            )
        if self.type != "edm" and self.s_churn:
            raise InputError(
                f"Expected sampler.s_churn=0 with sampler.type={self.type}, got {self.s_churn}: "
                "only sampler.type=edm has churn."
            )

    def sigmas(self) -> Tensor:
        """Returns the noise levels, by ``karras_sigmas``."""
        sigma_min, rho = SCHEDULES[self.type]
        sigma_min, rho = sigma_min if self.sigma_min is None else self.sigma_min, rho if self.rho is None else self.rho
        return karras_sigmas(self.num_steps, sigma_min, self.sigma_max, rho)


def karras_sigmas(num_steps: int, sigma_min: float, sigma_max: float, rho: float) -> Tensor:
    """Returns falling noise levels, evenly spaced in sigma^(1/rho).

    Karras et al. 2022, equation 5, without its final 0. In float32 as in the original, whose first level is then
    79.99998, not 80: scale the initial noise by the level returned, not by ``sigma_max``.

    Args:
        num_steps: at least 1; a single level is sigma_max.
        sigma_min: the last level.
        sigma_max: the first level.
        rho: 7 in the paper; 1 is even spacing in sigma, and infinity, the limit, in ln(sigma).

    Returns:
        (num_steps,) float32.

    Raises:
        InputError: if not num_steps >= 1, 0 < sigma_min < sigma_max and rho > 0.
    """
    if num_steps < 1:
        raise InputError(f"Expected num_steps >= 1, got {num_steps}.")
    _check_levels(sigma_min, sigma_max, rho)
    if rho == math.inf:
        return torch.linspace(math.log(sigma_max), math.log(sigma_min), num_steps, dtype=torch.float32).exp()
    roots = torch.linspace(sigma_max ** (1 / rho), sigma_min ** (1 / rho), num_steps, dtype=torch.float32)
    return roots**rho


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance by ``scale``, w, at noise levels from ``low`` to ``high``; 0 is off.

    At high noise it draws images to what is common to their class, at low noise it does little: so an interval
    leaves them more varied, and needs fewer calls (Kynkaanniemi et al. 2024, arXiv 2404.07724).
    """

    scale: float = 0.0
    low: float = 0.0
    high: float = math.inf

    def at(self, sigma: float) -> float:
        """Returns w at a noise level."""
        return self.scale if self.low <= sigma <= self.high else 0.0


UNGUIDED = Guidance()


def guided(denoiser: Denoiser, x: Tensor, sigma: float, labels: Tensor | None, guidance: Guidance) -> Tensor:
    """Returns (1 + w) D(x; sigma, label) - w D(x; sigma, null), with the w that ``guidance`` has at sigma.

    Classifier-free guidance, Ho & Salimans 2022 (arXiv 2207.12598), equation 6.
    One call of the denoiser with w = 0, two else: kernels round differently for a doubled batch.

    Raises:
        InputError: if w is not 0 and there are no labels to be guided by.
    """
    scale = guidance.at(sigma)
    if scale == 0.0:
        return denoiser(x, sigma, labels)
    if labels is None:
        raise InputError(
            f"Expected guidance_scale=0 without labels, got {scale}: guidance needs a class-conditional model."
        )
    null = torch.full_like(labels, denoiser.network.num_classes)
    conditional, unconditional = denoiser(x, sigma, labels), denoiser(x, sigma, null)
    return (1 + scale) * conditional - scale * unconditional


@torch.no_grad()
def ddim(
    denoiser: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    *,
    labels: Tensor | None = None,
    guidance: Guidance = UNGUIDED,
    stochastic: bool = False,
    noise: Callable[[], Tensor] | None = None,
) -> Tensor:
    """Solves by Euler steps in sigma, which is DDIM, or by their stochastic form.

    DDIM: Song et al. 2021 (arXiv 2010.02502). The stochastic form is Euler-Maruyama,
    x + 2 h (x - D) / sigma + sqrt(2 |h| sigma) n, with h the (negative) step in sigma.

    Args:
        denoiser: called ``len(sigmas)`` times; the last call's output is the image.
        x: (B, C, H, W) at noise level sigmas[0].
        sigmas: (num_steps,) falling and positive.
        labels: (B,) int64 or None.
        guidance: see ``Guidance``.
        stochastic: whether to add fresh noise in every step.
        noise: gives standard normal noise like x at each call; needed if stochastic.

    Returns:
        (B, C, H, W) images.

    Raises:
        InputError: if the schedule is not falling and positive, or noise is missing.
    """
    levels = _levels(sigmas)
    for sigma, sigma_next in pairwise(levels):
        slope = (x - guided(denoiser, x, sigma, labels, guidance)) / sigma
        h = sigma_next - sigma
        if stochastic:
            x = x + 2 * h * slope + math.sqrt(2 * -h * sigma) * _draw(noise, "stochastic=True")
        else:
            x = x + h * slope
    return guided(denoiser, x, levels[-1], labels, guidance)


@torch.no_grad()
def edm(
    denoiser: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    *,
    labels: Tensor | None = None,
    guidance: Guidance = UNGUIDED,
    s_churn: float = 0.0,
    s_min: float = 0.0,
    s_max: float = math.inf,
    s_noise: float = 1.0,
    max_gamma: float = 1.0,
    noise: Callable[[], Tensor] | None = None,
) -> Tensor:
    """Solves by Heun's method with churn, Karras et al. 2022, algorithm 2.

    The last step goes to sigma = 0 by Euler, which makes the image the last denoiser output.

    Args:
        denoiser: called ``2 * len(sigmas) - 1`` times.
        x: (B, C, H, W) at noise level sigmas[0].
        sigmas: (num_steps,) falling and positive.
        labels: (B,) int64 or None.
        guidance: see ``Guidance``.
        s_churn: a step first raises sigma by the fraction s_churn / num_steps; 0 is deterministic.
        s_min: lowest sigma with churn.
        s_max: highest sigma with churn.
        s_noise: standard deviation of the noise that is added, relative to what the rise asks for.
        max_gamma: limit on that fraction. The EDM paper has sqrt(2) - 1; the published FIDs of DPDM used 1.
        noise: gives standard normal noise like x at each call; needed if there is churn.

    Returns:
        (B, C, H, W) images.

    Raises:
        InputError: if the schedule is not falling and positive, a churn setting is off, or noise is missing.
    """
    levels = _levels(sigmas)
    _check_churn(s_churn, s_min, s_max, s_noise)
    denoised = x
    for sigma, sigma_next in zip(levels, [*levels[1:], 0.0], strict=True):
        # Churn: a little more noise.
        gamma = min(s_churn / len(levels), max_gamma) if s_min <= sigma <= s_max else 0.0
        sigma_hat = sigma * (1 + gamma)
        if gamma > 0:
            x = x + math.sqrt(sigma_hat**2 - sigma**2) * s_noise * _draw(noise, "s_churn > 0")
        # Euler step.
        denoised = guided(denoiser, x, sigma_hat, labels, guidance)
        if sigma_next == 0.0:
            break
        h = sigma_next - sigma_hat
        slope = (x - denoised) / sigma_hat
        x_next = x + h * slope
        # Heun's correction.
        slope_next = (x_next - guided(denoiser, x_next, sigma_next, labels, guidance)) / sigma_next
        x = x + h * (slope + slope_next) / 2
    return denoised


@torch.no_grad()
def dpm_solver_pp(
    denoiser: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    *,
    labels: Tensor | None = None,
    guidance: Guidance = UNGUIDED,
) -> Tensor:
    """Solves by DPM-Solver++(2M): second order at one denoiser call per step.

    Lu et al. 2022 (arXiv 2211.01095), algorithm 2, with alpha = 1 and lambda = -ln(sigma): D is extrapolated
    linearly in lambda from the present and the previous call.

    Args:
        denoiser: called ``len(sigmas)`` times; the last call's output is the image.
        x: (B, C, H, W) at noise level sigmas[0].
        sigmas: (num_steps,) falling and positive.
        labels: (B,) int64 or None.
        guidance: see ``Guidance``.

    Returns:
        (B, C, H, W) images.

    Raises:
        InputError: if the schedule is not falling and positive.
    """
    levels = _levels(sigmas)
    previous: tuple[Tensor, float] | None = None  # denoised and step in lambda
    for sigma, sigma_next in pairwise(levels):
        denoised = guided(denoiser, x, sigma, labels, guidance)
        h = math.log(sigma / sigma_next)
        extrapolated = denoised
        if previous is not None:
            before, h_before = previous
            extrapolated = denoised + h / (2 * h_before) * (denoised - before)
        x = sigma_next / sigma * x - math.expm1(-h) * extrapolated
        previous = denoised, h
    return guided(denoiser, x, levels[-1], labels, guidance)


def sample(
    denoiser: Denoiser,
    config: SamplerConfig,
    *,
    seed: int,
    indices: Sequence[int],
    num_classes: int,
    resolution: int,
    num_channels: int,
    device: torch.device | str,
) -> tuple[Tensor, Tensor | None]:
    """Draws one batch of images: schedule, noise, labels and solver put together.

    Args:
        denoiser: on ``device``; put into evaluation mode meanwhile.
        config: of the sampler; its seed, num_images, batch_size and output are the caller's business.
        seed: together with an index it decides an image.
        indices: (n,) of the images to draw.
        num_classes: 0 for an unconditional model.
        resolution: side length in pixels.
        num_channels: 1 or 3.
        device: to compute on.

    Returns:
        Images (n, C, H, W) uint8 and labels (n,) int64 or None, both on the CPU.

    Raises:
        InputError: if ``config.labels`` is no class, weights are not one a class, or guidance is asked of an
            unconditional model.
        DivergedError: if an image is not finite.
    """
    labels = image_labels(config.labels, seed, indices, num_classes, config.class_weights)
    noise = PerImageNoise(seed, indices, (num_channels, resolution, resolution), device)
    sigmas = config.sigmas()
    was_training = denoiser.training
    denoiser.eval()
    bf16 = config.precision == "bf16"
    try:
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=bf16):
            x = _solve(denoiser, sigmas, config, None if labels is None else labels.to(device), noise)
    finally:
        denoiser.train(was_training)
    if not torch.isfinite(x).all():
        raise DivergedError("Expected finite images, got NaN or infinity: the weights are unusable; train again.")
    images = to_uint8(x).cpu()
    return (distorted(images, config.augmentation, seed, indices) if config.augmentation else images), labels


def distorted(images: Tensor, strength: float, seed: int, indices: Sequence[int]) -> Tensor:
    """Returns images (n, C, H, W) uint8 moved by ``augmentation.distort``, each as (seed, index) says.

    Shifts are small, as things stand in the middle of drawn images. All in float64, whose rounding is too fine to move
    a grey level: an image does not depend on its batch.
    """
    numbers = distortion_numbers(seed, indices)
    return to_uint8(distort(images.double() / 127.5 - 1, numbers, strength, shift=SHIFT_OF_DRAWN))


def to_uint8(images: Tensor) -> Tensor:
    """Maps pixels from [-1, 1] to 0 .. 255, to the nearest; what lies outside is cut off."""
    return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def _solve(
    denoiser: Denoiser, sigmas: Tensor, config: SamplerConfig, labels: Tensor | None, noise: PerImageNoise
) -> Tensor:
    x = noise() * sigmas[0].item()
    guidance = Guidance(config.guidance_scale, config.guidance_min, config.guidance_max)
    match config.type:
        case "ddim":
            stochastic = config.stochastic
            return ddim(denoiser, x, sigmas, labels=labels, guidance=guidance, stochastic=stochastic, noise=noise)
        case "edm":
            return edm(
                denoiser,
                x,
                sigmas,
                labels=labels,
                guidance=guidance,
                noise=noise,
                s_churn=config.s_churn,
                s_min=config.s_min,
                s_max=config.s_max,
                s_noise=config.s_noise,
            )
        case "dpm_solver_pp":
            return dpm_solver_pp(denoiser, x, sigmas, labels=labels, guidance=guidance)


def _draw(noise: Callable[[], Tensor] | None, what: str) -> Tensor:
    if noise is None:
        raise InputError(f"Expected noise with {what}, got None: pass a function such as PerImageNoise.")
    return noise()


def _levels(sigmas: Tensor) -> list[float]:
    """The schedule as Python floats, which are double whatever the images are."""
    levels: list[float] = sigmas.double().tolist()
    falling = all(first > second for first, second in pairwise(levels))
    if not levels or not falling or not 0.0 < levels[-1] <= levels[0] < math.inf:
        raise InputError(
            f"Expected sigmas to fall and to stay positive and finite, got {levels}: see karras_sigmas; "
            "the solvers end by themselves, without a final 0."
        )
    return levels


def _check_levels(sigma_min: float, sigma_max: float, rho: float) -> None:
    if not 0.0 < sigma_min < sigma_max <= LARGEST_SIGMA:
        raise InputError(
            f"Expected 0 < sampler.sigma_min < sampler.sigma_max <= {LARGEST_SIGMA:g}, got {sigma_min} and "
            f"{sigma_max}: the paper uses 0.002 and 80."
        )
    if not rho >= SMALLEST_RHO:
        raise InputError(f"Expected sampler.rho >= {SMALLEST_RHO}, got {rho}: the paper uses 7.")


def _check_churn(s_churn: float, s_min: float, s_max: float, s_noise: float) -> None:
    if not 0.0 <= s_churn < math.inf:
        raise InputError(f"Expected sampler.s_churn >= 0, got {s_churn}: 0 is deterministic.")
    if not 0.0 <= s_min <= s_max:
        raise InputError(f"Expected 0 <= sampler.s_min <= sampler.s_max, got {s_min} and {s_max}.")
    if not 0.0 <= s_noise < math.inf:
        raise InputError(f"Expected sampler.s_noise >= 0, got {s_noise}: 1 is the paper's.")
