"""Charts: the points stand where the axes say, long curves are averaged, words are escaped."""

import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpdm.evaluation.charts import MAX_POINTS, bin_means, line_chart, nice_ticks, thin


def test_points_stand_where_the_ticks_say() -> None:
    chart = ElementTree.fromstring(
        line_chart(np.array([0.0, 50, 100]), np.array([0.0, 5, 10]), title="t", x_label="step", y_label="y")
    )
    points = [tuple(map(float, p.split(","))) for p in chart.findall("polyline")[0].attrib["points"].split()]
    texts = {t.text: t.attrib for t in chart.findall("text")}
    assert points[2][0] == pytest.approx(float(texts["100"]["x"]), abs=0.1)
    levels = [float(re.findall(r"M\S+ (\S+)H", p.attrib["d"])[0]) for p in chart.findall("path")]
    assert points[0][1] == pytest.approx(max(levels), abs=0.1)
    assert points[2][1] == pytest.approx(min(levels), abs=0.1)
    assert points[1][1] == pytest.approx((max(levels) + min(levels)) / 2, abs=0.1)


def test_words_are_escaped_and_one_point_or_a_flat_line_is_drawn() -> None:
    chart = line_chart(np.array([1.0]), np.array([2.0]), title='<b a="', x_label="<i>", y_label="y", limit=(2.0, "&"))
    assert "<b" not in chart
    assert "<i" not in chart
    assert ElementTree.fromstring(chart).tag == "svg"


@given(low=st.floats(-1e6, 1e6), span=st.floats(1e-6, 1e6))
def test_ticks_are_few_evenly_spaced_and_cover_the_range(low: float, span: float) -> None:
    ticks = nice_ticks(low, low + span)
    assert 2 <= len(ticks) <= 9
    tolerance = 1e-6 * (ticks[1] - ticks[0]) + 1e-9 * abs(low)
    assert ticks[0] <= low + tolerance
    assert ticks[-1] >= low + span - tolerance
    np.testing.assert_allclose(np.diff(ticks), ticks[1] - ticks[0], rtol=1e-3)


def test_long_curves_are_means_of_runs_without_the_missing() -> None:
    values = np.arange(1000, dtype=float)
    values[0] = np.nan
    x, y, size = bin_means(values)
    assert (size, len(x)) == (5, 200)
    assert y[0] == pytest.approx((1 + 2 + 3 + 4) / 4)
    assert (x[1], y[1]) == (8, 7)  # steps 6 to 10 hold the values 5 to 9
    assert len(bin_means(np.full(4, np.nan))[0]) == 0


def test_thinning_keeps_both_ends() -> None:
    x, y = thin(np.arange(5000), np.arange(5000) / 500)
    assert len(x) == MAX_POINTS
    assert (x[0], x[-1], y[-1]) == (0, 4999, 4999 / 500)
