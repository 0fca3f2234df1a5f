"""The private figures, on images whose figures are known beforehand."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from dpdm import config as configs
from dpdm.data.archive import ArchiveWriter, ImageArchive
from dpdm.errors import InputError
from dpdm.evaluate import (
    Classifiers,
    ImageSet,
    evaluate,
    evaluate_run,
    read_set,
    read_synthetic,
    sections,
    spending,
    summary,
)
from dpdm.privacy.accounting import Mechanism, epsilon_spent
from dpdm.workdir import Workdir


def stripes(count: int, *, seed: int, noise: float = 20.0, labels: bool = True) -> ImageSet:
    """Class 0 is dark above and light below, class 1 the reverse: anybody can tell them apart."""
    random = np.random.default_rng(seed)
    classes = np.arange(count) % 2
    rows = np.where(np.arange(8) < 4, 60, 190)[None, None, :, None]
    pixels = np.where(classes[:, None, None, None] == 0, rows, 250 - rows)
    images = (pixels + noise * random.standard_normal((count, 1, 8, 8))).clip(0, 255).astype(np.uint8)
    return ImageSet("stripes", images, classes if labels else None)


def archive(path: Path, images: ImageSet) -> ImageArchive:
    with ArchiveWriter(path, None if images.labels is None else ["a", "b"]) as writer:
        for index, image in enumerate(images.images):
            writer.add(image, None if images.labels is None else int(images.labels[index]))
    return ImageArchive(path)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def real(tmp_path: Path) -> ImageArchive:
    return archive(tmp_path / "real.zip", stripes(200, seed=0))


@pytest.fixture
def held_out(tmp_path: Path) -> ImageArchive:
    return archive(tmp_path / "held_out.zip", stripes(60, seed=1))


def test_good_images_score_well_and_swapped_labels_do_not(
    real: ImageArchive, held_out: ImageArchive, tmp_path: Path
) -> None:
    workdir = Workdir(tmp_path / "w")
    good = stripes(200, seed=2)
    assert good.labels is not None
    swapped = ImageSet("swapped", good.images, 1 - good.labels)
    result = evaluate(workdir, good, real, held_out)
    assert result["accuracy"]["stripes"]["value"] == 1.0
    assert result["accuracy"]["real"]["value"] == 1.0
    assert result["accuracy"]["majority class"]["value"] == 0.5
    assert evaluate(workdir, swapped, real, held_out)["accuracy"]["swapped"]["value"] == 0.0


def test_classes_in_another_order_are_refused(real: ImageArchive, tmp_path: Path) -> None:
    images = stripes(60, seed=1)
    assert images.labels is not None
    with ArchiveWriter(tmp_path / "other.zip", ["b", "c"]) as writer:
        for image, label in zip(images.images, images.labels, strict=True):
            writer.add(image, int(label))
    with pytest.raises(InputError, match=r"the model's classes a, b in .*other\.zip, got b, c"):
        evaluate(Workdir(tmp_path / "w"), stripes(20, seed=2), real, ImageArchive(tmp_path / "other.zip"))


def test_distance_and_variety_order_images_as_an_eye_would(real: ImageArchive, tmp_path: Path) -> None:
    workdir = Workdir(tmp_path / "w")

    def measured(noise: float) -> tuple[float, float]:
        result = evaluate(workdir, stripes(200, seed=3, noise=noise), real, None)
        assert "accuracy" not in result
        return result["frechet"]["stripes"], result["variance_share"]["stripes"]

    same, flat = measured(20.0), measured(0.0)
    assert same[0] < flat[0]
    assert same[1] == pytest.approx(1, abs=0.1)
    assert flat[1] == pytest.approx(0, abs=1e-6)


def test_without_labels_there_is_no_accuracy(tmp_path: Path) -> None:
    unlabelled = archive(tmp_path / "plain.zip", stripes(50, seed=0, labels=False))
    result = evaluate(Workdir(tmp_path / "w"), stripes(50, seed=1, labels=False), unlabelled, unlabelled)
    assert "accuracy" not in result
    assert result["frechet"]["held-out real"] == pytest.approx(0, abs=1e-6)
    assert "pixel" in result["extractor"]


def test_the_result_is_kept_and_shown(real: ImageArchive, held_out: ImageArchive, tmp_path: Path) -> None:
    workdir = Workdir(tmp_path / "w")
    result = evaluate(workdir, stripes(50, seed=2), real, held_out)
    assert json.loads(workdir.evaluation.read_text()) == result
    text = summary(result)
    assert "outside the guarantee" in text
    assert "100.0 %" in text
    titles = [section.title for section in sections(result)]
    assert titles == ["Use for training a classifier", "Fréchet distance", "Variety"]
    assert result["extractor"] in sections(result)[1].explanation


def test_figures_on_public_images_are_not_called_private(real: ImageArchive, tmp_path: Path) -> None:
    workdir = Workdir(tmp_path / "w")
    workdir.root.mkdir()
    keys = ["data.name=stripes", "data.public=true", "dp.enabled=false", "data.class_names=[a,b]"]
    config = configs.load([], [*keys, f"data.path={real.path}"])
    workdir.config.write_text(configs.to_yaml(config), encoding="utf-8")
    result = evaluate(workdir, stripes(50, seed=2), real, None)
    assert "declared public" in result["note"]
    assert "private" not in summary(result)
    others = archive(tmp_path / "others.zip", stripes(50, seed=3))
    for images in ((others, None), (real, others)):  # dpdm evaluate --real, --holdout: whose they are is not said
        assert "private images" in evaluate(workdir, stripes(50, seed=2), *images)["note"]


def test_images_of_another_shape_are_refused(real: ImageArchive, tmp_path: Path) -> None:
    other = ImageSet("other", np.zeros((3, 3, 8, 8), np.uint8), None)
    with pytest.raises(InputError, match=r"\(1, 8, 8\).*\(3, 8, 8\)"):
        evaluate(Workdir(tmp_path / "w"), other, real, None)


def test_a_large_set_is_thinned_evenly(real: ImageArchive, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dpdm.evaluate.LARGEST_SET", 5)
    thinned = read_set("real", real)
    assert thinned.labels is not None
    assert np.array_equal(thinned.images, real.read([0, 49, 99, 149, 199]))


def test_however_many_images_were_drawn_so_many_are_in_memory(
    real: ImageArchive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dpdm.evaluate.LARGEST_SET", 5)
    workdir = Workdir(tmp_path / "w")
    archive(workdir.synthetic, read_set("real", real))
    assert len(read_synthetic(workdir, configs.load([], ["data.num_classes=2"])).images) == 5
    assert read_synthetic(workdir, configs.load([], ["data.num_classes=0"])).labels is None


def test_to_measure_a_run_prepares_and_removes_nothing(tmp_path: Path) -> None:
    """It has not the lock, and what it would prepare need not be what the run learned from."""
    workdir = Workdir(tmp_path / "w")
    archive(workdir.synthetic, stripes(20, seed=1))
    archive(workdir.train_archive, stripes(20, seed=2))  # of a run that is about to begin: there is no ledger yet
    configs.save(configs.load([], ["data.path=digits"]), workdir.config)
    before = workdir.train_archive.read_bytes()
    evaluate_run(workdir)
    assert workdir.train_archive.read_bytes() == before
    workdir.train_archive.unlink()
    with pytest.raises(InputError, match="digits"):
        evaluate_run(workdir)
    assert not workdir.train_archive.exists()


def test_spending_rises_to_what_the_statement_says() -> None:
    mechanisms = [Mechanism("central images", 1.0, 20.0, 1), Mechanism("DP-SGD", 0.1, 2.0, 40)]
    steps, epsilons = spending({"mechanisms": [m.as_dict() for m in mechanisms], "delta": 1e-5})
    assert steps[0] == 0
    assert steps[-1] == 40
    assert epsilons[0] == epsilon_spent(mechanisms[:1], 1e-5)
    assert epsilons[-1] == epsilon_spent(mechanisms, 1e-5)
    assert (np.diff(epsilons) > 0).all()


def test_evaluate_needs_synthetic_images(tmp_path: Path) -> None:
    from dpdm.config import Config

    with pytest.raises(InputError, match="dpdm sample"):
        read_synthetic(Workdir(tmp_path), Config())


def test_downstream_classifiers_are_tested_on_the_held_out_images(
    real: ImageArchive, held_out: ImageArchive, tmp_path: Path
) -> None:
    good = stripes(200, seed=2)
    synthetic = ImageSet("synthetic", good.images, good.labels)
    result = evaluate(Workdir(tmp_path / "w"), synthetic, real, held_out, classifiers=Classifiers("paper", 2, "cpu"))
    found = result["classifiers"]
    assert list(found) == ["synthetic", "real"]
    assert [list(value) for value in found.values()] == [["logreg", "mlp", "cnn"]] * 2
    assert found["synthetic"]["cnn"]["num_test"] == 60
    assert found["synthetic"]["cnn"]["training"]["source"] == "synthetic"
    assert found["real"]["cnn"]["training"]["source"] == "real"
    table = next(section for section in sections(result) if section.title == "Downstream classifiers")
    assert len(table.rows) == 6
    assert "of 2, 184 images" in table.rows[0].note
    assert "trained on synthetic: logreg" in summary(result)
    with pytest.raises(InputError, match="held-out real images for classifiers"):
        evaluate(Workdir(tmp_path / "w"), synthetic, real, None, classifiers=Classifiers("paper"))
