"""What each lever of training does to synthetic images: the whole way of ``dpdm synthesize``, with and without it.

    python benchmarks/levers.py --epsilon 10 --runs 1 --docs
    python benchmarks/levers.py --mnist path/to/mnist --epsilon 1 --runs 1 --docs

The first takes scikit-learn's 1,497 digits of 8x8 pixels, the second MNIST's training images, reduced to 7x7, and a
small network and few steps, so that a CPU can do it. Every run has the same epsilon and a secret key of its own, so
figures differ from run to run: half the distance between the extremes stands beside the mean. With --keep a call that
was stopped goes on where it was. All figures are measured on real images; to choose a recipe by them is a use of these
images that no guarantee covers, and every statement says so.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _charts import ROOT, write_between

from dpdm.data.transforms import Resolution
from dpdm.errors import InputError
from dpdm.files import write_json
from dpdm.synthesize import Request, synthesize
from dpdm.workdir import Workdir

PAGE = ROOT / "docs" / "levers.md"
DELTA = 1e-5
COVARIANCES = ("train.warmup.covariance_noise_multiplier=3", "train.warmup.augmentation=0.5")
LEVERS: dict[str, tuple[str, ...]] = {
    "the recipe": (),
    "no warm-up": ("train.warmup.enabled=false",),
    "warm-up with less noise (a third)": ("train.warmup.noise_multiplier=1.6",),
    "warm-up without distortions and blur": (
        "train.warmup.augmentation=0",
        "train.warmup.blur=0",
        "train.warmup.contrast=0",
    ),
    "three means per class": ("train.warmup.means_per_class=3",),
    "central covariances": COVARIANCES,
    "half the batch, as many passes": ("train.expected_batch_size=187",),
    "half the passes": ("train.num_epochs=25",),
    "K = 1": ("loss.noise_multiplicity=1",),
    "K = 8": ("loss.noise_multiplicity=8",),
    "noise levels of the paper (p_mean -1.2)": ("loss.p_mean=-1.2",),
    "noise levels of v": ("loss.type=v",),
    "denoiser v": ("model.denoiser=v",),
    "cosine schedule": ("optim.schedule=cosine",),
    "constant rate": ("optim.schedule=constant",),
    "noise correction (DP-AdamBC)": ("optim.noise_correction=true",),
    "shorter average (0.8)": ("model.ema_rate=0.8",),
    "longer average (0.99)": ("model.ema_rate=0.99",),
    "augmentation inside the example": ("loss.augmentation=0.3",),
    "half the width": ("model.network.width=8",),
    "twice the width": ("model.network.width=32",),
    "guidance 0.5": ("sampler.guidance_scale=0.5",),
    "guidance 1": ("sampler.guidance_scale=1",),
    "ddim, 50 steps": ("sampler.type=ddim", "sampler.num_steps=50"),
}
WITHOUT_CELLS = ("train.warmup.splits=0", "train.warmup.cell_noise_multiplier=null", "train.warmup.covariance_scale=1")
WITHOUT_COVARIANCES = (*WITHOUT_CELLS, "train.warmup.covariance_noise_multiplier=null")
SMALL = (  # for the recipe's large network on a large data set
    "model.network.width=8",
    "model.network.num_res_blocks=1",
    "loss.noise_multiplicity=2",
    "train.expected_batch_size=2000",
    "train.num_epochs=2",
)
LEVERS_OF_MNIST: dict[str, tuple[str, ...]] = {
    "the recipe, small": (),
    "no warm-up": ("train.warmup.enabled=false",),
    "the warm-up alone": ("train.num_epochs=0.05", "optim.learning_rate=1e-9"),
    "central images alone": WITHOUT_COVARIANCES,
    "central images alone, distorted": (
        *WITHOUT_COVARIANCES,
        "train.warmup.augmentation=1",
        "train.warmup.blur=0.09",
        "train.warmup.contrast=0.2",
    ),
    "covariances, distorted by half": ("train.warmup.augmentation=0.5",),
    "a quarter of the warm-up's steps": ("train.warmup.num_iterations=1000",),
    "the same, at the default rate": ("train.warmup.num_iterations=1000", "train.warmup.learning_rate=1e-3"),
    "classes taken as equally large": ("train.warmup.count_weight=0",),
    "half the batch, as many passes": ("train.expected_batch_size=1000",),
    "half the passes": ("train.num_epochs=1",),
    "twice the passes": ("train.num_epochs=4",),
    "K = 1": ("loss.noise_multiplicity=1",),
    "K = 4": ("loss.noise_multiplicity=4",),
    "noise levels of the paper (p_mean -1.2)": ("loss.p_mean=-1.2",),
    "noise levels of v": ("loss.type=v",),
    "half the learning rate": ("optim.learning_rate=1e-3",),
    "clipping norm 0.5": ("dp.max_grad_norm=0.5",),
    "twice the width": ("model.network.width=16",),
    "guidance 0.5": ("sampler.guidance_scale=0.5",),
}
FIGURES = ("accuracy", "frechet", "variance")


@dataclass(frozen=True)
class Ablation:
    """A data set, keys for all of its runs, and what is changed on top.

    Attributes:
        source: of the images.
        levers: keys by the name of what they do.
        table: its name in docs/levers.md.
        resolution: to which images are brought; None: as they are.
        num_images: drawn in each run; None: as many as there are real ones.
        overrides: keys of all runs.
    """

    source: str
    levers: Mapping[str, Sequence[str]]
    table: str
    resolution: Resolution | None = None
    num_images: int | None = None
    overrides: tuple[str, ...] = ()


DIGITS = Ablation("digits", LEVERS, "levers")


def of_mnist(source: str) -> Ablation:
    """Returns the ablation on MNIST's training images at ``source``, reduced."""
    return Ablation(source, LEVERS_OF_MNIST, "levers-mnist", 7, 3000, SMALL)


