import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from dpdm.data.idx import idx_splits, read_idx
from dpdm.errors import InputError


def idx_bytes(values: NDArray[np.uint8]) -> bytes:
    return struct.pack(f">4B{values.ndim}I", 0, 0, 8, values.ndim, *values.shape) + values.tobytes()


def write_pair(folder: Path, prefix: str, count: int, *, seed: int = 0) -> tuple[NDArray, NDArray]:
    random = np.random.default_rng(seed)
    images = random.integers(0, 256, (count, 5, 4), np.uint8)
    labels = np.arange(count, dtype=np.uint8) % 7
    (folder / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx_bytes(images)))
    (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(idx_bytes(labels))
    return images, labels


def test_both_pairs_are_read(tmp_path: Path) -> None:
    expected = {"train": write_pair(tmp_path, "train", 9), "holdout": write_pair(tmp_path, "t10k", 3, seed=1)}
    splits = idx_splits(tmp_path)
    assert list(splits) == ["train", "holdout"]
    for name, (images, labels) in expected.items():
        split = splits[name]
        assert split.class_names == ["0", "1", "2", "3", "4", "5", "6"]
        assert split.num_images == len(images)
        np.testing.assert_array_equal([split.read(index) for index in range(len(images))], images)
        assert [split.label(index) for index in range(len(images))] == labels.tolist()
    assert splits["train"].names[8] == "train-images-idx3-ubyte.gz[8]"


def test_without_t10k_there_is_no_holdout(tmp_path: Path) -> None:
    write_pair(tmp_path, "train", 2)
    assert list(idx_splits(tmp_path)) == ["train"]


def test_names_with_a_dot_are_found(tmp_path: Path) -> None:
    images, _ = write_pair(tmp_path, "train", 2)
    (tmp_path / "train-images-idx3-ubyte.gz").rename(tmp_path / "train-images.idx3-ubyte.gz")
    (tmp_path / "train-labels-idx1-ubyte").rename(tmp_path / "train-labels.idx1-ubyte")
    np.testing.assert_array_equal(idx_splits(tmp_path)["train"].read(1), images[1])


@pytest.mark.parametrize(
    "missing",
    [
        "train-images-idx3-ubyte",
        "train-labels-idx1-ubyte",
        "t10k-images-idx3-ubyte",
        "t10k-labels-idx1-ubyte",
    ],
)
def test_a_missing_half_is_named(tmp_path: Path, missing: str) -> None:
    write_pair(tmp_path, "train", 2)
    write_pair(tmp_path, "t10k", 2)
    for path in tmp_path.glob(f"{missing}*"):
        path.unlink()
    with pytest.raises(InputError, match=missing):
        idx_splits(tmp_path)


GOOD = idx_bytes(np.arange(40, dtype=np.uint8).reshape(2, 5, 4))


ZIPPED = gzip.compress(GOOD)


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(GOOD[:10], id="half a header"),
        pytest.param(GOOD[:-1], id="a pixel short"),
        pytest.param(GOOD + b"x", id="a byte more"),
        pytest.param(b"\0\0\x0d\x03" + GOOD[4:], id="floats"),
        pytest.param(b"\0\0\x08\x01" + GOOD[4:], id="labels"),
        pytest.param(b"\1\0\x08\x03" + GOOD[4:], id="no idx"),
        pytest.param(struct.pack(">4B3I", 0, 0, 8, 3, 2**32 - 1, 2**32 - 1, 2**32 - 1), id="gigantic"),
        pytest.param(ZIPPED[:-9], id="cut gzip"),
        pytest.param(ZIPPED[:-4] + b"\0\0\0\0", id="another length"),
        pytest.param(ZIPPED[:20] + b"\0\0\0" + ZIPPED[23:], id="damaged gzip"),
        pytest.param(gzip.compress(GOOD[:-1]), id="zipped, a pixel short"),
        pytest.param(b"\x1f\x8bno gzip", id="no gzip"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(GOOD))
    assert read_idx(path, 3).shape == (2, 5, 4)
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"train-images-idx3-ubyte\.gz") as caught:
        read_idx(path, 3)
    assert "\n" not in str(caught.value)


def test_counts_and_labels_must_fit(tmp_path: Path) -> None:
    write_pair(tmp_path, "train", 9)
    with pytest.raises(InputError, match="labels below 3, got 6"):
        idx_splits(tmp_path, ["a", "b", "c"])
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx_bytes(np.zeros(8, np.uint8)))
    with pytest.raises(InputError, match="got 9 and 8"):
        idx_splits(tmp_path)
    for name, shape in (("train-images-idx3-ubyte.gz", (0, 5, 4)), ("train-labels-idx1-ubyte", (0,))):
        (tmp_path / name).write_bytes(idx_bytes(np.zeros(shape, np.uint8)))
    with pytest.raises(InputError, match="got 0 and 0"):
        idx_splits(tmp_path)
