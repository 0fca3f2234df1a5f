"""Per-example gradients against a one-by-one loop in float64, layer by layer and in a network."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dpdm.privacy.layers import per_example


class Net(nn.Module):
    """Every layer with a rule, some used twice, with attention between."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 6)
        self.dense = nn.Linear(6, 8)
        self.conv = nn.Conv2d(2, 8, 3, padding=1)
        self.norm = nn.GroupNorm(4, 8, eps=1e-6)
        self.tokens = nn.Linear(8, 8, bias=False)
        self.down = nn.Conv2d(8, 4, 3, stride=2, padding=1, bias=False)
        self.out = nn.Conv2d(4, 1, 1)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        h = self.conv(x) + self.dense(F.silu(self.embedding(labels)))[:, :, None, None]
        h = F.silu(self.norm(h))
        t = h.flatten(2).transpose(1, 2)
        t = F.scaled_dot_product_attention(self.tokens(t), t, self.tokens(t))
        h = self.norm(h + t.transpose(1, 2).unflatten(2, x.shape[2:]))
        return self.out(self.down(h))


def network_and_data(num_examples: int, draws: int) -> tuple[Net, Tensor, Tensor]:
    torch.manual_seed(0)
    network = Net().double()
    x = torch.randn(draws, num_examples, 2, 6, 6, dtype=torch.float64)
    labels = torch.randint(5, (draws, num_examples))
    return network, x, labels


def losses(network: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    out = network(x.flatten(0, 1), labels.flatten()).unflatten(0, x.shape[:2])
    return out.square().mean(dim=(2, 3, 4)).mean(0)


@pytest.mark.parametrize(("num_examples", "draws"), [(1, 1), (5, 1), (1, 4), (3, 4)])
def test_whole_network_against_a_loop(num_examples: int, draws: int) -> None:
    network, x, labels = network_and_data(num_examples, draws)
    parameters = dict(network.named_parameters())
    with per_example(parameters, num_examples) as collector:
        loss = losses(network, x, labels)
    grads = collector.of(loss.sum())
    for b in range(num_examples):
        alone = losses(network, x[:, b : b + 1], labels[:, b : b + 1])
        assert torch.allclose(loss[b], alone[0])
        for (name, _), grad, expected in zip(
            parameters.items(), grads, torch.autograd.grad(alone[0], list(parameters.values())), strict=True
        ):
            assert torch.allclose(grad[b], expected, rtol=1e-9, atol=1e-12), name


def test_one_example_does_not_move_another() -> None:
    network, x, labels = network_and_data(3, 2)
    parameters = dict(network.named_parameters())

    def grads(images: Tensor) -> list[Tensor]:
        with per_example(parameters, 3) as collector:
            loss = losses(network, images, labels)
        return collector.of(loss.sum())

    before = grads(x)
    x[:, 1] += 10.0
    after = grads(x)
    for old, new in zip(before, after, strict=True):
        assert torch.equal(old[[0, 2]], new[[0, 2]])
    assert any(not torch.equal(old[1], new[1]) for old, new in zip(before, after, strict=True))


@pytest.mark.parametrize(
    ("layer", "shape", "message"),
    [
        (nn.BatchNorm2d(2), (2, 2, 4, 4), "batch_norm"),
        (nn.BatchNorm2d(2, affine=False), (2, 2, 4, 4), "batch_norm"),
        (nn.InstanceNorm2d(2, affine=True), (2, 2, 4, 4), "instance_norm"),
        (nn.LayerNorm(4), (2, 2, 4, 4), "layer_norm.*weight"),
        (nn.ConvTranspose2d(2, 2, 3), (2, 2, 4, 4), "conv_transpose2d.*weight"),
        (nn.Conv2d(2, 2, 3, groups=2), (2, 2, 4, 4), "groups=1"),
        (nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"), (2, 2, 4, 4), None),
        (nn.PReLU(), (2, 2), "prelu.*weight"),
    ],
)
def test_layers_without_a_rule_are_refused_by_name(
    layer: nn.Module, shape: tuple[int, ...], message: str | None
) -> None:
    with per_example(dict(layer.named_parameters()), 2):
        if message is None:
            layer(torch.randn(shape))
            return
        with pytest.raises(ValueError, match=message):
            layer(torch.randn(shape))


@pytest.mark.parametrize(
    "use",
    [
        lambda p: p * 2,
        lambda p: p.t(),
        lambda p: torch.stack([p, p]),
        lambda p: torch.cat(tensors=[p, p]),
        lambda p: F.linear(torch.zeros(2, 3), p * 1.0),
        lambda p: p.sum(),
        lambda p: torch.einsum("ij,bj->bi", p, torch.zeros(2, 3)),
        lambda p: torch.zeros(2, 3) @ p.T,
    ],
)
def test_any_other_use_of_a_parameter_is_refused(use) -> None:
    parameter = nn.Parameter(torch.randn(3, 3))
    with per_example({"my.weight": parameter}, 2), pytest.raises(ValueError, match=r"my\.weight"):
        use(parameter)


def test_a_batch_that_is_no_multiple_of_the_examples_is_refused() -> None:
    layer = nn.Linear(3, 3)
    with per_example(dict(layer.named_parameters()), 2) as collector:
        loss = layer(torch.randn(5, 3)).sum()
    with pytest.raises(ValueError, match="multiple of 2"):
        collector.of(loss)
