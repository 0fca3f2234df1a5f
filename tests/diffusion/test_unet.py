from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dpdm.diffusion.denoiser import Denoiser
from dpdm.diffusion.unet import NetworkConfig, UNet, sinusoids
from dpdm.errors import InputError

from .conftest import Reference


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


def test_parameters_are_the_originals_in_number(reference: Reference) -> None:
    # Their order and shapes are checked where the fixture fills them.
    count = sum(parameter.numel() for parameter in reference.network.parameters())
    assert count == reference.description["n_parameters"]


@torch.no_grad()
def test_network_equals_the_original(reference: Reference) -> None:
    arrays = reference.arrays
    output = reference.network(arrays["x"], arrays["c_noise"], arrays.get("y"))
    assert relative_error(output, arrays["network"]) < 2e-5  # 0 on the CPU that made the vectors


@torch.no_grad()
def test_rounding_does_not_depend_on_the_number_of_threads(reference: Reference) -> None:
    inputs = (reference.arrays["x"], reference.arrays["c_noise"], reference.arrays.get("y"))
    if not torch.equal(reference.network(*inputs), reference.arrays["network"]):
        pytest.skip("this CPU rounds differently from the one that made the vectors")
    torch.set_num_threads(2)
    assert torch.equal(reference.network(*inputs), reference.arrays["network"])


@torch.no_grad()
def test_labels_matter_and_none_means_the_null_label(small_denoiser: Denoiser) -> None:
    network = small_denoiser.network
    x, c_noise = torch.randn(2, 1, 8, 8), torch.zeros(2)
    null = network(x, c_noise, torch.tensor([3, 3]))
    assert torch.equal(network(x, c_noise), null)
    assert relative_error(network(x, c_noise, torch.tensor([0, 1])), null) > 1e-3


class _ParameterUses(TorchFunctionMode):
    """Records (function, parameter, length of the input's first axis) of every call with a parameter."""

    def __init__(self, network: nn.Module) -> None:
        self.names = {id(parameter): name for name, parameter in network.named_parameters()}
        self.uses: list[tuple[str, str, int]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        values = [*args, *(kwargs or {}).values()]
        images = next((v for v in values if isinstance(v, Tensor) and id(v) not in self.names), None)
        for value in values:
            if id(value) in self.names:
                self.uses.append((func.__name__, self.names[id(value)], -1 if images is None else len(images)))
        return func(*args, **(kwargs or {}))


def test_parameters_are_used_once_and_only_where_the_gradient_engine_has_a_rule(
    small_denoiser: Denoiser,
) -> None:
    network = small_denoiser.network
    with _ParameterUses(network) as recorder:
        network(torch.randn(5, 1, 8, 8), torch.zeros(5), torch.zeros(5, dtype=torch.int64))
    assert {function for function, _, _ in recorder.uses} == {
        "conv2d", "linear", "embedding", "group_norm", "group_norm_silu", "group_norm_silu_beside", "conv2d_norm_silu",
        "conv2d_residual",
    }  # fmt: skip
    assert sorted(name for _, name, _ in recorder.uses) == sorted(recorder.names.values())
    assert {images for _, _, images in recorder.uses} == {5}


def couples_images(network: UNet) -> bool:
    """Whether another first image changes the output of the other images."""
    x = torch.randn(4, 1, 8, 8)
    c_noise, labels = torch.linspace(-1, 1, 4), torch.tensor([0, 1, 2, 3])
    changed = x.clone()
    changed[0] = 100 * torch.randn(1, 8, 8)
    with torch.no_grad():
        return not torch.equal(network(x, c_noise, labels)[1:], network(changed, c_noise, labels)[1:])


def test_no_operation_couples_images(small_denoiser: Denoiser) -> None:
    assert not couples_images(small_denoiser.network)


def test_coupling_would_be_noticed(small_denoiser: Denoiser) -> None:
    network = small_denoiser.network
    network.middle_1.register_module("attention", nn.BatchNorm2d(16))  # the mutation
    assert couples_images(network)


@pytest.mark.parametrize(
    ("resolution", "multipliers"), [(8, (1, 2)), (28, (1, 2, 2)), (32, (1, 2, 2)), (64, (1, 1, 2, 2))]
)
@torch.no_grad()
def test_resolutions(resolution: int, multipliers: tuple[int, ...]) -> None:
    config = NetworkConfig(width=8, channel_multipliers=multipliers, num_res_blocks=1)
    network = UNet(config, resolution=resolution, num_channels=3, num_classes=0)
    x = torch.randn(2, 3, resolution, resolution)
    assert network(x, torch.zeros(2)).shape == x.shape
    assert network(x[:0], torch.zeros(0)).shape == (0, 3, resolution, resolution)


@torch.no_grad()
def test_initialisation_follows_the_generator_and_starts_near_zero() -> None:
    def fresh(seed: int) -> UNet:
        generator = torch.Generator().manual_seed(seed)
        return UNet(NetworkConfig(), resolution=8, num_channels=1, num_classes=2, generator=generator)

    first, same, other = fresh(0), fresh(0), fresh(1)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), same.parameters(), strict=True))
    assert not torch.equal(first.conv_in.weight, other.conv_in.weight)
    assert first(torch.randn(2, 1, 8, 8), torch.zeros(2)).abs().max() < 1e-3
    # Variance scaling: variance 1 / fan_average, here of a 3x3 convolution from 64 to 64 channels.
    weight = first.get_parameter("middle_1.residual.conv_1.weight")
    assert weight.var().item() == pytest.approx(1 / (9 * 64), rel=0.03)
    query = first.get_parameter("middle_1.attention.query.weight")
    assert query.var().item() == pytest.approx(0.1 / 64, rel=0.05)
    # A fresh residual block adds next to nothing to its input, and so does attention.
    for name in ("middle_1.residual.conv_2.weight", "middle_1.attention.out.weight", "conv_out.weight"):
        assert 0 < first.get_parameter(name).abs().max().item() < 1e-5


