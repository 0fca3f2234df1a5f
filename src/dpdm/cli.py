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
from pathlib import Path
from typing import Any, Literal

import click

from dpdm.errors import InputError, RunError
from dpdm.workdir import Workdir, check_folder

PATH = click.Path(path_type=Path)
Command = Callable[..., None]


def workdir_option(command: Command) -> Command:
    return click.option("--workdir", type=PATH, required=True, metavar="DIR", help="Folder of the run.")(command)


def config_options(command: Command) -> Command:
    """Adds --config and, after --, overrides; words without = are further files, as the original's habit is."""
    command = click.argument("words", nargs=-1, metavar="[-- key=value ...]")(command)
    return click.option(
        "--config", multiple=True, metavar="FILE", help="YAML file of keys; may be repeated, later files win."
    )(command)


def source_options(command: Command) -> Command:
    command = click.option(
        "--transform", type=click.Choice(["center-crop"]), help="Cut images to their central square."
    )(command)
    return click.option("--resolution", metavar="HxW", help="Such as 32x32; default: the images' own, if they agree.")(
        command
    )


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
@click.option("--num-images", type=int, help="Synthetic images; default: as many as real ones.")
@click.argument("overrides", nargs=-1, metavar="[-- key=value ...]")
def synthesize_command(
    source: str,
    epsilon: float,
    workdir: Path,
    delta: float | None,
    resolution: str | None,
    transform: Literal["center-crop"] | None,
    num_images: int | None,
    overrides: tuple[str, ...],
) -> None:
    """From sensitive images to a model, synthetic images and a report, in one go; the same command goes on if stopped.

    SOURCE is a folder or zip of images (one folder per class), a folder of idx files, or one of: digits, mnist,
    fashion_mnist.
    """
    from dpdm.synthesize import Request, synthesize

    request = Request(source, epsilon, delta, _side(resolution), transform, num_images, overrides)
    synthesize(request, Workdir(workdir))
    _finished(Workdir(workdir))


@app.command(short_help="Bring images into one archive, to train on.")
@click.argument("source")
@click.argument("dest", type=PATH)
@source_options
@click.option(
    "--split", type=click.Choice(["train", "holdout"]), default="train", help="holdout: the source's own test images."
)
def prepare(
    source: str,
    dest: Path,
    resolution: str | None,
    transform: Literal["center-crop"] | None,
    split: Literal["train", "holdout"],
) -> None:
    """Bring images into one archive, to train on: a zip of PNGs with labels that StyleGAN and EDM tools read as well.

    SOURCE is as for dpdm synthesize; DEST is a new file that ends in .zip.
    """
    from dpdm.data.prepare import prepare as prepare_archive

    archive = prepare_archive(source, dest, resolution=_side(resolution), transform=transform, split=split)
    classes = f", {archive.num_classes} classes" if archive.num_classes else ""
    shape = f"{archive.num_channels}x{archive.resolution}x{archive.resolution}"
    print(f"{dest}: {archive.num_images} images, {shape}{classes}")


@app.command(short_help="Noise for a budget, or epsilon for a noise; reads no image.")
@click.option("--dataset-size", type=int, help="N, number of private images.")
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
    short_help="Train a model with DP-SGD.",
    epilog="Example: dpdm train --workdir runs/mine -- data.path=FOLDER dp.epsilon=10 train.num_epochs=50",
)
@config_options
@workdir_option
@click.option("--resume", is_flag=True, help="Go on with the run in DIR, by its own config unless one is given.")
def train(config: tuple[str, ...], workdir: Path, resume: bool, words: tuple[str, ...]) -> None:
    """Train a model with DP-SGD. Prints its config and what it will spend before it starts; Ctrl-C saves.

    Needed are the keys data.path, one of dp.epsilon and dp.noise_multiplier, and one of train.num_epochs and
    train.num_iterations, from files or after --.
    """
    from dpdm import config as configs
    from dpdm.train import train as train_model

    run = Workdir(workdir)
    files, overrides = _split(config, words)
    if resume and not files and run.ledger.exists():
        files = [str(run.config)]
    _, state = train_model(configs.load(files, overrides), run, resume=resume)
    print(f"Trained {state.step} steps. Next: dpdm release --workdir {workdir}", file=sys.stderr)


@app.command(short_help="Write release/, which may be shared; ends the run.")
@workdir_option
def release(workdir: Path) -> None:
    """Write release/: weights, config, privacy statement and model card.

    It ends the run: the keys of its randomness are deleted, so it can be neither resumed nor released again.
    """
    from dpdm.release import make_release

    folder = make_release(Workdir(workdir))
    print(f"{folder} may be shared. Next: dpdm sample --workdir {workdir}", file=sys.stderr)


