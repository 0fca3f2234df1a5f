"""The recorded denoiser against the one it was made of, on a GPU; ``test_gpu_layers`` has its kernels on a CPU."""

import pytest
import torch

from dpdm.diffusion.denoiser import Denoiser
from dpdm.diffusion.unet import NetworkConfig, UNet
from dpdm.recorded import RecordedDenoiser, recorded


def make() -> Denoiser:
    """Returns a denoiser all of whose layers have something to say."""
    config = NetworkConfig(width=8, channel_multipliers=(1, 2), num_res_blocks=1, attention_resolutions=(4,))
    network = UNet(config, resolution=8, num_channels=1, num_classes=3, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return Denoiser(network).eval()


def asked(images: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(images)
    return torch.randn(images, 1, 8, 8), torch.rand(images) + 0.1, torch.randint(4, (images,))


def test_on_a_cpu_nothing_is_recorded() -> None:
    denoiser = make()
    assert recorded(denoiser) is denoiser


def test_without_a_recording_it_denoises_all_the_same(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr("dpdm.recorded._Recording", fails)
    denoiser = make()
    fast = RecordedDenoiser(denoiser)
    assert not fast.training
    x, sigma, labels = asked(3)
    with torch.no_grad():
        expected = denoiser(x, sigma, labels)
    assert torch.equal(fast(x, sigma, labels), expected)
    assert torch.equal(fast(x, sigma, labels), expected)
    assert capsys.readouterr().err == (
        "dpdm: No CUDA graph here, so that drawing takes longer: operation not permitted when stream is capturing\n"
    )


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(None, 1e-4), (torch.bfloat16, 0.03)])
@torch.no_grad()
def test_a_recording_is_true_for_other_images_levels_labels_and_weights(
    dtype: torch.dtype | None, tolerance: float
) -> None:
    denoiser = make().cuda()
    fast = recorded(denoiser)
    assert isinstance(fast, RecordedDenoiser)
    for change, images in enumerate((5, 5, 3, 3)):
        x, sigma, labels = (t.cuda() for t in asked(images))
        with torch.autocast("cuda", dtype, enabled=dtype is not None):
            first, second = fast(x, sigma, labels), fast(2 * x, 0.5, labels.flip(0))
            expected = denoiser(x, sigma, labels), denoiser(2 * x, 0.5, labels.flip(0))
        for one, other in zip((first, second), expected, strict=True):
            assert (one - other).norm() < tolerance * other.norm(), change
        for parameter in denoiser.parameters():
            parameter.mul_(1.1)
