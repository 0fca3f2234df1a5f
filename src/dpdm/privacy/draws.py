"""Random numbers for the loss of each record, made on the device that uses them: a stream for each step and record.

The generator is Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): number i of a record
is a function of (key, record, i), computed by integer operations on whole tensors.

Guarantee: these numbers need not be secret, as noise and batches must be (``noise.py``). Fix them to any value: a
record's gradient is then a function of the record alone, of norm at most C after clipping, and the step is the
subsampled Gaussian mechanism. So the guarantee holds for each value, and for whoever knows it. What it needs is that a
record's numbers do not depend on the company that the record has in the batch, and they do not.
"""

import hashlib
import math

import torch
from torch import Tensor

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
MASK = 0xFFFFFFFF


def philox(
    counter: tuple[Tensor | int, Tensor | int, Tensor | int, Tensor | int], key: tuple[int, int]
) -> list[Tensor]:
    """Returns the four 32-bit words of Philox4x32-10 for each counter.

    Args:
        counter: four words below 2^32, int64 tensors that can be broadcast, or numbers; one at least a tensor.
        key: two words below 2^32.

    Returns:
        Four int64 tensors of the broadcast shape, with values below 2^32.
    """
    device = _device(counter)
    # A number is filled in on the device: to send it there would be to wait for all that is under way.
    words = (w if isinstance(w, Tensor) else torch.full((), w, dtype=torch.int64, device=device) for w in counter)
    a, b, c, d = torch.broadcast_tensors(*words)
    for step in range(ROUNDS):
        key_a, key_b = ((key[i] + step * WEYL[i]) & MASK for i in range(2))
        # A product of two 32-bit words may pass 2^63: it wraps, and its 64 bits are right all the same.
        first, second = a * MULTIPLIERS[0], c * MULTIPLIERS[1]
        a, b, c, d = _high(second) ^ b ^ key_a, second & MASK, _high(first) ^ d ^ key_b, first & MASK
    return [a, b, c, d]


def record_draws(key: bytes, records: Tensor, num_uniform: int, num_normal: int) -> tuple[Tensor, Tensor]:
    """Returns numbers whose row i is a function of (key, records[i]) alone, on the device of ``records``.

    Args:
        key: of this step and purpose alone; 96 bits of its hash are used.
        records: (n,) int64 record numbers >= 0.
        num_uniform: uniform numbers for each.
        num_normal: standard normal numbers for each.

    Returns:
        (n, num_uniform) float64 in the open interval (0, 1), from 32 bits each; (n, num_normal) float32 by Box-Muller,
        with |z| < 6.8.
    """
    pairs = (num_normal + 1) // 2
    blocks = -(-(num_uniform + 2 * pairs) // 4)
    digest = hashlib.sha256(key).digest()
    words = [int.from_bytes(digest[start : start + 4], "little") for start in (0, 4, 8)]
    position = torch.arange(blocks, device=records.device)
    counter = (position, records[:, None] & MASK, _high(records)[:, None], words[2])
    found = torch.cat(philox(counter, (words[0], words[1])), dim=1)  # (n, 4 blocks)
    uniform = (found[:, :num_uniform].double() + 0.5) * 2.0**-32
    rest = (found[:, num_uniform : num_uniform + 2 * pairs].float() + 0.5) * 2.0**-32
    radius = (-2.0 * rest[:, :pairs].log()).sqrt()
    angle = (2.0 * math.pi) * rest[:, pairs:]
    return uniform, torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)[:, :num_normal]


def _high(words: Tensor) -> Tensor:
    """Returns the upper 32 of 64 bits."""
    return (words >> 32) & MASK


def _device(counter: tuple[Tensor | int, ...]) -> torch.device:
    return next(word.device for word in counter if isinstance(word, Tensor))
