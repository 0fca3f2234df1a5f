"""``dpdm audit step``: training's own step, many times with a canary and many times without."""

import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self, cast

import numpy as np
import torch
from scipy.linalg import hadamard
from torch import Tensor, nn
from torch.nn import functional as F

from dpdm import account
from dpdm import config as configs
from dpdm.audit import GAIN, check_confidence, check_private
from dpdm.config import Config
from dpdm.data.archive import ArchiveWriter, ImageArchive
from dpdm.errors import InputError, RunError
from dpdm.plan import Plan, make_plan
from dpdm.privacy import accounting, noise
from dpdm.privacy.accounting import Mechanism
from dpdm.privacy.auditing import TwoWorldBound, two_world_bound
from dpdm.privacy.dpsgd import PrivateGradient
from dpdm.progress import Progress
from dpdm.run import Run
from dpdm.train import private_step, step_keys

SIDE = 8  # of the images, in pixels
NUM_OTHERS = 3  # records beside the canary


@dataclass(frozen=True)
class StepClaim:
    """What one step is said to be.

    Attributes:
        mechanism: its sampling rate and noise multiplier.
        delta: at which epsilon is claimed.
        clipping_norm: C.
        secure_noise: how the noise is made, see ``DPConfig``.
    """

    mechanism: Mechanism
    delta: float
    clipping_norm: float = 1.0
    secure_noise: bool = True

    @classmethod
    def of_epsilon(cls, epsilon: float, *, delta: float, sampling_rate: float) -> Self:
        """Returns the claim of a step whose noise was calibrated to ``epsilon``."""
        account.check_target(epsilon, None, "--epsilon", "--noise-multiplier")
        noise_multiplier = accounting.calibrate_noise_multiplier(epsilon, delta, sampling_rate, 1)
        return cls(Mechanism("DP-SGD", sampling_rate, noise_multiplier, 1), delta)

    @classmethod
    def of_run(cls, config: Config, dataset_size: int) -> Self:
        """Returns the claim that a run of ``config`` on so many images makes of each of its steps."""
        if dataset_size < 1:
            raise InputError(f"Expected --dataset-size >= 1, got {dataset_size}.")
        dp = config.dp
        check_private(config)
        return cls(make_plan(config, dataset_size).step(), dp.delta, dp.clipping_norm, dp.secure_noise)

    @property
    def epsilon(self) -> float:
        """The accountant's upper bound."""
        return accounting.epsilon_spent([self.mechanism], self.delta)


@dataclass(frozen=True)
class StepAudit:
    """What many runs of one step show.

    Attributes:
        claim: that is audited, and its epsilon.
        num_trials: steps in each of the two worlds.
        bound: lower bounds, right with probability at least ``confidence``.
    """

    claim: StepClaim
    claimed_epsilon: float
    num_trials: int
    confidence: float
    bound: TwoWorldBound

    @property
    def noise_multiplier(self) -> float:
        """Upper bound on the real noise multiplier; infinite where nothing is proved."""
        return 1 / self.bound.mu if self.bound.mu else math.inf

    @property
    def is_violation(self) -> bool:
        return (
            self.noise_multiplier < self.claim.mechanism.noise_multiplier
            or self.bound.epsilon_any > self.claimed_epsilon
        )

    def as_dict(self) -> dict[str, Any]:
        """Returns plain values; a bound that proves nothing is 0, or None for the noise multiplier."""
        return {
            "audit": "step",
            "claimed_epsilon": self.claimed_epsilon,
            "epsilon_at_least": self.bound.epsilon,
            "epsilon_at_least_any_mechanism": self.bound.epsilon_any,
            "delta": self.claim.delta,
            "confidence": self.confidence,
            "sampling_rate": self.claim.mechanism.sampling_rate,
            "claimed_noise_multiplier": self.claim.mechanism.noise_multiplier,
            "noise_multiplier_at_most": self.noise_multiplier if self.bound.mu else None,
            "num_trials": self.num_trials,
            "violation": self.is_violation,
        }