@app.command(
    short_help="Draw images from a release.",
    epilog="Example: dpdm sample --workdir OUT -- model.ckpt=runs/mine/release sampler.num_images=100 sampler.seed=1",
)
@config_options
@workdir_option
def sample(config: tuple[str, ...], workdir: Path, words: tuple[str, ...]) -> None:
    """Draw images into samples/ in DIR, from model.ckpt (a release) or else from DIR's own release.

    What is drawn from a release costs no privacy, however much it is.
    """
    from dpdm import config as configs
    from dpdm.generate import check_empty, draw, write_archive, write_samples
    from dpdm.release import load_denoiser

    run = Workdir(workdir)
    check_folder(run.root)
    check_empty(run.samples)
    files, overrides = _split(config, words)
    asked = configs.load(files, overrides)
    ckpt = Path(asked.model.ckpt) if asked.model.ckpt else run.release
    own = (ckpt if ckpt.is_dir() else ckpt.parent) / "config.json"
    if own.is_file():  # the model's own shape and sampler, the user's wishes on top
        asked = configs.load([str(own), *files], overrides)
    denoiser = load_denoiser(ckpt, asked if own.is_file() or files else None)
    images, labels = draw(denoiser, asked)
    write_samples(run.samples, images, labels, output=asked.sampler.output)
    if ckpt == run.release and not run.synthetic.exists():
        write_archive(run.synthetic, images, labels)
    print(f"{len(images)} images in {run.samples}", file=sys.stderr)


@app.command(short_help="Measure a run's synthetic images on real ones; private.")
@workdir_option
@click.option("--real", type=PATH, metavar="ZIP", help="Archive of the training images; default: the run's own.")
@click.option("--holdout", type=PATH, metavar="ZIP", help="Archive of held-out real images; default: the run's own.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on standard output.")
def evaluate(workdir: Path, real: Path | None, holdout: Path | None, as_json: bool) -> None:
    """Measure a run's synthetic images on real ones and write both report pages. The figures are private."""
    from dpdm import config as configs
    from dpdm.data.archive import ImageArchive
    from dpdm.evaluate import evaluate as measure
    from dpdm.evaluate import read_synthetic, summary, write_reports
    from dpdm.train import open_archive

    run = Workdir(workdir)
    if not run.config.exists():
        raise InputError(f"Expected a run in {workdir}, found none: check --workdir.")
    config = configs.load([run.config])
    training = ImageArchive(real) if real else open_archive(config, run)
    held_out = holdout or (run.holdout_archive if run.holdout_archive.exists() else None)
    synthetic = read_synthetic(run, config)
    result = measure(run, synthetic, training, ImageArchive(held_out) if held_out else None)
    if run.release.exists() and run.checkpoint.exists():
        write_reports(run, synthetic, training, {})
    print(json.dumps(result) if as_json else summary(result))


@app.command(short_help="Check a release against its own statement.")
@click.argument("release", type=PATH)
def verify(release: Path) -> None:
    """Check a release against its own statement: files, hashes, epsilon. It cannot prove how training was done."""
    from dpdm.evaluation.guarantee import round_up
    from dpdm.release import verify as verify_release

    statement, problems = verify_release(release)
    for problem in problems:
        print(f"dpdm: {release}: {problem}", file=sys.stderr)
    if problems:
        raise RunError(f"{release} does not agree with its own statement.")
    print(
        f"{release} is consistent: epsilon {round_up(statement['epsilon'])} at delta {statement['delta']:g}, "
        f"{statement['adjacency']}. That training followed the statement cannot be proved from here."
    )


def main() -> None:
    """Runs the command line and exits."""
    sys.exit(run_command(sys.argv[1:]))


def run_command(arguments: list[str]) -> int:
    """Runs one command; returns its exit status. Every expected failure is one line on standard error."""
    try:
        result = app.main(args=arguments, prog_name="dpdm", standalone_mode=False)
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
        return _fail("Interrupted; what was saved is kept. The same command goes on (dpdm train: add --resume).", 130)
    except RunError as error:
        return _fail(str(error), 1)
    except OSError as error:
        full = "; free some space and go on with the same command" if error.errno == errno.ENOSPC else ""
        return _fail(f"Could not access {error.filename or 'a file'}: {error.strerror or error}{full}.", 1)
    except Exception as error:
        return _unexpected(error)


def _fail(message: str, status: int) -> int:
    print(f"dpdm: {message}", file=sys.stderr)
    return status


def _unexpected(error: Exception) -> int:
    """Reports an error that nobody foresaw; its traceback goes to a file, or with DPDM_DEBUG=1 to the terminal."""
    what = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    if os.environ.get("DPDM_DEBUG") == "1":
        traceback.print_exc()
        return _fail(what, 1)
    with tempfile.NamedTemporaryFile("w", prefix="dpdm-", suffix=".log", delete=False, encoding="utf-8") as file:
        traceback.print_exc(file=file)
    if isinstance(error, MemoryError) or "out of memory" in what or "allocate memory" in what:
        what += ": lower train.physical_batch_size or sampler.batch_size"
    return _fail(f"Unexpected {what}. What was saved is kept; the traceback is in {file.name}.", 1)


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


def _side(resolution: str | None) -> int | None:
    from dpdm.data.transforms import parse_resolution

    return None if resolution is None else parse_resolution(resolution)
