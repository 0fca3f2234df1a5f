"""The noise of one step of DP-SGD: made from a key alone, if wished beside the step, and added to the sums at its end.

Half of the work needs no sums: the integers of ``discrete``, or float64 Gaussians, are a function of the step's key.
What needs them, rounding to the grid and adding, is done where the sums are: on a GPU they do not leave it.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from dpdm.privacy.discrete import LARGEST_VALUE, grid_for, rounded_gaussian
from dpdm.privacy.noise import gaussian_noise
from dpdm.transfer import to_device


class StepNoise:
    """Gaussian noise for ``size`` numbers, of standard deviation noise_multiplier * sensitivity.

    With ``secure`` up to 1e-6 more, as the sums are rounded to a public grid (``discrete``).

    Guarantee: the numbers are a function of the arguments alone, whenever and in whichever thread they are made. They
    are made once, from a key that serves this one release.

    Args:
        size: numbers in all sums together.
        sensitivity: L2, of the float64 sums as computed.
        noise_multiplier: noise standard deviation / sensitivity.
        key: of this one release.
        secure: noise in integers on a grid; else float64 Gaussians.

    Raises:
        InputError: see ``discrete.grid_for``.
    """

    def __init__(
        self, size: int, sensitivity: float, noise_multiplier: float, key: bytes, *, secure: bool = True
    ) -> None:
        self.size, self.key = size, key
        self.standard_deviation = noise_multiplier * sensitivity
        self.grid = grid_for(sensitivity, noise_multiplier, size) if secure else None
        self._result: Callable[[], np.ndarray] = self._make

    def begin(self) -> None:
        """Starts to make the numbers in a thread of their own; ``numbers`` then waits for it."""
        thread = ThreadPoolExecutor(1, "step noise")
        self._result = thread.submit(self._make).result
        thread.shutdown(wait=False)  # it ends with its one piece of work, whatever becomes of the step

    def numbers(self) -> np.ndarray:
        """Returns the noise, (size,): int64 in units of the grid if there is one, else float64."""
        return self._result()

    def _make(self) -> np.ndarray:
        if self.grid is not None:
            return rounded_gaussian(self.key, self.size, self.grid.bits)
        return self.standard_deviation * gaussian_noise(self.key, self.size)


def add_noise(sums: Sequence[Tensor], noise: StepNoise) -> None:
    """Adds to every entry of ``sums`` its own number of ``noise``, in place.

    Guarantee: what ``discrete.secure_gaussian`` states, and the same bits, if the noise is secure.

    Args:
        sums: float64, all on one device, ``noise.size`` numbers together.
        noise: of these sums alone.

    Raises:
        ValueError: if sums on a CPU are not finite. On a GPU, where to ask would be to wait, the caller looks later.
    """
    flat = torch.cat([total.flatten() for total in sums])
    numbers = to_device(noise.numbers(), flat.device)
    if noise.grid is not None:
        noisy = (to_grid(flat, noise.grid.spacing) + numbers).double() * noise.grid.spacing
    else:
        noisy = flat + numbers
    for total, part in zip(sums, noisy.split([total.numel() for total in sums]), strict=True):
        total.copy_(part.view_as(total))


def to_grid(values: Tensor, spacing: float) -> Tensor:
    """Returns values / spacing as integers, int64: ``discrete.to_grid`` on the device of ``values``, bit for bit.

    Guarantee: each is within 3/4 of the real quotient, or cut off at +-2^51.
    """
    if not values.is_cuda and not bool(torch.isfinite(values).all()):
        raise ValueError("Expected finite sums, got some that are not.")
    # A number as divisor is turned into a factor on a GPU, which rounds twice: 1/2 in place of 1/4 of a spacing.
    quotient = values / torch.full((), spacing, dtype=values.dtype, device=values.device)
    return quotient.clamp_(-LARGEST_VALUE, LARGEST_VALUE).round_().long()
