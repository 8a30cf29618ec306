"""Run directories as real small runs leave them, once a session."""

from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, MetricRecord, RecordDict

from strategies import read_config
from tests.support.grid import run_in_process

HOSTILE = "</table><script>document.title = 'taken'</script> CUDA out of memory\nRuntimeError: <b>\x1b[31mno</b>"
HOSTILE += f"\n{'unbroken' * 40}"
NODES = ("ward-1", "ward-2", "ward-3")


def run(folder: Path, name: str, nodes: int, changes: dict[str, Any], **options: Any) -> Path:
    """A run of three rounds in ``folder``."""
    small = {
        "run-directory": str(folder),
        "run-name": name,
        "num-server-rounds": 3,
        "model.quantization": "none",
        "task.max-length": 32,
        "data.limit": 40,
        "train.steps": 2,
        "train.batch-size": 4,
        "evaluation.limit": 4,
        "evaluation.prompt": "",
        "round.deadline": 60.0,
    }
    named = {number: {"name": NODES[number], "state-directory": str(folder / "state")} for number in range(nodes)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("server_app.nodes.STEADY_SECONDS", 0.0)
        patch.setattr("server_app.nodes.POLL_SECONDS", 0.01)
        run_in_process(read_config({}).to_flower() | small | changes, nodes, node_config=named, **options)
    return folder / name


def plain(folder: Path) -> Path:
    """The second node fails in the second round, with a reason that means harm; the third tells odd figures."""
    answers = iter(range(100))

    def fail(content: RecordDict) -> RecordDict:
        return RecordDict({"failure": ConfigRecord({"reason": HOSTILE})}) if next(answers) == 1 else content

    def tell(content: RecordDict) -> RecordDict:
        odd = {"node": 1.0, "phase": 2.0, "round": 7.0, "<script>": 1.0}
        content["metrics"] = MetricRecord({**content.metric_records["metrics"], **odd})
        return content

    return run(folder, "plain", 3, {"rule.name": "fedit"}, tamper={1: fail, 2: tell})


def private(folder: Path) -> Path:
    """A private run of a rule whose nodes keep what is theirs."""
    privacy = {"privacy.mode": "update-local", "privacy.accountant": "rdp", "train.weighting": "uniform"}
    return run(folder, "private", 2, {"rule.name": "fedsa-lora", **privacy})
