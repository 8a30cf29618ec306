"""The rows of a comparison as CSV and as Markdown."""

import csv
from collections.abc import Sequence
from pathlib import Path

from common.tasks import TASKS
from deploy.compare.results import Result, Row, Spread

RAW = (
    *("method", "partition", "rank", "privacy", "epsilon", "seeds"),
    *("heldout_mean", "heldout_deviation", "central_mean", "central_deviation", "further_mean", "further_deviation"),
    *("fairness", "worst_node", "bytes_up", "bytes_down", "train_seconds"),
)


def write_csv(file: Path, table: Sequence[Row]) -> None:
    """Every row, unrounded; what was not measured is empty."""
    with file.open("w", newline="") as opened:
        writer = csv.writer(opened)
        writer.writerow(RAW)
        for row in table:
            facts = (row.method, row.partition, row.rank, row.privacy, row.epsilon, row.seeds)
            spreads = [
                figure for spread in (row.on_nodes, row.central, row.further) for figure in spread or (None, None)
            ]
            writer.writerow([*facts, *spreads, row.fairness, row.worst, row.bytes_up, row.bytes_down, row.seconds])


def write_rounds(file: Path, results: Sequence[Result]) -> None:
    """One line a run and round, for figures of one's own."""
    with file.open("w", newline="") as opened:
        writer = csv.writer(opened)
        writer.writerow(("run", "method", "partition", "rank", "privacy", "seed", "round", "heldout", "central"))
        for result in results:
            cell = result.cell
            facts = (cell.name, cell.method, cell.partition, cell.rank, cell.privacy, cell.seed)
            for number in sorted(result.on_nodes.keys() | result.central.keys()):
                writer.writerow([*facts, number, result.on_nodes.get(number), result.central.get(number)])


def cells(table: Sequence[Row], metric: str) -> list[list[str]]:
    """The table that a person reads: a line of titles, then the rows. Columns that say nothing are left out."""
    further = next((task.further for task in TASKS.values() if task.metric == metric and task.further), "further")
    titles = ["method", "partition", "rank", "privacy", metric, f"central {metric}", further]
    titles += ["spread over nodes", "worst node", "MB up", "MB down", "seconds of rounds"]
    lines = [
        [
            *(row.method, row.partition, str(row.rank), row.privacy),
            *(_spread(row.on_nodes), _spread(row.central), _spread(row.further)),
            *(_figure(row.fairness), _figure(row.worst)),
            *(_size(row.bytes_up), _size(row.bytes_down), f"{row.seconds:.0f}" if row.seconds else "-"),
        ]
        for row in table
    ]
    optional = {"partition", "rank", "privacy"}
    columns = [{line[index] for line in lines} for index in range(len(titles))]
    telling = [
        index
        for index, (title, texts) in enumerate(zip(titles, columns, strict=True))
        if (len(texts) > 1 if title in optional else texts != {"-"})
    ]
    return [[line[index] for index in telling] for line in [titles, *lines]]


def markdown(table: Sequence[Row], metric: str) -> str:
    """The same as a Markdown table; figures are right-aligned."""
    titles, *lines = cells(table, metric)
    words = ("method", "partition", "privacy")
    rule = "|".join("---" if title in words else "---:" for title in titles)
    return "\n".join([_line(titles), f"|{rule}|", *map(_line, lines)]) + "\n"


def _line(texts: Sequence[str]) -> str:
    return f"| {' | '.join(texts)} |"


def _spread(spread: Spread | None) -> str:
    return "-" if spread is None else f"{_figure(spread.mean)} ± {_figure(spread.deviation)}"


def _figure(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def _size(size: float) -> str:
    return f"{size / 1e6:.2f}" if size else "-"
