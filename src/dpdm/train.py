"""Training: the one place where diffusion meets privacy.

images -> Poisson batch -> K noisy copies each -> denoiser -> one loss per example -> clipped sum -> + noise
-> / expected batch size -> Adam -> EMA
"""

import json
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dpdm import checkpoint
from dpdm import config as configs
from dpdm.checkpoint import TrainState
from dpdm.config import Config, OptimConfig
from dpdm.data.archive import ImageArchive
from dpdm.data.prepare import prepare
from dpdm.device import environment, execution, pick_device, use_full_precision
from dpdm.diffusion.denoiser import Denoiser
from dpdm.diffusion.ema import ema_decay, update_ema
from dpdm.diffusion.loss import LossConfig, diffusion_loss, noise_level
from dpdm.errors import InputError
from dpdm.files import write_text
from dpdm.plan import Plan, check_keys, make_plan
from dpdm.privacy import accounting, noise
from dpdm.privacy.dpsgd import PrivateGradient, private_gradient
from dpdm.privacy.ledger import Ledger
from dpdm.privacy.poisson import poisson_sample
from dpdm.progress import Progress
from dpdm.warmup import central_images, train_on_central_images
from dpdm.workdir import Workdir

PIXELS_PER_PASS = 100_352  # 128 images of 28 x 28: enough to keep cores busy, about 2 GiB with the widest network
GRADIENT_BYTES_PER_PASS = 2**29
SECONDS_BETWEEN_CHECKPOINTS = 300.0


@dataclass
class Run:
    """What the loop works with; nothing of it leaves ``private/``."""

    config: Config
    workdir: Workdir
    archive: ImageArchive
    plan: Plan
    denoiser: Denoiser
    ledger: Ledger
    key: bytes
    data_fingerprint: str
    device: torch.device
    execution: str
    physical_batch_size: int

    def identity(self, *what: str | int) -> tuple[str, bytes]:
        """Returns the ledger's name for a purchase, and the key of its randomness.

        Guarantee: both depend on the run's key, the data, the config, what is bought, and on how it is computed
        (code, libraries, hardware, threads, physical batch; see ``execution``). So the same randomness is not used for
        two computations that differ; on a CPU, whoever repeats a purchase with the same identity gets the same bits.
        The central images are exact integer sums, which no hardware changes; they depend on the code alone.
        """
        context: tuple[str | int, ...] = (self.data_fingerprint, configs.run_hash(self.config), *what)
        if self.config.dp.seed is None and what[0] == "DP-SGD":
            context = (*context, self.execution, self.physical_batch_size)
        return noise.derive_key(self.key, "identity", *context).hex(), noise.derive_key(
            self.key, "randomness", *context
        )


def train(config: Config, workdir: Workdir, *, resume: bool = False) -> tuple[Config, TrainState]:
    """Trains until the plan is done, the budget is spent or somebody interrupts; returns the resolved config and state.

    Guarantee: everything in the returned state but its curves is a function of mechanisms that are in the ledger. A
    killed run that is resumed never buys more than the plan: replayed steps are the same release, others are charged.

    Raises:
        InputError: for a config that does not fit, an existing run without ``resume``, or the reverse.
        KeyboardInterrupt: after Ctrl-C, with the state saved.
    """
    with workdir.lock(), _interruptible() as interrupted:
        run, state = _open_run(config, workdir, resume=resume)
        print(configs.to_yaml(run.config), file=sys.stderr)
        print(announcement(run), file=sys.stderr, flush=True)
        if run.plan.warmup is not None and not state.warmup:
            state = _warm_up(run)
        optimizer = _optimizer(run, state)
        if state.step == 0:
            _save(run, state)
        parameters = dict(run.denoiser.network.named_parameters())
        saved_at, saved_step = time.monotonic(), state.step
        with Progress("DP-SGD", run.plan.num_iterations, start=state.step, unit="steps") as progress:
            while state.step < run.plan.num_iterations and not interrupted.is_set():
                name, key = run.identity("DP-SGD", state.step, state.digest())
                if run.ledger.spent("DP-SGD") >= run.plan.num_iterations and not run.ledger.was_charged(name):
                    print("The budget is spent on steps that were lost: training ends here.", file=sys.stderr)
                    break
                run.ledger.reserve(run.plan.step(), name)
                step = private_step(run, parameters, key)
                for parameter, gradient in zip(parameters.values(), step.gradients, strict=True):
                    parameter.grad = gradient
                optimizer.param_groups[0]["lr"] = learning_rate(run.config.optim, state.step, run.plan.num_iterations)
                optimizer.step()
                update_ema(state.ema, parameters, ema_decay(run.config.model.ema_rate, state.step))
                state.step += 1
                _record(state, step)
                due = state.step - saved_step >= run.config.train.checkpoint_every
                if due or time.monotonic() - saved_at > SECONDS_BETWEEN_CHECKPOINTS:
                    _save(run, state)
                    saved_at, saved_step = time.monotonic(), state.step
                progress.advance()
        if state.step > saved_step:
            _save(run, state)
        if interrupted.is_set():
            raise KeyboardInterrupt
        return run.config, state


