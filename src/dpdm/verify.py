"""``dpdm verify``: a release against its own statement, and its images against the training images.

A release may be made to deceive or to do harm: files are read up to a size, links and special files not at all, and no
word of them reaches a terminal with control characters in it. What is checked is whether all of it fits together.
Nothing here can prove that training followed the statement.
"""

import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from dpdm import fidelity, statement
from dpdm.config import Config
from dpdm.consistency import Findings, check_folder, hashes_named
from dpdm.data.archive import ImageArchive
from dpdm.device import pick_device
from dpdm.errors import InputError
from dpdm.evaluation.copies import CopyReport, find_copies
from dpdm.evaluation.one_page import one_page, public_page
from dpdm.evaluation.report import SharedReport, write_shareable_report
from dpdm.privacy import accounting
from dpdm.published_words import check_words
from dpdm.released_files import ALLOWED, scan_images, split_page
from dpdm.untrusted import MAX_WORDS_BYTES, clean, read_bytes
from dpdm.workdir import Workdir

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


def verify(release: Path, images: Path | None = None) -> Findings:
    """Checks a release folder and, if it lies in a run's folder, the images and the page to be shared beside it.

    Args:
        release: the folder.
        images: synthetic images to look through in place of those: a folder or an archive.

    Raises:
        InputError: if there is no statement, or no ``images``.
        RunError: if the statement cannot be read.
    """
    if images is not None and not images.exists():
        raise InputError(f"Expected synthetic images at {images}, found none: check --images.")
    found, config = check_folder(release)
    if not (found.statement["mechanisms"] or found.is_public):
        found.problems.append(statement.no_guarantee(found.statement))
    if config is not None:
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
    places = [_images_in(place) for place in ([images] if images else synthetic_images(release))]
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
            return problems + check_words(path.name, text, hashes_named(content, config))
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
