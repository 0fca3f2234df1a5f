"""The command line: thin, each command calls one function. Nothing heavy is imported before a command needs it.

Exit status: 0 done, 1 failed on the way, 2 wrong usage or config, 130 interrupted.
"""

import errno
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import click

from dpdm.errors import InputError, RunError
from dpdm.privacy import accounting
from dpdm.privacy.accounting import Mechanism
from dpdm.workdir import Workdir

PATH = click.Path(path_type=Path)
Command = Callable[..., None]


def workdir_option(command: Command) -> Command:
    return click.option("--workdir", type=PATH, required=True, help="Folder of the run.")(command)


def config_options(command: Command) -> Command:
    """Adds --config and, after --, overrides; words without = are further files, as the original's habit is."""
    command = click.argument("words", nargs=-1, metavar="[-- key=value ...]")(command)
    return click.option("--config", multiple=True, help="YAML file; further files may follow it.")(command)


def source_options(command: Command) -> Command:
    command = click.option("--transform", type=click.Choice(["center-crop"]), help="For images that are not square.")(
        command
    )
    return click.option("--resolution", help="Such as 32x32; default: the images' own, if they agree.")(command)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="dpdm")
def app() -> None:
    """Private synthetic images: train a diffusion model with differential privacy and share what it draws."""


@app.command()
@click.option("--workdir", type=PATH, default=Path("runs/demo"), show_default=True, help="Folder of the run.")
@click.option("--epsilon", type=float, default=10.0, show_default=True, help="Privacy budget.")
@click.argument("overrides", nargs=-1, metavar="[-- key=value ...]")
def demo(workdir: Path, epsilon: float, overrides: tuple[str, ...]) -> None:
    """The whole way on 1,797 real 8x8 digits, on a laptop's CPU, in minutes; replaces its own finished run."""
    from dpdm.synthesize import Request, start_over, synthesize

    run = Workdir(workdir)
    if run.shareable.exists() and (run.private / "request.json").exists():
        start_over(run)
    synthesize(Request("digits", epsilon, delta=1e-5, overrides=overrides), run)
    _finished(run)


@app.command("synthesize")
@click.argument("source")
@click.option("--epsilon", type=float, required=True, help="Privacy budget; smaller is more private.")
@workdir_option
@click.option("--delta", type=float, help="Default: the power of ten at or below min(1e-5, 1/(10 N)).")
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
    """From sensitive images to a model, synthetic images and a report, in one go; goes on if stopped.

    SOURCE is a folder or zip of images (one folder per class), a folder of idx files, or one of: digits, mnist,
    fashion_mnist.
    """
    from dpdm.synthesize import Request, synthesize

    request = Request(source, epsilon, delta, _side(resolution), transform, num_images, overrides)
    synthesize(request, Workdir(workdir))
    _finished(Workdir(workdir))


@app.command()
@click.argument("source")
@click.argument("dest", type=PATH)
@source_options
@click.option(
    "--split", type=click.Choice(["train", "holdout"]), default="train", help="holdout where the source brings one."
)
def prepare(
    source: str,
    dest: Path,
    resolution: str | None,
    transform: Literal["center-crop"] | None,
    split: Literal["train", "holdout"],
) -> None:
    """Bring images into one archive: a zip of PNGs with labels, readable by StyleGAN and EDM tools."""
    from dpdm.data.prepare import prepare as prepare_archive

    archive = prepare_archive(source, dest, resolution=_side(resolution), transform=transform, split=split)
    classes = f", {archive.num_classes} classes" if archive.num_classes else ""
    shape = f"{archive.num_channels}x{archive.resolution}x{archive.resolution}"
    print(f"{dest}: {archive.num_images} images, {shape}{classes}")


@app.command()
@click.option("--dataset-size", type=int, help="N, number of private images.")
@click.option("--batch-size", type=int, help="Expected batch size.")
@click.option("--epochs", type=float, help="Passes over the data.")
@click.option("--iterations", type=int, help="Steps, in place of --epochs.")
@click.option("--delta", type=float, help="Default: the power of ten at or below min(1e-5, 1/(10 N)).")
@click.option("--epsilon", type=float, help="Budget: the noise multiplier is wanted.")
@click.option("--noise-multiplier", type=float, help="Noise: epsilon is wanted.")
@click.option("--warmup-noise-multiplier", type=float, help="Noise of central images bought beside.")
@click.option("--compose", multiple=True, type=PATH, help="Ledger or statement to total; may be repeated.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on standard output.")
def account(compose: tuple[Path, ...], as_json: bool, delta: float | None, **numbers: Any) -> None:
    """Noise multiplier for a budget, epsilon for a noise multiplier, or the total of several runs. Reads no image."""
    result = _compose(compose, delta) if compose else _account(delta=delta, **numbers)
    if as_json:
        print(json.dumps(result))
    else:
        for name, value in result.items():
            print(f"{name:17} {value:.6g}" if isinstance(value, float) else f"{name:17} {value}")


@app.command()
@config_options
@workdir_option
@click.option("--resume", is_flag=True, help="Go on with the run in the folder.")
def train(config: tuple[str, ...], workdir: Path, resume: bool, words: tuple[str, ...]) -> None:
    """Train a model with DP-SGD. Prints its config and what it will spend before it starts."""
    from dpdm import config as configs
    from dpdm.train import train as train_model

    run = Workdir(workdir)
    files, overrides = _split(config, words)
    if resume and not files and run.config.exists():
        files = [str(run.config)]
    _, state = train_model(configs.load(files, overrides), run, resume=resume)
    print(f"Trained {state.step} steps. Next: dpdm release --workdir {workdir}", file=sys.stderr)


