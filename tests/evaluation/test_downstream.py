"""Downstream classifiers: what they learn, which images choose the epoch, and that the test set has no part in it."""

import inspect
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from dpdm.errors import InputError
from dpdm.evaluation.classifier_networks import perceptron, wide_resnet
from dpdm.evaluation.downstream import (
    PROTOCOLS,
    RECIPES,
    TrainedClassifier,
    accuracy_on_test,
    split,
    train_classifier,
)


@pytest.fixture(scope="module")
def digits() -> tuple[np.ndarray, np.ndarray]:
    """Returns 1,797 real digits, (N, 1, 8, 8) uint8, and their labels."""
    bunch: Any = load_digits()
    return (bunch.images / 16 * 255).astype(np.uint8)[:, None], bunch.target


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Adds the benchmark's recipes with small networks."""
    network = partial(wide_resnet, depth=10, widen_factor=1)
    monkeypatch.setitem(RECIPES, "small-wrn", replace(RECIPES["wrn-40-4"], network=network))
    monkeypatch.setitem(RECIPES, "small-wrn-cifar", replace(RECIPES["wrn-28-10"], network=network))


def weights(trained: TrainedClassifier) -> torch.Tensor:
    return torch.cat([v.double().reshape(-1) for v in trained.network.state_dict().values()])


def record(monkeypatch: pytest.MonkeyPatch, name: str) -> list[tuple[float, torch.Tensor]]:
    """Lets a recipe's optimizer keep the learning rate of each step and the weights after it; first those before."""
    steps: list[tuple[float, torch.Tensor]] = []
    make = RECIPES[name].optimizer

    def recording(parameters: Any) -> torch.optim.Optimizer:
        kept = list(parameters)
        optimizer = make(kept)

        def keep(*_: Any) -> None:
            vector = nn.utils.parameters_to_vector(kept).detach().double()
            steps.append((optimizer.param_groups[0]["lr"], vector))

        keep()
        optimizer.register_step_post_hook(keep)
        return optimizer

    monkeypatch.setitem(RECIPES, name, replace(RECIPES[name], optimizer=recording))
    return steps


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("name", "epochs", "least"),
    [("logreg", 20, 0.6), ("mlp", 20, 0.85), ("cnn", 8, 0.45), ("small-wrn", 4, 0.85), ("small-wrn-cifar", 3, 0.6)],
)
def test_digits_are_learned(digits: Any, name: str, epochs: int, least: float) -> None:
    images, labels = digits
    held_out = np.arange(len(images)) % 6 == 0
    trained = train_classifier(name, images[~held_out], labels[~held_out], num_classes=10, epochs=epochs)
    result = accuracy_on_test(trained, images[held_out], labels[held_out])
    assert result.value > least  # without training: 0.1
    assert abs(result.value - trained.training.validation_accuracy) < 0.15
    assert (result.num_test, trained.training.num_train, trained.training.num_validation) == (300, 1373, 124)


