"""What leaves a node: what its policy keeps back, and the line that its audit log has for everything else."""

import hashlib
import json
import re
from contextlib import nullcontext

import pytest
import torch
from flwr.app import ConfigRecord, MetricRecord, RecordDict

from client_app import audit
from client_app.policy import Policy
from common import wire
from common.adapter.values import Key, Update
from common.config.node import NodeConfig
from common.error import BouquetError, RefusalError
from common.privacy import ledger
from strategies import Recipe, read_config
from tests.support.budgets import policy
from tests.support.grid import run_in_process, with_budget
from tests.support.outcome import events
from tests.support.private_runs import PRIVATE, spent


def reply(*, part: str = "B", weight: float = 1.0, codec: str = "fp32", **metrics: float) -> RecordDict:
    update = Update({Key("layer", part): torch.ones(4, 2)}, weight, 1.0)
    record = wire.pack_update(update, "ffa-lora", 0, "ward-3", codec=codec)
    return RecordDict({"update": record, "metrics": MetricRecord(metrics)})


@pytest.mark.parametrize(
    ("kind", "content", "message"),
    [
        ("train", reply(part="A"), "parts in the update: expected B, got 'A'"),
        ("train", reply(codec="bf16"), "the update's codec: expected fp32, got 'bf16'"),
        ("train", reply(weight=36.0), "the update's weight: expected a public one in a private run, got another"),
        ("train", reply(loss=1.5), "figures in a private run: expected none, got 'loss'"),
        ("train", reply(steps=3), "figures in a private run: expected none, got 'steps'"),
        ("evaluate", reply(), "records of a reply: expected metrics or sample or tallies, got 'update'"),
        (
            "query",
            RecordDict({"node": ConfigRecord({"name": "ward-3", "examples": 36})}),
            "facts in a private run: expected base or code or name or rank or where, got 'examples'",
        ),
        (
            "evaluate",
            RecordDict({"sample": ConfigRecord({"text": "def "})}),
            "facts in a private run: expected base or code or name or rank or where, got 'text'",
        ),
        (
            "train",
            RecordDict({"notes": ConfigRecord({})}),
            "records of a reply: expected failure or metrics or sample or score or tallies or unscored or update, "
            "got 'notes'",
        ),
    ],
)
def test_what_may_not_leave_does_not(kind, content, message, tmp_path):
    allowed = Policy.of(NodeConfig(policy=policy(tmp_path, 'parts = ["B"]\ncodecs = ["fp32"]\n')))
    config = read_config({**PRIVATE, "data.partition": "iid"})
    allowed.check_run(Recipe.build(config), NodeConfig())
    allowed.check_reply("train", reply(), config, 1.0)
    allowed.check_reply("train", reply(weight=3.0), config, 3.0)
    with pytest.raises(RefusalError, match=re.escape(message)):
        allowed.check_reply(kind, content, config, 1.0)


@pytest.mark.parametrize(
    ("beside", "message"),
    [
        ({"score": MetricRecord({"merit": 3.5, "count": 7.5}), "metrics": MetricRecord({})}, ""),
        ({"unscored": ConfigRecord({"reason": "no room", "refused": False})}, ""),
        ({"metrics": MetricRecord({"merit": 3.5})}, "figures in a private run: expected none, got 'merit'"),
        ({"tallies": MetricRecord({"count": 36})}, "figures in a private run: expected none, got 'count'"),
        ({"score": MetricRecord({"loss": 1.5})}, "figures in a private run: expected none, got 'loss'"),
        ({"unscored": ConfigRecord({"text": "def "})}, "facts in a private run: expected base or code"),
        ({"sample": ConfigRecord({"reason": "def "})}, "facts in a private run: expected base or code"),
    ],
)
def test_what_comes_with_an_update_leaves_in_its_own_record_alone(beside, message):
    config = read_config({**PRIVATE, "privacy.score-noise": 4.0})
    with pytest.raises(RefusalError, match=re.escape(message)) if message else nullcontext():
        Policy().check_reply("train", RecordDict({**reply(), **beside}), config, 1.0)


def test_updates_that_will_be_too_large_are_refused_uncharged(settings, tmp_path):
    file = policy(tmp_path, 'max-bytes = 1000\n[data]\nsources = ["*"]\n')
    with pytest.raises(BouquetError, match="no node can take part"):
        run_in_process(settings(**PRIVATE | {"min-nodes": 1}), nodes=1, node_config={0: {"policy": file}})
    reasons = {failure["reason"] for failure in events(tmp_path, "failure")}
    (reason,) = reasons
    assert re.search(r"bytes of an update: expected at most 1,000 \(max-bytes\), got about 270,336", reason)
    assert not ledger.path(tmp_path / "state" / "node-000").exists()


@pytest.mark.slow
def test_the_audit_log_has_a_line_for_everything_that_left(settings, tmp_path):
    """One of the nodes has a budget that is spent; it shares its log with the other, as in a simulation."""
    flat = settings(**{**PRIVATE, "num-server-rounds": 2, "min-nodes": 1})
    budget = with_budget(tmp_path / "state", 0.5)
    grid = run_in_process(flat, nodes=2, node_config={1: budget})
    log = audit.path(tmp_path / "state")
    assert log.stat().st_mode & 0o777 == 0o600
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert len(lines) == len(grid.returned)
    rows = spent(tmp_path, "node-000")
    for line, (kind, content) in zip(lines, grid.returned, strict=True):
        assert (line["message"], line["records"]) == (kind, sorted(content))
        said = {name: dict(record) for name, record in content.metric_records.items()}
        said |= {name: dict(record) for name, record in content.config_records.items()}
        sha = hashlib.sha256()
        if "update" in content.array_records:
            arrays = content.array_records["update"]
            assert line["tensors"] == len(wire.read_header(arrays).tensors)
            assert line["bytes"] == wire.payload_bytes(arrays)
            for key, array in arrays.items():
                sha.update(f"update/{key}".encode() + array.data)
            assert line["epsilon"] in [row.epsilon for row in rows]
        else:
            assert (line["tensors"], line["bytes"], line["epsilon"]) == (0, 0, None)
        assert line["said"] == said
        sha.update(json.dumps(said, sort_keys=True).encode())
        assert line["digest"] == sha.hexdigest()
    (refused,) = [line for line in lines if "failure" in line["said"]]
    assert (refused["node"], refused["round"]) == ("node-001", 1)
    assert refused["said"]["failure"]["reason"].startswith("the privacy budget of this node is spent")


def test_plain_runs_are_logged_too(settings, tmp_path):
    grid = run_in_process(settings(**{"num-server-rounds": 1}), nodes=2)
    lines = [json.loads(line) for line in audit.path(tmp_path / "state").read_text().splitlines()]
    assert [line["message"] for line in lines] == [kind for kind, _ in grid.returned]
    assert {line["epsilon"] for line in lines} == {None}