def private_step(run: Run, parameters: Mapping[str, Tensor], key: bytes) -> PrivateGradient:
    """Returns the private gradient of one step whose randomness comes from ``key``."""
    batch_key, draws_key, noise_key = (noise.derive_key(key, use) for use in ("batch", "diffusion", "noise"))
    batch = poisson_sample(batch_key, run.plan.dataset_size, run.plan.sampling_rate)

    def loss(records: np.ndarray) -> Tensor:
        return example_losses(run.denoiser, run.archive, records, run.config.loss, key=draws_key)

    return private_gradient(
        parameters,
        loss,
        batch,
        clipping_norm=run.config.dp.clipping_norm,
        noise_multiplier=run.plan.noise_multiplier,
        expected_batch_size=run.plan.expected_batch_size,
        physical_batch_size=run.physical_batch_size,
        noise_key=noise_key,
    )


def example_losses(
    denoiser: Denoiser, archive: ImageArchive, records: np.ndarray, config: LossConfig, *, key: bytes
) -> Tensor:
    """Returns the loss of each record, the mean over its own K draws, (B,).

    Guarantee: entry b is a function of record b and of (key, records[b]); no other record enters.
    """
    device = next(denoiser.parameters()).device
    pixels = archive.read(records)
    draws, shape = config.noise_multiplicity, pixels.shape[1:]
    uniform, normal = noise.record_draws(key, records.tolist(), 2 * draws, draws * pixels[0].size)
    u = torch.from_numpy(uniform).view(len(records), 2, draws).permute(1, 2, 0)  # (2, K, B)
    images = torch.from_numpy(pixels).to(device).float() / 127.5 - 1
    conditional = denoiser.network.num_classes > 0 and archive.labels is not None
    return diffusion_loss(
        denoiser,
        images,
        torch.from_numpy(archive.labels[records]).to(device) if conditional and archive.labels is not None else None,
        sigma=noise_level(config, denoiser.kind, u[0]).float().to(device),
        noise=torch.from_numpy(normal.astype(np.float32)).to(device).view(len(records), draws, *shape).transpose(0, 1),
        drop_label=(u[1] < config.label_dropout).to(device),
        kind=config.type,
    )


