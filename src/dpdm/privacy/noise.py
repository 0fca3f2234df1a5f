"""Random numbers from keyed cryptographic streams: the batches and the privacy noise.

Every number is a function of (256-bit key, position), so that a step can be replayed exactly, split in any way and
made in any order. The stream is ChaCha20 (RFC 8439); keys are derived by HMAC-SHA256. Torch's generators are not used
where the guarantee rests on them: the one for the CPU keeps 32 bits of its seed, and can be searched.

Guarantee (computational): to whoever does not hold the key the numbers cannot be told from independent uniform ones by
any feasible attack, so the released mechanism is computationally differentially private (Mironov et al. 2009) wherever
the mechanism with true randomness is differentially private.

Floating point: the Gaussians here are made by Box-Muller in float64 from 52-bit uniforms. Proofs over the real numbers
do not cover the gaps between floats (Mironov 2012, "On significance of the least significant bits"); the statement says
so where ``dp.secure_noise`` is off. Else privacy noise comes from ``discrete``, by this module's streams.
"""

import hashlib
import hmac
import math
import secrets

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

KEY_BYTES = 32
Context = bytes | str | int


def new_key() -> bytes:
    """Returns 256 fresh bits from the operating system."""
    return secrets.token_bytes(KEY_BYTES)


def test_key(seed: int) -> bytes:
    """Returns a key that anybody can compute: a run that uses it has no guarantee. For tests alone."""
    return hashlib.sha256(b"dpdm: this key is public" + str(seed).encode()).digest()


test_key.__test__ = False  # type: ignore[attr-defined]  # not a test, for pytest


def derive_key(key: bytes, *context: Context) -> bytes:
    """Returns an independent 256-bit key for one use, HMAC-SHA256 over the unambiguously encoded context.

    Different contexts give computationally independent keys; ``1`` and ``"1"`` are different contexts.
    """
    if len(key) != KEY_BYTES:
        raise ValueError(f"Expected a key of {KEY_BYTES} bytes, got {len(key)}.")
    mac = hmac.new(key, digestmod=hashlib.sha256)
    for part in context:
        kind, data = (b"b", part) if isinstance(part, bytes) else (type(part).__name__[:1].encode(), str(part).encode())
        mac.update(kind + len(data).to_bytes(8, "big") + data)
    return mac.digest()


def random_words(key: bytes, count: int) -> np.ndarray:
    """Returns the first ``count`` 64-bit words of a key's stream, (count,) uint64.

    A key must be used for one purpose only: the same words come out each time.
    """
    encryptor = Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor()
    return np.frombuffer(encryptor.update(bytes(8 * count)), dtype="<u8")


def to_uniform(words: np.ndarray) -> np.ndarray:
    """Returns float64 in the open interval (0, 1), from the upper 52 bits of each word, at the middle of its cell."""
    return ((words >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52


def to_normal(words: np.ndarray) -> np.ndarray:
    """Returns standard normal float64 by Box-Muller; the last axis of ``words`` must be even, and is kept.

    |z| <= 8.6 (52 bits); the tail mass beyond is 1e-17 per number.
    """
    half = words.shape[-1] // 2
    radius = np.sqrt(-2.0 * np.log(to_uniform(words[..., :half])))
    angle = (2.0 * math.pi) * to_uniform(words[..., half:])
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], axis=-1)


def gaussian_noise(key: bytes, size: int) -> np.ndarray:
    """Returns (size,) independent standard normal float64, the privacy noise of one release under ``key``."""
    return to_normal(random_words(key, size + size % 2))[:size]
