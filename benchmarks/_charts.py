"""What the benchmarks put into the pages of docs/: text between a page's marks, and charts as SVG pictures."""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

from dpdm.evaluation.charts import nice_ticks

ROOT = Path(__file__).parent.parent
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 360, 64, 120, 16, 48
Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """Points of one colour, and the line through or beside them.

    Attributes:
        name: written at the last point.
        colour: as SVG has it.
        points: (x, y), drawn as dots.
        line: its corners; None joins the points.
    """

    name: str
    colour: str
    points: Sequence[Point]
    line: Sequence[Point] | None = None


def write_between(page: Path, name: str, content: str) -> None:
    """Puts ``content`` between the lines ``<!-- name: begin -->`` and ``<!-- name: end -->`` of a page.

    Raises:
        SystemExit: if the page does not have them exactly once.
    """
    pattern = re.compile(rf"(<!-- {name}: begin -->\n).*?(<!-- {name}: end -->)", flags=re.DOTALL)
    text, found = pattern.subn(lambda marks: f"{marks[1]}{content}\n{marks[2]}", page.read_text(encoding="utf-8"))
    if found != 1:
        raise SystemExit(f"Expected one place for the table {name} in {page}, found {found}: add its two marks.")
    page.write_text(text, encoding="utf-8")


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a table in Markdown."""
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def picture(charts: Sequence[str], columns: int = 1) -> str:
    """Returns charts as one SVG file, row by row."""
    rows = math.ceil(len(charts) / columns)
    width, height = columns * WIDTH, rows * HEIGHT
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        f'font-size="12" fill="#333" role="img"><rect width="{width}" height="{height}" fill="#fff"/>'
    ]
    for place, chart in enumerate(charts):
        row, column = divmod(place, columns)
        parts.append(f'<g transform="translate({column * WIDTH} {row * HEIGHT})">{chart}</g>' if place else chart)
    return "".join(parts) + "</svg>\n"


def logarithmic_chart(series: Sequence[Series], *, x_label: str, y_label: str, x_ticks: Sequence[float]) -> str:
    """Returns a chart with both axes logarithmic, for ``picture``; all numbers > 0."""
    everything = [point for one in series for point in one.points]
    x_span, y_span = _span(x for x, _ in everything), _span(y for _, y in everything)
    y_ticks = [10.0**e * m for e in range(-8, 2) for m in (1, 2, 5)]
    return _chart(
        [Series(s.name, s.colour, [_log(p) for p in s.points], s.line and [_log(p) for p in s.line]) for s in series],
        (math.log(x_span[0]), math.log(x_span[1])),
        (math.log(y_span[0]), math.log(y_span[1])),
        [(math.log(tick), f"{tick}") for tick in x_ticks if x_span[0] <= tick <= x_span[1]],
        [(math.log(tick), f"{tick:g}") for tick in y_ticks if y_span[0] <= tick <= y_span[1]],
        (x_label, y_label),
    )


def linear_chart(series: Sequence[Series], *, x_label: str, y_label: str) -> str:
    """Returns a chart whose axes begin at 0, for ``picture``; no number < 0."""
    everything = [point for one in series for point in [*one.points, *(one.line or ())]]
    x_ticks, y_ticks = (nice_ticks(0.0, max(values)) for values in zip(*everything, strict=True))
    return _chart(
        series,
        (0.0, x_ticks[-1]),
        (0.0, y_ticks[-1]),
        [(tick, f"{tick:g}") for tick in x_ticks],
        [(tick, f"{tick:.4g}") for tick in y_ticks],
        (x_label, y_label),
    )


def _span(values: Iterable[float]) -> tuple[float, float]:
    known = list(values)
    return min(known), max(known)


def _log(point: Point) -> Point:
    return math.log(point[0]), math.log(point[1])


def _chart(
    series: Sequence[Series],
    x_span: tuple[float, float],
    y_span: tuple[float, float],
    x_ticks: Sequence[tuple[float, str]],
    y_ticks: Sequence[tuple[float, str]],
    labels: tuple[str, str],
) -> str:
    def across(x: float) -> float:
        return LEFT + (x - x_span[0]) / (x_span[1] - x_span[0]) * (WIDTH - RIGHT - LEFT)

    def down(y: float) -> float:
        return HEIGHT - BOTTOM + (y - y_span[0]) / (y_span[1] - y_span[0]) * (TOP - HEIGHT + BOTTOM)

    parts = []
    for tick, words in y_ticks:
        parts.append(f'<path stroke="#ddd" d="M{LEFT} {down(tick):.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{down(tick) + 4:.1f}" text-anchor="end">{words}</text>')
    for tick, words in x_ticks:
        parts.append(f'<text x="{across(tick):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{words}</text>')
    for one in series:
        path = " ".join(f"{across(x):.1f},{down(y):.1f}" for x, y in one.line or one.points)
        parts.append(f'<polyline fill="none" stroke="{one.colour}" stroke-width="2" points="{path}"/>')
        dots = [(across(x), down(y)) for x, y in one.points]
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{one.colour}"/>' for x, y in dots]
        x, y = dots[-1]
        parts.append(f'<text x="{x + 8:.1f}" y="{y + 4:.1f}" fill="{one.colour}">{escape(one.name)}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle:.0f}" y="{HEIGHT - 8}" text-anchor="middle">{escape(labels[0])}</text>')
    turned = f'transform="rotate(-90 14 {HEIGHT / 2:g})"'
    parts.append(f'<text {turned} x="14" y="{HEIGHT / 2:g}" text-anchor="middle">{escape(labels[1])}</text>')
    return "".join(parts)
