import math
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from dpdm.diffusion.denoiser import Denoiser
from dpdm.diffusion.sampling import (
    Guidance,
    SamplerConfig,
    SamplerType,
    ddim,
    distorted,
    dpm_solver_pp,
    edm,
    guided,
    karras_sigmas,
    sample,
    to_uint8,
)
from dpdm.errors import InputError, RunError

MEAN, STD = 0.3, 0.5
Solver = Callable[..., Tensor]
SOLVERS = [ddim, edm, dpm_solver_pp]


def gaussian(x: Tensor, sigma: float, labels: Tensor | None = None) -> Tensor:
    """The exact denoiser of images whose pixels are independent N(MEAN, STD^2)."""
    return MEAN + STD**2 / (STD**2 + sigma**2) * (x - MEAN)


GAUSSIAN = cast(Denoiser, gaussian)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def exact_solution(x: Tensor, sigmas: Tensor) -> Tensor:
    """The probability flow keeps (x - mean) / standard deviation; the solvers end by denoising once more."""
    first, last = sigmas[0].item(), sigmas[-1].item()
    ending = MEAN + (x - MEAN) * math.sqrt((STD**2 + last**2) / (STD**2 + first**2))
    return gaussian(ending, last)


def error(solver: Solver, num_steps: int) -> float:
    sigmas = karras_sigmas(num_steps, 0.01, 20.0, 7.0)
    x = 20.0 * normal(4, 1, 8, 8)
    return (solver(GAUSSIAN, x, sigmas) - exact_solution(x, sigmas)).abs().max().item()


@pytest.mark.parametrize(("solver", "order"), [(ddim, 1), (edm, 2), (dpm_solver_pp, 2)])
def test_solvers_converge_to_the_closed_form_with_their_order(solver: Solver, order: int) -> None:
    coarse, fine = error(solver, 80), error(solver, 160)
    assert fine < (0.05 if order == 1 else 2e-3)
    assert math.log2(coarse / fine) == pytest.approx(order, abs=0.25)


def test_multistep_solver_extrapolates_to_the_middle_of_the_step() -> None:
    # d(x / sigma) / d lambda = exp(lambda) D with lambda = -ln(sigma), D frozen at its value in the middle of a step as
    # the line through the last two calls gives it (the order of convergence alone does not show a wrong slope).
    s0, s1, s2 = 8.0, 4.0, 0.5
    x0 = normal(1, 1, 2, 2)
    d0 = gaussian(x0, s0)
    x1 = s1 * (x0 / s0 + (1 / s1 - 1 / s0) * d0)
    d1 = gaussian(x1, s1)
    middle = d1 + (d1 - d0) / math.log(s0 / s1) * math.log(s1 / s2) / 2
    x2 = s2 * (x1 / s1 + (1 / s2 - 1 / s1) * middle)
    images = dpm_solver_pp(GAUSSIAN, x0, torch.tensor([s0, s1, s2], dtype=torch.float64))
    torch.testing.assert_close(images, gaussian(x2, s2))


@pytest.mark.parametrize(
    ("solver", "settings"),
    [(ddim, {"stochastic": True}), (edm, {"s_churn": 30.0}), (edm, {"s_churn": 1e9, "max_gamma": 0.2})],
)
def test_stochastic_solvers_draw_from_the_gaussian(solver: Solver, settings: dict[str, Any]) -> None:
    sigmas = karras_sigmas(150, 0.01, 20.0, 7.0)
    generator = torch.Generator().manual_seed(3)

    def noise() -> Tensor:
        return torch.randn(200, 1, 8, 8, generator=generator, dtype=torch.float64)

    x = 20.0 * noise()
    images = solver(GAUSSIAN, x, sigmas, noise=noise, **settings)
    assert images.mean().item() == pytest.approx(MEAN, abs=0.03)
    assert images.std().item() == pytest.approx(STD, rel=0.04)
    # Fresh noise came in: the image is no longer what its first noise decides.
    flow = exact_solution(x, sigmas)
    assert torch.corrcoef(torch.stack([images.flatten(), flow.flatten()]))[0, 1].item() < 0.9


def test_churn_stays_between_its_limits() -> None:
    seen: list[float] = []

    def spy(x: Tensor, sigma: float, labels: Tensor | None = None) -> Tensor:
        seen.append(sigma)
        return gaussian(x, sigma)

    sigmas = torch.tensor([8.0, 4.0, 2.0, 1.0], dtype=torch.float64)
    x = normal(1, 1, 2, 2)
    fresh = normal(1, 1, 2, 2, seed=1)
    edm(cast(Denoiser, spy), x, sigmas, s_churn=2.0, s_min=2.0, s_max=4.0, noise=lambda: fresh)
    # Predictor at sigma (1 + gamma), corrector at the next sigma; gamma = 2 / 4 inside the limits.
    assert seen == [8.0, 4.0, 6.0, 2.0, 3.0, 1.0, 1.0]


