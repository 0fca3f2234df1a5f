"""Training: the one place where diffusion meets privacy.

images -> Poisson batch -> K noisy copies each -> denoiser -> one loss per example -> clipped sum -> + noise
-> / expected batch size -> Adam -> EMA
"""

import math
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from types import FrameType

import numpy as np
import torch
from torch import Tensor

from dpdm import config as configs
from dpdm import distributed
from dpdm.checkpoint import TrainState
from dpdm.config import Config, OptimConfig, TrainConfig
from dpdm.data.archive import ImageArchive
from dpdm.diffusion.denoiser import Denoiser
from dpdm.diffusion.ema import ema_decay, update_ema
from dpdm.diffusion.loss import LossConfig, diffusion_loss, noise_level
from dpdm.errors import RunError
from dpdm.monitor import Monitor
from dpdm.privacy import accounting, noise
from dpdm.privacy.dpsgd import PrivateGradient, private_gradient
from dpdm.privacy.draws import record_draws
from dpdm.privacy.poisson import poisson_sample
from dpdm.progress import Progress
from dpdm.run import Books, Run, fresh_state, open_run, share_state
from dpdm.untrusted import clean
from dpdm.warmup import central_images, train_on_central_images
from dpdm.workdir import Workdir

SECONDS_BETWEEN_CHECKPOINTS = 300.0


def train(
    config: Config, workdir: Workdir, *, resume: bool = False, key: bytes | None = None
) -> tuple[Config, TrainState]:
    """Trains until the plan is done, the budget is spent or somebody interrupts; returns the resolved config and state.

    Called by every process of a group (see ``distributed``), it shares each step out among them. A new run draws its
    ``key``, of all its randomness, unless one is given that was used for nothing else.

    Guarantee: everything in the returned state but its curves is a function of mechanisms that are in the ledger. A
    killed run that is resumed never buys more than the plan: replayed steps are the same release, others are charged.

    Raises:
        InputError: for a config that does not fit, an existing run without ``resume``, or the reverse.
        RunError: if another process of the group dies.
        KeyboardInterrupt: after Ctrl-C, with the state saved.
    """
    lock = workdir.lock() if distributed.is_main() else nullcontext()
    with lock, _interruptible() as interrupted:
        run, books, state = open_run(config, workdir, resume=resume, key=key)
        if books:
            print(configs.to_yaml(run.config), file=sys.stderr)
            print(announcement(run), file=sys.stderr, flush=True)
        monitor = Monitor(run.config, workdir, run.denoiser)  # first, as it looks for files that the config names
        if books and run.plan.warmup is not None and not state.warmup:
            state = _warm_up(run, books)
        share_state(state)
        optimizer = _optimizer(run, state)
        if books and state.step == 0:
            books.save(state)
        parameters = dict(run.denoiser.network.named_parameters())
        saved_at, saved_step = time.monotonic(), state.step
        with Progress("DP-SGD", run.plan.num_iterations, start=state.step, unit="steps") as progress:
            while keys := _next_step(run, books, state, interrupted):
                step = private_step(run, parameters, keys)
                for parameter, gradient in zip(parameters.values(), step.gradients, strict=True):
                    parameter.grad = gradient
                optimizer.param_groups[0]["lr"] = learning_rate(run.config.optim, state.step, run.plan.num_iterations)
                optimizer.step()
                update_ema(state.ema, parameters, ema_decay(run.config.model.ema_rate, state.step))
                state.step += 1
                _record(state, step)
                due = _checkpoint_is_due(run.config.train, state.step, saved_step, time.monotonic() - saved_at)
                if books and (due or monitor.is_due(state.step)):
                    books.save(state)
                    saved_at, saved_step = time.monotonic(), state.step
                monitor.look(state)
                progress.advance()
        if books and state.step > saved_step:
            books.save(state)
        if interrupted.is_set():
            raise KeyboardInterrupt
        return run.config, state


