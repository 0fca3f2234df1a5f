"""Networks of the downstream classifiers: from pixels in [-1, 1] of any size to one score per class.

LogReg, MLP and CNN are those of Dockhorn et al. 2022 (arXiv 2210.09929); the wide residual network is that of
Zagoruyko and Komodakis 2016 (arXiv 1605.07146). The builders take two generators: ``weights``, on the CPU, for the
first weights, and ``masks``, on the device of the training, for dropout. Torch draws weights of its own when a layer is
made, which are overwritten: a caller that cares for the global random state wraps them in ``torch.random.fork_rng``.
"""

import math

import torch
from torch import Tensor, nn

Shape = tuple[int, int, int]  # channels, height, width of one image


class Dropout(nn.Module):
    """Zeroes each number with probability ``rate`` while training and scales the rest by 1 / (1 - rate).

    Unlike torch's own it draws from a given generator and leaves the global random state alone.
    """

    def __init__(self, rate: float, masks: torch.Generator) -> None:
        super().__init__()
        self.rate, self.masks = rate, masks

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        kept = torch.empty_like(x).bernoulli_(1 - self.rate, generator=self.masks)
        return x * kept / (1 - self.rate)


class WideBlock(nn.Module):
    """Two 3x3 convolutions, each after batch norm and ReLU, added to the input; dropout between them.

    Where the width changes, a 1x1 convolution of the normalised input takes the place of the input.
    """

    def __init__(
        self, in_channels: int, out_channels: int, stride: int, dropout: float, masks: torch.Generator
    ) -> None:
        super().__init__()
        self.norm_in = nn.BatchNorm2d(in_channels)
        self.conv_in = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.norm_out = nn.BatchNorm2d(out_channels)
        self.dropout = Dropout(dropout, masks)
        self.conv_out = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        same = in_channels == out_channels
        self.shortcut = None if same else nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        ready = self.norm_in(x).relu()
        hidden = self.norm_out(self.conv_in(ready)).relu()
        kept = x if self.shortcut is None else self.shortcut(ready)
        return kept + self.conv_out(self.dropout(hidden))


def logistic_regression(shape: Shape, num_classes: int, weights: torch.Generator, _masks: torch.Generator) -> nn.Module:
    """Returns a linear map of the pixels."""
    return _uniform(nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), num_classes)), weights)


def perceptron(shape: Shape, num_classes: int, weights: torch.Generator, _masks: torch.Generator) -> nn.Module:
    """Returns a linear map to 100 numbers, ReLU, and a linear map to the classes."""
    layers = [nn.Flatten(), nn.Linear(math.prod(shape), 100), nn.ReLU(), nn.Linear(100, num_classes)]
    return _uniform(nn.Sequential(*layers), weights)


def convolutional(shape: Shape, num_classes: int, weights: torch.Generator, masks: torch.Generator) -> nn.Module:
    """Returns three 3x3 convolutions (32, 64, 128 channels) and two linear layers, with dropout 0.5.

    Ours are: convolutions keep the size, pooling halves it and rounds up (so that images down to 1x1 live; the original
    has no padding, with the same accuracy, see docs/results.md), and dropout zeroes single numbers, not channels.

    Args:
        shape: of one image.
        num_classes: how many scores.
        weights, masks: see above.
    """
    channels, height, width = shape
    small_height, small_width = math.ceil(height / 4), math.ceil(width / 4)
    layers = [
        nn.Conv2d(channels, 32, 3, padding=1),
        nn.MaxPool2d(2, ceil_mode=True),
        nn.ReLU(),
        Dropout(0.5, masks),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.MaxPool2d(2, ceil_mode=True),
        nn.ReLU(),
        Dropout(0.5, masks),
        nn.Conv2d(64, 128, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(128 * small_height * small_width, 128),
        nn.ReLU(),
        Dropout(0.5, masks),
        nn.Linear(128, num_classes),
    ]
    return _uniform(nn.Sequential(*layers), weights)


def wide_resnet(
    shape: Shape,
    num_classes: int,
    weights: torch.Generator,
    masks: torch.Generator,
    *,
    depth: int,
    widen_factor: int,
    dropout: float = 0.3,
) -> nn.Module:
    """Returns the wide residual network WRN-depth-widen_factor.

    A 3x3 convolution to 16 channels; three groups of (depth - 4) / 6 blocks with 16, 32 and 64 times ``widen_factor``
    channels, the second and third of which halve the size; batch norm, ReLU, mean over positions, linear.

    Args:
        shape: of one image.
        num_classes: how many scores.
        weights, masks: see above.
        depth: 6 n + 4 with n >= 1 blocks in each group.
        widen_factor: k >= 1.
        dropout: inside the blocks.
    """
    num_blocks = (depth - 4) // 6
    layers: list[nn.Module] = [nn.Conv2d(shape[0], 16, 3, padding=1, bias=False)]
    before = 16
    for width, stride in ((16 * widen_factor, 1), (32 * widen_factor, 2), (64 * widen_factor, 2)):
        for block in range(num_blocks):
            layers.append(WideBlock(before, width, stride if block == 0 else 1, dropout, masks))
            before = width
    layers += [nn.BatchNorm2d(before), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, num_classes)]
    return _he_normal(nn.Sequential(*layers), weights)


def _uniform(network: nn.Module, weights: torch.Generator) -> nn.Module:
    """Draws weights and biases from U(-1/sqrt(fan_in), 1/sqrt(fan_in)), torch's own way."""
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            bound = layer.weight[0].numel() ** -0.5
            for parameter in layer.parameters():
                with torch.no_grad():
                    parameter.uniform_(-bound, bound, generator=weights)
    return network


def _he_normal(network: nn.Module, weights: torch.Generator) -> nn.Module:
    """Draws convolutions from N(0, 2 / fan_out) (He et al. 2015), the last linear layer uniformly, with bias 0."""
    for layer in network.modules():
        with torch.no_grad():
            if isinstance(layer, nn.Conv2d):
                layer.weight.normal_(0, math.sqrt(2 / layer.weight[:, 0].numel()), generator=weights)
            elif isinstance(layer, nn.Linear):
                _uniform(layer, weights)
                layer.bias.zero_()
    return network
