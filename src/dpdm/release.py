"""What leaves the house: weights, redacted config, statement and model card, by an allow-list.

``release/`` holds these files and no others: ``model.safetensors``, ``config.json``, ``privacy.json``, ``README.md``.
A converted checkpoint of the original gets the same four, and a statement that gives no guarantee; so does a public
model, trained without privacy on public images.
"""

import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from dpdm import checkpoint, pretrained, reference_checkpoint
from dpdm import config as configs
from dpdm.checkpoint import TrainState
from dpdm.config import Config
from dpdm.consistency import check_folder
from dpdm.diffusion.adapters import merged
from dpdm.diffusion.denoiser import Denoiser
from dpdm.errors import InputError, RunError
from dpdm.fetching import file_sha256
from dpdm.files import atomic_path, fsync, write_json, write_text
from dpdm.generate import as_drawn, denoiser_with, draw, grid
from dpdm.initial import read_sources
from dpdm.model_cards import claim_card, model_card, public_card
from dpdm.own_statement import ROUNDING, claim_statement, make_statement, public_statement
from dpdm.plain_yaml import check_plain
from dpdm.plan import check_names, check_public
from dpdm.privacy.ledger import Ledger
from dpdm.released_files import ALLOWED, CONVERTED_SECTIONS, network_shapes, redacted, to_half
from dpdm.run import SELECTED
from dpdm.workdir import Workdir

MODEL_KEYS = (  # which say what the weights mean, beside those of model.network
    "data.resolution",
    "data.num_channels",
    "data.num_classes",
    "model.denoiser",
    *configs.PRECONDITIONING,
)
PREVIEWED = 200  # images, from which a picture takes a hundred


def make_release(
    workdir: Workdir, ema_rate: float | None = None, *, half: bool = False, selection: str | None = None
) -> Path:
    """Writes ``release/`` from a run's checkpoint and ledger, then deletes the run's keys; returns the folder.

    Released is the moving average of ``model.ema_rate``, or of another rate that the run kept (``model.ema_rates``).
    All of them are functions of the same mechanisms. A choice made by looking at samples costs nothing; one made by
    looking at real images is not accounted for.

    With ``half`` the weights are rounded to float16, which halves the file. ``selection`` is added to ``dp.selection``
    in statement and config: what was chosen since training began, or before and not said, and by what.

    Where the frequencies of the classes were bought with noise, they become the config's ``sampler.class_weights``, so
    that images will be drawn by them, unless the run's config asks for equal ones.

    Guarantee: every released tensor is a weight of the moving average, a function of the mechanisms in the ledger and
    of the weights that the statement names as their beginning; the statement's epsilon is computed from the ledger.
    ``sampler.class_weights`` are what the mechanism of central images told of the classes, or all equal.
    Nothing else is read from ``private/``. What was trained without privacy is released if its images were declared
    public, under a statement that gives no guarantee.

    Raises:
        InputError: if there is no run, it is released already, ``dp.seed`` makes its noise public, no average of
            ``ema_rate`` was kept, or words that would be published seem to be a path or a key.
        RunError: if checkpoint, ledger or config are damaged or do not belong together.
    """
    with workdir.lock():  # a run that is still training would go on after its release
        return _make_release(workdir, ema_rate, half=half, selection=selection)


def preview(workdir: Workdir) -> list[Path]:
    """Draws images of one seed from each average that a run kept; returns the pictures, in ``private/averages/``.

    To choose ``make_release``'s ``ema_rate`` by. They are for the owner: drawn from the same mechanisms as a release,
    but there is no statement beside them yet.

    Raises:
        InputError, RunError: as ``make_release``, and nothing is released.
    """
    with workdir.lock():
        config, state, _ = _finished(workdir)
        config = as_drawn(config, state)
        pictures = []
        for rate in (config.model.ema_rate, *config.model.ema_rates):
            denoiser = denoiser_with(config, _average(config, state, rate))
            images, labels = draw(denoiser, config, num_images=PREVIEWED)
            pictures.append(workdir.averages / f"{rate}.png")
            with atomic_path(pictures[-1]) as temporary:
                grid(images, labels).save(temporary, format="PNG")
        return pictures


