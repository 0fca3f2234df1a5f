"""Attacks on the real step and on a whole training run, and the lower bounds on epsilon that they prove.

A guarantee is an upper bound on what can be learned about one record. An audit is an attack by somebody who sees more
than anybody will (every noisy gradient) and puts records of his own choice, canaries, among the others. What he learns
bounds epsilon from below. A bound above the claim proves an error in the code; a bound below it proves nothing, but
the closer the two are, the less room an error has.
"""

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
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
from dpdm.config import Config
from dpdm.data.archive import ArchiveWriter, ImageArchive
from dpdm.data.sources import source_path
from dpdm.device import pick_device, total_memory, use_full_precision
from dpdm.errors import InputError, RunError
from dpdm.optimizer import adam_step
from dpdm.plan import Plan, check_keys, make_plan
from dpdm.privacy import accounting, noise
from dpdm.privacy.accounting import Mechanism
from dpdm.privacy.auditing import OneRunBound, TwoWorldBound, one_run_bound, two_world_bound
from dpdm.privacy.dpsgd import PrivateGradient
from dpdm.progress import Progress
from dpdm.recipes import recipe
from dpdm.run import Run, fresh_state, open_archive, physical_batch_size
from dpdm.train import StepKeys, example_losses, private_step, sampled_step, step_keys
from dpdm.workdir import Workdir

NUM_DIGITS = 1497  # of the 1,797 digits, the others are held out
SIDE = 8  # of their images, and of those of a step audit, in pixels
NUM_OTHERS = 3  # records beside the canary
GAIN = 4.0  # a canary's gradient has a norm of at least 3 C


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
        _check_private(config)
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
    _check_confidence(confidence)
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


@dataclass(frozen=True)
class RunAudit:
    """What one training run with many canaries shows.

    Attributes:
        claimed_epsilon: of the whole run, at ``delta``.
        num_canaries: of which each took part by a fair coin.
        plan: what the run bought.
        bound: lower bound, right with probability at least ``confidence``.
    """

    claimed_epsilon: float
    delta: float
    confidence: float
    num_canaries: int
    plan: Plan
    bound: OneRunBound

    @property
    def is_violation(self) -> bool:
        return self.bound.epsilon > self.claimed_epsilon

    def as_dict(self) -> dict[str, Any]:
        """Returns plain values."""
        return {
            "audit": "run",
            "claimed_epsilon": self.claimed_epsilon,
            "epsilon_at_least": self.bound.epsilon,
            "delta": self.delta,
            "confidence": self.confidence,
            "num_canaries": self.num_canaries,
            "num_guesses": self.bound.num_guesses,
            "num_right": self.bound.num_right,
            "dataset_size": self.plan.dataset_size,
            "sampling_rate": self.plan.sampling_rate,
            "noise_multiplier": self.plan.noise_multiplier,
            "num_steps": self.plan.num_iterations,
            "violation": self.is_violation,
        }


def check(audit: StepAudit | RunAudit) -> None:
    """Raises RunError if an audit contradicts the claim."""
    if audit.is_violation:
        raise RunError(
            f"Expected bounds within the claimed epsilon={audit.claimed_epsilon:.4g}, got one above it: the guarantee "
            f"is broken, or this was one of the {1 - audit.confidence:.2g} of all audits that may be wrong: repeat it."
        )


def default_run_config(overrides: Sequence[str]) -> Config:
    """Returns the recipe for the digits at epsilon 10, or at the overrides' own target, without central images."""
    images: dict[str, Any] = {"dataset_size": NUM_DIGITS, "resolution": SIDE, "num_channels": 1, "num_classes": 10}
    values = recipe(**images, epsilon=10.0, delta=1e-5)
    targets = ("dp.epsilon=", "dp.noise_multiplier=")
    if not any(override.startswith(targets) for override in overrides):
        values.append("dp.epsilon=10")
    return configs.load([], [*values, "train.warmup.enabled=false", *overrides])


