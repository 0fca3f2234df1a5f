"""Downstream classifiers by two published protocols: trained on synthetic images, tested once on real ones.

``train_classifier`` sees one set of images, holds a part of them out and keeps the weights of the epoch that does best
on that part. It has no access to the real test set, which ``accuracy_on_test`` alone reads, when the choice is made:
choosing on real images would break privacy and flatter the number. Trained on real images instead, the same function
gives the baseline. That, and every accuracy on a real test set, is outside the guarantee.

Sources of the numbers in ``RECIPES``: for the paper, Dockhorn et al. 2022, arXiv 2210.09929 (60,000 images, 50 epochs);
for the benchmark, the public evaluator of FETA-Pro (2019ChenGong/Feta-Pro, commit 0239ead, with DPImageBench's
networks): ``wrn-40-4`` for MNIST and the like, ``wrn-28-10`` for CIFAR-10. Neither augments. Ours: how many images
are held out when there are not 60,000; that the paper's epoch, too, is the last of equals; that a run of fewer epochs
lowers its learning rate after the same share of them; and that a last batch of a single image is left out.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from dpdm.errors import InputError
from dpdm.evaluation.classifier_networks import (
    Shape,
    convolutional,
    logistic_regression,
    perceptron,
    wide_resnet,
)
from dpdm.evaluation.features import image_tensor
from dpdm.progress import Progress

MAX_HELD_OUT = 5000
HELD_OUT_SHARE = 12  # one in twelve: 5,000 of 60,000
DECAY = 0.2
CHUNK = 256  # images in one forward pass without gradients


@dataclass(frozen=True)
class Recipe:
    """How one classifier is made and trained; ``decay_after`` is a share of the epochs, over and over."""

    protocol: str
    network: Callable[[Shape, int, torch.Generator, torch.Generator], nn.Module]
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
    num_train: int
    epochs: int
    batch_size: int
    decay_after: float = 1.0
    ema_rate: float | None = None


_paper = partial(
    Recipe,
    "paper (Dockhorn et al. 2022)",
    optimizer=partial(torch.optim.Adam, lr=3e-4),
    num_train=60_000,
    epochs=50,
    batch_size=128,
)
_benchmark = partial(Recipe, "benchmark (FETA-Pro)", num_train=55_000, ema_rate=0.9999)

RECIPES: dict[str, Recipe] = {
    "logreg": _paper(logistic_regression),
    "mlp": _paper(perceptron),
    "cnn": _paper(convolutional),
    "wrn-40-4": _benchmark(
        partial(wide_resnet, depth=40, widen_factor=4),
        optimizer=partial(torch.optim.Adam, lr=0.01),
        epochs=50,
        batch_size=256,
        decay_after=0.4,
    ),
    "wrn-28-10": _benchmark(
        partial(wide_resnet, depth=28, widen_factor=10),
        optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=5e-4),
        epochs=200,
        batch_size=126,
        decay_after=0.3,
    ),
}
PROTOCOLS: dict[str, tuple[str, ...]] = {
    "paper": ("logreg", "mlp", "cnn"),
    "wrn": ("wrn-40-4",),
    "wrn-cifar": ("wrn-28-10",),
}


@dataclass(frozen=True)
class Training:
    """How a classifier came about; ``validation_accuracies``, on the held-out images, has one number per epoch."""

    classifier: str
    protocol: str
    source: str
    epochs: int
    chosen_epoch: int  # counted from 1
    num_train: int
    num_validation: int
    validation_accuracy: float
    validation_accuracies: tuple[float, ...]
    seed: int
    note: str


@dataclass(frozen=True, eq=False)
class TrainedClassifier:
    """A network on its device, with the weights of the chosen epoch.

    It, and the figures in ``training``, are outside the guarantee if the source is real.
    """

    network: nn.Module
    device: torch.device
    image_shape: Shape
    num_classes: int
    training: Training


@dataclass(frozen=True)
class ClassifierAccuracy:
    """A share of real test images that were classified rightly: without noise, so outside the guarantee."""

    value: float
    num_test: int
    training: Training


def train_classifier(
    name: str,
    images: np.ndarray,
    labels: np.ndarray | None,
    *,
    num_classes: int,
    source: Literal["synthetic", "real"] = "synthetic",
    seed: int = 0,
    device: torch.device | str = "cpu",
    epochs: int | None = None,
    num_train: int | None = None,
) -> TrainedClassifier:
    """Trains a classifier and keeps the weights of the epoch that is best on held-out images of the same set.

    Of equally good epochs the last is kept. The same seed gives the same classifier on the same kind of CPU with the
    same number of threads. The global random state stays as it was.

    Args:
        name: a key of ``RECIPES``.
        images: (N, C, H, W) uint8, N >= 3; one in twelve, at most 5,000, is held out.
        labels: (N,) integers in [0, num_classes), of at least two classes.
        num_classes: how many classes there are, whether or not all of them occur.
        source: what the images are, for the record alone.
        seed: of the split, the first weights, the order of the images and dropout.
        device: where to train.
        epochs: None for the recipe's own number.
        num_train: how many images to train on; None for the recipe's own number, or all that are not held out if they
            are fewer.

    Raises:
        InputError: if the name is unknown, or shapes, labels or numbers do not fit.
    """
    recipe = _recipe(name)
    labels = _check_set("training", images, labels, num_classes)
    if num_classes < 2 or len(np.unique(labels)) < 2:
        raise InputError(
            f"Expected training labels of at least two classes, got {np.unique(labels).tolist()} of {num_classes}: "
            "a classifier needs something to tell apart."
        )
    epochs = recipe.epochs if epochs is None else epochs
    if epochs < 1:
        raise InputError(f"Expected epochs >= 1, got {epochs}: train at least once over the images.")
    generator = torch.Generator().manual_seed(seed)
    train, held_out = split(len(images), recipe.num_train, num_train, generator)
    shape = (images.shape[1], images.shape[2], images.shape[3])
    fit = _Fit(recipe, shape, num_classes, epochs, generator, torch.device(device))
    with Progress(f"Training {name}", epochs * len(train), unit="images") as progress:
        for _ in range(epochs):
            fit.one_epoch(images, labels, train, progress)
            fit.validate(images[held_out], labels[held_out])
    training = Training(
        classifier=name,
        protocol=recipe.protocol,
        source=source,
        epochs=epochs,
        chosen_epoch=fit.chosen_epoch,
        num_train=len(train),
        num_validation=len(held_out),
        validation_accuracy=fit.accuracies[fit.chosen_epoch - 1],
        validation_accuracies=tuple(fit.accuracies),
        seed=seed,
        note=_note(recipe, epochs, len(train)),
    )
    return TrainedClassifier(fit.chosen_network(), fit.device, shape, num_classes, training)


def accuracy_on_test(trained: TrainedClassifier, images: np.ndarray, labels: np.ndarray | None) -> ClassifierAccuracy:
    """Reads the real test set, once, with a classifier whose epoch is chosen already.

    Args:
        trained: from ``train_classifier``.
        images: (N, C, H, W) uint8 of the training images' shape, N >= 1.
        labels: (N,) integers, numbered as in training.

    Raises:
        InputError: if shapes or labels do not fit.
    """
    labels = _check_set("test", images, labels, trained.num_classes)
    if images.shape[1:] != trained.image_shape:
        raise InputError(
            f"Expected test images of shape {trained.image_shape}, got {images.shape[1:]}: "
            "train and test on images of one size."
        )
    value = _accuracy(trained.network, images, labels, trained.device)
    return ClassifierAccuracy(value, len(images), trained.training)


def split(count: int, most: int, wanted: int | None, generator: torch.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Returns the rows to train on and those held out to choose the epoch, disjoint and at random.

    Args:
        count: how many images there are.
        most: the recipe's number of training images.
        wanted: the caller's own number instead, or None.
        generator: on the CPU.

    Raises:
        InputError: if there are too few images, or too few for ``wanted``.
    """
    num_held_out = min(MAX_HELD_OUT, max(1, count // HELD_OUT_SHARE))
    available = count - num_held_out
    if available < 2:
        raise InputError(f"Expected at least 3 training images, got {count}: one of them is held out.")
    if wanted is not None and not 2 <= wanted <= available:
        raise InputError(
            f"Expected num_train in [2, {available}], got {wanted}: of {count} images {num_held_out} are held out to "
            "choose the epoch; give more images, or train on fewer."
        )
    order = torch.randperm(count, generator=generator).numpy()
    return order[num_held_out:][: most if wanted is None else wanted], order[:num_held_out]


class _Fit:
    """One training in progress: the network, its average if the recipe has one, and the best weights so far."""

    def __init__(
        self,
        recipe: Recipe,
        shape: Shape,
        num_classes: int,
        epochs: int,
        generator: torch.Generator,
        device: torch.device,
    ) -> None:
        self.recipe, self.generator, self.device = recipe, generator, device
        weights, masks = (int(s) for s in torch.randint(2**62, (2,), generator=generator))

        def build() -> nn.Module:
            with torch.random.fork_rng(devices=[]):
                start = torch.Generator().manual_seed(weights)
                network = recipe.network(shape, num_classes, start, torch.Generator(device).manual_seed(masks))
            return network.to(device)

        self.network = build()
        self.shown = self.network if recipe.ema_rate is None else build()  # what is validated and kept
        self.optimizer = recipe.optimizer(self.network.parameters())
        decay_every = max(1, round(recipe.decay_after * epochs))
        self.schedule = torch.optim.lr_scheduler.StepLR(self.optimizer, decay_every, DECAY)
        self.num_updates = 0
        self.chosen_epoch = 0
        self.accuracies: list[float] = []
        self._best: dict[str, Tensor] = {}

    def one_epoch(self, images: np.ndarray, labels: np.ndarray, rows: np.ndarray, progress: Progress) -> None:
        """Goes once over ``rows`` in a new order and then lowers the learning rate if it is due."""
        self.network.train()
        order = rows[torch.randperm(len(rows), generator=self.generator).numpy()]
        for start in range(0, len(order), self.recipe.batch_size):
            batch = order[start : start + self.recipe.batch_size]
            if len(batch) > 1:  # batch norm cannot take a last batch of one image
                target = torch.from_numpy(labels[batch]).to(self.device)
                loss = nn.functional.cross_entropy(self.network(_to_pixels(images[batch], self.device)), target)
                self.optimizer.zero_grad()
                loss.backward()
                self.optimizer.step()
                self._average()
            progress.advance(len(batch))
        self.schedule.step()

    def validate(self, images: np.ndarray, labels: np.ndarray) -> None:
        """Keeps the weights if no epoch so far was better on these images."""
        for kept, current in zip(self.shown.buffers(), self.network.buffers(), strict=True):
            kept.copy_(current)  # batch norm's statistics are not averaged
        self.accuracies.append(_accuracy(self.shown, images, labels, self.device))
        if self.accuracies[-1] >= max(self.accuracies):
            self.chosen_epoch = len(self.accuracies)
            self._best = {name: value.clone() for name, value in self.shown.state_dict().items()}

    def chosen_network(self) -> nn.Module:
        self.shown.load_state_dict(self._best)
        return self.shown.eval()

    @torch.no_grad()
    def _average(self) -> None:
        """Moves the average of the weights, with the rate min(rate, (1 + n) / (10 + n)) after n updates."""
        if self.recipe.ema_rate is None:
            return
        self.num_updates += 1
        rate = min(self.recipe.ema_rate, (1 + self.num_updates) / (10 + self.num_updates))
        for average, current in zip(self.shown.parameters(), self.network.parameters(), strict=True):
            average.lerp_(current, 1 - rate)


@torch.no_grad()
def _accuracy(network: nn.Module, images: np.ndarray, labels: np.ndarray, device: torch.device) -> float:
    network.eval()
    right = 0
    for start in range(0, len(images), CHUNK):
        scores = network(_to_pixels(images[start : start + CHUNK], device))
        right += int(np.sum(scores.argmax(1).cpu().numpy() == labels[start : start + CHUNK]))
    return right / len(images)


def _to_pixels(images: np.ndarray, device: torch.device) -> Tensor:
    return image_tensor(images, device).float() / 127.5 - 1


def _note(recipe: Recipe, epochs: int, num_train: int) -> str:
    """Says where a training was not the recipe's own."""
    notes = []
    if epochs != recipe.epochs:
        notes.append(f"{epochs} epochs (the protocol has {recipe.epochs})")
    if num_train != recipe.num_train:
        notes.append(f"{num_train:,} training images (the protocol has {recipe.num_train:,})")
    return "; ".join(notes)


def _recipe(name: str) -> Recipe:
    if name not in RECIPES:
        raise InputError(f"Expected a classifier of {', '.join(RECIPES)}, got {name!r}: choose one of these.")
    return RECIPES[name]


def _check_set(name: str, images: np.ndarray, labels: np.ndarray | None, num_classes: int) -> np.ndarray:
    """Returns the labels as int64."""
    if labels is None:
        raise InputError(f"Expected {name} labels, got none: classifiers need one class number per image.")
    if images.ndim != 4 or images.dtype != np.uint8 or images.size == 0:
        raise InputError(
            f"Expected {name} images (N, C, H, W) uint8 with N >= 1, got {images.shape} {images.dtype}: "
            "pass pixels from 0 to 255."
        )
    if labels.shape != (len(images),) or not np.issubdtype(labels.dtype, np.integer):
        raise InputError(
            f"Expected {name} labels ({len(images)},) of an integer type, got {labels.shape} {labels.dtype}: "
            "give one class number per image."
        )
    if labels.min() < 0 or labels.max() >= num_classes:
        raise InputError(
            f"Expected {name} labels in [0, {num_classes}), got {labels.min()} to {labels.max()}: number the classes "
            "from 0, the same in training and test."
        )
    return labels.astype(np.int64)
