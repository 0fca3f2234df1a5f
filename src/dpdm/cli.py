"""The command line: thin, each command calls one function. Nothing heavy is imported before a command needs it.

Exit status: 0 done, 1 failed on the way, 2 wrong usage or config, 130 interrupted.
"""

import errno
import json
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click
from click.core import ParameterSource

from dpdm import launch
from dpdm.errors import InputError, PeerError, RunError
from dpdm.progress import speaks
from dpdm.untrusted import clean
from dpdm.workdir import Workdir, check_folder

if TYPE_CHECKING:
    from dpdm.audit import Audit
    from dpdm.data.transforms import Resolution, Transform
    from dpdm.privacy.accounting import Distribution
    from dpdm.tune import Utility

PATH = click.Path(path_type=Path)
Command = Callable[..., int | None]
LONGEST_MESSAGE = 4000
MEMORY_REMEDY = "lower train.physical_batch_size or sampler.batch_size, or give a smaller network or smaller images"
TRANSFORMS = ("center-crop", "center-crop-wide")


def workdir_option(command: Command) -> Command:
    return click.option("--workdir", type=PATH, required=True, metavar="DIR", help="Folder of the run.")(command)


def pretrained_option(command: Command) -> Command:
    return click.option(
        "--pretrained",
        metavar="NAME",
        is_eager=True,
        callback=_list_pretrained,
        help="Take the release of this name that comes with dpdm; list: print the names.",
    )(command)


def _list_pretrained(context: click.Context, _option: click.Parameter, name: str | None) -> str | None:
    from dpdm import pretrained

    if name == "list":
        print(pretrained.listing())
        context.exit()
    return name


def config_options(command: Command) -> Command:
    """Adds --config and, after --, overrides; words without = are further files, as the original's habit is."""
    command = click.argument("words", nargs=-1, metavar="[-- key=value ...]")(command)
    return click.option(
        "--config", multiple=True, metavar="FILE", help="YAML file of keys; may be repeated, later files win."
    )(command)


def source_options(command: Command) -> Command:
    command = click.option(
        "--transform",
        type=click.Choice(TRANSFORMS),
        help="Cut images to their central square, or to the central part that has the shape of --resolution, which is "
        "then put between black bars.",
    )(command)
    return click.option(
        "--resolution",
        metavar="WxH",
        help="Such as 32x32, or with center-crop-wide 64x48; default: the images' own, if they agree.",
    )(command)


def groups_option(command: Command) -> Command:
    return click.option(
        "--groups",
        metavar="FILE|PATTERN",
        help="Whose images these are, to protect each person with all of theirs: a CSV file with the lines file,group, "
        "or a regular expression whose one pair of brackets is the group in a path.",
    )(command)


def extractor_option(command: Command) -> Command:
    return click.option(
        "--extractor",
        default="inception",
        show_default=True,
        metavar="NAME|FILE",
        help="inception (downloaded once), or a TorchScript file from somebody you trust.",
    )(command)


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog="Begin with dpdm demo, or with your own folder: dpdm synthesize FOLDER --epsilon 10 --workdir runs/mine. "
    "The same in steps: prepare, train, release, sample, evaluate. Keys such as train.num_epochs=50 go after --; an "
    "unknown one is refused with the nearest known one.",
)
@click.version_option(package_name="dpdm")
def app() -> None:
    """Private synthetic images: train a diffusion model with differential privacy and share what it draws."""


@app.command(short_help="The whole way on bundled real digits, in minutes.")
@click.option("--workdir", type=PATH, default=Path("runs/demo"), show_default=True, metavar="DIR", help="Of the run.")
@click.option("--epsilon", type=float, default=10.0, show_default=True, help="Privacy budget; smaller is more private.")
@click.argument("overrides", nargs=-1, metavar="[-- key=value ...]")
def demo(workdir: Path, epsilon: float, overrides: tuple[str, ...]) -> None:
    """The whole way on 1,797 real 8x8 digits, on a laptop's CPU, in minutes.

    Goes on if it was stopped, and replaces its own finished run.
    """
    from dpdm.synthesize import Request, start_over, synthesize

    run = Workdir(workdir)
    if run.shareable.exists() and (run.private / "request.json").exists():
        start_over(run)
    synthesize(Request("digits", epsilon, delta=1e-5, overrides=overrides), run)
    _finished(run)