def physical_batch_size(config: Config) -> int:
    """Returns how many examples go through the network at a time, from the config and public facts alone."""
    chosen = config.train.physical_batch_size
    if chosen is None:
        side, draws = config.data.resolution or 1, config.loss.noise_multiplicity
        num_parameters = sum(p.numel() for p in configs.build_denoiser(config).parameters())
        chosen = min(PIXELS_PER_PASS // (draws * side * side), GRADIENT_BYTES_PER_PASS // (4 * num_parameters))
    return max(1, min(chosen, -(-config.train.expected_batch_size // config.train.n_splits)))


def learning_rate(config: OptimConfig, step: int, num_iterations: int) -> float:
    """Returns the rate of update ``step``; linear decay begins half-way and ends near 0."""
    share = step / num_iterations
    return config.learning_rate * (1.0 if config.schedule == "constant" else min(1.0, 2 * (1 - share)))


def announcement(run: Run) -> str:
    """Returns what will be spent, before anything is."""
    plan = run.plan
    lines = [
        f"Privacy: at most epsilon={plan.epsilon:.4g} at delta={plan.delta:g}, adding or removing one of "
        f"{plan.dataset_size} images.",
        f"  DP-SGD: {plan.num_iterations} steps, sampling rate {plan.sampling_rate:.4g}, noise multiplier "
        f"{plan.noise_multiplier:g}, clipping norm {run.config.dp.clipping_norm:g}.",
    ]
    if plan.warmup is not None:
        lines.append(f"  Central images: one Gaussian mechanism, noise multiplier {plan.warmup.noise_multiplier:g}.")
    if run.config.data.class_names:
        lines.append(f"  Published as they are: the class names {', '.join(run.config.data.class_names)}.")
    warning = accounting.check_delta_for(plan.delta, plan.dataset_size)
    if warning:
        lines.append(f"  Warning: {warning}")
    if run.config.dp.seed is not None:
        lines.append("  NO GUARANTEE: dp.seed is set, so anybody can compute the noise. For tests alone.")
    return "\n".join(lines)


def open_archive(config: Config, workdir: Workdir) -> ImageArchive:
    """Returns the training images; a source that is not a prepared archive is prepared into ``private/`` first."""
    if config.data.path is None:
        raise InputError("Expected data.path, got null: give an archive, a folder of images or idx files.")
    path = Path(config.data.path)
    if workdir.train_archive.exists():
        if workdir.ledger.exists() or path == workdir.train_archive:
            return ImageArchive(workdir.train_archive)
        workdir.train_archive.unlink()  # from a run that died before it began; it may be of other images
    if path.suffix == ".zip" and path.is_file() and _is_archive(path):
        return ImageArchive(path)
    return prepare(config.data.path, workdir.train_archive)


def _is_archive(path: Path) -> bool:
    from dpdm.data.archive import open_zip

    with open_zip(path) as file:
        return "dataset.json" in file.namelist()


def _open_run(config: Config, workdir: Workdir, *, resume: bool) -> tuple[Run, TrainState]:
    """Returns a new run, or an old one at its last checkpoint."""
    exists = workdir.ledger.exists()
    if exists and not resume:
        raise InputError(f"Expected no run in {workdir.root}, got one: add --resume, or choose another --workdir.")
    if resume and not exists:
        raise InputError(
            f"Expected a run to go on with in {workdir.root}, found no {workdir.ledger.relative_to(workdir.root)}: "
            "check --workdir, or leave out --resume to begin."
        )
    if not exists and workdir.checkpoint.exists():
        raise InputError(
            f"Expected a ledger beside {workdir.checkpoint}, found none: what was spent is unknown; choose another "
            "--workdir."
        )
    if config.model.network.dropout:
        raise InputError(
            f"Expected model.network.dropout=0 for training, got {config.model.network.dropout}: its randomness does "
            "not come from the keyed stream."
        )
    check_keys(config)
    if workdir.release.exists():
        raise InputError(
            f"Expected no release in {workdir.root}, got one: a released run is over; give another --workdir."
        )
    device = pick_device(config.setup.device)
    use_full_precision()
    torch.set_num_threads(config.setup.num_threads or torch.get_num_threads())
    given = Path(config.data.path or "") == workdir.train_archive
    try:
        archive = open_archive(config, workdir)
        config = configs.resolve(config, archive)
        denoiser = configs.build_denoiser(config).to(device).train()
        plan = make_plan(config, archive.num_images)
    except InputError:
        if not (exists or given):  # nothing was bought: leave the folder as it was found
            workdir.train_archive.unlink(missing_ok=True)
        raise
    fingerprint = archive.fingerprint()
    header = {"data": fingerprint, "plan": json.loads(json.dumps(asdict(plan))), "config": configs.run_hash(config)}
    if exists:
        ledger = Ledger(workdir.ledger, repair=True)
        _check_header(ledger.header, header, workdir)
        key = _read_key(workdir)
    else:
        configs.save(config, workdir.config)
        key = noise.new_key() if config.dp.seed is None else noise.test_key(config.dp.seed)
        _write_key(workdir, key)
        ledger = Ledger.create(workdir.ledger, header)
    run = Run(
        config,
        workdir,
        archive,
        plan,
        denoiser,
        ledger,
        key,
        fingerprint,
        device,
        execution=execution(device),
        physical_batch_size=physical_batch_size(config),
    )
    if not workdir.checkpoint.exists():
        return run, _fresh_state(denoiser)
    state, facts = checkpoint.load(workdir.checkpoint)
    checkpoint.check_accounted(state, facts, ledger)
    for group in (state.parameters, state.ema, state.exp_avg, state.exp_avg_sq, state.warmup):
        for name in group:
            group[name] = group[name].to(device)
    denoiser.network.load_state_dict(state.parameters)
    state.parameters = _parameters(denoiser)
    return run, state


def _warm_up(run: Run) -> TrainState:
    """Buys central images and trains on them; returns the state in which DP-SGD begins."""
    config = run.config.train.warmup
    assert run.plan.warmup is not None  # the caller has looked
    name, key = run.identity("central images")
    if run.ledger.spent("central images") and not run.ledger.was_charged(name):
        raise InputError(
            "Expected the key with which the central images were bought, got another: they would have to be bought "
            "again; start a new run."
        )
    run.ledger.reserve(run.plan.warmup, name)
    num_classes = run.denoiser.network.num_classes
    means, labels = central_images(run.archive, config, num_classes=num_classes, key=key)
    ema = train_on_central_images(
        run.denoiser,
        means,
        labels,
        config,
        run.config.loss,
        seed=run.config.train.seed,
    )
    run.denoiser.network.load_state_dict(ema)
    state = _fresh_state(run.denoiser)
    state.warmup = {name: tensor.clone() for name, tensor in ema.items()}
    return state


def _fresh_state(denoiser: Denoiser) -> TrainState:
    parameters = _parameters(denoiser)
    return TrainState(
        parameters,
        ema={name: p.clone() for name, p in parameters.items()},
        exp_avg={name: torch.zeros_like(p) for name, p in parameters.items()},
        exp_avg_sq={name: torch.zeros_like(p) for name, p in parameters.items()},
    )


def _parameters(denoiser: Denoiser) -> dict[str, Tensor]:
    """Returns the network's parameters, sharing memory, so that updates of one are seen in the other."""
    return {name: p.detach() for name, p in denoiser.network.named_parameters()}


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


def _save(run: Run, state: TrainState) -> None:
    facts = {"environment": environment(run.device), "ledger": run.ledger.last_line}
    checkpoint.save(run.workdir.checkpoint, state, facts)


def _check_header(old: dict[str, Any], new: dict[str, Any], workdir: Workdir) -> None:
    for part, what in (("data", "images"), ("config", "config"), ("plan", "privacy plan")):
        if old.get(part) != new[part]:
            raise InputError(
                f"Expected the {what} with which the run in {workdir.root} began, got others: resume with "
                f"--config {workdir.config} and the same data, or choose another --workdir."
            )


def _write_key(workdir: Workdir, key: bytes) -> None:
    write_text(workdir.key, key.hex() + "\n", mode=0o600)


def _read_key(workdir: Workdir) -> bytes:
    try:
        key = bytes.fromhex(workdir.key.read_text().strip())
        if len(key) != noise.KEY_BYTES:
            raise ValueError("its length differs")
        return key
    except FileNotFoundError:
        raise InputError(
            f"Expected the run's key at {workdir.key}, found none: it is deleted at release, after which a run is over."
        ) from None
    except ValueError:
        raise InputError(
            f"Expected 64 hex digits in {workdir.key}, got something else: the run cannot go on; start a new one."
        ) from None


@contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """Yields an event that the first Ctrl-C (or a polite kill) sets; the second one stops at once."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if event.is_set():
            raise KeyboardInterrupt
        event.set()
        print("\nStopping after this step; once more to stop at once.", file=sys.stderr, flush=True)

    old = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield event
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