def _finished(workdir: Workdir) -> tuple[Config, TrainState, Ledger]:
    """Returns a run's config, its last state and its ledger, which belong together; the caller holds the lock."""
    if workdir.release.exists():
        forget_keys(workdir)  # a release that was killed right after its renaming may have left them
        raise InputError(f"Expected no release in {workdir.root}, got one: a run is released once.")
    if workdir.released.exists():
        raise InputError(
            f"Expected a run that was not released, got one whose release left {workdir.root}: bring it back."
        )
    if not workdir.checkpoint.exists():
        raise InputError(f"Expected a trained model in {workdir.private}, found none: run dpdm train first.")
    config = configs.load([workdir.config])
    if config.dp.seed is not None:
        raise InputError(
            f"Expected dp.seed=null for a release, got {config.dp.seed}: its noise is public; train again."
        )
    state, facts = checkpoint.load(workdir.checkpoint)
    ledger = Ledger(workdir.ledger)
    checkpoint.check_accounted(state, facts, ledger)
    if ledger.header.get("part_of_selection"):
        raise InputError(
            f"Expected a run of its own in {workdir.root}, got one of a private selection, which is not released by "
            f"itself: {SELECTED}."
        )
    if configs.run_hash(config) not in ledger.header.get("candidates", [ledger.header["config"]]):
        raise RunError(
            f"Expected {workdir.config} as the run was begun with it, got another: the statement would be wrong; undo "
            "the change."
        )
    if config.dp.enabled and not ledger.mechanisms():
        raise InputError(
            f"Expected a run that has learned something in {workdir.root}, got one before its first step: go on by "
            "dpdm train --resume."
        )
    return config, state, ledger


def _average(config: Config, state: TrainState, rate: float) -> dict[str, Tensor]:
    """Returns the weights of one of a run's averages, adapters beside what they adapt."""
    return state.average(rate) if rate in config.model.ema_rates else state.ema


def _make_release(workdir: Workdir, ema_rate: float | None, *, half: bool, selection: str | None) -> Path:
    config, state, ledger = _finished(workdir)
    if selection is not None:
        config = with_selection(config, selection)
    kept = config.model.ema_rates
    if ema_rate not in (None, config.model.ema_rate, *kept):
        rates = [config.model.ema_rate, *kept]
        raise InputError(f"Expected --ema to be one of {rates}, which the run kept, got {ema_rate}: name another.")
    rate = ema_rate if ema_rate is not None else config.model.ema_rate
    average = merged(_average(config, state, rate))
    if not all(bool(tensor.isfinite().all()) for tensor in average.values()):
        raise RunError(
            f"Expected finite weights in {workdir.checkpoint}, got others: training has diverged; start a new run with "
            "a lower optim.learning_rate."
        )
    check_names(config)
    config = replace(config, model=replace(config.model, ema_rate=rate, ema_rates=()))
    config = as_drawn(config, state)
    if config.train.warmup.counts(config.data.num_classes or 0) and not config.sampler.class_weights:
        print(
            "dpdm: this run's warm-up was done by a version that did not keep the classes' frequencies: images will be "
            "drawn of all classes equally often.",
            file=sys.stderr,
        )
    weights = to_half(average) if half else {name: tensor.contiguous() for name, tensor in average.items()}
    plan, sources = ledger.header["plan"], read_sources(ledger.header["initial_weights"])
    if config.dp.enabled:
        statement = make_statement(config, ledger.mechanisms(), plan, sources, half=half)
        card = model_card(statement, config)
    else:
        check_public(config)
        statement = public_statement(config, plan["dataset_size"], sources, half=half)
        card = public_card(statement, config)
    write_release(workdir, weights, redacted(config), statement, card)
    forget_keys(workdir)
    return workdir.release


def with_selection(config: Config, selection: str) -> Config:
    """Returns a private model's config in which ``dp.selection`` says one thing more.

    Raises:
        InputError: if it says nothing, cannot be published as it is, or the model is public.
    """
    check_plain(selection, "--selection", "dp.selection")
    if not config.dp.enabled or not selection.strip():
        raise InputError(
            f"Expected --selection to be words for a private model's statement, got {selection!r}"
            f"{'' if config.dp.enabled else ' for a public model'}: leave it out, or say what was chosen by what."
        )
    return replace(config, dp=replace(config.dp, selection=f"{config.dp.selection}; {selection}"))