@app.command("synthesize", short_help="From your images to a model, synthetic images and a report.")
@click.argument("source")
@click.option("--epsilon", type=float, required=True, help="Privacy budget, 0.001 to 100; smaller is more private.")
@workdir_option
@click.option("--delta", type=float, help="Below 1/N; default: the power of ten at or below min(1e-5, 1/(10 N)).")
@source_options
@groups_option
@click.option("--num-images", type=int, help="Synthetic images; default: as many as real ones, or as groups.")
@click.argument("overrides", nargs=-1, metavar="[-- key=value ...]")
def synthesize_command(
    source: str,
    epsilon: float,
    workdir: Path,
    delta: float | None,
    resolution: str | None,
    transform: "Transform | None",
    groups: str | None,
    num_images: int | None,
    overrides: tuple[str, ...],
) -> None:
    """From sensitive images to a model, synthetic images and a report, in one go; the same command goes on if stopped.

    SOURCE is a folder or zip of images (one folder per class, or CelebA's), a folder of idx files, CIFAR-10's
    cifar-10-python.tar.gz, or one of: digits, mnist, fashion_mnist, cifar10.
    """
    from dpdm.synthesize import Request, synthesize

    request = Request(source, epsilon, delta, _resolution(resolution), transform, num_images, overrides, groups)
    synthesize(request, Workdir(workdir))
    _finished(Workdir(workdir))


@app.command(short_help="Bring images into one archive, to train on.")
@click.argument("source")
@click.argument("dest", type=PATH)
@source_options
@groups_option
@click.option(
    "--split", type=click.Choice(["train", "holdout"]), default="train", help="holdout: the source's own test images."
)
@click.option("--attribute", metavar="NAME", help="Of CelebA's images, to be their class; needs list_attr_celeba.txt.")
def prepare(
    source: str,
    dest: Path,
    resolution: str | None,
    transform: "Transform | None",
    groups: str | None,
    split: Literal["train", "holdout"],
    attribute: str | None,
) -> None:
    """Bring images into one archive, to train on: a zip of PNGs with labels that StyleGAN and EDM tools read as well.

    SOURCE is as for dpdm synthesize; DEST is a new file that ends in .zip. The same command goes on if it was stopped.
    """
    from dpdm.data.prepare import prepare as prepare_archive

    archive = prepare_archive(
        source,
        dest,
        resolution=_resolution(resolution),
        transform=transform,
        split=split,
        attribute=attribute,
        groups=groups,
    )
    classes = f", {archive.num_classes} classes" if archive.num_classes else ""
    shape = f"{archive.num_channels}x{archive.resolution}x{archive.resolution}"
    print(f"{dest}: {archive.num_images} images, {shape}{classes}")
    if archive.groups is not None:
        print(
            f"They are of {archive.num_groups} groups, which dpdm train -- data.unit=group protects. Their number is "
            "public then; the number of images is private.",
            file=sys.stderr,
        )


@app.command(short_help="Noise for a budget, or epsilon for a noise; reads no image.")
@click.option("--dataset-size", type=int, help="N, number of private images, or of persons with data.unit=group.")
@click.option("--batch-size", type=int, help="Expected number of images in a step.")
@click.option("--epochs", type=float, help="Passes over the data.")
@click.option("--iterations", type=int, help="Steps, in place of --epochs.")
@click.option("--delta", type=float, help="Below 1/N; default: the power of ten at or below min(1e-5, 1/(10 N)).")
@click.option("--epsilon", type=float, help="Budget: the noise multiplier is wanted.")
@click.option("--noise-multiplier", type=float, help="Noise: epsilon is wanted.")
@click.option("--warmup-noise-multiplier", type=float, help="Of central images bought from the same budget.")
@click.option("--compose", multiple=True, type=PATH, help="Total of these ledgers and statements, instead; repeat it.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on standard output.")
def account(compose: tuple[Path, ...], as_json: bool, delta: float | None, **numbers: Any) -> None:
    """Noise multiplier for a budget, epsilon for a noise multiplier, or the total of several runs. Reads no image.

    Give --dataset-size, --batch-size, one of --epochs and --iterations, and one of --epsilon and --noise-multiplier;
    or --compose alone, once for each private/ledger.jsonl or release/privacy.json from the same images.
    """
    from dpdm import account as accounts

    result = accounts.compose(compose, delta) if compose else accounts.answer(accounts.Question(delta=delta, **numbers))
    if as_json:
        print(json.dumps(result))
    else:
        for name, value in result.items():
            print(f"{name:17} {value:.6g}" if isinstance(value, float) else f"{name:17} {value}")