def audit_run(
    config: Config,
    *,
    num_canaries: int,
    confidence: float,
    data_is_public: bool = False,
    new_key: Callable[[], bytes] = noise.new_key,
) -> RunAudit:
    """Trains once on public images and canaries, of which each takes part by a fair coin, and guesses the coins.

    Everything is training's own (network, images, draws, ``sampled_step``, Adam) but the canaries' loss: canary i is a
    record whose gradient has one entry, longer than C, at a weight of the network that is its own. It is the worst case
    of the guarantee, which speaks of any record (the Dirac canary of Nasr et al. 2023). The attacker sees what the
    guarantee allows, every step's noisy gradient; a canary's score is the log of the likelihood ratio, with to without
    it, of the entries that are its own, if there were nothing else at that weight.

    The numbers of absent canaries stay free: a batch is a Poisson sample of all numbers, less the absent ones, and so
    a Poisson sample of the records that take part.

    Guarantee: of a run within its claimed epsilon, at most 1 - ``confidence`` of all audits report a violation; see
    ``one_run_bound``. Nothing is charged, as the images are public: the digits, a data set that is known by name, or
    one of which the user says so. Nothing is kept.

    Args:
        config: of the run. Central images are left out; the noise is then what the config gives with them. So are
            ``model.init``, frozen weights and adapters: everything is trained.
        num_canaries: m >= 10, and at most the entries of the network's largest matrix.
        confidence: in (0.5, 1).
        data_is_public: whether the user says that the images at ``data.path`` are public.
        new_key: the source of the keys of coins, positions and steps; anything but fresh randomness is for tests.

    Raises:
        InputError: for private images, or a config that does not fit.
    """
    _check_confidence(confidence)
    if num_canaries < 10:
        raise InputError(f"Expected --canaries >= 10, got {num_canaries}: so few prove nothing; 1000 is the default.")
    source = config.data.path or "digits"
    if source_path(source) is not None and not data_is_public:
        raise InputError(
            f"Expected public images, got data.path={source}: an audit trains on them once more, which would have to "
            "be charged; leave it out to use the digits, or add --public if everybody may see these images."
        )
    if config.data.path is None and config.data.resolution not in (None, SIDE):
        raise InputError(
            f"Expected data.path, got none, and images of the digits have data.resolution={SIDE}, not "
            f"{config.data.resolution}: give the config's public images."
        )
    _check_private(config)
    check_keys(config)
    with tempfile.TemporaryDirectory() as folder:
        run = _run_with_canaries(config, source, Path(folder), num_canaries)
        coins = noise.random_words(new_key(), num_canaries) % 2 == 1
        scores = _train_and_score(run, coins, new_key)
    if not np.isfinite(scores).all():
        raise RunError("Expected finite gradients from every step, got others: the run is broken.")
    bound = one_run_bound(scores, coins, delta=run.plan.delta, confidence=confidence)
    return RunAudit(run.plan.epsilon, run.plan.delta, confidence, num_canaries, run.plan, bound)


def _check_private(config: Config) -> None:
    if not config.dp.enabled:
        raise InputError("Expected dp.enabled=true for an audit, got false: without privacy there is no claim to test.")


def _run_with_canaries(config: Config, source: str, folder: Path, num_canaries: int) -> Run:
    """Returns a run on public images, whose plan counts the canaries as further records."""
    archive = open_archive(replace(config, data=replace(config.data, path=source)), Workdir(folder))
    config = configs.resolve(config, archive)
    plan = make_plan(config, archive.num_records + num_canaries)
    if plan.warmup:
        bare = Mechanism("DP-SGD", plan.sampling_rate, plan.noise_multiplier, plan.num_iterations)
        plan = replace(plan, warmup=(), epsilon=accounting.epsilon_spent([bare], plan.delta))
    device = pick_device(config.setup.device)
    use_full_precision()
    torch.set_num_threads(config.setup.num_threads or torch.get_num_threads())
    denoiser = configs.build_denoiser(config).to(device).train()
    size = physical_batch_size(config, total_memory(device))
    return Run(config, archive, plan, denoiser, device, archive.fingerprint(), size)


