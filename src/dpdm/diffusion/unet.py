"""The DDPM++ network of Song et al. 2021 (arXiv 2011.13456) as the DPDM paper uses it.

Two rules hold throughout, because the DP-SGD engine computes the gradient of every image separately:

* a parameter is used only by ``F.conv2d``, ``F.linear``, ``F.group_norm``, ``F.embedding`` or what ``dpdm.functions``
  makes of them, as it is (no view, transpose or arithmetic), on an input whose first axis is the image (``Projection``
  knows when to keep it);
* nothing mixes two images: no batch statistics, no operation along the first axis.

The order of floating-point operations is the original's, too: its vectors come out bit by bit on a CPU with
AVX-512. A reordering moves the network's output by 1e-6, and images of the vectors by up to 7 %.

The order in which modules are created is the order of ``parameters()``, which original checkpoints rely on.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import has_torch_function

from dpdm.errors import InputError
from dpdm.functions import (
    conv2d_norm_silu,
    conv2d_residual,
    double,
    group_norm_silu,
    group_norm_silu_beside,
    halve,
)

Resample = Literal["up", "down"]

MAX_POSITIONS = 10_000
# Of what a config may ask for; far beyond any network that fits a machine, but laid out in no time.
MAX_WIDTH, MAX_MULTIPLIER, MAX_LEVELS, MAX_RES_BLOCKS = 2**13, 2**10, 13, 32
GROUP_NORM_EPS = 1e-6
# Variance-scaling gains. "About zero" makes a fresh residual block nearly the identity and a fresh network
# nearly zero; it is not exactly zero so that gradients reach every layer at the first step.
GAIN_ABOUT_ZERO = 1e-5
GAIN_ATTENTION = math.sqrt(0.1)  # query, key and value, as in the published DDPM++ (scale 0.1)


@dataclass(frozen=True)
class NetworkConfig:
    """Size of the network; resolution, channels and classes come from the data.

    Attributes:
        width: channels at full resolution.
        channel_multipliers: channels at each resolution over ``width``; every further entry halves the side.
        num_res_blocks: residual blocks per resolution on the way down; one more on the way up.
        attention_resolutions: side lengths, in pixels, at which attention follows the residual blocks.
        dropout: probability inside residual blocks, while training.
    """

    width: int = 32
    channel_multipliers: tuple[int, ...] = (1, 2, 2)
    num_res_blocks: int = 2
    attention_resolutions: tuple[int, ...] = ()
    dropout: float = 0.0

    def __post_init__(self) -> None:
        # OmegaConf hands over lists.
        object.__setattr__(self, "channel_multipliers", tuple(self.channel_multipliers))
        object.__setattr__(self, "attention_resolutions", tuple(self.attention_resolutions))
        if not 4 <= self.width <= MAX_WIDTH or self.width % 4:
            raise InputError(
                f"Expected model.network.width to be a positive multiple of 4, at most {MAX_WIDTH}, got {self.width}: "
                "32 is the paper's."
            )
        multipliers = self.channel_multipliers
        if not 1 <= len(multipliers) <= MAX_LEVELS or not 1 <= min(multipliers) <= max(multipliers) <= MAX_MULTIPLIER:
            raise InputError(
                "Expected model.network.channel_multipliers to be one or more integers >= 1, at most "
                f"{MAX_LEVELS} and <= {MAX_MULTIPLIER}, got {list(multipliers)[: MAX_LEVELS + 1]}: [1, 2, 2] is the "
                "paper's."
            )
        if not 1 <= self.num_res_blocks <= MAX_RES_BLOCKS:
            raise InputError(
                f"Expected model.network.num_res_blocks >= 1 and <= {MAX_RES_BLOCKS}, got {self.num_res_blocks}: 2 is "
                "the paper's."
            )
        if not 0.0 <= self.dropout < 1.0:
            raise InputError(f"Expected 0 <= model.network.dropout < 1, got {self.dropout}: 0 turns it off.")


class UNet(nn.Module):
    """The raw network F(x; c_noise, label), to be preconditioned by ``Denoiser``."""

    def __init__(
        self,
        config: NetworkConfig,
        *,
        resolution: int,
        num_channels: int,
        num_classes: int,
        generator: torch.Generator | None = None,
    ) -> None:
        """Builds and initialises the network.

        Args:
            config: sizes.
            resolution: side length of the square images, a multiple of 2 ** (number of halvings).
            num_channels: of the images, 1 or 3.
            num_classes: 0 for an unconditional network; else labels are 0 .. num_classes - 1, and
                ``num_classes`` is the null label, which stands for "not told".
            generator: CPU generator of the initial weights; None takes torch's global one.

        Raises:
            InputError: if resolution and config do not fit each other.
        """
        super().__init__()
        resolutions = _resolutions(config, resolution)
        if num_channels < 1 or num_classes < 0:
            raise InputError(
                f"Expected num_channels >= 1 and num_classes >= 0, got {num_channels} and {num_classes}: "
                "0 classes mean an unconditional network."
            )
        self.config, self.resolution = config, resolution
        self.num_channels, self.num_classes = num_channels, num_classes
        width = config.width

        if num_classes:
            self.label_embedding = nn.Embedding(num_classes + 1, width)
        self.embed_1 = nn.Linear(width, 4 * width)
        self.embed_2 = nn.Linear(4 * width, 4 * width)
        self.conv_in = nn.Conv2d(num_channels, width, 3, padding=1)
        encoder, skips = _encoder(config, resolutions)
        self.encoder = nn.ModuleList(encoder)
        self.middle_1 = Stage(skips[-1], skips[-1], config, attention=True)
        self.middle_2 = Stage(skips[-1], skips[-1], config)
        decoder = _decoder(config, resolutions, skips)
        self.decoder = nn.ModuleList(decoder)
        self._takes_skip = [stage.residual.resample is None for stage in decoder]
        channels = config.channel_multipliers[0] * width
        self.norm_out = _group_norm(channels)
        self.conv_out = nn.Conv2d(channels, num_channels, 3, padding=1)
        self._initialise(generator)

    def forward(self, x: Tensor, c_noise: Tensor, labels: Tensor | None = None) -> Tensor:
        """Returns F(x; c_noise, labels).

        Args:
            x: (N, C, H, W) images, already scaled by c_in.
            c_noise: (N,) noise level in the units of the preconditioning.
            labels: (N,) int64 in 0 .. num_classes, the last being the null label; None is null for all.

        Returns:
            (N, C, H, W).

        Raises:
            InputError: if labels are given to an unconditional network, or x has another shape of image.
        """
        if x.shape[1:] != (self.num_channels, self.resolution, self.resolution):
            raise InputError(
                f"Expected images of shape {(self.num_channels, self.resolution, self.resolution)}, "
                f"got {tuple(x.shape[1:])}: prepare them at the network's size."
            )
        embedding = self._embed(c_noise.to(x.dtype), labels)
        x = self.conv_in(x)
        skips = [x]
        for stage in self.encoder:
            x = stage(x, embedding)
            skips.append(x)
        x = self.middle_2(self.middle_1(x, embedding), embedding)
        for stage, takes_skip in zip(self.decoder, self._takes_skip, strict=True):
            if takes_skip:
                x = torch.cat([x, skips.pop()], dim=1)
            x = stage(x, embedding)
        return self.conv_out(_activated(self.norm_out, x))

    def _embed(self, c_noise: Tensor, labels: Tensor | None) -> Tensor:
        embedding = sinusoids(c_noise, self.config.width)
        if self.num_classes:
            if labels is None:
                labels = torch.full(c_noise.shape, self.num_classes, dtype=torch.int64, device=c_noise.device)
            embedding = embedding + self.label_embedding(labels)
        elif labels is not None:
            raise InputError("Expected labels=None, got labels: this network is unconditional (num_classes=0).")
        # The activation of the second layer is shared by all residual blocks, so it is applied here.
        return F.silu(self.embed_2(F.silu(self.embed_1(embedding))))

    def _initialise(self, generator: torch.Generator | None) -> None:
        """Variance scaling (fan average, uniform), zero biases; label embeddings are standard normal."""
        gains: dict[nn.Module, float] = {self.conv_out: GAIN_ABOUT_ZERO}
        for module in self.modules():
            if isinstance(module, ResidualBlock):
                gains[module.conv_2] = GAIN_ABOUT_ZERO
            elif isinstance(module, Attention):
                gains |= dict.fromkeys((module.query, module.key, module.value), GAIN_ATTENTION)
                gains[module.out] = GAIN_ABOUT_ZERO
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                # Xavier's uniform distribution is variance scaling by the average fan.
                nn.init.xavier_uniform_(module.weight, gains.get(module, 1.0), generator)
                assert module.bias is not None
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, generator=generator)


class Stage(nn.Module):
    """A residual block and, where the config asks for it, attention."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        config: NetworkConfig,
        *,
        attention: bool = False,
        resample: Resample | None = None,
    ) -> None:
        super().__init__()
        self.residual = ResidualBlock(inputs, outputs, config, resample)
        self.attention = Attention(outputs) if attention else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        return self.attention(self.residual(x, embedding))


