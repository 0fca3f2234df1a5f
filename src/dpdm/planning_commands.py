"""The commands before a run: account and tune."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from dpdm.errors import InputError
from dpdm.options import PATH, TRANSFORMS, groups_option, resolution_of
from dpdm.workdir import Workdir

if TYPE_CHECKING:
    from dpdm.data.archive import Unit
    from dpdm.data.transforms import Transform
    from dpdm.privacy.accounting import Distribution
    from dpdm.tune import Utility


@click.command(short_help="Noise for a budget, or epsilon for a noise; reads no image.")
@click.option("--dataset-size", type=int, help="N, number of private images, or of persons with data.unit=group.")
@click.option("--batch-size", type=int, help="Expected number of images in a step.")
@click.option("--epochs", type=float, help="Passes over the data.")
@click.option("--iterations", type=int, help="Steps, in place of --epochs.")
@click.option("--delta", type=float, help="Below 1/N; default: the power of ten at or below min(1e-5, 1/(10 N)).")
@click.option("--epsilon", type=float, help="Budget: the noise multiplier is wanted.")
@click.option("--noise-multiplier", type=float, help="Noise: epsilon is wanted.")
@click.option(
    "--warmup-noise-multiplier",
    type=float,
    multiple=True,
    help="Of central images bought from the same budget; again for covariances, and for cells.",
)
@click.option("--compose", multiple=True, type=PATH, help="Total of these ledgers and statements, instead; repeat it.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on standard output.")
def account(compose: tuple[Path, ...], as_json: bool, delta: float | None, **numbers: Any) -> None:
    """Noise multiplier for a budget, epsilon for a noise multiplier, or the total of several runs. Reads no image.

    Give --dataset-size, --batch-size, one of --epochs and --iterations, and one of --epsilon and --noise-multiplier;
    or --compose, with --delta at most, once for each run on the same images: its private/ledger.jsonl or its
    release/privacy.json, not both, and not that of a copy by dpdm release --from beside the release's own.
    """
    from dpdm import account as accounts
    from dpdm.evaluation.guarantee import round_up

    given = [f"--{name.replace('_', '-')}" for name, value in numbers.items() if value not in (None, ())]
    if compose and given:
        raise InputError(f"Expected --compose alone or with --delta, got {given[0]} too: files have their own numbers.")
    result = accounts.compose(compose, delta) if compose else accounts.answer(accounts.Question(delta=delta, **numbers))
    if as_json:
        print(json.dumps(result))
    else:
        for name, value in result.items():
            shown = round_up(value, 6) if name == "epsilon" else f"{value:.6g}" if isinstance(value, float) else value
            print(f"{name:17} {shown}")


@click.command(
    short_help="Settings from public facts or images, or by a charged choice.",
    epilog="Examples: dpdm tune --dataset-size 60000 --resolution 28 --channels 1 --classes 10 --epsilon 1; dpdm tune "
    "mnist --dataset-size 50000 --epsilon 1; dpdm tune digits --epsilon 10 --mean-runs 3 --workdir runs/chosen",
)
@click.argument("words", nargs=-1, metavar="[SOURCE] [-- key=value ...]")
@click.option("--dataset-size", type=int, help="N, number of private images, or with --unit group of persons.")
@click.option(
    "--unit", type=click.Choice(["image", "group"]), default="image", show_default=True, help="What is protected."
)
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
    unit: "Unit",
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
    image is read. With --unit group each person is protected with all of their images (dpdm prepare --groups).

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
        request = Request(sources[0], epsilon, delta, resolution_of(resolution), transform, None, overrides, groups)
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
        shape = (resolution_of(resolution), transform)
        choice = (sources[0], public, dataset_size, epsilon, delta, utility, listed, overrides)
        _write_settings(tuning.choose_on_public(tuning.PublicChoice(*choice, *shape)), yaml_file)
        return
    _check_options("without SOURCE", "dataset_size unit resolution channels classes yaml_file")
    if overrides:
        raise InputError(
            f"Expected no keys without SOURCE, got {overrides[0]}: change them in the file that is written."
        )
    facts = {"--dataset-size": dataset_size, "--resolution": resolution, "--channels": channels, "--classes": classes}
    given = {name: value for name, value in facts.items() if value is not None}
    if len(given) < len(facts):
        missing = ", ".join(name for name in facts if name not in given)
        raise InputError(f"Expected all of {', '.join(facts)}, got no {missing}: all are public facts of your images.")
    side = resolution_of(resolution)
    if not isinstance(side, int):
        raise InputError(f"Expected --resolution of a square, got {resolution}: models draw square images.")
    text = tuning.recommend(tuning.Facts(dataset_size or 0, side, channels or 0, classes or 0, epsilon, delta, unit))
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
