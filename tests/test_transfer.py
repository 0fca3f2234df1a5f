"""Tensors to a device and back: the same numbers, in one piece."""

import numpy as np
import pytest
import torch
from torch import Tensor

from dpdm.transfer import pack, to_device, to_host, unpack


def mixed(device: str = "cpu") -> list[Tensor]:
    """Types and sizes of which the narrow ones would leave the wide ones at an odd address."""
    return [
        torch.tensor([True, False, True], device=device),
        torch.arange(5, dtype=torch.uint8, device=device),
        torch.linspace(0, 1, 6, device=device).view(2, 3).t(),  # not contiguous
        torch.tensor(1 / 3, dtype=torch.float64, device=device),
        torch.tensor([float("nan"), -0.0], dtype=torch.bfloat16, device=device),
        torch.zeros(0, 4, dtype=torch.int64, device=device),
        torch.tensor([2**62 + 1, -1], device=device),
    ]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.device.type == "cpu"
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        assert torch.equal(torch.nan_to_num(one.float()), torch.nan_to_num(other.cpu().float()))
        assert one.numel() == 0 or str(one.tolist()) == str(other.tolist())  # every digit, NaN and -0 too


def test_packed_tensors_come_out_as_they_went_in() -> None:
    tensors = mixed()
    content = pack(tensors)
    assert (content.dtype, len(content)) == (torch.uint8, sum(t.numel() * t.element_size() for t in tensors))
    assert_same(unpack(content, tensors), tensors)


def test_on_a_cpu_nothing_is_copied() -> None:
    numbers, parameter = np.arange(4.0), torch.ones(2, requires_grad=True)
    assert to_device(numbers, torch.device("cpu")).data_ptr() == numbers.ctypes.data
    (found,) = to_host([parameter])
    assert found.data_ptr() == parameter.data_ptr()
    assert not found.requires_grad


@pytest.mark.gpu
def test_there_and_back() -> None:
    numbers = np.random.default_rng(0).normal(size=(3, 4))
    away = to_device(numbers, torch.device("cuda"))
    assert away.is_cuda
    assert np.array_equal(away.cpu().numpy(), numbers)
    both = [*mixed("cuda"), torch.arange(3)]  # of several processes, figures are on the CPU already
    assert_same(to_host(both), both)
