"""The tables of a GPU from what ``benchmarks/gpu.sh`` left there.

    python benchmarks/gpu_report.py benchmarks/results            # prints them
    python benchmarks/gpu_report.py benchmarks/results --docs     # and writes them into docs/performance.md

MNIST at epsilon 1 as published is 300 epochs in Poisson batches of 4,096 expected images of 60,000, 32 draws of each.
Its time is projected from the measured images per second of a private step and the measured time to add a step's noise,
whose numbers are made beside it; reading images, Adam and checkpoints are left out.
"""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

from _charts import ROOT, table, write_between

from dpdm import config as configs

PAGE = ROOT / "docs" / "performance.md"
MNIST = ROOT / "configs" / "mnist_28" / "train_eps_1.0.yaml"
MNIST_IMAGES = 60_000
BUSY = 2000  # images a pass


def read(folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[dict[str, Any]]]:
    """Returns the objects of ``dp_step.jsonl``, ``logical_step.jsonl`` and ``sampling.jsonl``.

    Raises:
        SystemExit: if all are missing or empty.
    """
    steps, wholes, samples = (_lines(folder / f"{name}.jsonl") for name in ("dp_step", "logical_step", "sampling"))
    if not (steps or wholes or samples):
        raise SystemExit(f"Expected figures in {folder / 'dp_step.jsonl'}, got none: run benchmarks/gpu.sh.")
    return steps, wholes, samples


def _lines(path: Path) -> list[dict[str, Any]]:
    """Returns a file's objects; a last line that was cut short is left out."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def fastest(figures: dict[str, Any], what: str) -> float:
    """Returns the seconds of a step in the fastest mode of ``what``, plain or private; infinity if none fitted."""
    times = (value for name, value in figures.items() if name.startswith(what) and name.endswith("_seconds"))
    return min(times, default=math.inf)


def private_images_per_second(figures: dict[str, Any]) -> float:
    """Returns images, draws counted one by one, that the private step's fastest mode takes in a second."""
    return figures["examples"] * figures["draws"] / fastest(figures, "private")


def projection(steps: list[dict[str, Any]]) -> str | None:
    """Returns the time of the published MNIST run in words, by the measured step with the most images per second.

    None without a step that keeps a GPU busy: with few images it waits for its host, which a run of thousands does not.
    """
    rows = (r for r in steps if r["network"] == "mnist_28" and r["draws"] > 1 and r["examples"] * r["draws"] >= BUSY)
    best = max(rows, key=private_images_per_second, default=None)
    if best is None or not private_images_per_second(best):
        return None
    config = configs.load([MNIST], quiet=True)
    epochs, batch, draws = config.train.num_epochs, config.train.expected_batch_size, config.loss.noise_multiplicity
    assert epochs is not None
    step = batch * draws / private_images_per_second(best) + best["noise_added_seconds"]
    minutes = math.floor(epochs * MNIST_IMAGES / batch) * step / 60
    shape = f"{best['examples']} x {best['draws']}"
    return f"MNIST at epsilon 1 as published, projected from the step of {shape}: {minutes:.0f} minutes."


def steps_table(steps: list[dict[str, Any]]) -> str:
    """Returns a row for each network and shape, as Markdown."""
    header = ["network", "examples x draws", "plain, ms", "private, ms", "private / plain", "both at their fastest"]
    header += ["images/s, private", "Opacus hooks float32 / ours", "memory: private / plain", "error"]
    rows = []
    for r in steps:
        hooks = r.get("opacus_hooks_seconds")
        peaks = [r[name] for name in ("private_peak_bytes", "plain_peak_bytes") if name in r]
        memory = peaks[0] / peaks[1] if len(peaks) == 2 else None
        ratio = fastest(r, "private") / fastest(r, "plain")
        cells = [r["network"], f"{r['examples']} x {r['draws']}"]
        cells += [f"{1e3 * r[name]:.1f}" if name in r else "-" for name in ("plain_seconds", "private_seconds")]
        cells += [f"{r['private_ratio']:.2f}" if "private_ratio" in r else "-"]
        cells += [
            f"{ratio:.2f}" + (", compiled" if "plain_compiled_seconds" in r else ""),
            f"{private_images_per_second(r):,.0f}",
        ]
        cells += ["-" if hooks is None else f"{hooks / fastest(r, 'private'):.1f}"]
        cells += ["-" if memory is None else f"{memory:.2f}"]
        cells += [f"{r['relative_error']:.1e}" if "relative_error" in r else "-"]
        rows.append(cells)
    return table(header, rows)


def samples_table(samples: list[dict[str, Any]]) -> str:
    """Returns a row for each network and solver, as Markdown."""
    header = ["network", "solver", "images at once", "precision", "images/s: ours", "diffusers", "ratio"]
    rows = []
    for r in samples:
        for suffix, precision in (("", "float32"), ("_bf16", "bf16")):
            if f"ours{suffix}_seconds" not in r:
                continue
            speeds = [r.get(f"{way}{suffix}_images_per_second") for way in ("ours", "diffusers")]
            cells = [r["network"], f"`{r['solver']}`, {r['num_steps']}", str(r["images"]), precision]
            cells += ["-" if speed is None else f"{speed:.1f}" for speed in speeds]
            cells += [f"{r[f'ratio{suffix}']:.2f}" if f"ratio{suffix}" in r else "-"]
            rows.append(cells)
    return table(header, rows)


def wholes_table(wholes: list[dict[str, Any]]) -> str:
    """Returns a row for each whole step of training, as Markdown."""
    header = ["whole step", "images and noise in the step, ms", "ready beside it, ms", "ratio"]
    header += ["noise / step", "noise ready beside it / step", "waits for the GPU: before", "now"]
    rows = []
    for r in wholes:
        cells = [f"{r['network']}, {r['examples']} x {r['draws']}", f"{1e3 * r['plain_seconds']:.0f}"]
        cells += [f"{1e3 * r['ready_seconds']:.0f}", f"{r['ready_ratio']:.2f}"]
        cells += [f"{100 * r[name]:.1f} %" for name in ("noise_share", "noise_share_ready")]
        waits = [r["plain_waits"], r["ready_waits"]]
        rows.append([*cells, *("-" if number is None else str(number) for number in waits)])
    return table(header, rows)


def report(steps: list[dict[str, Any]], wholes: list[dict[str, Any]], samples: list[dict[str, Any]]) -> str:
    """Returns everything as Markdown."""
    machine = next((r for r in (*steps, *samples, *wholes) if {"device", "torch"} <= r.keys()), None)
    parts = [] if machine is None else [f"Measured on {machine['device']} with torch {machine['torch']}."]
    if steps:
        parts.append(steps_table(steps))
    if said := projection(steps):
        parts.append(said)
    if wholes:
        parts.append(wholes_table(wholes))
    if samples:
        parts.append(samples_table(samples))
    return "\n\n".join(parts)


def main(given: list[str], page: Path = PAGE) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="with dp_step.jsonl and, if there, the others")
    parser.add_argument("--docs", action="store_true", help="also write the tables of docs/performance.md")
    arguments = parser.parse_args(given)
    text = report(*read(arguments.folder))
    if arguments.docs:
        write_between(page, "gpu", text)
    print(text)


if __name__ == "__main__":
    main(sys.argv[1:])
