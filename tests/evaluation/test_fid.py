"""Files of statistics, features pooled over processes, and FID during training, against numpy on all features."""

import json
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from dpdm.errors import InputError, PeerError
from dpdm.evaluation import fid
from dpdm.evaluation.features import Extractor, extract
from dpdm.evaluation.fid import (
    EvaluationConfig,
    FidMeter,
    Images,
    Statistics,
    check_comparable,
    load_statistics,
    pooled_features,
    save_statistics,
)
from dpdm.evaluation.frechet import feature_statistics, frechet_distance
from dpdm.evaluation.inception import module_extractor, open_extractor
from dpdm.evaluation.quality import inception_score

SHAPE = (1, 6, 6)
Together = Callable[[int, Callable[[int], Any]], list[Any]]


@pytest.fixture
def extractor(tiny_inception: nn.Module) -> Extractor:
    return module_extractor("tiny", tiny_inception, SHAPE, batch_size=5)


def brightening(count: int, *, seed: int = 0) -> np.ndarray:
    """Ever brighter: what one process sees looks nothing like what another one sees."""
    random = np.random.default_rng(seed)
    level = np.linspace(0, 200, count)[:, None, None, None]
    return (level + random.integers(0, 56, (count, *SHAPE))).astype(np.uint8)


@pytest.mark.parametrize("size", [2, 3, 7])
def test_any_number_of_processes_finds_the_same(extractor: Extractor, together: Together, size: int) -> None:
    images = brightening(101)
    everything = extract(extractor, images)
    alone = pooled_features(extractor, Images.of("all", images), keep=40)
    assert alone.score is not None
    for pooled in together(size, lambda _: pooled_features(extractor, Images.of("all", images), keep=40)):
        mu, sigma = pooled.moments.gaussian()
        np.testing.assert_allclose(mu, everything.mean(axis=0), rtol=1e-10)
        np.testing.assert_allclose(sigma, np.cov(everything, rowvar=False), rtol=1e-10, atol=1e-12)
        np.testing.assert_array_equal(pooled.sample, alone.sample)
        assert pooled.score is not None
        assert inception_score(pooled.score) == pytest.approx(inception_score(alone.score), rel=1e-9)
    rows = np.unique(np.linspace(0, 100, 40).round().astype(int))
    np.testing.assert_array_equal(alone.sample, everything[rows])


def test_averaged_covariances_would_be_another_distance(extractor: Extractor) -> None:
    """The original's fault: the mean of the processes' covariances lacks the spread between their means."""
    features = extract(extractor, brightening(100))
    parts = [feature_statistics(part) for part in np.split(features, 2)]
    averaged = np.mean([mu for mu, _ in parts], axis=0), np.mean([sigma for _, sigma in parts], axis=0)
    whole = pooled_features(extractor, Images.of("all", brightening(100))).moments.gaussian()
    assert frechet_distance(*whole, *feature_statistics(features)) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(*averaged, *feature_statistics(features)) > 0.1


def test_processes_without_images_do_no_harm(extractor: Extractor, together: Together) -> None:
    images = brightening(12)
    expected = feature_statistics(extract(extractor, images))
    for pooled in together(5, lambda _: pooled_features(extractor, Images.of("few", images), keep=10)):
        for found, right in zip(pooled.moments.gaussian(), expected, strict=True):
            np.testing.assert_allclose(found, right, rtol=1e-10, atol=1e-12)
        assert len(pooled.sample) == 10


def test_a_damaged_image_ends_all_processes(extractor: Extractor, together: Together) -> None:
    images = brightening(30)

    def read(rows: np.ndarray) -> np.ndarray:
        if 20 in rows:
            raise InputError("image 20 is damaged")
        return images[rows]

    def outcome(_: int) -> str:
        with pytest.raises((InputError, PeerError)) as caught:
            pooled_features(extractor, Images("damaged", 30, SHAPE, read))
        return str(caught.value)

    said = together(3, outcome)
    assert said.count("image 20 is damaged") == 1
    assert sum("its message says why" in text for text in said) == 2


