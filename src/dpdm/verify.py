"""``dpdm verify``: a release against its own statement, and its images against the training images.

A release may be made to deceive or to do harm: files are read up to a size, links and special files not at all, and no
word of them reaches a terminal with control characters in it. What is checked is whether all of it fits together.
Nothing here can prove that training followed the statement.
"""

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from dpdm import config as configs
from dpdm import fidelity, statement
from dpdm.config import Config
from dpdm.data.archive import ImageArchive
from dpdm.device import pick_device
from dpdm.errors import InputError, RunError
from dpdm.evaluation.copies import CopyReport, find_copies
from dpdm.evaluation.one_page import one_page, public_page
from dpdm.evaluation.report import SharedReport, write_shareable_report
from dpdm.model_cards import claim_card, model_card, public_card
from dpdm.privacy import accounting
from dpdm.published_words import check_words
from dpdm.release import ALLOWED, CONVERTED_SECTIONS, redacted
from dpdm.released_files import (
    MAX_WEIGHTS_BYTES,
    MAX_WORDS_BYTES,
    check_weights,
    read_json,
    scan_images,
    sha256,
    split_page,
)
from dpdm.untrusted import clean, read_bytes
from dpdm.workdir import Workdir

NAMES_SHOWN = 20
LONGEST_SENTENCE = 1000
LIMITS = (
    "That the training was done as stated. All of the above shows that the papers fit each other, as they would if "
    "somebody had made them up with care: it rests on whoever ran the training, the code and the machine. An audit "
    "(dpdm audit) or a look at the run's ledger is evidence of another kind.",
    "What the values of weights and pixels may encode beyond a model and images.",
)


PUBLIC_LIMITS = (
    "That its images are public. A private model whose statement calls its images public looks just the same: it is "
    "the word of whoever trained it.",
    LIMITS[1],
)


@dataclass
class Findings:
    """What was found.

    Attributes:
        statement: the content of ``privacy.json``.
        epsilons: by dp-accounting and by the second accountant; None where it was not computed.
        problems: a line for each thing that does not fit. Without any the release is consistent.
        notices: a line for each thing that could not be compared and is no problem.
        images: number of synthetic images that were looked through, by the name of their file or folder.
    """

    statement: dict[str, Any]
    epsilons: tuple[float | None, float | None] = (None, None)
    problems: list[str] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    images: dict[str, int] = field(default_factory=dict)

    @property
    def is_public(self) -> bool:
        """Whether it is the release of a public model, for which no guarantee is given."""
        return statement.is_public(self.statement)


def verify(release: Path, images: Path | None = None) -> Findings:
    """Checks a release folder and, if it lies in a run's folder, the images and the page to be shared beside it.

    Args:
        release: the folder.
        images: synthetic images to look through in place of those: a folder or an archive.

    Raises:
        InputError: if there is no statement, or no ``images``.
        RunError: if the statement cannot be read.
    """
    path = release / "privacy.json"
    if not path.is_symlink() and not path.exists():
        raise InputError(f"Expected a statement at {path}, found none: give a release folder.")
    if images is not None and not images.exists():
        raise InputError(f"Expected synthetic images at {images}, found none: check --images.")
    try:
        content, problems = read_json(path)
        mechanisms = statement.parse(content)
    except ValueError as error:
        raise RunError(f"Expected a privacy statement in {path}, could not read it: {clean(error)}.") from None
    found = Findings(content, problems=problems)
    found.problems += _check_files(release, content["files"])
    config = _read_config(release / "config.json", found)
    if not (mechanisms or found.is_public):
        found.problems.append(statement.no_guarantee(content))
    if config is None:
        return found
    if mechanisms or found.is_public:
        recomputed = (
            statement.recompute(content, mechanisms, config) if mechanisms else statement.check_public(content, config)
        )
        found.epsilons = recomputed.epsilons
        found.notices += recomputed.notices
        found.problems += recomputed.problems
    found.problems += check_weights(release / "model.safetensors", config, half="rounding" in content)
    found.problems += _check_words(release, content, config)
    _check_images(release, images, config, found)
    return found


def synthetic_images(release: Path) -> list[Path]:
    """Returns where the images of a release that lies in a run's folder are: ``synthetic.zip`` and ``samples/``."""
    run = _run_of(release)
    return [path for path in (run.synthetic, run.samples) if path.exists()] if run else []


