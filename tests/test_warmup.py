"""The warm-up looks at nothing but noisy means and public randomness, and its distortions are what they are called."""

import numpy as np
import torch
from scipy.ndimage import gaussian_filter

from dpdm import config
from dpdm.data.archive import ArchiveWriter, ImageArchive
from dpdm.privacy.central import WarmupConfig
from dpdm.warmup import augment, central_images, gaussian_blur, train_on_central_images


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
    means, labels = central_images(ImageArchive(tmp_path / "a.zip"), quiet, num_classes=2, key=bytes(32))
    assert labels.tolist() == [0, 1]
    for label in range(2):
        assert np.allclose(means[label], pixels[label::2].mean(0) / 255, atol=1e-6)


def test_training_on_means_is_a_function_of_means_and_seed() -> None:
    overrides = ["data.resolution=8", "data.num_channels=1", "data.num_classes=2", "model.network.width=4"]
    settings = config.load([], [*overrides, "model.network.channel_multipliers=[1]", "model.network.num_res_blocks=1"])
    means = np.stack([np.full((1, 8, 8), 0.2), np.full((1, 8, 8), 0.9)])
    results = []
    for shift in (0.0, 0.0, 0.1):
        denoiser = config.build_denoiser(settings)
        ema = train_on_central_images(
            denoiser, means - shift, np.array([0, 1]), WarmupConfig(num_iterations=4), settings.loss, seed=1
        )
        results.append(torch.cat([tensor.flatten() for tensor in ema.values()]))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
