"""The exponential moving average of the weights, which is what is released."""

# torch._foreach_* is what torch.optim itself is made of.
# pyright: reportPrivateImportUsage=false

from collections.abc import Mapping

import torch
from torch import Tensor

from dpdm.errors import InputError


def ema_decay(rate: float, num_updates: int) -> float:
    """Returns min(rate, (1 + n) / (10 + n)): at first short, so that the initial weights are forgotten.

    Args:
        rate: of the long run, in [0, 1).
        num_updates: n, updates made before the present one.

    Raises:
        InputError: if ``rate`` is outside [0, 1) or ``num_updates`` is negative.
    """
    if not 0.0 <= rate < 1.0:
        raise InputError(f"Expected 0 <= model.ema_rate < 1, got {rate}: the paper uses 0.999.")
    if num_updates < 0:
        raise InputError(f"Expected num_updates >= 0, got {num_updates}.")
    return min(rate, (1 + num_updates) / (10 + num_updates))


@torch.no_grad()
def update_ema(ema: dict[str, Tensor], parameters: Mapping[str, Tensor], decay: float) -> None:
    """Sets every average to decay * average + (1 - decay) * parameter, in place.

    Raises:
        InputError: if the two have different names.
    """
    if ema.keys() != parameters.keys():
        odd = sorted(ema.keys() ^ parameters.keys())
        raise InputError(f"Expected the averaged weights and the network to have the same names, got {odd}.")
    now = [parameters[name].to(average) for name, average in ema.items()]
    torch._foreach_lerp_(list(ema.values()), now, 1.0 - decay)