class ResidualBlock(nn.Module):
    """BigGAN's residual block: resampling, if any, comes before the first convolution, on both paths."""

    def __init__(self, inputs: int, outputs: int, config: NetworkConfig, resample: Resample | None) -> None:
        super().__init__()
        self.resample = resample
        self.norm_1 = _group_norm(inputs)
        self.conv_1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.embed = nn.Linear(4 * config.width, outputs)
        self.norm_2 = _group_norm(outputs)
        self.dropout = nn.Dropout(config.dropout)
        self.conv_2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        # A resampling block has the projection even where the number of channels stays.
        project = inputs != outputs or resample is not None
        self.shortcut = Projection(inputs, outputs, 1) if project else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Args: x (N, inputs, H, W); embedding (N, E), activated. Returns (N, outputs, H', W')."""
        first, second, norm = self.conv_1, self.conv_2, self.norm_2
        # As one operation each for whoever gives them a rule; a layer with an adapter is none of torch's.
        whole = has_torch_function((x,)) and type(first) is type(second) is nn.Conv2d
        h, x = _activated_beside(self.norm_1, x)
        if self.resample == "down":
            h, x = halve(h), halve(x)
        elif self.resample == "up":
            h, x = double(h), double(x)
        shift = self.embed(embedding)
        if not whole:
            h = _activated(norm, first(h) + shift[:, :, None, None])
            return (self.shortcut(x) + second(self.dropout(h))) / math.sqrt(2.0)
        assert first.bias is not None
        assert second.bias is not None
        h = conv2d_norm_silu(h, first.weight, first.bias, shift, norm.num_groups, norm.weight, norm.bias, norm.eps)
        return conv2d_residual(self.dropout(h), second.weight, second.bias, self.shortcut(x))


class Projection(nn.Conv2d):
    """A 1x1 convolution as a product of matrices: oneDNN rounds its own by the number of threads, and takes longer."""

    def forward(self, input: Tensor) -> Tensor:  # torch's own name
        """Args: input (N, inputs, H, W). Returns (N, outputs, H, W)."""
        if has_torch_function((input,)):  # whoever gives layers other rules knows convolutions
            return super().forward(input)
        assert self.bias is not None
        return (self.weight.flatten(1) @ input.flatten(2)).add_(self.bias[:, None]).unflatten(2, input.shape[2:])


class Attention(nn.Module):
    """Single-head attention over the pixels of one image, scaled by 1/sqrt(channels)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = _group_norm(channels)
        self.query = nn.Linear(channels, channels)
        self.key = nn.Linear(channels, channels)
        self.value = nn.Linear(channels, channels)
        self.out = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Args: x (N, C, H, W). Returns the same shape."""
        pixels = self.norm(x).flatten(2).transpose(1, 2)
        query, key, value = (layer(pixels) for layer in (self.query, self.key, self.value))
        # Not F.scaled_dot_product_attention, whose rounding differs between backends; there are few pixels here.
        scores = query @ key.transpose(1, 2) * x.shape[1] ** -0.5
        attended = scores.softmax(dim=-1) @ value
        return (x + self.out(attended).transpose(1, 2).reshape(x.shape)) / math.sqrt(2.0)


def sinusoids(c_noise: Tensor, channels: int) -> Tensor:
    """Returns sines, then cosines, of c_noise at frequencies from 1 down to 1/10,000.

    Args:
        c_noise: (N,).
        channels: even, at least 4.

    Returns:
        (N, channels).
    """
    half = channels // 2
    steps = torch.arange(half, dtype=c_noise.dtype, device=c_noise.device)
    angles = c_noise[:, None] * torch.exp(-math.log(MAX_POSITIONS) / (half - 1) * steps)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def _activated(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    """Returns silu(norm(x)), of x's shape; as one operation for whoever gives it a rule."""
    if has_torch_function((x,)):
        return group_norm_silu(x, norm.num_groups, norm.weight, norm.bias, norm.eps)
    return F.silu(norm(x))


