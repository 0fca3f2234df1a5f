"""Images and their files."""

import csv
import json
import os
import signal
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from dpdm import config as configs
from dpdm.cli import run_command
from dpdm.config import Config, build_denoiser
from dpdm.data.archive import ImageArchive
from dpdm.diffusion.denoiser import Denoiser
from dpdm.diffusion.sampling import sample
from dpdm.errors import InputError, PeerError, RunError
from dpdm.generate import _png_name, _sample_grid, check_empty, draw, grid, make_samples, to_image, write_archive
from dpdm.release import load_denoiser
from dpdm.released_files import redacted


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


def test_threads_are_those_of_the_config(denoiser: Denoiser) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        draw(denoiser, config(), num_images=1)
        assert torch.get_num_threads() == min(2, os.cpu_count() or 1)
        draw(denoiser, config("setup.num_threads=1"), num_images=1)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


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


def read_folder(folder: Path) -> tuple[np.ndarray, list[int]]:
    """Returns pixels (n, C, H, W) and labels of a folder of samples, and sees that nothing else is in it."""
    with (folder / "labels.csv").open() as file:
        header, *rows = csv.reader(file)
    assert header == ["file", "label"]
    assert {path.name for path in folder.iterdir()} == {*(name for name, _ in rows), "labels.csv", "grid.png"}
    images = []
    for name, _ in rows:
        with Image.open(folder / name) as saved:
            assert saved.mode in ("L", "RGB")
            images.append(np.atleast_3d(np.asarray(saved)).transpose(2, 0, 1))
    return np.stack(images), [int(label) for _, label in rows]


def assert_same(images: np.ndarray, expected: np.ndarray) -> None:
    """Kernels may round differently for another batch, which moves a pixel by one step of 255."""
    assert images.shape == expected.shape
    assert np.abs(images.astype(int) - expected).max() <= 1


@pytest.mark.parametrize("channels", [1, 3])
def test_samples_hold_the_pixels_and_labels(channels: int, tmp_path: Path) -> None:
    wanted = config(f"data.num_channels={channels}", "sampler.num_images=5", "sampler.batch_size=2")
    model = build_denoiser(wanted).eval()
    expected, labels = draw(model, wanted)
    assert labels is not None
    assert make_samples(model, wanted, folder=tmp_path / "new" / "samples") == 5
    images, saved = read_folder(tmp_path / "new" / "samples")
    assert np.array_equal(images, expected)
    assert saved == labels.tolist()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["samples"]


def test_samples_as_one_file(denoiser: Denoiser, tmp_path: Path) -> None:
    wanted = config("sampler.num_images=5")
    images, labels = draw(denoiser, wanted)
    make_samples(denoiser, config("sampler.num_images=5", "sampler.output=npz"), folder=tmp_path / "npz")
    with np.load(tmp_path / "npz" / "images.npz") as saved:
        assert saved.files == ["arr_0", "arr_1"]
        assert np.array_equal(saved["arr_0"], images.transpose(0, 2, 3, 1))
        assert labels is not None
        assert np.array_equal(saved["arr_1"], labels)
    make_samples(denoiser, config("sampler.output=zip"), folder=tmp_path / "zip", num_images=5)
    for name in ("npz", "zip"):
        assert {path.name for path in (tmp_path / name).iterdir()} == {f"images.{name}", "grid.png"}
    archive = ImageArchive(tmp_path / "zip" / "images.zip")
    assert np.array_equal(archive.read(np.arange(5)), images)
    assert archive.labels is not None
    assert np.array_equal(archive.labels, labels)


def test_samples_of_a_model_without_classes(tmp_path: Path) -> None:
    for output, names in (("folder", {"000000.png", "000001.png"}), ("zip", {"images.zip"}), ("npz", {"images.npz"})):
        plain = config("data.num_classes=0", f"sampler.output={output}")
        make_samples(build_denoiser(plain).eval(), plain, folder=tmp_path / output, num_images=2)
        assert {path.name for path in (tmp_path / output).iterdir()} == {*names, "grid.png"}
    with np.load(tmp_path / "npz" / "images.npz") as saved:
        assert saved.files == ["arr_0"]
    assert ImageArchive(tmp_path / "zip" / "images.zip").labels is None


def test_an_archive_beside_the_folder_and_alone(denoiser: Denoiser, tmp_path: Path) -> None:
    images, labels = draw(denoiser, config(), num_images=3)
    make_samples(denoiser, config(), folder=tmp_path / "samples", archive=tmp_path / "a.zip", num_images=3)
    make_samples(denoiser, config(), archive=tmp_path / "b.zip", num_images=3)
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()
    archive = ImageArchive(tmp_path / "a.zip")
    assert np.array_equal(archive.read(np.arange(3)), images)
    assert archive.labels is not None
    assert labels is not None
    assert np.array_equal(archive.labels, labels)
    assert {path.name for path in tmp_path.iterdir()} == {"samples", "a.zip", "b.zip"}
    with pytest.raises(ValueError, match="folder or archive"):
        make_samples(denoiser, config())