def test_number_of_denoiser_calls() -> None:
    calls = 0

    def count(x: Tensor, sigma: float, labels: Tensor | None = None) -> Tensor:
        nonlocal calls
        calls += 1
        return gaussian(x, sigma)

    for solver, expected in ((ddim, 6), (dpm_solver_pp, 6), (edm, 11)):
        calls = 0
        solver(cast(Denoiser, count), normal(1, 1, 2, 2), karras_sigmas(6, 0.002, 80.0, 7.0))
        assert calls == expected


@pytest.mark.parametrize("solver", SOLVERS)
def test_one_noise_level_is_one_denoising(solver: Solver) -> None:
    x = normal(2, 1, 4, 4)
    assert torch.equal(solver(GAUSSIAN, x, torch.tensor([3.0])), gaussian(x, 3.0))


def test_guidance() -> None:
    batches: list[int] = []

    class Labelled:
        network = SimpleNamespace(num_classes=7)

        def __call__(self, x: Tensor, sigma: float, labels: Tensor) -> Tensor:
            batches.append(len(x))
            return x + 10.0 * labels[:, None, None, None]

    denoiser = cast(Denoiser, Labelled())
    x, labels = normal(2, 1, 2, 2), torch.tensor([1, 4])
    expected = x + (1.5 * 10 * labels - 0.5 * 70)[:, None, None, None]
    plain = x + 10 * labels[:, None, None, None]
    torch.testing.assert_close(guided(denoiser, x, 1.0, labels, Guidance(0.5)), expected)
    torch.testing.assert_close(guided(denoiser, x, 1.0, labels, Guidance(0.0)), plain)
    assert batches == [2, 2, 2]
    between = Guidance(0.5, low=0.3, high=3.0)
    for sigma, image in ((0.29, plain), (0.3, expected), (3.0, expected), (3.01, plain)):
        torch.testing.assert_close(guided(denoiser, x, sigma, labels, between), image)
    assert len(batches) == 3 + 1 + 2 + 2 + 1  # outside of the interval no call is spent on it
    with pytest.raises(InputError, match="guidance_scale=0"):
        guided(denoiser, x, 1.0, None, Guidance(0.5))


@pytest.mark.parametrize("kind", ["ddim", "edm", "dpm_solver_pp"])
def test_images_are_guided_between_two_noise_levels(small_denoiser: Denoiser, kind: SamplerType) -> None:
    asked = SamplerConfig(type=kind, num_steps=6, guidance_scale=2.0)

    def images(**more: float) -> Tensor:
        return draw(small_denoiser, replace(asked, **more), [0, 1, 2])[0]

    everywhere, nowhere = images(), images(guidance_scale=0.0)
    assert torch.equal(images(guidance_min=1e-3, guidance_max=100.0), everywhere)
    assert torch.equal(images(guidance_min=1e5, guidance_max=1e6), nowhere)
    between = images(guidance_min=0.3, guidance_max=3.0)
    assert not torch.equal(between, everywhere)
    assert not torch.equal(between, nowhere)


def test_karras_sigmas() -> None:
    sigmas = karras_sigmas(50, 0.002, 80.0, 7.0)
    assert sigmas.dtype == torch.float32
    assert sigmas[[0, -1]].tolist() == pytest.approx([80.0, 0.002], rel=1e-6)
    root = 80 ** (1 / 7) + 13 / 49 * (0.002 ** (1 / 7) - 80 ** (1 / 7))
    assert sigmas[13].item() == pytest.approx(root**7, rel=1e-6)
    assert karras_sigmas(5, 1.0, 3.0, 1.0).tolist() == pytest.approx([3.0, 2.5, 2.0, 1.5, 1.0])
    assert karras_sigmas(1, 1.0, 3.0, 7.0).tolist() == pytest.approx([3.0])
    assert karras_sigmas(4, 0.08, 80.0, math.inf).tolist() == pytest.approx([80.0, 8.0, 0.8, 0.08], rel=1e-6)
    assert karras_sigmas(9, 0.02, 80.0, math.inf).tolist() == pytest.approx(
        karras_sigmas(9, 0.02, 80.0, 1000.0).tolist(), rel=0.02
    )


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, (0.002, 7.0)),
        ({"type": "edm"}, (0.002, 7.0)),
        ({"type": "dpm_solver_pp"}, (0.02, math.inf)),
        ({"type": "dpm_solver_pp", "sigma_min": 0.1, "rho": 3.0}, (0.1, 3.0)),
        ({"sigma_min": 0.1}, (0.1, 7.0)),
    ],
)
def test_each_solver_has_its_own_schedule(settings: dict[str, Any], expected: tuple[float, float]) -> None:
    sigma_min, rho = expected
    assert torch.equal(SamplerConfig(num_steps=5, **settings).sigmas(), karras_sigmas(5, sigma_min, 80.0, rho))


