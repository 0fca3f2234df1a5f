"""One private step against a one-by-one loop, its sensitivity, and its noise."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dpdm.errors import InputError
from dpdm.privacy import dpsgd
from dpdm.privacy.discrete import grid_for
from dpdm.privacy.dpsgd import DPConfig, PrivateGradient, clipped_sum, per_example_gradients, private_gradient
from dpdm.privacy.noise import derive_key
from dpdm.privacy.step_noise import StepNoise, add_noise

KEY = bytes(32)
Together = Callable[[int, Callable[[int], PrivateGradient]], list[PrivateGradient]]


def problem(poison: float | None = None) -> tuple[dict[str, Tensor], Callable[[np.ndarray], Tensor]]:
    torch.manual_seed(1)
    network = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.SiLU(), nn.Conv2d(4, 1, 3))
    images = torch.randn(12, 1, 5, 5)
    brightness = torch.linspace(0.1, 3, 12)
    if poison is not None:
        images[3, 0, 2, 2] = poison

    def loss(records: np.ndarray) -> Tensor:
        rows = torch.from_numpy(records)
        return brightness[rows] * network(images[rows]).square().mean((1, 2, 3))

    return dict(network.named_parameters()), loss


def step(
    batch: list[int], *, sigma=1e-12, physical=4, clip=1.0, key: bytes = KEY, expected=6, secure=True
) -> PrivateGradient:
    parameters, loss = problem()
    return private_gradient(
        parameters,
        loss,
        np.array(batch, dtype=np.int64),
        clipping_norm=clip,
        noise_multiplier=sigma,
        expected_batch_size=expected,
        physical_batch_size=physical,
        noise_key=key,
        secure_noise=secure,
    )


def clip_and_sum(grads: list[Tensor], clip: float) -> tuple[list[Tensor], Tensor]:
    sums = [torch.zeros(g.shape[1:], dtype=torch.float64) for g in grads]
    norms = dpsgd.clip_and_sum(grads, clip, sums)
    return sums, norms


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.flatten() for t in tensors]).double()


def loop_sum(batch: list[int], clip: float) -> Tensor:
    parameters, loss = problem()
    total = torch.zeros(sum(p.numel() for p in parameters.values()), dtype=torch.float64)
    for record in batch:
        grads = torch.autograd.grad(loss(np.array([record]))[0], list(parameters.values()))
        gradient = flat(list(grads))
        total += gradient * min(1.0, clip / float(gradient.norm()))
    return total


@pytest.mark.parametrize("physical", [1, 3, 12])
def test_clipped_mean_against_a_loop(physical: int) -> None:
    batch = [0, 2, 3, 7, 8, 11]
    ours = flat(step(batch, physical=physical).gradients) * 6
    expected = loop_sum(batch, 1.0)
    assert float((ours - expected).norm() / expected.norm()) < 1e-5


def test_some_examples_are_clipped_and_some_are_not() -> None:
    # Otherwise the tests of this file would not see how clipping is done.
    result = step(list(range(12)), clip=1.0)
    assert 0 < result.clip_fraction < 1


@settings(max_examples=25, deadline=None)
@given(
    batch=st.lists(st.integers(0, 11), unique=True, max_size=12),
    record=st.integers(0, 11),
    clip=st.sampled_from([1e-3, 0.5, 1.0, 100.0]),
    physical=st.sampled_from([1, 2, 5, 12]),
)
def test_one_record_moves_the_sum_by_at_most_the_clipping_norm(
    batch: list[int], record: int, clip: float, physical: int
) -> None:
    without = sorted(set(batch) - {record})
    with_it = sorted({*batch, record})
    parameters, loss = problem()

    def total(records: list[int]) -> Tensor:
        rows = np.array(records, dtype=np.int64)
        return flat(clipped_sum(parameters, loss, rows, clipping_norm=clip, physical_batch_size=physical).sums)

    assert float((total(with_it) - total(without)).norm()) <= clip


@pytest.mark.parametrize("small", [0, 4, dpsgd.SMALL])  # which are laid side by side: none, all of the parameters
def test_clipping_is_over_all_parameters_of_one_example(small: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dpsgd, "SMALL", small)
    grads = [torch.full((3, 4), 10.0), torch.full((3, 2, 2), 10.0)]
    sums, norms = clip_and_sum(grads, 1.0)
    assert norms.tolist() == pytest.approx([math.sqrt(800)] * 3)
    # All three agree, so three clipped gradients add up to norm 3: neither per layer (3 sqrt 2) nor per batch (1).
    assert float(flat(sums).norm()) == pytest.approx(3.0, rel=1e-5)


def test_the_norm_bound_holds_exactly_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(dpsgd, "PIECE_CPU", 5000)
    for scale in (1e-20, 1.0, 1e18):
        grads = [torch.randn(8, 10_000) * scale, torch.randn(8, 3, 3) * scale]
        for row in range(8):
            sums, _ = clip_and_sum([g[row : row + 1].clone() for g in grads], 1.0)
            # Room for the rounding of a sum of 47,000 such gradients, and of another that lacks one: 2 n^2 u each.
            assert float(flat(sums).norm()) <= 1.0 - 2 * dpsgd.LARGEST_BATCH**2 * 2.0**-53


@pytest.mark.parametrize("clip", [1e-30, 1e-6, 1e-3, 1.0])
@pytest.mark.parametrize("value", [1e-40, 1e-20, 1e34, 1e35, 3e36, 3e37, 3e38])
def test_the_norm_bound_holds_where_floats_lose_digits(value: float, clip: float) -> None:
    for size in (1000, 77_777):
        sums, _ = clip_and_sum([torch.full((1, size), value)], clip)
        assert float(flat(sums).norm()) <= clip


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 3e38])
def test_a_gradient_that_is_not_finite_contributes_zero(bad: float) -> None:
    good = torch.ones(3, 4)
    grads = good.clone()
    grads[1, 2] = bad
    sums, norms = clip_and_sum([grads], 1.0)
    if math.isinf(bad) or math.isnan(bad):
        assert float(sums[0].norm()) == pytest.approx(2.0, rel=1e-5)
        assert not torch.isfinite(norms[1])
    else:
        assert float(sums[0].norm()) <= 3.0


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_record_that_is_not_finite_leaves_the_step_intact(poison: float) -> None:
    parameters, loss = problem()
    arguments = {
        "clipping_norm": 1.0,
        "noise_multiplier": 1e-12,
        "expected_batch_size": 6,
        "physical_batch_size": 4,
        "noise_key": KEY,
    }
    parameters_with_it, poisoned = problem(poison)
    with_it = private_gradient(parameters_with_it, poisoned, np.array([1, 3, 5]), **arguments)
    without = private_gradient(parameters, loss, np.array([1, 5]), **arguments)
    assert with_it.num_nonfinite == 1
    assert torch.allclose(flat(with_it.gradients), flat(without.gradients), atol=1e-7)


@pytest.mark.parametrize("secure", [True, False])
def test_noise_is_added_once_with_the_right_variance_whatever_the_split(secure: bool) -> None:
    for batch, physical in (([], 4), (list(range(12)), 1), (list(range(12)), 12)):
        clean = flat(step(batch, physical=physical, clip=0.5).gradients)
        noisy = torch.stack(
            [
                flat(
                    step(batch, sigma=2.0, physical=physical, clip=0.5, key=derive_key(KEY, i), secure=secure).gradients
                )
                - clean
                for i in range(60)
            ]
        )
        # noise_multiplier * C / expected batch size = 2 * 0.5 / 6
        assert float(noisy.std()) == pytest.approx(1 / 6, rel=5 / math.sqrt(2 * noisy.numel()))
        assert float(noisy.mean().abs()) < 5 / 6 / math.sqrt(noisy.numel())


@pytest.mark.parametrize("secure", [True, False])
def test_sums_lie_on_the_grid_if_the_noise_is_secure(secure: bool) -> None:
    sums = [torch.tensor([0.1, -0.3, 0.7], dtype=torch.float64), torch.tensor([[1 / 3]], dtype=torch.float64)]
    add_noise(sums, StepNoise(4, 0.5, 2.0, KEY, secure=secure))
    in_spacings = flat(sums) / grid_for(0.5, 2.0, 4).spacing
    assert bool((in_spacings == in_spacings.round()).all()) == secure


def test_noise_is_independent_between_parameters_and_steps() -> None:
    first, second = (flat(step([], sigma=1.0, key=derive_key(KEY, i)).gradients) for i in range(2))
    assert len(set(first.tolist())) == len(first)
    assert not set(first.tolist()) & set(second.tolist())


def test_the_divisor_is_the_expected_batch_size() -> None:
    small = flat(step([1, 2], expected=6).gradients)
    assert torch.allclose(small * 6, flat(step([1, 2], expected=60).gradients) * 60, rtol=1e-5)


def test_an_empty_batch_is_a_step_of_pure_noise() -> None:
    result = step([], sigma=1.0)
    assert result.batch_size == 0
    assert math.isnan(result.mean_loss)
    assert float(flat(result.gradients).norm()) > 0


def test_a_batch_beyond_the_rounding_analysis_is_refused() -> None:
    with pytest.raises(InputError, match="47000"):
        step([0] * 47_001)


def test_a_loss_per_draw_is_refused() -> None:
    parameters, loss = problem()
    with pytest.raises(ValueError, match="one loss for each of 2 examples"):
        per_example_gradients(parameters, lambda records: loss(np.repeat(records, 2)), np.array([0, 1]))


@pytest.mark.parametrize(
    "values",
    [
        {"epsilon": 0.0},
        {"epsilon": -1.0},
        {"noise_multiplier": 0.0},
        {"delta": 0.0},
        {"delta": 1.0},
        {"clipping_norm": 0},
    ],
)
def test_config_names_the_wrong_key(values: dict[str, float]) -> None:
    with pytest.raises(InputError, match=f"dp.{next(iter(values))}"):
        DPConfig(**values)  # type: ignore[arg-type]


# Several processes.


def steps(
    together: Together, size: int, batch: list[int], sigma: float = 1e-12, key: bytes = KEY
) -> list[PrivateGradient]:
    """Returns what each of ``size`` processes computes; only rank 0 has the noise's key."""
    problems = [problem() for _ in range(size)]  # torch's graph of shared parameters is not for two threads

    def step(rank: int) -> PrivateGradient:
        parameters, loss = problems[rank]
        return private_gradient(
            parameters,
            loss,
            np.array(batch, dtype=np.int64),
            clipping_norm=0.5,
            noise_multiplier=sigma,
            expected_batch_size=6,
            physical_batch_size=2,
            noise_key=key if rank == 0 else None,
        )

    return together(size, step)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("batch", [[0, 2, 3, 5, 7, 8, 11], [4], []])