def sampling_config(workdir: Workdir) -> Config:
    """Returns a run's config, with the class weights of its release if there is one: as its images are drawn."""
    config = configs.load([workdir.config])
    if not workdir.release.exists():
        return config
    weights = load_config(workdir.release).sampler.class_weights
    return replace(config, sampler=replace(config.sampler, class_weights=weights))


def convert(file: Path, config: Config, workdir: Workdir, *, half: bool = False) -> Path:
    """Writes ``release/`` from a checkpoint of the original, rounded to float16 with ``half``; returns the folder.

    Guarantee: none. The statement has no epsilon and no mechanism, so that it cannot pass for a private model's:
    ``verify`` fails on it, reports and totals refuse it.

    Raises:
        InputError: if the file is no such checkpoint or does not fit the config, or there is a run or a release.
    """
    if not file.is_file():
        raise InputError(f"Expected a checkpoint of the original at {file}, found none: check --from.")
    check_unused(workdir)
    network = reference_checkpoint.load_denoiser(file, config).network
    weights = {name: parameter.detach() for name, parameter in network.named_parameters()}
    weights = to_half(weights) if half else weights
    written = replace(config, model=replace(config.model, use_ema=True))  # what there is, is what will be taken
    sections = {name: section for name, section in redacted(written).items() if name in CONVERTED_SECTIONS}
    statement = claim_statement(config, file_sha256(file))
    if half:
        statement["rounding"] = ROUNDING
    write_release(workdir, weights, sections, statement, claim_card(statement, config))
    return workdir.release


def check_unused(workdir: Workdir) -> None:
    """Raises InputError if there is a run or a release in the folder."""
    for path in (workdir.release, workdir.ledger, workdir.checkpoint):
        if path.exists():
            raise InputError(f"Expected no run and no release in {workdir.root}, got one: choose another --workdir.")


def write_release(
    workdir: Workdir, weights: dict[str, Tensor], config: dict[str, Any], statement: dict[str, Any], card: str
) -> None:
    """Writes the release folder, which appears as a whole, in agreement with its own statement, or not at all.

    Raises:
        RunError: if ``dpdm verify`` would refuse it. What follows a release cannot be undone.
    """
    temporary = workdir.root / ".release.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        checkpoint.write_tensors(weights, temporary / "model.safetensors")
        write_json(temporary / "config.json", config)
        write_text(temporary / "README.md", card)
        statement["files"] = {name: file_sha256(temporary / name) for name in ALLOWED if name != "privacy.json"}
        write_json(temporary / "privacy.json", statement)
        if problems := check_folder(temporary)[0].problems:
            raise RunError(
                f"Expected a release in {workdir.root} that agrees with its own statement, got: {problems[0]}. Nothing "
                "was released, and the run is as it was."
            )
        fsync(temporary / "model.safetensors")
        temporary.rename(workdir.release)
        fsync(workdir.root)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def forget_keys(workdir: Workdir) -> None:
    """Deletes a released run's keys from its folder (copies and the disk's old blocks are the owner's business)."""
    write_text(workdir.released, "Released once; no second release is made of this run.\n", mode=0o600)
    for key in (workdir.key, workdir.holdout_key):
        key.unlink(missing_ok=True)


