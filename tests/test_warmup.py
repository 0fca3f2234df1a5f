"""The warm-up looks at nothing but noisy means and public randomness, and its distortions are what they are called."""

import re
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.fft import dctn, idctn
from scipy.ndimage import gaussian_filter

from dpdm import central_model, config
from dpdm.central_model import (
    Central,
    as_images,
    central_images,
    check_covariances,
    cosines,
    deviations,
    split_classes,
    with_cells,
    with_covariances,
    with_less_noise,
)
from dpdm.data.archive import ArchiveWriter, ImageArchive
from dpdm.errors import InputError
from dpdm.privacy.central import WarmupConfig
from dpdm.warmup import augment, draw_cells, gaussian_blur, sampler, train_on_central_images


def test_blur_against_scipy() -> None:
    images = torch.rand(3, 2, 12, 12)
    deviation = torch.tensor([0.4, 0.9, 1.3])
    blurred = gaussian_blur(images, deviation, radius=4)
    for row in range(3):
        for channel in range(2):
            expected = gaussian_filter(images[row, channel].numpy(), float(deviation[row]), mode="nearest", radius=4)
            assert np.allclose(blurred[row, channel], expected, atol=1e-5)


def test_no_augmentation_leaves_images_as_they_are() -> None:
    images = torch.rand(4, 3, 10, 10) * 2 - 1
    off = WarmupConfig(augmentation=0.0, blur=0.0, contrast=0.0)
    assert torch.allclose(augment(images, off, torch.Generator().manual_seed(0)), images, atol=1e-5)


def test_augmentation_moves_each_image_by_itself() -> None:
    images = torch.rand(4, 1, 8, 8) * 2 - 1
    moved = augment(images, WarmupConfig(), torch.Generator().manual_seed(0))
    assert moved.shape == images.shape
    assert moved.min() >= -1
    assert moved.max() <= 1
    other = images.clone()
    other[2] = 0
    again = augment(other, WarmupConfig(), torch.Generator().manual_seed(0))
    assert torch.equal(moved[[0, 1, 3]], again[[0, 1, 3]])
    assert not torch.allclose(moved[0], images[0], atol=1e-2)


def test_central_images_of_a_colour_archive(tmp_path) -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (12, 3, 6, 6), dtype=np.uint8)
    with ArchiveWriter(tmp_path / "a.zip") as writer:
        for index, image in enumerate(pixels):
            writer.add(image, index % 2)
    quiet = WarmupConfig(noise_multiplier=1e-9, clipping_norm=100.0)
    central = central_images(ImageArchive(tmp_path / "a.zip"), quiet, num_classes=2, key=bytes(32))
    assert central.labels.tolist() == [0, 1]
    for label in range(2):
        assert np.allclose(central.means[label], pixels[label::2].mean(0) / 255, atol=1e-6)


def test_training_on_means_is_a_function_of_means_and_seed() -> None:
    overrides = ["data.resolution=8", "data.num_channels=1", "data.num_classes=2", "model.network.width=4"]
    settings = config.load([], [*overrides, "model.network.channel_multipliers=[1]", "model.network.num_res_blocks=1"])
    means = np.stack([np.full((1, 8, 8), 0.2), np.full((1, 8, 8), 0.9)])
    results = []
    for shift in (0.0, 0.0, 0.1):
        denoiser = config.build_denoiser(settings)
        ema = train_on_central_images(
            denoiser,
            Central(means - shift, np.arange(2), np.ones(2)),
            WarmupConfig(num_iterations=4),
            settings.loss,
            seed=1,
        )
        results.append(torch.cat([tensor.flatten() for tensor in ema.values()]))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_the_warmup_computes_in_the_precision_of_training() -> None:
    """Weights and their average stay float32; autocast moves them by its rounding."""
    overrides = ["data.resolution=8", "data.num_channels=1", "data.num_classes=2", "model.network.width=8"]
    settings = config.load([], [*overrides, "model.network.channel_multipliers=[1]", "model.network.num_res_blocks=1"])
    central = Central(np.full((2, 1, 8, 8), 0.5), np.arange(2), np.ones(2))
    found = []
    for enabled in (False, True):
        denoiser = config.build_denoiser(settings)
        ema = train_on_central_images(
            denoiser,
            central,
            WarmupConfig(num_iterations=3),
            settings.loss,
            seed=1,
            autocast=torch.autocast("cpu", torch.bfloat16, enabled=enabled),
        )
        found.append(torch.cat([tensor.flatten() for tensor in ema.values()]))
    assert found[1].dtype == torch.float32
    assert 0 < (found[0] - found[1]).norm() < 0.02 * found[0].norm()


