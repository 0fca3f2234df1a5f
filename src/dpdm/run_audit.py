"""``dpdm audit run``: one training run on public images and many canaries."""

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dpdm import config as configs
from dpdm.audit import GAIN, check_confidence, check_private
from dpdm.config import Config
from dpdm.data.sources import source_path
from dpdm.errors import InputError, RunError
from dpdm.optimizer import adam_step
from dpdm.physical_batch import physical_batch_size
from dpdm.plain_yaml import leaves, read_overrides
from dpdm.plan import Plan, check_keys, make_plan
from dpdm.privacy import accounting, noise
from dpdm.privacy.accounting import Mechanism
from dpdm.privacy.auditing import OneRunBound, one_run_bound
from dpdm.privacy.dpsgd import PrivateGradient
from dpdm.progress import Progress
from dpdm.recipes import recipe
from dpdm.run import Run, fresh_state, open_archive, set_up
from dpdm.train import StepKeys, example_losses, sampled_step, step_keys
from dpdm.workdir import Workdir

NUM_DIGITS = 1497  # of the 1,797 digits, the others are held out
SIDE = 8  # of their images, in pixels


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


def default_run_config(overrides: Sequence[str]) -> Config:
    """Returns the recipe for the digits at epsilon 10, or at the overrides' own target, without central images."""
    images: dict[str, Any] = {"dataset_size": NUM_DIGITS, "resolution": SIDE, "num_channels": 1, "num_classes": 10}
    values = recipe(**images, epsilon=10.0, delta=1e-5)
    if not {"dp.epsilon", "dp.noise_multiplier"} & dict(leaves(read_overrides(overrides))).keys():
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
    check_confidence(confidence)
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
    check_private(config)
    check_keys(config)
    with tempfile.TemporaryDirectory() as folder:
        run = _run_with_canaries(config, source, Path(folder), num_canaries)
        coins = noise.random_words(new_key(), num_canaries) % 2 == 1
        scores = _train_and_score(run, coins, new_key)
    if not np.isfinite(scores).all():
        raise RunError("Expected finite gradients from every step, got others: the run is broken.")
    bound = one_run_bound(scores, coins, delta=run.plan.delta, confidence=confidence)
    return RunAudit(run.plan.epsilon, run.plan.delta, confidence, num_canaries, run.plan, bound)


def _run_with_canaries(config: Config, source: str, folder: Path, num_canaries: int) -> Run:
    """Returns a run on public images, whose plan counts the canaries as further records."""
    archive = open_archive(replace(config, data=replace(config.data, path=source)), Workdir(folder))
    config = configs.resolve(config, archive)
    plan = make_plan(config, archive.num_records + num_canaries)
    if plan.warmup:
        bare = Mechanism("DP-SGD", plan.sampling_rate, plan.noise_multiplier, plan.num_iterations)
        plan = replace(plan, warmup=(), epsilon=accounting.epsilon_spent([bare], plan.delta))
    device = set_up(config)
    denoiser = configs.build_denoiser(config).to(device).train()
    size = physical_batch_size(config, device)
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
