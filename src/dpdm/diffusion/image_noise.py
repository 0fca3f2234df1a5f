"""The randomness of a synthetic image, decided by (seed, index) alone and by nothing about its batch.

It has nothing to do with privacy: a seed may be public.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dpdm.errors import InputError


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


def image_labels(wanted: int | None, seed: int, indices: Sequence[int], num_classes: int) -> Tensor | None:
    """Returns the classes of images, (n,) int64: ``wanted`` for all, or random ones, each decided by (seed, index).

    Args:
        wanted: a class; None or ``num_classes`` for random ones.
        seed: of the images.
        indices: (n,) of the images.
        num_classes: 0 for an unconditional model, which has no labels: None is returned.

    Raises:
        InputError: if ``wanted`` is no class.
    """
    if wanted is not None and wanted > num_classes:
        raise InputError(
            f"Expected 0 <= sampler.labels <= {num_classes}, got {wanted}: the model has {num_classes} "
            "classes, and their number itself draws random ones."
        )
    if num_classes == 0:
        return None
    if wanted is None or wanted == num_classes:
        return torch.tensor([random_label(seed, index, num_classes) for index in indices], dtype=torch.int64)
    return torch.full((len(indices),), wanted, dtype=torch.int64)


def _digest(purpose: str, seed: int, index: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{purpose}/{seed}/{index}".encode()).digest(), "big")
