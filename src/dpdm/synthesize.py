"""The whole way for a user's own images: prepare, train, release, sample, evaluate, report."""

import json
import shutil
import sys
import time
from dataclasses import asdict, dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import Any

from dpdm import account, distributed
from dpdm import config as configs
from dpdm.config import Config
from dpdm.data.archive import ImageArchive, Unit
from dpdm.data.prepare import prepare_with_holdout
from dpdm.data.sources import source_path
from dpdm.data.transforms import MAX_GREY_BITS, Resolution, Transform
from dpdm.errors import InputError, RunError
from dpdm.evaluate import ImageSet, evaluate, read_synthetic, summary, write_reports
from dpdm.files import write_json, write_text
from dpdm.generate import make_samples
from dpdm.plain_yaml import check_plain, sets
from dpdm.privacy import accounting, noise
from dpdm.recipes import SELECTION, recipe
from dpdm.release import forget_keys, load_denoiser, make_release, sampling_config
from dpdm.train import train
from dpdm.workdir import Workdir

HOLDOUT_FRACTION = 1 / 6
ONE_PROCESS, STEPS = "one process for the whole way", "go step by step by dpdm train, release and sample"

FIXED = {
    "dp.epsilon": "give --epsilon",
    "dp.delta": "give dpdm synthesize --delta",
    "dp.noise_multiplier": "it follows from --epsilon; dpdm train takes it",
    "dp.seed": "a run with a seed cannot be released; dpdm train takes it",
    "dp.enabled": "images are synthesized with a guarantee; dpdm train takes it",
    "data.path": "give SOURCE",
    "sampler.num_images": "dpdm synthesize has --num-images",
}


@dataclass(frozen=True)
class Request:
    """What a user asked for; a folder goes on with the same request and refuses another.

    Attributes:
        source: folder, zip, archive or name of a data set.
        epsilon: the budget.
        delta: None: the power of ten at or below min(1e-5, 1/(10 N)).
        resolution, transform: how to bring images to one size.
        num_images: synthetic images; None: as many as there are real ones, or groups of them.
        overrides: key=value pairs on top of the recipe.
        groups: see ``with_groups``; images that have groups are protected as groups.
        grey_bits: of 16-bit grey images, how many are used.
    """

    source: str
    epsilon: float
    delta: float | None = None
    resolution: Resolution | None = None
    transform: Transform | None = None
    num_images: int | None = None
    overrides: tuple[str, ...] = ()
    groups: str | None = None
    grey_bits: int = MAX_GREY_BITS

    def __post_init__(self) -> None:
        account.check_target(self.epsilon, None, "--epsilon", "dp.noise_multiplier")
        if self.delta is not None and not 0 < self.delta < 1:
            raise InputError(f"Expected 0 < --delta < 1, got {self.delta}.")
        for override in self.overrides:
            for fixed, why in FIXED.items():
                if sets(override, fixed):
                    raise InputError(f"Expected no {fixed} after --, got {override!r}: {why}.")
        asked = configs.load([], self.overrides)  # a typo is found before the images are read
        usual = configs.load([])
        for fixed, why in FIXED.items():  # an old name of a key sets it, too
            if attrgetter(fixed)(asked) != attrgetter(fixed)(usual):
                raise InputError(f"Expected no {fixed} after --, got {attrgetter(fixed)(asked)}: {why}.")
        if asked.setup.n_gpus_per_node > 1:
            raise InputError(
                f"Expected {ONE_PROCESS}, got setup.n_gpus_per_node={asked.setup.n_gpus_per_node}: {STEPS}."
            )
        if self.num_images is not None and self.num_images < 2:
            raise InputError(f"Expected --num-images >= 2, got {self.num_images}: they are compared with real ones.")
        configs.load([], [f"sampler.num_images={self.num_images or 2}"])  # as it will be drawn


def synthesize(request: Request, workdir: Workdir) -> dict[str, Any]:
    """Goes the whole way, or on from where an earlier call was stopped; returns the private evaluation.

    Raises:
        InputError: if ``workdir`` holds another request's run, a finished one, or other files.
    """
    if distributed.size() > 1:
        raise InputError(f"Expected {ONE_PROCESS}, got {distributed.size()}: leave out torchrun, or {STEPS}.")
    with workdir.lock():
        claim(request, request.source, workdir, finished=workdir.shareable)
        return _go_on(request, workdir)


def _go_on(request: Request, workdir: Workdir) -> dict[str, Any]:
    timing: dict[str, str] = {}
    start = time.monotonic()

    def lap(what: str) -> None:
        nonlocal start
        timing[what] = f"{time.monotonic() - start:.1f} s"
        start = time.monotonic()

    try:
        real, holdout = prepare_data(request, workdir)
        config = configure(request, workdir, real)
        num_images = request.num_images or default_num_images(real, holdout)
        lap("Preparing")
        if not workdir.release.exists():
            config, state = train(config, workdir, resume=workdir.ledger.exists())
            lap("Training")
            if state.step == 0:
                raise RunError("Expected at least one step of training, got none: the budget was spent on lost steps.")
            make_release(workdir)
        forget_keys(workdir)
    except InputError:
        if not workdir.ledger.exists():  # nothing was bought: leave the folder as it was found
            start_over(workdir)
        raise
    config = sampling_config(workdir)
    if not workdir.synthetic.exists():
        make_samples(
            load_denoiser(workdir.release),
            config,
            folder=None if workdir.samples.exists() else workdir.samples,
            archive=workdir.synthetic,
            num_images=num_images,
        )
        lap("Sampling")
    synthetic: ImageSet = read_synthetic(workdir, config)
    result = evaluate(workdir, synthetic, real, holdout)
    lap("Evaluating")
    write_reports(workdir, synthetic, real, timing)
    print(summary(result), file=sys.stderr)
    return result


