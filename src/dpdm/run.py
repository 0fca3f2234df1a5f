"""A run: what every process works with, the books that rank 0 keeps, and how both are opened.

The books are what the guarantee rests on: the key of all randomness and the ledger of what was bought. They are with
rank 0 alone; the other processes are handed what they need for a step, never the key of its noise.
"""

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dpdm import checkpoint, distributed
from dpdm import config as configs
from dpdm.central_model import check_covariances
from dpdm.checkpoint import TrainState
from dpdm.config import Config
from dpdm.data.archive import ImageArchive, is_archive
from dpdm.data.on_device import ImagesOnDevice, size_of
from dpdm.data.prepare import prepare
from dpdm.device import (
    code_hash,
    environment,
    execution,
    free_memory,
    keep_freed_memory,
    pick_device,
    use_bf16,
    use_full_precision,
    use_threads,
)
from dpdm.diffusion.adapters import freeze, trained_parameters
from dpdm.diffusion.denoiser import Denoiser
from dpdm.errors import InputError
from dpdm.evaluation.fid import references
from dpdm.files import write_text
from dpdm.initial import Initial, open_initial, take
from dpdm.physical_batch import physical_batch_size
from dpdm.plan import Plan, check_keys, check_names, make_plan
from dpdm.privacy import noise
from dpdm.privacy.accounting import Mechanism
from dpdm.privacy.ledger import Ledger
from dpdm.workdir import Workdir

SELECTED = "give dpdm tune's own command once more, which on a CPU begins anew for nothing more"
LAST_DIGITS = 3e-4  # by how much noise, rounded to 5 digits, and epsilon of one plan may differ between machines
SHARE_FOR_IMAGES = 0.25  # of a device's free memory; physical batches leave as much of it


@dataclass
class Run:
    """What every process works with; nothing of it leaves ``private/``.

    ``on_device`` holds the images of ``archive`` once more, where the config wishes so.
    """

    config: Config
    archive: ImageArchive
    plan: Plan
    denoiser: Denoiser
    device: torch.device
    data_fingerprint: str
    physical_batch_size: int
    on_device: ImagesOnDevice | None = None

    @property
    def images(self) -> ImageArchive | ImagesOnDevice:
        """Where a step takes the images of ``archive`` from."""
        copied = self.on_device
        return copied if copied is not None and copied.archive is self.archive else self.archive

    @property
    def overlaps_noise(self) -> bool:
        """Whether noise is made beside the step: by itself on a GPU, whose host has time; a CPU's cores are busy."""
        wish = self.config.setup.overlap_noise
        return self.device.type == "cuda" if wish == configs.AUTO else bool(wish)

    def noise_deviation(self) -> float:
        """Returns the standard deviation of the privacy noise in each entry of a step's gradients."""
        return self.plan.noise_multiplier * self.config.dp.clipping_norm / self.plan.expected_batch_size

    def autocast(self) -> torch.autocast:
        """Returns the context in which the network computes a step; clipping, sums and noise are in float64."""
        bf16 = use_bf16(self.config.setup.precision, self.device)
        return torch.autocast(self.device.type, torch.bfloat16, enabled=bf16)


@dataclass
class Books:
    """What has been bought, and the key of the randomness; with rank 0 alone."""

    run: Run
    workdir: Workdir
    ledger: Ledger
    key: bytes
    execution: str

    def identity(self, *what: str | int) -> tuple[str, bytes]:
        """Returns the ledger's name for a purchase, and the key of its randomness.

        Guarantee: both depend on the run's key, the data, the config, what is bought, and on how it is computed
        (code, libraries, hardware, threads, physical batch, of all processes; see ``execution``). So the same
        randomness is not used for two computations that differ; on a CPU, whoever repeats a purchase with the same
        identity gets the same bits. What a warm-up buys are exact integer sums, which no hardware changes: of how they
        are computed, the code alone counts, and what images are told apart by and measured from.

        With dp.seed there is no guarantee, and a step's randomness depends on its number alone: so that runs which
        differ in rounding can be compared.
        """
        config = self.run.config
        seeded = config.dp.seed is not None
        what = what[:2] if seeded else what
        context: tuple[str | int, ...] = (self.run.data_fingerprint, configs.run_hash(config), *what)
        if what[0] == "DP-SGD" and not seeded:
            bf16 = int(use_bf16(config.setup.precision, self.run.device))
            context = (*context, self.execution, self.run.physical_batch_size, bf16)
        elif not seeded:
            context = (*context, code_hash())
        return noise.derive_key(self.key, "identity", *context).hex(), noise.derive_key(
            self.key, "randomness", *context
        )

    def buy_step(self, step: int, digest: str) -> bytes | None:
        """Charges DP-SGD's step number ``step`` on the state of ``digest``; returns its key, None if none is left.

        Guarantee: when it returns, the step is in the ledger, on the disk; no more steps than the plan's are charged.
        A step on public images, of a plan without privacy, costs nothing and is not in the ledger.
        """
        if not self.run.plan.is_private:
            return self.identity("step without privacy", step, digest)[1]
        name, key = self.identity("DP-SGD", step, digest)
        if self.ledger.spent("DP-SGD") >= self.run.plan.num_iterations and not self.ledger.was_charged(name):
            return None
        self.ledger.reserve(self.run.plan.step(), name)
        return key

    def buy_for_warmup(self, mechanism: Mechanism, digest: str = "") -> bytes:
        """Charges one of the plan's purchases for the warm-up; returns the key of its randomness.

        ``digest`` is of all that its sums depend on beside data, config and code.
        """
        name, key = self.identity(mechanism.name, 1, digest)
        if self.ledger.spent(mechanism.name) and not self.ledger.was_charged(name):
            raise InputError(
                f"Expected the key, the version of dpdm and the machine with which the {mechanism.name} were bought, "
                "got another: they would have to be bought again; go on with those, or start a new run."
            )
        self.ledger.reserve(mechanism, name)
        return key

    def save(self, state: TrainState) -> None:
        facts = {"environment": environment(self.run.device), "ledger": self.ledger.last_line}
        checkpoint.save(self.workdir.checkpoint, state, facts)


