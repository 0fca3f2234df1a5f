"""The private gradient of one step: per-example gradients -> clipped sum -> noise, once -> / expected batch size.

Knows nothing of images: it is handed a function that returns one loss per example.

Abadi et al. 2016 (arXiv 1607.00133), algorithm 1, with Poisson batches and the expected batch size as divisor.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dpdm import distributed
from dpdm.errors import InputError
from dpdm.privacy import gpu_layers
from dpdm.privacy.layers import per_example
from dpdm.privacy.poisson import physical_batches
from dpdm.privacy.step_noise import StepNoise, add_noise

# What float arithmetic can add to the sensitivity, relative. Gradients are scaled to norm C / (1 + TAU), so that the
# sensitivity of what is *computed* is at most C. Norms, scaling and sums are computed in float64. Contributions, as
# multiples of its unit roundoff u = 2^-53, for a batch of n examples and P parameters:
#   norm                P u       < 1e-8 for P < 9e7
#   scale and product   4 u
#   summation           2 n^2 u   < 5e-7 for n < 47,000 (all roundings of both neighbouring sums)
# None of it underflows: gradients are float32 or coarser, so that C / norm > 1e-30 / 1e43.
TAU = 1e-6
LARGEST_BATCH = 47_000
SMALLEST_CLIPPING_NORM = 1e-30
LARGEST_CLIPPING_NORM = 1e30  # of what float32 weights can use
# Numbers that are converted to float64 at a time: on a CPU few enough to stay in the cache, on a GPU to fit its memory.
PIECE_CPU = 2**16
SMALL = 2**12  # gradients of so few numbers an example are laid side by side: each operation has its price
PIECE_GPU = 2**26

PerExampleLoss = Callable[[np.ndarray], Tensor]


@dataclass(frozen=True)
class DPConfig:
    """Privacy keys of a run.

    Attributes:
        enabled: false trains without privacy, which is for images that are public (data.public) alone.
        epsilon: the budget from which the noise multiplier is calibrated; or
        noise_multiplier: the noise itself; exactly one of the two.
        delta: in (0, 1/N).
        clipping_norm: C, bound on one example's gradient, L2.
        selection: how the hyperparameters were chosen, for the statement.
        secure_noise: noise in integers on a grid (see ``discrete``); false: float64 Gaussians, which are open to
            attacks on the gaps between floats, and no faster.
        seed: makes the run reproducible by anybody, and so without any guarantee; for tests alone.
    """

    enabled: bool = True
    epsilon: float | None = None
    noise_multiplier: float | None = None
    delta: float = 1e-5
    clipping_norm: float = 1.0
    selection: str = "by the user; a choice made by looking at the private images is not accounted for"
    secure_noise: bool = True
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.epsilon is not None and not (self.epsilon > 0 and math.isfinite(self.epsilon)):
            raise InputError(f"Expected a finite dp.epsilon > 0, got {self.epsilon}.")
        if self.noise_multiplier is not None and not (
            self.noise_multiplier > 0 and math.isfinite(self.noise_multiplier)
        ):
            raise InputError(f"Expected a finite dp.noise_multiplier > 0, got {self.noise_multiplier}.")
        if not 0 < self.delta < 1:
            raise InputError(f"Expected 0 < dp.delta < 1, got {self.delta}.")
        if not SMALLEST_CLIPPING_NORM <= self.clipping_norm <= LARGEST_CLIPPING_NORM:
            raise InputError(
                f"Expected dp.clipping_norm >= {SMALLEST_CLIPPING_NORM} and <= {LARGEST_CLIPPING_NORM}, got "
                f"{self.clipping_norm}."
            )


@dataclass(frozen=True)
class PrivateGradient:
    """What one step of DP-SGD computes.

    Attributes:
        gradients: one per parameter, float32: the only field that the guarantee covers.
        batch_size: of this batch; *private*, without noise, as are
        figures: (4,) float64, where the gradients are: mean loss, clip fraction (of an empty batch NaN), records whose
            gradient is not finite, and whether the gradients to be released are finite: 1, or 0. To read one of them
            from a GPU is to wait for the step's end.
    """

    gradients: list[Tensor]
    batch_size: int
    figures: Tensor

    @property
    def mean_loss(self) -> float:
        return float(self.figures[0])

    @property
    def clip_fraction(self) -> float:
        return float(self.figures[1])

    @property
    def num_nonfinite(self) -> int:
        return int(self.figures[2])

    @property
    def is_finite(self) -> bool:
        return bool(self.figures[3])


def private_gradient(
    parameters: Mapping[str, Tensor],
    loss: PerExampleLoss,
    batch: np.ndarray,
    *,
    clipping_norm: float,
    noise_multiplier: float,
    expected_batch_size: int,
    physical_batch_size: int,
    noise_key: bytes | None,
    secure_noise: bool = True,
    overlap_noise: bool = False,
) -> PrivateGradient:
    """Returns (sum of clipped per-example gradients + noise_multiplier C z) / expected_batch_size, z standard normal.

    Guarantee: given ``batch`` a Poisson sample of rate q, one call is the Poisson-subsampled Gaussian mechanism with
    sensitivity C and noise multiplier ``noise_multiplier`` in everything that depends on ``gradients``. It holds
    whatever ``loss`` computes, as long as an example's loss depends on no other example, and whatever the physical
    batch size. An empty batch gives noise alone. The divisor is public: the realised batch size never enters.

    Several processes share the batch out: each record is in one process's part, the parts' clipped sums are added, and
    rank 0 alone adds noise, once, to the total; the result is the same everywhere. An empty part is a part like any
    other: every process takes part in every step. The bound of TAU on the summation holds for any order of adding.

    Args:
        parameters: by name, float32.
        loss: called with a piece of ``batch`` (b,), returns b losses, using ``parameters`` by layers with a rule.
        batch: records of the logical batch, (n,), n >= 0; the same on all processes.
        clipping_norm: C > 0.
        noise_multiplier: noise standard deviation / C.
        expected_batch_size: q N.
        physical_batch_size: most examples in one forward pass; 1 needs the least memory.
        noise_key: of this step and purpose alone; needed on rank 0, which keeps it to itself.
        secure_noise: see ``DPConfig``.
        overlap_noise: makes the noise in a thread beside the passes over the network; the same bits.
    """
    if len(batch) > LARGEST_BATCH:
        raise InputError(
            f"Expected a batch of at most {LARGEST_BATCH} images (rounding is bounded up to there), got more."
        )
    noise = None
    if distributed.is_main():
        if noise_key is None:
            raise ValueError("Expected noise_key on rank 0, got None.")
        size = sum(p.numel() for p in parameters.values())
        noise = StepNoise(size, clipping_norm, noise_multiplier, noise_key, secure=secure_noise)
        if overlap_noise:
            noise.begin()
    own = distributed.share(len(batch))
    clipped = clipped_sum(
        parameters,
        loss,
        batch[own.start : own.stop],
        clipping_norm=clipping_norm,
        physical_batch_size=physical_batch_size,
    )
    sums = clipped.sums
    distributed.sum_over_processes(sums)
    if noise is not None:
        add_noise(sums, noise)
    distributed.broadcast_tensors(sums)
    flat = (torch.cat([total.flatten() for total in sums]) / expected_batch_size).float()
    parts = flat.split([total.numel() for total in sums])
    gradients = [part.view_as(total) for part, total in zip(parts, sums, strict=True)]
    return PrivateGradient(gradients, len(batch), _figures(clipped, clipping_norm, flat))


def _figures(clipped: "ClippedSum", clipping_norm: float, gradients: Tensor) -> Tensor:
    """Returns ``PrivateGradient.figures``, of the records of all processes; ``gradients`` are all of them, flat."""
    losses, norms = _everybodys(clipped.losses), _everybodys(clipped.norms)
    finite = gradients.isfinite().all().to(norms.device)
    shares = losses.mean(), (norms > clipping_norm).double().mean()
    return torch.stack([*shares, (~norms.isfinite()).sum().double(), finite.double()])


def _everybodys(values: Tensor) -> Tensor:
    """Returns the values of all processes, in rank order, (n,) float64; where they are, or of several on the CPU."""
    return values if distributed.size() == 1 else torch.cat(distributed.gather(values.cpu()))


@dataclass(frozen=True)
class ClippedSum:
    """Sum of clipped per-example gradients, before any noise: *private*, all of it.

    Attributes:
        sums: one (*shape) float64 per parameter.
        losses: of each example, (n,) float64.
        norms: of each example's gradient before clipping, (n,) float64.
    """

    sums: list[Tensor]
    losses: Tensor
    norms: Tensor


def clipped_sum(
    parameters: Mapping[str, Tensor],
    loss: PerExampleLoss,
    records: np.ndarray,
    *,
    clipping_norm: float,
    physical_batch_size: int,
) -> ClippedSum:
    """Returns the sum over ``records`` (n,), n >= 0, of gradients that are clipped one by one; see ``clip_and_sum``.

    Arguments as of ``private_gradient``. The processes of a group each call it for their own share.
    """
    device = next(iter(parameters.values())).device
    nothing = torch.zeros(0, dtype=torch.float64, device=device)
    sums = [torch.zeros(p.shape, dtype=torch.float64, device=device) for p in parameters.values()]
    losses, norms = [nothing], [nothing]
    for piece in physical_batches(records, physical_batch_size):
        piece_losses, grads = per_example_gradients(parameters, loss, piece)
        losses.append(piece_losses.double())
        norms.append(clip_and_sum(grads, clipping_norm, sums))
        del grads  # of a GPU's memory they may take much, which the next pass needs
    return ClippedSum(sums, torch.cat(losses), torch.cat(norms))


def per_example_gradients(
    parameters: Mapping[str, Tensor], loss: PerExampleLoss, records: np.ndarray
) -> tuple[Tensor, list[Tensor]]:
    """Returns each record's loss (b,), detached, and each parameter's per-example gradients (b, *shape)."""
    with torch.enable_grad():
        with per_example(parameters, len(records)) as collector:
            losses = loss(records)
        if losses.shape != (len(records),):
            raise ValueError(f"Expected one loss for each of {len(records)} examples, got shape {tuple(losses.shape)}.")
        return losses.detach(), collector.of(losses.sum())


def clip_and_sum(per_example_grads: Sequence[Tensor], clipping_norm: float, sums: Sequence[Tensor]) -> Tensor:
    """Adds gradients to ``sums``, each scaled to L2 norm at most C over all parameters together; returns the norms.

    sums += sum_b g_b * min(1, C / ((1 + TAU) ||g_b||)).

    Guarantee: adding or removing one example moves the computed sum by at most ``clipping_norm`` in L2 norm, float
    rounding included (see TAU). An example whose gradient is not finite contributes zero.

    Args:
        per_example_grads: one (b, *shape) per parameter, of float32 or less; may be overwritten. b may be 0.
        clipping_norm: C >= 1e-30.
        sums: one (*shape) float64 per parameter, to be divided by the expected, never the actual, batch size.

    Returns:
        The norms before clipping, (b,) float64, which are private.

    Raises:
        ValueError: if ``clipping_norm`` is out of range.
    """
    if not SMALLEST_CLIPPING_NORM <= clipping_norm < math.inf:
        raise ValueError(f"Expected {SMALLEST_CLIPPING_NORM} <= clipping_norm < inf, got {clipping_norm}.")
    flat = [g.reshape(len(g), math.prod(g.shape[1:])) for g in per_example_grads]
    small = [i for i, g in enumerate(flat) if g.shape[1] <= SMALL]
    rows = [(sums[i].view(-1), g) for i, g in enumerate(flat) if g.shape[1] > SMALL]
    sizes = [flat[i].shape[1] for i in small]
    beside = sums[0].new_zeros(sum(sizes))
    if small:
        rows.append((beside, torch.cat([flat[i] for i in small], dim=1)))
    norms = torch.stack([_squared_norms(g) for _, g in rows]).sum(0).sqrt()
    scale = (clipping_norm / ((1 + TAU) * norms)).clamp(max=1.0)
    usable = torch.isfinite(norms)
    if norms.is_cuda or not bool(usable.all()):  # on a GPU to ask would be to wait
        scale = torch.where(usable, scale, 0.0)
        for _, g in rows:  # 0 * inf would be NaN
            if not gpu_layers.fits(g):
                g.masked_fill_(~usable[:, None], 0.0)
    for total, g in rows:
        _add_weighted(total, g, scale)
    for i, part in zip(small, beside.split(sizes), strict=True):
        sums[i].add_(part.view_as(sums[i]))
    return norms


def _squared_norms(rows: Tensor) -> Tensor:
    """Returns the squared L2 norm of each row of (b, p), (b,) float64; all arithmetic is in float64."""
    if len(rows) and gpu_layers.fits(rows):
        from dpdm.privacy import kernels

        return kernels.squared_norms(rows.contiguous())
    pieces = rows.split(_columns(rows), dim=1)
    return torch.stack([torch.linalg.vector_norm(piece.double(), dim=1).square() for piece in pieces]).sum(0)


def _add_weighted(total: Tensor, rows: Tensor, scale: Tensor) -> None:
    """Adds scale (b,) @ rows (b, p) to ``total`` (p,), all in float64."""
    if len(rows) and gpu_layers.fits(rows):
        from dpdm.privacy import kernels

        total += kernels.weighted_sum(rows.contiguous(), scale)
        return
    for part, piece in zip(total.split(_columns(rows)), rows.split(_columns(rows), dim=1), strict=True):
        part += scale @ piece.double()


def _columns(rows: Tensor) -> int:
    """Returns how many columns of (b, p) are converted to float64 at a time."""
    return max(1, (PIECE_GPU if rows.is_cuda else PIECE_CPU) // max(1, len(rows)))
