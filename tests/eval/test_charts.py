import itertools
import re
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from eval.reporting import charts, comparison

CSS = (Path(charts.__file__).parent / "pages" / "report.css").read_text(encoding="utf-8")
HOSTILE = "</text></svg><script>alert(1)</script>\"'&"
SVG = "{http://www.w3.org/2000/svg}"
STAGES = [{"stage": name, "seconds": seconds} for name, seconds in (("corpus", 30.0), ("base", 150.0), ("sft", 60.0))]


def drawn(chart):
    """The chart as XML; it must be well formed. Inline SVG names no namespace."""
    return ET.fromstring(str(chart))  # noqa: S314 - our own text


def circles(chart, kind):
    return [(float(c.get("cx")), float(c.get("cy"))) for c in drawn(chart).iter("circle") if c.get("class") == kind]


def texts(chart, kind):
    return [node.text for node in drawn(chart).iter("text") if node.get("class") == kind]


def number(node, name):
    return float(node.get(name))


@pytest.mark.parametrize("width", [360, 1060])
def test_each_bar_starts_where_the_one_above_it_ends_and_is_as_long_as_its_stage(width):
    chart = charts.timeline("c", STAGES, width)
    bars = list(drawn(chart).iter("rect"))
    for above, below in itertools.pairwise(bars):
        assert number(above, "x") + number(above, "width") == pytest.approx(number(below, "x"), abs=0.2)
        assert number(above, "y") < number(below, "y")
    per_second = number(bars[1], "width") / 150
    assert [number(bar, "width") / per_second for bar in bars] == pytest.approx([30, 150, 60], abs=1)
    assert texts(chart, "stage-name") == ["corpus", "base", "sft"]
    assert texts(chart, "stage-time") == ["30.0 s", "2 min 30 s", "1 min 00 s"]


@pytest.mark.parametrize(("seconds", "last"), [(1.0, "1 s"), (119.0, "100 s"), (240.0, "4 min"), (86_400.0, "20 h")])
def test_the_axis_is_in_the_unit_that_fits(seconds, last):
    assert texts(charts.timeline("c", [{"stage": "base", "seconds": seconds}], 1060), "tick")[-1] == last


def test_a_curve_runs_through_its_points_and_names_its_last_value():
    chart = charts.curve("c", "loss", [(0, 4.0), (10, 3.0), (20, 2.0)], ("entropy", 3.0))
    way = next(node.get("d") for node in drawn(chart).iter("path") if node.get("class") == "series")
    xs, ys = zip(*(map(float, pair.split()) for pair in way[1:].split("L")), strict=True)
    assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1])
    assert ys[1] - ys[0] == pytest.approx(ys[2] - ys[1])
    baseline = next(node for node in drawn(chart).iter("line") if node.get("class") == "baseline")
    assert float(baseline.get("y1")) == pytest.approx(ys[1], abs=0.1)
    assert texts(chart, "end-value") == ["2.00"]
    assert texts(chart, "baseline-name") == ["entropy 3.00"]


def test_only_a_long_curve_is_smoothed():
    short, long = ([(step, float(step % 2)) for step in range(count)] for count in (30, 100))
    kinds = [
        [node.get("class") for node in drawn(charts.curve("c", "t", points)).iter("path")] for points in (short, long)
    ]
    assert kinds == [["series"], ["raw", "series"]]


def test_no_interval_of_a_share_leaves_0_to_100_percent():
    rows = [
        {"model": "base", "value": 0.01, "standard_error": 0.01},
        {"model": "sft", "value": 0.99, "standard_error": 0.01},
    ]
    chart = charts.intervals("c", "t", rows, None, percent=True)
    assert "95% interval 0% to 3%; sft 99%, 95% interval 97% to 100%" in chart
    assert "125%" not in chart
    assert "95% interval -0.01 to 0.03" in charts.intervals("c", "t", rows, None, percent=False)


def test_intervals_reach_as_far_as_the_errors():
    rows = [
        {"model": "a", "value": 0.5, "standard_error": 0.1},
        {"model": "b", "value": 0.9, "standard_error": None},
    ]
    chart = charts.intervals("c", "t", rows, 0.25, percent=True)
    reach = [node for node in drawn(chart).iter("line") if node.get("class") == "reach"]
    (a, _), (b, _) = circles(chart, "end")
    assert len(reach) == 1, "no interval without an error"
    assert float(reach[0].get("x2")) - a == pytest.approx(1.96 * 0.1 / 0.4 * (b - a), rel=0.01)
    assert texts(chart, "baseline-name") == ["chance 25%"]


@pytest.mark.parametrize(
    "chart",
    [
        charts.timeline(HOSTILE, [{"stage": HOSTILE, "seconds": 0.0}], 360),
        charts.curve(HOSTILE, HOSTILE, [(1, 2.0), (2, 2.0)], (HOSTILE, 1.0)),
        charts.intervals("c", HOSTILE, [{"model": HOSTILE, "value": 1.0, "standard_error": 0.0}], None, percent=False),
    ],
    ids=["timeline", "curve", "intervals"],
)
def test_hostile_names_stay_text_and_each_chart_speaks(chart):
    tree = drawn(chart)
    assert not list(tree.iter("script"))
    assert tree.get("role") == "img"
    assert tree.find("title").text
    assert tree.find("desc").text
    assert "nan" not in chart


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (0.6, 0.9), (2.5, 9.1), (-3, 4), (5, 5), (0, 0), (1e-7, 3e-7), (0, 1e6)]
)
def test_ticks_are_round_hold_the_range_and_are_few(low, high):
    marks = charts.ticks(low, high, 4)
    assert marks[0] <= low + 1e-9
    assert marks[-1] >= high - 1e-9
    assert 2 <= len(marks) <= 8
    assert marks == sorted(set(marks))


def theme(block):
    return dict(re.findall(r"--((?:s|on)\d): (#[0-9a-f]{6})", block))


def luminance(colour):
    parts = [int(colour[index : index + 2], 16) / 255 for index in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("part", [0, 1], ids=["light", "dark"])
def test_the_heat_map_is_readable_and_its_shades_go_one_way(part):
    colours = theme(re.findall(r":root \{(.*?)\}", CSS, re.DOTALL)[part])
    levels = [luminance(colours[f"s{shade}"]) for shade in range(comparison.SHADES)]
    assert levels == sorted(levels, reverse=part == 0), "lightness alone orders the shades, for any eye"
    for shade, level in enumerate(levels):
        pair = sorted([level, luminance(colours[f"on{shade}"])])
        assert (pair[1] + 0.05) / (pair[0] + 0.05) >= 4.5, f"shade {shade}: WCAG 2.2, 1.4.3"


@pytest.mark.parametrize(
    ("value", "higher", "expected"), [(0.0, True, 0), (1.0, True, 8), (0.0, False, 8), (1.0, False, 0), (0.5, True, 4)]
)
def test_the_last_shade_is_the_best_value(value, higher, expected):
    assert comparison.shade(value, 0.0, 1.0, higher) == expected
