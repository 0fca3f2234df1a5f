"""Extractors from TorchScript files and modules, against the module called by hand."""

import hashlib
import pickle
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dpdm import fetching
from dpdm.errors import InputError, RunError
from dpdm.evaluation import inception
from dpdm.evaluation.features import UnitPixels, extract
from dpdm.evaluation.inception import module_extractor, open_extractor

RGB, GREY = (3, 8, 8), (1, 8, 8)


def noise(count: int, shape: tuple[int, int, int]) -> np.ndarray:
    return np.random.default_rng(count).integers(0, 256, (count, *shape)).astype(np.uint8)


def by_hand(module: nn.Module, images: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return torch.cat([module(torch.tensor(image[None]), return_features=True) for image in images]).numpy()


def test_a_file_gives_its_own_features(tiny_inception: nn.Module, tiny_inception_file: Path) -> None:
    extractor = open_extractor(str(tiny_inception_file), RGB)
    images = noise(150, RGB)  # more than two batches
    np.testing.assert_allclose(extract(extractor, images), by_hand(tiny_inception, images), rtol=1e-4, atol=1e-5)
    assert extractor.dimension == 6
    assert hashlib.sha256(tiny_inception_file.read_bytes()).hexdigest()[:16] in extractor.name


def test_grey_images_are_given_as_rgb(tiny_inception: nn.Module, tiny_inception_file: Path) -> None:
    images = noise(5, GREY)
    expected = by_hand(tiny_inception, np.repeat(images, 3, axis=1))
    found = extract(open_extractor(str(tiny_inception_file), GREY), images)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_a_name_is_the_content_not_the_path(
    tiny_inception_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "other name.pt"
    shutil.copy(tiny_inception_file, copy)
    assert open_extractor(str(copy), RGB).name == open_extractor(str(tiny_inception_file), RGB).name
    monkeypatch.setattr(inception, "INCEPTION_SHA256", hashlib.sha256(copy.read_bytes()).hexdigest())
    assert open_extractor(str(copy), RGB).name == inception.INCEPTION_NAME


def test_inception_is_fetched_once_and_checked(
    tiny_inception_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = tiny_inception_file.read_bytes()
    monkeypatch.setattr(inception, "INCEPTION_URLS", (tiny_inception_file.as_uri(),))
    monkeypatch.setattr(inception, "INCEPTION_SHA256", hashlib.sha256(content).hexdigest())
    monkeypatch.setattr(inception, "INCEPTION_BYTES", len(content))
    assert open_extractor("inception", RGB, cache_dir=tmp_path).name == inception.INCEPTION_NAME
    assert (tmp_path / inception.INCEPTION_FILE).read_bytes() == content
    monkeypatch.setattr(fetching, "_download", lambda *_: pytest.fail("downloaded again"))
    open_extractor("inception", RGB, cache_dir=tmp_path)


def test_a_forged_inception_is_not_opened(
    tiny_inception_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inception, "INCEPTION_URLS", (tiny_inception_file.as_uri(),))
    with pytest.raises(RunError, match=f"expected SHA256 {inception.INCEPTION_SHA256}.* path as the extractor"):
        open_extractor("inception", RGB, cache_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_class_probabilities_are_those_of_the_module(tiny_inception: nn.Module, tiny_inception_file: Path) -> None:
    extractor = open_extractor(str(tiny_inception_file), RGB)
    assert extractor.class_weights is not None
    images = noise(20, RGB)
    logits = extract(extractor, images) @ extractor.class_weights.T
    with torch.no_grad():
        said = tiny_inception(torch.tensor(images), no_output_bias=True).numpy()
    np.testing.assert_allclose(np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True), said, rtol=1e-4, atol=1e-6)


class Plain(nn.Module):
    """No argument but the images; features (B, D, 1, 1); random in training."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.5)

    def forward(self, images: Tensor) -> Tensor:
        return self.dropout(images.float().mean(dim=(2, 3), keepdim=True))


class Misleading(Plain):
    """Has the arguments of class probabilities, but they are not softmax(features W^T)."""

    def __init__(self) -> None:
        super().__init__()
        self.output = nn.Linear(3, 4)
        with torch.no_grad():
            self.output.weight.copy_(torch.eye(4, 3))

    def forward(self, images: Tensor, return_features: bool = False, no_output_bias: bool = False) -> Tensor:
        features = super().forward(images).flatten(1)
        return features if return_features else torch.softmax(-features @ self.output.weight.T / 100, dim=1)


def test_any_module_is_taken() -> None:
    images = noise(9, RGB)
    extractor = module_extractor("means", Plain(), RGB)
    np.testing.assert_allclose(extract(extractor, images), images.mean(axis=(2, 3)), rtol=1e-6)
    assert extractor.class_weights is None
    assert module_extractor("means", Plain(), GREY).dimension == 3
    assert module_extractor("grey alone", nn.Sequential(UnitPixels(), nn.Conv2d(1, 2, 8)), GREY).dimension == 2


def test_probabilities_that_are_not_understood_are_left_out() -> None:
    assert module_extractor("misleading", Misleading(), RGB).class_weights is None


def test_a_traced_file_is_taken_and_nothing_is_said_of_old_formats(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        traced: Any = torch.jit.trace(Plain().eval(), torch.zeros(2, 3, 8, 8, dtype=torch.uint8))
        traced.save(tmp_path / "traced.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        extractor = open_extractor(str(tmp_path / "traced.pt"), RGB)
    images = noise(3, RGB)
    np.testing.assert_allclose(extract(extractor, images), images.mean(axis=(2, 3)), rtol=1e-6)


class Trap:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, (f"open({str(self.path)!r}, 'w')",)


def test_pickled_code_is_not_run(tmp_path: Path) -> None:
    sprung = tmp_path / "sprung"
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps(Trap(sprung)))
    torch.save(Trap(sprung), tmp_path / "module.pt")
    for name in ("plain.pkl", "module.pt"):
        with pytest.raises(InputError, match=f"TorchScript file at .*{name}.*not opened"):
            open_extractor(str(tmp_path / name), RGB)
    assert not sprung.exists()


@pytest.mark.parametrize("which", ["absent.pt", "."])
def test_a_path_without_a_file_is_one_line(which: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="to be inception or a TorchScript file"):
        open_extractor(str(tmp_path / which), RGB)


class Says(nn.Module):
    def __init__(self, *answer: int, value: float = 0.0) -> None:
        super().__init__()
        self.answer, self.value = answer, value

    def forward(self, images: Tensor) -> Tensor:
        return torch.full(self.answer, self.value)


@pytest.mark.parametrize(
    ("module", "what"),
    [
        (nn.Conv2d(3, 4, 3), "Byte|uint8|unsigned char|dtype"),
        (Says(1, 4), r"shape \(1, 4\)"),
        (Says(2, 4, value=float("nan")), r"shape \(2, 4\)"),
    ],
)
def test_a_module_that_does_not_fit_is_one_line(module: nn.Module, what: str) -> None:
    with pytest.raises(InputError, match=what) as caught:
        module_extractor("odd", module, RGB)
    assert "\n" not in str(caught.value)


def test_a_file_for_other_channels_says_so(tmp_path: Path, tiny_inception_file: Path) -> None:
    with pytest.raises(InputError, match=r"2 channels: .*3 channels"):
        open_extractor(str(tiny_inception_file), (2, 8, 8))