@app.command(
    short_help="Settings from public facts or images, or by a charged choice.",
    epilog="Examples: dpdm tune --dataset-size 60000 --resolution 28 --channels 1 --classes 10 --epsilon 1; dpdm tune "
    "mnist --dataset-size 50000 --epsilon 1; dpdm tune digits --epsilon 10 --mean-runs 3 --workdir runs/chosen",
)
@click.argument("words", nargs=-1, metavar="[SOURCE] [-- key=value ...]")
@click.option("--dataset-size", type=int, help="N, number of private images.")
@click.option("--resolution", metavar="WxH", help="Such as 28x28.")
@click.option("--channels", type=int, help="1 (grey) or 3 (RGB).")
@click.option("--classes", type=int, help="Number of classes; 0: none.")
@click.option("--epsilon", type=float, required=True, help="Privacy budget, 0.001 to 100; smaller is more private.")
@click.option("--delta", type=float, help="Below 1/N; default: the power of ten at or below min(1e-5, 1/(10 N)).")
@click.option("--public", is_flag=True, help="Everybody may see the images of SOURCE: choose on them.")
@click.option(
    "--utility",
    type=click.Choice(["accuracy", "frechet"]),
    default="accuracy",
    show_default=True,
    help="By which candidates are compared on public images.",
)
@click.option("--mean-runs", type=float, help="Choose on the private images of SOURCE: runs, on average.")
@click.option(
    "--runs-distribution",
    type=click.Choice(["logarithmic", "geometric", "poisson"]),
    default="logarithmic",
    show_default=True,
    help="Of the secret number of runs.",
)
@click.option("--candidates", type=PATH, metavar="FILE", help="YAML list of lists of key=value to choose from.")
@click.option("--workdir", type=PATH, metavar="DIR", help="Folder of the chosen run, with --mean-runs.")
@click.option("--transform", type=click.Choice(TRANSFORMS), help="As for dpdm synthesize.")
@groups_option
@click.option("--yaml", "yaml_file", type=PATH, metavar="FILE", help="Write the settings there, not to the terminal.")
def tune(
    words: tuple[str, ...],
    dataset_size: int | None,
    resolution: str | None,
    channels: int | None,
    classes: int | None,
    epsilon: float,
    delta: float | None,
    public: bool,
    utility: "Utility",
    mean_runs: float | None,
    runs_distribution: "Distribution",
    candidates: Path | None,
    workdir: Path | None,
    transform: "Transform | None",
    groups: str | None,
    yaml_file: Path | None,
) -> None:
    """Settings for training: a recipe, the best of some candidates on public images, or by a choice that is charged.

    Without SOURCE: the recipe for --dataset-size, --resolution, --channels and --classes, for dpdm train --config. No
    image is read.

    With SOURCE, a data set that is known by name or --public, and --dataset-size: candidates are trained on these
    stand-in images as they would be on that many private ones; the best is written for dpdm train --config.

    With --mean-runs: candidates are trained on the private images of SOURCE, a secret random number of times, and the
    best by a noisy score is kept in DIR, for dpdm release. --epsilon is for all of it.
    """
    from dpdm import tune as tuning

    sources, overrides = [w for w in words if "=" not in w], tuple(w for w in words if "=" in w)
    if len(sources) > 1:
        raise InputError(f"Expected one SOURCE, got {' and '.join(sources)}.")
    listed = None if candidates is None else tuning.read_candidates(candidates)
    if yaml_file is not None:
        tuning.check_new(yaml_file)
    if mean_runs is not None:
        _check_options("with --mean-runs", "mean_runs runs_distribution candidates workdir transform groups resolution")
        from dpdm.privacy.accounting import Repeats
        from dpdm.private_tuning import SelectionRequest, select, summary
        from dpdm.synthesize import Request

        if not sources or workdir is None:
            raise InputError("Expected SOURCE and --workdir with --mean-runs, got not both: give images and a folder.")
        request = Request(sources[0], epsilon, delta, _resolution(resolution), transform, None, overrides, groups)
        wish = SelectionRequest(request, Repeats(mean_runs, runs_distribution), listed)
        print(summary(select(wish, Workdir(workdir))))
        print(f"Next: dpdm release --workdir {workdir}", file=sys.stderr)
        return
    if sources:
        _check_options(
            "with SOURCE and without --mean-runs",
            "dataset_size public utility candidates transform resolution yaml_file",
        )
        if dataset_size is None:
            raise InputError(
                "Expected --dataset-size or --mean-runs with SOURCE, got neither: N of the private images."
            )
        shape = (_resolution(resolution), transform)
        choice = (sources[0], public, dataset_size, epsilon, delta, utility, listed, overrides)
        _write_settings(tuning.choose_on_public(tuning.PublicChoice(*choice, *shape)), yaml_file)
        return
    _check_options("without SOURCE", "dataset_size resolution channels classes yaml_file")
    if overrides:
        raise InputError(
            f"Expected no keys without SOURCE, got {overrides[0]}: change them in the file that is written."
        )
    facts = {"--dataset-size": dataset_size, "--resolution": resolution, "--channels": channels, "--classes": classes}
    given = {name: value for name, value in facts.items() if value is not None}
    if len(given) < len(facts):
        missing = ", ".join(name for name in facts if name not in given)
        raise InputError(f"Expected all of {', '.join(facts)}, got no {missing}: all are public facts of your images.")
    side = _resolution(resolution)
    if not isinstance(side, int):
        raise InputError(f"Expected --resolution of a square, got {resolution}: models draw square images.")
    text = tuning.recommend(tuning.Facts(dataset_size or 0, side, channels or 0, classes or 0, epsilon, delta))
    _write_settings(text, yaml_file)


