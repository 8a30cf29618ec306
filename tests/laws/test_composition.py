"""Every member of every axis goes with a 4-bit base, with private examples and with a resumed run, or is refused."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from common.adapter.algebra import digest
from common.adapter.values import State
from common.error import BouquetError
from common.record import checkpoint
from strategies import AXES, Recipe
from strategies.inits import INITS, PublicInit
from strategies.objectives import OBJECTIVES
from tests.support.adapters import made
from tests.support.cells import each
from tests.support.grid import run_in_process

ROUNDS = 3
RECORDS = [{"text": f"def f{n}(self, x{n % 7}): return self.y + {n * n}", "label": n % 2} for n in range(32)]

# What has to stand beside a member, where another choice would refuse it whatever the base or the privacy.
BESIDE: Mapping[tuple[str, str], Mapping[str, Any]] = {
    ("adapter", "core"): {"rule.name": "fed-sb"},
    ("init", "orthonormal"): {"rule.name": "ravan", "rule.ravan.scales": 0},
    ("init", "lora-sb"): {"rule.name": "fed-sb", "init.lora-sb.examples": 4},
    ("init", "nystrom"): {"rule.name": "fed-sb"},
    ("init", "lu"): {"adapter.name": "loldu"},
    ("init", "eva"): {"rule.name": "ffa-lora", "init.eva.examples": 4},
    ("init", "lora-ga"): {"init.lora-ga.examples": 4},
    ("keep", "b"): {"rule.name": "fedsa-lora"},
    ("keep", "adapter"): {"rule.name": "local"},
    ("optimizer", "svd-shrink"): {"privacy.mode": "example", "train.weighting": "uniform"},
    ("gradient", "fast"): {"privacy.mode": "example", "train.weighting": "uniform"},
    ("gradient", "hooks"): {"privacy.mode": "example", "train.weighting": "uniform"},
}
WAYS: Mapping[str, Mapping[str, Any]] = {
    "nf4": {"model.quantization": "nf4"},
    "private": {"model.quantization": "none", "privacy.mode": "example", "train.weighting": "uniform"},
    "resumed": {"model.quantization": "none"},
}
CELLS = [(axis.section, name, way) for axis in AXES for name in axis for way in WAYS]
# One member of each axis, each with another way than the axis before.
QUICK = [(axis.section, list(axis)[-1], list(WAYS)[number % len(WAYS)]) for number, axis in enumerate(AXES)]


def settings_of(axis: str, name: str, way: str, folder: Path) -> dict[str, Any]:
    data = folder / "records.jsonl"
    data.write_text("\n".join(map(json.dumps, RECORDS)))
    return {
        "run-directory": str(folder),
        "run-name": "run",
        "num-server-rounds": ROUNDS,
        "model.name": "embedded",
        "task.max-length": 16,
        "lora.rank": 4,
        "lora.targets": "q_proj,v_proj",
        "data.source": str(data),
        "data.partition": "iid",
        "train.steps": 1,
        "train.batch-size": 2,
        "train.schedule": "constant",
        "train.warmup": 0.0,
        "evaluation.every": 0,
        "evaluation.limit": 2,
        "evaluation.prompt": "",
        "round.wait": 0.3,
        "privacy.accountant": "rdp",
        "privacy.expected-batch": 2,
        "privacy.records": 16,
        "privacy.noise-multiplier": 0.5,
        **{f"init.{init}.source": str(data) for init, kind in INITS.items() if issubclass(kind, PublicInit)},
        **({"model.adapter": made(folder)} if axis == "objective" and OBJECTIVES[name].over else {}),
        **WAYS[way],
        **BESIDE.get((axis, name), {}),
        f"{axis}.name": name,
    }


def refusal(flat: Mapping[str, Any]) -> str:
    """What is said of choices that do not go together; nothing of those that do."""
    try:
        Recipe.read(flat)
    except BouquetError as error:
        return str(error)
    return ""


def run(flat: Mapping[str, Any], folder: Path) -> State:
    """The state that a run comes to, whose nodes keep what they keep in ``folder``."""
    nodes = {number: {"state-directory": str(folder / "state")} for number in range(2)}
    run_in_process(dict(flat), nodes=2, node_config=nodes)
    state = checkpoint.latest(folder / "run" / "checkpoints", Recipe.read(flat).rule.name)
    assert state is not None
    assert all(tensor.isfinite().all() for tensor in (state.adapter | state.offset).values())
    return state


@pytest.mark.slow
@pytest.mark.parametrize(
    ("axis", "name", "way"),
    each(CELLS, QUICK),
)
def test_a_member_composes_or_is_refused_by_name(axis: str, name: str, way: str, tmp_path: Path) -> None:
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    for folder in (whole, parted):
        folder.mkdir()
    flat = settings_of(axis, name, way, whole)
    if said := refusal(flat):
        assert name in said
        return
    state = run(flat, whole)
    assert state.round == ROUNDS
    if way == "resumed":
        flat = settings_of(axis, name, way, parted)
        assert run(flat | {"num-server-rounds": ROUNDS - 1}, parted).round == ROUNDS - 1
        again = run(flat | {"resume": True}, parted)
        assert again.round == ROUNDS
        # What a private run draws comes from no seed.
        if not Recipe.read(flat).config.privacy.on:
            assert digest(again.adapter | again.offset) == digest(state.adapter | state.offset)