@app.command()
@workdir_option
def release(workdir: Path) -> None:
    """Write release/: weights, config, privacy statement and model card; delete the run's keys."""
    from dpdm.release import make_release

    folder = make_release(Workdir(workdir))
    print(f"{folder} may be shared. Next: dpdm sample --workdir {workdir}", file=sys.stderr)


@app.command()
@config_options
@workdir_option
def sample(config: tuple[str, ...], workdir: Path, words: tuple[str, ...]) -> None:
    """Draw images into samples/, from model.ckpt or the folder's own release."""
    from dpdm import config as configs
    from dpdm.generate import check_empty, draw, write_archive, write_samples
    from dpdm.release import load_denoiser

    run = Workdir(workdir)
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


@app.command()
@workdir_option
@click.option("--real", type=PATH, help="Archive of the training images; default: the run's own.")
@click.option("--holdout", type=PATH, help="Archive of held-out real images; default: the run's own.")
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


@app.command()
@click.argument("release", type=PATH)
def verify(release: Path) -> None:
    """Check a release against its own statement: files, hashes, epsilon. It cannot prove how training was done."""
    from dpdm.release import verify as verify_release

    statement, problems = verify_release(release)
    for problem in problems:
        print(f"dpdm: {release}: {problem}", file=sys.stderr)
    if problems:
        raise RunError(f"{release} does not agree with its own statement.")
    print(
        f"{release} is consistent: epsilon {statement['epsilon']:.4g} at delta {statement['delta']:g}, "
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
        return _fail(f"{error.format_message()} See dpdm --help.", 2)
    except InputError as error:
        return _fail(str(error), 2)
    except (click.exceptions.Abort, KeyboardInterrupt):
        return _fail("Interrupted; what was saved is kept. The same command goes on (dpdm train: add --resume).", 130)
    except RunError as error:
        return _fail(str(error), 1)
    except OSError as error:
        full = "; free some space and go on with the same command" if error.errno == errno.ENOSPC else ""
        return _fail(f"Could not access {error.filename or 'a file'}: {error.strerror or error}{full}.", 1)


def _fail(message: str, status: int) -> int:
    print(f"dpdm: {message}", file=sys.stderr)
    return status


def _finished(run: Workdir) -> None:
    print(
        f"Private report: {run.report}\nTo share:       {run.shareable}, {run.synthetic}, {run.release}/",
        file=sys.stderr,
    )


def _split(config: tuple[str, ...], words: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """Returns config files and overrides: words without ``=`` are further files."""
    return [*config, *(w for w in words if "=" not in w)], [w for w in words if "=" in w]


def _side(resolution: str | None) -> int | None:
    from dpdm.data.transforms import parse_resolution

    return None if resolution is None else parse_resolution(resolution)


def _account(
    *,
    dataset_size: int | None,
    batch_size: int | None,
    epochs: float | None,
    iterations: int | None,
    delta: float | None,
    epsilon: float | None,
    noise_multiplier: float | None,
    warmup_noise_multiplier: float | None,
) -> dict[str, Any]:
    if dataset_size is None or batch_size is None:
        raise InputError("Expected --dataset-size and --batch-size, got not both.")
    if (epochs is None) == (iterations is None):
        raise InputError("Expected one of --epochs and --iterations.")
    if (epsilon is None) == (noise_multiplier is None):
        raise InputError("Expected one of --epsilon and --noise-multiplier.")
    if dataset_size < 1:
        raise InputError(f"Expected --dataset-size >= 1, got {dataset_size}.")
    delta = accounting.default_delta(dataset_size) if delta is None else delta
    warning = accounting.check_delta_for(delta, dataset_size)
    if warning:
        print(f"dpdm: warning: {warning}", file=sys.stderr)
    rate = accounting.sampling_rate(batch_size, dataset_size)
    steps = iterations if iterations is not None else accounting.num_iterations(epochs or 0, dataset_size, batch_size)
    if steps < 1:
        raise InputError(f"Expected at least one step, got {steps}: raise --epochs or --iterations.")
    others = [] if warmup_noise_multiplier is None else [Mechanism("central images", 1.0, warmup_noise_multiplier, 1)]
    if noise_multiplier is None:
        assert epsilon is not None  # exactly one of the two is given
        noise_multiplier = accounting.calibrate_noise_multiplier(epsilon, delta, rate, steps, others=others)
    spent = accounting.epsilon_spent([*others, Mechanism("DP-SGD", rate, noise_multiplier, steps)], delta)
    return {
        "noise_multiplier": noise_multiplier,
        "epsilon": spent,
        "delta": delta,
        "sampling_rate": rate,
        "num_steps": steps,
    }


def _compose(files: tuple[Path, ...], delta: float | None) -> dict[str, Any]:
    from dpdm.privacy.ledger import Ledger

    mechanisms: list[Mechanism] = []
    deltas = [] if delta is None else [delta]
    for file in files:
        if not file.is_file():
            raise InputError(f"Expected a ledger or a statement at {file}, found none.")
        if file.suffix == ".jsonl":
            ledger = Ledger(file)
            mechanisms += ledger.mechanisms()
            deltas.append(ledger.header["plan"]["delta"])
            continue
        try:
            statement = json.loads(file.read_text(encoding="utf-8"))
            mechanisms += [Mechanism(**m) for m in statement["mechanisms"]]
            deltas.append(float(statement["delta"]))
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"Expected a ledger (.jsonl) or a privacy.json in {file}, got {error!r}.") from None
    delta = delta if delta is not None else max(deltas)
    return {"epsilon": accounting.epsilon_spent(mechanisms, delta), "delta": delta, "num_runs": len(files)}