def _check_options(when: str, takes: str) -> None:
    """Raises InputError if an option was given that means nothing in this way of choosing."""
    context = click.get_current_context()
    for option in context.command.params:
        name = option.name or ""
        given = context.get_parameter_source(name) is ParameterSource.COMMANDLINE
        if given and name not in ("words", "epsilon", "delta", *takes.split()):
            raise InputError(f"Expected no {option.opts[0]} {when}, got it: see dpdm tune --help.")


def _write_settings(text: str, yaml_file: Path | None) -> None:
    from dpdm import tune as tuning

    if yaml_file is None:
        print(text, end="")
    else:
        tuning.write_yaml(text, yaml_file)
        print(f"Next: dpdm train --config {yaml_file} --workdir DIR -- data.path=IMAGES", file=sys.stderr)


@app.command(
    short_help="Train a model with DP-SGD.",
    epilog="Example: dpdm train --workdir runs/mine -- data.path=FOLDER dp.epsilon=10 train.num_epochs=50",
)
@config_options
@workdir_option
@click.option("--resume", is_flag=True, help="Go on with the run in DIR, by its own config unless one is given.")
def train(config: tuple[str, ...], workdir: Path, resume: bool, words: tuple[str, ...]) -> int:
    """Train a model with DP-SGD. Prints its config and what it will spend before it starts; Ctrl-C saves.

    Needed are the keys data.path, one of dp.epsilon and dp.noise_multiplier, and one of train.num_epochs and
    train.num_iterations, from files or after --. On several GPUs: setup.n_gpus_per_node=N after --, or torchrun.
    """
    from dpdm import config as configs
    from dpdm.train import train as train_model

    run = Workdir(workdir)
    files, overrides = _split(config, words)
    if resume and not files and run.ledger.exists():
        configs.check_whole(run.config)
        files = [str(run.config)]
    asked = configs.load(files, overrides)
    if processes := launch.processes_to_start(asked, overrides):
        return launch.start(processes, click.get_current_context().obj)
    _, state = train_model(asked, run, resume=resume)
    if speaks():
        print(f"Trained {state.step} steps. Next: dpdm release --workdir {workdir}", file=sys.stderr)
    return 0