def test_means_lose_noise_and_keep_what_stands_out() -> None:
    """Nearly as much of it as whoever knew the true powers would take away (Wiener's filter)."""
    random = np.random.default_rng(0)
    true = gaussian_filter(random.normal(size=(10, 1, 28, 28)), (0, 0, 3, 3))
    true /= true.std()
    noise = np.array([0.3] * 9 + [3.0])
    noisy = true + noise[:, None, None, None] * random.normal(size=true.shape)
    found = with_less_noise(noisy, noise)
    assert np.square(found - true)[:9].mean() < 0.2 * 0.3**2
    waves = np.asarray(dctn(true, axes=(2, 3), norm="ortho"))
    lengths = np.rint(np.hypot(*np.indices((28, 28)))).astype(int)
    power = np.array([np.square(waves[..., lengths == length]).mean() for length in range(39)])[lengths]
    kept = power / (power + np.square(noise)[:, None, None, None])
    best = idctn(kept * np.asarray(dctn(noisy, axes=(2, 3), norm="ortho")), axes=(2, 3), norm="ortho")
    error, least = (np.square(image - true).mean((1, 2, 3)) for image in (found, best))
    assert error[:9].mean() < 1.15 * least[:9].mean()  # the noise of the loudest does not set everybody's
    assert error[9] < 1.5 * least[9]
    assert np.allclose(with_less_noise(true, np.full(10, 1e-12)), true)
    assert not with_less_noise(np.zeros((2, 1, 4, 4)), np.zeros(2)).any()
    one = with_less_noise(noisy[:1].repeat(3, 1), noise[:1])  # of channels, too
    assert one.shape == (1, 3, 28, 28)


def test_means_keep_their_noise_where_they_are_only_distorted(tmp_path: Path) -> None:
    archive = archive_of_lines(tmp_path / "a.zip")
    loud = replace(LINE, noise_multiplier=30.0)
    less = central_images(archive, loud, num_classes=2, key=bytes(32)).means
    all_of_it = replace(loud, covariance_noise_multiplier=None)
    whole = central_images(archive, all_of_it, num_classes=2, key=bytes(32)).means
    assert np.square(less).sum() < 0.9 * np.square(whole).sum()
    assert np.array_equal(less, with_less_noise(whole, np.full(2, 30.0 * 4 / 200)))


def test_deviations_are_the_lowest_frequencies_of_scipys_cosine_transform() -> None:
    random = np.random.default_rng(0)
    images, centres = random.random((3, 2, 7, 7)), random.random((3, 2, 7, 7))
    expected = np.asarray(dctn(images - centres, axes=(2, 3), norm="ortho"))
    for side in (1, 4, 7):
        assert np.allclose(deviations(images, centres, side), expected[..., :side, :side].reshape(3, -1), atol=5e-4)
    smooth = 0.3 + 0.1 * np.cos(np.pi * (np.arange(7) + 0.5) / 7) * np.ones((1, 1, 7, 1))
    assert np.linalg.norm(deviations(smooth, 0 * smooth, 2)) == pytest.approx(np.linalg.norm(smooth), rel=1e-3)


def test_deviations_are_the_same_bits_in_any_order_of_adding() -> None:
    """So that the randomness of their purchase never meets other sums. Python's whole numbers have no order."""
    random = np.random.default_rng(0)
    images, centres, side = random.random((2, 1, 9, 9)), random.random((2, 1, 9, 9)), 5
    waves = [[round(float(wave) * 2**15) for wave in row] for row in cosines(9)[:side]]
    for image, centre, found in zip(images[:, 0], centres[:, 0], deviations(images, centres, side), strict=True):
        whole = [[round(float(pixel) * 2**15) for pixel in row] for row in image - centre]
        upright = [
            [Fraction(sum(w * whole[y][x] for y, w in enumerate(wave)), 2**15) for x in range(9)] for wave in waves
        ]
        exact = [sum(w * round(value) for w, value in zip(wave, row, strict=True)) for row in upright for wave in waves]
        assert found.tolist() == [value / 2**30 for value in exact]


