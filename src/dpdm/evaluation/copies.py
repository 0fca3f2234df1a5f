"""Whether synthetic images are copies of training images: nearest neighbours, judged by how near real images are.

The figures are computed on private images without noise: they are the owner's, and outside the guarantee.

An image is *near* a training image if its distance to it is less than half its mean distance to the 50 nearest ones:
so Carlini et al. 2023 (arXiv 2301.13188) tell which images of a small diffusion model are extracted ones. It is *very
near* at less than a quarter. Distances are Euclidean, of pixels: a copy that is mirrored, shifted or recoloured is not
found. Some kinds of images are near each other without anybody having copied, so training images are judged in the same
way, each against all the others.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import hypergeom
from torch import Tensor

from dpdm.errors import InputError
from dpdm.evaluation.fid import Images
from dpdm.progress import Progress

NEIGHBOURS = 50
NEAR, VERY_NEAR = 0.5, 0.25
BASELINE_IMAGES = 2000
LEVEL = 0.01
EXAMPLES = 10
BYTES_PER_PASS = 2**29  # of pixels that one pass over the training images is compared with
ROWS, COLUMNS = 1024, 4096  # of distances that are computed at a time


@dataclass(frozen=True)
class Neighbours:
    """The k nearest training images of n images, from the nearest on.

    Attributes:
        squares: (n, k) squared distances of 8-bit pixels: whole numbers, exact.
        indices: (n, k) int64 which training images.
    """

    squares: np.ndarray
    indices: np.ndarray


@dataclass(frozen=True)
class Closeness:
    """What is close to a training image, of a number of images.

    Attributes:
        total: how many images were looked at.
        exact: (e,) which of them equal one training image, pixel by pixel, that no other training image equals.
        shared: (s,) which equal several training images (an empty scan, say).
        very_near, near: which are so near one without being equal to it; (v,) and (m,), each image in one of the two.
        typical: median over the images of the distance to the nearest one, in grey levels (root mean square of pixels).
    """

    total: int
    exact: np.ndarray
    shared: np.ndarray
    very_near: np.ndarray
    near: np.ndarray
    typical: float


@dataclass(frozen=True)
class CopyReport:
    """What was found of ``synthetic`` images, of ``real`` ones in the same way, and pairs to look at.

    Attributes:
        pairs: (synthetic image, training image, distance in grey levels), the closest first, at most 10.
    """

    synthetic: Closeness
    real: Closeness
    num_training: int
    pairs: tuple[tuple[int, int, float], ...]

    @property
    def copies(self) -> int:
        """How many synthetic images are copies by our judgement.

        An image that equals one training image and no other always is. Those that equal several, that are very near,
        and that are at least near are copies if real images never are so, or so seldom that chance would give the
        synthetic ones their number with a probability below 1 % (hypergeometric test).
        """
        found, real = self.synthetic, self.real
        copies = len(found.exact)
        if _beyond(len(found.shared), found.total, len(real.shared), real.total):
            copies += len(found.shared)
        very_near, real_very_near = len(found.very_near), len(real.very_near) + len(real.exact)
        near, real_near = very_near + len(found.near), real_very_near + len(real.near)
        if _beyond(near, found.total, real_near, real.total):
            return copies + near
        return copies + very_near if _beyond(very_near, found.total, real_very_near, real.total) else copies


def find_copies(synthetic: Images, training: Images, *, device: torch.device | None = None) -> CopyReport:
    """Compares every synthetic image with every training image.

    Time grows with the product of both numbers; memory does not: at most 512 MiB of pixels and blocks of distances.

    Args:
        synthetic, training: of one shape; at least 3 training images.
        device: to compute on; None is the CPU. The distances are exact, so that nothing depends on it.

    Raises:
        InputError: if the shapes differ or there are too few training images.
    """
    if synthetic.shape != training.shape:
        raise InputError(
            f"Expected synthetic images of shape {training.shape} as the training images, got {synthetic.shape}: give "
            "the archive that the model was trained on."
        )
    if training.count < 3:
        raise InputError(f"Expected at least 3 training images to compare with, got {training.count}.")
    device = device or torch.device("cpu")
    rows = np.unique(np.linspace(0, training.count - 1, min(BASELINE_IMAGES, training.count)).astype(np.int64))
    count = min(NEIGHBOURS, training.count - 1)
    found = nearest(synthetic, np.arange(synthetic.count), training, count, device=device)
    baseline = nearest(training, rows, training, count, device=device, leave_out=True)
    pixels = int(np.prod(training.shape))
    judged = closeness(found, pixels)
    suspects = np.concatenate([judged.exact, judged.shared, judged.very_near, judged.near])
    suspects = suspects[np.argsort(found.squares[suspects, 0], kind="stable")][:EXAMPLES]
    pairs = tuple(
        (int(i), int(found.indices[i, 0]), float(np.sqrt(found.squares[i, 0] / pixels))) for i in suspects.tolist()
    )
    return CopyReport(judged, closeness(baseline, pixels), training.count, pairs)


def nearest(
    images: Images,
    rows: np.ndarray,
    training: Images,
    count: int,
    *,
    device: torch.device,
    leave_out: bool = False,
) -> Neighbours:
    """Returns the ``count`` nearest training images of ``images``' rows (n,).

    |x - y|^2 = |x|^2 + |y|^2 - 2 xy, in whole numbers: pixels less 128 are at most 2^7, so that a product of D of them
    and its parts are at most D 2^14, which float32 holds exactly up to D = 1024, float64 for all others.

    Args:
        images: with what to compare the training images.
        rows: which of them.
        training: among which to look.
        count: k, at most the number of training images, less one with ``leave_out``.
        device: to compute on.
        leave_out: ``images`` are the training images: no row is its own neighbour.
    """
    pixels = int(np.prod(training.shape))
    exact = torch.float32 if pixels <= 1024 else torch.float64
    size = max(1, BYTES_PER_PASS // pixels)
    parts = [rows[start : start + size] for start in range(0, len(rows), size)]
    found = []
    with Progress(f"Comparing {len(rows)} images", len(parts) * training.count, unit="training images") as progress:
        for part in parts:
            queries = torch.from_numpy(images.read(part).reshape(len(part), -1)).to(device)
            own = torch.from_numpy(part).to(device) if leave_out else None
            squares = torch.full((len(part), count), torch.inf, dtype=torch.float64, device=device)
            indices = torch.full((len(part), count), -1, dtype=torch.int64, device=device)
            for start in range(0, training.count, COLUMNS):
                stop = min(start + COLUMNS, training.count)
                read = training.read(np.arange(start, stop)).reshape(stop - start, -1)
                targets = torch.from_numpy(read).to(device).to(exact) - 128
                _merge(squares, indices, queries, own, targets, start)
                progress.advance(stop - start)
            found.append((squares.cpu().numpy(), indices.cpu().numpy()))
    return Neighbours(*(np.concatenate(columns) for columns in zip(*found, strict=True)))


def closeness(found: Neighbours, pixels: int) -> Closeness:
    """Judges images by their neighbours; ``pixels`` is the number of values in an image."""
    squares = found.squares
    distances = np.sqrt(squares)
    equal = squares[:, 0] == 0
    alone = squares[:, 1] > 0
    mean = distances.mean(axis=1)
    very_near = ~equal & (distances[:, 0] < VERY_NEAR * mean)
    near = ~equal & ~very_near & (distances[:, 0] < NEAR * mean)
    return Closeness(
        len(squares),
        np.flatnonzero(equal & alone),
        np.flatnonzero(equal & ~alone),
        np.flatnonzero(very_near),
        np.flatnonzero(near),
        float(np.median(distances[:, 0]) / np.sqrt(pixels)),
    )


def describe(report: CopyReport) -> Iterator[str]:
    """Yields what was found as lines for the owner's terminal."""
    s, r = report.synthetic, report.real
    yield f"Copies of training images among {s.total:,} synthetic ones (each compared with {report.num_training:,}):"
    yield f"  {'':34} {'synthetic':>10} {'real':>10}"
    for name, ours, theirs in (
        ("equal to one training image", len(s.exact), len(r.exact)),
        ("equal to several", len(s.shared), len(r.shared)),
        ("very near one (a quarter as far)", len(s.very_near), len(r.very_near)),
        ("near one (half as far)", len(s.near), len(r.near)),
        ("images looked at", s.total, r.total),
    ):
        yield f"  {name:34} {ours:>10,} {theirs:>10,}"
    yield f"  {'typical distance, grey levels':34} {s.typical:>10.2f} {r.typical:>10.2f}"
    if not (r.exact.size or r.shared.size or r.very_near.size or r.near.size) and (s.very_near.size or s.near.size):
        yield "  (no real image is so near another: then a single synthetic one counts; look at it, it may be chance)"
    yield "  (real: training images, each compared with all the others; as far: as the 50 nearest are, on average)"
    for synthetic, training, distance in report.pairs:
        yield f"  synthetic image {synthetic} and training image {training}: {distance:.2f} grey levels apart"