@dataclass(frozen=True)
class StepKeys:
    """Keys of one step's randomness, one for each use; ``noise`` is None on all ranks but 0."""

    batch: bytes
    diffusion: bytes
    noise: bytes | None


def step_keys(key: bytes) -> StepKeys:
    return StepKeys(*(noise.derive_key(key, use) for use in ("batch", "diffusion", "noise")))


def _next_step(run: Run, books: Books | None, state: TrainState, interrupted: threading.Event) -> StepKeys | None:
    """Buys the next step and returns its keys; None if training ends here. The noise's key stays on rank 0."""
    digest = state.digest()
    own: StepKeys | None = None

    def buy() -> tuple[StepKeys | None, str]:
        nonlocal own
        assert books is not None  # rank 0
        if state.step < run.plan.num_iterations and not interrupted.is_set():
            key = books.buy_step(state.step, digest)
            if key is None:
                print("The budget is spent on steps that were lost: training ends here.", file=sys.stderr)
            own = step_keys(key) if key else None
        return own and replace(own, noise=None), digest

    keys, expected = distributed.on_main(buy)
    if digest != expected:
        raise RunError(
            "Expected the same weights on all processes, got others: use machines of one kind, and --resume."
        )
    return own if books else keys


def private_step(run: Run, parameters: Mapping[str, Tensor], keys: StepKeys) -> PrivateGradient:
    """Returns the private gradient of one step whose randomness comes from ``keys``."""
    batch = poisson_sample(keys.batch, run.plan.dataset_size, run.plan.sampling_rate)

    def loss(records: np.ndarray) -> Tensor:
        with run.autocast():
            return example_losses(run.denoiser, run.archive, records, run.config.loss, key=keys.diffusion)

    return private_gradient(
        parameters,
        loss,
        batch,
        clipping_norm=run.config.dp.clipping_norm,
        noise_multiplier=run.plan.noise_multiplier,
        expected_batch_size=run.plan.expected_batch_size,
        physical_batch_size=run.physical_batch_size,
        noise_key=keys.noise,
        secure_noise=run.config.dp.secure_noise,
    )


def example_losses(
    denoiser: Denoiser, archive: ImageArchive, records: np.ndarray, config: LossConfig, *, key: bytes
) -> Tensor:
    """Returns the loss of each record, the mean over its own K draws, (B,).

    With ``data.unit=group`` a record is a group, and each of its draws takes one of its images. So a group's images,
    however many, make one loss, one gradient, and after clipping a vector of norm at most C.

    Guarantee: entry b is a function of record b and of (key, records[b]); no other record enters.
    """
    device = next(denoiser.parameters()).device
    draws, shape = config.noise_multiplicity, (archive.num_channels, archive.resolution, archive.resolution)
    rows = torch.from_numpy(records).to(device)
    kinds = 3 if archive.unit == "group" else 2
    uniform, normal = record_draws(key, rows, kinds * draws, draws * math.prod(shape))
    u = uniform.view(len(records), kinds, draws).permute(1, 2, 0)  # (kinds, K, B)
    chosen = archive.choose_images(records, u[2].cpu().numpy()) if archive.unit == "group" else records  # (K, B) | (B,)
    pixels = archive.read(chosen.flatten()).reshape(*chosen.shape, *shape)
    images = torch.from_numpy(pixels).to(device).float() / 127.5 - 1
    conditional = denoiser.network.num_classes > 0 and archive.labels is not None
    return diffusion_loss(
        denoiser,
        images,
        torch.from_numpy(archive.labels[chosen]).to(device) if conditional and archive.labels is not None else None,
        sigma=noise_level(config, denoiser.kind, u[0]).float(),
        noise=normal.view(len(records), draws, *shape).transpose(0, 1),
        drop_label=u[1] < config.label_dropout,
        kind=config.type,
    )