LINE = WarmupConfig(
    covariance_noise_multiplier=1e-9, covariance_clipping_norm=100.0, covariance_side=4, covariance_rank=3
)


def archive_of_lines(path: Path, level: int = 128, kept_of_class_1: int = 200) -> ImageArchive:
    """Two classes; in class 0 the upper half varies, in class 1 the left half, about a grey level."""
    random = np.random.default_rng(0)
    with ArchiveWriter(path) as writer:
        for index in (*range(0, 400, 2), *range(1, 2 * kept_of_class_1, 2)):
            image = np.full((1, 8, 8), level, np.uint8)
            half = (slice(None), slice(0, 4)) if index % 2 == 0 else (slice(None), slice(None), slice(0, 4))
            image[half] += np.uint8(40) if random.random() < 0.5 else np.uint8(0)
            writer.add(image, index % 2)
    return ImageArchive(path)


def test_samples_vary_as_the_images_of_their_class_do(tmp_path: Path) -> None:
    """However unequal the classes are: of class 1 there are a third as many images as of class 0."""
    archive = archive_of_lines(tmp_path / "a.zip", kept_of_class_1=66)
    quiet = replace(LINE, noise_multiplier=1e-9, clipping_norm=100.0, count_weight=0.2)
    central = with_covariances(
        central_images(archive, quiet, num_classes=2, key=bytes(32)), archive, quiet, key=bytes(32)
    )
    assert central.factors is not None
    assert central.factors.shape == (2, 3, 1, 4, 4)
    draw = sampler(central, torch.Generator().manual_seed(0), torch.device("cpu"))
    images = (draw(torch.arange(2).repeat(2000)) + 1) / 2 * 255
    first, second = images[::2, 0], images[1::2, 0]
    true = torch.from_numpy(archive.read(np.arange(200))[:, 0]).float()
    assert torch.allclose(first.mean(0), true.mean(0), atol=2)
    assert first.std(0)[:3].mean() == pytest.approx(20, rel=0.1)
    assert first.std(0)[6:].mean() < 2
    assert second.std(0)[:, :3].mean() == pytest.approx(20, rel=0.1)
    assert torch.corrcoef(torch.stack([first[:, 0, 0], first[:, 2, 7]]))[0, 1] > 0.99


def test_deviations_are_from_the_noisy_means(tmp_path: Path) -> None:
    """About a wrong centre the deviations have one direction more: that of the error, which is the same for all."""
    archive = archive_of_lines(tmp_path / "a.zip", level=50)
    wrong = Central(np.zeros((2, 1, 8, 8)), np.arange(2), np.full(2, 200.0))
    factors = with_covariances(wrong, archive, LINE, key=bytes(32)).factors
    assert factors is not None
    second_moment = np.square(archive.read(np.arange(200)) / 255.0).sum((1, 2, 3)).mean()
    assert np.square(factors[0]).sum() == pytest.approx(second_moment, rel=0.15)


