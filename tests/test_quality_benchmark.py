"""benchmarks/quality.py on a model that nobody trained and the bundled digits: what it measures, keeps and writes."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import quality
import torch
from tests.made_release import make_release
from torch import Tensor, nn

from dpdm import config as configs
from dpdm import pretrained
from dpdm.data.prepare import prepare
from dpdm.errors import InputError
from dpdm.evaluation.classifiers import logistic_regression_accuracy
from dpdm.evaluation.copies import find_copies
from dpdm.evaluation.downstream import accuracy_on_test, train_classifier
from dpdm.evaluation.features import extract, train_feature_extractor
from dpdm.evaluation.fid import Images
from dpdm.evaluation.frechet import feature_statistics, frechet_distance
from dpdm.evaluation.quality import precision_recall
from dpdm.generate import draw
from dpdm.release import load_denoiser
from dpdm.untrusted import parse_json

ROOT = Path(__file__).parent.parent
COUNT = 40
KEYS = ("data.num_classes=10", "data.class_names=[]", "sampler.num_steps=2")
Real = dict[str, tuple[np.ndarray, np.ndarray]]


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return make_release(tmp_path_factory.mktemp("made"), keys=KEYS)


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Real:
    found = {}
    for split in ("train", "holdout"):
        archive = prepare("digits", tmp_path_factory.mktemp("digits") / "images.zip", split=split)
        assert archive.labels is not None
        found[split] = (archive.read(np.arange(archive.num_images)), archive.labels)
    return found


@pytest.fixture
def page(tmp_path: Path) -> Path:
    page = tmp_path / "docs" / "results.md"
    page.parent.mkdir()
    page.write_text("before\n<!-- quality: begin -->\nold\n<!-- quality: end -->\nafter\n")
    return page


def arguments(release: Path, *others: str) -> list[str]:
    return ["--release", str(release), "--data", "digits", "--device", "cpu", *others]


def drawn(release: Path, count: int) -> tuple[np.ndarray, np.ndarray]:
    config = configs.load([release / "config.json"])
    images, labels = draw(load_denoiser(release), config, num_images=count)
    assert labels is not None
    return images, labels


def test_figures_are_those_of_the_library(release: Path, real: Real, capsys: pytest.CaptureFixture[str]) -> None:
    parts = ["--parts", "logreg", "frechet", "copies"]
    quality.main(arguments(release, *parts, "--num-images", str(COUNT), "--epochs", "2", "--json"))
    (line,) = capsys.readouterr().out.splitlines()
    result = parse_json(line.encode())
    figures = result["figures"]
    assert list(figures) == parts[1:]
    assert {figure["samples"] for figure in figures.values()} == {COUNT}
    assert [figure["epochs"] for figure in figures.values()] == [2, None, None]
    assert all(figure["protocol"] and figure["seconds"] > 0 for figure in figures.values())
    assert "outside the guarantee" in result["note"]
    images, labels = drawn(release, COUNT)
    trained = train_classifier("logreg", images, labels, num_classes=10, epochs=2)
    assert figures["logreg"]["value"] == accuracy_on_test(trained, *real["holdout"]).value
    assert (figures["logreg"]["trained_on"], figures["logreg"]["tested_on"]) == (COUNT - COUNT // 12, 300)
    assert figures["logreg"]["note"].startswith("2 epochs (the protocol has 50)")
    extractor = train_feature_extractor(*real["train"], num_classes=10)
    ours, theirs = extract(extractor, images), extract(extractor, real["train"][0])
    distance = frechet_distance(*feature_statistics(ours), *feature_statistics(theirs))
    assert figures["frechet"]["value"] == pytest.approx(distance, rel=1e-6)
    assert (figures["frechet"]["precision"], figures["frechet"]["recall"]) == precision_recall(theirs, ours)
    assert "64 features of a classifier" in figures["frechet"]["protocol"]
    found = find_copies(Images.of("ours", images), Images.of("real", real["train"][0]))
    assert (figures["copies"]["value"], figures["copies"]["real_looked_at"]) == (found.copies, 1497)


def test_quick_is_logistic_regression_alone(
    release: Path, real: Real, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quality, "QUICK_SAMPLES", COUNT)
    quality.main(arguments(release, "--quick", "--json"))
    figures = json.loads(capsys.readouterr().out)["figures"]
    assert list(figures) == ["quick"]
    expected = logistic_regression_accuracy(*drawn(release, COUNT), *real["holdout"])
    assert (figures["quick"]["value"], figures["quick"]["samples"]) == (expected.value, COUNT)


def test_images_are_kept_as_they_are_drawn(
    release: Path, real: Real, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call that is stopped goes on with what there is of the same model, sampler and kind of device."""
    monkeypatch.setattr(quality, "PIECE", COUNT // 3)
    calls: list[range] = []
    real_draw = quality.draw_some

    def draw_some(denoiser: Any, config: Any, indices: range) -> np.ndarray:
        calls.append(indices)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real_draw(denoiser, config, indices)

    monkeypatch.setattr(quality, "draw_some", draw_some)
    words = arguments(release, "--parts", "logreg", "--num-images", str(COUNT), "--epochs", "1", "--json")
    words += ["--drawn", str(tmp_path)]
    with pytest.raises(KeyboardInterrupt):
        quality.main(words)
    quality.main(words)
    assert calls[3:] == [calls[2], *([range(3 * (COUNT // 3), COUNT)] if COUNT % 3 else [])]  # no piece twice
    trained = train_classifier("logreg", *drawn(release, COUNT), num_classes=10, epochs=1)
    figures = json.loads(capsys.readouterr().out)["figures"]
    assert figures["logreg"]["value"] == accuracy_on_test(trained, *real["holdout"]).value
    before = len(calls)
    quality.main([*words, "sampler.seed=1"])
    assert calls[before] == calls[0]  # other images


def test_as_many_images_as_real_ones_unless_told(release: Path) -> None:
    given = quality.parse(arguments(release))
    subject = quality.Subject(release, given, Path("nowhere"))
    subject.train = quality.Labelled(np.zeros((1497, 1, 8, 8), np.uint8), np.zeros(1497, np.int64))
    assert [quality.samples_of(part, subject) for part in ("quick", "cnn")] == [3000, 1497]
    given.num_images = 50
    assert [quality.samples_of(part, subject) for part in ("quick", "cnn")] == [50, 50]
    assert [quality.epochs_of(part, given) for part in ("quick", "cnn", "wrn-40-4")] == [None, 50, 50]


def test_real_test_images_are_read_after_the_choice(release: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    read, fit, judge = quality.read_real, quality.train_classifier, quality.accuracy_on_test

    def note(what: str, function: Any) -> Any:
        return lambda *given, **named: (log.append(what.format(*given)), function(*given, **named))[1]

    monkeypatch.setattr(quality, "read_real", note("read {1}", read))
    monkeypatch.setattr(quality, "train_classifier", note("train {0}", fit))
    monkeypatch.setattr(quality, "accuracy_on_test", note("test", judge))
    quality.main(arguments(release, "--parts", "logreg", "mlp", "--num-images", str(COUNT), "--epochs", "1"))
    assert log == ["train logreg", "read holdout", "test", "train mlp", "test"]


def test_kept_figures_are_not_measured_again(
    release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []

    def measure(subject: quality.Subject, images: quality.Labelled, part: str) -> dict[str, Any]:
        asked.append(f"{part} {len(images.images)}")
        return {"value": 0.5, "protocol": "none"}

    monkeypatch.setattr(quality, "MEASURES", dict.fromkeys(quality.PARTS, measure))
    given = arguments(release, "--keep", str(tmp_path / "kept"), "--num-images", "5", "--name", "made", "--json")
    quality.main([*given, "--parts", "quick"])
    quality.main([*given, "--parts", "quick", "mlp"])
    first = capsys.readouterr().out.splitlines()[-1]
    assert asked == ["quick 5", "mlp 5"]
    assert json.loads((tmp_path / "kept" / "made.json").read_text()) == json.loads(first)
    quality.main([*given, "--parts", "mlp", "quick", "--num-images", "6"])
    assert asked[2:] == ["mlp 6", "quick 6"]
    quality.main([*given, "--parts", "mlp", "--num-images", "6", "--epochs", "3"])
    assert asked[4:] == ["mlp 6"]
    capsys.readouterr()
    quality.main([*given, "--parts", "quick", "--num-images", "6", "--", "sampler.guidance_scale=1"])
    assert asked[5:] == ["quick 6"]
    assert list(json.loads(capsys.readouterr().out)["figures"]) == ["quick"]  # the others were of another sampler
    (tmp_path / "kept" / "made.json").write_text("{")
    with pytest.raises(InputError, match="could not read them: remove the file"):
        quality.main([*given, "--parts", "quick"])


def test_docs_get_tables_and_pictures_of_all_models(
    release: Path, page: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = {
        "quick": {"value": 0.8674, "protocol": "LR"},
        "cnn": {"value": 0.9751, "protocol": "paper", "chosen_epoch": 7, "note": "fewer"},
        "frechet": {"value": 5.4321, "precision": 0.71, "recall": 0.625, "protocol": "to 9 real images"},
        "copies": {"value": 2, "near": 3, "real_near": 1234, "real_looked_at": 2000, "protocol": "each with 9"},
    }
    monkeypatch.setattr(
        quality, "MEASURES", {part: (lambda *_, figure=figure: figure) for part, figure in figures.items()}
    )
    given = arguments(release, "--num-images", "12", "--docs", "--parts")
    other = ("sampler.guidance_scale=0.5", "sampler.augmentation=1.5", "sampler.precision=bf16")
    quality.main([*given, *figures, "--name", "b_eps_1.0", "--", *other], page)
    quality.main([*given, "quick", "--name", "a_eps_1.0"], page)
    text = page.read_text()
    assert text.startswith("before\n<!-- quality: begin -->\n| model |")
    assert text.endswith("<!-- quality: end -->\nafter\n")
    (privacy,) = re.findall(
        r"^\| a_eps_1\.0 \| (.*?) \| `ddim`, 2 \| 86\.7 % (?:\| - ){8}\|$", text, flags=re.MULTILINE
    )
    statement = json.loads((release / "privacy.json").read_text(encoding="utf-8"))
    assert float(privacy.removesuffix(", 1e-05")) == pytest.approx(statement["epsilon"], rel=0.01)
    assert "| `ddim`, 2, guidance 0.5, augmentation 1.5, bf16 | 86.7 % |" in text
    assert "| 86.7 % | - | - | 97.5 % | - | 5.43 | - | 2 | 0.710, 0.625 |" in text
    assert "| b_eps_1.0 | CNN | 97.5 % | paper; fewer | 12 | 50 (best: 7) | 0 | CPU, 1 threads |" in text
    assert "5.43; precision 0.710, recall 0.625 | to 9 real images | 12 | - |" in text
    assert "| 2; near 3, of 2,000 real ones 1,234 | each with 9 |" in text
    assert text.index("| a_eps_1.0") < text.index("| b_eps_1.0")
    for name in ("a_eps_1.0", "b_eps_1.0"):
        assert f"![Images drawn from {name}](images/results/{name}.png)" in text
        assert (page.parent / "images" / "results" / f"{name}.png").exists()
        assert json.loads((page.parent / "results" / f"{name}.json").read_text())["model"] == name
    assert "| b_eps_1.0" not in capsys.readouterr().out.splitlines()[-1]  # on the terminal the last model alone


def test_inception_is_used_where_its_weights_are(
    release: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Means(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.float().mean(3).flatten(1)[:, :3]

    path = tmp_path / "means.pt"
    torch.jit.trace(Means().eval(), torch.zeros(2, 3, 8, 8, dtype=torch.uint8)).save(str(path))  # type: ignore[attr-defined]
    given = arguments(release, "--parts", "inception", "--num-images", "30", "--json", "--inception")
    quality.main([*given, str(path)])
    figure = json.loads(capsys.readouterr().out)["figures"]["inception"]
    assert "TorchScript file with SHA-256" in figure["protocol"]
    assert figure["value"] > 0
    quality.main([*given, str(tmp_path / "absent.pt")])
    shown = capsys.readouterr()
    assert json.loads(shown.out)["figures"] == {}
    assert shown.err == f"Left out: Inception's distance, for want of {tmp_path / 'absent.pt'}.\n"


def test_what_cannot_be_measured_is_said(
    release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(InputError, match="Expected a release at"):
        quality.main(arguments(tmp_path))
    monkeypatch.setattr(pretrained, "FOLDER", tmp_path)
    with pytest.raises(InputError, match="one of none"):
        quality.main(["--pretrained", "mnist_eps_1.0", "--data", "digits"])
    unlabelled = make_release(tmp_path / "run", keys=["data.num_classes=0", "data.class_names=[]"])
    with pytest.raises(InputError, match="Expected a model with classes"):
        quality.main(arguments(unlabelled))
    prepare("digits", tmp_path / "digits.zip")
    given = ["--release", str(release), "--data", str(tmp_path / "digits.zip"), "--device", "cpu"]
    with pytest.raises(InputError, match="Expected --test with the archive"):
        quality.main([*given, "--parts", "logreg", "--num-images", "30", "--epochs", "1"])
    prepare("digits", tmp_path / "test.zip", split="holdout")
    quality.main([*given, "--test", str(tmp_path / "test.zip"), "--quick", "--num-images", "30", "--json"])
    assert json.loads(capsys.readouterr().out)["figures"]["quick"]["tested_on"] == 300


def test_the_page_has_a_place_for_the_tables() -> None:
    text = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    assert re.findall(r"<!-- (\w+): begin -->\n(?:.*\n)*?<!-- \1: end -->", text) == ["quality"]


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
def test_make_quality_measures_what_there_are_data_for(tmp_path: Path) -> None:
    for name in ("dpdm", "python"):  # in place of those of .venv; python also says which releases there are
        says = (
            "case $1 in -c) echo mnist_eps_1.0 fmnist_eps_10.0 mnist_eps_10.0;; *) echo RAN $(basename $0) $* ;; esac"
        )
        (tmp_path / name).write_text(f"#!/bin/sh\n{says}\n")
        (tmp_path / name).chmod(0o755)
    command = ["make", "--silent", "--old-file=.venv/ready", f"BIN={tmp_path}", "quality", "MNIST=a b"]
    done = subprocess.run(
        [*command, f"--file={ROOT / 'Makefile'}"], cwd=tmp_path, check=True, capture_output=True, text=True
    )
    assert done.stdout.splitlines() == [
        "RAN dpdm demo --workdir runs/demo",
        "RAN python benchmarks/quality.py --release runs/demo/release --name digits_eps_10.0 --data digits --docs",
        "RAN python benchmarks/quality.py --pretrained mnist_eps_1.0 --data a b --docs",
        "RAN python benchmarks/quality.py --pretrained mnist_eps_10.0 --data a b --docs",
        "Left out for want of MNIST=path or FMNIST=path: fmnist_eps_10.0",
    ]
