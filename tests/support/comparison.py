"""Run directories as a comparison leaves them, without the runs."""

import json
from collections.abc import Mapping
from pathlib import Path

from deploy.compare.cells import Cell

ROUNDS = 4


def finish(
    cell: Cell,
    folder: Path,
    figures: Mapping[str, float],
    *,
    before: float = 0.5,
    megabytes: float = 1,
    metric: str = "accuracy",
) -> None:
    """A finished run of four rounds, whose nodes rise in equal steps from ``before`` to ``figures``."""
    run = folder / cell.name
    run.mkdir(parents=True)
    config = dict(cell.config) | {"run-name": cell.name, "run-directory": str(folder), "resume": False, "min-nodes": 4}
    (run / "config.json").write_text(json.dumps({"config": config}))
    lines = []
    for number in range(ROUNDS + 1):
        now = {node: before + (figure - before) * number / ROUNDS for node, figure in figures.items()}
        if number:
            size = int(megabytes * 1e6)
            lines.append({"phase": "merge", "round": number, "bytes_up": size, "bytes_down": size, "seconds": 2.0})
        scored = {"phase": "evaluate", "round": number, "metric": metric}
        lines += [{**scored, "node": node, "score": figure} for node, figure in now.items()]
        overall = sum(now.values()) / len(now)
        further = {"further": {"macro-f1": overall - 0.01}} if metric == "accuracy" else {}
        lines.append({"phase": "heldout", "round": number, "loss": 0.5, "metric": metric, "score": overall, **further})
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "summary.json").write_text(json.dumps({"rounds": ROUNDS, "metric": metric}))