def test_covariances_and_their_noise_are_measured_by_released_sizes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not by the realised ones, nor the public share of each: here all three differ."""
    archive = archive_of_lines(tmp_path / "a.zip", kept_of_class_1=66)
    released = np.array([150.0, 116.0])
    seen: list[np.ndarray] = []
    real, factors = central_model.noisy_class_covariances, central_model.principal_factors

    def covariances(*arguments: Any, class_sizes: np.ndarray, **named: Any) -> np.ndarray:
        seen.append(class_sizes)
        return real(*arguments, class_sizes=class_sizes, **named)

    def note_noise(found: np.ndarray, noise: np.ndarray, rank: int) -> np.ndarray:
        seen.append(noise)
        return factors(found, noise, rank)

    monkeypatch.setattr(central_model, "noisy_class_covariances", covariances)
    monkeypatch.setattr(central_model, "principal_factors", note_noise)
    loud = replace(LINE, covariance_noise_multiplier=3.0, covariance_clipping_norm=2.0)
    with_covariances(Central(np.zeros((2, 1, 8, 8)), np.arange(2), released), archive, loud, key=bytes(32))
    assert np.allclose(seen[0], released)
    assert np.allclose(seen[1], 3.0 * 2.0**2 / np.sqrt(2) / released)


def test_without_classes_there_is_one_covariance(tmp_path: Path) -> None:
    archive = archive_of_lines(tmp_path / "a.zip")
    central = central_images(archive, LINE, num_classes=0, key=bytes(32))
    factors = with_covariances(central, archive, LINE, key=bytes(32)).factors
    assert factors is not None
    assert factors.shape[0] == 1


CELLS = replace(
    LINE, noise_multiplier=1e-9, clipping_norm=100.0, covariance_side=8, splits=1, cell_noise_multiplier=1e-9
)


def with_two_cells(archive: ImageArchive, settings: WarmupConfig = CELLS, num_classes: int = 2) -> Central:
    central = central_images(archive, settings, num_classes=num_classes, key=bytes(32))
    central = with_covariances(central, archive, settings, key=bytes(32))
    return with_cells(central, split_classes(central, settings), archive, settings, key=bytes(32))


def test_cells_are_what_a_class_is_made_of(tmp_path: Path) -> None:
    """In class 0 there are two images, in unequal numbers: two cells, which do not vary in themselves."""
    archive = archive_of_lines(tmp_path / "a.zip")
    central = with_two_cells(archive)
    assert central.factors is not None
    assert central.shares is not None
    assert central.labels.tolist() == [0, 0, 1, 1]
    pixels = archive.read(np.arange(200))[:, 0] / 255  # of class 0: archives are sorted by class
    bright = pixels[:, 0, 0] > 0.6
    order = [0, 1] if central.means[0].mean() < central.means[1].mean() else [1, 0]
    for cell, own in zip(order, (~bright, bright), strict=True):
        assert np.allclose(central.means[cell], pixels[own].mean(0), atol=0.02)
        assert central.shares[cell] == pytest.approx(own.mean(), abs=0.01)
        assert np.abs(central.factors[cell]).max() < 0.03
    draw = sampler(central, torch.Generator().manual_seed(0), torch.device("cpu"))
    labels = torch.arange(2).repeat(2000)
    cells = draw_cells(central, labels, torch.Generator().manual_seed(1))
    assert torch.equal(torch.from_numpy(central.labels)[cells], labels)
    upper = (draw(cells)[::2, 0, 0, 0] + 1) / 2
    assert (upper > 0.6).float().mean().item() == pytest.approx(bright.mean(), abs=0.03)
    assert ((upper - 128 / 255).abs() < 0.03).sum() + ((upper - 168 / 255).abs() < 0.03).sum() == len(upper)


def archive_of_slopes(path: Path, *, steep: bool = False) -> ImageArchive:
    """300 images without classes, brighter downwards and to the right as chance will, the first as far as can be."""
    random = np.random.default_rng(0)
    with ArchiveWriter(path) as writer:
        for index in range(300):
            slope = random.normal() * 30 * np.linspace(-1, 1, 8)[:, None] + random.normal() * 15 * np.linspace(-1, 1, 8)
            writer.add((128 + slope * (100 if steep and not index else 1)).clip(0, 255).astype(np.uint8)[None], None)
    return ImageArchive(path)


def test_cells_against_a_loop(tmp_path: Path) -> None:
    """Moments of each cell's images as they are, without clipping."""
    archive = archive_of_slopes(tmp_path / "a.zip")
    settings = replace(CELLS, splits=2, covariance_side=8)
    central = central_images(archive, settings, num_classes=0, key=bytes(32))
    central = with_covariances(central, archive, settings, key=bytes(32))
    split = split_classes(central, settings)
    found = with_cells(central, split, archive, settings, key=bytes(32))
    assert found.factors is not None
    assert found.shares is not None
    pixels = archive.read(np.arange(300)) / 255
    cells = split.cells(pixels, np.zeros(300, np.int64))
    for cell in range(4):
        own = pixels[cells == cell].reshape(-1, 64)
        assert len(own) > 40
        assert found.shares[cell] == pytest.approx(len(own) / 300, abs=1e-3)
        assert np.allclose(found.means[cell].ravel(), own.mean(0), atol=3e-3)
        factors = as_images(found.factors[cell], 8).reshape(-1, 64)
        assert np.allclose(factors.T @ factors, np.cov(own.T, bias=True), atol=3e-4)
        assert np.allclose(split.cell_centres[cell].ravel(), own.mean(0), atol=0.04)  # expected before it was bought


def test_cells_that_noise_hides_are_as_their_class_is(tmp_path: Path) -> None:
    archive = archive_of_lines(tmp_path / "a.zip")
    central = with_two_cells(archive, replace(CELLS, cell_noise_multiplier=1e6))
    assert central.factors is not None
    assert central.shares is not None
    assert np.array_equal(central.means[0], central.means[1])
    assert np.array_equal(central.factors[2], central.factors[3])
    assert np.allclose(central.shares.reshape(2, 2).sum(1), 1)


