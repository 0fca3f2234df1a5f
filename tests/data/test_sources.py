import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from dpdm.data.archive import ArchiveWriter
from dpdm.data.sources import NAMES, open_source
from dpdm.errors import InputError


def test_digits_hold_out_every_sixth() -> None:
    splits = open_source("digits")
    values, labels = load_digits(return_X_y=True)
    for name, keep in (("train", lambda i: i % 6 != 0), ("holdout", lambda i: i % 6 == 0)):
        chosen = [index for index in range(1797) if keep(index)]
        split = splits[name]
        assert split.num_images == len(chosen) == {"train": 1497, "holdout": 300}[name]
        assert [split.label(i) for i in range(len(chosen))] == labels[chosen].tolist()
        expected = np.floor(values[chosen].reshape(-1, 8, 8) * 255 / 16 + 0.5)
        np.testing.assert_array_equal([split.read(i) for i in range(len(chosen))], expected)
    assert splits["train"].class_names == list("0123456789")


def test_a_folder_with_idx_files_is_an_idx_folder(tmp_path: Path) -> None:
    images = gzip.compress(struct.pack(">4B3I", 0, 0, 8, 3, 3, 2, 2) + bytes(12))
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(images)
    with pytest.raises(InputError, match="train-labels-idx1-ubyte"):
        open_source(str(tmp_path))
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(struct.pack(">4BI", 0, 0, 8, 1, 3) + bytes(3))
    assert open_source(str(tmp_path))["train"].num_images == 3


def test_folders_and_zips_are_told_apart(tmp_path: Path) -> None:
    with ArchiveWriter(tmp_path / "a.zip") as writer:
        writer.add(np.zeros((1, 2, 2), np.uint8))
    (tmp_path / "images").mkdir()
    (tmp_path / "images/1.png").write_bytes(b"")
    assert list(open_source(str(tmp_path / "a.zip"))["train"].names) == ["00000/img00000000.png"]
    assert list(open_source(str(tmp_path / "images"))["train"].names) == ["1.png"]


def test_unknown_sources_are_named_with_what_there_is(tmp_path: Path) -> None:
    for source in ("mnits", str(tmp_path / "absent"), ""):
        with pytest.raises(InputError, match="digits, mnist, fashion_mnist") as caught:
            open_source(source)
        assert repr(source) in str(caught.value)
    (tmp_path / "photo.png").write_bytes(b"no zip")
    with pytest.raises(InputError, match="as a zip"):
        open_source(str(tmp_path / "photo.png"))


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_with_a_data_sets_name_is_not_passed_over(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever has private images in ``digits`` must not train on scikit-learn's without noticing."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / name / "a").mkdir(parents=True)
    Image.new("L", (4, 4)).save(tmp_path / name / "a" / "0.png")
    with pytest.raises(InputError, match=rf"'{name}'.*give \./{name}"):
        open_source(name)
    assert open_source(f"./{name}")["train"].num_images == 1