def test_dropout_is_off_in_evaluation_mode() -> None:
    config = NetworkConfig(width=8, channel_multipliers=(1, 1), dropout=0.5)
    network = UNet(config, resolution=8, num_channels=1, num_classes=0)
    nn.init.normal_(network.conv_out.weight)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=0.1)
    x = torch.randn(1, 1, 8, 8)
    assert not torch.equal(network(x, torch.zeros(1)), network(x, torch.zeros(1)))
    network.eval()
    assert torch.equal(network(x, torch.zeros(1)), network(x, torch.zeros(1)))


def test_sinusoids_are_sines_then_cosines() -> None:
    # With four channels there are two frequencies, the highest, 1, and the lowest, 1/10,000.
    c_noise = torch.tensor([0.7], dtype=torch.float64)
    expected = torch.stack([c_noise.sin(), (c_noise / 1e4).sin(), c_noise.cos(), (c_noise / 1e4).cos()], dim=1)
    torch.testing.assert_close(sinusoids(c_noise, 4), expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"width": 6}, "network.width"),
        ({"width": 0}, "network.width"),
        ({"channel_multipliers": ()}, "network.channel_multipliers"),
        ({"channel_multipliers": (1, 0)}, "network.channel_multipliers"),
        ({"num_res_blocks": 0}, "network.num_res_blocks"),
        ({"dropout": 1.0}, "network.dropout"),
        ({"attention_resolutions": (16,)}, "network.attention_resolutions"),
        ({"channel_multipliers": (1, 1, 1, 1)}, "multiple of 8"),
        ({"width": 132}, "network.width"),  # 132 channels do not divide into 32 groups
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        UNet(NetworkConfig(**settings), resolution=28, num_channels=1, num_classes=0)


def test_bad_inputs_are_refused(small_denoiser: Denoiser) -> None:
    with pytest.raises(InputError, match="shape"):
        small_denoiser.network(torch.zeros(1, 3, 8, 8), torch.zeros(1))
    unconditional = UNet(NetworkConfig(), resolution=8, num_channels=1, num_classes=0)
    with pytest.raises(InputError, match="unconditional"):
        unconditional(torch.zeros(1, 1, 8, 8), torch.zeros(1), torch.zeros(1, dtype=torch.int64))
    with pytest.raises(InputError, match="num_channels"):
        UNet(NetworkConfig(), resolution=8, num_channels=0, num_classes=0)


def test_lists_become_tuples() -> None:
    config = NetworkConfig(channel_multipliers=[1, 2], attention_resolutions=[8])  # pyright: ignore[reportArgumentType]
    assert config == NetworkConfig(channel_multipliers=(1, 2), attention_resolutions=(8,))


@pytest.mark.gpu
@torch.no_grad()
def test_gpu_agrees_with_cpu(small_denoiser: Denoiser) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    x, sigma, labels = torch.randn(3, 1, 8, 8), torch.tensor([0.1, 1.0, 10.0]), torch.tensor([0, 1, 3])
    expected = small_denoiser(x, sigma, labels)
    actual = small_denoiser.cuda()(x.cuda(), sigma.cuda(), labels.cuda())
    assert relative_error(actual.cpu(), expected) < 5e-3  # TF32 convolutions
