"""How near the image is that a solver finds with few denoiser evaluations to the one it would find with many.

    python benchmarks/solvers.py --release runs/demo/release

All solvers start from the same noise and labels. The distance is the root mean square over pixels, which run from -1
to 1, to the image by 1,000 steps of Heun's method in float64; one grey level of 255 is 0.0078. The solvers themselves
compute in float32, as in use: what that costs is printed as well.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _charts import ROOT, Series, logarithmic_chart, picture, write_between
from torch import Tensor

from dpdm import load_denoiser
from dpdm.diffusion.denoiser import Denoiser
from dpdm.diffusion.image_noise import PerImageNoise, image_labels
from dpdm.diffusion.sampling import SCHEDULES, SamplerConfig, SamplerType, ddim, dpm_solver_pp, edm
from dpdm.progress import Progress

SOLVERS: dict[SamplerType, Callable[..., Tensor]] = {"ddim": ddim, "edm": edm, "dpm_solver_pp": dpm_solver_pp}
EVALUATIONS = (6, 8, 10, 12, 15, 20, 30, 50, 100)
REFERENCE_STEPS = 1000
Levels = tuple[float | None, float | None]
COLOURS = {"ddim": "#b3541e", "edm": "#5b5b9a", "dpm_solver_pp": "#1a7f5a"}
PAGE = ROOT / "docs" / "samplers.md"


def levels_for(solver: SamplerType, evaluations: int) -> int:
    """Returns the noise levels that at most so many evaluations allow; Heun's method needs 2 n - 1 for n."""
    return (evaluations + 1) // 2 if solver == "edm" else evaluations


def solve(
    denoiser: Denoiser,
    solver: SamplerType,
    num_steps: int,
    start: Tensor,
    labels: Tensor | None,
    schedule: Levels,
) -> Tensor:
    """Returns images (n, C, H, W) in float64, from standard normal ``start``, computed in start's type."""
    sigma_min, rho = schedule
    sigmas = SamplerConfig(type=solver, num_steps=num_steps, sigma_min=sigma_min, rho=rho).sigmas()
    x = start * sigmas[0].item()
    return SOLVERS[solver](denoiser.to(start.dtype), x, sigmas, labels=labels).double()


def distance(first: Tensor, second: Tensor) -> float:
    return (first - second).square().mean().sqrt().item()


def measure(
    release: Path,
    num_images: int,
    *,
    schedule: Levels = (None, None),
    evaluations: tuple[int, ...],
    reference_steps: int,
) -> dict[str, Any]:
    """Returns distances by solver and number of evaluations, and what tells whether the reference can be trusted.

    Args:
        release: folder of the model.
        num_images: to be drawn, with seed 0 and random classes.
        schedule: sigma_min and rho of the solvers, None being each one's own; the reference keeps 0.002 and 7.
        evaluations: at which to measure.
        reference_steps: of Heun's method; DDIM with as many is compared with it.
    """
    denoiser = load_denoiser(release)
    network = denoiser.network
    labels = image_labels(None, 0, range(num_images), network.num_classes)
    shape = (network.num_channels, network.resolution, network.resolution)
    start = PerImageNoise(0, range(num_images), shape, "cpu")()
    with Progress("Solving", 4 + len(SOLVERS) * len(evaluations), unit="solutions") as progress:

        def run(solver: SamplerType, num_steps: int, dtype: torch.dtype, levels: Levels = SCHEDULES["edm"]) -> Tensor:
            images = solve(denoiser, solver, num_steps, start.to(dtype), labels, levels)
            progress.advance()
            return images

        reference = run("edm", reference_steps, torch.float64)
        checks = {
            f"edm, {reference_steps // 2} steps": distance(run("edm", reference_steps // 2, torch.float64), reference),
            f"ddim, {reference_steps} steps": distance(run("ddim", reference_steps, torch.float64), reference),
            f"edm, {reference_steps} steps, float32": distance(run("edm", reference_steps, torch.float32), reference),
        }
        distances: dict[SamplerType, dict[int, float]] = {solver: {} for solver in SOLVERS}
        for solver in SOLVERS:
            for allowed in evaluations:
                num_steps = levels_for(solver, allowed)
                used = 2 * num_steps - 1 if solver == "edm" else num_steps
                distances[solver][used] = distance(run(solver, num_steps, torch.float32, schedule), reference)
    return {
        "images": num_images,
        "schedule": dict(zip(("sigma_min", "rho"), schedule, strict=True)),
        "reference": f"edm, {reference_steps} steps, float64",
        "distance_to_reference": checks,
        "distances": distances,
    }


def table(result: dict[str, Any]) -> str:
    """Returns the distances as a table in Markdown."""
    solvers = list(SOLVERS)
    lines = [f"| evaluations | {' | '.join(f'`{solver}`' for solver in solvers)} |", "|---" * (len(solvers) + 1) + "|"]
    for row in zip(*(result["distances"][solver].items() for solver in solvers), strict=True):
        counts = sorted({count for count, _ in row})
        shown = " or ".join(str(count) for count in counts)
        lines.append(f"| {shown} | {' | '.join(f'{value:.4f}' for _, value in row)} |")
    return "\n".join(lines)


def chart(result: dict[str, Any]) -> str:
    """Returns the distances as an SVG picture with logarithmic axes."""
    series = [Series(name, COLOURS[name], list(values.items())) for name, values in result["distances"].items()]
    labels = {"x_label": "denoiser evaluations per image", "y_label": "RMS distance to 1,000 steps"}
    return picture([logarithmic_chart(series, **labels, x_ticks=(5, 6, 8, 10, 15, 20, 30, 50, 100))])


def write_page(page: Path, result: dict[str, Any]) -> None:
    """Puts the table between the page's two marks and the chart into ``images/solvers.svg`` beside it."""
    write_between(page, "solvers", table(result))
    (page.parent / "images" / "solvers.svg").write_text(chart(result), encoding="utf-8")


def main(arguments: list[str], page: Path = PAGE) -> None:
    parser = argparse.ArgumentParser(description="Distance of each solver to the 1,000-step solution.")
    parser.add_argument("--release", type=Path, required=True, help="folder of the model")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--sigma-min", type=float, help="of all solvers; default: each one's own")
    parser.add_argument("--rho", type=float, help="of all solvers; default: each one's own")
    parser.add_argument("--reference-steps", type=int, default=REFERENCE_STEPS)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    parser.add_argument("--docs", action="store_true", help="also write the table and chart of docs/samplers.md")
    options = parser.parse_args(arguments)
    result = measure(
        options.release,
        options.images,
        schedule=(options.sigma_min, options.rho),
        evaluations=EVALUATIONS,
        reference_steps=options.reference_steps,
    )
    if options.docs:
        write_page(page, result)
    if options.json:
        print(json.dumps(result))
        return
    print(f"Distance to {result['reference']}, {options.images} images:\n\n{table(result)}\n")
    for name, value in result["distance_to_reference"].items():
        print(f"{name}: {value:.2g}")


if __name__ == "__main__":
    main(sys.argv[1:])