@pytest.mark.parametrize("output", ["folder", "zip", "npz"])
@pytest.mark.parametrize("size", [2, 3, 7])
def test_any_number_of_processes_makes_the_same(
    size: int, output: str, denoiser: Denoiser, tmp_path: Path, together: Callable[[int, Callable[[int], int]], list]
) -> None:
    wanted = config("sampler.num_images=5", "sampler.batch_size=2", f"sampler.output={output}")
    expected, labels = draw(denoiser, wanted)
    assert labels is not None
    folder, archive = tmp_path / "samples", tmp_path / "archive.zip"
    copies = [build_denoiser(wanted).eval() for _ in range(size)]  # as in processes, each has its own
    counts = together(size, lambda rank: make_samples(copies[rank], wanted, folder=folder, archive=archive))
    assert counts == [5] * size
    assert {path.name for path in tmp_path.iterdir()} == {"samples", "archive.zip"}
    whole = ImageArchive(archive)
    assert_same(whole.read(np.arange(5)), expected)
    assert whole.labels is not None
    assert np.array_equal(whole.labels, labels)
    if output == "folder":
        images, saved = read_folder(folder)
        assert_same(images, expected)
        assert saved == labels.tolist()
    elif output == "zip":
        assert (folder / "images.zip").read_bytes() == archive.read_bytes()
    else:
        with np.load(folder / "images.npz") as file:
            assert_same(file["arr_0"].transpose(0, 3, 1, 2), expected)
            assert np.array_equal(file["arr_1"], labels)


@pytest.mark.parametrize("broken", [0, 1])
def test_if_one_process_fails_all_do_and_nothing_is_left(
    broken: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    together: Callable[[int, Callable[[int], str]], list[str]],
) -> None:
    wanted = config("sampler.num_images=4", "sampler.batch_size=1")
    copies = [build_denoiser(wanted).eval() for _ in range(2)]

    def failing(model: Denoiser, *arguments: Any, **settings: Any) -> Any:
        if model is copies[broken]:
            raise RunError("no luck")
        return sample(model, *arguments, **settings)

    def attempt(rank: int) -> str:
        with pytest.raises(RunError) as caught:
            make_samples(copies[rank], wanted, folder=tmp_path / "new" / "samples")
        return "other" if isinstance(caught.value, PeerError) else str(caught.value)

    monkeypatch.setattr("dpdm.generate.sample", failing)
    said = together(2, attempt)
    assert said[broken] == "no luck"
    assert said[1 - broken] == "other"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("output", ["folder", "zip", "npz"])
