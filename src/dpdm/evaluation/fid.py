"""FID: files of statistics, features pooled over processes, and the distance of a set of images to such a file.

A file holds ``mu`` (D,) and ``sigma`` (D, D), as the original's and EDM's do. Ours also name the extractor and the
number of images, which other readers pass over.
"""

import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from dpdm import distributed
from dpdm.errors import InputError
from dpdm.evaluation.arrays import read_arrays
from dpdm.evaluation.features import CHUNK, Extractor, extract
from dpdm.evaluation.frechet import Moments, check_gaussian, frechet_distance
from dpdm.evaluation.inception import INCEPTION, open_extractor
from dpdm.evaluation.quality import score_sums
from dpdm.files import atomic_path
from dpdm.progress import Progress
from dpdm.untrusted import clean

CHUNK_BYTES = 256 * 2**20
MAX_STATISTICS_BYTES = 128 * 2**20  # 4,096 features


@dataclass(frozen=True)
class EvaluationConfig:
    """FID of the present model during training; computed on private images, it is private.

    Attributes:
        fid_stats: path of a file of statistics, or a list of several; see ``paths``. Without one there is no FID.
        extractor: of the features: "inception" or the path of a TorchScript file. None: "inception".
        fid_every: steps between two measurements; None: none.
        fid_threshold: no measurement before this step.
        fid_samples: images that are drawn for one.
    """

    fid_stats: Any = None
    extractor: str | None = None
    fid_every: int | None = None
    fid_threshold: int = 0
    fid_samples: int = 5000

    def __post_init__(self) -> None:
        given = [self.fid_stats] if isinstance(self.fid_stats, str) else self.fid_stats
        if given is not None and not (
            isinstance(given, list | tuple) and all(isinstance(path, str) and path for path in given)
        ):
            raise InputError(f"Expected evaluation.fid_stats to be a path or a list of paths, got {self.fid_stats!r}.")
        if self.extractor == "":
            raise InputError(
                "Expected evaluation.extractor to be inception or a path, got an empty one: null is inception."
            )
        if self.fid_every is not None and self.fid_every < 1:
            raise InputError(f"Expected evaluation.fid_every >= 1, got {self.fid_every}: null turns it off.")
        if self.fid_threshold < 0:
            raise InputError(f"Expected evaluation.fid_threshold >= 0, got {self.fid_threshold}.")
        if self.fid_samples < 2:
            raise InputError(f"Expected evaluation.fid_samples >= 2, got {self.fid_samples}.")

    @property
    def paths(self) -> tuple[Path, ...]:
        """The files of statistics."""
        given = [self.fid_stats] if isinstance(self.fid_stats, str) else self.fid_stats or []
        return tuple(Path(path) for path in given)


@dataclass(frozen=True)
class Images:
    """Images that are read when they are needed.

    Attributes:
        name: what to call them.
        count: number of images.
        shape: (C, H, W).
        read: from row numbers (n,) to (n, C, H, W) uint8.
    """

    name: str
    count: int
    shape: tuple[int, int, int]
    read: Callable[[np.ndarray], np.ndarray]

    @classmethod
    def of(cls, name: str, images: np.ndarray) -> Self:
        """Returns images that are in memory, (N, C, H, W) uint8."""
        shape = (images.shape[1], images.shape[2], images.shape[3])
        return cls(name, len(images), shape, lambda rows: images[rows])


@dataclass(frozen=True)
class Statistics:
    """The Gaussian of a set of features; extractor and number of images where they are known."""

    mu: np.ndarray
    sigma: np.ndarray
    extractor: str | None = None
    count: int | None = None

    @classmethod
    def of(cls, moments: Moments, extractor: Extractor) -> Self:
        mu, sigma = moments.gaussian()
        return cls(mu, sigma, extractor.name, moments.count)


@dataclass(frozen=True)
class Pooled:
    """What all processes together found in a set of images.

    Attributes:
        moments: of the features of all images.
        sample: (n, D) features of evenly chosen images.
        score: sums for the Inception score, or None without class probabilities.
    """

    moments: Moments
    sample: np.ndarray
    score: np.ndarray | None