def prepare_data(request: Request, workdir: Workdir) -> tuple[ImageArchive, ImageArchive]:
    """Returns training and held-out images as archives in ``private/``; their records are groups if there are any."""
    if not (workdir.train_archive.exists() and workdir.holdout_archive.exists()):
        if not workdir.holdout_key.exists():
            write_text(workdir.holdout_key, noise.new_key().hex() + "\n", mode=0o600)
        prepare_with_holdout(
            request.source,
            workdir.train_archive,
            workdir.holdout_archive,
            holdout_key=_read_holdout_key(workdir),
            fraction=HOLDOUT_FRACTION,
            resolution=request.resolution,
            transform=request.transform,
            grey_bits=request.grey_bits,
            groups=request.groups,
            overwrite=True,
        )
    if (held_out := ImageArchive(workdir.holdout_archive).num_images) < 2:
        raise InputError(
            f"Expected at least 2 held-out images of {request.source}, got {held_out}: give more images, or folders "
            "train/ and test/."
        )
    unit: Unit = "group" if ImageArchive(workdir.train_archive).groups is not None else "image"
    unit = configs.load([], [f"data.unit={unit}", *request.overrides], quiet=True).data.unit
    return ImageArchive(workdir.train_archive, unit), ImageArchive(workdir.holdout_archive, unit)


def _read_holdout_key(workdir: Workdir) -> bytes:
    try:
        return bytes.fromhex(workdir.holdout_key.read_text().strip())
    except ValueError:
        raise InputError(
            f"Expected hex digits in {workdir.holdout_key}, got something damaged: choose another --workdir."
        ) from None


def configure(request: Request, workdir: Workdir, real: ImageArchive) -> Config:
    """Returns the recipe for the data's public facts, with the request's overrides on top."""
    size, unit = real.num_records, real.unit
    delta = accounting.default_delta(size) if request.delta is None else request.delta
    accounting.check_delta_for(delta, size, unit)
    values = recipe(
        dataset_size=size,
        resolution=real.resolution,
        num_channels=real.num_channels,
        num_classes=real.num_classes if real.labels is not None else 0,
        epsilon=request.epsilon,
        delta=delta,
        unit=unit,
    )
    known = source_path(request.source) is None  # a data set that everybody knows by name
    values = [*values, f"dp.epsilon={request.epsilon!r}", f"dp.delta={delta!r}"]
    if known:
        values.append(f"data.name={request.source}")
    changed = configs.changed_settings(configs.values([], values), configs.values([], [*values, *request.overrides]))
    if changed:
        selection = configs.with_changes(SELECTION.format(unit=unit), changed)
        values.append(f"dp.selection={json.dumps(selection)}")
    config = configs.load([], [*values, *request.overrides])
    path = str(workdir.train_archive)
    check_plain(path, "--workdir", "data.path")
    # Not as an override: a folder's name may mean something else in YAML.
    return replace(config, data=replace(config.data, path=path))


def default_num_images(real: ImageArchive, holdout: ImageArchive) -> int:
    """Returns the number of real records, which is public; of images that are protected as groups the number is not."""
    return real.num_records + holdout.num_records


def start_over(workdir: Workdir) -> None:
    """Removes a run's own products, and nothing else, from its folder."""
    for path in workdir.products:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    if workdir.root.exists() and not any(workdir.root.iterdir()):
        workdir.root.rmdir()


def remove_finished(source: str, workdir: Workdir) -> None:
    """Removes a finished run on the data set ``source`` from its folder; what else is there stays."""
    if not workdir.shareable.exists():
        return
    with workdir.lock():
        if workdir.request.exists() and _read_request(workdir.request).get("source") == source:
            start_over(workdir)


def claim(request: Any, source: str, workdir: Workdir, *, finished: Path) -> None:
    """Notes ``request``, a dataclass, in an empty folder; in another one checks that this very request is under way.

    Raises:
        InputError: if the folder holds something else, or the file ``finished``, or there is no such source.
    """
    note = workdir.request
    asked = json.loads(json.dumps(asdict(request)))
    if note.exists():
        if _read_request(note) != asked:
            raise InputError(
                f"Expected an empty folder or this very request in {workdir.root}, got another request: "
                "choose another --workdir."
            )
        if finished.exists():
            raise InputError(
                f"Expected an unfinished run in {workdir.root}, got a finished one: give another --workdir."
            )
        return
    found = [path.name for path in workdir.products if path.exists() and path != workdir.private]
    found += [path.name for path in workdir.private.iterdir() if path.name != "lock"]
    if found:
        raise InputError(
            f"Expected an empty folder {workdir.root}, got one that holds a run ({found[0]}): choose another --workdir."
        )
    _check_source(source)
    write_json(note, asked)


def _read_request(note: Path) -> Any:
    try:
        return json.loads(note.read_text(encoding="utf-8"))
    except ValueError:
        raise InputError(
            f"Expected what was asked for in {note}, got something damaged: choose another --workdir."
        ) from None


def _check_source(source: str) -> None:
    path = source_path(source)
    if path is not None and not Path(path).exists():
        raise InputError(f"Expected a folder, a zip or the name of a data set, got {source}: there is no such file.")