def learning_rate(config: OptimConfig, step: int, num_iterations: int) -> float:
    """Returns the rate of update ``step``; linear decay begins half-way and ends near 0."""
    share = step / num_iterations
    return config.learning_rate * (1.0 if config.schedule == "constant" else min(1.0, 2 * (1 - share)))


def announcement(run: Run) -> str:
    """Returns what will be spent, before anything is."""
    plan = run.plan
    lines = [
        f"Privacy: at most epsilon={plan.epsilon:.4g} at delta={plan.delta:g}, adding or removing one of "
        f"{plan.dataset_size} {plan.unit}s.",
        f"  DP-SGD: {plan.num_iterations} steps, sampling rate {plan.sampling_rate:.4g}, noise multiplier "
        f"{plan.noise_multiplier:g}, clipping norm {run.config.dp.clipping_norm:g}.",
    ]
    if plan.warmup is not None:
        lines.append(f"  Central images: one Gaussian mechanism, noise multiplier {plan.warmup.noise_multiplier:g}.")
    if run.config.data.class_names:
        lines.append(f"  Published as they are: the class names {', '.join(map(clean, run.config.data.class_names))}.")
    if run.archive.groups is not None and plan.unit == "image":
        lines.append(
            "  Warning: data.unit=image, though the images have groups: k images of one person are protected only as k "
            "images together (group_privacy in the statement); data.unit=group protects persons."
        )
    warning = accounting.check_delta_for(plan.delta, plan.dataset_size, plan.unit)
    if warning:
        lines.append(f"  Warning: {warning}")
    if run.config.dp.seed is not None:
        lines.append("  NO GUARANTEE: dp.seed is set, so anybody can compute the noise. For tests alone.")
    return "\n".join(lines)


def _warm_up(run: Run, books: Books) -> TrainState:
    """Buys central images and trains on them; returns the state in which DP-SGD begins."""
    config = run.config.train.warmup
    key = books.buy_central_images()
    means, labels = central_images(run.archive, config, num_classes=run.denoiser.network.num_classes, key=key)
    ema = train_on_central_images(
        run.denoiser,
        means,
        labels,
        config,
        run.config.loss,
        seed=run.config.train.seed,
    )
    run.denoiser.network.load_state_dict(ema)
    state = fresh_state(run.denoiser)
    state.warmup = {name: tensor.clone() for name, tensor in ema.items()}
    return state


def _optimizer(run: Run, state: TrainState) -> torch.optim.Adam:
    """Returns Adam on the network's parameters with its moments in ``state``."""
    optim = run.config.optim
    named = dict(run.denoiser.network.named_parameters())
    optimizer = torch.optim.Adam(named.values(), lr=optim.learning_rate, weight_decay=optim.weight_decay)
    for name, parameter in named.items():
        optimizer.state[parameter] = {
            "step": torch.tensor(float(state.step)),
            "exp_avg": state.exp_avg[name],
            "exp_avg_sq": state.exp_avg_sq[name],
        }
    return optimizer


def _record(state: TrainState, step: PrivateGradient) -> None:
    values = {"loss": step.mean_loss, "clip_fraction": step.clip_fraction, "batch_size": step.batch_size}
    for name, value in values.items():
        state.curves.setdefault(name, []).append(float(value))


def _checkpoint_is_due(config: TrainConfig, step: int, saved_step: int, seconds: float) -> bool:
    """Whether to save after ``step`` steps: by the config's count, or because so much time has passed."""
    by_count = step >= config.checkpoint_threshold and step - saved_step >= config.checkpoint_every
    return by_count or seconds > SECONDS_BETWEEN_CHECKPOINTS


@contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """Yields an event that the first Ctrl-C (or a polite kill) sets; a second Ctrl-C stops at once."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if event.is_set():
            if number == signal.SIGINT:  # torchrun sends SIGTERM after a Ctrl-C that the process saw, too
                raise KeyboardInterrupt
            return
        event.set()
        if distributed.is_main():
            print("\nStopping after this step; once more to stop at once.", file=sys.stderr, flush=True)

    old = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield event
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