@app.command(
    short_help="Write release/, which may be shared; ends the run.",
    epilog="To convert: dpdm release --from mnist_edm_1.0.pth --config configs/mnist_28/sample_eps_1.0.yaml",
)
@click.option(
    "--workdir", type=PATH, metavar="DIR", help="Folder of the run; with --from: default FILE without suffix."
)
@click.option(
    "--from",
    "source",
    type=PATH,
    metavar="PATH",
    help="Convert this checkpoint of the original, or round this release.",
)
@click.option("--ema", type=float, metavar="RATE", help="Release this one of the averages in model.ema_rates.")
@click.option("--half", is_flag=True, help="Round the weights to float16: half the size, no less privacy.")
@config_options
def release(
    workdir: Path | None,
    source: Path | None,
    ema: float | None,
    half: bool,
    config: tuple[str, ...],
    words: tuple[str, ...],
) -> None:
    """Write release/: weights, config, privacy statement and model card.

    It ends the run: the keys of its randomness are deleted, so it can be neither resumed nor released again.

    With --from and --config it converts a checkpoint of the original DPDM; its statement then gives no guarantee,
    because such a file records nothing from which one could be computed. With --from RELEASE --half --workdir DIR it
    writes a finished release anew, its weights rounded; the statement says so and stays as it is otherwise.
    """
    from dpdm import config as configs
    from dpdm.release import convert, make_release

    files, overrides = _split(config, words)
    if source is None:
        if workdir is None:
            raise InputError("Expected --workdir, got none: give a run's folder, or --from a checkpoint to convert.")
        if files or overrides:
            raise InputError("Expected no --config and no keys without --from: a run is released by its own config.")
        folder = make_release(Workdir(workdir), ema, half=half)
        public = not configs.load([Workdir(workdir).config], quiet=True).dp.enabled
        what = "holds a public model, without any guarantee" if public else "may be shared"
        print(f"{folder} {what}. Next: dpdm sample --workdir {workdir}", file=sys.stderr)
        return
    if ema is not None:
        raise InputError(f"Expected no --ema with --from, got {ema}: only a run keeps several averages.")
    if (source / "privacy.json").is_file():
        from dpdm.half import halve

        if workdir is None or not half or files or overrides:
            raise InputError(
                f"Expected --half, --workdir and nothing else with --from {source}, got others: a release is rounded "
                "to float16 and written to another folder."
            )
        print(f"{halve(source, Workdir(workdir))} may be shared.", file=sys.stderr)
        return
    if not files:
        raise InputError(f"Expected --config, got none: {source} does not say what network it is of.")
    folder = convert(source, configs.load(files, overrides), Workdir(workdir or source.with_suffix("")), half=half)
    print(
        f"{folder} holds the weights of {source}; no guarantee of theirs can be verified, and the statement says so.",
        file=sys.stderr,
    )


