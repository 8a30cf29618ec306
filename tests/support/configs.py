"""Run configs in the small."""

from pathlib import Path
from typing import Any

from common.config.run import RunConfig


def small(folder: Path, **changes: Any) -> dict[str, Any]:
    """The config of a small run in ``folder``, in Flower's flat form."""
    own = {
        "run-directory": str(folder),
        "run-name": "run",
        "num-server-rounds": 2,
        "task.max-length": 32,
        "data.limit": 40,
        "train.steps": 3,
        "train.batch-size": 4,
        "evaluation.limit": 8,
        "evaluation.prompt": "",
        "round.deadline": 60.0,
        "round.wait": 0.3,
    }
    return RunConfig().to_flower() | own | changes
