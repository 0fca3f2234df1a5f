"""How useful synthetic images are: classifiers trained on them and tested on real ones.

An accuracy on real images is computed without noise: wherever it is shown, it is outside the guarantee.
"""

import warnings
from dataclasses import dataclass

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from dpdm.errors import InputError

MAX_TRAIN_NUMBERS = 20_000_000  # images times pixels; about a minute on two CPU cores
MAX_ITERATIONS = 1000
WEIGHT_BITS = 24  # of an integer weight; with pixels of 8 bits a sum over 2^30 of them fits 63


@dataclass(frozen=True)
class Accuracy:
    """A share of test images that were classified rightly, and how it was measured."""

    value: float
    num_train: int
    num_test: int
    note: str


def logistic_regression_accuracy(
    train_images: np.ndarray, train_labels: np.ndarray, test_images: np.ndarray, test_labels: np.ndarray
) -> Accuracy:
    """Trains multinomial logistic regression on pixels in [0, 1] and returns its accuracy.

    Deterministic. More than 20 million pixels are thinned evenly within each class; one class in training
    is always predicted. The note says when either happened, or when the solver stopped early.

    Args:
        train_images, test_images: (N, C, H, W) uint8, N >= 1.
        train_labels, test_labels: (N,) integers.

    Returns:
        The accuracy in [0, 1]; ``num_train`` counts the images that were used.

    Raises:
        InputError: if a set is empty, or shapes do not fit.
    """
    _check_set("train", train_images, train_labels)
    _check_set("test", test_images, test_labels)
    if train_images.shape[1:] != test_images.shape[1:]:
        raise InputError(
            f"Expected test images of shape {train_images.shape[1:]}, got {test_images.shape[1:]}: "
            "train and test on images of one size."
        )
    if len(np.unique(train_labels)) == 1:
        majority = majority_accuracy(train_labels, test_labels)
        return Accuracy(
            majority.value, majority.num_train, majority.num_test, "one class in training: always predicted"
        )
    notes = []
    limit = MAX_TRAIN_NUMBERS // train_images[0].size
    if len(train_images) > limit:
        index = evenly_per_class(train_labels, limit)
        notes.append(f"trained on {len(index):,} of {len(train_images):,} images, taken evenly from each class")
        train_images, train_labels = train_images[index], train_labels[index]
    model = _fit(train_images, train_labels)
    if int(np.max(model.n_iter_)) >= MAX_ITERATIONS:
        notes.append(f"stopped after {MAX_ITERATIONS:,} iterations before it converged")
    value = float(np.mean(model.predict(_flat_pixels(test_images)) == test_labels))
    return Accuracy(value, len(train_images), len(test_images), "; ".join(notes))


class ExactClassifier:
    """Multinomial logistic regression whose predictions are computed in integers.

    Guarantee: what is predicted of an image is a function of the images that were learned from and of this image alone.
    In floating point it would depend, by rounding, on the images beside it.

    Args:
        images: (N, C, H, W) uint8 to learn from, N >= 1.
        labels: (N,) integers; with a single class that one is always predicted.
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray) -> None:
        _check_set("train", images, labels)
        self.classes = np.unique(labels)
        self._weights = np.zeros((images[0].size, len(self.classes)), np.int64)
        self._bias = np.zeros(len(self.classes), np.int64)
        if len(self.classes) > 1:
            index = evenly_per_class(labels, min(len(labels), max(1, MAX_TRAIN_NUMBERS // images[0].size)))
            model = _fit(images[index], labels[index])
            coefficients, bias = np.asarray(model.coef_, np.float64), np.asarray(model.intercept_, np.float64)
            if len(coefficients) == 1:  # of two classes sklearn gives the second one's logit
                coefficients, bias = np.concatenate([-coefficients, coefficients]) / 2, np.array([-1, 1]) * bias / 2
            scale = 2.0**WEIGHT_BITS / max(np.abs(coefficients).max(), np.abs(bias).max(), 1e-300)
            self._weights = np.rint(coefficients.T * scale).astype(np.int64)
            self._bias = np.rint(255 * bias * scale).astype(np.int64)

    def predict(self, images: np.ndarray) -> np.ndarray:
        """Returns the classes of (n, C, H, W) uint8 images, (n,); of equally likely ones the first."""
        logits = images.reshape(len(images), -1).astype(np.int64) @ self._weights + self._bias
        return self.classes[logits.argmax(axis=1)]


def majority_accuracy(train_labels: np.ndarray, test_labels: np.ndarray) -> Accuracy:
    """Returns the accuracy of always predicting the most frequent training class (of equals, the smallest).

    Args:
        train_labels, test_labels: (N,) integers, N >= 1.

    Raises:
        InputError: if a set is empty.
    """
    if len(train_labels) == 0 or len(test_labels) == 0:
        raise InputError(
            f"Expected labels to train and test on, got {len(train_labels)} and {len(test_labels)}: "
            "give at least one each."
        )
    classes, counts = np.unique(train_labels, return_counts=True)
    value = float(np.mean(test_labels == classes[np.argmax(counts)]))
    return Accuracy(value, len(train_labels), len(test_labels), "most frequent class, always predicted")


def evenly_per_class(labels: np.ndarray, limit: int) -> np.ndarray:
    """Returns about ``limit`` sorted indices, spread evenly inside every class, at least one of each.

    A plain stride would not do: labels that cycle through the classes lose whole classes to it.
    """
    picked = []
    for label in np.unique(labels):
        index = np.flatnonzero(labels == label)
        count = max(1, len(index) * limit // len(labels))
        picked.append(index[np.arange(count) * len(index) // count])
    return np.sort(np.concatenate(picked))


def _fit(images: np.ndarray, labels: np.ndarray) -> LogisticRegression:
    model = LogisticRegression(max_iter=MAX_ITERATIONS)
    with warnings.catch_warnings():
        # Said in a note instead, where the reader of the number sees it.
        warnings.simplefilter("ignore", ConvergenceWarning)
        return model.fit(_flat_pixels(images), labels)


def _flat_pixels(images: np.ndarray) -> np.ndarray:
    return images.reshape(len(images), -1).astype(np.float32) / 255


def _check_set(name: str, images: np.ndarray, labels: np.ndarray) -> None:
    if images.ndim != 4 or images.dtype != np.uint8 or images.size == 0 or labels.shape != (len(images),):
        raise InputError(
            f"Expected {name} images (N, C, H, W) uint8 with N >= 1 and labels (N,), got {images.shape} "
            f"{images.dtype} and {labels.shape}: give one class number per image."
        )