def open_run(
    config: Config, workdir: Workdir, *, resume: bool, key: bytes | None = None
) -> tuple[Run, Books | None, TrainState]:
    """Returns a new run, or an old one at its last checkpoint; its books on rank 0, whose state the others get.

    A new run's randomness comes from ``key``, or from one that is drawn.

    Raises:
        InputError: for a config that does not fit, an existing run without ``resume``, or the reverse.
    """
    opened: list[tuple[Run, Books, TrainState]] = []

    def open_books() -> tuple[Config, Path, Plan, str, int]:
        run, books, state = _open_books(config, workdir, resume=resume, new_key=key)
        opened.append((run, books, state))
        return run.config, run.archive.path.resolve(), run.plan, run.data_fingerprint, run.physical_batch_size

    if len(set(distributed.gather(code_hash()))) > 1:
        raise InputError("Expected the same dpdm in all processes, got others: install one version on all machines.")
    facts = distributed.on_main(open_books)
    run, books, state = opened[0] if opened else _join(*facts)
    everybodys = distributed.gather(execution(run.device))
    if books:
        books.execution = "\n".join(everybodys)
    return run, books, state


def share_state(state: TrainState) -> None:
    """Gives rank 0's weights, average, moments and step to all processes, by name: a checkpoint has another order.

    And what the warm-up told of the classes, by which each process draws its share of images.
    """
    state.step, state.central = distributed.broadcast((state.step, state.central))
    for group in (state.parameters, state.ema, state.averages, state.exp_avg, state.exp_avg_sq):
        distributed.broadcast_tensors([group[name] for name in sorted(group)])


def _join(
    config: Config, path: Path, plan: Plan, fingerprint: str, physical_batch_size: int
) -> tuple[Run, None, TrainState]:
    """Returns what a process other than rank 0 works with, on its own copy of the images."""
    device = set_up(config)
    archive = ImageArchive(path, config.data.unit)
    if archive.fingerprint() != fingerprint:
        raise InputError(f"Expected the same images at {path} on every machine, got others: copy the archive anew.")
    denoiser = make_denoiser(config).to(device).train()
    images = images_on_device(config, archive, device)
    run = Run(config, archive, plan, denoiser, device, fingerprint, physical_batch_size, images)
    return run, None, fresh_state(denoiser, config.model.ema_rates)


def set_up(config: Config) -> torch.device:
    """Returns the device, after settings that make its arithmetic repeatable."""
    device = pick_device(config.setup.device)
    use_full_precision()
    if device.type == "cpu":
        keep_freed_memory()
    use_threads(config.setup.num_threads)
    return device


def images_on_device(config: Config, archive: ImageArchive, device: torch.device) -> ImagesOnDevice | None:
    """Returns the archive's images on ``device`` if the config wishes them there; see ``setup.data_on_device``.

    Raises:
        InputError: if it wishes so without an if, and they do not fit.
    """
    wish = config.setup.data_on_device
    # On a CPU a small set is kept anyway, once decoded, and to decode a large one is little beside a step.
    if not wish or (wish == configs.AUTO and device.type == "cpu"):
        return None
    room, size = int(SHARE_FOR_IMAGES * free_memory(device)), size_of(archive)
    if size <= room:
        return ImagesOnDevice(archive, device)
    if wish == configs.AUTO:
        return None
    raise InputError(
        f"Expected images of at most {room / 2**20:.0f} MiB, a quarter of the free memory of {device}, for "
        f"setup.data_on_device=true, got {size / 2**20:.0f} MiB: set setup.data_on_device=false."
    )