def test_the_recipes_are_those_of_the_facts() -> None:
    linear = nn.Linear(1, 1)
    for names, epochs, num_train in (
        (PROTOCOLS["paper"], 50, 60_000),
        (PROTOCOLS["wrn"], 50, 55_000),
        (PROTOCOLS["wrn-cifar"], 200, 55_000),
    ):
        assert {(RECIPES[n].epochs, RECIPES[n].num_train) for n in names} == {(epochs, num_train)}
    assert set(RECIPES) == {name for names in PROTOCOLS.values() for name in names}
    optimizers = {name: recipe.optimizer(linear.parameters()) for name, recipe in RECIPES.items()}
    kinds = {
        name: (type(o).__name__, o.defaults["lr"], o.defaults.get("momentum"), o.defaults["weight_decay"])
        for name, o in optimizers.items()
    }
    assert all(kinds[name] == ("Adam", 3e-4, None, 0) for name in PROTOCOLS["paper"])
    assert kinds["wrn-40-4"] == ("Adam", 0.01, None, 0)
    assert kinds["wrn-28-10"] == ("SGD", 0.1, 0.9, 5e-4)
    assert [RECIPES[n].batch_size for n in ("logreg", "mlp", "cnn", "wrn-40-4", "wrn-28-10")] == [128] * 3 + [256, 126]


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("name", "epochs", "rates"),
    [
        ("mlp", 3, [3e-4] * 3),
        ("small-wrn", 5, [0.01, 0.01, 0.002, 0.002, 0.0004]),
        ("small-wrn-cifar", 10, [0.1] * 3 + [0.02] * 3 + [0.004] * 3 + [0.0008]),
    ],
)
def test_learning_rates(monkeypatch: pytest.MonkeyPatch, digits: Any, name: str, epochs: int, rates: Any) -> None:
    """Of 50 epochs the rate falls after 20 and 40, of 200 after 60, 120 and 180; of fewer in proportion."""
    steps = record(monkeypatch, name)
    train_classifier(name, digits[0][:60], digits[1][:60], num_classes=10, epochs=epochs)
    assert [rate for rate, _ in steps[1:]] == pytest.approx(rates)
    assert (round(0.4 * 50), round(0.3 * 200)) == (20, 60)


@pytest.mark.usefixtures("small")
def test_every_image_is_seen_once_per_epoch_in_batches_of_the_recipe(digits: Any, monkeypatch: Any) -> None:
    seen: list[np.ndarray] = []

    class Spy(nn.Module):
        def __init__(self, network: nn.Module) -> None:
            super().__init__()
            self.network = network

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.training:
                seen.append(x.numpy().copy())
            return self.network(x)

    monkeypatch.setitem(RECIPES, "mlp", replace(RECIPES["mlp"], network=lambda *a: Spy(perceptron(*a))))
    images, labels = digits[0][:400], digits[1][:400]
    train_classifier("mlp", images, labels, num_classes=10, epochs=2)
    train, _ = split(400, 60_000, None, torch.Generator().manual_seed(0))
    assert [len(batch) for batch in seen] == [128, 128, 111] * 2
    expected = np.sort((images[train].astype(np.float32) / 127.5 - 1).reshape(367, -1), axis=0)
    assert expected.min() == -1
    assert expected.max() == 1
    for epoch in (seen[:3], seen[3:]):
        assert np.allclose(np.sort(np.concatenate(epoch).reshape(367, -1), axis=0), expected, atol=1e-6)
    assert not np.array_equal(seen[0], seen[3])


@pytest.mark.usefixtures("small")
def test_the_average_of_the_weights_against_a_loop(monkeypatch: pytest.MonkeyPatch, digits: Any) -> None:
    steps = record(monkeypatch, "small-wrn")
    trained = train_classifier("small-wrn", *digits, num_classes=10, epochs=1, num_train=700)
    (_, average), *after = steps
    assert len(after) == 3
    for n, (_, current) in enumerate(after, start=1):
        rate = min(0.9999, (1 + n) / (10 + n))
        average = rate * average + (1 - rate) * current
    torch.testing.assert_close(
        nn.utils.parameters_to_vector(trained.network.parameters()).double(), average, rtol=1e-5, atol=1e-6
    )


