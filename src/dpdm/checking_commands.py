"""The commands that check and measure: fid-stats, evaluate, audit, verify."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from dpdm.errors import InputError, RunError
from dpdm.options import (
    PATH,
    Command,
    complain,
    config_options,
    extractor_option,
    pretrained_option,
    resolution_of,
    source_options,
    split_words,
)
from dpdm.progress import speaks
from dpdm.workdir import Workdir

if TYPE_CHECKING:
    from dpdm.audit import Audit
    from dpdm.data.transforms import Transform


@click.command("fid-stats", short_help="Feature statistics of a data set, for FID; private.")
@click.argument("source")
@click.argument("dest", type=PATH)
@source_options
@click.option(
    "--split", type=click.Choice(["train", "holdout"]), default="train", help="holdout: the source's own test images."
)
@extractor_option
def fid_stats(
    source: str,
    dest: Path,
    resolution: str | None,
    transform: "Transform | None",
    grey_bits: int,
    split: Literal["train", "holdout"],
    extractor: str,
) -> None:
    """Write the mean and covariance of a data set's features to DEST, a new npz file, for dpdm evaluate --fid.

    SOURCE is as for dpdm prepare, or a prepared archive. The file is computed without noise: of private images it is
    as private as they are.
    """
    from dpdm.fidelity import Source, make_statistics

    found = make_statistics(Source(source, split, resolution_of(resolution), transform, grey_bits), dest, extractor)
    if speaks():
        print(f"{dest}: {len(found.mu)} features of {found.count} images ({found.extractor})")
        print("Computed without noise: if the images are private, so is this file.", file=sys.stderr)


@click.command(
    short_help="Measure synthetic images on real ones; private.",
    epilog="Example: dpdm evaluate --workdir runs/mine --fid stats.npz, or for any images dpdm evaluate --fid "
    "stats.npz --samples FOLDER --real IMAGES.zip",
)
@click.option("--workdir", type=PATH, metavar="DIR", help="Folder of the run; may be left out with --samples.")
@click.option("--fid", "statistics", type=PATH, metavar="NPZ", help="Also FID to this file of dpdm fid-stats.")
@click.option("--samples", type=PATH, metavar="PATH", help="FID of this folder, zip or npz of images, nothing else.")
@extractor_option
@click.option(
    "--classifiers",
    type=click.Choice(["paper", "wrn", "wrn-cifar"]),
    help="Also train the paper's LogReg, MLP and CNN, or the benchmark's WRN-40-4 or WRN-28-10.",
)
@click.option("--classifier-epochs", type=int, metavar="N", help="Fewer epochs than the protocol's; said beside it.")
@click.option("--real", type=PATH, metavar="ZIP", help="Archive of the training images; default: the run's own.")
@click.option("--holdout", type=PATH, metavar="ZIP", help="Archive of held-out real images; default: the run's own.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on standard output.")
def evaluate(
    workdir: Path | None,
    statistics: Path | None,
    samples: Path | None,
    extractor: str,
    classifiers: str | None,
    classifier_epochs: int | None,
    real: Path | None,
    holdout: Path | None,
    as_json: bool,
) -> None:
    """Measure a run's synthetic images on real ones. The figures are private.

    Of a released run report.html, which is private, is written anew, and shareable.html if it is not a public model.

    With --fid also FID, kernel distance (KID), precision, recall and, where the extractor gives class probabilities,
    the Inception score.
    """
    from dpdm import evaluate as measures
    from dpdm import fidelity

    if classifier_epochs is not None and classifiers is None:
        raise InputError("Expected --classifiers with --classifier-epochs, got none: name a protocol.")
    run = Workdir(workdir) if workdir else None
    pages: dict[str, Path] = {}
    if samples is None:
        if run is None:
            raise InputError("Expected --workdir, got none: give a run's folder, or --fid with --samples.")
        pages = {"Private report": run.report, "To share": run.shareable}
        wanted = measures.Classifiers(classifiers, classifier_epochs) if classifiers else None
        fid = measures.Fid(statistics, extractor) if statistics else None
        result = measures.evaluate_run(run, fid, wanted, real=real, holdout=holdout)
        text = measures.summary
    else:
        if statistics is None:
            raise InputError("Expected --fid with --samples, got none: give a file that dpdm fid-stats wrote.")
        if classifiers is not None or holdout is not None:
            raise InputError(
                "Expected neither --classifiers nor --holdout with --samples, got one: classifiers are trained on a "
                "run's images, by --workdir."
            )
        result = measures.evaluate_samples(samples, measures.Fid(statistics, extractor), run, real=real)
        text = fidelity.summary
    if speaks():
        print(json.dumps(result) if as_json else text(result))
        for name, page in pages.items():
            if page.exists():
                print(f"{name}: {page}", file=sys.stderr)


@click.group(subcommand_metavar="step|run", short_help="Attack the code: epsilon is at least so much.")
def audit() -> None:
    """Attack the real code and report the epsilon that the attack proves, to hold against the claimed one.

    A bound above the claim proves an error, and the exit status is 1; one below it proves nothing. No private image is
    read.
    """


def audit_options(command: Command) -> Command:
    command = click.option("--json", "as_json", is_flag=True, help="One JSON object on standard output.")(command)
    return click.option(
        "--confidence", type=float, default=0.95, show_default=True, help="Probability that the bounds are right."
    )(command)


@audit.command(
    "step",
    short_help="One step, many times, with and without a canary.",
    epilog="Example: dpdm audit step --epsilon 1, or a run's own step: dpdm audit step --dataset-size 60000 "
    "--config configs/mnist_28/train_eps_10.0.yaml",
)
@click.option("--epsilon", type=float, help="Claimed of the step; default: 4.")
@click.option("--sampling-rate", type=float, help="Of its Poisson batch; default: 1.")
@click.option("--delta", type=float, help="Default: 1e-5.")
@click.option("--dataset-size", type=int, help="N of a config's run, which then gives these three.")
@click.option("--trials", type=int, default=5000, show_default=True, help="Steps with the canary, and as many without.")
@audit_options
@config_options
def audit_step_command(
    epsilon: float | None,
    sampling_rate: float | None,
    delta: float | None,
    dataset_size: int | None,
    trials: int,
    confidence: float,
    as_json: bool,
    config: tuple[str, ...],
    words: tuple[str, ...],
) -> None:
    """Run training's own step many times with a canary and many times without, on a small network, and tell them apart.

    The claim to be tested is --epsilon, or with a config what its plan for --dataset-size images gives each step.
    """
    from dpdm import config as configs
    from dpdm.step_audit import StepClaim, audit_step

    files, overrides = split_words(config, words)
    if not (files or overrides):
        if dataset_size is not None:
            raise InputError("Expected a config with --dataset-size, got none: give --config, or --epsilon instead.")
        claim = StepClaim.of_epsilon(
            4.0 if epsilon is None else epsilon,
            delta=1e-5 if delta is None else delta,
            sampling_rate=1.0 if sampling_rate is None else sampling_rate,
        )
    elif dataset_size is None or (epsilon, sampling_rate, delta) != (None, None, None):
        raise InputError(
            "Expected --dataset-size and neither --epsilon, --sampling-rate nor --delta with a config, got others: "
            "the config gives these."
        )
    else:
        claim = StepClaim.of_run(configs.load(files, overrides), dataset_size)
    _report(audit_step(claim, num_trials=trials, confidence=confidence), as_json)


@audit.command(
    "run",
    short_help="One training run with many canaries.",
    epilog="Example: dpdm audit run -- dp.epsilon=4, or dpdm audit run --config configs/mnist_28/train_eps_10.0.yaml "
    "-- data.path=mnist",
)
@click.option("--canaries", type=int, default=1000, show_default=True, help="Of which a fair coin leaves half away.")
@click.option("--public", is_flag=True, help="Everybody may see the images at data.path.")
@audit_options
@config_options
def audit_run_command(
    canaries: int, public: bool, confidence: float, as_json: bool, config: tuple[str, ...], words: tuple[str, ...]
) -> None:
    """Train once on public images and many canaries, and guess from the noisy gradients which canaries took part.

    Without a config: the recipe for the digits at dp.epsilon=10. Images at data.path must be a data set that is known
    by name, or --public: training on private ones once more would have to be charged. Nothing is kept.
    """
    from dpdm import config as configs
    from dpdm.run_audit import audit_run, default_run_config

    files, overrides = split_words(config, words)
    asked = configs.load(files, overrides) if files else default_run_config(overrides)
    _report(audit_run(asked, num_canaries=canaries, confidence=confidence, data_is_public=public), as_json)


def _report(found: "Audit", as_json: bool) -> None:
    from dpdm.audit import check

    if as_json:
        print(json.dumps(found.as_dict()))
    else:
        for name, value in found.as_dict().items():
            print(f"{name:31} {value:.6g}" if isinstance(value, float) else f"{name:31} {value}")
    check(found)


@click.command(
    short_help="Check a release against its own statement.",
    epilog="Example: dpdm verify runs/mine/release > statement.txt; for the images' owner: dpdm verify "
    "runs/mine/release --against runs/mine/private/train.zip",
)
@click.argument("release", type=PATH, required=False)
@pretrained_option
@click.option("--images", type=PATH, metavar="PATH", help="Synthetic images elsewhere than beside RELEASE.")
@click.option("--against", type=PATH, metavar="ARCHIVE", help="Training images: look for copies of them; private.")
@click.option("--public", is_flag=True, help="Expect a public model, without any guarantee.")
def verify(
    release: Path | None, pretrained: str | None, images: Path | None, against: Path | None, public: bool
) -> None:
    """Check a release against its own statement and print the statement on one page.

    Two accountants recompute epsilon; every file, the synthetic images beside RELEASE included, must hold what a
    release holds and nothing else. It cannot prove how training was done. With --against the synthetic images are also
    compared with the training images; what that finds goes to standard error and is private, and with copies there is
    no page.

    A public model has no guarantee: its page says so, and the exit status is 1 unless --public says that this is what
    you expect, so that nobody takes it for a private one.
    """
    from dpdm import pretrained as releases
    from dpdm import verify as checks
    from dpdm.evaluation.copies import describe

    if (release is None) == (pretrained is None):
        raise InputError("Expected RELEASE or --pretrained NAME, got both or neither: name one release.")
    release = release or releases.folder(pretrained or "")
    found = checks.verify(release, images)
    for problem in found.problems:
        complain(f"{release}: {problem}")
    reports = {} if against is None else checks.against(release, against, images)
    copies = sum(report.copies for report in reports.values())
    if not found.problems and not copies and (found.is_public or not public):
        print(checks.page(found))
    for place, report in reports.items():
        print("\n".join([f"{place}:", *describe(report)]), file=sys.stderr)
    if found.problems:
        claims = found.statement["mechanisms"] or found.is_public
        what = "does not agree with its own statement" if claims else "gives no verifiable guarantee"
        raise RunError(f"{release} {what}.")
    if found.is_public and not public:
        raise RunError(f"{release} is a public model: there is no guarantee; add --public if you expect that.")
    if public and not found.is_public:
        raise RunError(f"{release} is a private release and no public model: leave out --public.")
    if copies:
        raise RunError(f"{copies} of the synthetic images are copies of training images: do not share them.")