def open_archive(config: Config, workdir: Workdir) -> ImageArchive:
    """Returns the training images; a source that is not a prepared archive is prepared into ``private/`` first."""
    if config.data.path is None:
        raise InputError("Expected data.path, got null: give an archive, a folder of images or idx files.")
    path = Path(config.data.path)
    if workdir.train_archive.exists():
        if workdir.ledger.exists() or _is_the_runs(path, workdir):
            return ImageArchive(workdir.train_archive, config.data.unit)
        workdir.train_archive.unlink()  # from a run that died before it began; it may be of other images
    if path.suffix == ".zip" and path.is_file() and is_archive(path):
        return ImageArchive(path, config.data.unit)
    prepare(config.data.path, workdir.train_archive)
    return ImageArchive(workdir.train_archive, config.data.unit)


def _is_the_runs(path: Path, workdir: Workdir) -> bool:
    """Whether a user's path is that of the run's own archive, however it is written."""
    return path.resolve() == workdir.train_archive.resolve()


def _open_books(
    config: Config, workdir: Workdir, *, resume: bool, new_key: bytes | None
) -> tuple[Run, Books, TrainState]:
    exists = _may_open(config, workdir, resume=resume)
    device = set_up(config)
    given = _is_the_runs(Path(config.data.path or ""), workdir)
    try:
        archive = open_archive(config, workdir)
        config = configs.resolve(config, archive)
        check_names(config)
        check_covariances(config.train.warmup, archive, config.data.num_classes or 0)
        plan = make_plan(config, archive.num_records)
        images = images_on_device(config, archive, device)
        initial = _initial(config, workdir)
        if initial is not None:
            config = replace(config, model=replace(config.model, init_sha256=initial.sources[0].sha256))
        denoiser = make_denoiser(config, initial).to(device).train()
    except InputError:
        if not (exists or given):  # nothing was bought: leave the folder as it was found
            workdir.train_archive.unlink(missing_ok=True)
        raise
    if exists:
        key = read_key(workdir)
    else:
        key = (new_key or noise.new_key()) if config.dp.seed is None else noise.test_key(config.dp.seed)
    fingerprint = archive.fingerprint()
    header = {"data": fingerprint, "plan": plain_plan(plan), "config": configs.run_hash(config)}
    header["key"] = key_name(key)
    header["part_of_selection"] = new_key is not None
    header["initial_weights"] = [source.as_dict() for source in initial.sources] if initial else []
    if exists:
        ledger = Ledger(workdir.ledger, repair=True)
        plan = _as_begun(plan, ledger.header)
        header["plan"] = plain_plan(plan)
        _check_header(ledger.header, header, workdir)
        if _is_the_runs(archive.path, workdir):
            config = _of_where_images_came_from(config, workdir)
        configs.save(config, workdir.config)  # with what may change: where things lie, how images are drawn, names
    else:
        configs.save(config, workdir.config)
        write_key(workdir, key)
        ledger = Ledger.create(workdir.ledger, header)
    size = physical_batch_size(config, device)
    run = Run(config, archive, plan, denoiser, device, fingerprint, size, images)
    books = Books(run, workdir, ledger, key, execution="")  # open_run fills it in, of all processes
    return run, books, _state_of(run, workdir, ledger)


def _of_where_images_came_from(config: Config, workdir: Workdir) -> Config:
    """Returns the config with the ``data.path`` of which a run prepared its images; says if another was given."""
    path = configs.values([workdir.config])["data.path"] if workdir.config.exists() else config.data.path
    if path != config.data.path:
        print(
            f"dpdm: data.path={config.data.path} is not read: the run goes on with the images that it prepared from "
            f"{path}.",
            file=sys.stderr,
        )
    return replace(config, data=replace(config.data, path=path))


def _may_open(config: Config, workdir: Workdir, *, resume: bool) -> bool:
    """Returns whether there is a run to go on with; raises InputError for what is wrong before any image is read."""
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
    if config.evaluation.fid_every is not None:
        references(config.evaluation)  # before there is a run
    if workdir.release.exists():
        raise InputError(
            f"Expected no release in {workdir.root}, got one: a released run is over; give another --workdir."
        )
    return exists