@app.command(
    short_help="Draw images from a release.",
    epilog="Example: dpdm sample --workdir OUT -- model.ckpt=runs/mine/release sampler.num_images=100 sampler.seed=1, "
    "or without a model of your own: dpdm sample --pretrained NAME --workdir OUT",
)
@config_options
@pretrained_option
@workdir_option
def sample(config: tuple[str, ...], pretrained: str | None, workdir: Path, words: tuple[str, ...]) -> int:
    """Draw images into samples/ in DIR, from model.ckpt, a pretrained release, or else DIR's own release.

    model.ckpt is a release, or with --config a checkpoint of the original DPDM. On several GPUs:
    setup.n_gpus_per_node=N after --, or torchrun.

    What is drawn from a release costs no privacy, however much it is.
    """
    from dpdm import config as configs
    from dpdm import pretrained as releases
    from dpdm.distributed import together
    from dpdm.generate import check_empty, make_samples
    from dpdm.release import load_denoiser, own_config

    run = Workdir(workdir)
    with together():
        check_folder(run.root)
        check_empty(run.samples)
        files, overrides = _split(config, words)
        asked = configs.load(files, overrides)
        ckpt = Path(asked.model.ckpt) if asked.model.ckpt else run.release
        if pretrained is not None:
            if files or asked.model.ckpt:
                raise InputError(
                    f"Expected no --config and no model.ckpt with --pretrained {pretrained}, got one: it has its own."
                )
            ckpt = releases.folder(pretrained)
        own = own_config(ckpt)
        if own is not None:  # the model's own shape and sampler, the user's wishes on top
            asked = configs.load([own, *files], overrides, quiet=True)
        denoiser = load_denoiser(ckpt, asked if own is not None or files else None)
        archive = run.synthetic if ckpt == run.release and not run.synthetic.exists() else None
    if processes := launch.processes_to_start(asked, overrides):
        return launch.start(processes, click.get_current_context().obj)
    count = make_samples(denoiser, asked, folder=run.samples, archive=archive)
    if speaks():
        print(f"{count} images in {run.samples}", file=sys.stderr)
    return 0


@app.command("fid-stats", short_help="Feature statistics of a data set, for FID; private.")
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
    split: Literal["train", "holdout"],
    extractor: str,
) -> None:
    """Write the mean and covariance of a data set's features to DEST, a new npz file, for dpdm evaluate --fid.

    SOURCE is as for dpdm prepare, or a prepared archive. The file is computed without noise: of private images it is
    as private as they are.
    """
    from dpdm.fidelity import Source, make_statistics

    found = make_statistics(Source(source, split, _resolution(resolution), transform), dest, extractor)
    if speaks():
        print(f"{dest}: {len(found.mu)} features of {found.count} images ({found.extractor})")
        print("Computed without noise: if the images are private, so is this file.", file=sys.stderr)


