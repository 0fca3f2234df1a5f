import math
from typing import get_args

import pytest
import torch
from scipy.integrate import quad
from torch import Tensor

from dpdm.diffusion.denoiser import (
    SIGMA_DATA,
    Denoiser,
    DenoiserKind,
    loss_weight,
    preconditioning,
    vp_sigma,
    vp_time,
)
from dpdm.diffusion.unet import UNet
from dpdm.errors import InputError

from .conftest import Reference

SIGMAS = torch.tensor([1e-3, 0.02, 0.5, 1.0, 7.0, 80.0], dtype=torch.float64)


@pytest.mark.parametrize("kind", ["edm", "v"])
@torch.no_grad()
def test_denoiser_equals_the_original(reference: Reference, kind: DenoiserKind) -> None:
    arrays = reference.arrays
    noisy = arrays["x"] * (arrays["sigma"] ** 2 + 1).sqrt()[:, None, None, None]
    denoised = Denoiser(reference.network, kind)(noisy, arrays["sigma"], arrays.get("y"))
    expected = arrays[f"{kind}_denoised"]
    assert (denoised - expected).norm() / expected.norm() < 2e-5


@pytest.mark.parametrize("kind", ["edm", "v"])
def test_network_input_and_target_have_unit_variance(kind: DenoiserKind) -> None:
    # For data of standard deviation s (edm: sigma_data, v: 1), the requirements of Karras et al., appendix
    # B.6: Var(c_in x) = 1, Var((image - c_skip x) / c_out) = 1, and c_skip minimises c_out.
    s = SIGMA_DATA if kind == "edm" else 1.0
    c_skip, c_out, c_in, _ = preconditioning(kind, SIGMAS)
    ones = torch.ones_like(SIGMAS)
    torch.testing.assert_close(c_in**2 * (s**2 + SIGMAS**2), ones)
    error = (1 - c_skip) ** 2 * s**2 + c_skip**2 * SIGMAS**2
    torch.testing.assert_close(error / c_out**2, ones)
    torch.testing.assert_close(c_skip, s**2 / (s**2 + SIGMAS**2))


def test_c_noise() -> None:
    def c_noise(kind: DenoiserKind) -> list[float]:
        return preconditioning(kind, SIGMAS)[3].tolist()

    sigmas = SIGMAS.tolist()
    assert c_noise("edm") == pytest.approx([math.log(s) / 4 for s in sigmas])
    assert c_noise("v") == pytest.approx([2 / math.pi * math.acos((1 + s * s) ** -0.5) for s in sigmas])
    assert c_noise("ve") == pytest.approx([math.log(s / 2) for s in sigmas])
    assert c_noise("vp") == pytest.approx([999 * t for t in vp_time(SIGMAS).tolist()])


def test_vp_noise_level_is_the_integral_of_beta() -> None:
    for t in (1e-5, 0.1, 0.5, 1.0):
        integral, _ = quad(lambda s: 0.1 + 19.9 * s, 0, t)
        signal = math.exp(-integral / 2)
        expected = math.sqrt(-math.expm1(-integral)) / signal
        assert vp_sigma(torch.tensor(t, dtype=torch.float64)).item() == pytest.approx(expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_vp_time_inverts_vp_sigma(dtype: torch.dtype) -> None:
    t = torch.logspace(-5, 0, 50, dtype=dtype)
    torch.testing.assert_close(vp_time(vp_sigma(t)), t, rtol=1e-4 if dtype == torch.float32 else 1e-9, atol=0)


@pytest.mark.parametrize("kind", get_args(DenoiserKind))
def test_loss_weight_is_one_over_c_out_squared(kind: DenoiserKind) -> None:
    c_out = preconditioning(kind, SIGMAS, sigma_data=0.4)[1]
    torch.testing.assert_close(loss_weight(kind, SIGMAS, sigma_data=0.4), 1 / c_out**2)


@pytest.mark.parametrize("kind", get_args(DenoiserKind))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@torch.no_grad()
def test_denoiser_returns_the_input_as_the_noise_vanishes(
    small_denoiser: Denoiser, kind: DenoiserKind, dtype: torch.dtype
) -> None:
    network: UNet = small_denoiser.network.to(dtype)
    denoiser = Denoiser(network, kind)
    x = torch.randn(2, 1, 8, 8, dtype=dtype)

    def distance(sigma: float) -> float:
        return (denoiser(x, sigma) - x).abs().max().item()

    assert denoiser(x, 1.0).dtype == dtype
    assert distance(1e-4) < 0.01 < distance(1.0)


@pytest.mark.parametrize("kind", get_args(DenoiserKind))
@torch.no_grad()
def test_one_sigma_for_all_or_one_for_each(small_denoiser: Denoiser, kind: DenoiserKind) -> None:
    denoiser = Denoiser(small_denoiser.network, kind)
    x, labels = torch.randn(2, 1, 8, 8), torch.tensor([0, 3])
    each: Tensor = denoiser(x, torch.tensor([0.3, 5.0]), labels)
    torch.testing.assert_close(each[:1], denoiser(x[:1], 0.3, labels[:1]), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(each[1:], denoiser(x[1:], torch.tensor(5.0), labels[1:]), rtol=1e-3, atol=1e-4)


def test_bad_settings_are_refused(small_denoiser: Denoiser) -> None:
    network, wrong = small_denoiser.network, "edn"
    with pytest.raises(InputError, match=r"model\.denoiser"):
        Denoiser(network, wrong)  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match=r"model\.denoiser"):
        preconditioning(wrong, SIGMAS)  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match=r"loss\.type"):
        loss_weight(wrong, SIGMAS)  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match="sigma_data > 0"):
        Denoiser(network, sigma_data=0.0)