def test_the_epoch_is_chosen_on_images_that_were_held_out(digits: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Labels at random can be learned by heart; held-out images alone show that nothing was learned."""
    monkeypatch.setitem(RECIPES, "mlp", replace(RECIPES["mlp"], optimizer=partial(torch.optim.Adam, lr=0.01)))
    images, labels = digits[0][:600], np.random.default_rng(0).integers(0, 10, 600)
    trained = train_classifier("mlp", images, labels, num_classes=10, epochs=40)
    train, held_out = split(600, 60_000, None, torch.Generator().manual_seed(0))
    accuracies = trained.training.validation_accuracies
    assert max(accuracies) < 0.4
    assert trained.training.chosen_epoch == max(e for e, a in enumerate(accuracies, 1) if a == max(accuracies)) < 40
    assert accuracy_on_test(trained, images[held_out], labels[held_out]).value == trained.training.validation_accuracy
    assert accuracies[trained.training.chosen_epoch - 1] == trained.training.validation_accuracy == max(accuracies)
    stopped = train_classifier("mlp", images, labels, num_classes=10, epochs=trained.training.chosen_epoch)
    assert torch.equal(weights(stopped), weights(trained))
    longer = train_classifier("mlp", images[train], labels[train], num_classes=10, epochs=40)
    assert accuracy_on_test(longer, images[train], labels[train]).value > 0.5  # what choosing on these would report


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("name", ["mlp", "small-wrn"])
def test_held_out_images_do_not_train(digits: Any, name: str) -> None:
    images, labels = digits[0][:300], digits[1][:300]
    _, held_out = split(300, 60_000, None, torch.Generator().manual_seed(0))
    one = train_classifier(name, images, labels, num_classes=10, epochs=1)
    images, labels = images.copy(), labels.copy()
    images[held_out], labels[held_out] = 255 - images[held_out], (labels[held_out] + 1) % 10
    other = train_classifier(name, images, labels, num_classes=10, epochs=1)
    assert torch.equal(weights(one), weights(other))
    assert one.training.validation_accuracies != other.training.validation_accuracies


def test_choosing_on_the_test_set_would_give_another_number(digits: Any) -> None:
    """Real labels that contradict the synthetic ones: the better on synthetic images, the worse on real ones."""
    images, synthetic = digits
    real = (synthetic + 1) % 10
    number_after = [
        accuracy_on_test(train_classifier("mlp", images, synthetic, num_classes=10, epochs=e), images, real).value
        for e in range(1, 7)
    ]
    trained = train_classifier("mlp", images, synthetic, num_classes=10, epochs=6)
    result = accuracy_on_test(trained, images, real)
    assert result.value == number_after[trained.training.chosen_epoch - 1]
    assert result.value < max(number_after) - 0.02


def test_training_has_no_way_to_the_test_set_which_is_read_once(digits: Any) -> None:
    arrays = [name for name in inspect.signature(train_classifier).parameters if "images" in name or "labels" in name]
    assert arrays == ["images", "labels"]
    trained = train_classifier("logreg", *digits, num_classes=10, epochs=1)
    read: list[int] = []
    trained.network.register_forward_hook(lambda _module, inputs, _output: read.append(len(inputs[0])))
    before = weights(trained)
    result = accuracy_on_test(trained, digits[0][:700], digits[1][:700])
    assert sum(read) == 700 == result.num_test
    assert torch.equal(before, weights(trained))


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("name", ["cnn", "small-wrn"])
def test_the_same_seed_gives_the_same_classifier(digits: Any, name: str) -> None:
    images, labels = digits[0][:200], digits[1][:200]
    torch_state, numpy_state = torch.random.get_rng_state(), str(np.random.get_state())
    one = train_classifier(name, images, labels, num_classes=10, epochs=2, seed=7)
    torch.rand(3)
    assert images.strides != images.copy().strides  # the layout in memory must not matter
    same = train_classifier(name, images.copy(), labels, num_classes=10, epochs=2, seed=7)
    other = train_classifier(name, images, labels, num_classes=10, epochs=2, seed=8)
    torch.random.set_rng_state(torch_state)
    assert torch.equal(weights(one), weights(same))
    assert one.training == same.training
    assert not torch.equal(weights(one), weights(other))
    train_classifier(name, images, labels, num_classes=10, epochs=1)
    assert torch.equal(torch.random.get_rng_state(), torch_state)
    assert str(np.random.get_state()) == numpy_state


@pytest.mark.parametrize(
    ("count", "most", "wanted", "num_train", "num_held_out"),
    [
        (60_000, 55_000, None, 55_000, 5000),
        (65_000, 60_000, None, 60_000, 5000),
        (60_000, 60_000, None, 55_000, 5000),
        (200_000, 60_000, None, 60_000, 5000),
        (120, 60_000, None, 110, 10),
        (120, 60_000, 50, 50, 10),
        (3, 60_000, None, 2, 1),
    ],
)
def test_sizes_of_the_split(count: int, most: int, wanted: int | None, num_train: int, num_held_out: int) -> None:
    train, held_out = split(count, most, wanted, torch.Generator().manual_seed(0))
    assert (len(train), len(held_out)) == (num_train, num_held_out)
    together = np.concatenate([train, held_out])
    assert len(np.unique(together)) == len(together)
    assert together.min() >= 0
    assert together.max() < count


def test_the_record_says_how_it_was_measured(digits: Any) -> None:
    trained = train_classifier("mlp", *digits, num_classes=10, epochs=2, num_train=100, source="real", seed=3)
    training = accuracy_on_test(trained, *digits).training
    assert (training.classifier, training.source, training.seed, training.epochs) == ("mlp", "real", 3, 2)
    assert training.note == "2 epochs (the protocol has 50); 100 training images (the protocol has 60,000)"


@pytest.mark.usefixtures("small")
def test_a_last_batch_of_one_image_is_left_out(digits: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batch norm at 1x1 cannot take it."""
    steps = record(monkeypatch, "small-wrn")
    tiny = np.ascontiguousarray(digits[0][:400, :, 3:4, 3:4])
    train_classifier("small-wrn", tiny, digits[1][:400], num_classes=10, epochs=1, num_train=257)
    assert len(steps) == 1 + 1


@pytest.mark.filterwarnings("error")
def test_arrays_that_are_read_only_or_reversed(digits: Any) -> None:
    images, labels = digits[0][:50].copy(), digits[1][:50].copy()
    images.flags.writeable = labels.flags.writeable = False
    trained = train_classifier("mlp", images, labels, num_classes=10, epochs=1)
    straight = accuracy_on_test(trained, images, labels)
    assert accuracy_on_test(trained, images[::-1], labels[::-1]).value == straight.value


def test_refuses_what_does_not_fit(digits: Any) -> None:
    images, labels = digits[0][:20], digits[1][:20]
    train = partial(train_classifier, "mlp", num_classes=10, epochs=1)
    cases: list[tuple[str, Any]] = [
        ("training labels, got none", lambda: train(images, None)),
        (r"training labels \(20,\)", lambda: train(images, labels[:7])),
        ("integer type", lambda: train(images, labels / 2)),
        ("at least two classes, got \\[4\\]", lambda: train(images, np.full(20, 4))),
        ("uint8", lambda: train(images.astype(np.float32), labels)),
        ("uint8", lambda: train(images[:, 0], labels)),
        ("N >= 1", lambda: train(images[:0], labels[:0])),
        (r"labels in \[0, 5\)", lambda: train_classifier("mlp", images, labels, num_classes=5)),
        (r"labels in \[0, 10\)", lambda: train(images, labels - 1)),
        ("at least 3", lambda: train(images[:2], labels[:2])),
        ("epochs >= 1, got 0", lambda: train_classifier("mlp", images, labels, num_classes=10, epochs=0)),
        (r"num_train in \[2, 19\], got 20", lambda: train(images, labels, num_train=20)),
        ("got 'vgg'", lambda: train_classifier("vgg", images, labels, num_classes=10)),
    ]
    trained = train(images, labels)
    cases += [
        ("test labels, got none", lambda: accuracy_on_test(trained, images, None)),
        ("images of one size", lambda: accuracy_on_test(trained, images[:, :, :4], labels)),
        ("same in training and test", lambda: accuracy_on_test(trained, images, labels + 1)),
    ]
    for words, call in cases:
        with pytest.raises(InputError, match=words) as caught:
            call()
        assert "\n" not in str(caught.value)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("name", ["cnn", "small-wrn"])
def test_learns_on_a_gpu(digits: Any, name: str) -> None:
    state = torch.cuda.get_rng_state()
    trained = train_classifier(name, *digits, num_classes=10, epochs=10, device="cuda")
    assert next(trained.network.parameters()).is_cuda
    assert torch.equal(torch.cuda.get_rng_state(), state)
    assert accuracy_on_test(trained, *digits).value > 0.5
