"""Small charts of figures over rounds, as SVG inside a page: they take the page's colours, light and dark."""

import math
from collections.abc import Mapping
from typing import NamedTuple

from common.readable import figure
from server_app.report.page import Html, element

WIDTH, HEIGHT = 360, 190
LEFT, RIGHT, TOP, BOTTOM = 42, 14, 16, 22
SPARK_WIDTH, SPARK_HEIGHT = 84, 22

STYLE = """
.chart { width: 100%; height: auto; display: block; font-size: 11px; font-variant-numeric: tabular-nums; }
.chart text { fill: var(--soft); } .chart .last { fill: var(--ink); font-weight: 600; }
.chart .last { paint-order: stroke; stroke: var(--paper); stroke-width: 4px; stroke-linejoin: round; }
.grid { stroke: var(--line); stroke-width: 1; } .band { fill: var(--accent); opacity: .14; }
.line { fill: none; stroke: var(--accent); stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
.dot { fill: var(--accent); }
.spark { width: 84px; height: 22px; display: block; }
.spark .line { stroke-width: 1.5; }
"""


class Frame(NamedTuple):
    """Where figures stand in a picture."""

    first: float
    last: float
    low: float
    high: float

    def place(self, turn: float, value: float) -> tuple[float, float]:
        """The point of a figure, in the picture's units."""
        across = (turn - self.first) / ((self.last - self.first) or 1)
        up = (value - self.low) / ((self.high - self.low) or 1)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)


def chart(title: str, history: Mapping[int, float], nodes: Mapping[str, Mapping[int, float]] | None = None) -> Html:
    """A line by round, in a band from the least to the most of the ``nodes`` where there are any."""
    ranges = _ranges(nodes or {}, history)
    values = [*history.values(), *(value for pair in ranges.values() for value in pair)]
    marks = ticks(min(values), max(values))
    frame = Frame(min(history), max(history), min(marks[0], min(values)), max(marks[-1], max(values)))
    parts = [_grid(frame, marks), *_rounds(frame)]
    if len(ranges) > 1:
        around = [(turn, high) for turn, (_, high) in ranges.items()]
        around += [(turn, low) for turn, (low, _) in reversed(ranges.items())]
        parts.append(element("polygon", points=_points(frame, around), class_="band"))
    parts.append(element("polyline", points=_points(frame, list(history.items())), class_="line"))
    turn, value = max(history.items())
    x, y = frame.place(turn, value)
    parts.append(element("circle", cx=f"{x:.1f}", cy=f"{y:.1f}", r=3, class_="dot"))
    above = y - 8 if y > TOP + 12 else y + 17
    parts.append(element("text", figure(value), x=f"{x + 6:.1f}", y=f"{above:.1f}", text_anchor="end", class_="last"))
    shown = f"{title}: {figure(history[min(history)])} to {figure(value)}"
    return element("svg", *parts, viewBox=f"0 0 {WIDTH} {HEIGHT}", class_="chart", role="img", aria_label=shown)


def spark(history: Mapping[int, float]) -> Html:
    """A line in a table's cell, without axes."""
    low, span = min(history.values()), (max(history.values()) - min(history.values())) or 1
    first, turns = min(history), (max(history) - min(history)) or 1
    points = [
        (3 + (turn - first) / turns * (SPARK_WIDTH - 6), SPARK_HEIGHT - 3 - (value - low) / span * (SPARK_HEIGHT - 6))
        for turn, value in sorted(history.items())
    ]
    line = element("polyline", points=" ".join(f"{x:.1f},{y:.1f}" for x, y in points), class_="line")
    dot = element("circle", cx=f"{points[-1][0]:.1f}", cy=f"{points[-1][1]:.1f}", r=2, class_="dot")
    shown = f"{figure(history[first])} to {figure(history[max(history)])}"
    size = f"0 0 {SPARK_WIDTH} {SPARK_HEIGHT}"
    return element("svg", line, dot, viewBox=size, class_="spark", role="img", aria_label=shown)


def ticks(low: float, high: float) -> list[float]:
    """Three to six round figures that cover ``low`` to ``high``."""
    span = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / 4))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if span / (power * factor) <= 4.5)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [number * step for number in range(first, max(last, first + 1) + 1)]


def _ranges(nodes: Mapping[str, Mapping[int, float]], history: Mapping[int, float]) -> dict[int, tuple[float, float]]:
    """The least and the most of the nodes, for each round of ``history`` in which there are some."""
    by_round = {turn: [own[turn] for own in nodes.values() if turn in own] for turn in history}
    return {turn: (min(values), max(values)) for turn, values in by_round.items() if values}


def _points(frame: Frame, figures: list[tuple[int, float]]) -> str:
    return " ".join("{:.1f},{:.1f}".format(*frame.place(turn, value)) for turn, value in figures)


def _grid(frame: Frame, marks: list[float]) -> Html:
    """A line and its figure for each mark."""
    lines = []
    for mark in marks:
        y = frame.place(frame.first, mark)[1]
        lines.append(element("line", x1=LEFT, x2=WIDTH - RIGHT, y1=f"{y:.1f}", y2=f"{y:.1f}", class_="grid"))
        lines.append(element("text", f"{mark:.6g}", x=LEFT - 6, y=f"{y + 4:.1f}", text_anchor="end"))
    return element("g", *lines)


def _rounds(frame: Frame) -> list[Html]:
    """The numbers of the rounds along the foot, the last among them; at most seven."""
    first, last = int(frame.first), int(frame.last)
    step = max(1, math.ceil((last - first) / 6))
    return [
        element("text", str(turn), x=f"{frame.place(turn, frame.low)[0]:.1f}", y=HEIGHT - 5, text_anchor="middle")
        for turn in range(last, first - 1, -step)
    ]
