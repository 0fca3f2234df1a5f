"""The commands of the main job: demo, synthesize, prepare, train, release, sample. Thin: each calls one function."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from dpdm import launch
from dpdm.errors import InputError
from dpdm.options import (
    PATH,
    config_options,
    groups_option,
    pretrained_option,
    resolution_of,
    source_options,
    split_words,
    workdir_option,
)
from dpdm.progress import speaks
from dpdm.workdir import Workdir, check_folder

if TYPE_CHECKING:
    from dpdm.data.transforms import Transform


@click.command(short_help="The whole way on bundled real digits, in minutes.")
@click.option("--workdir", type=PATH, default=Path("runs/demo"), show_default=True, metavar="DIR", help="Of the run.")
@click.option("--epsilon", type=float, default=10.0, show_default=True, help="Privacy budget; smaller is more private.")
@click.argument("overrides", nargs=-1, metavar="[-- key=value ...]")
def demo(workdir: Path, epsilon: float, overrides: tuple[str, ...]) -> None:
    """The whole way on 1,797 real 8x8 digits, on a laptop's CPU, in minutes.

    Goes on if it was stopped, and replaces its own finished run.
    """
    from dpdm.synthesize import Request, remove_finished, synthesize

    run, request = Workdir(workdir), Request("digits", epsilon, delta=1e-5, overrides=overrides)
    remove_finished(request.source, run)
    synthesize(request, run)
    _finished(run)


@click.command("synthesize", short_help="From your images to a model, synthetic images and a report.")
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
    grey_bits: int,
    groups: str | None,
    num_images: int | None,
    overrides: tuple[str, ...],
) -> None:
    """From sensitive images to a model, synthetic images and a report, in one go; the same command goes on if stopped.

    SOURCE is a folder or zip of images (one folder per class, or CelebA's), a folder of idx files, CIFAR-10's
    cifar-10-python.tar.gz, or one of: digits, mnist, fashion_mnist, cifar10.
    """
    from dpdm.synthesize import Request, synthesize

    request = Request(
        source, epsilon, delta, resolution_of(resolution), transform, num_images, overrides, groups, grey_bits
    )
    synthesize(request, Workdir(workdir))
    _finished(Workdir(workdir))


@click.command(short_help="Bring images into one archive, to train on.")
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
    grey_bits: int,
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
        resolution=resolution_of(resolution),
        transform=transform,
        grey_bits=grey_bits,
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


@click.command(
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
    files, overrides = split_words(config, words)
    if resume and not files and run.ledger.exists():
        configs.check_whole(run.config)
        files = [str(run.config)]
    if not run.ledger.exists() and any(Path(file).resolve() == run.config.resolve() for file in files):
        raise InputError(
            f"Expected --config outside of --workdir, got {run.config}: the run writes its own file there."
        )
    asked = configs.load_to_train(files, overrides)
    if processes := launch.processes_to_start(asked, overrides):
        return launch.start(processes, click.get_current_context().obj)
    _, state = train_model(asked, run, resume=resume)
    if speaks():
        print(f"Trained {state.step} steps. Next: dpdm release --workdir {workdir}", file=sys.stderr)
    return 0


@click.command(
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
    help="Convert this checkpoint of the original, or write this release anew.",
)
@click.option("--ema", type=float, metavar="RATE", help="Release this one of the averages in model.ema_rates.")
@click.option("--preview", is_flag=True, help="Only draw images from each of the averages, to choose one by.")
@click.option("--half", is_flag=True, help="Round the weights to float16: half the size, no less privacy.")
@click.option(
    "--selection",
    metavar="TEXT",
    help="What was chosen by looking at what, where the config's dp.selection does not say it: added to the statement.",
)
@config_options
def release(
    workdir: Path | None,
    source: Path | None,
    ema: float | None,
    preview: bool,
    half: bool,
    selection: str | None,
    config: tuple[str, ...],
    words: tuple[str, ...],
) -> None:
    """Write release/: weights, config, privacy statement and model card.

    It ends the run: the keys of its randomness are deleted, so it can be neither resumed nor released again. Before,
    --preview shows what each of the averages that the run kept (model.ema_rates) draws, for --ema.

    With --from and --config it converts a checkpoint of the original DPDM; its statement then gives no guarantee,
    because such a file records nothing from which one could be computed. With --from RELEASE --workdir DIR it writes a
    finished release anew: with --half its weights rounded, with --selection its statement saying what was left out.
    """
    from dpdm import config as configs
    from dpdm.release import convert, make_release
    from dpdm.release import preview as draw_previews

    files, overrides = split_words(config, words)
    if source is None:
        if workdir is None:
            raise InputError("Expected --workdir, got none: give a run's folder, or --from a checkpoint to convert.")
        if files or overrides:
            raise InputError("Expected no --config and no keys without --from: a run is released by its own config.")
        if preview:
            if ema is not None or half or selection is not None:
                raise InputError("Expected --preview alone, got --ema, --half or --selection: it releases nothing.")
            for picture in draw_previews(Workdir(workdir)):
                print(f"{picture}: dpdm release --workdir {workdir} --ema {picture.stem}", file=sys.stderr)
            return
        folder = make_release(Workdir(workdir), ema, half=half, selection=selection)
        print(f"{_what_it_is(folder)} Next: dpdm sample --workdir {workdir}", file=sys.stderr)
        return
    if ema is not None or preview:
        given = "--preview" if preview else f"--ema {ema}"
        raise InputError(f"Expected neither --ema nor --preview with --from, got {given}: they are a run's.")
    if (source / "privacy.json").is_file():
        from dpdm.written_anew import write_anew

        if workdir is None or not (half or selection is not None) or files or overrides:
            raise InputError(
                f"Expected --workdir, --half or --selection, and nothing else with --from {source}, got others: a "
                "release is rounded to float16, or says more, in another folder."
            )
        print(_what_it_is(write_anew(source, Workdir(workdir), half=half, selection=selection)), file=sys.stderr)
        return
    if selection is not None:
        raise InputError(f"Expected no --selection with --from {source}, got one: it is for a release's statement.")
    if not files:
        raise InputError(f"Expected --config, got none: {source} does not say what network it is of.")
    folder = convert(source, configs.load(files, overrides), Workdir(workdir or source.with_suffix("")), half=half)
    print(
        f"{folder} holds the weights of {source}; no guarantee of theirs can be verified, and the statement says so.",
        file=sys.stderr,
    )


def _what_it_is(release: Path) -> str:
    """Returns a sentence on what a release that was just written may be used for."""
    from dpdm.release import load_config

    what = "may be shared" if load_config(release).dp.enabled else "holds a public model, without any guarantee"
    return f"{release} {what}."


@click.command(
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

    What is drawn from a release costs no privacy, however much it is. (By sampler.class_weights of your own only if
    they are public: images drawn by the true sizes of private classes tell these.)
    """
    from dpdm import config as configs
    from dpdm import pretrained as releases
    from dpdm.distributed import together
    from dpdm.generate import check_empty, make_samples
    from dpdm.idle_keys import idle_keys, in_words
    from dpdm.release import config_to_draw, load_config, load_denoiser, own_config

    run = Workdir(workdir)
    with together():
        check_folder(run.root)
        check_empty(run.samples)
        files, overrides = split_words(config, words)
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
            asked = config_to_draw(own, files, overrides)
        denoiser = load_denoiser(ckpt, asked if own is not None or files else None)
        archived = run.synthetic.exists()
        archive = run.synthetic if ckpt.resolve() == run.release.resolve() and not archived else None
    if processes := launch.processes_to_start(asked, overrides):
        return launch.start(processes, click.get_current_context().obj)
    count = make_samples(denoiser, asked, folder=run.samples, archive=archive)
    if speaks():
        print(f"{count} images in {run.samples}", file=sys.stderr)
        if idle := {key: why for key, why in idle_keys(asked).items() if key.startswith("sampler.")}:
            print(f"dpdm: {in_words(idle)}", file=sys.stderr)
        weights = asked.sampler.class_weights
        if own is not None and len(set(weights)) > 1 and weights != load_config(own.parent).sampler.class_weights:
            print(
                "dpdm: drawn by sampler.class_weights that are not the release's: if they are from the private images, "
                "these images tell more than the statement promises.",
                file=sys.stderr,
            )
        if archived:
            print(f"{run.synthetic}, which dpdm evaluate measures, keeps the images that it had.", file=sys.stderr)
    return 0


def _finished(run: Workdir) -> None:
    print(
        f"Private report: {run.report}\nTo share:       {run.shareable}, {run.synthetic}, {run.release}/",
        file=sys.stderr,
    )