def pooled_features(extractor: Extractor, images: Images, *, keep: int = 0) -> Pooled:
    """Returns what is needed of the features of all images; each process reads and extracts its share.

    Shared out are whole batches, so that a feature does not depend on the number of processes, and pooled are the
    features' moments: any number of processes gives the same to rounding in float64. Memory holds the moments,
    ``keep`` features, and one chunk.

    Args:
        extractor: for images of this shape.
        images: the same on all processes.
        keep: at most so many features are kept as they are.

    Raises:
        InputError: if a shape does not fit, or a feature is not finite.
    """
    kept = np.unique(np.linspace(0, images.count - 1, min(keep, images.count)).round().astype(np.int64))
    moments, sample = Moments.of(np.empty((0, extractor.dimension))), [np.empty((0, extractor.dimension))]
    score = None
    size = extractor.batch_size
    batches = distributed.share(math.ceil(images.count / size))
    stop = min(batches.stop * size, images.count)
    step = size * max(1, min(CHUNK, CHUNK_BYTES // math.prod(images.shape)) // size)
    total = max(0, stop - batches.start * size)
    with distributed.together(), Progress(f"features of {images.name}", total, unit="images") as progress:
        for start in range(batches.start * size, stop, step):
            chunk = np.arange(start, min(start + step, stop))
            features = extract(extractor, images.read(chunk))
            moments = moments.merged(Moments.of(features))
            sample.append(features[np.isin(chunk, kept)])
            if extractor.class_weights is not None:
                sums = score_sums(features, extractor.class_weights, chunk, images.count)
                score = sums if score is None else score + sums
            progress.advance(len(chunk))
    parts = distributed.gather((moments.count, moments.mean, moments.scatter, np.concatenate(sample), score))
    scores = [part[4] for part in parts if part[4] is not None]
    return Pooled(
        _merged(Moments(*part[:3]) for part in parts),
        np.concatenate([part[3] for part in parts]),
        sum(scores[1:], scores[0]) if scores else None,
    )


def save_statistics(path: Path, statistics: Statistics) -> None:
    """Writes a file that its owner alone may read: computed without noise, it is as private as the images."""
    with atomic_path(path) as temporary:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            np.savez(
                file,
                mu=statistics.mu.astype(np.float64),
                sigma=statistics.sigma.astype(np.float64),
                extractor=np.array(statistics.extractor or ""),
                count=np.array(statistics.count or 0, dtype=np.int64),
            )


def load_statistics(path: Path) -> Statistics:
    """Reads a file of statistics, ours or one with ``mu`` and ``sigma`` alone. Pickled objects are refused.

    Raises:
        InputError: if there is none, or it holds anything else.
    """
    try:
        content = read_arrays(path, ("mu", "sigma", "extractor", "count"), MAX_STATISTICS_BYTES)
        if not {"mu", "sigma"} <= set(content):
            raise ValueError("it does not hold mu and sigma")
        mu, sigma = content["mu"].astype(np.float64), content["sigma"].astype(np.float64)
        extractor = clean(content["extractor"]) if "extractor" in content else ""
        count = int(content["count"]) if "count" in content else 0
        check_gaussian("", mu, sigma)
    except FileNotFoundError:
        raise InputError(
            f"Expected a file of FID statistics at {path}, found none: make one with dpdm fid-stats."
        ) from None
    except (OSError, ValueError, TypeError, OverflowError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"Expected an npz file with mu (D,) and sigma (D, D) at {path}, could not read one ({reason}): make one "
            "with dpdm fid-stats."
        ) from None
    return Statistics(mu, sigma, extractor or None, count or None)


def check_comparable(path: Path, reference: Statistics, extractor: Extractor) -> None:
    """Raises InputError unless the file's statistics are of this extractor, as far as it says."""
    if reference.extractor not in (None, extractor.name):
        raise InputError(
            f"Expected the statistics in {path} to be of {extractor.name}, got those of {reference.extractor}: give "
            "the extractor that they were computed with, or make them anew with dpdm fid-stats."
        )
    if len(reference.mu) != extractor.dimension:
        raise InputError(
            f"Expected {extractor.dimension} features in {path}, as {extractor.name} has, got {len(reference.mu)}: "
            "give the extractor that they were computed with."
        )


def fid(moments: Moments, reference: Statistics) -> float:
    """Returns the Frechet distance of pooled features to ``reference``; computed on one process, for all of them."""
    return distributed.on_main(lambda: frechet_distance(*moments.gaussian(), reference.mu, reference.sigma))


def references(config: EvaluationConfig) -> "dict[Path, Statistics]":
    """Returns the statistics to compare with, by their path.

    Raises:
        InputError: if there is no file or one cannot be used, or there is none of the extractor.
    """
    if config.extractor not in (None, INCEPTION) and not Path(config.extractor).expanduser().is_file():
        raise InputError(
            f"Expected a TorchScript file at evaluation.extractor={config.extractor}, found none: check it."
        )
    if not config.fid_stats:
        raise InputError(
            "Expected evaluation.fid_stats, got none: give a file of dpdm fid-stats, or evaluation.fid_every=null."
        )
    return {path: load_statistics(path) for path in config.paths}


class FidMeter:
    """FID of images during training: opens extractor and statistics once.

    Args:
        config: with at least one path in ``fid_stats``.
        image_shape: (C, H, W).
        device: where features are extracted.

    Raises:
        InputError: if there is no file or one cannot be used, or extractor and statistics do not fit.
        RunError: if the extractor's download fails.
    """

    def __init__(
        self, config: EvaluationConfig, image_shape: tuple[int, int, int], *, device: torch.device | str = "cpu"
    ) -> None:
        with distributed.together():
            self.references = references(config)
        self.extractor = open_extractor(config.extractor or INCEPTION, image_shape, device=device)
        with distributed.together():
            for path, reference in self.references.items():
                check_comparable(path, reference, self.extractor)

    def measure(self, images: np.ndarray) -> dict[str, float]:
        """Returns the FID to each file's statistics, by its path; the same on all processes.

        Private: to be shown with the extractor's name and as outside the guarantee.

        Args:
            images: (n, C, H, W) uint8: this process's part of the drawn images; n may be 0 on some, not on all.
        """
        with distributed.together():
            features = extract(self.extractor, images) if len(images) else np.empty((0, self.extractor.dimension))
            own = Moments.of(features)
        moments = _merged(Moments(*part) for part in distributed.gather((own.count, own.mean, own.scatter)))
        return {str(path): fid(moments, reference) for path, reference in self.references.items()}


def _merged(parts: Iterable[Moments]) -> Moments:
    return reduce(Moments.merged, parts)