@dataclass(frozen=True)
class _Canaries:
    """The records behind the images: number N + i has one gradient entry, at ``positions[i]`` of the matrix ``name``.

    Attributes:
        first: N.
        name: of the largest matrix in the network.
        positions: (m,) int64, distinct, in the flattened matrix.
    """

    first: int
    name: str
    positions: Tensor

    @classmethod
    def place(cls, run: Run, parameters: Mapping[str, Tensor], key: bytes) -> Self:
        matrices = {name: p.numel() for name, p in parameters.items() if p.dim() == 2}
        name = max(matrices, key=lambda name: matrices[name])
        count = run.plan.dataset_size - run.archive.num_records
        if count > matrices[name]:
            raise InputError(
                f"Expected --canaries <= {matrices[name]}, the weights of {name}, got {count}: give fewer."
            )
        order = np.argsort(noise.random_words(key, matrices[name]))
        return cls(run.archive.num_records, name, torch.from_numpy(order[:count]).to(run.device))

    def losses(self, run: Run, matrix: Tensor, records: np.ndarray, key: bytes) -> Tensor:
        """Returns the loss of each record, (b,): an image's own, or GAIN C times the canary's weight."""
        stand_ins = np.where(records < self.first, records, 0)  # the network is shown an image in a canary's place
        with run.autocast():
            images = example_losses(run.denoiser, run.archive, stand_ins, run.config.loss, key=key)
        numbers = torch.from_numpy(records - self.first).to(run.device)
        at = self.positions[numbers.clamp(min=0)]
        inputs = F.one_hot(at % matrix.shape[1], matrix.shape[1]).float()
        weights = F.linear(inputs, matrix).gather(1, (at // matrix.shape[1])[:, None])[:, 0]
        return torch.where(numbers < 0, images, GAIN * run.config.dp.clipping_norm * weights)


def _train_and_score(run: Run, coins: np.ndarray, new_key: Callable[[], bytes]) -> np.ndarray:
    """Trains as ``train`` does on the images and the canaries with a coin; returns the scores of all canaries, (m,)."""
    plan = run.plan
    parameters = dict(run.denoiser.network.named_parameters())
    canaries = _Canaries.place(run, parameters, new_key())
    index = list(parameters).index(canaries.name)
    state = fresh_state(run.denoiser)
    absent = canaries.first + np.flatnonzero(~coins)
    scores = np.zeros(len(coins))
    with Progress("One-run audit", plan.num_iterations, unit="steps") as progress:
        for number in range(plan.num_iterations):
            step = _step_without(absent, run, parameters, canaries, step_keys(new_key()))
            own = step.gradients[index].flatten()[canaries.positions].double().cpu().numpy()
            scores += _log_likelihood_ratio(own * plan.expected_batch_size / run.config.dp.clipping_norm, plan)
            adam_step(
                run.config.optim,
                parameters,
                step.gradients,
                state.exp_avg,
                state.exp_avg_sq,
                step=number,
                num_iterations=plan.num_iterations,
                noise_deviation=run.noise_deviation(),
            )
            progress.advance()
    return scores


def _step_without(
    absent: np.ndarray, run: Run, parameters: Mapping[str, Tensor], canaries: _Canaries, keys: StepKeys
) -> PrivateGradient:
    """Returns what ``private_step`` does, on images and canaries of which those of the numbers ``absent`` are none."""

    def loss(records: np.ndarray) -> Tensor:
        return canaries.losses(run, parameters[canaries.name], records, keys.diffusion)

    return sampled_step(run, parameters, loss, keys, absent)


def _log_likelihood_ratio(entries: np.ndarray, plan: Plan) -> np.ndarray:
    """Returns log of (1 - q) + q N(1, s^2) / N(0, s^2) at each of ``entries`` (m,), which are in units of C."""
    q = plan.sampling_rate
    missed = math.log1p(-q) if q < 1 else -math.inf
    return np.logaddexp(missed, math.log(q) + (entries - 0.5) / plan.noise_multiplier**2)


def _check_confidence(confidence: float) -> None:
    if not 0.5 < confidence < 1:
        raise InputError(f"Expected 0.5 < --confidence < 1, got {confidence}: 0.95 is the default.")
