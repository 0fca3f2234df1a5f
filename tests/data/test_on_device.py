"""Images on the device against the archive that they come from: the same bits, by image and by group."""

from pathlib import Path

import numpy as np
import pytest
import torch

from dpdm.data import on_device
from dpdm.data.archive import ArchiveWriter, ImageArchive
from dpdm.data.on_device import ImagesOnDevice, size_of
from dpdm.errors import InputError

GROUPS = np.array([5, 3, 5, 9, 5, 3, 9, 5])
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def write(path: Path, *, labels: bool = True) -> Path:
    random = np.random.default_rng(0)
    with ArchiveWriter(path, groups=GROUPS.tolist()) as writer:
        for index in range(len(GROUPS)):
            writer.add(random.integers(0, 256, (3, 4, 4), np.uint8), index % 3 if labels else None)
    return path


@pytest.mark.parametrize("device", DEVICES)
def test_images_are_those_of_the_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    monkeypatch.setattr(on_device, "PIECE", 3)  # eight images in three pieces
    archive = ImageArchive(write(tmp_path / "a.zip"))
    assert archive.labels is not None
    records = np.array([6, 0, 7])
    pixels, labels = ImagesOnDevice(archive, torch.device(device)).take(torch.from_numpy(records).to(device), None)
    assert labels is not None
    assert (pixels.device.type, labels.device.type) == (device, device)
    assert np.array_equal(pixels.cpu().numpy(), archive.read(records))
    assert np.array_equal(labels.cpu().numpy(), archive.labels[records])
    assert size_of(archive) == 8 * 3 * 4 * 4 + 8 * 8


@pytest.mark.parametrize("device", DEVICES)
def test_of_a_group_the_same_images_are_chosen(tmp_path: Path, device: str) -> None:
    archive = ImageArchive(write(tmp_path / "a.zip"), "group")
    assert archive.labels is not None
    records = np.array([2, 0, 1, 0])
    u = np.random.default_rng(1).random((500, 4))
    u[0], u[1] = 0.0, np.nextafter(1.0, 0.0)
    chosen = archive.choose_images(records, u)
    copied = ImagesOnDevice(archive, torch.device(device))
    pixels, labels = copied.take(torch.from_numpy(records).to(device), torch.from_numpy(u).to(device))
    assert labels is not None
    assert np.array_equal(pixels.cpu().numpy(), archive.read(chosen.flatten()).reshape(500, 4, 3, 4, 4))
    assert np.array_equal(labels.cpu().numpy(), archive.labels[chosen])
    assert len(np.unique(chosen)) == len(GROUPS)  # all images were chosen at some time


def test_without_labels_there_are_none(tmp_path: Path) -> None:
    archive = ImageArchive(write(tmp_path / "a.zip", labels=False))
    assert ImagesOnDevice(archive, torch.device("cpu")).take(torch.tensor([1]), None)[1] is None


def test_a_damaged_image_is_named_before_the_first_step(tmp_path: Path) -> None:
    path = write(tmp_path / "a.zip")
    content = bytearray(path.read_bytes())
    content[content.rindex(b"IDAT") + 6] ^= 0xFF
    path.write_bytes(bytes(content))
    with pytest.raises(InputError, match="img00000007"):
        ImagesOnDevice(ImageArchive(path), torch.device("cpu"))