def _state_of(run: Run, workdir: Workdir, ledger: Ledger) -> TrainState:
    """Returns the state in which the run was saved, or that of its beginning, whose weights are the network's."""
    if not workdir.checkpoint.exists():
        if lost := ledger.spent("DP-SGD"):  # there is a checkpoint before the first step
            print(
                f"dpdm: Expected a checkpoint at {workdir.checkpoint}, found none: {lost} steps are done again; what "
                "cannot be repeated bit for bit is charged again.",
                file=sys.stderr,
            )
        return fresh_state(run.denoiser, run.config.model.ema_rates)
    state, facts = checkpoint.load(workdir.checkpoint)
    checkpoint.check_accounted(state, facts, ledger)
    for group in (state.parameters, state.ema, state.averages, state.exp_avg, state.exp_avg_sq, state.warmup):
        for name in group:
            group[name] = group[name].to(run.device)
    run.denoiser.network.load_state_dict(state.parameters)
    state.parameters = _parameters(run.denoiser)
    return state


def make_denoiser(config: Config, initial: Initial | None = None) -> Denoiser:
    """Returns the denoiser that training begins with.

    Its weights are fresh or ``initial``; ``model.trainable`` and ``model.lora_rank`` say what of it is frozen.
    """
    denoiser = configs.build_denoiser(config)
    if initial is not None:
        take(denoiser.network, initial.weights)
    generator = torch.Generator().manual_seed(config.train.seed)
    freeze(denoiser.network, config.model.trainable, config.model.lora_rank, generator)
    for name in initial.sources[0].fresh if initial is not None else ():
        if not denoiser.network.get_parameter(name).requires_grad:
            raise InputError(
                f"Expected model.trainable to name {name.partition('.')[0]}, got it frozen: {config.model.init} is of "
                "another number of classes, so it is fresh and must be learned."
            )
    return denoiser


def _initial(config: Config, workdir: Workdir) -> Initial | None:
    """Returns the weights of ``model.init``; None without, or if the run's checkpoint holds its weights by now."""
    if config.model.init_sha256 and workdir.checkpoint.exists():
        return None
    if config.model.init is None:
        if config.model.init_sha256:
            raise InputError(
                f"Expected model.init, the release whose weights have sha256 {config.model.init_sha256}, got null: "
                "give it, or leave out model.init_sha256."
            )
        return None
    return open_initial(config)


def fresh_state(denoiser: Denoiser, ema_rates: Sequence[float] = ()) -> TrainState:
    """Returns the state in which training begins from a network's weights; Adam has moments of what is trained."""
    parameters, trained = _parameters(denoiser), trained_parameters(denoiser.network)
    return TrainState(
        parameters,
        ema={name: p.clone() for name, p in parameters.items()},
        averages={f"{rate}/{name}": p.clone() for rate in ema_rates for name, p in parameters.items()},
        exp_avg={name: torch.zeros_like(p) for name, p in parameters.items() if name in trained},
        exp_avg_sq={name: torch.zeros_like(p) for name, p in parameters.items() if name in trained},
    )


def _parameters(denoiser: Denoiser) -> dict[str, Tensor]:
    """Returns the network's parameters, sharing memory, so that updates of one are seen in the other."""
    return {name: p.detach() for name, p in denoiser.network.named_parameters()}


def plain_plan(plan: Plan) -> dict[str, Any]:
    """Returns a plan as it stands in a ledger."""
    return json.loads(json.dumps(asdict(plan)))


def _as_begun(plan: Plan, header: dict[str, Any]) -> Plan:
    """Returns ``plan`` with the noise and the epsilon of the ledger's, if they are the same but for their last digits.

    Another processor or library may find others there, and a run goes on with the noise with which it began.
    """
    old = header.get("plan", {})
    found = {name: old.get(name) for name in ("noise_multiplier", "epsilon")}
    close = (
        isinstance(value, float) and math.isclose(value, getattr(plan, name), rel_tol=LAST_DIGITS)
        for name, value in found.items()
    )
    return replace(plan, **found) if all(close) else plan


def _check_header(old: dict[str, Any], new: dict[str, Any], workdir: Workdir) -> None:
    if old.get("part_of_selection") and not new["part_of_selection"]:
        raise InputError(f"Expected a run of its own in {workdir.root}, got one of a private selection: {SELECTED}.")
    for part, what in (("data", "images"), ("config", "config"), ("plan", "privacy plan")):
        if old.get(part) != new[part]:
            raise InputError(
                f"Expected the {what} with which the run in {workdir.root} began, got others: resume without --config "
                f"and with the same data, undo any change of {workdir.config}, or choose another --workdir."
            )
    if old.get("key") != new["key"]:
        raise InputError(
            f"Expected the key in {workdir.key} to be the one that {workdir.ledger} names, got another: one of the two "
            "is another run's or damaged; put it back, or start a new run."
        )


def key_name(key: bytes) -> str:
    """Returns what a ledger says of a run's key, which does not tell the key."""
    return noise.derive_key(key, "its name in the ledger").hex()


def write_key(workdir: Workdir, key: bytes) -> None:
    write_text(workdir.key, key.hex() + "\n", mode=0o600)


def read_key(workdir: Workdir) -> bytes:
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
