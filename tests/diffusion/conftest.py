import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from dpdm.diffusion.denoiser import Denoiser
from dpdm.diffusion.unet import NetworkConfig, UNet

VECTORS = Path(__file__).parent.parent / "fixtures" / "vectors"
REFERENCE_NAMES = ("mnist_28", "celeba_32", "celeba_64", "cifar10_32", "imagenet_32")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@dataclass(frozen=True)
class Reference:
    """The original's inputs and outputs for one config, and our network with the same weights."""

    name: str
    description: dict
    arrays: dict[str, Tensor]
    network: UNet


def formula_weight(index: int, name: str, shape: list[int], phase: float) -> Tensor:
    """Parameter ``index`` of the reference network, in our layout.

    The original keeps the attention's 1x1 projections as (in, out); ours are linear layers, (out, in).
    """
    flat = np.arange(np.prod(shape), dtype=np.float64)
    wave = np.sin(0.7 * flat + 1.3 * index + phase)
    if len(shape) > 1:
        values = wave * np.sqrt(3 / (flat.size // shape[0]))
    else:
        values = 1 + 0.3 * wave if name.endswith(".weight") else 0.1 * wave
    values = values.reshape(shape).astype(np.float32)
    return torch.from_numpy(np.ascontiguousarray(values.T if name.endswith(".W") else values))


@pytest.fixture(scope="session", params=REFERENCE_NAMES)
def reference(request: pytest.FixtureRequest) -> Reference:
    description = json.loads((VECTORS / "vectors.json").read_text())[request.param]
    settings = description["network"]
    network = UNet(
        NetworkConfig(
            channel_multipliers=tuple(settings.get("ch_mult", (1, 2, 2))),
            attention_resolutions=tuple(settings["attn_resolutions"]),
        ),
        resolution=settings["image_size"],
        num_channels=settings.get("num_in_channels", 1),
        num_classes=settings.get("label_dim", 10),
    )
    with torch.no_grad():
        for index, (parameter, (name, shape)) in enumerate(
            zip(network.parameters(), description["parameters"], strict=True)
        ):
            weight = formula_weight(index, name, shape, description["phase"])
            assert parameter.shape == weight.shape, name
            parameter.copy_(weight)
    with np.load(VECTORS / f"{request.param}.npz") as archive:
        arrays = {name: torch.from_numpy(archive[name]) for name in archive.files}
    return Reference(request.param, description, arrays, network.eval())


@pytest.fixture
def small_denoiser() -> Denoiser:
    """A conditional network with every kind of layer; unlike a fresh one's, its output is not about zero."""
    generator = torch.Generator().manual_seed(1)
    config = NetworkConfig(width=8, channel_multipliers=(1, 2), num_res_blocks=1, attention_resolutions=(4,))
    network = UNet(config, resolution=8, num_channels=1, num_classes=3, generator=generator)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return Denoiser(network)
