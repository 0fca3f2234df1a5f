"""Adam against torch's own, its schedules, and what taking the noise's variance out does."""

import math

import pytest
import torch
from torch import Tensor

from dpdm.errors import InputError
from dpdm.optimizer import OptimConfig, adam_step, learning_rate


def run(config: OptimConfig, gradients: list[list[Tensor]], noise_deviation: float = 0.0) -> dict[str, Tensor]:
    """Returns parameters of ones after as many updates as there are lists of gradients."""
    parameters = {str(i): torch.ones_like(g) for i, g in enumerate(gradients[0])}
    moments = [{name: torch.zeros_like(p) for name, p in parameters.items()} for _ in range(2)]
    for step, of_step in enumerate(gradients):
        adam_step(
            config, parameters, of_step, *moments, step=step, num_iterations=len(gradients),
            noise_deviation=noise_deviation,
        )  # fmt: skip
    return parameters


def random_gradients(steps: int = 7) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [[torch.randn(shape, generator=generator) for shape in ((3, 2), (5,))] for _ in range(steps)]


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_without_correction_it_is_torchs_adam(weight_decay: float) -> None:
    gradients = random_gradients()
    expected = [torch.ones(3, 2, requires_grad=True), torch.ones(5, requires_grad=True)]
    optimizer = torch.optim.Adam(expected, lr=0.05, weight_decay=weight_decay)
    for of_step in gradients:
        for parameter, gradient in zip(expected, of_step, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
    found = run(OptimConfig(0.05, weight_decay), gradients, noise_deviation=3.0)
    for parameter, other in zip(found.values(), expected, strict=True):
        assert torch.allclose(parameter, other.detach(), rtol=1e-6, atol=1e-7)


def test_correction_makes_steps_as_long_as_without_noise() -> None:
    """Gradients of mean 0.1 under noise of deviation 1: Adam divides by about 1, the corrected one by about 0.1."""
    generator = torch.Generator().manual_seed(0)
    noisy = [[0.1 + torch.randn(20_000, generator=generator)] for _ in range(300)]
    clean = [[torch.full((20_000,), 0.1)] for _ in range(300)]
    rate, floor = 1e-3, 1e-2  # of the noise's variance: that of the true gradient
    plain = 1 - run(OptimConfig(rate), noisy)["0"].mean()
    corrected = 1 - run(OptimConfig(rate, noise_correction=True, noise_floor=floor), noisy, 1.0)["0"].mean()
    wanted = 1 - run(OptimConfig(rate), clean)["0"].mean()
    assert plain < 0.15 * wanted
    assert 0.5 * wanted < corrected < 1.5 * wanted


def test_the_floor_bounds_the_step() -> None:
    (found,) = run(OptimConfig(0.01, noise_correction=True, noise_floor=0.25), [[torch.full((4,), 0.1)]], 1.0).values()
    assert torch.allclose(found, torch.full((4,), 1 - 0.01 * 0.1 / 0.5))


def test_learning_rate_schedules() -> None:
    linear = [learning_rate(OptimConfig(1.0, schedule="linear"), step, 8) for step in range(8)]
    assert linear == [1, 1, 1, 1, 1, 0.75, 0.5, 0.25]
    cosine = [learning_rate(OptimConfig(2.0, schedule="cosine"), step, 4) for step in range(4)]
    assert cosine == pytest.approx([2, 1 + math.sqrt(0.5), 1, 1 - math.sqrt(0.5)])
    assert learning_rate(OptimConfig(0.5), 7, 8) == 0.5


@pytest.mark.parametrize("values", [{"noise_floor": 0.0}, {"noise_floor": 1.5}, {"schedule": "step"}])
def test_config_names_the_wrong_key(values: dict[str, float]) -> None:
    with pytest.raises(InputError, match=f"optim.{next(iter(values))}"):
        OptimConfig(**values)  # type: ignore[arg-type]
