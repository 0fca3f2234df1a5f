"""What of a network is trained, and adapters against the plain network that computes the same."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dpdm.diffusion.adapters import Adapted, freeze, merged, trained_parameters
from dpdm.diffusion.unet import NetworkConfig, UNet
from dpdm.errors import InputError

CONFIG = NetworkConfig(8, (1, 2), 1, (4,))


def make_network() -> UNet:
    network = UNet(CONFIG, resolution=8, num_channels=1, num_classes=3, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():  # a fresh one is about zero, so that little could be told from its output
        generator = torch.Generator().manual_seed(1)
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return network


def output(network: UNet) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    x, c_noise = torch.randn(4, 1, 8, 8, generator=generator), torch.randn(4, generator=generator)
    return network(x, c_noise, torch.tensor([0, 1, 2, 3]))


def freeze_all_but(network: UNet, trainable: tuple[str, ...], rank: int = 0) -> None:
    freeze(network, trainable, rank, torch.Generator().manual_seed(3))


def test_by_default_everything_is_trained() -> None:
    network = make_network()
    freeze_all_but(network, ("all",))
    assert set(trained_parameters(network)) == set(dict(network.named_parameters()))


def test_a_weight_is_trained_if_a_part_occurs_in_its_name() -> None:
    network = make_network()
    freeze_all_but(network, ("norm", "decoder.0."))
    trained = set(trained_parameters(network))
    names = {name for name, _ in network.named_parameters()}
    assert trained == {name for name in names if "norm" in name or "decoder.0." in name}
    assert "norm_out.bias" in trained
    assert "conv_in.weight" not in trained


@pytest.mark.parametrize(
    ("trainable", "rank", "message"),
    [(("norm", "convolution"), 0, "got 'convolution'"), ((), 0, "Expected something to train")],
)
def test_what_trains_nothing_is_refused(trainable: tuple[str, ...], rank: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        freeze_all_but(make_network(), trainable, rank)


def test_fresh_adapters_change_nothing_and_are_all_that_is_trained() -> None:
    network = make_network()
    before = output(network)
    freeze_all_but(network, (), rank=2)
    assert torch.allclose(output(network), before, atol=1e-5)  # kernels round otherwise where nothing is trained
    trained = trained_parameters(network)
    assert trained
    assert all(name.endswith((".up.weight", ".down.weight")) for name in trained)


def test_adapters_are_where_they_are_smaller_than_the_frozen_weight() -> None:
    network = make_network()
    freeze_all_but(network, ("decoder",), rank=2)
    adapted = {name for name, module in network.named_modules() if isinstance(module, Adapted)}
    plain = make_network()
    expected = set()
    for name, module in plain.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear) and "decoder" not in name:
            rows, columns = module.weight.flatten(1).shape
            expected |= {name} if 2 * (rows + columns) < rows * columns else set()
    assert adapted == expected
    assert {"embed_1", "encoder.0.residual.conv_1", "middle_1.attention.query"} <= adapted
    assert "conv_out" not in adapted  # 1 x 72


def test_the_merged_network_is_plain_and_computes_the_same() -> None:
    network = make_network()
    freeze_all_but(network, ("norm",), rank=2)
    before = output(network)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in trained_parameters(network).values():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    weights = merged(dict(network.named_parameters()))
    plain = make_network()
    assert {name: w.shape for name, w in weights.items()} == {n: p.shape for n, p in plain.named_parameters()}
    plain.load_state_dict(weights)
    assert not torch.allclose(output(network), before, atol=1e-2)
    assert torch.allclose(output(plain), output(network), atol=1e-4)


def test_merging_a_plain_network_leaves_it_as_it_is() -> None:
    weights = dict(make_network().named_parameters())
    again = merged(weights)
    assert all(again[name] is weight for name, weight in weights.items())
    assert set(again) == set(weights)


def test_an_adapted_convolution_against_its_matrix_product() -> None:
    """W + B A, written out for one convolution with stride."""
    generator = torch.Generator().manual_seed(5)
    base = nn.Conv2d(3, 5, 3, stride=2, padding=1)
    layer = Adapted(base, 2, generator)
    nn.init.normal_(layer.up.weight, generator=generator)
    x = torch.randn(2, 3, 8, 8, generator=generator)
    weight = base.weight + torch.einsum("or,rihw->oihw", layer.up.weight[:, :, 0, 0], layer.down.weight)
    assert torch.allclose(layer(x), F.conv2d(x, weight, base.bias, stride=2, padding=1), atol=1e-5)
