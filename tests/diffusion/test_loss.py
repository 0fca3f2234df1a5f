import math
from typing import Any, TypedDict

import pytest
import torch
from scipy import stats
from torch import Tensor

from dpdm.diffusion.denoiser import Denoiser, DenoiserKind
from dpdm.diffusion.loss import LossConfig, diffusion_loss, noise_level
from dpdm.errors import InputError

QUANTILES = torch.tensor([[1e-4, 0.05, 0.3], [0.5, 0.9, 0.9999]], dtype=torch.float64)


class Draws(TypedDict):
    sigma: Tensor
    noise: Tensor
    drop_label: Tensor


def draws(batch: int, multiplicity: int) -> Draws:
    generator = torch.Generator().manual_seed(0)
    return {
        "sigma": noise_level(LossConfig(), "edm", torch.rand(multiplicity, batch, generator=generator)),
        "noise": torch.randn(multiplicity, batch, 1, 8, 8, generator=generator),
        "drop_label": torch.rand(multiplicity, batch, generator=generator) < 0.3,
    }


@pytest.mark.parametrize("kind", ["edm", "v", "vp", "ve"])
def test_loss_is_the_mean_of_single_draws(small_denoiser: Denoiser, kind: DenoiserKind) -> None:
    denoiser = Denoiser(small_denoiser.network, kind)
    images, labels, drawn = torch.rand(4, 1, 8, 8) * 2 - 1, torch.tensor([0, 1, 2, 0]), draws(4, 3)
    losses = diffusion_loss(denoiser, images, labels, **drawn)
    for b in range(4):
        total = 0.0
        for k in range(3):
            sigma = drawn["sigma"][k, b].item()
            label = 3 if drawn["drop_label"][k, b] else labels[b].item()
            noisy = images[b] + sigma * drawn["noise"][k, b]
            denoised = denoiser(noisy[None], sigma, torch.tensor([label]))[0]
            weight = {
                "edm": (sigma**2 + 1 / 3) / (sigma**2 / 3),
                "v": (sigma**2 + 1) / sigma**2,
                "vp": sigma**-2,
                "ve": sigma**-2,
            }[kind]
            total += weight * (denoised - images[b]).square().sum().item() / 64
        assert losses[b].item() == pytest.approx(total / 3, rel=1e-4)


def gradient_of(denoiser: Denoiser, images: Tensor, labels: Tensor, drawn: Draws, b: int) -> Tensor:
    losses = diffusion_loss(denoiser, images, labels, **drawn)
    gradients = torch.autograd.grad(losses[b], list(denoiser.parameters()))
    return torch.cat([losses[b : b + 1].detach(), *(gradient.flatten() for gradient in gradients)])


def test_another_example_changes_neither_loss_nor_gradient(small_denoiser: Denoiser) -> None:
    images, labels, drawn = torch.rand(4, 1, 8, 8) * 2 - 1, torch.tensor([0, 1, 2, 0]), draws(4, 2)
    before = gradient_of(small_denoiser, images, labels, drawn, 2)
    images[0], labels[0] = 50.0, 2
    drawn["noise"][:, 0] *= 3
    drawn["drop_label"][:, 0] ^= True
    assert torch.equal(gradient_of(small_denoiser, images, labels, drawn, 2), before)
    images[2] *= 0.5
    assert not torch.equal(gradient_of(small_denoiser, images, labels, drawn, 2), before)


def test_the_network_is_evaluated_once_draw_major(small_denoiser: Denoiser) -> None:
    calls: list[tuple[Tensor, ...]] = []
    small_denoiser.network.register_forward_pre_hook(lambda _, inputs: calls.append(inputs))
    labels, drawn = torch.tensor([0, 1, 2]), draws(3, 2)
    drawn["drop_label"] = torch.tensor([[False, True, False], [False, False, True]])
    diffusion_loss(small_denoiser, torch.zeros(3, 1, 8, 8), labels, **drawn)
    assert len(calls) == 1
    x, _, row_labels = calls[0]
    assert row_labels.tolist() == [0, 3, 2, 0, 1, 3]
    scaled = drawn["sigma"] / (drawn["sigma"] ** 2 + 1 / 3).sqrt()
    torch.testing.assert_close(x.reshape(2, 3, 1, 8, 8), scaled[:, :, None, None, None] * drawn["noise"])


