"""Adam on private gradients, whose noise has a known variance; see Kingma and Ba 2014 (arXiv 1412.6980)."""

# torch._foreach_* is what torch.optim itself is made of.
# pyright: reportPrivateImportUsage=false

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from dpdm.errors import InputError

BETA_1, BETA_2, EPS = 0.9, 0.999, 1e-8
LARGEST = 1e6  # of a learning rate and a weight decay: more is a slip
Schedule = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True)
class OptimConfig:
    """Adam's keys.

    Attributes:
        learning_rate: at the start.
        weight_decay: L2 penalty, added to the private gradient.
        schedule: constant; linear: from half-way on falling to 0; or cosine: falling to 0 all the way.
        noise_correction: take the known variance of the privacy noise out of Adam's second moment.
        noise_floor: with it, the least second moment, as a share of the noise's variance.
    """

    learning_rate: float = 3e-4
    weight_decay: float = 0.0
    schedule: Schedule = "constant"
    noise_correction: bool = False
    noise_floor: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.learning_rate <= LARGEST:
            raise InputError(f"Expected optim.learning_rate > 0 and <= {LARGEST:g}, got {self.learning_rate}.")
        if not 0 <= self.weight_decay <= LARGEST:
            raise InputError(f"Expected optim.weight_decay >= 0 and <= {LARGEST:g}, got {self.weight_decay}.")
        if self.schedule not in get_args(Schedule):
            raise InputError(f"Expected optim.schedule to be one of {list(get_args(Schedule))}, got {self.schedule!r}.")
        if not 0 < self.noise_floor <= 1:
            raise InputError(
                f"Expected 0 < optim.noise_floor <= 1, got {self.noise_floor}: 0.1 lets steps get three times longer."
            )


def learning_rate(config: OptimConfig, step: int, num_iterations: int) -> float:
    """Returns the rate of update ``step``; both schedules that fall end near 0."""
    share = step / num_iterations
    match config.schedule:
        case "constant":
            return config.learning_rate
        case "linear":
            return config.learning_rate * min(1.0, 2 * (1 - share))
        case "cosine":
            return config.learning_rate * 0.5 * (1 + math.cos(math.pi * share))


@torch.no_grad()
def adam_step(
    config: OptimConfig,
    parameters: Mapping[str, Tensor],
    gradients: Sequence[Tensor],
    exp_avg: Mapping[str, Tensor],
    exp_avg_sq: Mapping[str, Tensor],
    *,
    step: int,
    num_iterations: int,
    noise_deviation: float,
) -> None:
    """Updates parameters and moments in place.

    m and v are Adam's moments, corrected for their start at 0. The update is -rate m / (sqrt(v) + eps). The privacy
    noise adds its variance s^2 to the mean of v, which makes steps short where gradients are small beside it; with
    ``noise_correction`` v is max(v - s^2, floor s^2) instead (Tang, Panda, Sehwag, Mittal 2023, "DP-AdamBC", arXiv
    2312.14334, with a floor that has the noise's scale).

    Guarantee: a function of the private gradients and of public numbers: post-processing. s is public: the noise
    multiplier times C over the expected batch size.

    Args:
        config: of the run.
        parameters: by name.
        gradients: one for each parameter, in their order.
        exp_avg: m before correction, by name.
        exp_avg_sq: v before correction, by name.
        step: updates made before this one.
        num_iterations: of the whole run, for the schedule.
        noise_deviation: s, of each entry of ``gradients``.
    """
    rate = learning_rate(config, step, num_iterations)
    first, second = 1 - BETA_1 ** (step + 1), 1 - BETA_2 ** (step + 1)
    variance = noise_deviation**2
    # A GPU's host gives few orders in place of thousands.
    names, own, found = list(parameters), list(parameters.values()), list(gradients)
    if len(found) != len(names):
        raise ValueError(f"Expected a gradient for each of {len(names)} parameters, got {len(found)}.")
    if config.weight_decay:
        found = torch._foreach_add(found, torch._foreach_mul(own, config.weight_decay))
    m, v = [exp_avg[name] for name in names], [exp_avg_sq[name] for name in names]
    torch._foreach_lerp_(m, found, 1 - BETA_1)
    torch._foreach_mul_(v, BETA_2)
    torch._foreach_addcmul_(v, found, found, value=1 - BETA_2)
    corrected = torch._foreach_div(v, second)
    if config.noise_correction:
        torch._foreach_sub_(corrected, variance)
        torch._foreach_clamp_min_(corrected, config.noise_floor * variance)
    torch._foreach_sqrt_(corrected)
    torch._foreach_add_(corrected, EPS)
    torch._foreach_addcdiv_(own, m, corrected, value=-rate / first)
