"""What the warm-up buys: noisy means of each class, and, if asked for, how its images differ from them."""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from scipy.fft import dct

from dpdm.data.archive import ImageArchive
from dpdm.errors import InputError
from dpdm.privacy.central import (
    CELL_WEIGHT,
    WarmupConfig,
    default_clipping_norm,
    default_covariance_clipping_norm,
    noisy_class_means,
)
from dpdm.privacy.covariance import check_size, noisy_class_covariances, principal_factors
from dpdm.privacy.noise import derive_key, random_words, to_uniform

PIECE = 1024  # images decoded at a time
FINE = 2.0**15  # steps of which a deviation and a cosine are whole numbers
STANDS_OUT = 4.0  # least count of a cell, in standard deviations of its noise, by which its own moments are taken
CENTRE = 2.0**10  # steps of a centre: what hardware changes in its last bits is nearly always rounded away


@dataclass(frozen=True)
class Central:
    """What the warm-up bought: with noise, so that it may be used in any way.

    Attributes:
        means: (cells, C, H, W) float64, pixels about [0, 1] but not limited to it.
        labels: (cells,) int64.
        class_sizes: images of each class, (num_classes,) float64.
        frequencies: of the classes, by which images are to be drawn, (num_classes,) float64; None if not counted.
        factors: of each class's covariance, or of each cell's if they are bought, by the lowest frequencies each way,
            (num_classes or cells, rank, C, side, side) float64; None without covariances.
        shares: how often images of a class are of each of its cells, (cells,) float64; None: all equally often.
    """

    means: np.ndarray
    labels: np.ndarray
    class_sizes: np.ndarray
    frequencies: np.ndarray | None = None
    factors: np.ndarray | None = None
    shares: np.ndarray | None = None

    def centres(self) -> np.ndarray:
        """Returns the mean of each class's cells, in [0, 1] and in steps of 1 / CENTRE, (num_classes, C, H, W)."""
        cells = len(self.labels) // len(self.class_sizes)
        return _in_steps(self.means.reshape(-1, cells, *self.means.shape[1:]).mean(1))


def central_images(archive: ImageArchive, config: WarmupConfig, *, num_classes: int, key: bytes) -> Central:
    """Returns noisy class means as images, and class sizes; see ``noisy_class_means`` for the guarantee.

    Of a group of images one takes part, chosen by the key.

    Guarantee: a record, an image or a group, adds one vector and is counted once, in a cell that is, like the vector, a
    function of this record, its number and the key.

    Args:
        archive: the private images.
        config: its noise multiplier, cells, clipping norm and weight of counts.
        num_classes: 0 without classes.
        key: of this purpose alone.
    """
    shape = (archive.num_channels, archive.resolution, archive.resolution)
    chosen = _choose(archive, key)
    found = noisy_class_means(
        (piece.reshape(len(piece), -1) for _, piece in _pieces(archive, chosen)),
        archive.labels[chosen] if num_classes and archive.labels is not None else None,
        dataset_size=len(chosen),
        num_classes=max(num_classes, 1),
        means_per_class=config.means_per_class,
        clipping_norm=config.clipping_norm or default_clipping_norm(math.prod(shape)),
        noise_multiplier=config.noise_multiplier,
        key=key,
        count_weight=config.count_weight,
    )
    labels = np.repeat(np.arange(max(num_classes, 1)), config.means_per_class)
    means = found.means.reshape(-1, *shape)
    if config.covariance_noise_multiplier is not None:  # means that will only be distorted do better with their noise
        means = with_less_noise(means, found.noise)
    return Central(means, labels, found.sizes, found.frequencies)