def load_denoiser(path: str | Path, config: Config | str | Path | None = None) -> Denoiser:
    """Returns the denoiser of a release or of a checkpoint of the original, in evaluation mode, on the CPU.

    Args:
        path: a release folder, or its ``model.safetensors``, or the original's file; or, where there is no such path,
            the name of a pretrained release (see ``pretrained.names``).
        config: loaded, or the path of its file; replaces a release's own, is needed for a checkpoint of the original.

    Raises:
        InputError: if there is no such model, or weights and config do not fit each other.
    """
    path = pretrained.resolve(Path(path))
    if config is not None and not isinstance(config, Config):
        config = configs.load([config])
    weights = path / "model.safetensors" if path.is_dir() else path
    if not weights.is_file():
        raise InputError(f"Expected a release folder or a weights file at {path}, found none: check model.ckpt.")
    if reference_checkpoint.is_original(weights):
        if config is None:
            raise InputError(
                f"Expected a config for {weights}, which is no release, got none: give the model's, such as --config "
                "configs/mnist_28/sample_eps_1.0.yaml."
            )
        return reference_checkpoint.load_denoiser(weights, config)
    own = own_config(weights)
    if config is not None and own is not None:
        for key, wanted, got in configs.differing(configs.load([own], quiet=True), config, MODEL_KEYS):
            raise InputError(f"Expected {key}={wanted}, as the release in {own.parent} has, got {got}.")
    config = config or load_config(weights.parent)
    if not config.model.use_ema:
        raise InputError(f"Expected model.use_ema=true for {weights}, got false: a release holds the average alone.")
    try:
        _check_shapes(weights, config)  # before memory is taken for what a stranger's config asks for
        denoiser = configs.build_denoiser(config)
        denoiser.network.load_state_dict(load_file(weights))
    except (SafetensorError, OSError) as error:
        raise InputError(f"Expected safetensors weights in {weights}, could not read them: {error}.") from None
    except (RuntimeError, LookupError, TypeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"Expected weights that fit the config in {weights}, got others: {reason}") from None
    return denoiser.eval()


def draw_images(path: str | Path, *overrides: str) -> tuple[np.ndarray, np.ndarray | None]:
    """Draws images from a release into memory, by the sampler in its own config: those that ``dpdm sample`` draws.

    Args:
        path: as for ``load_denoiser``.
        overrides: keys of sampler and setup, such as "sampler.num_images=100", "sampler.seed=1".

    Returns:
        (n, C, H, W) uint8 and labels (n,) int64, None for a model without classes.

    Raises:
        InputError: if there is no such release, or a key means nothing in drawing from it.
    """
    own = own_config(Path(path))
    if own is None:
        raise InputError(f"Expected a release at {path}, found none: give its folder, or a pretrained one's name.")
    config = config_to_draw(own, [], overrides)
    return draw(load_denoiser(path, config), config)


def _check_shapes(weights: Path, config: Config) -> None:
    with safe_open(weights, framework="pt") as file:
        found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118  # not a dict
    try:
        expected = network_shapes(config, len(found))
    except ValueError as error:
        raise RuntimeError(f"it {error}") from None
    for name in sorted(found.keys() ^ expected.keys()) + [
        name for name in expected if found.get(name) != expected[name]
    ]:
        raise RuntimeError(
            f"{name} is {found.get(name, 'missing')}, by the config it is {expected.get(name, 'unknown')}"
        )


def own_config(path: Path) -> Path | None:
    """Returns the config file of the release at ``path`` (as ``load_denoiser`` takes it); None if it is no release."""
    path = pretrained.resolve(path)
    if path.is_file() and reference_checkpoint.is_original(path):
        return None
    file = (path if path.is_dir() else path.parent) / "config.json"
    return file if file.is_file() else None


def config_to_draw(own: Path, files: Sequence[str], overrides: Sequence[str]) -> Config:
    """Returns a release's config, ``own``, with a user's files and ``overrides`` on top.

    Raises:
        InputError: if that would make another model of its weights, or an override means nothing in drawing.
    """
    theirs, filed = configs.values([own]), configs.values([own, *files])
    asked = configs.values([own, *files], overrides)
    for key, value in asked.items():
        if value != filed[key] and key != "model.ckpt" and key.partition(".")[0] not in ("sampler", "setup"):
            raise InputError(f"Expected keys of sampler and setup for {own.parent}, got {key}={value}: leave it out.")
        if value != theirs[key] and (key in MODEL_KEYS or key.startswith("model.network.")):
            raise InputError(
                f"Expected {key}={theirs[key]}, as the release in {own.parent} has, got {value}: leave the key out."
            )
    config = configs.load([own, *files], overrides, quiet=True)
    configs.check_guidance(config)
    return config


def load_config(release: Path) -> Config:
    """Returns a release's config; what was redacted has its default."""
    path = release / "config.json"
    if not path.is_file():
        raise InputError(f"Expected {path} beside the weights, found none: give --config.")
    return configs.load([path])
