"""Images and their files."""

import csv
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dpdm import config as configs
from dpdm.cli import run_command
from dpdm.config import Config, build_denoiser
from dpdm.data.archive import ImageArchive
from dpdm.diffusion.denoiser import Denoiser
from dpdm.errors import InputError
from dpdm.generate import check_empty, draw, grid, to_image, write_archive, write_samples


def config(*overrides: str) -> Config:
    keys = ["data.resolution=8", "data.num_channels=1", "data.num_classes=3", "model.network.width=4"]
    keys += ["model.network.channel_multipliers=[1]", "model.network.num_res_blocks=1"]
    return configs.load([], [*keys, "sampler.num_steps=3", "setup.device=cpu", *overrides])


@pytest.fixture(scope="module")
def denoiser() -> Denoiser:
    torch.set_num_threads(1)
    return build_denoiser(config()).eval()


def random_images(count: int, channels: int = 1, side: int = 8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, channels, side, side), np.uint8)


@pytest.mark.parametrize("keys", [(), ("sampler.type=edm", "sampler.s_churn=5"), ("sampler.stochastic=true",)])
def test_an_image_does_not_depend_on_its_batch(denoiser: Denoiser, keys: tuple[str, ...]) -> None:
    images, labels = draw(denoiser, config("sampler.num_images=7", "sampler.batch_size=7", *keys))
    for size in (1, 3):
        others, other_labels = draw(denoiser, config(f"sampler.batch_size={size}", *keys), num_images=5)
        # Kernels may round differently for another batch, which moves a pixel by one step of 255.
        assert np.abs(images[:5].astype(int) - others).max() <= 1
        assert labels is not None
        assert other_labels is not None
        assert np.array_equal(labels[:5], other_labels)
    assert (images.shape, images.dtype) == ((7, 1, 8, 8), np.uint8)
    assert len(np.unique(images.reshape(7, -1), axis=0)) == 7


def test_another_seed_gives_other_images_and_one_class_is_kept(denoiser: Denoiser) -> None:
    first, _ = draw(denoiser, config(), num_images=4)
    second, _ = draw(denoiser, config("sampler.seed=1"), num_images=4)
    assert not np.array_equal(first, second)
    _, labels = draw(denoiser, config("sampler.labels=2"), num_images=4)
    assert labels is not None
    assert labels.tolist() == [2, 2, 2, 2]
    with pytest.raises(InputError, match=r"sampler.labels.*got 9"):
        draw(denoiser, config("sampler.labels=9"), num_images=1)


def test_an_unconditional_model_has_no_labels() -> None:
    plain = config("data.num_classes=0")
    images, labels = draw(build_denoiser(plain).eval(), plain, num_images=2)
    assert len(images) == 2
    assert labels is None


@pytest.mark.parametrize("channels", [1, 3])
def test_samples_hold_the_pixels_and_labels(channels: int, tmp_path: Path) -> None:
    images, labels = random_images(5, channels), np.array([0, 2, 1, 0, 2])
    write_samples(tmp_path / "samples", images, labels)
    with (tmp_path / "samples" / "labels.csv").open() as file:
        rows = list(csv.reader(file))
    assert rows == [["file", "label"], *([f"{i:06d}.png", str(label)] for i, label in enumerate(labels))]
    for index, image in enumerate(images):
        with Image.open(tmp_path / "samples" / f"{index:06d}.png") as saved:
            assert saved.mode == ("L" if channels == 1 else "RGB")
            pixels = np.asarray(saved).reshape(8, 8, channels)
        assert np.array_equal(pixels, image.transpose(1, 2, 0))
    assert {p.name for p in tmp_path.rglob("*.png")} == {*(f"{i:06d}.png" for i in range(5)), "grid.png"}


def test_samples_as_one_file(tmp_path: Path) -> None:
    images, labels = random_images(5), np.array([0, 2, 1, 0, 2])
    write_samples(tmp_path / "npz", images, labels, output="npz")
    saved = np.load(tmp_path / "npz" / "images.npz")
    assert np.array_equal(saved["images"], images)
    assert np.array_equal(saved["labels"], labels)
    write_samples(tmp_path / "zip", images, None, output="zip")
    archive = ImageArchive(tmp_path / "zip" / "images.zip")
    assert np.array_equal(archive.read(np.arange(5)), images)
    assert archive.labels is None


def test_an_archive_is_read_back_the_same(tmp_path: Path) -> None:
    images, labels = random_images(4, 3), np.array([1, 0, 1, 1])
    write_archive(tmp_path / "a.zip", images, labels)
    archive = ImageArchive(tmp_path / "a.zip")
    assert np.array_equal(archive.read(np.arange(4)), images)
    assert archive.labels is not None
    assert np.array_equal(archive.labels, labels)


def test_a_folder_with_files_is_refused_and_kept(tmp_path: Path) -> None:
    folder = tmp_path / "samples"
    folder.mkdir()
    check_empty(folder)
    write_samples(folder, random_images(1), None)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(InputError, match="empty folder"):
        write_samples(folder, random_images(2), None)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_a_failure_leaves_no_half_of_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("dpdm.generate.grid", full)
    with pytest.raises(OSError, match="disk full"):
        write_samples(tmp_path / "samples", random_images(3), None)
    assert list(tmp_path.iterdir()) == []


def test_the_grid_shows_each_class_in_order() -> None:
    values = np.array([30, 10, 20, 10, 30, 20], np.uint8)
    images = np.broadcast_to(values[:, None, None, None], (6, 1, 8, 8))
    pixels = np.asarray(grid(images, values.astype(np.int64)))
    shown = [value for value in pixels[pixels.shape[0] // 2].tolist() if value in (10, 20, 30)]
    columns = [shown[0], *(b for a, b in pairwise(shown) if a != b)]
    assert columns in ([10, 20, 30], [10, 20, 30, 10, 20, 30])
    assert to_image(images[0]).mode == "L"


def test_sample_needs_a_model_that_fits(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model.safetensors").write_text("no weights")
    for keys, hint in (
        ([f"model.ckpt={tmp_path / 'nothing'}"], "model.ckpt"),
        ([f"model.ckpt={tmp_path}"], "config.json"),
    ):
        capfd.readouterr()
        assert run_command(["sample", "--workdir", str(tmp_path / "w"), "--", *keys]) == 2
        assert hint in capfd.readouterr().err
        assert not (tmp_path / "w").exists()
