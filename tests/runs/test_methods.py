"""Every member of the axes of a node trains the embedded model, at the rate that is its own."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from common.adapter.structures import STRUCTURES
from common.config.run import RunConfig
from strategies.inits import INITS, PublicInit
from strategies.objectives import OBJECTIVES
from strategies.optimizers import OPTIMIZERS
from strategies.registries import defaults
from tests.support.adapters import made
from tests.support.cells import each
from tests.support.grid import run_in_process
from tests.support.outcome import events

RECORDS = [{"text": f"def f{n}(self, x{n % 7}):\n    return self.y{n % 5} + {n} * x{n % 7}"} for n in range(60)]
# Where a member does not go with the default rule or the default structure.
BESIDE: Mapping[str, Mapping[str, Any]] = {
    "nystrom": {"rule.name": "fed-sb"},
    "lu": {"adapter.name": "loldu"},
    "eva": {"rule.name": "ffa-lora"},
    "svd-shrink": {"privacy.mode": "example", "train.weighting": "uniform", "privacy.noise-multiplier": 0.02},
    # A direction a step, of more than a hundred thousand.
    "seeded": {"train.steps": 200},
    "sgd": {"train.learning-rate": 1.0},
}
AXES = (STRUCTURES, INITS, OPTIMIZERS, OBJECTIVES)
CELLS = [(axis.section, name) for axis in AXES for name in axis]
QUICK = {("adapter", "vera"), ("init", "nystrom"), ("optimizer", "la-lora")}


@pytest.mark.slow
@pytest.mark.parametrize(("axis", "name"), each(CELLS, QUICK))
def test_a_member_trains(axis: str, name: str, tmp_path: Path) -> None:
    data = tmp_path / "records.jsonl"
    data.write_text("\n".join(map(json.dumps, RECORDS)))
    beside, over = BESIDE.get(name, {}), axis == "objective" and OBJECTIVES[name].over
    scored = "central" if "privacy.mode" in beside else "heldout"
    public = axis == "init" and issubclass(INITS[name], PublicInit)
    flat = RunConfig().to_flower() | defaults()
    flat |= {
        "run-directory": str(tmp_path),
        "run-name": "run",
        "data.source": str(data),
        "data.partition": "iid",
        "privacy.expected-batch": 4,
        "privacy.records": 28,
        "num-server-rounds": 3,
        "train.steps": 8,
        "train.batch-size": 4,
        "evaluation.every": 0,
        "evaluation.limit": 8,
        "evaluation.prompt": "",
        "model.quantization": "none",
        "task.max-length": 48,
        f"{axis}.name": name,
        **({"model.adapter": made(tmp_path)} if over else {}),
        **({"evaluation.source": str(data)} if scored == "central" else {}),
        **({f"init.{name}.source": str(data), f"init.{name}.examples": 8} if public else {}),
        **beside,
    }
    run_in_process(flat, nodes=2, node_config={n: {"state-directory": str(tmp_path / "state")} for n in range(2)})
    before, *_, after = (event["score"] for event in events(tmp_path, scored))
    assert after < 0.1 * before
