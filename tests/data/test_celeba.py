import zipfile
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from dpdm.cli import app
from dpdm.data.archive import ImageArchive
from dpdm.data.prepare import prepare
from dpdm.data.sources import open_source
from dpdm.errors import InputError

ATTRIBUTES = """6
Bald Smiling Young
000001.jpg -1  1  1
000002.jpg -1 -1  1
000003.jpg  1  1 -1
000004.jpg -1 -1 -1
000005.jpg -1  1  1
000006.jpg -1 -1  1
"""
PARTITION = "000001.jpg 0\n000002.jpg 0\n000003.jpg 1\n000004.jpg 2\n000005.jpg 0\n000006.jpg 2\n"


@pytest.fixture
def celeba(tmp_path: Path) -> Path:
    """The published layout: 178 x 218 JPEGs, flat, the lists beside the folder."""
    folder = tmp_path / "celeba/img_align_celeba"
    folder.mkdir(parents=True)
    for index in range(1, 7):
        values = np.full((218, 178, 3), 10 * index, np.uint8)
        values[:20], values[198:] = 255, 255  # what the central square leaves out
        Image.fromarray(values).save(folder / f"{index:06d}.jpg", quality=100, subsampling=0)
    return folder


def test_without_lists_all_images_are_for_training(celeba: Path) -> None:
    splits = open_source(str(celeba))
    assert {name: (split.num_images, split.labels) for name, split in splits.items()} == {"train": (6, None)}


@pytest.mark.parametrize("beside", [True, False])
def test_the_partition_gives_training_and_test_images(
    celeba: Path, capsys: pytest.CaptureFixture[str], beside: bool
) -> None:
    ((celeba.parent if beside else celeba) / "list_eval_partition.txt").write_text(PARTITION)
    splits = open_source(str(celeba))
    assert {name: list(split.names) for name, split in splits.items()} == {
        "train": ["000001.jpg", "000002.jpg", "000005.jpg"],
        "holdout": ["000004.jpg", "000006.jpg"],
    }
    assert all(split.labels is None for split in splits.values())
    assert "1 validation images are left out" in capsys.readouterr().err


def test_an_attribute_gives_classes(celeba: Path, tmp_path: Path) -> None:
    (celeba.parent / "list_eval_partition.txt").write_text(PARTITION)
    (celeba.parent / "list_attr_celeba.txt").write_text(ATTRIBUTES)
    options = ["--resolution", "32x32", "--transform", "center-crop", "--attribute", "Smiling"]
    result = CliRunner().invoke(app, ["prepare", str(celeba), str(tmp_path / "a.zip"), *options])
    assert result.exit_code == 0, result.output
    archive = ImageArchive(tmp_path / "a.zip")
    assert archive.labels is not None
    assert archive.labels.tolist() == [1, 0, 1]
    assert archive.class_names == ["not Smiling", "Smiling"]
    pixels = archive.read([0, 1, 2]).astype(int)
    np.testing.assert_allclose(pixels, np.array([10, 20, 50])[:, None, None, None] * np.ones((1, 3, 32, 32)), atol=3)
    young = open_source(str(celeba), attribute="Young")
    assert [young["holdout"].label(i) for i in range(2)] == [0, 1]
    (celeba.parent / "list_eval_partition.txt").unlink()
    assert open_source(str(celeba), attribute="Bald")["train"].label(2) == 1


def test_a_zip_of_the_folder_is_the_same(celeba: Path, tmp_path: Path) -> None:
    path = celeba.parent / "img_align_celeba.zip"
    with zipfile.ZipFile(path, "w") as file:
        for image in sorted(celeba.iterdir()):
            file.write(image, f"img_align_celeba/{image.name}")
    (celeba.parent / "list_eval_partition.txt").write_text(PARTITION)
    first = prepare(str(celeba), tmp_path / "1.zip", transform="center-crop")
    assert prepare(str(path), tmp_path / "2.zip", transform="center-crop").fingerprint() == first.fingerprint()


@pytest.mark.parametrize(
    ("partition", "attributes", "message"),
    [
        (PARTITION, None, "list_attr_celeba.txt in .* or beside it"),
        (PARTITION, ATTRIBUTES.replace("Smiling", "smiling"), "such as smiling"),
        (PARTITION, ATTRIBUTES.replace("000002.jpg -1 -1  1", "000002.jpg -1 -1"), "3 values"),
        (PARTITION, ATTRIBUTES.replace("000002.jpg -1 -1  1", "000002.jpg -1 7  1"), "3 values"),
        (PARTITION, ATTRIBUTES.replace("000002.jpg -1 -1  1\n", ""), "1 images are not in .*: 000002.jpg"),
        (PARTITION, "6\n", "to be one of"),
        (PARTITION.replace("000005.jpg 0\n", ""), ATTRIBUTES, "1 images are not in .*: 000005.jpg"),
        (PARTITION.replace("5.jpg 0", "5.jpg 3"), ATTRIBUTES, "0, 1 or 2, got '000005.jpg 3'"),
        (PARTITION.replace("jpg 0", "jpg 1"), ATTRIBUTES, "Expected training images"),
    ],
)
def test_unclear_lists_are_refused(celeba: Path, partition: str, attributes: str | None, message: str) -> None:
    (celeba.parent / "list_eval_partition.txt").write_text(partition)
    if attributes is not None:
        (celeba.parent / "list_attr_celeba.txt").write_text(attributes)
    with pytest.raises(InputError, match=message) as caught:
        open_source(str(celeba), attribute="Smiling")
    assert "\n" not in str(caught.value)


def test_an_attribute_of_other_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="'Smiling', got 'digits'"):
        open_source("digits", attribute="Smiling")
    (tmp_path / "x.txt").write_text("")
    with pytest.raises(InputError, match="images"):
        open_source(str(tmp_path), attribute="Smiling")
