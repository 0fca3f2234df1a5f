"""What benchmarks/quality.py writes into docs/results.md: tables of all models whose figures are kept, and pictures."""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from _charts import table, write_between

from dpdm.evaluation.guarantee import round_up
from dpdm.generate import grid

NAMES = {
    "quick": "quick: LogReg",
    "logreg": "LogReg",
    "mlp": "MLP",
    "cnn": "CNN",
    "wrn-40-4": "WRN-40-4",
    "frechet": "Fréchet distance, classifier",
    "inception": "Fréchet distance, Inception",
    "copies": "copies",
}
Result = dict[str, Any]


def summary_table(results: Iterable[Result]) -> str:
    """Returns the figures as Markdown, a row for each model."""
    header = ["model", "epsilon, delta", "sampler", *NAMES.values(), "precision, recall"]
    rows = []
    for result in results:
        figures = result["figures"]
        cells = [_value(name, figures[name]) if name in figures else "-" for name in NAMES]
        near = figures.get("inception") or figures.get("frechet")
        both = f"{near['precision']:.3f}, {near['recall']:.3f}" if near else "-"
        rows.append([result["model"], _privacy(result), _sampler(result["sampler"]), *cells, both])
    return table(header, rows)


def figures_table(results: Iterable[Result]) -> str:
    """Returns every figure as Markdown, a row for each, with how it was measured."""
    header = ["model", "figure", "value", "protocol", "samples", "epochs", "time, s", "on"]
    rows = []
    for result in results:
        for name, title in NAMES.items():
            if name not in result["figures"]:
                continue
            figure = result["figures"][name]
            epochs = "-" if figure["epochs"] is None else str(figure["epochs"])
            if "chosen_epoch" in figure:
                epochs += f" (best: {figure['chosen_epoch']})"
            protocol = "; ".join(filter(None, [figure["protocol"], figure.get("note")]))
            where = figure["device"] if figure["device"] != "cpu" else f"CPU, {figure['threads']} threads"
            value = _value(name, figure)
            if "precision" in figure:
                value += f"; precision {figure['precision']:.3f}, recall {figure['recall']:.3f}"
            if name == "copies":
                value += f"; near {figure['near']:,}, of {figure['real_looked_at']:,} real ones {figure['real_near']:,}"
            samples, seconds = f"{figure['samples']:,}", f"{figure['seconds']:.0f}"
            rows.append([result["model"], title, value, protocol, samples, epochs, seconds, where])
    return table(header, rows)


def write_page(page: Path, kept: Path, name: str, images: np.ndarray, labels: np.ndarray) -> None:
    """Writes the tables of all figures in ``kept`` into the page, and a picture of one model's images beside it."""
    pictures = page.parent / "images" / page.stem
    pictures.mkdir(parents=True, exist_ok=True)
    grid(images, labels).save(pictures / f"{name}.png", optimize=True)
    results = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(kept.glob("*.json"))]
    shown = [
        f"![Images drawn from {result['model']}](images/{page.stem}/{result['model']}.png)"
        for result in results
        if (pictures / f"{result['model']}.png").exists()
    ]
    write_between(page, "quality", "\n\n".join([summary_table(results), figures_table(results), *shown]))


def _value(name: str, figure: Result) -> str:
    if name in ("frechet", "inception"):
        return f"{figure['value']:.3g}"
    return f"{figure['value']:,}" if name == "copies" else f"{100 * figure['value']:.1f} %"


def _privacy(result: Result) -> str:
    if result["epsilon"] is None:
        return "none"
    return f"{round_up(result['epsilon'])}, {result['delta']:g}"


def _sampler(sampler: dict[str, Any]) -> str:
    parts = [f"`{sampler['type']}`, {sampler['num_steps']}"]
    if sampler["guidance_scale"]:
        low, high = float(sampler.get("guidance_min", 0)), float(sampler.get("guidance_max", "inf"))
        between = "" if (low, high) == (0.0, math.inf) else f" from {low:g} to {high:g}"
        parts.append(f"guidance {sampler['guidance_scale']:g}{between}")
    if sampler["s_churn"]:
        parts.append(f"churn {sampler['s_churn']:g}")
    if sampler["stochastic"]:
        parts.append("stochastic")
    if sampler.get("augmentation"):
        parts.append(f"augmentation {sampler['augmentation']:g}")
    if "precision" in sampler:
        parts.append(sampler["precision"])
    return ", ".join(parts)