def _activated_beside(norm: nn.GroupNorm, x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the same, and x for another way."""
    if has_torch_function((x,)):
        return group_norm_silu_beside(x, norm.num_groups, norm.weight, norm.bias, norm.eps)
    return _activated(norm, x), x


def _resolutions(config: NetworkConfig, resolution: int) -> list[int]:
    halvings = len(config.channel_multipliers) - 1
    if resolution < 1 or resolution % 2**halvings:
        raise InputError(
            f"Expected resolution to be a multiple of {2**halvings}, got {resolution}: "
            f"model.network.channel_multipliers={list(config.channel_multipliers)} halves it {halvings} times; "
            "prepare the images at another resolution or give fewer multipliers."
        )
    resolutions = [resolution // 2**level for level in range(halvings + 1)]
    unused = sorted(set(config.attention_resolutions) - set(resolutions))
    if unused:
        raise InputError(
            f"Expected model.network.attention_resolutions to be among {resolutions}, got {unused}: "
            f"the network of {resolution} pixels has no other resolution."
        )
    return resolutions


def _encoder(config: NetworkConfig, resolutions: list[int]) -> tuple[list[Stage], list[int]]:
    """The stages on the way down, and the channels of all that is kept for the way up."""
    stages: list[Stage] = []
    skips = [config.width]
    for side, multiplier in zip(resolutions, config.channel_multipliers, strict=True):
        if stages:
            stages.append(Stage(skips[-1], skips[-1], config, resample="down"))
            skips.append(skips[-1])
        for _ in range(config.num_res_blocks):
            outputs = multiplier * config.width
            attention = side in config.attention_resolutions
            stages.append(Stage(skips[-1], outputs, config, attention=attention))
            skips.append(outputs)
    return stages, skips


def _decoder(config: NetworkConfig, resolutions: list[int], skips: list[int]) -> list[Stage]:
    """The stages on the way up; all but those that double the resolution also read what the encoder kept."""
    stages: list[Stage] = []
    channels, remaining = skips[-1], list(skips)
    for side, multiplier in reversed(list(zip(resolutions, config.channel_multipliers, strict=True))):
        if stages:
            stages.append(Stage(channels, channels, config, resample="up"))
        for block in range(config.num_res_blocks + 1):
            attention = block == config.num_res_blocks and side in config.attention_resolutions
            outputs = multiplier * config.width
            stages.append(Stage(channels + remaining.pop(), outputs, config, attention=attention))
            channels = outputs
    return stages


def _group_norm(channels: int) -> nn.GroupNorm:
    groups = min(channels // 4, 32)
    if channels % groups:
        raise InputError(
            f"Expected the channels of every layer to be divisible into {groups} groups, got {channels}: "
            "make model.network.width a multiple of 32, or smaller."
        )
    return nn.GroupNorm(groups, channels, eps=GROUP_NORM_EPS)
