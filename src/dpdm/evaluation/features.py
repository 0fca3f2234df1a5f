"""Named feature extractors for the Frechet distance, and the variance of pixels within a class.

A distance means nothing without its extractor: ``Extractor`` carries the name to show beside the number.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from dpdm.errors import InputError

CLASSIFIER_NAME = "64 features of a classifier trained on the real training images (outside the guarantee)"
FEATURE_DIMENSION = 64
MAX_CLASSIFIER_SIDE = 32  # larger images are averaged down, so that the time does not grow with the resolution
MAX_PIXEL_SIDE = 8
TRAIN_BATCH = 128
TRAIN_EPOCHS = 40
MAX_TRAIN_STEPS = 2000
LEARNING_RATE = 2e-3
CHUNK = 1024


@dataclass(frozen=True, eq=False)
class Extractor:
    """Turns images into features: a module from (B, C, H, W) uint8 to (B, dimension).

    Attributes:
        name: to show beside every number that was computed with it.
        batch_size: images that the module gets at a time.
        one_thread: whether to compute on one thread of the CPU.
        class_weights: (K, dimension) such that softmax(features class_weights^T) are class probabilities, or None.
    """

    name: str
    dimension: int
    image_shape: tuple[int, int, int]
    module: nn.Module
    device: torch.device
    batch_size: int = CHUNK
    one_thread: bool = True
    class_weights: np.ndarray | None = None


class UnitPixels(nn.Module):
    """From uint8 to float32 in [0, 1]."""

    def forward(self, images: Tensor) -> Tensor:
        return images.float() / 255


def train_feature_extractor(
    images: np.ndarray,
    labels: np.ndarray,
    *,
    num_classes: int,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Extractor:
    """Trains a small convolutional classifier and returns its penultimate layer.

    It learns from private images without noise: what it computes is outside the guarantee, as its name says.
    The same seed gives the same extractor on the same kind of CPU, whatever its number of cores.

    Args:
        images: (N, C, H, W) uint8, N >= 1.
        labels: (N,) integers in [0, num_classes).
        num_classes: at least 2.
        seed: of the initialisation and the order of the images.
        device: where to train and extract.

    Returns:
        An extractor of 64 features, after at most 2,000 steps of 128 images.

    Raises:
        InputError: if shapes, types or labels do not fit.
    """
    _check_images(images)
    _check_labels(labels, len(images))
    if num_classes < 2:
        raise InputError(
            f"Expected num_classes >= 2, got {num_classes}: use pixel_extractor for images of a single class."
        )
    if labels.min() < 0 or labels.max() >= num_classes:
        raise InputError(
            f"Expected labels in [0, {num_classes}), got {labels.min()} to {labels.max()}: number the classes from 0."
        )
    device = torch.device(device)
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):  # layers draw weights when made; they are drawn again below
        features = _convolutional_features(images.shape[1], min(MAX_CLASSIFIER_SIDE, *images.shape[2:]))
        head = nn.Linear(FEATURE_DIMENSION, num_classes)
    _initialise(nn.Sequential(features, head), generator)
    with _one_thread():
        _fit(nn.Sequential(features, head).to(device), images, labels, generator, device)
    shape = (images.shape[1], images.shape[2], images.shape[3])
    return Extractor(CLASSIFIER_NAME, FEATURE_DIMENSION, shape, features.eval(), device)


def pixel_extractor(resolution: int, channels: int) -> Extractor:
    """Returns an extractor of average-pooled pixels, for images without labels; it learns nothing from data.

    Args:
        resolution: height and width of the images.
        channels: 1 or 3.

    Returns:
        An extractor of channels * min(8, resolution)^2 features in [0, 1].

    Raises:
        InputError: if a number is not positive.
    """
    if resolution < 1 or channels < 1:
        raise InputError(
            f"Expected resolution >= 1 and channels >= 1, got {resolution} and {channels}: give the images' own size."
        )
    side = min(MAX_PIXEL_SIDE, resolution)
    module = nn.Sequential(UnitPixels(), nn.AdaptiveAvgPool2d(side), nn.Flatten())
    name = f"pixels averaged to {side}x{side}"
    return Extractor(name, channels * side**2, (channels, resolution, resolution), module, torch.device("cpu"))


def extract(extractor: Extractor, images: np.ndarray) -> np.ndarray:
    """Returns the features of images, computed in float32 in chunks.

    Args:
        extractor: from ``train_feature_extractor``, ``pixel_extractor`` or ``dpdm.evaluation.inception``.
        images: (N, C, H, W) uint8 of the extractor's own shape, N >= 1.

    Returns:
        (N, extractor.dimension) float64.

    Raises:
        InputError: if the images are not uint8 or of another shape.
    """
    _check_images(images)
    if images.shape[1:] != extractor.image_shape:
        raise InputError(
            f"Expected images of shape {extractor.image_shape}, got {images.shape[1:]}: "
            "compare images of one size and number of channels."
        )
    features = np.empty((len(images), extractor.dimension))
    size = extractor.batch_size
    with torch.no_grad(), _one_thread() if extractor.one_thread else nullcontext():
        for start in range(0, len(images), size):
            batch = image_tensor(images[start : start + size], extractor.device)
            features[start : start + size] = extractor.module(batch).double().cpu().numpy()
    return features


def image_tensor(images: np.ndarray, device: torch.device) -> Tensor:
    """Returns a fresh tensor of an array: the array's strides would choose other kernels, which round otherwise."""
    return torch.empty(images.shape, dtype=torch.uint8, device=device).copy_(torch.tensor(np.ascontiguousarray(images)))