def test_an_empty_batch_has_no_losses(small_denoiser: Denoiser) -> None:
    none = torch.zeros(0, dtype=torch.int64)
    assert diffusion_loss(small_denoiser, torch.zeros(0, 1, 8, 8), none, **draws(0, 2)).shape == (0,)


def test_weight_can_be_another_kinds(small_denoiser: Denoiser) -> None:
    images, drawn = torch.zeros(2, 1, 8, 8), draws(2, 1)
    own = diffusion_loss(small_denoiser, images, None, **drawn)
    other = diffusion_loss(small_denoiser, images, None, kind="ve", **drawn)
    sigma = drawn["sigma"][0]
    torch.testing.assert_close(other * (3 * sigma**2 + 1), own)


def test_noise_levels_of_edm_and_ve_against_scipy() -> None:
    sigma = noise_level(LossConfig(p_mean=-0.4, p_std=0.9), "edm", QUANTILES)
    expected = stats.lognorm.ppf(QUANTILES.numpy(), s=0.9, scale=math.exp(-0.4))
    torch.testing.assert_close(sigma, torch.from_numpy(expected))
    sigma = noise_level(LossConfig(sigma_min=0.1, sigma_max=30.0), "ve", QUANTILES)
    torch.testing.assert_close(sigma, torch.from_numpy(stats.loguniform.ppf(QUANTILES.numpy(), 0.1, 30.0)))


def test_noise_levels_of_v_follow_the_truncated_cosine_schedule() -> None:
    # Signal cos(angle) and noise sin(angle) with the angle uniform between the two ends.
    config = LossConfig(logsnr_min=-9.0, logsnr_max=13.0)
    sigma = noise_level(config, "v", torch.tensor([0.0, 0.25, 0.5, 1.0], dtype=torch.float64))
    angle = torch.acos(1 / (1 + sigma**2).sqrt())
    logsnr = -2 * sigma.log()
    assert logsnr[[0, -1]].tolist() == pytest.approx([13.0, -9.0])
    assert angle[2].item() == pytest.approx((angle[0] + angle[3]).item() / 2)
    assert angle[1].item() == pytest.approx((3 * angle[0] + angle[3]).item() / 4)


def test_noise_levels_of_vp_are_those_of_uniform_times() -> None:
    sigma = noise_level(LossConfig(eps_t=0.01), "vp", QUANTILES)
    t = 0.01 + 0.99 * QUANTILES
    # sigma^2 + 1 = 1 / signal^2, and signal = exp(-(beta_min t + beta_d t^2 / 2) / 2)
    torch.testing.assert_close((sigma**2 + 1).log(), 0.1 * t + 19.9 * t**2 / 2)


def test_config_decides_over_the_denoisers_kind() -> None:
    expected = noise_level(LossConfig(), "v", QUANTILES)
    assert torch.equal(noise_level(LossConfig(type="v"), "edm", QUANTILES), expected)
    assert noise_level(LossConfig(), "v", QUANTILES.float()).dtype == torch.float32


@pytest.mark.parametrize(
    "settings",
    [
        {"type": "edn"},
        {"noise_multiplicity": 0},
        {"label_dropout": 1.5},
        {"p_std": 0.0},
        {"p_mean": math.nan},
        {"logsnr_min": 14.0},
        {"eps_t": 0.0},
        {"sigma_min": 200.0},
        {"sigma_data": -1.0},
        {"beta_d": math.inf},
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=rf"loss\.{next(iter(settings))}"):
        LossConfig(**settings)


def test_bad_inputs_are_refused(small_denoiser: Denoiser) -> None:
    with pytest.raises(InputError, match=r"loss\.type"):
        noise_level(LossConfig(), "edn", QUANTILES)  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match="shape"):
        diffusion_loss(small_denoiser, torch.zeros(3, 1, 8, 8), None, **draws(2, 2))