def test_images_are_read_in_chunks(extractor: Extractor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fid, "CHUNK", 12)
    images, asked = brightening(24), []

    def read(rows: np.ndarray) -> np.ndarray:
        asked.append(len(rows))
        return images[rows]

    pooled = pooled_features(extractor, Images("streamed", 24, SHAPE, read))
    assert asked == [10, 10, 4]
    assert pooled.sample.shape == (0, 6)
    np.testing.assert_allclose(pooled.moments.mean, extract(extractor, images).mean(axis=0), rtol=1e-10)


def test_a_file_has_the_originals_entries_and_is_its_owners_alone(extractor: Extractor, tmp_path: Path) -> None:
    found = Statistics.of(pooled_features(extractor, Images.of("all", brightening(9))).moments, extractor)
    path = tmp_path / "new" / "stats.npz"
    save_statistics(path, found)
    with np.load(path, allow_pickle=False) as content:
        assert content["mu"].dtype == content["sigma"].dtype == np.float64
        np.testing.assert_array_equal(content["mu"], found.mu)
        np.testing.assert_array_equal(content["sigma"], found.sigma)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    again = load_statistics(path)
    assert (again.extractor, again.count) == ("tiny", 9)
    np.testing.assert_array_equal(again.sigma, found.sigma)


def test_a_file_of_the_original_is_taken(tmp_path: Path) -> None:
    np.savez(tmp_path / "theirs.npz", mu=np.arange(3, dtype=np.float32), sigma=np.eye(3))
    theirs = load_statistics(tmp_path / "theirs.npz")
    assert (theirs.extractor, theirs.count, theirs.mu.dtype) == (None, None, np.float64)


@pytest.mark.parametrize(
    ("entries", "what"),
    [
        ({"mu": np.zeros(2)}, "does not hold mu and sigma"),
        ({"mu": np.zeros(2), "sigma": np.eye(3)}, r"\(2,\) and \(3, 3\)"),
        ({"mu": np.array([0, np.nan]), "sigma": np.eye(2)}, "finite mu"),
        ({"mu": np.zeros(2), "sigma": np.triu(np.ones((2, 2)))}, "transpose"),
        ({"mu": np.array([{}], dtype=object), "sigma": np.eye(1)}, "pickled objects"),
    ],
)
def test_a_file_of_something_else_is_one_line(entries: dict[str, Any], what: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "odd.npz", allow_pickle=True, **entries)
    with pytest.raises(InputError, match=what) as caught:
        load_statistics(tmp_path / "odd.npz")
    assert "odd.npz" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_file_and_no_npz_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="found none: make one with dpdm fid-stats"):
        load_statistics(tmp_path / "absent.npz")
    np.save(tmp_path / "array.npy", np.zeros(3))
    (tmp_path / "text.npz").write_text("mu sigma")
    (tmp_path / "empty.npz").write_bytes(b"")
    (tmp_path / "zip.npz").write_bytes(b"PK\x03\x04 cut off")
    for path in [*tmp_path.iterdir(), tmp_path]:
        with pytest.raises(InputError, match="could not read one"):
            load_statistics(path)


def test_another_extractor_or_dimension_is_named(extractor: Extractor, tmp_path: Path) -> None:
    mu, sigma = np.zeros(6), np.eye(6)
    check_comparable(tmp_path, Statistics(mu, sigma), extractor)
    check_comparable(tmp_path, Statistics(mu, sigma, "tiny"), extractor)
    with pytest.raises(InputError, match="of tiny, got those of huge"):
        check_comparable(tmp_path, Statistics(mu, sigma, "huge"), extractor)
    with pytest.raises(InputError, match=r"Expected 6 features .*, got 7"):
        check_comparable(tmp_path, Statistics(np.zeros(7), np.eye(7)), extractor)


