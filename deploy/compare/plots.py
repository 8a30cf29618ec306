"""The pictures of a comparison. Colours are Okabe and Ito's, which colour-blind people can tell apart."""

from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from deploy.compare.cells import BASELINES
from deploy.compare.results import BASE, Row, Spread

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8B6914")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
GREY = "#6b6b6b"
PANEL = (5.2, 4.2)
LABEL_SIZE = 9
Quality = Callable[[Row], Spread | None]


class Pictures:
    """Draws one table; a panel for each partition (and rank, where there are several)."""

    def __init__(self, table: Sequence[Row], metric: str, quality: str) -> None:
        self._metric = metric
        self._quality: Quality = (lambda row: row.central) if quality == "central" else (lambda row: row.on_nodes)
        several = len({row.rank for row in table}) > 1
        self._panels: dict[str, list[Row]] = {}
        for row in table:
            title = f"{row.partition}, rank {row.rank}" if several else row.partition
            self._panels.setdefault(title, []).append(row)
        methods = dict.fromkeys(row.method for row in table if row.method not in (BASE, *BASELINES))
        self._style = {
            method: (COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)])
            for number, method in enumerate(methods)
        }

    def draw(self, folder: Path) -> dict[str, Path]:
        """Write the pictures that the table has figures for; returns the files by what they show."""
        plain = [row for rows in self._panels.values() for row in rows if row.epsilon is None]
        private = [row for rows in self._panels.values() for row in rows if row.epsilon is not None]
        pictures = {
            f"{self._metric.capitalize()} against bytes": ("quality-bytes.png", self._bytes, bool(plain)),
            f"{self._metric.capitalize()} against epsilon": ("quality-epsilon.png", self._epsilon, bool(private)),
            "Convergence over the rounds": ("convergence.png", self._convergence, bool(plain)),
            "Fairness over the nodes": ("fairness.png", self._fairness, any(row.points for row in plain)),
        }
        drawn = {}
        for caption, (name, panel, wanted) in pictures.items():
            if wanted:
                self._figure(panel, folder / name)
                drawn[caption] = folder / name
        return drawn

    def _figure(self, panel: Callable[[Axes, list[Row]], None], file: Path) -> None:
        figure = Figure(figsize=(PANEL[0] * len(self._panels), PANEL[1]), layout="constrained", dpi=150)
        axes = figure.subplots(1, len(self._panels), sharey=True, squeeze=False)[0]
        for axis, (title, rows) in zip(axes, self._panels.items(), strict=True):
            axis.set_title(title, loc="left", fontsize=11)
            axis.spines[["top", "right"]].set_visible(False)
            axis.grid(axis="y", color="#e6e6e6", linewidth=0.8)
            axis.set_axisbelow(True)
            panel(axis, rows)
        if panel != self._fairness:
            axes[0].set_ylabel(self._metric)
        figure.savefig(file)

    def _bytes(self, axis: Axes, rows: list[Row]) -> None:
        labels = []
        for row in rows:
            figure = self._quality(row)
            if row.epsilon is not None or figure is None or row.method not in self._style:
                continue
            colour, marker = self._style[row.method]
            axis.errorbar(row.megabytes, figure.mean, figure.deviation, color=colour, marker=marker, capsize=2)
            labels.append((row.megabytes, figure.mean, row.method, colour))
        axis.set_xscale("log")
        axis.set_xlabel("MB up and down, all nodes and rounds (logarithmic)")
        axis.margins(x=0.25)
        self._references(axis, rows)
        _label(axis, labels)

    def _epsilon(self, axis: Axes, rows: list[Row]) -> None:
        labels = []
        for method, (colour, marker) in self._style.items():
            line = [
                (row.epsilon, figure.mean, figure.deviation)
                for row in rows
                if row.method == method and row.epsilon is not None and (figure := self._quality(row))
            ]
            if line:
                epsilons, means, deviations = zip(*sorted(line), strict=True)
                axis.errorbar(epsilons, means, deviations, color=colour, marker=marker, capsize=2)
                labels.append((epsilons[-1], means[-1], method, colour))
        axis.set_xscale("log")
        axis.set_xlabel("epsilon of each node (logarithmic; smaller is more private)")
        axis.margins(x=0.25)
        self._references(axis, rows)
        _label(axis, labels)

    def _convergence(self, axis: Axes, rows: list[Row]) -> None:
        labels = []
        for row in rows:
            if row.epsilon is not None or not row.history:
                continue
            colour, marker = self._style.get(row.method, (GREY, ""))
            rounds, figures = list(row.history), list(row.history.values())
            style = {"linestyle": "--"} if row.method in BASELINES else {}
            axis.plot(rounds, figures, color=colour, marker=marker, markersize=4, linewidth=1.6, **style)
            labels.append((rounds[-1], figures[-1], row.method, colour))
        axis.set_xlabel("round")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.margins(x=0.02)
        _label(axis, labels, beside=True)

    def _fairness(self, axis: Axes, rows: list[Row]) -> None:
        shown = sorted((row for row in rows if row.epsilon is None and row.points), key=_mean_point)
        for height, row in enumerate(shown):
            colour = self._style.get(row.method, (GREY, ""))[0]
            axis.plot(row.points, [height] * len(row.points), "o", color=colour, alpha=0.35, markersize=5)
            axis.plot([_mean_point(row)] * 2, [height - 0.3, height + 0.3], color=colour, linewidth=2.5)
            axis.annotate(
                row.method,
                (0, height),
                xytext=(-6, 0),
                xycoords=("axes fraction", "data"),
                textcoords="offset points",
                ha="right",
                va="center",
                fontsize=LABEL_SIZE,
                color=colour,
            )
        axis.tick_params(axis="y", left=False, labelleft=False)
        axis.grid(visible=False)
        axis.grid(axis="x", color="#e6e6e6", linewidth=0.8)
        axis.set_xlabel(f"{self._metric} of each node in each run; the bar is their mean")

    def _references(self, axis: Axes, rows: list[Row]) -> None:
        """The base model and the baselines as levels."""
        for row in rows:
            figure = self._quality(row)
            if row.method in (BASE, *BASELINES) and figure is not None:
                axis.axhline(figure.mean, color=GREY, linewidth=1, linestyle="--" if row.method != BASE else ":")
                axis.annotate(
                    row.method,
                    (0, figure.mean),
                    xytext=(3, 2),
                    xycoords=("axes fraction", "data"),
                    textcoords="offset points",
                    fontsize=LABEL_SIZE - 1,
                    color=GREY,
                )


def _mean_point(row: Row) -> float:
    return sum(row.points) / len(row.points)


def _label(axis: Axes, labels: Sequence[tuple[float, float, str, str]], *, beside: bool = False) -> None:
    """Write names to the right of their points, or of the axes, and move those apart that would overlap."""
    figure = axis.get_figure(root=True)
    height = LABEL_SIZE * 1.15 * figure.dpi / 72
    taken: list[Bbox] = []
    for x, y, text, colour in sorted(labels, key=lambda label: label[1]):
        across, up = axis.transData.transform((x, y))
        start = axis.bbox.x1 if beside else across
        width = 0.6 * height * len(text)
        box = Bbox.from_bounds(start, up - height / 2, width, height)
        while any(box.overlaps(other) for other in taken):
            box = box.translated(0, height / 8)
        taken.append(box)
        lift = (box.y0 + height / 2 - up) * 72 / figure.dpi
        axis.annotate(
            text,
            (1, y) if beside else (x, y),
            xycoords=("axes fraction", "data") if beside else "data",
            xytext=(8, lift),
            textcoords="offset points",
            va="center",
            fontsize=LABEL_SIZE,
            color=colour,
        )
