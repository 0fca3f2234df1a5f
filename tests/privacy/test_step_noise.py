"""A step's noise against ``discrete.secure_gaussian``: the same bits, whenever, wherever and in whichever thread."""

import threading

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from dpdm.errors import InputError
from dpdm.privacy import discrete, step_noise
from dpdm.privacy.noise import gaussian_noise
from dpdm.privacy.step_noise import StepNoise, add_noise, to_grid

KEY = bytes(range(32))
SHAPES = ((7,), (3, 5), (), (2, 1, 4))


def some_sums(device: str = "cpu") -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [(50 * torch.randn(shape, dtype=torch.float64, generator=generator)).to(device) for shape in SHAPES]


def flat(tensors: list[Tensor]) -> np.ndarray:
    return torch.cat([t.flatten() for t in tensors]).cpu().numpy()


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("secure", [False, True])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_noise_is_that_of_the_mechanism_bit_for_bit(device: str, secure: bool, beside: bool) -> None:
    sums = some_sums(device)
    before = flat(sums)
    noise = StepNoise(len(before), 0.25, 3.0, KEY, secure=secure)
    if beside:
        noise.begin()
    add_noise(sums, noise)
    expected = discrete.secure_gaussian(before, sensitivity=0.25, noise_multiplier=3.0, key=KEY)
    if not secure:
        expected = before + 0.75 * gaussian_noise(KEY, len(before))
    assert flat(sums).tolist() == expected.tolist()
    assert np.abs(flat(sums) - before).max() > 0.1
    assert [tuple(total.shape) for total in sums] == list(SHAPES)


@settings(max_examples=50)
@given(
    values=st.lists(st.floats(-1e280, 1e280), min_size=1, max_size=20),
    spacing=st.sampled_from([1e-12, 2.0**-20, 0.1, 1.0, 3.0, 1e6]),
)
@example(values=[0.5, 1.5, -0.5, 2.5, 2.0**51, -(2.0**52), 1e280, 0.15], spacing=1.0)
@example(values=[0.15, 0.25, -0.35, 1e17], spacing=0.1)  # 0.15 / 0.1 < 1.5 = 0.15 * 10
def test_the_grid_is_the_same_as_in_numpy(values: list[float], spacing: float) -> None:
    expected = discrete.to_grid(np.array(values), spacing)
    assert to_grid(torch.tensor(values, dtype=torch.float64), spacing).tolist() == expected.tolist()


def test_noise_beside_the_step_is_made_in_another_thread_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    makers: list[threading.Thread] = []

    def rounded_gaussian(key: bytes, size: int, bits: int) -> np.ndarray:
        makers.append(threading.current_thread())
        return discrete.rounded_gaussian(key, size, bits)

    monkeypatch.setattr(step_noise, "rounded_gaussian", rounded_gaussian)
    noise = StepNoise(10, 1.0, 1.0, KEY)
    assert not makers  # nothing is drawn before it is asked for
    noise.begin()
    assert noise.numbers().tolist() == noise.numbers().tolist()
    assert len(makers) == 1
    assert makers[0] is not threading.current_thread()
    makers[0].join(timeout=10)
    assert not makers[0].is_alive()  # it does not stay


def test_a_failure_in_the_thread_is_the_step_s_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> np.ndarray:
        raise MemoryError

    monkeypatch.setattr(step_noise, "rounded_gaussian", fails)
    noise = StepNoise(10, 1.0, 1.0, KEY)
    noise.begin()
    sums = [torch.zeros(10, dtype=torch.float64)]
    with pytest.raises(MemoryError):
        add_noise(sums, noise)
    assert not sums[0].any()


def test_sums_that_are_not_finite_and_noise_without_a_grid_are_refused() -> None:
    with pytest.raises(ValueError, match="finite sums"):
        add_noise([torch.tensor([1.0, float("nan")], dtype=torch.float64)], StepNoise(2, 1.0, 1.0, KEY))
    with pytest.raises(InputError, match="secure_noise"):
        StepNoise(10**6, 1.0, 1e12, KEY)
