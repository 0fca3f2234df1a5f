"""How far an image's gradient moves when others leave its batch: rounding inside the network's kernels, and no more."""

import pytest
import torch

from dpdm import config
from dpdm.diffusion.loss import diffusion_loss
from dpdm.privacy.dpsgd import per_example_gradients


@pytest.mark.parametrize(("resolution", "draws"), [(8, 2), (28, 1)])
def test_removing_images_moves_the_others_by_rounding_alone(resolution: int, draws: int) -> None:
    shape = [f"data.resolution={resolution}", "data.num_channels=1", "data.num_classes=10", "model.network.width=16"]
    denoiser = config.build_denoiser(config.load([], shape))
    parameters = dict(denoiser.network.named_parameters())
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(6, 1, resolution, resolution, generator=generator) * 2 - 1
    labels = torch.arange(6)
    sigma = torch.exp(torch.randn(draws, 6, generator=generator))
    noise = torch.randn(draws, *images.shape, generator=generator)

    def gradients(records: torch.Tensor) -> torch.Tensor:
        def loss(rows) -> torch.Tensor:
            return diffusion_loss(
                denoiser, images[rows], labels[rows], sigma=sigma[:, rows], noise=noise[:, rows].contiguous()
            )

        _, grads = per_example_gradients(parameters, loss, records.numpy())
        return torch.cat([grad.flatten(1) for grad in grads], dim=1).double()

    together = gradients(torch.arange(6))
    for kept in ([0], [1, 4], [0, 2, 5], [0, 1, 2, 3, 4]):
        alone = gradients(torch.tensor(kept))
        change = (alone - together[kept]).norm(dim=1) / together[kept].norm(dim=1)
        assert float(change.max()) < 1e-5
