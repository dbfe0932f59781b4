"""Charts as inline SVG, one function each. Colours are CSS classes, so that a page's theme decides them.

Every text goes through `Markup.format`, which escapes it. Each chart has a title and a description for readers
who don't see it.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from eval import statistics
from eval.reporting import units

Point = tuple[float, float]
Stage = Mapping[str, Any]
"""One stage of the pipeline: `stage` (its name) and `seconds`, among others."""
Row = Mapping[str, Any]
"""One checkpoint's row: `model`, `value` and `standard_error`, among others."""
NAME_CHARACTERS = 15


@dataclass(frozen=True)
class Frame:
    """The plotting area of a chart, and how data maps into it."""

    left: float
    top: float
    right: float
    bottom: float
    low: Point
    """The data's x and y at the lower left corner."""
    high: Point

    def x(self, value: float) -> float:
        """Where a value lies across."""
        return self.left + (value - self.low[0]) / ((self.high[0] - self.low[0]) or 1.0) * (self.right - self.left)

    def y(self, value: float) -> float:
        """Where a value lies, from the top down."""
        return self.bottom - (value - self.low[1]) / ((self.high[1] - self.low[1]) or 1.0) * (self.bottom - self.top)


def pipeline(identity: str, stages: Sequence[Stage]) -> Markup:
    """The stages as a line up a mountain: one stop each, its height the time that had passed (wide screens).

    Args:
        identity: a name for the chart that no other on the page has.
        stages: in order.
    """
    stops = _stops(stages)
    passed = [math.fsum(seconds for _, seconds in stops[: index + 1]) for index in range(len(stops))]
    frame = Frame(64, 46, 960, 330, (0, 0), (max(1, len(stops) - 1), passed[-1]))
    points = [(frame.x(index), frame.y(height)) for index, height in enumerate(passed)]
    body = [_far_ridges(), _massif(points, frame)]
    for height in ticks(0, passed[-1] / 60, 4) if passed[-1] >= 120 else ticks(0, passed[-1], 4):
        seconds, label = (height * 60, f"{height:g} min") if passed[-1] >= 120 else (height, f"{height:g} s")
        body.append(_line("grid", (frame.left, frame.y(seconds)), (frame.right, frame.y(seconds))))
        body.append(_text("tick", (frame.left - 14, frame.y(seconds) + 4), label, "end"))
    body += _rope(points)
    for (x, y), (name, seconds) in zip(points, stops, strict=True):
        body.append(_stop((x, y)))
        body.append(_text("stop-name", (x - 5, y + 22), shorten(name), "start"))
        body.append(_text("stop-time", (x - 5, y + 37), units.duration(seconds), "start"))
    body.append(_flag(points[-1]))
    return _svg(identity, (1060, 386), "pipeline", "The pipeline", _pipeline_words(stops), body)


def pipeline_tall(identity: str, stages: Sequence[Stage]) -> Markup:
    """The same for narrow screens: the first stage at the foot, the last at the top."""
    stops = _stops(stages)
    step, bottom = 52, 52 * len(stops) + 4
    points = [(52 + 26 * math.sin(1.9 * index), bottom - step * index - 14) for index in range(len(stops))]
    body = _rope(points)
    for (x, y), (name, seconds) in zip(points, stops, strict=True):
        body.append(_stop((x, y)))
        body.append(_text("stop-name", (112, y + 2), name, "start"))
        body.append(_text("stop-time", (112, y + 19), units.duration(seconds), "start"))
    body.append(_flag(points[-1]))
    return _svg(identity, (340, bottom + 16), "pipeline-tall", "The pipeline", _pipeline_words(stops), body)


def _stops(stages: Sequence[Stage]) -> list[tuple[str, float]]:
    """Each stage's name and seconds."""
    return [(stage["stage"], stage["seconds"]) for stage in stages]


