"""Charts as inline SVG, one function each. Colours come from CSS classes, so that a page's theme sets them.

Every text goes through `Markup.format`, which escapes it. Each chart has a title and a description for screen readers.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from cordee import units
from eval.measuring import statistics

Point = tuple[float, float]
Stage = Mapping[str, Any]
"""One stage of the pipeline: `stage` (its name) and `seconds`, among others."""
Score = Mapping[str, Any]
"""One checkpoint's score in a task: `model`, `value` and `standard_error`, among others."""
NAME_CHARACTERS = 15
UNITS = ((3600, "h"), (60, "min"), (1, "s"))
"""Of a time axis: seconds and name."""


@dataclass(frozen=True)
class Frame:
    """The plotting area of a chart and the mapping of data to it."""

    left: float
    top: float
    right: float
    bottom: float
    low: Point
    """The data's x and y at the lower left corner."""
    high: Point

    def x(self, value: float) -> float:
        """The horizontal position of a value."""
        return self.left + (value - self.low[0]) / ((self.high[0] - self.low[0]) or 1.0) * (self.right - self.left)

    def y(self, value: float) -> float:
        """The vertical position of a value, from the top down."""
        return self.bottom - (value - self.low[1]) / ((self.high[1] - self.low[1]) or 1.0) * (self.bottom - self.top)


