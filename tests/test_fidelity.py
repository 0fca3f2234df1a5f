"""dpdm fid-stats and dpdm evaluate --fid, against features taken and averaged by hand."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from dpdm import config as configs
from dpdm import fidelity
from dpdm.cli import run_command
from dpdm.data.archive import ImageArchive
from dpdm.data.prepare import prepare
from dpdm.errors import InputError
from dpdm.evaluate import sections
from dpdm.evaluate import summary as evaluation_summary
from dpdm.evaluation.fid import Images, load_statistics
from dpdm.evaluation.frechet import frechet_distance
from dpdm.fidelity import Source, make_statistics, measure, open_samples, summary
from dpdm.generate import grid, write_archive
from dpdm.workdir import Workdir

Capture = pytest.CaptureFixture[str]


def pixels(seed: int, count: int, *, channels: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, channels, 8, 8)).astype(np.uint8)


def write_images(folder: Path, images: np.ndarray) -> Path:
    folder.mkdir(parents=True)
    for index, image in enumerate(images):
        Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0)).save(folder / f"{index:04d}.png")
    return folder


def by_hand(module: nn.Module, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Every image alone through the module, numpy's mean and covariance."""
    rgb = np.repeat(images, 3 // images.shape[1], axis=1)
    with torch.no_grad():
        features = torch.cat([module(torch.tensor(image[None]), return_features=True) for image in rgb])
    return features.double().numpy().mean(axis=0), np.cov(features.double().numpy(), rowvar=False)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def extractor(tiny_inception_file: Path) -> str:
    return str(tiny_inception_file)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_images(tmp_path / "source" / "train", pixels(0, 70))
    write_images(tmp_path / "source" / "test", pixels(1, 20))
    return tmp_path / "source"


@pytest.mark.parametrize(("split", "seed", "count"), [("train", 0, 70), ("holdout", 1, 20)])
def test_statistics_of_a_source_equal_those_by_hand(
    split: Any, seed: int, count: int, source: Path, extractor: str, tiny_inception: nn.Module, tmp_path: Path
) -> None:
    dest = tmp_path / "out" / "stats.npz"
    make_statistics(Source(str(source), split), dest, extractor)
    mu, sigma = by_hand(tiny_inception, pixels(seed, count))
    found = load_statistics(dest)
    np.testing.assert_allclose(found.mu, mu, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found.sigma, sigma, rtol=1e-3, atol=1e-6)
    assert found.count == count
    assert list(dest.parent.iterdir()) == [dest]  # prepared images do not stay


def test_a_prepared_archive_is_read_where_it_is(
    source: Path, extractor: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = prepare(str(source), tmp_path / "images.zip")
    expected = make_statistics(Source(str(source)), tmp_path / "a.npz", extractor)
    monkeypatch.setattr(fidelity, "prepare", lambda *_, **__: pytest.fail("prepared again"))
    found = make_statistics(Source(str(archive.path)), tmp_path / "b.npz", extractor)
    np.testing.assert_array_equal(found.sigma, expected.sigma)


def test_an_archive_is_resized_if_asked(source: Path, extractor: str, tmp_path: Path) -> None:
    archive = prepare(str(source), tmp_path / "images.zip")
    whole = make_statistics(Source(str(archive.path)), tmp_path / "a.npz", extractor)
    small = make_statistics(Source(str(archive.path), resolution=4), tmp_path / "b.npz", extractor)
    assert np.trace(small.sigma) != pytest.approx(np.trace(whole.sigma), rel=0.05)


def test_images_do_not_stay_when_it_fails(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match="TorchScript"):
        make_statistics(Source(str(source)), tmp_path / "out" / "stats.npz", str(tmp_path / "absent.pt"))
    assert list((tmp_path / "out").iterdir()) == []


def test_images_do_not_stay_when_a_scheduler_ends_it(
    source: Path, extractor: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ended(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    (tmp_path / "out").mkdir()
    monkeypatch.setattr("dpdm.fidelity.pooled_features", ended)
    with pytest.raises(KeyboardInterrupt):
        make_statistics(Source(str(source)), tmp_path / "out" / "stats.npz", extractor)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("name", ["stats.txt", "there.npz"])
def test_dest_must_be_a_new_npz(name: str, source: Path, extractor: str, tmp_path: Path) -> None:
    (tmp_path / "there.npz").write_text("mine")
    with pytest.raises(InputError, match=r"new file that ends in \.npz"):
        make_statistics(Source(str(source)), tmp_path / name, extractor)
    assert (tmp_path / "there.npz").read_text() == "mine"


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_two_processes_write_what_one_writes(source: Path, extractor: str, tmp_path: Path) -> None:
    alone = make_statistics(Source(str(source)), tmp_path / "one.npz", extractor)
    command = [sys.executable, "-m", "dpdm", "fid-stats", str(source), str(tmp_path / "two.npz")]
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen(
            [*command, "--extractor", extractor],
            env={**os.environ, **group, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=120) for process in running]
    both = load_statistics(tmp_path / "two.npz")
    assert both.count == 70, said
    np.testing.assert_allclose(both.mu, alone.mu, rtol=1e-6)
    np.testing.assert_allclose(both.sigma, alone.sigma, rtol=1e-6, atol=1e-9 * np.trace(alone.sigma))
    assert [text.count("two.npz") for text, _ in said] == [1, 0]  # one of them speaks


@pytest.fixture
def statistics(source: Path, extractor: str, tmp_path: Path) -> Path:
    make_statistics(Source(str(source)), tmp_path / "stats.npz", extractor)
    return tmp_path / "stats.npz"


def test_measure_gives_every_number_with_its_extractor(
    statistics: Path, source: Path, extractor: str, tiny_inception: nn.Module, tmp_path: Path
) -> None:
    drawn = pixels(2, 50)
    real = fidelity.archive_images("real", prepare(str(source), tmp_path / "real.zip"))
    result = measure(statistics, Images.of("synthetic", drawn), real, extractor)
    expected = frechet_distance(*by_hand(tiny_inception, drawn), *by_hand(tiny_inception, pixels(0, 70)))
    assert result["fid"] == pytest.approx(expected, rel=1e-3)
    assert result["extractor"] == result["statistics_extractor"]
    assert (result["num_synthetic"], result["statistics_images"], result["num_compared"]) == (50, 70, [50, 70])
    assert abs(result["kid"]["mean"]) < 0.1
    assert result["kid"]["subset"] == 50
    assert min(result["precision"], result["recall"]) > 0.5
    assert 1 <= result["inception_score"]["mean"] <= 5
    text = summary(result)
    for part in ("outside the guarantee", "FID", "KID", "Precision", "Recall", "Inception score", result["extractor"]):
        assert part in text
    alone = measure(statistics, Images.of("synthetic", drawn), None, extractor)
    assert alone["fid"] == pytest.approx(result["fid"], rel=1e-9)
    assert not {"kid", "precision", "recall"} & set(alone)


def test_statistics_that_name_no_extractor_are_said_to(extractor: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "theirs.npz", mu=np.zeros(6), sigma=np.eye(6))
    result = measure(tmp_path / "theirs.npz", Images.of("synthetic", pixels(2, 9)), None, extractor)
    assert "does not name its extractor" in summary(result)


def test_real_images_of_another_shape_are_refused(statistics: Path, extractor: str) -> None:
    images = Images.of("synthetic", pixels(2, 9)), Images.of("real", pixels(2, 9, channels=3))
    with pytest.raises(InputError, match=r"\(1, 8, 8\).*\(3, 8, 8\)"):
        measure(statistics, *images, extractor)


@pytest.mark.parametrize("labels", [None, np.arange(12) % 3])
def test_our_own_samples_are_read_without_their_overview(labels: np.ndarray | None, tmp_path: Path) -> None:
    images = pixels(3, 12)
    folder = write_images(tmp_path / "samples", images)
    grid(images, labels).save(folder / "grid.png")
    (folder / "labels.csv").write_text("file,label\n")
    found = open_samples(folder)
    assert (found.count, found.shape) == (12, (1, 8, 8))
    np.testing.assert_array_equal(found.read(np.arange(12)), images)
    np.testing.assert_array_equal(found.read(np.array([7, 2])), images[[7, 2]])


@pytest.mark.parametrize("channels", [1, 3])
def test_samples_from_zips_and_arrays(channels: int, tmp_path: Path) -> None:
    images = pixels(4, 6, channels=channels)
    write_images(tmp_path / "folder", images)
    prepare(str(tmp_path / "folder"), tmp_path / "images.zip")
    np.savez(tmp_path / "images.npz", images.transpose(0, 2, 3, 1), np.arange(6))
    for name in ("folder", "images.zip", "images.npz"):
        found = open_samples(tmp_path / name)
        assert found.shape == (channels, 8, 8)
        np.testing.assert_array_equal(found.read(np.arange(found.count)), images)


def test_one_colour_image_makes_all_rgb(tmp_path: Path) -> None:
    write_images(tmp_path / "mixed", pixels(4, 3))
    colour = pixels(5, 1, channels=3)[0]
    Image.fromarray(colour.transpose(1, 2, 0)).save(tmp_path / "mixed" / "z.png")
    found = open_samples(tmp_path / "mixed")
    np.testing.assert_array_equal(found.read(np.array([3]))[0], colour)
    np.testing.assert_array_equal(found.read(np.array([0]))[0], np.repeat(pixels(4, 3)[0], 3, axis=0))


def test_samples_that_cannot_be_used_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    np.savez(tmp_path / "floats.npz", np.zeros((2, 8, 8, 3)))
    np.savez(tmp_path / "channels.npz", np.zeros((2, 3, 8, 8), np.uint8))
    (tmp_path / "text.npz").write_text("no images")
    np.savez(tmp_path / "names.npz", pictures=pixels(0, 2))
    np.savez(tmp_path / "objects.npz", np.array([{}], dtype=object), allow_pickle=True)
    for name in (
        "absent",
        "empty",
        *(f"{n}.npz" for n in ("absent", "floats", "channels", "text", "names", "objects")),
    ):
        with pytest.raises(InputError, match=name):
            open_samples(tmp_path / name)
    write_images(tmp_path / "sizes", pixels(0, 2))
    Image.fromarray(np.zeros((8, 9), np.uint8)).save(tmp_path / "sizes" / "wide.png")
    samples = open_samples(tmp_path / "sizes")
    with pytest.raises(InputError, match=r"9x8 \(wide\.png\) and 8x8"):
        samples.read(np.arange(3))


def test_the_commands(source: Path, extractor: str, tmp_path: Path, capsys: Capture) -> None:
    stats, samples = tmp_path / "stats.npz", write_images(tmp_path / "samples", pixels(6, 30))
    assert run_command(["fid-stats", str(source), str(stats), "--split", "holdout", "--extractor", extractor]) == 0
    said = capsys.readouterr()
    assert "6 features of 20 images (TorchScript file" in said.out
    assert "if the images are private, so is this file" in said.err
    ask = ["evaluate", "--fid", str(stats), "--samples", str(samples), "--extractor", extractor]
    assert run_command(ask) == 0
    assert "outside the guarantee" in capsys.readouterr().out
    real = prepare(str(source), tmp_path / "real.zip").path
    assert run_command([*ask, "--json", "--real", str(real)]) == 0
    found = json.loads(capsys.readouterr().out)
    direct = measure(stats, open_samples(samples), fidelity.archive_images("real", ImageArchive(real)), extractor)
    assert found["fid"] == pytest.approx(direct["fid"], rel=1e-9)
    assert found["recall"] == direct["recall"]


def test_a_runs_evaluation_has_it_beside_the_rest(
    statistics: Path, source: Path, extractor: str, tmp_path: Path, capsys: Capture
) -> None:
    real = prepare(str(source), tmp_path / "real.zip").path
    run = Workdir(tmp_path / "run")
    run.make_private()
    configs.save(configs.load([], [f"data.path={real}"]), run.config)
    write_archive(run.synthetic, pixels(7, 25), None)
    ask = ["evaluate", "--workdir", str(run.root), "--fid", str(statistics), "--extractor", extractor]
    assert run_command([*ask, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result == json.loads(run.evaluation.read_text())
    synthetic = open_samples(run.synthetic)
    direct = measure(statistics, synthetic, fidelity.archive_images("real", ImageArchive(real)), extractor)
    assert result["fid"].keys() == direct.keys()
    assert result["fid"]["fid"] == pytest.approx(direct["fid"], rel=1e-9)
    assert result["fid"]["kid"] == pytest.approx(direct["kid"], rel=1e-9)
    assert result["frechet"]["synthetic"] != pytest.approx(direct["fid"], rel=0.01)  # another extractor, beside it
    section = sections(result)[-1]
    assert section.outside_guarantee
    assert direct["extractor"] in section.explanation
    assert [row.label for row in section.rows] == ["FID", "KID", "Precision", "Recall", "Inception score"]
    assert section.rows[0].value == f"{direct['fid']:.4g}"
    assert "KID" in evaluation_summary(result)
    again = run_command([*ask, "--samples", str(run.synthetic), "--json"])
    assert (again, json.loads(capsys.readouterr().out)["fid"]) == (0, pytest.approx(direct["fid"], rel=1e-9))


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["evaluate"], "Expected --workdir, got none"),
        (["evaluate", "--samples", "folder"], "Expected --fid with --samples"),
        (["evaluate", "--fid", "absent.npz", "--samples", "absent"], "Expected images at absent"),
        (["evaluate", "--workdir", "absent", "--fid", "absent.npz", "--samples", "absent"], "Expected a run in absent"),
        (["fid-stats", "absent", "stats.npz"], "source='absent'"),
        (["fid-stats", "digits", "stats.npz", "--extractor", "absent.pt"], "extractor=absent.pt"),
    ],
)
def test_wrong_usage_is_one_line_and_status_2(
    arguments: list[str], what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_command(arguments) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("dpdm: ")]
    assert len(lines) == 1
    assert what in lines[0]
    assert list(tmp_path.iterdir()) == []