def within_class_variance(images: np.ndarray, labels: np.ndarray | None = None) -> float:
    """Returns how much images of one class differ: the pixel variance inside a class, averaged.

    The squared distances of pixels, in [0, 1], from their class's mean, added up and divided by N less the number of
    classes, so that few images do not look more alike than many. Sums are taken in integers and are exact.

    Args:
        images: (N, C, H, W) uint8, N >= 1.
        labels: (N,) integers; None treats all images as one class, which gives their total variance.

    Returns:
        A number in [0, 0.5]; 0 if no class has two images.

    Raises:
        InputError: if shapes or types do not fit.
    """
    _check_images(images)
    if labels is None:
        labels = np.zeros(len(images), dtype=np.int64)
    _check_labels(labels, len(images))
    squares = 0.0  # sum over classes of the sum of squared deviations from the class's mean image
    classes = np.unique(labels)
    for label in classes:
        index = np.flatnonzero(labels == label)
        total = np.zeros(images.shape[1:], dtype=np.int64)
        total_squares = np.zeros(images.shape[1:], dtype=np.int64)
        for chunk in _chunks(images, index):
            total += chunk.sum(axis=0)
            total_squares += (chunk**2).sum(axis=0)
        squares += float((total_squares - total**2 / len(index)).sum())
    free = len(images) - len(classes)
    return squares / (free * images[0].size * 255.0**2) if free else 0.0


def _convolutional_features(channels: int, side: int) -> nn.Sequential:
    """Three convolutions and a linear layer; ``ceil_mode`` keeps images down to 1x1 alive."""
    return nn.Sequential(
        UnitPixels(),
        nn.AdaptiveAvgPool2d(side),
        nn.Conv2d(channels, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2, ceil_mode=True),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2, ceil_mode=True),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * 4, FEATURE_DIMENSION),
        nn.ReLU(),
    )


def _initialise(network: nn.Module, generator: torch.Generator) -> None:
    """Draws the weights from ``generator``: torch's own initialisation would move the global random state."""
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            fan_in = layer.weight[0].numel()
            with torch.no_grad():
                layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator) * math.sqrt(2 / fan_in))
                if layer.bias is not None:
                    layer.bias.zero_()


@contextmanager
def _one_thread() -> Iterator[None]:
    """Keeps torch to one thread: sums do not depend on the cores, and so small a network gains little.

    On a busy machine two threads that wait for each other were 20 times slower.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _fit(
    classifier: nn.Module,
    images: np.ndarray,
    labels: np.ndarray,
    generator: torch.Generator,
    device: torch.device,
) -> None:
    batches_per_epoch = math.ceil(len(images) / TRAIN_BATCH)
    num_steps = min(MAX_TRAIN_STEPS, TRAIN_EPOCHS * batches_per_epoch)
    optimizer = torch.optim.Adam(classifier.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    order = np.empty(0, dtype=np.int64)
    for _ in range(num_steps):
        if len(order) == 0:
            order = torch.randperm(len(images), generator=generator).numpy()
        # Sorted, because a set that streams from the disk is read faster in order.
        batch, order = np.sort(order[:TRAIN_BATCH]), order[TRAIN_BATCH:]
        target = torch.from_numpy(labels[batch].astype(np.int64)).to(device)
        loss = nn.functional.cross_entropy(classifier(image_tensor(images[batch], device)), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def _chunks(images: np.ndarray, index: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(index), CHUNK):
        yield images[index[start : start + CHUNK]].astype(np.int64)


def _check_images(images: np.ndarray) -> None:
    if images.ndim != 4 or images.dtype != np.uint8 or images.size == 0:
        raise InputError(
            f"Expected images (N, C, H, W) uint8 with N >= 1, got {images.shape} {images.dtype}: "
            "pass pixels from 0 to 255."
        )


def _check_labels(labels: np.ndarray, num_images: int) -> None:
    if labels.shape != (num_images,) or not np.issubdtype(labels.dtype, np.integer):
        raise InputError(
            f"Expected labels ({num_images},) of an integer type, got {labels.shape} {labels.dtype}: "
            "give one class number per image."
        )