def run(ablation: Ablation, epsilon: float, overrides: Sequence[str], workdir: Path) -> dict[str, float]:
    """Goes the whole way once; returns the private figures: accuracy, Frechet distance, share of the real variance."""
    found = synthesize(
        Request(
            ablation.source,
            epsilon,
            DELTA,
            resolution=ablation.resolution,
            num_images=ablation.num_images,
            overrides=(*ablation.overrides, *overrides),
        ),
        Workdir(workdir),
    )
    return {
        "accuracy": found["accuracy"]["synthetic"]["value"],
        "frechet": found["frechet"]["synthetic"],
        "variance": found["variance_share"]["synthetic"],
    }


def measure(
    ablation: Ablation,
    epsilon: float,
    names: Sequence[str],
    runs: int,
    overrides: Sequence[str],
    keep: Path | None = None,
) -> dict[str, Any]:
    """Returns the figures of each run by lever; runs of different levers take turns.

    With ``keep`` each is written there as it comes, and what is there is not run again.

    Raises:
        InputError: if ``keep`` holds figures of other keys or another epsilon.
    """
    asked = {"table": ablation.table, "epsilon": epsilon, "delta": DELTA, "keys": [*ablation.overrides, *overrides]}
    by_keys = _kept(keep, asked)
    results = {name: by_keys.setdefault(" ".join(ablation.levers[name]), []) for name in names}
    for count in range(1, runs + 1):
        for name, done in results.items():
            if len(done) >= count:
                continue
            with tempfile.TemporaryDirectory() as folder:
                keys = [*overrides, *ablation.levers[name]]
                done.append(run(ablation, epsilon, keys, Path(folder) / "run"))
            print(f"{name}: {done[-1]}", file=sys.stderr, flush=True)
            if keep is not None:
                write_json(keep, {**asked, "runs": by_keys})
    return {**asked, "runs": {name: done[:runs] for name, done in results.items()}}


def _kept(keep: Path | None, asked: Mapping[str, Any]) -> dict[str, list[dict[str, float]]]:
    if keep is None or not keep.exists():
        return {}
    try:
        content = json.loads(keep.read_text(encoding="utf-8"))
        runs: dict[str, list[dict[str, float]]] = content.pop("runs")
    except (ValueError, LookupError, TypeError, AttributeError):
        raise InputError(f"Expected figures in {keep}, could not read them: remove the file.") from None
    if content != asked:
        raise InputError(f"Expected figures of {dict(asked)} in {keep}, got those of {content}: name another file.")
    return runs


def table(ablation: Ablation, result: Mapping[str, Any]) -> str:
    """Returns means over runs, and half the distance between the extremes, as a table in Markdown."""
    lines = ["| | keys | accuracy | Fréchet distance | variance, share of the real |", "|---|---|---|---|---|"]
    for name, runs in result["runs"].items():
        columns = {figure: [run[figure] for run in runs] for figure in FIGURES}
        shown = [
            _cell([100 * value for value in columns["accuracy"]], " %"),
            _cell(columns["frechet"], ""),
            _cell([100 * value for value in columns["variance"]], " %"),
        ]
        keys = ", ".join(f"`{key}`" for key in ablation.levers[name])
        lines.append(f"| {name} | {keys} | {' | '.join(shown)} |")
    return "\n".join(lines)


def _cell(values: Sequence[float], unit: str) -> str:
    half = f" ± {(max(values) - min(values)) / 2:.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{half}{unit}"


def main(arguments: Sequence[str], page: Path = PAGE) -> None:
    parser = argparse.ArgumentParser(description="Each lever of training, on the digits or on MNIST at 7x7.")
    parser.add_argument("--mnist", metavar="SOURCE", help="MNIST's training images: folder of idx files or archive")
    parser.add_argument("--epsilon", type=float, default=10.0)
    parser.add_argument("--runs", type=int, default=2, help="of each lever")
    parser.add_argument("--only", nargs="*", metavar="NAME", help="these levers alone; as they are named in the table")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    parser.add_argument("--docs", action="store_true", help="also write the table of docs/levers.md")
    parser.add_argument("--keep", type=Path, metavar="FILE", help="keep figures there as they come, go on from them")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="keys for all runs")
    options = parser.parse_args(arguments)
    ablation = DIGITS if options.mnist is None else of_mnist(options.mnist)
    unknown = sorted(set(options.only or ()) - set(ablation.levers))
    if unknown or options.runs < 1:
        parser.error(f"expected --only of {', '.join(ablation.levers)} and --runs >= 1, got {unknown or options.runs}")
    names = options.only or list(ablation.levers)
    result = measure(ablation, options.epsilon, names, options.runs, options.set, options.keep)
    if options.docs:
        write_between(page, ablation.table, table(ablation, result))
    print(json.dumps(result) if options.json else table(ablation, result))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except InputError as error:
        sys.exit(str(error))