def _pipeline_words(stops: Sequence[tuple[str, float]]) -> str:
    return "; ".join(f"{name} took {units.duration(seconds)}" for name, seconds in stops)


def curve(identity: str, title: str, points: Sequence[Point], baseline: tuple[str, float] | None = None) -> Markup:
    """A learning curve over steps: each value thin, their moving mean strong, the last one named.

    Args:
        identity: a name for the chart that no other on the page has.
        title: what is drawn, and its unit.
        points: step and value.
        baseline: a value to compare with, and its name.
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


def intervals(identity: str, title: str, rows: Sequence[Row], chance: float | None, percent: bool) -> Markup:
    """Values with their 95% intervals, one row each, and where chance would lie.

    Args:
        identity: a name for the chart that no other on the page has.
        title: what is drawn.
        rows: one per checkpoint.
        chance: what guessing gives, if it can be said.
        percent: whether values are shares; no interval leaves 0 to 1 then.
    """
    values = [(row["model"], row["value"], statistics.Z_95 * (row["standard_error"] or 0.0)) for row in rows]
    least, most = (0.0, 1.0) if percent else (-math.inf, math.inf)
    reach = [(max(value - half, least), min(value + half, most)) for _, value, half in values]
    ends = [end for pair in reach for end in pair] + ([] if chance is None else [chance])
    marks = ticks(min(ends), max(ends), 4)

    def form(value: float) -> str:
        return f"{100 * value:.0f}%" if percent else f"{value:.2f}"

    bottom = 26 + 30 * len(rows)
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


def ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers at equal steps whose first and last hold the range between them."""
    span = (high - low) or abs(high) or 1.0
    rough = span / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 10) for index in range(first, max(last, first + 1) + 1)]


def shorten(name: str) -> str:
    """A name that fits beside a chart; the table has it whole."""
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


def _rope(points: Sequence[Point]) -> list[Markup]:
    """A line from stop to stop that sags a little, the more the flatter it hangs; drawn twice for its twist."""
    way = f"M{points[0][0]:.1f} {points[0][1]:.1f}"
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        sag = 9 * abs(x1 - x0) / (abs(x1 - x0) + abs(y1 - y0) + 1e-9)
        way += f"Q{(x0 + x1) / 2:.1f} {(y0 + y1) / 2 + sag:.1f} {x1:.1f} {y1:.1f}"
    return [Markup('<path class="{}" d="{}"/>').format(kind, way) for kind in ("line", "line-dash")]


def _stop(at: Point) -> Markup:
    return Markup('<circle class="stop" cx="{:.1f}" cy="{:.1f}" r="5.5"/>').format(*at)


def _flag(at: Point) -> Markup:
    x, y = at
    pole = _line("pole", (x, y - 6), (x, y - 36))
    return pole + Markup('<path class="flag" d="M{:.1f} {:.1f}l17 5.5l-17 5.5z"/>').format(x, y - 36)


def _massif(points: Sequence[Point], frame: Frame) -> Markup:
    """The mountain under the line."""
    ridge = "".join(f"L{x:.1f} {y + 4:.1f}" for x, y in points)
    form = Markup('<path class="massif" d="M0 {:.1f}L0 {:.1f}{}L1060 {:.1f}L1060 {:.1f}z"/>')
    return form.format(frame.bottom + 50, points[0][1] + 12, ridge, points[-1][1] + 60, frame.bottom + 50)


def _far_ridges() -> Markup:
    """Two ranges in the distance; they show nothing."""
    far = (
        "M0 380L0 250L90 205L150 228L260 150L330 190L420 120L500 176L590 98L680 160L770 84L850 140L940 70L1060 128V380z"
    )
    near = "M0 380V300L120 268L210 286L330 226L430 262L560 190L640 236L760 166L860 214L980 150L1060 186V380z"
    return Markup('<path class="ridge-far" d="{}"/><path class="ridge-near" d="{}"/>').format(far, near)
