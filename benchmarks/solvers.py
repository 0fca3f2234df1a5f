"""How near the image is that a solver finds with few denoiser evaluations to the one it would find with many.

    python benchmarks/solvers.py --release runs/demo/release

All solvers start from the same noise and labels. The distance is the root mean square over pixels, which run from -1
to 1, to the image by 1,000 steps of Heun's method in float64; one grey level of 255 is 0.0078. The solvers themselves
compute in float32, as in use: what that costs is printed as well.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
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
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 360, 64, 120, 16, 48
PAGE = Path(__file__).parent.parent / "docs" / "samplers.md"


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
    points = {solver: list(values.items()) for solver, values in result["distances"].items()}
    everything = [point for line in points.values() for point in line]
    x_low, x_high = (pick(x for x, _ in everything) for pick in (min, max))
    y_low, y_high = (pick(y for _, y in everything) for pick in (min, max))

    def place(value: float, low: float, high: float, first: float, last: float) -> float:
        position = torch.tensor([value, low, high], dtype=torch.float64).log()
        return first + ((position[0] - position[1]) / (position[2] - position[1])).item() * (last - first)

    def across(x: float) -> float:
        return place(x, x_low, x_high, LEFT, WIDTH - RIGHT)

    def down(y: float) -> float:
        return place(y, y_low, y_high, HEIGHT - BOTTOM, TOP)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        f'font-size="12" fill="#333" role="img"><rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>'
    ]
    for tick in (10.0**e * m for e in range(-8, 2) for m in (1, 2, 5)):
        if y_low <= tick <= y_high:
            parts.append(f'<path stroke="#ddd" d="M{LEFT} {down(tick):.1f}H{WIDTH - RIGHT}"/>')
            parts.append(f'<text x="{LEFT - 6}" y="{down(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for tick in (5, 6, 8, 10, 15, 20, 30, 50, 100):
        if x_low <= tick <= x_high:
            parts.append(f'<text x="{across(tick):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{tick}</text>')
    for solver, line in points.items():
        path = " ".join(f"{across(x):.1f},{down(y):.1f}" for x, y in line)
        parts.append(f'<polyline fill="none" stroke="{COLOURS[solver]}" stroke-width="2" points="{path}"/>')
        parts += [f'<circle cx="{across(x):.1f}" cy="{down(y):.1f}" r="3" fill="{COLOURS[solver]}"/>' for x, y in line]
        x, y = line[-1]
        parts.append(f'<text x="{across(x) + 8:.1f}" y="{down(y) + 4:.1f}" fill="{COLOURS[solver]}">{solver}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle:.0f}" y="{HEIGHT - 8}" text-anchor="middle">denoiser evaluations per image</text>')
    turned = f'transform="rotate(-90 14 {HEIGHT / 2:g})"'
    parts.append(f'<text {turned} x="14" y="{HEIGHT / 2:g}" text-anchor="middle">RMS distance to 1,000 steps</text>')
    return "".join(parts) + "</svg>\n"


def write_page(page: Path, result: dict[str, Any]) -> None:
    """Puts the table between the page's two marks and the chart into ``images/solvers.svg`` beside it."""
    pattern = re.compile(r"(<!-- solvers: begin -->\n).*?(<!-- solvers: end -->)", flags=re.DOTALL)
    text, found = pattern.subn(lambda marks: f"{marks[1]}{table(result)}\n{marks[2]}", page.read_text(encoding="utf-8"))
    if found != 1:
        raise SystemExit(f"Expected one place for the table in {page}, found {found}.")
    page.write_text(text, encoding="utf-8")
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
