"""What each lever of training does to synthetic digits: the whole way of ``dpdm synthesize``, with and without it.

    python benchmarks/levers.py --epsilon 10 --runs 2 --docs

Every run trains on the same 1,497 digits at the same epsilon with a secret key of its own, so figures differ from run
to run: half the distance between the extremes stands beside the mean. All figures are measured on real digits; to
choose a recipe by them is a use of these digits that no guarantee covers, and every statement says so.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from _charts import ROOT, write_between

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
FIGURES = ("accuracy", "frechet", "variance")


def run(epsilon: float, overrides: Sequence[str], workdir: Path) -> dict[str, float]:
    """Goes the whole way once; returns the private figures: accuracy, Frechet distance, share of the real variance."""
    found = synthesize(Request("digits", epsilon, DELTA, overrides=tuple(overrides)), Workdir(workdir))
    return {
        "accuracy": found["accuracy"]["synthetic"]["value"],
        "frechet": found["frechet"]["synthetic"],
        "variance": found["variance_share"]["synthetic"],
    }


def measure(epsilon: float, names: Sequence[str], runs: int, overrides: Sequence[str]) -> dict[str, Any]:
    """Returns the figures of each run by lever; runs of different levers take turns."""
    results: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for _ in range(runs):
        for name in names:
            with tempfile.TemporaryDirectory() as folder:
                results[name].append(run(epsilon, [*overrides, *LEVERS[name]], Path(folder) / "run"))
            print(f"{name}: {results[name][-1]}", file=sys.stderr, flush=True)
    return {"epsilon": epsilon, "delta": DELTA, "runs": results}


def table(result: Mapping[str, Any]) -> str:
    """Returns means over runs, and half the distance between the extremes, as a table in Markdown."""
    lines = ["| | keys | accuracy | Fréchet distance | variance, share of the real |", "|---|---|---|---|---|"]
    for name, runs in result["runs"].items():
        columns = {figure: [run[figure] for run in runs] for figure in FIGURES}
        shown = [
            _cell([100 * value for value in columns["accuracy"]], " %"),
            _cell(columns["frechet"], ""),
            _cell([100 * value for value in columns["variance"]], " %"),
        ]
        keys = ", ".join(f"`{key}`" for key in LEVERS[name])
        lines.append(f"| {name} | {keys} | {' | '.join(shown)} |")
    return "\n".join(lines)


def _cell(values: Sequence[float], unit: str) -> str:
    half = (max(values) - min(values)) / 2
    return f"{statistics.mean(values):.1f} ± {half:.1f}{unit}"


def main(arguments: Sequence[str], page: Path = PAGE) -> None:
    parser = argparse.ArgumentParser(description="Each lever of training on the digits.")
    parser.add_argument("--epsilon", type=float, default=10.0)
    parser.add_argument("--runs", type=int, default=2, help="of each lever")
    parser.add_argument("--only", nargs="*", metavar="NAME", help="these levers alone; as they are named in the table")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    parser.add_argument("--docs", action="store_true", help="also write the table of docs/levers.md")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="keys for all runs")
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.only or ()) - set(LEVERS))
    if unknown or options.runs < 1:
        parser.error(f"expected --only of {', '.join(LEVERS)} and --runs >= 1, got {unknown or options.runs}")
    result = measure(options.epsilon, options.only or list(LEVERS), options.runs, options.set)
    if options.docs:
        write_between(page, "levers", table(result))
    print(json.dumps(result) if options.json else table(result))


if __name__ == "__main__":
    main(sys.argv[1:])
