"""How far an image's gradient moves when others leave its batch: rounding inside the network's kernels, and no more."""

import pytest
import torch

from dpdm import config
from dpdm.device import use_full_precision
from dpdm.diffusion.loss import diffusion_loss
from dpdm.privacy.dpsgd import per_example_gradients

CASES = [
    pytest.param(8, 2, "cpu", torch.float32, 1e-5),
    pytest.param(28, 1, "cpu", torch.float32, 1e-5),
    pytest.param(28, 2, "cuda", torch.float32, 1e-5, marks=pytest.mark.gpu),
    pytest.param(28, 2, "cuda", torch.bfloat16, 0.05, marks=pytest.mark.gpu),
]


@pytest.mark.parametrize(("resolution", "draws", "device", "kind", "most"), CASES)
def test_removing_images_moves_the_others_by_rounding_alone(
    resolution: int, draws: int, device: str, kind: torch.dtype, most: float
) -> None:
    use_full_precision()
    shape = [f"data.resolution={resolution}", "data.num_channels=1", "data.num_classes=10", "model.network.width=16"]
    denoiser = config.build_denoiser(config.load([], shape)).to(device)
    parameters = dict(denoiser.network.named_parameters())
    generator = torch.Generator().manual_seed(0)
    images = (torch.rand(6, 1, resolution, resolution, generator=generator) * 2 - 1).to(device)
    labels = torch.arange(6, device=device)
    sigma = torch.exp(torch.randn(draws, 6, generator=generator)).to(device)
    noise = torch.randn(draws, *images.shape, generator=generator).to(device)

    def gradients(records: torch.Tensor) -> torch.Tensor:
        def loss(rows) -> torch.Tensor:
            with torch.autocast(device, torch.bfloat16, enabled=kind == torch.bfloat16):
                return diffusion_loss(
                    denoiser, images[rows], labels[rows], sigma=sigma[:, rows], noise=noise[:, rows].contiguous()
                )

        _, grads = per_example_gradients(parameters, loss, records.numpy())
        return torch.cat([grad.flatten(1).double().cpu() for grad in grads], dim=1)

    together = gradients(torch.arange(6))
    for kept in ([0], [1, 4], [0, 2, 5], [0, 1, 2, 3, 4]):
        alone = gradients(torch.tensor(kept))
        change = (alone - together[kept]).norm(dim=1) / together[kept].norm(dim=1)
        print(f"{device}, {kind}, {len(kept)} of 6: at most {float(change.max()):.1e}")
        assert float(change.max()) < most
