"""Between the CPU and a device: without waiting on the way there, and with one wait on the way back.

On CUDA a copy from ordinary memory makes the program wait until the device has done all it was asked for; one from
pinned memory is put in line behind it. On a CPU nothing is copied.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def to_device(numbers: np.ndarray, device: torch.device) -> Tensor:
    """Returns ``numbers`` as a tensor on ``device``, of the same shape and type; on a CPU it shares their memory."""
    tensor = torch.from_numpy(numbers)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def to_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Returns ``tensors`` on the CPU, of the same shapes and types; from a device by one copy of them all."""
    if all(t.device.type == "cpu" for t in tensors):
        return [t.detach() for t in tensors]
    return unpack(pack(tensors).cpu(), tensors)


def pack(tensors: Sequence[Tensor]) -> Tensor:
    """Returns the bytes of ``tensors``, the widest numbers first, (n,) uint8 on the device of the first on a GPU."""
    device = next((t.device for t in tensors if t.is_cuda), torch.device("cpu"))
    return torch.cat([t.detach().to(device).contiguous().view(-1).view(torch.uint8) for t in _widest_first(tensors)])


def unpack(content: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Returns what ``pack(tensors)`` holds as tensors of the same shapes and types, where ``content`` is."""
    found: dict[int, Tensor] = {}
    start = 0
    for t in _widest_first(tensors):  # so that each begins at a multiple of its numbers' size
        part = content[start : start + t.numel() * t.element_size()]
        found[id(t)] = part.view(t.dtype).view(t.shape)
        start += len(part)
    return [found[id(t)] for t in tensors]


def _widest_first(tensors: Sequence[Tensor]) -> list[Tensor]:
    return sorted(tensors, key=lambda t: t.element_size(), reverse=True)
