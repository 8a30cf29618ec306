"""Whatever one of five nodes sends, over every rule, the run ends as it does without that node."""

import json
from collections.abc import Callable, Iterable
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, MessageType, RecordDict

from server_app.run import conduct
from strategies import RULES
from tests.support.cells import each
from tests.support.configs import small
from tests.support.grid import RUN_ID
from tests.support.hostile import HONEST, HOSTILE, SEED, SPOILS, Nodes
from tests.support.outcome import failures, lines

SENDS_NOTHING = {"NaN", "finite 1e20", "finite 3e38", "the largest that is read", "a thousand times the change"}
"""What cannot be spoilt where a rule sends no tensors."""


def run(folder: Path, name: str, rule: str, nodes: Iterable[int], spoil: Any) -> tuple[str, float]:
    """The digest of what a run ended with, and its overall score."""
    flat = small(folder, **{"rule.name": rule, "run-name": name, "seed": SEED, "min-nodes": 4, "round.max-failures": 0})
    context = Context(run_id=RUN_ID, node_id=1, node_config={}, state=RecordDict(), run_config=flat)
    conduct(Nodes(flat, nodes, spoil), context)
    summary = json.loads((folder / name / "summary.json").read_text())
    return summary["adapter_digest"], summary["after"]["all"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Callable[[str], Any]:
    """What a rule's run comes to without the hostile node, once a rule."""
    return cache(lambda rule: run(tmp_path_factory.mktemp("honest"), "honest", rule, HONEST, None))


def cells() -> list[Any]:
    """One kind for each rule and every kind for one rule; all of them in the long run."""
    one_each = set(zip(RULES, SPOILS, strict=False)) | {("fedit", kind) for kind in SPOILS}
    return each(product(RULES, SPOILS), one_each)


@pytest.mark.parametrize(("rule", "kind"), cells())
def test_the_run_ends_as_without_the_hostile_node(rule, kind, alone, tmp_path, capsys):
    if rule == "local" and kind in SENDS_NOTHING | {"no tensors", "no slots"}:
        pytest.skip("the rule 'local' sends no tensors that could be spoilt")
    honest = alone(rule)
    hostile = run(tmp_path, "hostile", rule, (*HONEST, HOSTILE), SPOILS[kind])
    folder = tmp_path / "hostile"
    assert len((folder / "metrics.jsonl").read_text()) < 300_000
    assert len(capsys.readouterr().out) < 100_000
    # Whoever spoils its updates may still score, and the other way round.
    if SPOILS[kind].kind != MessageType.EVALUATE:
        assert hostile[0] == honest[0]
    if SPOILS[kind].kind != MessageType.TRAIN:
        assert hostile[1] == pytest.approx(honest[1])
    notes = [line["node"] for line in lines(folder) if line["phase"] == "implausible"]
    assert failures(folder) or notes == ["node-5"] * len(notes) != []
