"""The rules for a GPU against those of ``layers`` in float64: on a GPU, or interpreted on a CPU where Triton is."""

from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dpdm.device import use_full_precision
from dpdm.diffusion.denoiser import Denoiser
from dpdm.diffusion.unet import NetworkConfig, ResidualBlock, UNet
from dpdm.functions import double, group_norm_silu, halve
from dpdm.privacy import gpu_layers
from dpdm.privacy.dpsgd import TAU, clip_and_sum
from dpdm.privacy.layers import per_example
from dpdm.recorded import RecordedDenoiser

kernels = pytest.importorskip("dpdm.privacy.kernels", exc_type=ImportError)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> str:
    use_full_precision()
    if not torch.cuda.is_available():
        monkeypatch.setattr(gpu_layers, "INTERPRETED", True)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)  # its own sums change from call to call else
    name = "cuda" if torch.cuda.is_available() else "cpu"
    assert gpu_layers.fits(torch.zeros(1, device=name))  # else the other rules would be tested
    return name


class Net(nn.Module):
    """Each layer that has a rule of its own for a GPU, in several sizes, and one that has none (stride 2)."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 8, 3, padding=1)
        self.norm_1 = nn.GroupNorm(2, 8)
        self.wide = nn.Conv2d(8, 36, 3, padding=1, bias=False)
        self.norm_2 = nn.GroupNorm(9, 36)
        self.narrow = nn.Conv2d(36, 20, 1)
        self.halve = nn.Conv2d(20, 4, 3, stride=2, padding=1)
        self.last = nn.Conv2d(4, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        h = group_norm_silu(h, 2, self.norm_1.weight, self.norm_1.bias, self.norm_1.eps)
        h = self.norm_2(self.wide(h))
        return self.last(self.halve(self.narrow(h)))


def gradients(network: nn.Module, x: Tensor) -> list[Tensor]:
    """Returns each example's gradients of (K, B, C, H, W) images."""
    with per_example(dict(network.named_parameters()), x.shape[1]) as collector:
        losses = network(x.flatten(0, 1)).unflatten(0, x.shape[:2]).square().mean(dim=(2, 3, 4)).mean(0)
    return collector.of(losses.sum())


def network_and_images(draws: int, num_examples: int, side: int) -> tuple[Net, Tensor]:
    torch.manual_seed(0)
    network = Net()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return network, torch.randn(draws, num_examples, 1, side, side) + 0.3


@pytest.mark.parametrize(("draws", "num_examples", "side"), [(1, 3, 6), (3, 2, 10), (2, 1, 4)])
def test_float32_against_the_other_rules_in_float64(device: str, draws: int, num_examples: int, side: int) -> None:
    network, x = network_and_images(draws, num_examples, side)
    expected = gradients(network.double(), x.double())  # float64 has no rules of its own
    found = gradients(network.float().to(device), x.to(device))
    for (name, _), one, other in zip(network.named_parameters(), found, expected, strict=True):
        assert one.dtype == torch.float32
        assert one.shape == other.shape
        assert (one.cpu().double() - other).norm() < 1e-5 * other.norm(), name


class Block(nn.Module):
    """A residual block of the network, between layers that give it channels and an embedding."""

    def __init__(self, inputs: int, outputs: int, resample: Literal["up", "down"] | None) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, inputs, 3, padding=1)
        self.embed = nn.Linear(1, 16)
        self.block = ResidualBlock(inputs, outputs, NetworkConfig(width=4), resample)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.first(x), self.embed(x.mean((2, 3))))