def test_a_cell_is_found_by_whole_numbers(tmp_path: Path) -> None:
    """On any hardware the same, so that the randomness of their purchase never meets other sums."""
    archive = archive_of_lines(tmp_path / "a.zip")
    settings = replace(CELLS, splits=2)
    central = with_covariances(
        central_images(archive, settings, num_classes=2, key=bytes(32)), archive, settings, key=bytes(32)
    )
    split = split_classes(central, settings)
    for numbers in (split.directions, split.centres * 2**10, split.cell_centres * 2**10):
        assert np.array_equal(numbers, np.rint(numbers))
    seen: list[np.ndarray] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(np, "einsum", lambda how, a, b: seen.extend([a, b]) or np.zeros((len(a), 2)))
        split.cells(archive.read(np.arange(5)) / 255, np.zeros(5, np.int64))
    distances, directions = seen
    assert np.array_equal(distances, np.rint(distances))
    assert np.abs(distances).max() > 1000
    assert np.square(distances).sum() * np.square(directions).sum() < 2.0**106  # by Cauchy and Schwarz no sum is larger


def test_a_record_adds_one_vector_of_its_own_to_one_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another image in its place changes its own vector and cell, and nothing of the others', nor the noise."""
    settings = replace(CELLS, splits=2, covariance_clipping_norm=2.0, cell_noise_multiplier=3.0)
    archive = archive_of_slopes(tmp_path / "a.zip")
    central = central_images(archive, settings, num_classes=0, key=bytes(32))
    central = with_covariances(central, archive, settings, key=bytes(32))
    split = split_classes(central, settings)
    seen: list[tuple[np.ndarray, np.ndarray, dict[str, Any]]] = []
    real = central_model.noisy_class_covariances

    def covariances(pieces: Any, labels: np.ndarray, **named: Any) -> np.ndarray:
        whole = np.concatenate(list(pieces))
        seen.append((whole, labels, named))
        return real([whole], labels, **named)

    monkeypatch.setattr(central_model, "noisy_class_covariances", covariances)
    for images in (archive, archive_of_slopes(tmp_path / "b.zip", steep=True)):
        with_cells(central, split, images, settings, key=bytes(32))
    (vectors, cells, named), (others, other_cells, other_named) = seen
    changed = (vectors != others).any(1) | (cells != other_cells)
    assert changed.sum() == 1
    for arguments in (named, other_named):
        assert arguments.pop("class_sizes").tolist() == [1.0] * 4
    assert named == other_named == {
        "dataset_size": 300,
        "num_classes": 4,
        "clipping_norm": 2.0 * np.hypot(1, 0.5),
        "noise_multiplier": 3.0,
        "key": bytes(32),
    }  # fmt: skip
    assert np.all(vectors[:, -1] == 1.0)


