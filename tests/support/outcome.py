"""What a run has written into its directory."""

import json
from pathlib import Path


def lines(folder: Path) -> list[dict]:
    """Every event of the run whose directory ``folder`` is."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def failures(folder: Path) -> list[str]:
    """The reason of every failure."""
    return [line["reason"] for line in lines(folder) if line["phase"] == "failure"]


def events(folder: Path, phase: str, run: str = "run") -> list[dict]:
    """The lines of one phase of a run in ``folder``."""
    return [line for line in lines(folder / run) if line["phase"] == phase]


def rounds_of(folder: Path, node: str, phase: str = "train") -> list[int]:
    """The rounds in which a node has a line of a phase."""
    return [line["round"] for line in lines(folder) if line["phase"] == phase and line.get("node") == node]
