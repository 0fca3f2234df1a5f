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
from dpdm.privacy.layers import per_example
from dpdm.privacy.noise import gaussian_noise
from dpdm.privacy.poisson import physical_batches

# What float arithmetic can add to the sensitivity, relative. Gradients are scaled to norm C / (1 + TAU), so that the
# sensitivity of what is *computed* is at most C. Contributions, as multiples of the unit roundoffs u32 = 2^-24 and
# u64 = 2^-53, for a batch of n examples and P parameters:
#   norm in float64               P u64       < 1e-8 for P < 9e7
#   scale and product in float32  3 u32       < 1.8e-7, if the scale is no denormal number: see LARGEST_RATIO
#   summation in float64          2 n^2 u64   < 5e-7 for n < 47,000 (all roundings of both neighbouring sums)
TAU = 1e-6
LARGEST_BATCH = 47_000
LARGEST_RATIO = 2.0**125  # of norm to C: float32 holds C / norm in full precision down to 2^-126
SMALLEST_CLIPPING_NORM = 1e-30  # products may be denormal numbers: sqrt(P) 2^-150 < 1e-7 C

PerExampleLoss = Callable[[np.ndarray], Tensor]


@dataclass(frozen=True)
class DPConfig:
    """Privacy keys of a run.

    Attributes:
        epsilon: the budget from which the noise multiplier is calibrated; or
        noise_multiplier: the noise itself; exactly one of the two.
        delta: in (0, 1/N).
        clipping_norm: C, bound on one example's gradient, L2.
        selection: how the hyperparameters were chosen, for the statement.
        seed: makes the run reproducible by anybody, and so without any guarantee; for tests alone.
    """

    epsilon: float | None = None
    noise_multiplier: float | None = None
    delta: float = 1e-5
    clipping_norm: float = 1.0
    selection: str = "by the user; a choice made by looking at the private images is not accounted for"
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
        if not SMALLEST_CLIPPING_NORM <= self.clipping_norm < math.inf:
            raise InputError(
                f"Expected a finite dp.clipping_norm >= {SMALLEST_CLIPPING_NORM}, got {self.clipping_norm}."
            )


@dataclass(frozen=True)
class PrivateGradient:
    """What one step of DP-SGD computes.

    Attributes:
        gradients: one per parameter, float32: the only field that the guarantee covers.
        batch_size, mean_loss, clip_fraction, num_nonfinite: *private*, without noise; for the private report alone.
            Mean loss and clip fraction of an empty batch are NaN.
    """

    gradients: list[Tensor]
    batch_size: int
    mean_loss: float
    clip_fraction: float
    num_nonfinite: int


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
    """
    if len(batch) > LARGEST_BATCH:
        raise InputError(
            f"Expected a batch of at most {LARGEST_BATCH} images (rounding is bounded up to there), got more."
        )
    sums = [torch.zeros(p.shape, dtype=torch.float64, device=p.device) for p in parameters.values()]
    losses: list[Tensor] = []
    norms: list[Tensor] = []
    own = distributed.share(len(batch))
    for piece in physical_batches(batch[own.start : own.stop], physical_batch_size):
        piece_losses, grads = per_example_gradients(parameters, loss, piece)
        piece_sums, piece_norms = clip_and_sum(grads, clipping_norm)
        for total, part in zip(sums, piece_sums, strict=True):
            total += part
        losses.append(piece_losses.double())
        norms.append(piece_norms)
    distributed.sum_over_processes(sums)
    if distributed.is_main():
        if noise_key is None:
            raise ValueError("Expected noise_key on rank 0, got None.")
        add_noise(sums, noise_multiplier * clipping_norm, noise_key)
    distributed.broadcast_tensors(sums)
    all_losses, all_norms = _everybodys(losses), _everybodys(norms)
    return PrivateGradient(
        [(total / expected_batch_size).float() for total in sums],
        batch_size=len(batch),
        mean_loss=float(all_losses.mean()) if len(batch) else math.nan,
        clip_fraction=float((all_norms > clipping_norm).double().mean()),
        num_nonfinite=int((~torch.isfinite(all_norms)).sum()),
    )


def add_noise(sums: Sequence[Tensor], standard_deviation: float, key: bytes) -> None:
    """Adds independent Gaussian noise to every entry of ``sums``, float64, from one stream of ``key``."""
    noise = gaussian_noise(key, sum(total.numel() for total in sums))
    offset = 0
    for total in sums:
        part = torch.from_numpy(noise[offset : offset + total.numel()]).to(total.device).view(total.shape)
        offset += total.numel()
        total += standard_deviation * part


def _everybodys(values: list[Tensor]) -> Tensor:
    """Returns the values of all processes, in rank order, (n,) float64 on the CPU."""
    own = torch.cat(values).cpu() if values else torch.zeros(0, dtype=torch.float64)
    return torch.cat(distributed.gather(own))


def per_example_gradients(
    parameters: Mapping[str, Tensor], loss: PerExampleLoss, records: np.ndarray
) -> tuple[Tensor, list[Tensor]]:
    """Returns each record's loss (b,), detached, and each parameter's per-example gradients (b, *shape)."""
    with torch.enable_grad():
        with per_example(parameters, len(records)) as leaves:
            losses = loss(records)
        if losses.shape != (len(records),):
            raise ValueError(f"Expected one loss for each of {len(records)} examples, got shape {tuple(losses.shape)}.")
        grads = torch.autograd.grad(losses.sum(), leaves, allow_unused=True, materialize_grads=True)
    return losses.detach(), list(grads)


def clip_and_sum(per_example_grads: Sequence[Tensor], clipping_norm: float) -> tuple[list[Tensor], Tensor]:
    """Returns the sum of gradients, each scaled to L2 norm at most C over all parameters together, and the norms.

    sum_b g_b * min(1, C / ((1 + TAU) ||g_b||)).

    Guarantee: adding or removing one example moves the computed sum by at most ``clipping_norm`` in L2 norm, float
    rounding included (see TAU). An example whose gradient is not finite, or above 2^125 C, contributes zero.

    Args:
        per_example_grads: one (b, *shape) per parameter, float32; overwritten. b may be 0.
        clipping_norm: C >= 1e-30.

    Returns:
        Sums, one (*shape) float64 per parameter, to be divided by the expected, never the actual, batch size; and the
        norms before clipping, (b,) float64, which are private.

    Raises:
        ValueError: if ``clipping_norm`` is out of range.
    """
    if not SMALLEST_CLIPPING_NORM <= clipping_norm < math.inf:
        raise ValueError(f"Expected {SMALLEST_CLIPPING_NORM} <= clipping_norm < inf, got {clipping_norm}.")
    flat = [g.reshape(len(g), -1) for g in per_example_grads]
    squares = torch.stack([torch.linalg.vector_norm(g, dim=1, dtype=torch.float64).square() for g in flat])
    norms = squares.sum(0).sqrt()
    scale = (clipping_norm / ((1 + TAU) * norms)).clamp(max=1.0).float()
    usable = norms <= LARGEST_RATIO * clipping_norm  # not for NaN
    if not bool(usable.all()):
        for g in flat:  # 0 * inf would be NaN
            g[~usable] = 0.0
        scale[~usable] = 0.0
    sums = [
        g.mul_(scale[:, None]).sum(0, dtype=torch.float64).view(like.shape[1:])
        for g, like in zip(flat, per_example_grads, strict=True)
    ]
    return sums, norms