def timeline(identity: str, stages: Sequence[Stage], width: int) -> Markup:
    """One bar per stage, which starts where the one above it ends; time between stages is left out.

    Args:
        identity: the id of the chart, unique on the page.
        stages: in order.
        width: of the chart, in pixels; names and times take 200 of them.
    """
    ends = list(itertools.accumulate(stage["seconds"] for stage in stages))
    size, unit = next(((size, unit) for size, unit in UNITS if ends[-1] >= 2 * size), UNITS[-1])
    frame = Frame(112, 0, width - 88, 30 * len(stages) + 4, (0, 0), (ends[-1], 1))
    body = []
    for mark in ticks(0, ends[-1] / size, width // 120):
        if (x := frame.x(mark * size)) <= frame.right:
            body.append(_line("grid", (x, frame.top), (x, frame.bottom)))
            body.append(_text("tick", (x, frame.bottom + 18), f"{mark:g} {unit}", "middle"))
    for index, (stage, end) in enumerate(zip(stages, ends, strict=True)):
        y, start = 30 * index + 22, frame.x(end - stage["seconds"])
        length = max(frame.x(end) - start, 2)
        bar = Markup('<rect class="bar" x="{:.1f}" y="{}" width="{:.1f}" height="18" rx="2"/>')
        body.append(_text("stage-name", (0, y), shorten(stage["stage"]), "start"))
        body.append(bar.format(start, y - 13, length))
        body.append(_text("stage-time", (start + length + 8, y), units.duration(stage["seconds"]), "start"))
    words = "; ".join(f"{stage['stage']} took {units.duration(stage['seconds'])}" for stage in stages)
    return _svg(identity, (width, frame.bottom + 28), "timeline", "Time per stage", words, body)


def curve(identity: str, title: str, points: Sequence[Point], baseline: tuple[str, float] | None = None) -> Markup:
    """A learning curve over steps: values as a thin line, their moving average as a thick one, the last value as text.

    Args:
        identity: the id of the chart, unique on the page.
        title: the quantity and its unit.
        points: step and value.
        baseline: name and value of a reference line.
    """
    steps, values = [x for x, _ in points], [y for _, y in points]
    marks = ticks(
        min([*values, *([baseline[1]] if baseline else [])]), max([*values, *([baseline[1]] if baseline else [])]), 4
    )
    frame = Frame(46, 16, 448, 208, (steps[0], marks[0]), (steps[-1], marks[-1]))
    body = []
    for mark in marks:
        body.append(_line("grid", (frame.left, frame.y(mark)), (frame.right, frame.y(mark))))
        body.append(_text("tick", (frame.left - 8, frame.y(mark) + 4), f"{mark:g}", "end"))
    body += [
        _text("tick", (frame.x(mark), frame.bottom + 18), f"{mark:,.0f}", "middle")
        for mark in ticks(steps[0], steps[-1], 4)
        if steps[0] <= mark <= steps[-1]
    ]
    body.append(_text("tick", (frame.right, frame.bottom + 36), "step", "end"))
    if baseline:
        body.append(_line("baseline", (frame.left, frame.y(baseline[1])), (frame.right, frame.y(baseline[1]))))
        body.append(
            _text("baseline-name", (frame.right, frame.y(baseline[1]) - 6), f"{baseline[0]} {baseline[1]:.2f}", "end")
        )
    window = len(points) // 20
    strong = statistics.smooth(values, window) if window >= 2 else values
    if window >= 2:
        body.append(_path("raw", [(frame.x(x), frame.y(y)) for x, y in points]))
    body.append(_path("series", [(frame.x(x), frame.y(y)) for x, y in zip(steps, strong, strict=True)]))
    end = (frame.x(steps[-1]), frame.y(strong[-1]))
    body.append(Markup('<circle class="end" cx="{:.1f}" cy="{:.1f}" r="3.5"/>').format(*end))
    body.append(_text("end-value", (end[0] + 8, end[1] + 4), f"{strong[-1]:.2f}", "start"))
    words = f"From {values[0]:.3f} at step {steps[0]:,} to {values[-1]:.3f} at step {steps[-1]:,}."
    if baseline:
        words += f" {baseline[0]}: {baseline[1]:.3f}."
    return _svg(identity, (500, 250), "curve", title, words, body)


def intervals(identity: str, title: str, scores: Sequence[Score], chance: float | None, percent: bool) -> Markup:
    """Values with their 95% intervals, one line per checkpoint, and the value of guessing.

    Args:
        identity: the id of the chart, unique on the page.
        title: the quantity.
        scores: one per checkpoint.
        chance: the value of guessing, if it is known.
        percent: whether values are fractions; intervals are then clipped to 0 and 1.
    """
    values = [(row["model"], row["value"], statistics.Z_95 * (row["standard_error"] or 0.0)) for row in scores]
    least, most = (0.0, 1.0) if percent else (-math.inf, math.inf)
    reach = [(max(value - half, least), min(value + half, most)) for _, value, half in values]
    ends = [end for pair in reach for end in pair] + ([] if chance is None else [chance])
    marks = ticks(min(ends), max(ends), 4)

    def form(value: float) -> str:
        return f"{100 * value:.0f}%" if percent else f"{value:.2f}"

    bottom = 26 + 30 * len(scores)
    frame = Frame(112, 22, 414, bottom, (marks[0], 0), (marks[-1], 1))
    body = []
    for mark in marks:
        body.append(_line("grid", (frame.x(mark), frame.top), (frame.x(mark), bottom)))
        body.append(_text("tick", (frame.x(mark), bottom + 18), form(mark), "middle"))
    if chance is not None:
        body.append(_line("baseline", (frame.x(chance), frame.top - 4), (frame.x(chance), bottom)))
        body.append(_text("baseline-name", (frame.x(chance), frame.top - 9), f"chance {form(chance)}", "middle"))
    for index, ((name, value, half), (low, high)) in enumerate(zip(values, reach, strict=True)):
        y = 42 + 30 * index
        body.append(_text("row-name", (frame.left - 14, y + 4), shorten(name), "end"))
        if half:
            body.append(_line("reach", (frame.x(low), y), (frame.x(high), y)))
        body.append(Markup('<circle class="end" cx="{:.1f}" cy="{:.1f}" r="4.5"/>').format(frame.x(value), y))
    words = "; ".join(
        f"{name} {form(value)}" + (f", 95% interval {form(low)} to {form(high)}" if half else "")
        for (name, value, half), (low, high) in zip(values, reach, strict=True)
    )
    return _svg(identity, (440, bottom + 28), "intervals", title, words, body)


def histogram(identity: str, title: str, counts: Sequence[int], low: float, high: float) -> Markup:
    """How many values are in each of equal parts from `low` to `high`, as bars.

    Args:
        identity: the id of the chart, unique on the page.
        title: the quantity.
        counts: of the values in each part.
        low: the least value.
        high: the largest value.
    """
    marks = ticks(0, max(counts), 3)
    frame = Frame(46, 12, 448, 150, (0, 0), (len(counts), marks[-1]))
    body = []
    for mark in marks:
        body.append(_line("grid", (frame.left, frame.y(mark)), (frame.right, frame.y(mark))))
        body.append(_text("tick", (frame.left - 8, frame.y(mark) + 4), f"{mark:,g}", "end"))
    bar = Markup('<rect class="bar" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"/>')
    for place, count in enumerate(counts):
        width, top = frame.x(1) - frame.x(0) - 2, frame.y(count)
        body.append(bar.format(frame.x(place) + 1, top, width, frame.bottom - top))
    body.append(_text("tick", (frame.left, frame.bottom + 18), f"{low:.3g}", "start"))
    body.append(_text("tick", (frame.right, frame.bottom + 18), f"{high:.3g}", "end"))
    words = f"{sum(counts):,} values from {low:.3g} to {high:.3g}; most in part {counts.index(max(counts)) + 1} of "
    return _svg(identity, (500, 176), "histogram", title, f"{words}{len(counts)}.", body)


def ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers at equal distances; the first is at most `low`, the last at least `high`."""
    span = (high - low) or abs(high) or 1.0
    rough = span / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 10) for index in range(first, max(last, first + 1) + 1)]


def shorten(name: str) -> str:
    """A name cut to `NAME_CHARACTERS`; the table shows it in full."""
    return name if len(name) <= NAME_CHARACTERS else f"{name[: NAME_CHARACTERS - 1]}…"


def _svg(identity: str, size: Point, kind: str, title: str, words: str, body: Sequence[Markup]) -> Markup:
    head = Markup(
        '<svg class="chart {kind}" viewBox="0 0 {width:g} {height:g}" role="img" aria-labelledby="{id}-t {id}-d">'
        '<title id="{id}-t">{title}</title><desc id="{id}-d">{words}</desc>'
    ).format(kind=kind, width=size[0], height=size[1], id=identity, title=title, words=words)
    return head + Markup("").join(body) + Markup("</svg>")


def _text(kind: str, at: Point, text: str, anchor: str) -> Markup:
    form = Markup('<text class="{}" x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>')
    return form.format(kind, *at, anchor, text)


def _line(kind: str, start: Point, end: Point) -> Markup:
    return Markup('<line class="{}" x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}"/>').format(kind, *start, *end)


def _path(kind: str, points: Sequence[Point]) -> Markup:
    return Markup('<path class="{}" d="M{}"/>').format(kind, "L".join(f"{x:.1f} {y:.1f}" for x, y in points))