@app.command(
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
    """Measure a run's synthetic images on real ones and write both report pages. The figures are private.

    With --fid also FID, kernel distance (KID), precision, recall and, where the extractor gives class probabilities,
    the Inception score.
    """
    from dpdm import evaluate as measures
    from dpdm import fidelity

    if samples is None:
        if workdir is None:
            raise InputError("Expected --workdir, got none: give a run's folder, or --fid with --samples.")
        wanted = measures.Classifiers(classifiers, classifier_epochs) if classifiers else None
        fid = measures.Fid(statistics, extractor) if statistics else None
        result = measures.evaluate_run(Workdir(workdir), fid, wanted, real=real, holdout=holdout)
        text = measures.summary
    else:
        if statistics is None:
            raise InputError("Expected --fid with --samples, got none: give a file that dpdm fid-stats wrote.")
        run = Workdir(workdir) if workdir else None
        result = measures.evaluate_samples(samples, measures.Fid(statistics, extractor), run, real=real)
        text = fidelity.summary
    if speaks():
        print(json.dumps(result) if as_json else text(result))


@app.group(subcommand_metavar="step|run", short_help="Attack the code: epsilon is at least so much.")
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

    files, overrides = _split(config, words)
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

    files, overrides = _split(config, words)
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


@app.command(
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
    compared with the training images; what that finds goes to standard error and is private.

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
        _complain(f"{release}: {problem}")
    if not found.problems:
        print(checks.page(found))
    copies = None if against is None else checks.against(release, against, images)
    if copies is not None:
        print("\n".join(describe(copies)), file=sys.stderr)
    if found.problems:
        guaranteed = found.statement["mechanisms"]
        agrees = not (guaranteed or found.is_public)
        what = "gives no verifiable guarantee" if agrees else "does not agree with its own statement"
        raise RunError(f"{release} {what}.")
    if found.is_public and not public:
        raise RunError(f"{release} is a public model: there is no guarantee; add --public if you expect that.")
    if public and not found.is_public:
        raise RunError(f"{release} is a private release and no public model: leave out --public.")
    if copies is not None and copies.copies:
        raise RunError(f"{copies.copies} of the synthetic images are copies of training images: do not share them.")


def main() -> None:
    """Runs the command line and exits."""
    status = run_command(sys.argv[1:])
    if os.environ.get("WORLD_SIZE", "1") != "1":
        # Of several processes one that tidied up its threads would now and then abort with all its work done.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def run_command(arguments: list[str]) -> int:
    """Runs one command; returns its exit status. Every expected failure is one line on standard error."""
    try:
        with launch.group():
            result = app.main(args=arguments, prog_name="dpdm", standalone_mode=False, obj=arguments)
        return result if isinstance(result, int) else 0
    except click.exceptions.NoArgsIsHelpError as error:
        print(error.format_message())
        return 2
    except click.ClickException as error:
        command = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else "dpdm"
        return _fail(f"{error.format_message()} See {command} --help.", 2)
    except InputError as error:
        return _fail(str(error), 2)
    except (click.exceptions.Abort, KeyboardInterrupt):
        if not speaks():
            return 130
        return _fail("Interrupted; what was saved is kept. The same command goes on (dpdm train: add --resume).", 130)
    except PeerError:
        return 1  # the process that failed has said why
    except RunError as error:
        return _fail(str(error), 1)
    except OSError as error:
        if error.errno == errno.ENOMEM:
            return _fail(f"Not enough memory: {MEMORY_REMEDY}. What was saved is kept.", 1)
        full = "; free some space and go on with the same command" if error.errno == errno.ENOSPC else ""
        return _fail(f"Could not access {error.filename or 'a file'}: {error.strerror or error}{full}.", 1)
    except Exception as error:
        if _is_lack_of_memory(error):
            return _fail(f"Not enough memory ({error}): {MEMORY_REMEDY}. What was saved is kept.", 1)
        return _unexpected(error)


def _fail(message: str, status: int) -> int:
    _complain(message)
    return status


def _complain(message: str) -> None:
    """Prints one line that is safe on a terminal, whatever names and values are quoted in it."""
    print(f"dpdm: {clean(message, LONGEST_MESSAGE)}", file=sys.stderr)


def _is_lack_of_memory(error: Exception) -> bool:
    """Whether Python, numpy or torch got no memory; torch has no class of its own for the CPU's."""
    told = ("out of memory", "allocate memory", "Storage size calculation overflowed")
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in told)
    )


def _unexpected(error: Exception) -> int:
    """Reports an error that nobody foresaw; its traceback goes to a file, or with DPDM_DEBUG=1 to the terminal."""
    what = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    if os.environ.get("DPDM_DEBUG") == "1":
        traceback.print_exc()
        return _fail(what, 1)
    where = "the traceback could not be kept; DPDM_DEBUG=1 shows it"
    with suppress(OSError):  # the disk may be full
        with tempfile.NamedTemporaryFile("w", prefix="dpdm-", suffix=".log", delete=False, encoding="utf-8") as file:
            traceback.print_exc(file=file)
        where = f"the traceback is in {file.name}"
    return _fail(f"Unexpected {what}. What was saved is kept; {where}.", 1)


def _finished(run: Workdir) -> None:
    print(
        f"Private report: {run.report}\nTo share:       {run.shareable}, {run.synthetic}, {run.release}/",
        file=sys.stderr,
    )


def _split(config: tuple[str, ...], words: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """Returns config files and overrides: words without ``=`` are further files."""
    for word in words:
        if "=" not in word and not Path(word).exists():
            raise InputError(f"Expected key=value or a config file, got {word!r}: there is no such file.")
    return [*config, *(w for w in words if "=" not in w)], [w for w in words if "=" in w]


def _resolution(resolution: str | None) -> "Resolution | None":
    from dpdm.data.transforms import parse_resolution

    return None if resolution is None else parse_resolution(resolution)