def with_less_noise(means: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """Returns noisy images with each frequency drawn back to 0 as far as its noise hides it.

    By the share of the noise's variance in that of a frequency (empirical Bayes; Efron and Morris 1973). Frequencies
    of one wavelength, to the nearest whole number of half waves, are taken together, and those of all channels and
    images, which count for the less the noisier they are. Looks at no data: its arguments are released or public.

    Args:
        means: (n, C, H, W) float64, H = W.
        noise: standard deviation of each one's pixels, (n,).
    """
    all_waves = cosines(means.shape[-1])
    return np.asarray(all_waves.T @ _less_noise(all_waves @ means @ all_waves.T, noise) @ all_waves)


def _less_noise(coefficients: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """Does what ``with_less_noise`` does, to the lowest frequencies of images, (n, C, side, side)."""
    side = np.arange(coefficients.shape[-1])
    lengths = np.rint(np.hypot(side[:, None], side)).astype(np.int64)
    variance = np.maximum(np.square(noise), 1e-300)
    less = np.empty_like(coefficients)
    for length in range(lengths.max() + 1):
        found = coefficients[:, :, lengths == length]
        signal = max(0.0, float(np.average(np.square(found).mean((1, 2)) - variance, weights=1 / variance)))
        less[:, :, lengths == length] = (signal / (signal + variance))[:, None, None] * found
    return less


def with_covariances(central: Central, archive: ImageArchive, config: WarmupConfig, *, key: bytes) -> Central:
    """Returns ``central`` with noisy covariances; see ``noisy_class_covariances`` for the guarantee.

    Of a group of images one takes part, chosen by the key.

    Guarantee: a record adds the product of one vector with itself, a function of this record, the key and
    ``central``, which was released before.

    Args:
        central: the noisy means and sizes.
        archive: the private images.
        config: its noise multiplier, clipping norm, side and rank.
        key: of this purpose alone.
    """
    assert config.covariance_noise_multiplier is not None  # the caller has looked
    centres = central.centres()
    num_classes, channels, side = len(centres), archive.num_channels, archive.resolution
    chosen = _choose(archive, key)
    of_record = _labels(archive, chosen, num_classes)
    fewer, norm = min(side, config.covariance_side), _covariance_norm(archive, config)
    covariances = noisy_class_covariances(
        (deviations(piece, centres[of_record[rows]], fewer) for rows, piece in _pieces(archive, chosen)),
        of_record,
        dataset_size=len(chosen),
        num_classes=num_classes,
        clipping_norm=norm,
        noise_multiplier=config.covariance_noise_multiplier,
        key=key,
        class_sizes=central.class_sizes,
    )
    noise = config.covariance_noise_multiplier * norm**2 / math.sqrt(2) / central.class_sizes
    factors = principal_factors(covariances, noise, config.covariance_rank).swapaxes(1, 2)
    return replace(central, factors=_as_waves(factors, channels))


@dataclass(frozen=True)
class Split:
    """How the images of each class are told apart: by the sides of its first principal directions on which they lie.

    Attributes:
        centres: of each class, (num_classes, C, H, W) float64, in steps of 1 / CENTRE.
        directions: (num_classes, splits, D) float64: of norm FINE, but in whole numbers; zeros where too few stood out.
        cell_centres: where images of a cell are expected, (num_classes * 2^splits, C, H, W) float64, in such steps.
    """

    centres: np.ndarray
    directions: np.ndarray
    cell_centres: np.ndarray

    def digest(self) -> str:
        """Returns a hash of all by which an image's cell and its distance from that cell's centre are found."""
        parts = (self.centres, self.directions, self.cell_centres)
        return hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()

    def cells(self, images: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Returns the cell of each image, (n,), class-major.

        Guarantee: a function of that image and its label alone, and of the split. The same on any hardware: products
        of whole numbers whose sums are below 2^30 times the norm of an all-white image, so float64 adds them exactly.

        Args:
            images: (n, C, H, W) in [0, 1].
            labels: (n,).
        """
        side = math.isqrt(self.directions.shape[2] // images.shape[1])
        distances = np.rint(deviations(images, self.centres[labels], side) * FINE)
        above = np.einsum("nd,nsd->ns", distances, self.directions[labels]) > 0
        return np.asarray(labels * 2 ** above.shape[1] + above @ 2 ** np.arange(above.shape[1]))


def split_classes(central: Central, config: WarmupConfig) -> Split:
    """Returns how the classes of ``central``, which has covariances, are split ``config.splits`` times.

    Images of a Gaussian lie on either side of a direction equally often, and are there sqrt(2 / pi) of its standard
    deviation from the mean on average: there a cell's images are expected. Looks at no data.
    """
    assert central.factors is not None  # the caller has bought them
    centres, splits = central.centres(), config.splits
    num_classes, channels, side = centres.shape[:3]
    first = central.factors[:, :splits].reshape(num_classes, splits, -1)
    largest = np.take_along_axis(first, np.abs(first).argmax(2, keepdims=True), 2)
    first = first * np.where(largest < 0, -1, 1)  # one library finds a direction where another finds its opposite
    lengths = np.linalg.norm(first, axis=2, keepdims=True)
    directions = np.rint(first / np.maximum(lengths, 1e-12) * FINE) + 0.0  # no zero below 0, which has other bytes
    signs = (np.arange(2**splits)[:, None] >> np.arange(splits) & 1) * 2 - 1
    expected = math.sqrt(2 / math.pi) * np.einsum("ks,csd->ckd", signs, first)
    moved = centres[:, None] + as_images(_as_waves(expected, channels), side)
    return Split(centres, directions, _in_steps(moved).reshape(-1, channels, side, side))


def with_cells(central: Central, split: Split, archive: ImageArchive, config: WarmupConfig, *, key: bytes) -> Central:
    """Returns ``central`` with a mean and a covariance of each cell; see ``noisy_class_covariances`` for the guarantee.

    An image's vector is its distance from its cell's expected centre and, behind it, a constant. Products of the vector
    with itself then hold all that makes a cell's Gaussian: how many images it has, their sum and their squares. One
    that is clipped counts for less in all three. A cell whose number does not stand out from its noise gets its class's
    mean and covariance, and one that shows no direction of its own its class's covariance.

    Of a group of images one takes part, chosen by the key.

    Guarantee: a record adds the product of one vector with itself in one cell, both functions of this record, the key
    and ``split``, which was computed from what was released before.

    Args:
        central: with covariances, of which ``split`` was made.
        split: into cells.
        archive: the private images.
        config: its noise multiplier of cells, and clipping norm, side and rank of covariances.
        key: of this purpose alone.
    """
    assert config.cell_noise_multiplier is not None  # WarmupConfig has looked
    chosen = _choose(archive, key)
    labels = _labels(archive, chosen, len(split.centres))
    cells = np.concatenate([split.cells(piece, labels[rows]) for rows, piece in _pieces(archive, chosen)])
    side, norm = min(archive.resolution, config.covariance_side), _covariance_norm(archive, config)

    def vectors() -> Iterator[np.ndarray]:
        for rows, piece in _pieces(archive, chosen):
            distances = deviations(piece, split.cell_centres[cells[rows]], side)
            yield np.pad(distances, ((0, 0), (0, 1)), constant_values=CELL_WEIGHT * norm)

    longest = norm * math.sqrt(1 + CELL_WEIGHT**2)
    moments = noisy_class_covariances(
        vectors(),
        cells,
        dataset_size=len(chosen),
        num_classes=len(split.cell_centres),
        clipping_norm=longest,
        noise_multiplier=config.cell_noise_multiplier,
        key=key,
        class_sizes=np.ones(len(split.cell_centres)),
    )
    noise, rank = config.cell_noise_multiplier * longest**2, config.covariance_rank
    return _with_moments(central, split, moments, noise=noise, constant=CELL_WEIGHT * norm, rank=rank)


def _with_moments(
    central: Central, split: Split, moments: np.ndarray, *, noise: float, constant: float, rank: int
) -> Central:
    """Returns ``central`` with cells of the given noisy moments; looks at no data.

    Args:
        central: with covariances.
        split: into cells.
        moments: of each cell, (cells, D + 1, D + 1).
        noise: standard deviation of an entry on their diagonals, sqrt(2) of that of one beside it.
        constant: the last number of each vector.
        rank: most directions of each.
    """
    assert central.factors is not None  # the caller has bought them
    num_classes, channels, side = split.centres.shape[:3]
    each = len(moments) // num_classes
    of_cell = np.repeat(np.arange(num_classes), each)
    counts = moments[:, -1, -1] / constant**2
    found = counts > STANDS_OUT * noise / constant**2
    means, factors = split.centres[of_cell], central.factors[of_cell]
    if found.any():
        size, beside = counts[found], noise / math.sqrt(2) / counts[found]
        sums = moments[found, -1, :-1] / constant / size[:, None]
        waves = _less_noise(_as_waves(sums[:, None], channels)[:, 0], beside / constant)
        less = waves.reshape(sums.shape)
        covariances = moments[found, :-1, :-1] / size[:, None, None] - less[:, :, None] * less[:, None, :]
        own = _as_waves(principal_factors(covariances, beside, rank).swapaxes(1, 2), channels)
        means[found] = split.cell_centres[found] + as_images(waves, side)
        factors[found] = np.where(own.any((1, 2, 3, 4), keepdims=True), own, factors[found])
    shares = counts.clip(1e-9).reshape(num_classes, each)
    shares = (shares / shares.sum(1, keepdims=True)).ravel()
    return replace(central, means=means, labels=np.repeat(central.labels, each), factors=factors, shares=shares)


def check_covariances(config: WarmupConfig, archive: ImageArchive, num_classes: int) -> None:
    """Raises InputError if the images' covariances, where they are to be bought, have too many numbers in all."""
    if config.enabled and config.covariance_noise_multiplier is not None:
        size = archive.num_channels * min(archive.resolution, config.covariance_side) ** 2
        check_size(max(num_classes, 1), size)
        if config.splits > size:
            raise InputError(
                f"Expected train.warmup.splits <= {size}, the numbers by which these images are told apart, got "
                f"{config.splits}: lower it, or raise train.warmup.covariance_side."
            )
        if config.splits:
            check_size(max(num_classes, 1) * 2**config.splits, size + 1, cells=True)


def deviations(images: np.ndarray, centres: np.ndarray, side: int) -> np.ndarray:
    """Returns images less their centres, (n, C, H, W) both, by their ``side`` lowest frequencies each way, (n, D).

    These are coefficients of the orthonormal cosine transform (Ahmed, Natarajan and Rao 1974). Images put most of their
    variance there; pixels are many more numbers, and so is their noise.

    Guarantee: the same bits on any hardware, where centres are. Both products are of whole numbers, at most 2^30 times
    the side in all, which is below 2^53: so they are exact, in whatever order they are added.
    """
    waves = np.rint(cosines(images.shape[-1])[:side] * FINE)
    upright = np.rint(waves @ np.rint((images - centres) * FINE) / FINE)
    return (upright @ waves.T / FINE**2).reshape(len(images), -1)


def cosines(side: int) -> np.ndarray:
    """Returns the orthonormal cosines over ``side`` pixels, (side, side): a row for each frequency, from 0 on."""
    return np.asarray(dct(np.eye(side), axis=0, norm="ortho"))


def _in_steps(images: np.ndarray) -> np.ndarray:
    """Returns images in [0, 1] and in steps of 1 / CENTRE."""
    return np.asarray(np.rint(images.clip(0, 1) * CENTRE) / CENTRE)


def as_images(waves: np.ndarray, side: int) -> np.ndarray:
    """Returns the images (..., side, side) whose lowest frequencies are ``waves``, (..., fewer, fewer)."""
    low = cosines(side)[: waves.shape[-1]]
    return np.asarray(low.T @ waves @ low)


def _as_waves(vectors: np.ndarray, channels: int) -> np.ndarray:
    """Returns vectors (n, m, C * side * side), as ``deviations`` makes them, as (n, m, C, side, side)."""
    side = math.isqrt(vectors.shape[-1] // channels)
    return vectors.reshape(*vectors.shape[:2], channels, side, side)


def _covariance_norm(archive: ImageArchive, config: WarmupConfig) -> float:
    return config.covariance_clipping_norm or default_covariance_clipping_norm(
        archive.num_channels * archive.resolution**2
    )


def _labels(archive: ImageArchive, chosen: np.ndarray, num_classes: int) -> np.ndarray:
    """Returns the classes of ``chosen`` images, (n,) int64; 0 for all if there are not several."""
    if num_classes > 1 and archive.labels is not None:
        return archive.labels[chosen].astype(np.int64)
    return np.zeros(len(chosen), np.int64)


def _choose(archive: ImageArchive, key: bytes) -> np.ndarray:
    """Returns for each record the image that takes part."""
    count = archive.num_records
    return archive.choose_images(np.arange(count), to_uniform(random_words(derive_key(key, "images"), count)))


def _pieces(archive: ImageArchive, chosen: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Yields which of the ``chosen`` images come and their pixels in [0, 1], (n, C, H, W) float64."""
    for start in range(0, len(chosen), PIECE):
        rows = slice(start, start + PIECE)
        yield rows, archive.read(chosen[rows]) / 255.0
