"""What a comparison writes besides its runs: tables, plots, and one page with both."""

from collections.abc import Sequence
from pathlib import Path

from deploy.compare import page, table
from deploy.compare.profile import Profile
from deploy.compare.results import Result, rows

NOTE = (
    "Mean ± standard deviation over the seeds. base: the model before training. local: every node alone. centralised: "
    "one adapter trained on all nodes' examples, for as many steps as all nodes together. Spread: standard deviation "
    "over the nodes. MB: what was transferred in training, over all nodes and rounds."
)


def write(output: Path, name: str, profile: Profile, results: Sequence[Result]) -> str:
    """Write ``table.csv``, ``table.md``, ``rounds.csv``, the PNG files and ``compare.html``; returns the table."""
    from deploy.compare.plots import Pictures  # Matplotlib is an extra, and takes a second to import.

    metric = results[0].metric
    lines = rows(results, profile.quality)
    table.write_csv(output / "table.csv", lines)
    table.write_rounds(output / "rounds.csv", results)
    text = table.markdown(lines, metric)
    (output / "table.md").write_text(text)
    pictures = Pictures(lines, metric, profile.quality).draw(output)
    page.write(output / "compare.html", name, profile.about, table.cells(lines, metric), pictures, NOTE)
    return text