def audit_step(
    claim: StepClaim, *, num_trials: int, confidence: float, new_key: Callable[[], bytes] = noise.new_key
) -> StepAudit:
    """Runs training's own ``private_step`` many times without a canary and many times with it, and attacks the results.

    The step is all real: Poisson batch, draws, per-example gradients in several physical batches, clipping, noise from
    a key of its own, division. Only the network is small and the images chosen: it draws one image, whatever it is
    shown, so that an example's gradient is its own image, rescaled. All gradients are longer than C, and the canary's
    is orthogonal to the others'. The score is the released gradient along the canary's, in units of C: in
    expectation 0 without the canary and 1 with it in the batch, and the worst case of the mechanism.

    Guarantee: of a step that is what ``claim`` says, at most 1 - ``confidence`` of all audits report a violation; see
    ``two_world_bound``.

    Args:
        claim: to be held against what is found.
        num_trials: in each world, >= 100.
        confidence: in (0.5, 1).
        new_key: the source of each trial's key; anything but fresh randomness is for tests.
    """
    check_confidence(confidence)
    if num_trials < 100:
        raise InputError(f"Expected --trials >= 100, got {num_trials}: so few prove nothing; 5000 is the default.")
    run, direction = _canvas_run(claim)
    parameters = dict(run.denoiser.named_parameters())
    worlds = [replace(run, plan=replace(run.plan, dataset_size=NUM_OTHERS + present)) for present in (0, 1)]
    scores = np.empty((2, num_trials))
    with Progress("Step audit", 2 * num_trials, unit="steps") as progress:
        for trial in range(num_trials):
            for world, chosen in zip(scores, worlds, strict=True):
                step = private_step(chosen, parameters, step_keys(new_key()))
                world[trial] = _along(step, direction) * run.plan.expected_batch_size / claim.clipping_norm
            progress.advance(2)
    if not np.isfinite(scores).all():
        raise RunError("Expected finite gradients from every step, got others: the step is broken.")
    bound = two_world_bound(
        *scores,
        sampling_rate=claim.mechanism.sampling_rate,
        delta=claim.delta,
        confidence=confidence,
        middle=0.5,
    )
    return StepAudit(claim, claim.epsilon, num_trials, confidence, bound)


class _Canvas(nn.Module):
    """A denoiser that draws the same image whatever it is shown, by two layers: the gradient is the example's image."""

    kind, num_classes = "edm", 0

    def __init__(self, gain: float, sigma_data: float) -> None:
        super().__init__()
        self.sigma_data, self.gain = sigma_data, gain
        self.halves = nn.ModuleList(nn.Linear(1, SIDE * SIDE // 2, bias=False) for _ in range(2))
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    @property
    def network(self) -> "_Canvas":
        return self

    def forward(self, noisy: Tensor, sigma: Tensor, labels: Tensor | None) -> Tensor:
        one = noisy.new_ones(len(noisy), 1)
        drawn = torch.cat([F.linear(one, cast(Tensor, half.weight)) for half in self.halves], dim=1)
        return self.gain * drawn.view(noisy.shape)


def _canvas_run(claim: StepClaim) -> tuple[Run, list[Tensor]]:
    """Returns a run on a few orthogonal images, the canary last, and the direction of the canary's gradient."""
    images = hadamard(SIDE * SIDE)[1 : NUM_OTHERS + 2]
    keys = (f"dp.clipping_norm={claim.clipping_norm!r}", f"dp.secure_noise={str(claim.secure_noise).lower()}")
    config = configs.load([], ["loss.noise_multiplicity=2", *keys])
    plan = Plan(
        dataset_size=NUM_OTHERS,
        expected_batch_size=NUM_OTHERS + 1,
        sampling_rate=claim.mechanism.sampling_rate,
        num_iterations=1,
        noise_multiplier=claim.mechanism.noise_multiplier,
        epsilon=math.inf,  # nobody asks
        delta=claim.delta,
        warmup=(),
    )
    with tempfile.TemporaryDirectory() as folder:
        with ArchiveWriter(Path(folder) / "images.zip") as writer:
            for image in images:
                writer.add(np.where(image > 0, 255, 0).astype(np.uint8).reshape(1, SIDE, SIDE))
        archive = ImageArchive(Path(folder) / "images.zip")
        archive.read(np.arange(archive.num_images))  # so few are kept in memory, and the file is not needed any more
    run = Run(
        config=config,
        archive=archive,
        plan=plan,
        denoiser=cast(Any, _Canvas(GAIN * claim.clipping_norm, config.loss.sigma_data)),
        device=torch.device("cpu"),
        data_fingerprint="",
        physical_batch_size=NUM_OTHERS,  # with the canary it takes two
    )
    canary = torch.from_numpy(images[-1] / -np.linalg.norm(images[-1]))  # the loss falls towards the image
    return run, list(canary.view(2, -1, 1))


def _along(step: PrivateGradient, direction: Sequence[Tensor]) -> float:
    return sum(float((g.double() * d).sum()) for g, d in zip(step.gradients, direction, strict=True))