def test_the_clipped_sum_is_that_of_one_process(together: Together, size: int, batch: list[int]) -> None:
    """Also where some, or all, have no record: an empty part is a part."""
    results = steps(together, size, batch)
    expected = loop_sum(batch, 0.5) / 6
    for result in results:
        assert torch.equal(flat(result.gradients), flat(results[0].gradients))
        assert float((flat(result.gradients) - expected).norm()) < 1e-6 * max(1.0, float(expected.norm()))
        assert result.batch_size == len(batch)
        assert result.clip_fraction == results[0].clip_fraction or not batch


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("batch", [[], [4]])
def test_noise_is_that_of_one_process(together: Together, size: int, batch: list[int]) -> None:
    """The same stream: any second draw, or a missing one, would show. Of [4] rank 0 has no part."""
    alone = flat(steps(together, 1, batch, sigma=3.0)[0].gradients)
    assert float(alone.norm()) > 1
    for result in steps(together, size, batch, sigma=3.0):
        assert float((flat(result.gradients) - alone).norm()) < 1e-6 * float(alone.norm())


def test_the_variance_of_the_noise_does_not_grow_with_the_processes(together: Together) -> None:
    batch = [1, 3, 6, 9]
    clean = flat(steps(together, 3, batch)[0].gradients)
    noise = torch.cat(
        [flat(steps(together, 3, batch, sigma=2.0, key=bytes([k] * 32))[1].gradients) - clean for k in range(1, 41)]
    )
    # Standard deviation 2 * C / expected batch size, and its standard error.
    assert float(noise.std()) == pytest.approx(2.0 * 0.5 / 6, rel=4 / (2 * len(noise)) ** 0.5)


def test_rank_zero_without_a_key_does_not_go_on_without_noise() -> None:
    parameters, loss = problem()
    with pytest.raises(ValueError, match="noise_key"):
        private_gradient(
            parameters,
            loss,
            np.array([1]),
            clipping_norm=1.0,
            noise_multiplier=1.0,
            expected_batch_size=1,
            physical_batch_size=1,
            noise_key=None,
        )