def _run_of(release: Path) -> Workdir | None:
    """Returns the run's folder that a release lies in; None if it is anywhere else, among somebody's downloads say."""
    run = Workdir(release.resolve().parent)
    return run if run.release == release.resolve() else None


def against(release: Path, archive: Path, images: Path | None = None) -> dict[Path, CopyReport]:
    """Looks for copies of training images among synthetic ones, in each place that has some. What it finds is private.

    Args:
        release: whose images are looked at.
        archive: the training images, as ``dpdm prepare`` writes them.
        images: the synthetic ones; None takes all beside the release.

    Raises:
        InputError: if one of the two sets cannot be read, or they have different shapes.
    """
    places = [images] if images else [_images_in(place) for place in synthetic_images(release)]
    if not places:
        raise InputError(f"Expected synthetic images beside {release}, found none: give them by --images.")
    training = fidelity.archive_images("training", ImageArchive(archive))
    device = pick_device("auto")
    return {place: find_copies(fidelity.open_samples(place), training, device=device) for place in places}


def _images_in(place: Path) -> Path:
    """Returns the one file of a ``samples/`` that holds its images, if it was drawn into one, else ``place``."""
    return next((file for name in ("images.npz", "images.zip") if (file := place / name).is_file()), place)


def page(found: Findings) -> str:
    """Returns the one-page statement of a release in which nothing was found to be wrong."""
    own = statement.writer(found.statement) == version("dpdm")
    words = ", the words those that dpdm writes of such a run; there is nothing more" if own else ""
    checks = [
        f"Files: the {len(ALLOWED)} of a release and no others, unchanged since the statement was written. The weights "
        f"are those of the network in config.json{words}.",
        *(f"Synthetic images: {count:,} in {name}: pixels and labels alone." for name, count in found.images.items()),
        *found.notices,
    ]
    if found.is_public:
        return public_page(_safe(found.statement), checks, PUBLIC_LIMITS)
    first, second = found.epsilons
    accountant = accounting.accountant_of(statement.parse(found.statement))
    recomputed = (
        f"Epsilon, recomputed from the uses above: {first:.6g} by {accountant}; {second:.6g} by a second "
        f"accountant that shares no code with it; {float(found.statement['epsilon']):.6g} is stated."
    )
    return one_page(_safe(found.statement), [recomputed, *checks], LIMITS)


