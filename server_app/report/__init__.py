"""The report of a run: one HTML file that loads nothing, made from the run directory alone."""

from pathlib import Path

from common import durable
from common.record.run import Run
from server_app.report import chart, learning, operation, page

REPORT = "report.html"
STYLE = """
.about { margin-top: .35rem; } .state { font-weight: 600; color: var(--ink); } .state.warn { color: var(--warn); }
.headline { display: grid; grid-template-columns: repeat(auto-fit, minmax(7.75rem, 1fr)); gap: 1.25rem 1rem;
            margin: 2rem 0 0; padding: 0; }
.headline dt { color: var(--soft); font-size: .85rem; }
.headline dd { margin: 0; font-size: 1.75rem; line-height: 1.3; letter-spacing: -.02em; white-space: nowrap;
               font-variant-numeric: tabular-nums; }
.headline small { display: block; color: var(--soft); font-size: .8rem; letter-spacing: 0; white-space: normal; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 19rem), 1fr)); gap: 1rem 2.5rem; }
.charts figure { margin: .5rem 0 0; max-width: 31rem; } .charts figcaption { color: var(--ink); font-weight: 600; }
.overall td { font-weight: 600; }
.words td { text-align: left; vertical-align: top; } .words th { text-align: left; }
.words table { white-space: normal; } .facts td:first-child { color: var(--soft); white-space: nowrap; }
.facts td:last-child, .reason { overflow-wrap: anywhere; unicode-bidi: isolate; min-width: 12rem; }
.reason { white-space: pre-wrap; } .reason pre { font: .8rem/1.4 ui-monospace, monospace; white-space: pre-wrap; }
.share { display: block; height: .5rem; min-width: 1px; border-radius: 2px; background: var(--accent); }
.shares table { width: 100%; max-width: 40rem; white-space: normal; } .shares td:last-child { width: 30%; }
code { font: .85em ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
details { margin-top: .75rem; } td details { margin: 0; } summary { cursor: pointer; }
@media print { details > * { display: block; } }
"""


def write(folder: Path) -> Path:
    """Make the report of a run directory; returns the file, which appears whole.

    Raises :class:`BouquetError` where there is no run, :class:`DiskError` where the disk does not take the page.
    """
    file = folder / REPORT
    text = render(Run.read(folder))
    with durable.writing("the report", file, f"bouquet report {folder} makes it later."):
        durable.write(file, text)
    return file


def render(run: Run) -> str:
    """The page."""
    sections = (
        learning.headline(run),
        learning.curves(run),
        learning.nodes(run),
        learning.classes(run),
        operation.failures(run),
        operation.size(run),
        operation.time(run),
        learning.rounds(run),
        learning.lost(run),
        operation.setting(run),
    )
    title = learning.title(run)
    return page.page(f"{run.name} · Bouquet", title, *sections, style=chart.STYLE + STYLE)