@pytest.mark.parametrize("blur", [0.1, 0.5])
def test_dpm_solver_pp_does_with_15_evaluations_what_ddim_does_with_50(blur: float) -> None:
    # Images of 40 random colours with noise of standard deviation ``blur``: many modes, and D in closed form.
    centres = normal(40, 3, seed=6)

    def mixture(x: Tensor, sigma: float, labels: Tensor | None = None) -> Tensor:
        variance = blur**2 + sigma**2
        distances = (x.mean((2, 3))[:, None] - centres).square().sum(2) * x[0, 0].numel()
        means = (torch.softmax(-distances / (2 * variance), 1) @ centres)[:, :, None, None]
        return means + blur**2 / variance * (x - means)

    def solve(solver: Solver, kind: Any, num_steps: int) -> Tensor:
        return solver(cast(Denoiser, mixture), 80.0 * start, SamplerConfig(type=kind, num_steps=num_steps).sigmas())

    start = normal(64, 3, 2, 2, seed=7)
    exact = solve(edm, "edm", 1000)
    few = (solve(dpm_solver_pp, "dpm_solver_pp", 15) - exact).square().mean((1, 2, 3))
    many = (solve(ddim, "ddim", 50) - exact).square().mean((1, 2, 3))
    assert few.mean() < many.mean()
    assert few.median() < many.median()


def draw(denoiser: Denoiser, config: SamplerConfig, indices: list[int]) -> tuple[Tensor, Tensor | None]:
    return sample(
        denoiser,
        config,
        seed=5,
        indices=indices,
        num_classes=3,
        resolution=8,
        num_channels=1,
        device="cpu",
    )


@pytest.mark.parametrize(
    "config",
    [
        SamplerConfig(num_steps=8, guidance_scale=0.5),
        SamplerConfig(num_steps=8, stochastic=True),
        SamplerConfig(type="edm", num_steps=8, s_churn=4.0),
        SamplerConfig(type="dpm_solver_pp", num_steps=8),
    ],
)
def test_an_image_does_not_depend_on_its_batch(small_denoiser: Denoiser, config: SamplerConfig) -> None:
    images, labels = draw(small_denoiser, config, list(range(7)))
    alone, label = draw(small_denoiser, config, [4])
    assert labels is not None
    assert label is not None
    assert (images[4].int() - alone[0].int()).abs().max() <= 1
    assert labels[4] == label[0]
    # ... and is not simply the same everywhere.
    assert (images[3].int() - alone[0].int()).abs().max() > 10


def test_bf16_is_for_the_network_alone_and_moves_images_by_little(small_denoiser: Denoiser) -> None:
    layer, solver = set[torch.dtype](), set[torch.dtype]()
    small_denoiser.network.conv_out.register_forward_hook(lambda _, __, output: layer.add(output.dtype))
    small_denoiser.register_forward_hook(lambda _, given, output: solver.update({given[0].dtype, output.dtype}))
    config = SamplerConfig(type="dpm_solver_pp", num_steps=8)
    images, labels = draw(small_denoiser, config, list(range(7)))
    assert layer == {torch.float32}
    fast, same = draw(small_denoiser, replace(config, precision="bf16"), list(range(7)))
    assert layer == {torch.float32, torch.bfloat16}
    assert solver == {torch.float32}
    assert labels is not None
    assert same is not None
    assert torch.equal(labels, same)
    moved = (images.int() - fast.int()).abs().float()
    assert 0 < moved.mean() < 2


def test_augmentation_moves_the_image_that_there_is_without_it(small_denoiser: Denoiser) -> None:
    config = SamplerConfig(type="dpm_solver_pp", num_steps=4)
    images, labels = draw(small_denoiser, config, [3, 4, 5])
    moved, same = draw(small_denoiser, replace(config, augmentation=1.5), [3, 4, 5])
    assert labels is not None
    assert same is not None
    assert torch.equal(labels, same)
    assert torch.equal(moved, distorted(images, 1.5, 5, [3, 4, 5]))
    assert torch.equal(moved[1:2], distorted(images[1:2], 1.5, 5, [4]))
    assert not torch.equal(moved, images)
    assert torch.equal(distorted(images, 0.0, 5, [3, 4, 5]), images)


