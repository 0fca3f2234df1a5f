"""The randomness of a synthetic image, decided by (seed, index) alone and by nothing about its batch.

It has nothing to do with privacy: a seed may be public.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


class PerImageNoise:
    """Standard normal noise in which every image has its own stream.

    The streams are Philox generators under 128-bit keys: torch's CPU generator keeps 32 bits of its seed, so
    that two of 100,000 images would probably be the same.
    """

    def __init__(
        self, seed: int, indices: Sequence[int], shape: tuple[int, int, int], device: torch.device | str
    ) -> None:
        """One stream for each of ``indices``; ``shape`` is (C, H, W)."""
        self.shape, self.device = shape, device
        self._streams = [
            np.random.Generator(np.random.Philox(key=_digest("noise", seed, index) >> 128)) for index in indices
        ]

    def __call__(self) -> Tensor:
        """Returns the next (B, C, H, W) float32 noise."""
        noise = np.empty((len(self._streams), *self.shape), dtype=np.float32)
        for row, stream in zip(noise, self._streams, strict=True):
            stream.standard_normal(dtype=np.float32, out=row)
        return torch.from_numpy(noise).to(self.device)


def random_label(seed: int, index: int, num_classes: int) -> int:
    """Returns the class of image ``index``, uniform over 0 .. num_classes - 1."""
    return _digest("label", seed, index) % num_classes  # 2^256 is so large that the remainder is uniform


def _digest(purpose: str, seed: int, index: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{purpose}/{seed}/{index}".encode()).digest(), "big")
