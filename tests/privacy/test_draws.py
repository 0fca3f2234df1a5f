"""The draws of the loss: published test vectors of the generator, their distribution, and whose they are."""

import numpy as np
import pytest
import torch
from scipy import stats

from dpdm.privacy.draws import philox, record_draws

KEY = bytes(range(32))


# Known answers that come with Random123, the generator's reference implementation.
@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0, 0, 0, 0], (0, 0), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, (0xFFFFFFFF, 0xFFFFFFFF), [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            (0xA4093822, 0x299F31D0),
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_the_generator_is_philox_4x32_10(counter: list[int], key: tuple[int, int], expected: list[int]) -> None:
    a, b, c, d = counter
    assert [int(word) for word in philox((torch.tensor(a), b, c, d), key)] == expected


def test_draws_have_their_distributions() -> None:
    uniform, normal = record_draws(KEY, torch.arange(400), 500, 1001)
    assert (uniform.shape, uniform.dtype) == ((400, 500), torch.float64)
    assert (normal.shape, normal.dtype) == ((400, 1001), torch.float32)
    assert uniform.min() > 0
    assert uniform.max() < 1
    assert stats.kstest(uniform.flatten().numpy(), "uniform").pvalue > 1e-3
    z = normal.flatten().double().numpy()
    assert stats.kstest(z, "norm").pvalue > 1e-3
    beyond, expected = (np.abs(z) > 4).sum(), 2 * stats.norm.sf(4) * len(z)
    assert abs(beyond - expected) < 5 * np.sqrt(expected)
    # Neither records nor positions are alike: cosine and sine of a pair, neighbours, the same place in two records.
    for first, second in (
        (normal[:, :500], normal[:, 501:1001]),
        (normal[:, 1:], normal[:, :-1]),
        (normal[1:], normal[:-1]),
    ):
        correlation = np.corrcoef(first.flatten().numpy(), second.flatten().numpy())[0, 1]
        assert abs(correlation) < 5 / np.sqrt(first.numel())


def test_draws_of_a_record_do_not_depend_on_its_company() -> None:
    records = torch.tensor([3, 8, 21, 2**33 + 8])
    uniform, normal = record_draws(KEY, records, 4, 7)
    alone = record_draws(KEY, records[1:2], 4, 7)
    assert torch.equal(uniform[1:2], alone[0])
    assert torch.equal(normal[1:2], alone[1])
    assert len({tuple(row.tolist()) for row in normal}) == 4


@pytest.mark.parametrize("byte", [0, 11, 31])
def test_every_byte_of_the_key_counts(byte: int) -> None:
    other = bytes(b ^ (i == byte) for i, b in enumerate(KEY))
    assert not torch.isclose(
        record_draws(KEY, torch.tensor([5]), 0, 64)[1], record_draws(other, torch.tensor([5]), 0, 64)[1]
    ).any()


def test_extreme_words_stay_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    from dpdm.privacy import draws

    extremes = torch.tensor([[0, 2**32 - 1]])
    monkeypatch.setattr(draws, "philox", lambda *_: [extremes] * 4)
    uniform, normal = record_draws(KEY, torch.tensor([0]), 4, 4)
    assert uniform.min() > 0
    assert uniform.max() < 1
    assert torch.isfinite(normal).all()
    assert normal.abs().max() < 6.8