def test_sample_gives_images_and_labels_of_the_wanted_form(small_denoiser: Denoiser) -> None:
    small_denoiser.train()
    images, labels = draw(small_denoiser, SamplerConfig(num_steps=2, labels=2), [0, 1])
    assert images.shape == (2, 1, 8, 8)
    assert images.dtype == torch.uint8
    assert labels is not None
    assert labels.tolist() == [2, 2]
    assert small_denoiser.training
    _, random = draw(small_denoiser, SamplerConfig(num_steps=1, labels=3), list(range(60)))
    _, same = draw(small_denoiser, SamplerConfig(num_steps=1), list(range(60)))
    assert random is not None
    assert same is not None
    assert torch.equal(random, same)
    assert set(random.tolist()) == {0, 1, 2}
    with pytest.raises(InputError, match=r"sampler\.labels"):
        draw(small_denoiser, SamplerConfig(labels=4), [0])


def test_sample_of_an_unconditional_model_and_of_a_broken_one(small_denoiser: Denoiser) -> None:
    config = SamplerConfig(num_steps=2)
    size: dict[str, Any] = {"num_classes": 0, "resolution": 8, "num_channels": 1, "device": "cpu"}
    assert sample(small_denoiser, config, seed=0, indices=[0], **size)[1] is None
    torch.nn.init.constant_(small_denoiser.network.conv_out.weight, math.nan)
    with pytest.raises(RunError, match="finite"):
        sample(small_denoiser, config, seed=0, indices=[0], **size)


def test_to_uint8_rounds_and_cuts_off() -> None:
    levels = torch.arange(256)
    assert torch.equal(to_uint8(levels / 127.5 - 1).int(), levels.int())
    assert to_uint8(torch.tensor([-3.0, 3.0, 0.4 / 127.5 - 1, 0.6 / 127.5 - 1])).tolist() == [0, 255, 0, 1]


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("sigmas", [[], [1.0, 0.0], [1.0, 1.0], [1.0, 2.0], [math.inf, 1.0], [math.nan]])
def test_bad_schedules_are_refused(solver: Solver, sigmas: list[float]) -> None:
    with pytest.raises(InputError, match="sigmas"):
        solver(GAUSSIAN, normal(1, 1, 2, 2), torch.tensor(sigmas))


def test_missing_noise_is_refused() -> None:
    x, sigmas = normal(1, 1, 2, 2), karras_sigmas(3, 0.1, 1.0, 7.0)
    with pytest.raises(InputError, match="noise"):
        ddim(GAUSSIAN, x, sigmas, stochastic=True)
    with pytest.raises(InputError, match="noise"):
        edm(GAUSSIAN, x, sigmas, s_churn=1.0)
    with pytest.raises(InputError, match="s_churn"):
        edm(GAUSSIAN, x, sigmas, s_churn=-1.0)
    with pytest.raises(InputError, match="num_steps"):
        karras_sigmas(0, 0.1, 1.0, 7.0)


@pytest.mark.parametrize(
    "settings",
    [
        {"type": "heun"},
        {"output": "tar"},
        {"precision": "bfloat16"},
        {"num_steps": 0},
        {"num_images": 0},
        {"batch_size": 0},
        {"labels": -1},
        {"class_weights": [1.0, -1.0]},
        {"class_weights": [0.0, 0.0]},
        {"class_weights": [1.0, math.inf]},
        {"class_weights": [1e308, 1e308]},
        {"class_weights": [1.0, math.nan]},
        {"sigma_min": 0.0},
        {"sigma_max": 0.001},
        {"rho": 0.0},
        {"guidance_scale": math.nan},
        {"guidance_min": -0.1},
        {"guidance_max": math.nan},
        {"guidance_min": 2.0, "guidance_max": 1.0},
        {"augmentation": -0.1},
        {"augmentation": math.nan},
        {"s_churn": -1.0, "type": "edm"},
        {"s_min": 2.0, "s_max": 1.0},
        {"s_noise": -1.0},
        {"stochastic": True, "type": "edm"},
        {"s_churn": 1.0, "type": "ddim"},
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=rf"sampler\.{next(iter(settings))}"):
        SamplerConfig(**settings)
