"""Networks of the downstream classifiers: sizes by hand or published, and a block written out a second time."""

import math
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dpdm.evaluation.classifier_networks import (
    Dropout,
    WideBlock,
    convolutional,
    logistic_regression,
    perceptron,
    wide_resnet,
)

SMALL_WRN = partial(wide_resnet, depth=10, widen_factor=1)


def generators(seed: int = 0) -> tuple[torch.Generator, torch.Generator]:
    return torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed + 1)


def num_parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def test_parameter_counts_by_hand() -> None:
    grey, colour = (1, 28, 28), (3, 32, 32)
    assert num_parameters(logistic_regression(grey, 10, *generators())) == 784 * 10 + 10
    assert num_parameters(perceptron(grey, 10, *generators())) == (784 * 100 + 100) + (100 * 10 + 10)
    convolutions = (9 * 1 * 32 + 32) + (9 * 32 * 64 + 64) + (9 * 64 * 128 + 128)
    linear = (128 * 7 * 7 * 128 + 128) + (128 * 10 + 10)
    assert num_parameters(convolutional(grey, 10, *generators())) == convolutions + linear
    wrn = partial(wide_resnet, depth=40, widen_factor=4)
    assert num_parameters(wrn(colour, 10, *generators())) == 8_949_210
    assert num_parameters(wrn(grey, 7, *generators())) == 8_949_210 - 2 * 9 * 16 - 3 * 257


@pytest.mark.parametrize(
    ("depth", "widen_factor", "millions"), [(40, 1, 0.6), (40, 2, 2.2), (16, 8, 11.0), (28, 10, 36.5)]
)
def test_wide_resnets_have_the_published_sizes(depth: int, widen_factor: int, millions: float) -> None:
    """Zagoruyko and Komodakis 2016, tables 3 and 4."""
    network = wide_resnet((3, 32, 32), 10, *generators(), depth=depth, widen_factor=widen_factor)
    assert round(num_parameters(network) / 1e6, 1) == millions


@pytest.mark.parametrize("network", [logistic_regression, perceptron, convolutional, SMALL_WRN])
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 2, 5), (1, 8, 8), (3, 33, 30)])
def test_every_size_gives_one_score_per_class_and_learns(network: Any, shape: tuple[int, int, int]) -> None:
    built = network(shape, 4, *generators()).train()
    scores = built(torch.randn(6, *shape, generator=torch.Generator().manual_seed(0)))
    assert scores.shape == (6, 4)
    F.cross_entropy(scores, torch.arange(6) % 4).backward()
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in built.parameters())


def test_convolutional_layers_come_in_the_papers_order() -> None:
    kinds = [type(layer).__name__ for layer in convolutional((1, 28, 28), 10, *generators()).children()]
    assert " ".join(kinds) == (
        "Conv2d MaxPool2d ReLU Dropout Conv2d MaxPool2d ReLU Dropout Conv2d ReLU Flatten Linear ReLU Dropout Linear"
    )


def test_wide_resnet_halves_the_size_twice_and_has_its_depth() -> None:
    network = wide_resnet((1, 28, 28), 10, *generators(), depth=16, widen_factor=1).eval()
    sides: list[int] = []
    for module in network.modules():
        if isinstance(module, WideBlock):
            module.register_forward_hook(lambda _module, _inputs, output: sides.append(output.shape[-1]))
    network(torch.zeros(1, 1, 28, 28))
    assert sides == [28, 28, 14, 14, 7, 7]
    threes = [m for m in network.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    assert len(threes) == 16 - 4 + 1  # the name counts the three shortcuts, but not the last layer


@pytest.mark.parametrize(("width", "stride"), [(4, 1), (6, 2)])
def test_wide_block_against_its_formula(width: int, stride: int) -> None:
    block = WideBlock(4, width, stride, 0.3, torch.Generator()).double().eval()
    for tensor in [*block.parameters(), *(b for b in block.buffers() if b.is_floating_point())]:
        tensor.data.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(tensor.numel()))
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def normal(values: torch.Tensor, norm: nn.BatchNorm2d) -> torch.Tensor:
        assert norm.running_mean is not None
        assert norm.running_var is not None
        mean, variance, scale, shift = (
            v[:, None, None] for v in (norm.running_mean, norm.running_var, norm.weight, norm.bias)
        )
        return ((values - mean) / (variance + 1e-5).sqrt() * scale + shift).clamp(min=0)

    ready = normal(x, block.norm_in)
    hidden = normal(F.conv2d(ready, block.conv_in.weight, stride=stride, padding=1), block.norm_out)
    kept = x if block.shortcut is None else F.conv2d(ready, block.shortcut.weight, stride=stride)
    expected = kept + F.conv2d(hidden, block.conv_out.weight, padding=1)
    assert (block.shortcut is None) == (width == 4)
    torch.testing.assert_close(block(x), expected)


def test_dropout_zeroes_its_share_and_keeps_the_mean() -> None:
    dropout, ones = Dropout(0.3, torch.Generator().manual_seed(0)), torch.ones(100_000)
    state = torch.random.get_rng_state()
    first, second = dropout(ones), dropout(ones)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert float((first == 0).float().mean()) == pytest.approx(0.3, abs=0.01)
    assert torch.allclose(first[first > 0], torch.tensor(1 / 0.7))
    assert not torch.equal(first, second)
    assert torch.equal(dropout.eval()(ones), ones)


def test_first_weights_have_their_spread_and_come_from_the_generator() -> None:
    linear = logistic_regression((1, 28, 28), 10, *generators())[1]  # pyright: ignore[reportIndexIssue]
    assert float(linear.weight.detach().abs().max()) == pytest.approx(1 / 28, rel=0.01)
    assert float(linear.weight.detach().std()) == pytest.approx(1 / (28 * math.sqrt(3)), rel=0.05)
    wide = wide_resnet((3, 32, 32), 10, *generators(), depth=10, widen_factor=4)
    block = next(m for m in wide.modules() if isinstance(m, WideBlock))
    assert float(block.conv_out.weight.detach().std()) == pytest.approx(math.sqrt(2 / (9 * 64)), rel=0.05)
    for network in (convolutional, SMALL_WRN):
        one, same, other = (
            nn.utils.parameters_to_vector(network((1, 8, 8), 3, *generators(seed)).parameters()) for seed in (0, 0, 1)
        )
        assert torch.equal(one, same)
        assert not torch.equal(one, other)