def _merge(squares: Tensor, indices: Tensor, queries: Tensor, own: Tensor | None, targets: Tensor, start: int) -> None:
    """Updates the nearest so far, in place, by ``targets``, which are training images from number ``start`` on."""
    count = squares.shape[1]
    lengths = targets.square().sum(1, dtype=torch.float64)
    for first in range(0, len(queries), ROWS):
        block = slice(first, min(first + ROWS, len(queries)))
        x = queries[block].to(targets.dtype) - 128
        distances = x.square().sum(1, dtype=torch.float64)[:, None] + lengths - 2 * (x @ targets.T).double()
        if own is not None:
            here = own[block] - start
            inside = (here >= 0) & (here < len(targets))
            distances[torch.nonzero(inside)[:, 0], here[inside]] = torch.inf
        best, where = distances.topk(min(count, len(targets)), largest=False)
        both = torch.cat([squares[block], best], 1)
        squares[block], order = both.topk(count, largest=False, sorted=True)
        indices[block] = torch.cat([indices[block], where + start], 1).gather(1, order)


def _beyond(found: int, total: int, base: int, base_total: int) -> bool:
    """Whether ``found`` of ``total`` is more than ``base`` of ``base_total`` explains."""
    if found == 0:
        return False
    p = hypergeom.sf(found - 1, total + base_total, found + base, total)
    return base == 0 or bool(p < LEVEL)
