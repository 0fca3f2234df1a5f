"""The randomness of a synthetic image, decided by (seed, index) alone and by nothing about its batch.

It has nothing to do with privacy: a seed may be public.
"""

import hashlib
from bisect import bisect, bisect_left
from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from dpdm.diffusion.augmentation import NUM_DISTORTIONS
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
        self._streams = [_stream("noise", seed, index) for index in indices]

    def __call__(self) -> Tensor:
        """Returns the next (B, C, H, W) float32 noise."""
        noise = np.empty((len(self._streams), *self.shape), dtype=np.float32)
        for row, stream in zip(noise, self._streams, strict=True):
            stream.standard_normal(dtype=np.float32, out=row)
        return torch.from_numpy(noise).to(self.device)


def distortion_numbers(seed: int, indices: Sequence[int]) -> Tensor:
    """Returns what ``augmentation.distort`` takes beside images: (6, n) float64, uniform on [0, 1)."""
    numbers = np.array([_stream("distortion", seed, index).random(NUM_DISTORTIONS) for index in indices])
    return torch.from_numpy(numbers.reshape(-1, NUM_DISTORTIONS).T)


def random_label(seed: int, index: int, num_classes: int) -> int:
    """Returns the class of image ``index``, uniform over 0 .. num_classes - 1."""
    return _digest("label", seed, index) % num_classes  # 2^256 is so large that the remainder is uniform


def weighted_label(seed: int, index: int, cumulative: Sequence[float]) -> int:
    """Returns the class of image ``index``: each as often as its weight is of all, and never one of weight 0.

    Args:
        seed: of the images.
        index: of the image.
        cumulative: sums of the weights, (num_classes,), the last of them above 0.
    """
    place = (_digest("label", seed, index) >> 203) / 2**53  # in [0, 1), with all bits that a float64 has
    last = bisect_left(cumulative, cumulative[-1])  # of weight above 0: where a product is rounded up to the whole sum
    return bisect(cumulative, place * cumulative[-1], hi=last)


def image_labels(
    wanted: int | None, seed: int, indices: Sequence[int], num_classes: int, weights: Sequence[float] = ()
) -> Tensor | None:
    """Returns the classes of images, (n,) int64: ``wanted`` for all, or random ones, each decided by (seed, index).

    Args:
        wanted: a class; None or ``num_classes`` for random ones.
        seed: of the images.
        indices: (n,) of the images.
        num_classes: 0 for an unconditional model, which has no labels: None is returned.
        weights: of the classes, where random ones are drawn, (num_classes,); empty: all alike.

    Raises:
        InputError: if ``wanted`` is no class, or there are not as many weights as classes.
    """
    if weights and len(weights) != num_classes:
        raise InputError(
            f"Expected one of sampler.class_weights for each of the model's {num_classes} classes, got {len(weights)}: "
            "[] draws classes equally often."
        )
    if wanted is not None and wanted > num_classes:
        raise InputError(
            f"Expected 0 <= sampler.labels <= {num_classes}, got {wanted}: the model has {num_classes} "
            "classes, and their number itself draws random ones."
        )
    if num_classes == 0:
        return None
    if wanted is None or wanted == num_classes:
        if weights:
            sums = list(accumulate(weights))
            return torch.tensor([weighted_label(seed, index, sums) for index in indices], dtype=torch.int64)
        return torch.tensor([random_label(seed, index, num_classes) for index in indices], dtype=torch.int64)
    return torch.full((len(indices),), wanted, dtype=torch.int64)


def _stream(purpose: str, seed: int, index: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=_digest(purpose, seed, index) >> 128))


def _digest(purpose: str, seed: int, index: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{purpose}/{seed}/{index}".encode()).digest(), "big")
