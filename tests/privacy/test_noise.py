import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from scipy import stats

from dpdm.privacy import noise

KEY = bytes(range(32))


def test_stream_is_chacha20_of_rfc_8439() -> None:
    # RFC 8439, appendix A.1, test vector 1: zero key, zero nonce, block 0.
    expected = bytes.fromhex("76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7")
    assert noise.random_words(bytes(32), 4).tobytes() == expected


def test_long_streams_have_no_seam() -> None:
    words = noise.random_words(KEY, 100_000)
    nonce = (12_500 - 1).to_bytes(4, "little") + bytes(12)  # the last block, found by its counter
    block = Cipher(algorithms.ChaCha20(KEY, nonce), mode=None).encryptor().update(bytes(64))
    assert words[-8:].tobytes() == block


def test_keys_differ_by_every_part_of_their_context() -> None:
    contexts = [(), (1,), ("1",), (b"1",), (1, 1), ("a", "b"), ("ab",), ("a", "b", ""), (11,)]
    keys = {noise.derive_key(KEY, *context) for context in contexts}
    assert len(keys) == len(contexts)
    assert noise.derive_key(KEY, "a") == noise.derive_key(KEY, "a")
    assert noise.derive_key(bytes(32), "a") != noise.derive_key(KEY, "a")
    with pytest.raises(ValueError, match="32 bytes"):
        noise.derive_key(b"short", "a")


def test_new_keys_have_256_bits_and_never_repeat() -> None:
    keys = {noise.new_key() for _ in range(100)}
    assert len(keys) == 100
    assert all(len(key) == 32 for key in keys)
    bits = np.unpackbits(np.frombuffer(b"".join(keys), dtype=np.uint8))
    assert abs(bits.mean() - 0.5) < 0.02
    # A key made from a 32-bit seed would repeat: 10 pairs are expected among so many.
    assert len({noise.new_key() for _ in range(300_000)}) == 300_000


def test_gaussian_noise_is_standard_normal_to_its_tails() -> None:
    sample = noise.gaussian_noise(KEY, 2_000_001)
    assert sample.shape == (2_000_001,)
    assert stats.kstest(sample, "norm").pvalue > 1e-3
    assert abs(sample.std() - 1) < 4 / np.sqrt(2 * len(sample))
    assert abs(sample.mean()) < 4 / np.sqrt(len(sample))
    beyond = (np.abs(sample) > 4).sum()
    expected = 2 * stats.norm.sf(4) * len(sample)
    assert abs(beyond - expected) < 5 * np.sqrt(expected)
    half = (len(sample) + 1) // 2  # cosines, then sines
    assert abs(np.corrcoef(sample[: half - 1], sample[half:])[0, 1]) < 5e-3


def test_extreme_words_stay_finite() -> None:
    extremes = np.array([0, 0, 2**64 - 1, 2**64 - 1], dtype=np.uint64)
    assert np.isfinite(noise.to_normal(extremes)).all()
    uniform = noise.to_uniform(extremes)
    assert uniform.min() > 0
    assert uniform.max() < 1