@pytest.fixture
def two_files(tiny_inception_file: Path, tmp_path: Path) -> list[str]:
    opened = open_extractor(str(tiny_inception_file), SHAPE)
    for name, seed in (("a.npz", 1), ("b.npz", 2)):
        pooled = pooled_features(opened, Images.of(name, brightening(30 * seed, seed=seed)))
        save_statistics(tmp_path / name, Statistics.of(pooled.moments, opened))
    return [str(tmp_path / "a.npz"), str(tmp_path / "b.npz")]


def test_fid_during_training(two_files: list[str], tiny_inception_file: Path, together: Together) -> None:
    config = EvaluationConfig(fid_stats=two_files, extractor=str(tiny_inception_file))
    drawn = np.random.default_rng(5).integers(0, 256, (41, *SHAPE)).astype(np.uint8)
    opened = open_extractor(str(tiny_inception_file), SHAPE)
    mine = feature_statistics(extract(opened, drawn))
    expected = {path: frechet_distance(*mine, *_gaussian(path)) for path in two_files}
    assert FidMeter(config, SHAPE).measure(drawn) == pytest.approx(expected, rel=1e-6)
    parts = np.split(drawn, [10, 10])  # the second process drew none
    for found in together(3, lambda rank: FidMeter(config, SHAPE).measure(parts[rank])):
        assert found == pytest.approx(expected, rel=1e-6)


def _gaussian(path: str) -> tuple[np.ndarray, np.ndarray]:
    with np.load(path) as content:
        return content["mu"], content["sigma"]


def test_fid_during_training_is_refused_before_it_begins(
    two_files: list[str], tiny_inception_file: Path, tmp_path: Path
) -> None:
    save_statistics(tmp_path / "other.npz", Statistics(np.zeros(6), np.eye(6), "another extractor"))
    paths = [*two_files, str(tmp_path / "other.npz")]
    with pytest.raises(InputError, match="those of another extractor"):
        FidMeter(EvaluationConfig(fid_stats=paths, extractor=str(tiny_inception_file)), SHAPE)
    with pytest.raises(InputError, match=r"evaluation\.fid_stats, got none"):
        FidMeter(EvaluationConfig(fid_every=5), SHAPE)
    with pytest.raises(InputError, match="found none"):
        FidMeter(EvaluationConfig(fid_stats="absent.npz", extractor=str(tiny_inception_file)), SHAPE)


@pytest.mark.parametrize(
    ("given", "paths"), [(None, ()), ("a.npz", ("a.npz",)), (["a.npz", "b.npz"], ("a.npz", "b.npz"))]
)
def test_one_path_or_several_from_yaml_and_back(given: Any, paths: tuple[str, ...]) -> None:
    section = OmegaConf.structured(EvaluationConfig)
    OmegaConf.set_readonly(section, False)
    loaded: Any = OmegaConf.to_object(OmegaConf.merge(section, {"fid_stats": given}))
    assert [str(path) for path in loaded.paths] == list(paths)
    again: Any = OmegaConf.to_object(OmegaConf.merge(section, {"fid_stats": json.loads(json.dumps(loaded.fid_stats))}))
    assert again == loaded


@pytest.mark.parametrize(
    ("keys", "what"),
    [
        ({"fid_stats": 3}, "fid_stats to be a path or a list"),
        ({"fid_stats": ["a.npz", None]}, "fid_stats to be a path or a list"),
        ({"extractor": ""}, "null is inception"),
        ({"fid_every": 0}, "fid_every >= 1, got 0"),
        ({"fid_threshold": -1}, "fid_threshold >= 0"),
        ({"fid_samples": 1}, "fid_samples >= 2"),
    ],
)
def test_odd_keys_are_refused(keys: dict[str, Any], what: str) -> None:
    with pytest.raises(InputError, match=what):
        EvaluationConfig(**keys)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_finds_what_a_cpu_finds(tiny_inception_file: Path) -> None:
    images = Images.of("all", brightening(200))
    on_cpu, on_gpu = (
        pooled_features(open_extractor(str(tiny_inception_file), SHAPE, device=device), images).moments.gaussian()
        for device in ("cpu", "cuda")
    )
    assert frechet_distance(*on_cpu, *on_gpu) < 1e-6
