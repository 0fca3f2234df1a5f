"""Line charts as SVG inside a page: in the page's light or dark colours, sharp on a phone."""

import math

import numpy as np
from markupsafe import Markup, escape

WIDTH, HEIGHT = 480, 240
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 14, 44
MAX_POINTS = 240


def bin_means(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """Averages a value per step over runs of equal length, so that a chart has at most 240 points.

    Args:
        values: (S,), one per step; values that are not finite (an empty batch has no loss) are left out.

    Returns:
        The mean step of each run (steps count from 1), its mean value, and the number of steps in a run.
    """
    steps, values = np.arange(1, len(values) + 1, dtype=np.float64), np.asarray(values, dtype=np.float64)
    size = max(1, math.ceil(len(values) / MAX_POINTS))
    means = []
    for start in range(0, len(values), size):
        run = values[start : start + size]
        finite = np.isfinite(run)
        if finite.any():
            means.append((steps[start : start + size].mean(), run[finite].mean()))
    x, y = np.array(means).reshape(-1, 2).T
    return x, y, size


def thin(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Keeps at most 240 points, the first and the last among them, for a quantity that only grows."""
    index = np.unique(np.linspace(0, len(x) - 1, min(len(x), MAX_POINTS)).round().astype(int))
    return np.asarray(x, dtype=np.float64)[index], np.asarray(y, dtype=np.float64)[index]


def line_chart(
    x: np.ndarray,
    y: np.ndarray,
    *,
    title: str,
    x_label: str,
    y_label: str,
    y_range: tuple[float, float] | None = None,
    limit: tuple[float, str] | None = None,
) -> Markup:
    """Draws y over x with axes and a text for screen readers.

    Args:
        x, y: (S,) finite numbers, S >= 1, x ascending.
        title: what the chart shows, read aloud in place of the picture.
        x_label, y_label: words at the axes.
        y_range: lowest and highest y of the chart; None takes them from the values.
        limit: a level drawn as a dashed line, and its name.

    Returns:
        An ``svg`` element; all words in it are escaped.
    """
    low, high = y_range or (float(y.min()), float(y.max()))
    x_ticks, y_ticks = nice_ticks(0.0, float(x[-1])), nice_ticks(low, high)
    x_span, y_span = (0.0, float(x[-1])), (min(low, y_ticks[0]), max(high, y_ticks[-1]))

    def across(value: float) -> float:
        return LEFT + (value - x_span[0]) / (x_span[1] - x_span[0]) * (WIDTH - LEFT - RIGHT)

    def down(value: float) -> float:
        return HEIGHT - BOTTOM - (value - y_span[0]) / (y_span[1] - y_span[0]) * (HEIGHT - TOP - BOTTOM)

    summary = f"{title}: from {y[0]:.4g} at {x_label} {x[0]:g} to {y[-1]:.4g} at {x[-1]:g}."
    parts = [f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(summary)}">']
    for tick in y_ticks:
        parts.append(f'<path class="grid" d="M{LEFT} {down(tick):.1f}H{WIDTH - RIGHT}"/>')
        parts.append(_text(LEFT - 7, down(tick) + 4, f"{tick:.4g}", "end"))
    for tick in (tick for tick in x_ticks if tick <= x_span[1]):
        parts.append(_text(across(tick), HEIGHT - BOTTOM + 18, f"{tick:.6g}", "middle"))
    if limit is not None:
        level, name = limit
        parts.append(f'<path class="limit" d="M{LEFT} {down(level):.1f}H{WIDTH - RIGHT}"/>')
        parts.append(_text(LEFT + 6, down(level) + 15, name, "start"))
    points = " ".join(f"{across(a):.1f},{down(b):.1f}" for a, b in zip(x, y, strict=True))
    parts.append(f'<polyline class="line" points="{points}"/>')
    parts.append(f'<circle class="end" cx="{across(x[-1]):.1f}" cy="{down(y[-1]):.1f}" r="3.5"/>')
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, x_label, "middle"))
    middle = (TOP + HEIGHT - BOTTOM) / 2
    turned = f'transform="rotate(-90 13 {middle:g})" '
    parts.append(_text(13, middle, y_label, "middle", turned))
    return Markup("".join(parts) + "</svg>")


def nice_ticks(low: float, high: float) -> list[float]:
    """Returns four to nine round numbers, the first at or below ``low`` and the last at or above ``high``."""
    if high <= low:
        low, high = low - 0.5, high + 0.5
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def _text(x: float, y: float, words: str, anchor: str, extra: str = "") -> str:
    return f'<text {extra}x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'
