import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from dpdm.privacy import poisson
from dpdm.privacy.noise import derive_key
from dpdm.privacy.poisson import physical_batches, poisson_sample

KEY = bytes(32)


def draws(rate: float, num_records: int, count: int) -> list[np.ndarray]:
    return [poisson_sample(derive_key(KEY, step), num_records, rate) for step in range(count)]


def test_sizes_are_binomial_and_empty_batches_occur() -> None:
    batches = draws(0.05, 40, 4000)
    sizes = np.array([len(batch) for batch in batches])
    observed = np.bincount(np.minimum(sizes, 6), minlength=7)
    expected = stats.binom.pmf(np.arange(6), 40, 0.05) * len(sizes)
    expected = np.append(expected, len(sizes) - expected.sum())
    assert stats.chisquare(observed, expected).pvalue > 1e-3  # fixed-size batches or a shuffle would fail
    assert observed[0] > 0


def test_records_take_part_independently() -> None:
    member = np.zeros((4000, 3))
    for row, batch in enumerate(draws(0.3, 3, 4000)):
        member[row, batch] = 1
    assert np.abs(member.mean(0) - 0.3).max() < 4 * np.sqrt(0.21 / 4000)
    assert np.abs(np.corrcoef(member.T) - np.eye(3)).max() < 4 / np.sqrt(4000)


def test_a_record_may_be_drawn_in_consecutive_steps() -> None:
    member = np.array([7 in batch for batch in draws(0.5, 10, 2000)])
    both = (member[1:] & member[:-1]).mean()
    assert abs(both - 0.25) < 0.05  # an epoch-wise shuffle would keep them apart


def test_rate_one_takes_everything_and_the_order_is_increasing() -> None:
    assert poisson_sample(KEY, 100, 1.0).tolist() == list(range(100))
    assert (np.diff(poisson_sample(KEY, 1000, 0.5)) > 0).all()


@pytest.mark.parametrize("rate", [0.0, -0.1, 1.4])
def test_bad_rates_are_refused(rate: float) -> None:
    with pytest.raises(ValueError, match="sampling_rate"):
        poisson_sample(KEY, 10, rate)


@given(st.lists(st.integers(0, 1000), unique=True), st.integers(1, 50))
def test_physical_batches_hold_every_record_once(records: list[int], size: int) -> None:
    batch = np.array(sorted(records), dtype=np.int64)
    pieces = physical_batches(batch, size)
    assert [record for piece in pieces for record in piece] == sorted(records)
    assert all(0 < len(piece) <= size for piece in pieces)


def test_the_rate_is_rounded_down(monkeypatch: pytest.MonkeyPatch) -> None:
    """At a rate of 1.5 2^-53 a record takes part for one of 2^53 numbers, not for two."""
    monkeypatch.setattr(poisson, "random_words", lambda key, count: np.arange(count, dtype=np.uint64) << np.uint64(11))
    assert poisson.poisson_sample(bytes(32), 4, 1.5 * 2.0**-53).tolist() == [0]
