"""The defaults of the run config in ``pyproject.toml``."""

import json

from deploy.config.catalogue import run_entries
from docs.generate.text import between


def pyproject(text: str) -> str:
    """The file with every key of the run config."""
    lines = [f"{entry.key} = {json.dumps(entry.default)}\n" for entry in run_entries()]
    return between(text, "[tool.flwr.app.config]\n", "\n[tool.ruff]", "".join(lines))