def test_cells_are_a_function_of_what_was_bought(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given the noisy moments nothing of the images is left, neither their numbers nor their means."""
    settings = replace(CELLS, splits=2)
    archives = archive_of_slopes(tmp_path / "a.zip"), archive_of_slopes(tmp_path / "b.zip", steep=True)
    central = central_images(archives[0], settings, num_classes=0, key=bytes(32))
    central = with_covariances(central, archives[0], settings, key=bytes(32))
    split = split_classes(central, settings)
    moments = np.stack([np.diag(np.append(np.full(64, cell + 1.0), 40.0 * 60 * cell)) for cell in range(4)])
    monkeypatch.setattr(central_model, "noisy_class_covariances", lambda *_, **__: moments)
    first, second = (with_cells(central, split, archive, settings, key=bytes(32)) for archive in archives)
    for name in ("means", "labels", "factors", "shares", "class_sizes"):
        assert np.array_equal(getattr(first, name), getattr(second, name))
    assert np.allclose(first.shares if first.shares is not None else 0, np.arange(4) / 6)


def test_what_cells_hold_stands_out_from_their_noise(tmp_path: Path) -> None:
    """Of cells without images nothing is drawn but their class, and noise makes no directions."""
    settings = replace(CELLS, splits=1, covariance_clipping_norm=1.0, cell_noise_multiplier=2.0)
    archive = archive_of_lines(tmp_path / "a.zip")
    central = with_covariances(
        central_images(archive, CELLS, num_classes=2, key=bytes(32)), archive, CELLS, key=bytes(32)
    )
    assert central.factors is not None
    split = split_classes(central, settings)
    away = replace(split, cell_centres=np.ones_like(split.cell_centres))  # all are far from there, and clipped
    for key in range(10):
        found = with_cells(central, away, archive, settings, key=bytes([key]) * 32)
        assert found.factors is not None
        assert np.array_equal(found.factors, central.factors[found.labels])  # no direction of their own stands out
    empty = replace(split, directions=0 * split.directions)  # all images are in each class's first cell
    for key in range(10):
        found = with_cells(central, empty, archive, settings, key=bytes([key]) * 32)
        assert np.array_equal(found.means[[1, 3]], split.centres)
        assert found.shares is not None
        assert found.shares[[0, 2]].min() > 0.85


def test_a_split_does_not_depend_on_which_way_a_direction_was_found(tmp_path: Path) -> None:
    archive = archive_of_slopes(tmp_path / "a.zip")
    settings = replace(CELLS, splits=2)
    central = central_images(archive, settings, num_classes=0, key=bytes(32))
    central = with_covariances(central, archive, settings, key=bytes(32))
    assert central.factors is not None
    opposite = replace(central, factors=-central.factors)
    assert split_classes(central, settings).digest() == split_classes(opposite, settings).digest()


def test_cells_of_colour_images(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    with ArchiveWriter(tmp_path / "a.zip") as writer:
        for index in range(200):
            image = np.full((3, 6, 6), 100, np.uint8)
            image[index % 3] += np.uint8(100 * random.random())
            writer.add(image, None)
    archive = ImageArchive(tmp_path / "a.zip")
    settings = replace(CELLS, splits=2, covariance_side=3)
    central = with_two_cells(archive, settings, num_classes=0)
    assert central.means.shape == (4, 3, 6, 6)
    assert central.factors is not None
    assert central.factors.shape == (4, 3, 3, 3, 3)
    draw = sampler(central, torch.Generator().manual_seed(0), torch.device("cpu"))
    cells = draw_cells(central, torch.zeros(3000, dtype=torch.int64), torch.Generator().manual_seed(1))
    drawn = (draw(cells).numpy() + 1) / 2 * 255
    real = archive.read(np.arange(200))
    assert np.allclose(drawn.mean((0, 2, 3)), real.mean((0, 2, 3)), atol=2)
    assert np.allclose(drawn.std(0).mean((1, 2)), real.std(0).mean((1, 2)), rtol=0.15)


def test_more_splits_or_cells_than_there_can_be_are_refused_before_anything_is_bought(tmp_path: Path) -> None:
    archive = archive_of_lines(tmp_path / "a.zip")
    settings = replace(CELLS, enabled=True, covariance_rank=10, splits=5)
    with pytest.raises(InputError, match=r"train.warmup.splits <= 4, the numbers .*, got 5: lower it, or raise"):
        check_covariances(replace(settings, covariance_side=2), archive, 2)
    check_covariances(settings, archive, 2)
    with pytest.raises(InputError, match=r"in all central cells, got \d+: lower train.warmup.splits or"):
        check_covariances(replace(settings, splits=10), archive, 2)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        (["splits=1"], "both train.warmup.splits and train.warmup.cell_noise_multiplier, or neither, got 1 and null"),
        (["cell_noise_multiplier=3"], "or neither, got 0 and 3"),
        (["splits=1", "cell_noise_multiplier=3", "covariance_noise_multiplier=null"], "splits=0 without covariances"),
        (["splits=1", "cell_noise_multiplier=3", "means_per_class=2"], "several means per class, got 1"),
        (["splits=11", "cell_noise_multiplier=3"], "splits <= 10 and <= train.warmup.covariance_rank, got 11"),
        (["splits=2", "cell_noise_multiplier=3", "covariance_rank=1"], "covariance_rank, got 2"),
        (["splits=1", "cell_noise_multiplier=0"], "train.warmup.cell_noise_multiplier > 0"),
    ],
)
def test_splits_that_cannot_be_are_refused(keys: list[str], expected: str) -> None:
    with pytest.raises(InputError, match=re.escape(expected)):
        config.load([], [f"train.warmup.{key}" for key in ("covariance_noise_multiplier=3", *keys)])
