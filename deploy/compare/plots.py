"""The plots of a comparison. Colours are Okabe and Ito's, which colour-blind people can tell apart."""

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from matplotlib.transforms import Bbox

from deploy.compare.profile import BASELINES
from deploy.compare.results import BASE, Row, Spread

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8B6914")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
GREY = "#6b6b6b"
REFERENCES = (BASE, *BASELINES)

# Inches; the gap holds the names that stand beside a panel.
PANEL, LEFT, GAP, TOP, BOTTOM = (4.6, 3.6), 0.95, 1.3, 0.35, 0.55
DOTS_PER_INCH = 150
FONT = 9


class Label(NamedTuple):
    """A name to be written to the right of a point, or of the panel where ``x`` is None."""

    x: float | None
    y: float
    text: str
    colour: str


Panel = Callable[[Axes, list[Row]], list[Label]]


class Pictures:
    """Draws one table; a panel for each setting."""

    def __init__(self, table: Sequence[Row], metric: str, quality: str) -> None:
        self._metric = metric
        self._central = quality == "central"
        self._panels: dict[str, list[Row]] = {}
        for row in table:
            self._panels.setdefault(row.setting, []).append(row)
        methods = dict.fromkeys(row.method for row in table if row.method not in REFERENCES)
        self._style = {
            method: (COLOURS[number % len(COLOURS)], MARKERS[(number + number // len(COLOURS)) % len(MARKERS)])
            for number, method in enumerate(methods)
        }

    def draw(self, folder: Path) -> dict[str, Path]:
        """Write the pictures that the table has figures for; returns the files by what they show."""
        rows = [row for rows in self._panels.values() for row in rows]
        plain = any(row.epsilon is None and row.method not in REFERENCES for row in rows)
        title = self._metric.capitalize()
        pictures: list[tuple[str, str, Panel, bool]] = [
            (f"{title} against bytes", "quality-bytes.png", self._bytes, plain),
            (f"{title} against epsilon", "quality-epsilon.png", self._epsilon, any(row.epsilon for row in rows)),
            ("Convergence over the rounds", "convergence.png", self._convergence, any(row.history for row in rows)),
            ("Fairness over the nodes", "fairness.png", self._fairness, any(row.points for row in rows)),
        ]
        drawn = {}
        for caption, name, panel, wanted in pictures:
            if wanted:
                self._figure(panel, folder / name)
                drawn[caption] = folder / name
        return drawn

    def _figure(self, panel: Panel, file: Path) -> None:
        count = len(self._panels)
        width, height = LEFT + count * (PANEL[0] + GAP), TOP + PANEL[1] + BOTTOM
        figure = Figure(figsize=(width, height), dpi=DOTS_PER_INCH)
        figure.subplots_adjust(
            left=LEFT / width,
            right=1 - GAP / width,
            top=1 - TOP / height,
            bottom=BOTTOM / height,
            wspace=GAP / PANEL[0],
        )
        axes = figure.subplots(1, count, sharey=panel != self._fairness, squeeze=False)[0]
        labels = []
        for axis, (title, rows) in zip(axes, self._panels.items(), strict=True):
            axis.set_title(title, loc="left", fontsize=11)
            axis.spines[["top", "right"]].set_visible(False)
            axis.grid(axis="x" if panel == self._fairness else "y", color="#e6e6e6", linewidth=0.8)
            axis.set_axisbelow(True)
            labels.append(panel(axis, rows))
        if panel != self._fairness:
            axes[0].set_ylabel(self._metric)
        figure.draw_without_rendering()  # settles the scales, which the labels go by
        for axis, names in zip(axes, labels, strict=True):
            _write(axis, [label for label in names if label.x is not None])
            _write(axis, [label for label in names if label.x is None])
        figure.savefig(file)

    def _quality(self, row: Row) -> Spread | None:
        return row.central if self._central else row.on_nodes

    def _bytes(self, axis: Axes, rows: list[Row]) -> list[Label]:
        # The base model stands far below, and would press the rules together.
        labels = _levels(axis, [(row, self._quality(row)) for row in rows if row.method != BASE])
        for row in rows:
            figure = self._quality(row)
            if row.epsilon is None and figure is not None and row.method in self._style:
                colour, marker = self._style[row.method]
                axis.errorbar(row.megabytes, figure.mean, figure.deviation, color=colour, marker=marker, capsize=2)
                labels.append(Label(row.megabytes, figure.mean, row.method, colour))
        _logarithmic(axis, "MB up and down over all nodes and rounds (log scale)")
        return labels

    def _epsilon(self, axis: Axes, rows: list[Row]) -> list[Label]:
        labels = _levels(axis, [(row, self._quality(row)) for row in rows])
        bounds = sorted({row.epsilon for row in rows if row.epsilon is not None})
        without = 2 * max(bounds, default=1.0)
        for method, (colour, marker) in self._style.items():
            line = sorted(
                (row.epsilon or without, *figure)
                for row in rows
                if row.method == method and (figure := self._quality(row))
            )
            if line:
                epsilons, means, deviations = zip(*line, strict=True)
                axis.errorbar(epsilons, means, deviations, color=colour, marker=marker, capsize=2)
                labels.append(Label(epsilons[-1], means[-1], method, colour))
        _logarithmic(axis, "epsilon of each node (log scale); lower is more private")
        axis.set_xticks([*bounds, without], [*(f"{bound:g}" for bound in bounds), "none"])
        return labels

    def _convergence(self, axis: Axes, rows: list[Row]) -> list[Label]:
        labels = []
        for row in rows:
            if row.epsilon is None and row.history:
                colour, marker = self._style.get(row.method, (GREY, ""))
                line = "--" if row.method in REFERENCES else "-"
                rounds, figures = list(row.history), list(row.history.values())
                axis.plot(rounds, figures, color=colour, marker=marker, markersize=4, linewidth=1.5, linestyle=line)
                labels.append(Label(None, figures[-1], row.method, colour))
        axis.set_xlabel("round")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.margins(x=0.02, y=0.15)
        return labels

    def _fairness(self, axis: Axes, rows: list[Row]) -> list[Label]:
        shown = sorted((row for row in rows if row.epsilon is None and row.points), key=_mean)
        for height, row in enumerate(shown):
            colour = self._style.get(row.method, (GREY, ""))[0]
            axis.plot(row.points, [height] * len(row.points), "o", color=colour, alpha=0.35, markersize=5)
            axis.plot([_mean(row)] * 2, [height - 0.3, height + 0.3], color=colour, linewidth=2.5)
        axis.set_yticks(range(len(shown)), [row.method for row in shown], fontsize=FONT)
        axis.tick_params(axis="y", length=0)
        axis.set_xlabel(f"{self._metric} of each node in each run; the bar is their mean")
        return []


def _levels(axis: Axes, rows: Sequence[tuple[Row, Spread | None]]) -> list[Label]:
    """The base model and the baselines as horizontal lines."""
    labels = []
    for row, figure in rows:
        if row.method in REFERENCES and figure is not None:
            axis.axhline(figure.mean, color=GREY, linewidth=1, linestyle=":" if row.method == BASE else "--")
            labels.append(Label(None, figure.mean, row.method, GREY))
    return labels


def _logarithmic(axis: Axes, title: str) -> None:
    """A logarithmic axis with figures as a person writes them."""
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.margins(x=0.25)
    axis.set_xlabel(title)


def _mean(row: Row) -> float:
    return statistics.fmean(row.points)


def _write(axis: Axes, labels: Sequence[Label]) -> None:
    """Write the names; those that would stand on another move away from the middle, so that their order stays."""
    if not labels:
        return
    point = DOTS_PER_INCH / 72
    height = 1.15 * FONT * point
    taken: list[Bbox] = []
    middle = statistics.median(label.y for label in labels)
    for label in sorted(labels, key=lambda label: abs(label.y - middle)):
        across, up = axis.transData.transform((1 if label.x is None else label.x, label.y))
        box = Bbox.from_bounds(across, up - height / 2, 0.6 * height * len(label.text), height)
        while any(box.overlaps(other) for other in taken):
            box = box.translated(0, height / 8 if label.y >= middle else -height / 8)
        taken.append(box)
        axis.annotate(
            label.text,
            (1 if label.x is None else label.x, label.y),
            xycoords=("axes fraction", "data") if label.x is None else "data",
            xytext=(7, (box.y0 + height / 2 - up) / point),
            textcoords="offset points",
            va="center",
            fontsize=FONT,
            color=label.colour,
            annotation_clip=False,
        )
