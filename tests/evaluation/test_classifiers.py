"""Downstream classifiers: sets whose answer is known, and the thinning of large ones."""

from typing import Any

import numpy as np
import pytest
from sklearn.datasets import load_digits

from dpdm.errors import InputError
from dpdm.evaluation import classifiers
from dpdm.evaluation.classifiers import evenly_per_class, logistic_regression_accuracy, majority_accuracy


def two_halves(labels: np.ndarray) -> np.ndarray:
    """Images that are bright on the left for class 0 and on the right for class 1."""
    images = np.full((len(labels), 1, 4, 4), 20, dtype=np.uint8)
    images[labels == 0, :, :, :2] = 200
    images[labels == 1, :, :, 2:] = 200
    return images


def test_digits_are_learned_and_shuffled_labels_are_not() -> None:
    bunch: Any = load_digits()
    images, labels = (bunch.images / 16 * 255).astype(np.uint8)[:, None], bunch.target
    held_out = np.arange(len(images)) % 6 == 0
    right = logistic_regression_accuracy(images[~held_out], labels[~held_out], images[held_out], labels[held_out])
    shuffled = np.random.default_rng(0).permutation(labels[~held_out])
    wrong = logistic_regression_accuracy(images[~held_out], shuffled, images[held_out], labels[held_out])
    assert right.value > 0.95
    assert wrong.value < 0.3
    assert (right.num_train, right.num_test, right.note) == (1497, 300, "")


def test_known_answer_and_a_class_that_training_lacks() -> None:
    train, test = np.array([0, 1] * 10), np.array([0, 1, 1, 2])
    result = logistic_regression_accuracy(two_halves(train), train, two_halves(test), test)
    assert result.value == pytest.approx(3 / 4)


def test_one_class_in_training_predicts_that_class() -> None:
    test = np.array([0, 1, 1, 1])
    result = logistic_regression_accuracy(two_halves(np.ones(5, int)), np.ones(5, int), two_halves(test), test)
    assert result.value == pytest.approx(3 / 4)
    assert "one class" in result.note


def test_large_sets_are_thinned_and_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(classifiers, "MAX_TRAIN_NUMBERS", 16 * 20)
    train, test = np.arange(100) % 2, np.array([0, 1])
    result = logistic_regression_accuracy(two_halves(train), train, two_halves(test), test)
    assert (result.value, result.num_train) == (1.0, 20)
    assert "20 of 100 images" in result.note


def test_a_solver_that_stops_early_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(classifiers, "MAX_ITERATIONS", 1)
    labels = np.arange(20) % 2
    assert (
        "before it converged"
        in logistic_regression_accuracy(two_halves(labels), labels, two_halves(labels), labels).note
    )


def test_thinning_keeps_the_proportions_of_labels_that_cycle() -> None:
    labels = np.arange(1000) % 10
    index = evenly_per_class(labels, 200)  # a stride of 5 would keep two classes of ten
    assert np.array_equal(np.bincount(labels[index]), np.full(10, 20))
    assert len(np.unique(index)) == 200
    assert index.max() > 900


def test_majority_is_of_training_and_counted_on_test() -> None:
    result = majority_accuracy(np.array([3, 3, 1, 0]), np.array([3, 1, 1, 1, 1]))
    assert result.value == pytest.approx(1 / 5)
    assert majority_accuracy(np.array([2, 1]), np.array([1])).value == 1


def test_refuses_sets_that_do_not_fit() -> None:
    labels = np.array([0, 1])
    images = two_halves(labels)
    with pytest.raises(InputError, match="test images"):
        logistic_regression_accuracy(images, labels, images[:0], labels[:0])
    with pytest.raises(InputError, match="one size"):
        logistic_regression_accuracy(images, labels, images[:, :, :3], labels)
    with pytest.raises(InputError, match="train images"):
        logistic_regression_accuracy(images, labels[:1], images, labels)
    with pytest.raises(InputError, match="at least one each"):
        majority_accuracy(labels[:0], labels)
