"""Training: the one place where diffusion meets privacy.

images -> Poisson batch -> K noisy copies each -> denoiser -> one loss per example -> clipped sum -> + noise
-> / expected batch size -> Adam -> EMA
"""

import hashlib
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
from dpdm.announcement import announcement
from dpdm.central_model import central_images, split_classes, with_cells, with_covariances
from dpdm.checkpoint import TrainState
from dpdm.config import Config, ModelConfig, TrainConfig
from dpdm.data.archive import ImageArchive
from dpdm.data.on_device import ImagesOnDevice
from dpdm.diffusion.adapters import merged, trained_parameters
from dpdm.diffusion.augmentation import NUM_DISTORTIONS, distort, mirror
from dpdm.diffusion.denoiser import Denoiser
from dpdm.diffusion.ema import ema_decay, update_ema
from dpdm.diffusion.loss import LossConfig, diffusion_loss, noise_level
from dpdm.errors import DivergedError, RunError
from dpdm.initial import read_sources
from dpdm.monitor import Monitor
from dpdm.optimizer import adam_step
from dpdm.privacy import noise
from dpdm.privacy.dpsgd import PerExampleLoss, PrivateGradient, private_gradient
from dpdm.privacy.draws import record_draws
from dpdm.privacy.poisson import physical_batches, poisson_sample
from dpdm.progress import Progress, say
from dpdm.run import Books, Run, fresh_state, open_run, share_state
from dpdm.signals import ending_signals
from dpdm.transfer import to_device, to_host
from dpdm.warmup import train_on_central_images
from dpdm.workdir import Workdir

SECONDS_BETWEEN_CHECKPOINTS = 300.0
NOBODY = np.zeros(0, np.int64)