def _safe(value: Any) -> Any:
    """Returns a statement whose words cannot move a terminal's cursor or fill its screen."""
    if isinstance(value, dict):
        return {clean(key): _safe(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_safe(item) for item in value]
    return clean(value, LONGEST_SENTENCE) if isinstance(value, str) else value


def _check_files(release: Path, hashes: Mapping[str, Any]) -> list[str]:
    """Returns what is not on the allow-list, is missing, or differs from the statement's hashes."""
    names = sorted(path.name for path in release.iterdir())
    extra = [name for name in names if name not in ALLOWED]
    problems = [f"{clean(name, 100)} is not on the allow-list" for name in extra[:NAMES_SHOWN]]
    problems += [f"{len(extra) - NAMES_SHOWN} more files are not on it"] if len(extra) > NAMES_SHOWN else []
    for name in ALLOWED:
        if name not in names:
            problems.append(f"{name} is missing")
        elif name != "privacy.json":
            try:
                most = MAX_WEIGHTS_BYTES if name == "model.safetensors" else MAX_WORDS_BYTES
                if sha256(release / name, most) != hashes[name]:
                    problems.append(f"{name} differs from the statement's hash")
            except ValueError as error:
                problems.append(f"{name} {clean(error)}")
    return problems


def _read_config(path: Path, found: Findings) -> Config | None:
    """Returns the released config, None if it cannot be used; what is odd about it goes to ``found``.

    A key that it lacks has its default: a release is read for years, by versions with more keys than it was written
    with. One that it has beside those that are shared is a problem.
    """
    try:
        content, problems = read_json(path)
        if "${" in json.dumps(content):  # OmegaConf takes it for a reference, to the environment even
            raise ValueError("it holds ${")
        config = configs.load([path], quiet=True)
    except (ValueError, RecursionError) as error:
        found.problems.append(f"config.json cannot be used: {clean(error)}")
        return None
    shared = redacted(config)
    if not (found.statement["mechanisms"] or found.is_public):
        shared = {name: shared[name] for name in CONVERTED_SECTIONS}
    odd, lacking = _differences(content, shared)
    if odd:
        problems.append(f"config.json is not that of a release: {clean(', '.join(odd[:5]))}")
    if lacking:
        more = f" and {len(lacking) - 5} more" if len(lacking) > 5 else ""
        found.notices.append(
            f"config.json lacks {', '.join(lacking[:5])}{more}, as one from before there were such keys does: they "
            "have their defaults."
        )
    found.problems += problems
    return config


def _differences(
    content: Mapping[str, Any], shared: Mapping[str, Any], prefix: str = ""
) -> tuple[list[str], list[str]]:
    """Returns which keys of a released config are not shared or not read as they are written, and which it lacks."""
    odd, lacking = [], [f"{prefix}{name}" for name in shared if name not in content]
    for name, value in content.items():
        own = shared.get(name)
        if isinstance(value, dict) and isinstance(own, dict):
            more_odd, more_lacking = _differences(value, own, f"{prefix}{name}.")
            odd += more_odd
            lacking += more_lacking
        elif name not in shared or json.dumps(value) != json.dumps(own):  # for ==, 1 is true
            odd.append(f"{prefix}{name}")
    return odd, lacking


def _check_words(release: Path, content: dict[str, Any], config: Config) -> list[str]:
    """Returns which words seem to be a path or a key, and whether the model card is another than the statement's."""
    hashes = _hashes(content, config)
    try:
        card = read_bytes(release / "README.md", MAX_WORDS_BYTES).decode("utf-8")
    except ValueError:
        card = ""  # which is a problem already
    texts = {"README.md": card, "privacy.json": json.dumps(content), "config.json": json.dumps(redacted(config))}
    problems = [line for name, text in texts.items() for line in check_words(name, text, hashes)]
    if statement.writer(content) == version("dpdm") and card != _own_card(content, config):
        problems.append("README.md is not the model card that dpdm makes of this statement")
    return problems


def _hashes(content: dict[str, Any], config: Config) -> frozenset[str]:
    """Returns the hashes that a release may name: of its own files, and of weights that it began with."""
    sources, _ = statement.check_sources(content, config)
    named = [content.get("checkpoint_sha256"), config.model.init_sha256, *(source.sha256 for source in sources)]
    return frozenset(str(value).lower() for value in [*content["files"].values(), *named])


def _own_card(content: dict[str, Any], config: Config) -> str | None:
    """Returns the model card that this version of dpdm makes of a statement; None if it can make none of it."""
    try:
        if statement.is_public(content):
            return public_card(content, config)
        return model_card(content, config) if content["mechanisms"] else claim_card(content, config)
    except (LookupError, TypeError, ValueError):
        return None


def _check_images(release: Path, images: Path | None, config: Config, found: Findings) -> None:
    """Looks through the synthetic images, and the page to be shared if it is beside the release."""
    for path in [images] if images else synthetic_images(release):
        found.images[path.name], problems = scan_images(path, config)
        if images and not (problems or found.images[path.name]):
            problems.append(f"{clean(path.name, 100)} holds no images")
        found.problems += problems
    run = _run_of(release)
    if run and run.shareable.exists():
        found.problems += _check_page(run.shareable, release, found.statement, config)
        if statement.writer(found.statement) != version("dpdm"):
            found.notices.append(f"Nor were the words of {run.shareable.name} beside it.")


def _check_page(path: Path, release: Path, content: dict[str, Any], config: Config) -> list[str]:
    """Returns what ``shareable.html`` holds beside the release and pictures: its text is made again and compared.

    Of a page by another version of dpdm the pictures are looked through, and its words for a path or a key.
    """
    try:
        text, problems = split_page(path)
        if statement.writer(content) != version("dpdm"):
            return problems + check_words(path.name, text, _hashes(content, config))
        report = SharedReport(
            statement=content,
            synthetic=np.zeros((1, config.data.num_channels or 1, 1, 1), np.uint8),
            config=read_bytes(release / "config.json", MAX_WORDS_BYTES).decode("utf-8"),
            versions=content["versions"],
            synthetic_labels=np.zeros(1, np.int64) if config.data.num_classes else None,
            class_names=config.data.class_names,
        )
        with tempfile.TemporaryDirectory() as folder:
            write_shareable_report(Path(folder) / path.name, report)
            expected, _ = split_page(Path(folder) / path.name)
    except (ValueError, LookupError, TypeError) as error:
        return [f"{path.name} {clean(error)}"]
    if text != expected:
        problems.append(f"{path.name} is not the page that dpdm makes of this release")
    return problems
