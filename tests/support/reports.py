"""Reports and records as a reader reads them, and records as a test rewrites them."""

import json
import re
from html import unescape
from pathlib import Path


def text(folder: Path) -> str:
    """What a reader of the report reads."""
    html = (folder / "report.html").read_text()
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", html.split("<body>")[1])).split())


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def rewrite(folder: Path, events: list[dict]) -> None:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
