"""What of a network is trained: all of it, some weights, or low-rank adapters beside frozen ones.

With DP-SGD every trained parameter gets noise: fewer of them, less noise.
"""

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from dpdm.errors import InputError

ALL = "all"
MAX_RANK = 2**10
BASE = ".base."


class Adapted(nn.Module):
    """A frozen layer with a low-rank path beside it: base(x) + up(down(x)), as if its weight were W + B A.

    Hu et al. 2021 (arXiv 2106.09685), without their factor. Of a convolution, A is one with ``rank`` channels out and
    the same kernel, B one of kernel 1 (no bias): both are layers for which DP-SGD has a rule.
    """

    def __init__(self, base: nn.Conv2d | nn.Linear, rank: int, generator: torch.Generator) -> None:
        """Adds adapters that change nothing yet: B is 0. A is as a fresh layer's weights, from ``generator``."""
        super().__init__()
        self.base = base
        if isinstance(base, nn.Conv2d):
            kernel, stride, padding = (
                cast(tuple[int, int], size) for size in (base.kernel_size, base.stride, base.padding)
            )
            self.down = nn.Conv2d(base.in_channels, rank, kernel, stride, padding, bias=False)
            self.up = nn.Conv2d(rank, base.out_channels, 1, bias=False)
        else:
            self.down = nn.Linear(base.in_features, rank, bias=False)
            self.up = nn.Linear(rank, base.out_features, bias=False)
        nn.init.xavier_uniform_(self.down.weight, generator=generator)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def freeze(network: nn.Module, trainable: tuple[str, ...], rank: int, generator: torch.Generator) -> None:
    """Freezes, in place, what is not to be trained: ``requires_grad`` then tells which parameters are.

    Args:
        network: plain.
        trainable: parts of names; a parameter is trained if one of them occurs in its name. (ALL,): everything.
        rank: if above 0, each frozen weight of a convolution or linear layer gets adapters, where these are smaller
            than itself.
        generator: CPU generator of the adapters' initial weights.

    Raises:
        InputError: if a part occurs in no name, or nothing is left to train.
    """
    if trainable == (ALL,):
        return
    names = [name for name, _ in network.named_parameters()]
    for part in trainable:
        if not any(part in name for name in names):
            raise InputError(
                f"Expected every part in model.trainable to occur in a weight's name, got {part!r}: the names are "
                f"such as {', '.join(names[:3])} and {names[-1]}."
            )
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(any(part in name for part in trainable))
    if rank:
        _adapt(network, rank, generator)
    if not any(parameter.requires_grad for parameter in network.parameters()):
        raise InputError(
            "Expected something to train, got model.trainable=[] and no adapters: name some weights, or give "
            "model.lora_rank."
        )


def _adapt(network: nn.Module, rank: int, generator: torch.Generator) -> None:
    for name, layer in list(network.named_modules()):
        if not isinstance(layer, nn.Conv2d | nn.Linear) or layer.weight.requires_grad:
            continue
        rows, columns = layer.weight.flatten(1).shape
        if rank * (rows + columns) < rows * columns:
            parent, _, last = name.rpartition(".")
            setattr(network.get_submodule(parent), last, Adapted(layer, rank, generator))


def trained_parameters(network: nn.Module) -> dict[str, nn.Parameter]:
    """Returns the parameters that are trained, by name, in the network's order."""
    return {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}


def merged(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the weights of the plain network that computes the same, W + B A for each adapted layer.

    Args:
        weights: of a network that may have adapters, by name.
    """
    plain: dict[str, Tensor] = {}
    for name, weight in weights.items():
        layer, base, last = name.rpartition(BASE)
        if name.endswith((".down.weight", ".up.weight")):
            continue
        if base and last == "weight":
            up, down = weights[f"{layer}.up.weight"].flatten(1), weights[f"{layer}.down.weight"].flatten(1)
            weight = weight + (up @ down).view_as(weight)
        plain[f"{layer}.{last}" if base else name] = weight
    return plain
