"""Nearest neighbours against a loop, and what is taken for a copy."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits

from dpdm.errors import InputError
from dpdm.evaluation import copies
from dpdm.evaluation.copies import describe, find_copies, nearest
from dpdm.evaluation.fid import Images

CPU = torch.device("cpu")


def draw(count: int, shape: tuple[int, ...] = (1, 8, 8), seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), np.uint8)


def digits() -> tuple[np.ndarray, np.ndarray]:
    """Training and held-out digits, as ``dpdm demo`` splits them."""
    values, _ = load_digits(return_X_y=True)
    images = np.rint(values / 16 * 255).astype(np.uint8).reshape(-1, 1, 8, 8)
    sixth = np.arange(len(images)) % 6 == 0
    return images[~sixth], images[sixth]


def images_of(pixels: np.ndarray) -> Images:
    return Images.of("images", pixels)


@settings(max_examples=25, deadline=None)
@given(
    count=st.integers(1, 20),
    training=st.integers(3, 30),
    neighbours=st.integers(1, 3),
    rows=st.integers(1, 7),
    columns=st.integers(1, 7),
    side=st.sampled_from([1, 5, 40]),
    kept=st.sampled_from([1, 3, 100]),
)
def test_neighbours_against_a_loop(
    count: int, training: int, neighbours: int, rows: int, columns: int, side: int, kept: int
) -> None:
    """Whatever the sizes of blocks; 40 x 40 pixels are too many for float32."""
    a, b = draw(count, (1, side, side), 1), draw(training, (1, side, side), 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(copies, "ROWS", rows)
        patch.setattr(copies, "COLUMNS", columns)
        patch.setattr(copies, "BYTES_PER_PASS", kept * side * side)
        found = nearest(images_of(a), np.arange(count), images_of(b), neighbours, device=CPU)
    for i in range(count):
        squares = np.array([((a[i].astype(np.int64) - other.astype(np.int64)) ** 2).sum() for other in b])
        assert np.array_equal(found.squares[i], np.sort(squares)[:neighbours])
        assert np.array_equal(squares[found.indices[i]], found.squares[i])


@pytest.mark.parametrize("shape", [(1, 28, 28), (1, 32, 32), (3, 32, 32)])
def test_distances_are_exact_at_their_largest(shape: tuple[int, int, int]) -> None:
    """Black and white, where products are largest: one grey level of one pixel still counts."""
    black, white = np.zeros((1, *shape), np.uint8), np.full((1, *shape), 255, np.uint8)
    almost = white.copy()
    almost[0, 0, 0, 0] = 254
    found = nearest(images_of(white), np.arange(1), images_of(np.concatenate([black, almost, white])), 3, device=CPU)
    assert found.indices.tolist() == [[2, 1, 0]]
    assert found.squares.tolist() == [[0.0, 1.0, float(np.prod(shape)) * 255**2]]


def test_no_training_image_is_its_own_neighbour_but_its_twin_is() -> None:
    b = draw(10)
    b[7] = b[3]
    rows = np.array([3, 7, 1])
    found = nearest(images_of(b), rows, images_of(b), 4, device=CPU, leave_out=True)
    assert found.indices[:2, 0].tolist() == [7, 3]
    assert found.squares[:2, 0].tolist() == [0.0, 0.0]
    assert found.squares[2, 0] > 0
    assert not (found.indices == rows[:, None]).any()


def test_held_out_images_are_no_copies() -> None:
    training, held_out = digits()
    report = find_copies(images_of(held_out), images_of(training))
    assert report.copies == 0
    assert len(report.synthetic.near) > 10  # digits are near each other: without the baseline this were an alarm
    assert report.synthetic.typical == pytest.approx(report.real.typical, rel=0.1)


@pytest.mark.parametrize("deviation", [0.0, 2.0, 8.0])
def test_few_copies_among_many_are_found(deviation: float) -> None:
    """Also with noise on them that is visible."""
    training, held_out = digits()
    random = np.random.default_rng(3)
    rows = random.choice(len(training), 6, replace=False)
    copied = np.clip(np.rint(training[rows] + deviation * random.standard_normal(training[rows].shape)), 0, 255)
    report = find_copies(images_of(np.concatenate([held_out, copied.astype(np.uint8)])), images_of(training))
    assert report.copies >= 6
    found = {(synthetic, index) for synthetic, index, _ in report.pairs}
    assert found >= {(len(held_out) + i, int(row)) for i, row in enumerate(rows)}
    if deviation == 0:
        assert len(report.synthetic.exact) == 6


def test_one_exact_copy_is_enough_even_if_training_images_have_twins() -> None:
    training = draw(200, seed=1)
    training[100:] = training[:100]
    training[50] = draw(1, seed=2)[0]  # its own twin, 150, is left: an image that occurs once
    synthetic = draw(50, seed=3)
    synthetic[9] = training[50]
    report = find_copies(images_of(synthetic), images_of(training))
    assert report.synthetic.exact.tolist() == [9]
    assert report.copies == 1


def test_an_empty_image_that_many_records_share_is_nobodys() -> None:
    training = draw(200, seed=1)
    training[:80] = 0
    synthetic = draw(100, seed=3)
    synthetic[:30] = 0
    report = find_copies(images_of(synthetic), images_of(training))
    assert len(report.synthetic.shared) == 30
    assert report.copies == 0
    # But not if real images are hardly ever so.
    training[3:80] = draw(77, seed=4)
    assert find_copies(images_of(synthetic), images_of(training)).copies == 30


@pytest.mark.parametrize(
    ("found", "total", "base", "base_total", "beyond"),
    [
        (0, 100, 0, 100, False),
        (1, 100, 0, 100, True),
        (10, 100, 10, 100, False),
        (30, 100, 10, 100, True),
        (3, 100, 1, 100, False),
        (10, 10_000, 1, 1000, False),
        (100, 10_000, 1, 1000, True),
    ],
)
def test_more_than_real_images_explain(found: int, total: int, base: int, base_total: int, beyond: bool) -> None:
    assert copies._beyond(found, total, base, base_total) == beyond


def test_lines_for_the_owner() -> None:
    training = draw(60)
    synthetic = draw(20, seed=1)
    synthetic[4] = training[11]
    lines = list(describe(find_copies(images_of(synthetic), images_of(training))))
    assert "20 synthetic ones (each compared with 60)" in lines[0]
    assert lines[2].split()[-2:] == ["1", "0"]
    assert lines[-1] == "  synthetic image 4 and training image 11: 0.00 grey levels apart"


def test_few_training_images_and_other_shapes() -> None:
    report = find_copies(images_of(draw(5)), images_of(draw(3, seed=1)))
    assert (report.copies, report.synthetic.total, report.real.total) == (0, 5, 3)
    with pytest.raises(InputError, match="at least 3 training images"):
        find_copies(images_of(draw(5)), images_of(draw(2)))
    with pytest.raises(InputError, match="the archive that the model was trained on"):
        find_copies(images_of(draw(5, (3, 8, 8))), images_of(draw(5)))


def test_training_images_are_read_in_blocks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Memory does not grow with their number."""
    asked: list[int] = []
    pixels = draw(500)

    def read(rows: np.ndarray) -> np.ndarray:
        asked.append(len(rows))
        return pixels[rows]

    monkeypatch.setattr(copies, "COLUMNS", 64)
    monkeypatch.setattr(copies, "BYTES_PER_PASS", 100 * 64)
    nearest(Images("a", 500, (1, 8, 8), read), np.arange(500), Images("b", 500, (1, 8, 8), read), 5, device=CPU)
    assert max(asked) == 100
    assert sum(asked) == 500 + 5 * 500