@pytest.mark.parametrize(("inputs", "outputs", "resample"), [(8, 8, None), (8, 12, "up"), (8, 8, "down")])
def test_residual_blocks(
    device: str, inputs: int, outputs: int, resample: Literal["up", "down"] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    network, x = Block(inputs, outputs, resample), torch.randn(2, 3, 1, 4, 4)
    expected = gradients(network.double(), x.double())
    seen: list[str] = []
    for name in ("ConvNormSilu", "ConvResidual", "GroupNormBeside"):
        rule = getattr(gpu_layers, name)
        monkeypatch.setattr(rule, "apply", lambda *a, name=name, real=rule.apply: (seen.append(name), real(*a))[1])
    found = gradients(network.float().to(device), x.to(device))
    assert sorted(seen) == ["ConvNormSilu", "ConvResidual", "GroupNormBeside"]
    tolerance = 1e-5 if device == "cpu" else 1e-4  # cuDNN's convolutions
    for (name, _), one, other in zip(network.named_parameters(), found, expected, strict=True):
        assert (one.cpu().double() - other).norm() < tolerance * other.norm(), name
    x[:, 1] += 10.0
    for old, new in zip(found, gradients(network, x.to(device)), strict=True):
        assert torch.equal(old[[0, 2]], new[[0, 2]])


def test_frozen_layers_cost_nothing(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    network, x = Block(8, 8, None), torch.randn(2, 3, 1, 4, 4).to(device)
    everything = gradients(network.to(device), x)
    names = [name for name, _ in network.named_parameters()]
    monkeypatch.setattr(kernels, "conv_weight_gradients", lambda *_: pytest.fail("a frozen weight was differentiated"))
    for name, parameter in network.named_parameters():
        parameter.requires_grad_("norm" in name)
    trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
    with per_example(trained, 3) as collector:
        losses = network(x.flatten(0, 1)).unflatten(0, x.shape[:2]).square().mean(dim=(2, 3, 4)).mean(0)
    for name, found in zip(trained, collector.of(losses.sum()), strict=True):
        assert torch.allclose(found, everything[names.index(name)], rtol=1e-4, atol=1e-5), name


def test_a_parameter_that_is_used_twice_has_both_gradients(device: str) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.both = nn.Parameter(torch.tensor([0.5, -1.0, 2.0, 0.1]))

        def forward(self, x: Tensor) -> Tensor:
            return F.group_norm(x.expand(-1, 4, -1, -1), 2, self.both, self.both)

    network, x = Tied(), torch.randn(1, 2, 1, 3, 3)
    expected = gradients(network.double(), x.double())[0]
    found = gradients(network.float().to(device), x.to(device))[0]
    assert torch.allclose(found.cpu().double(), expected, rtol=1e-4, atol=1e-6)


def test_groups_of_unequal_size_are_refused(device: str) -> None:
    ones = torch.ones(8, device=device)
    with pytest.raises(ValueError, match="Expected the channels to be divisible into 3 groups, got 8"):
        kernels.group_norm(torch.zeros(1, 4, 8, device=device), 3, ones, ones, 1e-6, silu=False)


@pytest.mark.parametrize(("operation", "rule"), [(halve, gpu_layers.Halve), (double, gpu_layers.Double)])
def test_resampling_of_images_that_are_no_squares(device: str, operation: Any, rule: Any) -> None:
    x = torch.randn(3, 5, 6, 4, dtype=torch.float64).requires_grad_()
    wanted = operation(x)
    grad = torch.randn_like(wanted)
    (expected,) = torch.autograd.grad(wanted, x, grad)
    shown = x.detach().float().to(device).requires_grad_()
    found = rule.apply(shown)
    (back,) = torch.autograd.grad(found, shown, grad.float().to(device))
    assert torch.allclose(found.cpu().double(), wanted, rtol=1e-6, atol=1e-6)
    assert torch.allclose(back.cpu().double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize(("pixels", "channels", "groups"), [(5, 12, 4), (40, 192, 32), (9, 70, 7), (1, 6, 6)])
def test_group_norm_against_float64(device: str, pixels: int, channels: int, groups: int, silu: bool) -> None:
    """With groups of sizes that are no powers of two, more than a program holds, a shift, and another gradient."""
    torch.manual_seed(0)
    x, grad, beside = (torch.randn(3, pixels, channels, dtype=torch.float64) for _ in range(3))
    shift = 3 * torch.randn(3, channels, dtype=torch.float64)
    weight, bias = (torch.randn(channels, dtype=torch.float64) for _ in range(2))
    # As one parameter for each image: these gradients are wanted by image.
    inputs = [t.requires_grad_() for t in (x, weight.expand(3, -1).clone(), bias.expand(3, -1).clone(), shift)]
    normed = F.group_norm((x + shift[:, None]).transpose(1, 2), groups, eps=1e-2)
    normed = normed.transpose(1, 2) * inputs[1][:, None] + inputs[2][:, None]
    wanted = F.silu(normed) if silu else normed
    expected = list(torch.autograd.grad((wanted * grad).sum() + (x * beside).sum(), inputs))
    x, grad, beside, shift, weight, bias = (
        t.detach().float().to(device) for t in (x, grad, beside, shift, weight, bias)
    )
    out, mean, rstd = kernels.group_norm(x, groups, weight, bias, 1e-2, silu=silu, shift=shift)
    found = kernels.group_norm_backward(grad, x, mean, rstd, weight, bias, silu=silu, shift=shift, beside=beside)
    for one, other in zip([out, *found], [wanted, *expected], strict=True):
        assert one is not None
        assert (one.cpu().double() - other).norm() < 1e-5 * other.norm() + 1e-5


def test_a_whole_network_denoises_alike(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    for name in ("group_norm", "residual", "halve", "double"):
        real = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, lambda *a, name=name, real=real, **k: (seen.append(name), real(*a, **k))[1])
    config = NetworkConfig(width=4, channel_multipliers=(1, 2), num_res_blocks=1, attention_resolutions=(4,))
    network = UNet(config, resolution=8, num_channels=1, num_classes=3)
    torch.manual_seed(0)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.2)
    denoiser = Denoiser(network).to(device).eval()
    x, sigma, labels = (t.to(device) for t in (torch.randn(2, 1, 8, 8), torch.rand(2) + 0.1, torch.tensor([1, 3])))
    with torch.no_grad():
        expected = denoiser(x, sigma, labels)
    assert not seen
    found = RecordedDenoiser(denoiser).denoise(x, sigma, labels)
    assert RecordedDenoiser(denoiser)(x[:0], 1.0, labels[:0]).shape == (0, 1, 8, 8)
    assert not found.requires_grad
    assert set(seen) == {"group_norm", "residual", "halve", "double"}
    assert (found - expected).norm() < 1e-5 * expected.norm()


def test_the_rules_are_used(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    for name in ("conv_weight_gradients", "group_norm", "group_norm_backward"):
        real = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, lambda *a, name=name, real=real, **k: (seen.append(name), real(*a, **k))[1])
    network, x = network_and_images(1, 2, 4)
    gradients(network.to(device), x.to(device))
    assert {name: seen.count(name) for name in seen} == {
        "conv_weight_gradients": 4, "group_norm": 2, "group_norm_backward": 2
    }  # fmt: skip
    assert not gpu_layers.fits(x.double())


def test_one_example_does_not_move_another(device: str) -> None:
    network, x = network_and_images(2, 3, 6)
    before = gradients(network.to(device), x.to(device))
    x[:, 1] += 10.0
    after = gradients(network, x.to(device))
    for old, new in zip(before, after, strict=True):
        assert torch.equal(old[[0, 2]], new[[0, 2]])
    assert any(not torch.equal(old[1], new[1]) for old, new in zip(before, after, strict=True))


@pytest.mark.parametrize("kernel", [1, 3])
def test_many_draws_are_shared_out_among_programs(device: str, monkeypatch: pytest.MonkeyPatch, kernel: int) -> None:
    """Several programs then each sum a part of an example's pixels."""
    monkeypatch.setattr(kernels, "POSITIONS", 128)
    draws, num_examples, side = 9, 2, 8
    x = torch.randn(draws * num_examples, side * side, 16, device=device)
    grad = torch.randn(draws * num_examples, side * side, 24, device=device)
    found = kernels.conv_weight_gradients(x, grad, (side, side), num_examples, kernel)
    images, wanted = (t.double().cpu().transpose(1, 2).unflatten(2, (side, side)) for t in (x, grad))
    for b in range(num_examples):
        weight = torch.zeros(24, 16, kernel, kernel, dtype=torch.float64, requires_grad=True)
        out = F.conv2d(images[b::num_examples], weight, padding=kernel // 2)
        (expected,) = torch.autograd.grad(out, weight, wanted[b::num_examples])
        assert (found[b].cpu().double() - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 5000), (40, 1030), (17, 9000)])
def test_clipping_against_float64(device: str, rows: int, columns: int) -> None:
    torch.manual_seed(0)
    grads = [torch.randn(rows, columns), torch.randn(rows, 2, 3)]
    grads[0][0] *= 1e-3  # the first example is not clipped
    expected = [torch.zeros(g.shape[1:], dtype=torch.float64) for g in grads]
    doubles = [g.double() for g in grads]
    norms = torch.cat([g.flatten(1) for g in doubles], 1).norm(dim=1)
    for total, g in zip(expected, doubles, strict=True):
        total += torch.einsum("b,b...->...", (7.0 / (1 + TAU) / norms).clamp(max=1.0), g)
    sums = [torch.zeros_like(total, device=device) for total in expected]
    found = clip_and_sum([g.to(device) for g in grads], 7.0, sums)
    assert torch.allclose(found.cpu(), norms, rtol=1e-14)
    for total, other in zip(sums, expected, strict=True):
        assert torch.allclose(total.cpu(), other, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("odd", [float("nan"), float("inf")])
def test_an_example_that_is_not_finite_adds_nothing(device: str, odd: float) -> None:
    grads = [torch.ones(3, 5000), torch.ones(3, 4)]
    grads[0][1, 17] = odd
    sums = [torch.zeros(g.shape[1], dtype=torch.float64, device=device) for g in grads]
    norms = clip_and_sum([g.to(device) for g in grads], 1e6, sums)
    assert not norms[1].isfinite()
    assert all(bool((total == 2).all()) for total in sums)


@pytest.mark.parametrize(("channels", "height", "width"), [(1, 3, 5), (3, 4, 7), (3, 1, 1)])
def test_shapes_that_our_networks_do_not_have(device: str, channels: int, height: int, width: int) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(channels, 6, 3, padding=1), nn.GroupNorm(3, 6), nn.Conv2d(6, channels, 1))
    x = torch.randn(2, 2, channels, height, width)
    expected = gradients(network.double(), x.double())
    for one, other in zip(gradients(network.float().to(device), x.to(device)), expected, strict=True):
        assert (one.cpu().double() - other).norm() < 1e-5 * other.norm() + 1e-9


@pytest.mark.parametrize(("mean", "deviation"), [(0.0, 1.0), (100.0, 1.0), (-1000.0, 1.0), (30.0, 0.01)])
def test_group_norm_far_from_zero(device: str, mean: float, deviation: float) -> None:
    torch.manual_seed(0)
    x = mean + deviation * torch.randn(2, 64, 8)
    ones, zeros = torch.ones(8, device=device), torch.zeros(8, device=device)
    found, *_ = kernels.group_norm(x.to(device), 2, ones, zeros, 1e-6, silu=False)
    expected = F.group_norm(x.double().transpose(1, 2), 2, eps=1e-6).transpose(1, 2)
    assert (found.cpu().double() - expected).norm() < 1e-3 * expected.norm()


def test_an_examples_weight_gradient_does_not_depend_on_how_many_there_are(device: str) -> None:
    torch.manual_seed(0)
    x, grad = torch.randn(3, 5, 36, 16, device=device), torch.randn(3, 5, 36, 16, device=device)
    few, many = (
        kernels.conv_weight_gradients(x[:, :n].flatten(0, 1), grad[:, :n].flatten(0, 1), (6, 6), n, 3) for n in (2, 5)
    )
    assert torch.equal(few, many[:2])


def test_where_triton_does_not_work_the_other_rules_are_used(
    device: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(rows: Tensor) -> Tensor:
        raise RuntimeError("no C compiler")

    network, x = network_and_images(1, 2, 4)
    expected = gradients(network.to(device), x.to(device))
    monkeypatch.setattr(kernels, "squared_norms", fails)
    gpu_layers._triton_works.cache_clear()
    found = gradients(network, x.to(device))
    gpu_layers._triton_works.cache_clear()
    assert "no C compiler" in capsys.readouterr().err
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.gpu
def test_without_triton_more_groups_than_a_grid_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    norm = nn.GroupNorm(32, 32).cuda()
    x = torch.randn(1, 2100, 32, 2, 2, device="cuda")  # 67,200 groups
    expected = gradients(norm, x)
    monkeypatch.setattr(gpu_layers, "fits", lambda x: False)
    for one, other in zip(gradients(norm, x), expected, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.gpu
def test_bf16_is_near_float32() -> None:
    network, x = network_and_images(4, 8, 12)
    network, x = network.cuda(), x.cuda()
    expected = gradients(network, x)
    with torch.autocast("cuda", torch.bfloat16):
        found = gradients(network, x)
    for one, other in zip(found, expected, strict=True):
        assert (one.float() - other).norm() < 0.03 * other.norm()
