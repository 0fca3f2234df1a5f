"""Poisson subsampling, and the physical batches that a logical batch is worked off in."""

import math

import numpy as np

from dpdm.privacy.noise import random_words


def poisson_sample(key: bytes, num_records: int, sampling_rate: float) -> np.ndarray:
    """Returns the records of one logical batch: each takes part independently with probability ``sampling_rate``.

    Guarantee: inclusions are independent Bernoulli(p) with p <= sampling_rate (p is the rate rounded *down* to a
    multiple of 2^-53, so the accountant is never told less than the truth). The batch may be empty or hold everything;
    its size is private.

    Args:
        key: of this step and this purpose alone.
        num_records: N.
        sampling_rate: q in (0, 1].

    Returns:
        Indices in increasing order, (n,) int64.
    """
    if not 0 < sampling_rate <= 1:
        raise ValueError(f"Expected 0 < sampling_rate <= 1, got {sampling_rate}.")
    threshold = math.floor(sampling_rate * 2**53)
    return np.flatnonzero((random_words(key, num_records) >> np.uint64(11)) < np.uint64(threshold))


def physical_batches(batch: np.ndarray, size: int) -> list[np.ndarray]:
    """Returns ``batch`` cut into consecutive pieces of at most ``size`` records; none for an empty batch.

    Every record is in exactly one piece and nothing is padded.
    """
    if size < 1:
        raise ValueError(f"Expected size >= 1, got {size}.")
    return [batch[start : start + size] for start in range(0, len(batch), size)]