def train(
    config: Config, workdir: Workdir, *, resume: bool = False, key: bytes | None = None
) -> tuple[Config, TrainState]:
    """Trains until the plan is done, the budget is spent or somebody interrupts; returns the resolved config and state.

    Called by every process of a group (see ``distributed``), it shares each step out among them. A new run draws its
    ``key``, of all its randomness, unless one is given that was used for nothing else.

    Guarantee: everything in the returned state but its curves is a function of mechanisms that are in the ledger, and
    of ``model.init``; unless ``dp.enabled=false``, of images that are declared public: then there is none.

    A killed run that is resumed never buys more than the plan: replayed steps are the same release, others are charged.

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
            print(announcement(run, read_sources(books.ledger.header["initial_weights"])), file=sys.stderr, flush=True)
        monitor = Monitor(run.config, workdir, run.denoiser)  # first, as it looks for files that the config names
        if books and run.plan.warmup and not state.warmup:
            state = _warm_up(run, books, interrupted)
        share_state(state)
        if books and state.step == 0:
            books.save(state)
        saved_at, saved_step, digest = time.monotonic(), state.step, state.digest()
        title = "DP-SGD" if run.plan.is_private else "Training"
        with Progress(title, run.plan.num_iterations, start=state.step, unit="steps") as progress:
            while keys := _next_step(run, books, state, digest, interrupted):
                digest = take_step(run, state, keys)
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


def _next_step(
    run: Run, books: Books | None, state: TrainState, digest: str, interrupted: threading.Event
) -> StepKeys | None:
    """Buys the next step, on the state of ``digest``, and returns its keys; None if training ends here.

    The noise's key stays on rank 0.
    """
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


def take_step(run: Run, state: TrainState, keys: StepKeys) -> str:
    """Makes one update of ``state``, whose weights are the network's, and returns the digest of what comes out.

    Raises:
        DivergedError: see ``_end_of_step``.
    """
    trained = trained_parameters(run.denoiser.network)
    step = private_step(run, trained, keys) if run.plan.is_private else public_step(run, trained, keys)
    adam_step(
        run.config.optim,
        trained,
        step.gradients,
        state.exp_avg,
        state.exp_avg_sq,
        step=state.step,
        num_iterations=run.plan.num_iterations,
        noise_deviation=run.noise_deviation(),
    )
    _update_averages(state, dict(run.denoiser.network.named_parameters()), run.config.model)
    state.step += 1
    return _end_of_step(state, step)


def private_step(run: Run, parameters: Mapping[str, Tensor], keys: StepKeys) -> PrivateGradient:
    """Returns the private gradient of one step whose randomness comes from ``keys``."""

    def loss(records: np.ndarray) -> Tensor:
        with run.autocast():
            return example_losses(run.denoiser, run.images, records, run.config.loss, key=keys.diffusion)

    return sampled_step(run, parameters, loss, keys)


def sampled_step(
    run: Run, parameters: Mapping[str, Tensor], loss: PerExampleLoss, keys: StepKeys, absent: np.ndarray = NOBODY
) -> PrivateGradient:
    """Returns the private gradient of one step of ``run`` with any ``loss``: what training and its audit share.

    Guarantee: the mechanism of the run's plan, see ``private_gradient``: a Poisson sample of ``run.plan``'s rate, of
    all numbers below its N that a record has.

    Args:
        run: whose plan and config say how the step is made.
        parameters: by name.
        loss: of each record in a piece of the batch.
        keys: of this step alone.
        absent: numbers below N that no record has, so that they are never in a batch; an audit's missing canaries.
    """
    batch = poisson_sample(keys.batch, run.plan.dataset_size, run.plan.sampling_rate)
    batch = np.setdiff1d(batch, absent, assume_unique=True)
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
        overlap_noise=run.overlaps_noise,
    )


@dataclass(frozen=True)
class PublicGradient:
    """What one step without privacy computes.

    Attributes:
        gradients: the mean gradient, one tensor per parameter.
        batch_size: of the step.
        figures: (2,) float64, where the gradients are: mean loss, and whether the gradients are finite: 1, or 0.
    """

    gradients: list[Tensor]
    batch_size: int
    figures: Tensor

    @property
    def mean_loss(self) -> float:
        return float(self.figures[0])

    @property
    def is_finite(self) -> bool:
        return bool(self.figures[1])


def public_step(run: Run, parameters: Mapping[str, Tensor], keys: StepKeys) -> PublicGradient:
    """Returns the ordinary gradient of a batch of *public* images, without clipping and noise.

    The batch is a random one of exactly the expected size. Several processes share it out, as in a private step.

    Guarantee: none.
    """
    if run.plan.is_private or not run.config.data.public:
        raise ValueError("Expected a run without privacy on public images, got another.")
    size = run.plan.expected_batch_size
    batch = np.argsort(noise.random_words(keys.batch, run.plan.dataset_size), kind="stable")[:size]
    own = distributed.share(size)
    sums = [torch.zeros_like(parameter) for parameter in parameters.values()]
    total = torch.zeros((), device=run.device)
    for piece in physical_batches(batch[own.start : own.stop], run.physical_batch_size):
        with torch.enable_grad(), run.autocast():
            losses = example_losses(run.denoiser, run.images, piece, run.config.loss, key=keys.diffusion)
        gradients = torch.autograd.grad(losses.sum(), list(parameters.values()), allow_unused=True)
        for before, gradient in zip(sums, gradients, strict=True):
            if gradient is not None:
                before += gradient
        total += losses.detach().sum()
    distributed.sum_over_processes([*sums, total])
    finite = torch.stack([torch.isfinite(gradient).all() for gradient in sums]).all()
    figures = torch.stack([total.double() / size, finite.double()])
    return PublicGradient([gradient / size for gradient in sums], size, figures)


def example_losses(
    denoiser: Denoiser, images: ImageArchive | ImagesOnDevice, records: np.ndarray, config: LossConfig, *, key: bytes
) -> Tensor:
    """Returns the loss of each record, the mean over its own K draws, (B,).

    With ``data.unit=group`` a record is a group, and each of its draws takes one of its images. So a group's images,
    however many, make one loss, one gradient, and after clipping a vector of norm at most C.

    Guarantee: entry b is a function of record b and of (key, records[b]); no other record enters.
    """
    device = next(denoiser.parameters()).device
    archive = images if isinstance(images, ImageArchive) else images.archive
    draws, shape = config.noise_multiplicity, (archive.num_channels, archive.resolution, archive.resolution)
    rows = to_device(records, device)
    kinds = 3 if archive.unit == "group" else 2
    moves = NUM_DISTORTIONS + 1 if config.augmentation or config.flip else 0
    uniform, normal = record_draws(key, rows, (kinds + moves) * draws, draws * math.prod(shape))
    u = uniform.view(len(records), kinds + moves, draws).permute(1, 2, 0)  # (kinds, K, B)
    choice = u[2] if archive.unit == "group" else None
    if isinstance(images, ImageArchive):
        pixels, labels = _take(images, records, choice, device)
    else:
        pixels, labels = images.take(rows, choice)
    shown = pixels.float() / 127.5 - 1
    if moves:
        shown = _move(shown.expand(draws, len(records), *shape), u[kinds:], config)
    return diffusion_loss(
        denoiser,
        shown,
        labels if denoiser.network.num_classes > 0 else None,
        sigma=noise_level(config, denoiser.kind, u[0]).float(),
        noise=normal.view(len(records), draws, *shape).transpose(0, 1),
        drop_label=u[1] < config.label_dropout,
        kind=config.type,
    )


def _move(images: Tensor, u: Tensor, config: LossConfig) -> Tensor:
    """Returns images (K, B, C, H, W), that of each draw distorted and mirrored by its own numbers u (7, K, B)."""
    flat, numbers = images.flatten(0, 1), u.flatten(1)
    if config.augmentation:
        flat = distort(flat, numbers[:NUM_DISTORTIONS], config.augmentation)
    if config.flip:
        flat = mirror(flat, numbers[NUM_DISTORTIONS])
    return flat.view(images.shape)


def _take(
    archive: ImageArchive, records: np.ndarray, choice: Tensor | None, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """Returns what ``ImagesOnDevice.take`` does, of images that are decoded now and sent to ``device``."""
    chosen = records if choice is None else archive.choose_images(records, choice.cpu().numpy())  # (K, B) | (B,)
    pixels = archive.read(chosen.flatten())
    labels = None if archive.labels is None else to_device(archive.labels[chosen], device)
    return to_device(pixels, device).view(*chosen.shape, *pixels.shape[1:]), labels


def _warm_up(run: Run, books: Books, interrupted: threading.Event) -> TrainState:
    """Buys central images, and what else is planned, and trains on images drawn from it all; returns where it ends.

    Raises:
        KeyboardInterrupt: after Ctrl-C. Nothing of it is saved: resumed, the run draws the same again, at no cost.
    """

    def stop_if_asked() -> None:
        if interrupted.is_set():
            say("The warm-up begins again when the run goes on; it is not paid for twice.")
            raise KeyboardInterrupt

    config, num_classes = run.config.train.warmup, run.denoiser.network.num_classes
    central = None
    for mechanism in run.plan.warmup:
        if central is None:
            key = books.buy_for_warmup(mechanism)
            central = central_images(run.archive, config, num_classes=num_classes, key=key)
        elif mechanism.name == "central cells":
            split = split_classes(central, config)
            key = books.buy_for_warmup(mechanism, split.digest())
            central = with_cells(central, split, run.archive, config, key=key)
        else:
            key = books.buy_for_warmup(mechanism, hashlib.sha256(central.centres().tobytes()).hexdigest())
            central = with_covariances(central, run.archive, config, key=key)
        stop_if_asked()
    assert central is not None  # the caller has looked
    ema = train_on_central_images(
        run.denoiser,
        central,
        config,
        run.config.loss,
        seed=run.config.train.seed,
        autocast=run.autocast(),
        before_step=stop_if_asked,
    )
    run.denoiser.network.load_state_dict(ema)
    state = fresh_state(run.denoiser, run.config.model.ema_rates)
    state.warmup = {name: tensor.clone() for name, tensor in merged(ema).items()}
    if central.frequencies is not None:
        state.central = {"frequencies": torch.from_numpy(central.frequencies)}
    return state


def _update_averages(state: TrainState, parameters: Mapping[str, Tensor], config: ModelConfig) -> None:
    update_ema(state.ema, parameters, ema_decay(config.ema_rate, state.step))
    for rate in config.ema_rates:
        update_ema(state.average(rate), parameters, ema_decay(rate, state.step))


def _end_of_step(state: TrainState, step: PrivateGradient | PublicGradient) -> str:
    """Notes the step's figures in the curves and returns the state's digest: here, once, the host waits for a GPU.

    Raises:
        DivergedError: if the step's gradient or what it made of the weights is not finite; nothing of it has been kept.
    """
    figures, *tensors = to_host([step.figures, *state.hashed().values()])
    step = replace(step, figures=figures)
    if not step.is_finite:
        raise DivergedError(
            "Expected a finite gradient of the whole step, got another one: weights that are not finite, or a fault of "
            "the device; go on with --resume, or start again with a lower optim.learning_rate."
        )
    values = {"loss": step.mean_loss, "batch_size": step.batch_size}
    if isinstance(step, PrivateGradient):
        values |= {"clip_fraction": step.clip_fraction, "num_nonfinite": step.num_nonfinite}
        _warn_of_noise_alone(state, step)
    for name, value in values.items():
        state.curves.setdefault(name, []).append(float(value))
    if not all(bool(tensor.isfinite().all()) for tensor in tensors):
        raise DivergedError(
            "Expected finite weights after the step, got others: training has diverged; start again with a lower "
            "optim.learning_rate."
        )
    return state.digest(tensors)


def _warn_of_noise_alone(state: TrainState, step: PrivateGradient) -> None:
    """Tells the owner of the first step in a row in which all gradients are infinite or NaN.

    Training does not stop by itself: that would publish a figure that has no noise.
    """
    nothing = step.num_nonfinite == step.batch_size > 0
    if nothing and not any(state.curves.get("num_nonfinite", [0.0])[-1:]) and distributed.is_main():
        say(
            f"dpdm: In step {state.step} all gradients are infinite or NaN, so that it adds noise alone (a private "
            "figure): training has diverged. Begin another run with a lower optim.learning_rate, or other noise levels."
        )


def _checkpoint_is_due(config: TrainConfig, step: int, saved_step: int, seconds: float) -> bool:
    """Whether to save after ``step`` steps: by the config's count, or because so much time has passed."""
    by_count = step >= config.checkpoint_threshold and step - saved_step >= config.checkpoint_every
    return by_count or seconds > SECONDS_BETWEEN_CHECKPOINTS


@contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """Yields an event that the first Ctrl-C, polite kill or end of the terminal sets; a second Ctrl-C stops at once."""
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
            say("\nStopping after this step; once more to stop at once.")

    old = {number: signal.signal(number, handle) for number in ending_signals()}
    try:
        yield event
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