def test_memory_does_not_grow_with_the_number_of_images(
    output: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def grey(*_: Any, indices: range, **settings: Any) -> tuple[torch.Tensor, None]:
        return torch.from_numpy(np.full((len(indices), 3, 128, 128), 128, np.uint8)), None

    monkeypatch.setattr("dpdm.generate.sample", grey)
    wanted = config(
        "data.resolution=128", "data.num_channels=3", "data.num_classes=0", "sampler.batch_size=20",
        f"sampler.output={output}",
    )  # fmt: skip
    model = build_denoiser(wanted).eval()
    peaks = []
    for count in (300, 600):  # 300 more have 15 MB of pixels
        tracemalloc.start()
        try:
            make_samples(model, wanted, folder=tmp_path / str(count), num_images=count)
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    assert peaks[1] - peaks[0] < 1e6


def test_names_of_more_than_a_million_images_have_digits_for_all() -> None:
    assert _png_name(5, 1_000_000) == "000005.png"
    assert _png_name(999_999, 1_000_000) == "999999.png"
    assert _png_name(5, 1_000_001) == "0000005.png"
    assert _png_name(1_000_000, 1_000_001) == "1000000.png"


def test_an_archive_is_read_back_the_same(tmp_path: Path) -> None:
    images, labels = random_images(4, 3), np.array([1, 0, 1, 1])
    write_archive(tmp_path / "a.zip", images, labels)
    archive = ImageArchive(tmp_path / "a.zip")
    assert np.array_equal(archive.read(np.arange(4)), images)
    assert archive.labels is not None
    assert np.array_equal(archive.labels, labels)


def test_a_folder_with_files_is_refused_and_kept(denoiser: Denoiser, tmp_path: Path) -> None:
    folder = tmp_path / "samples"
    folder.mkdir()
    check_empty(folder)
    make_samples(denoiser, config(), folder=folder, num_images=1)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(InputError, match="empty folder"):
        make_samples(denoiser, config(), folder=folder, num_images=2)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    with pytest.raises(InputError, match="empty folder"):
        check_empty(folder / "grid.png")


def test_two_at_once_do_not_disturb_each_other(
    denoiser: Denoiser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "samples"

    def slow(*arguments: Any, **settings: Any) -> Any:
        monkeypatch.setattr("dpdm.generate.sample", sample)
        with pytest.raises(InputError, match="no other process that draws"):
            make_samples(denoiser, config("sampler.seed=1"), folder=folder, num_images=2)
        return sample(*arguments, **settings)

    monkeypatch.setattr("dpdm.generate.sample", slow)
    make_samples(denoiser, config(), folder=folder, num_images=2)
    assert np.array_equal(read_folder(folder)[0], draw(denoiser, config(), num_images=2)[0])
    assert list(tmp_path.iterdir()) == [folder]


def test_files_that_came_meanwhile_are_kept(
    denoiser: Denoiser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "samples"

    def slow(*arguments: Any, **settings: Any) -> Any:
        folder.mkdir()
        (folder / "mine.txt").write_text("mine")
        return sample(*arguments, **settings)

    monkeypatch.setattr("dpdm.generate.sample", slow)
    with pytest.raises(InputError, match="empty folder"):
        make_samples(denoiser, config(), folder=folder, archive=tmp_path / "a.zip", num_images=2)
    assert [path.name for path in folder.iterdir()] == ["mine.txt"]
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize("how", ["disk full", "interrupted", "terminated", "no such class"])
def test_a_failure_leaves_nothing(
    how: str, denoiser: Denoiser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*arguments: Any, **settings: Any) -> Any:
        if how == "disk full":
            raise OSError("disk full")
        if how == "interrupted":
            raise KeyboardInterrupt
        os.kill(os.getpid(), signal.SIGTERM)
        return sample(*arguments, **settings)

    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr("dpdm.generate.sample", failing)
    keys = ("sampler.labels=9",) if how == "no such class" else ()
    error = {"disk full": OSError, "no such class": InputError}.get(how, KeyboardInterrupt)
    with pytest.raises(error):
        make_samples(denoiser, config(*keys), folder=tmp_path / "new" / "samples", num_images=3)
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) is handler


def test_the_grid_of_many_images_is_that_of_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = random_images(60), np.random.default_rng(1).integers(0, 7, 60)
    for count, choice in ((60, 60), (60, 1000), (25, 25)):
        monkeypatch.setattr("dpdm.generate.GRID_CHOICE", choice)
        for known in (labels, None):
            first = grid(images[:count], None if known is None else known[:count])
            shown = _sample_grid(iter(images[:count]), count, None if known is None else known[:count])
            assert np.array_equal(np.asarray(shown), np.asarray(first))
    monkeypatch.setattr("dpdm.generate.GRID_CHOICE", 25)
    shown = _sample_grid(iter(images), 60, labels)
    assert np.array_equal(np.asarray(shown), np.asarray(grid(images[:25], labels[:25])))


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


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A release folder, as far as sampling reads it."""
    folder = tmp_path_factory.mktemp("model") / "release"
    folder.mkdir()
    wanted = config()
    save_file(build_denoiser(wanted).network.state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(redacted(wanted)))
    return folder


BROKEN = """
import os, signal, sys
import dpdm.generate
from dpdm.cli import main
from dpdm.errors import RunError
real = dpdm.generate.sample
def sample(*arguments, **settings):
    if os.environ["RANK"] == "1":
        if os.environ["HOW"] == "raise":
            raise RunError("This one has no luck.")
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*arguments, **settings)
dpdm.generate.sample = sample
main()
"""


def torchrun(program: list[str], release: Path, workdir: Path, **variables: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *program]
    command += ["sample", "--workdir", str(workdir), "--", f"model.ckpt={release}", "sampler.num_images=7"]
    command += ["sampler.num_steps=3", "sampler.batch_size=2", "setup.device=cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, env=environment)


def test_two_processes_as_a_user_starts_them(denoiser: Denoiser, release: Path, tmp_path: Path) -> None:
    done = torchrun(["-m", "dpdm"], release, tmp_path)
    assert "7 images in" in done.stderr, done.stderr
    expected, labels = draw(load_denoiser(release), config("sampler.num_images=7"))
    images, saved = read_folder(tmp_path / "samples")
    assert_same(images, expected)
    assert labels is not None
    assert saved == labels.tolist()
    assert [path.name for path in tmp_path.iterdir()] == ["samples"]


@pytest.mark.parametrize("how", ["raise", pytest.param("kill", marks=pytest.mark.slow)])
def test_a_process_that_fails_ends_the_command(how: str, release: Path, tmp_path: Path) -> None:
    program = tmp_path / "broken.py"
    program.write_text(BROKEN)
    done = torchrun([str(program)], release, tmp_path / "w", HOW=how)
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if line.startswith("dpdm: ")]
    if how == "raise":
        assert said == ["dpdm: This one has no luck."]
    else:
        assert len(said) <= 1  # rank 0 may be ended by torchrun before it notices
        assert "SIGKILL" in done.stderr
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize("side", [406, 407, 408, 512, 1024])
def test_the_picture_of_large_images_is_one_that_verify_takes(side: int) -> None:
    images = np.zeros((100, 1, side, side), np.uint8)
    images[:, :, : side // 2] = 200
    picture = grid(images, None)
    assert max(picture.size) <= 4096
    assert 40 < np.asarray(picture).mean() < 160  # both halves of each
