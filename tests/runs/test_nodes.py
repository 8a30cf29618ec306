"""The roll of a run: who is called what, who is asked again, and what is waited for."""

import json
import re
import time
from collections.abc import Collection, Iterable
from pathlib import Path

import pytest
import torch
from flwr.app import Context, Message, MessageType, RecordDict

import server_app.nodes
from common.adapter.values import Key, State, Update
from common.config import roster
from common.config.roster import Registered
from common.error import QuorumError
from common.record import checkpoint
from common.record.directory import TOO_FEW
from common.record.run import Run
from deploy.simulation.grid import LocalGrid
from server_app.record import Record
from server_app.run import conduct
from server_app.scrutiny import FEWEST, Scrutiny
from strategies import Recipe, read_config
from strategies.rules import FedIT
from tests.support.grid import RUN_ID, StubGrid, run_in_process
from tests.support.hostile import HOSTILE, SEED, SPOILS, Nodes
from tests.support.outcome import failures, lines, rounds_of
from tests.support.replies import GONE


def conducted(grid: LocalGrid, config: dict) -> None:
    conduct(grid, Context(run_id=RUN_ID, node_id=1, node_config={}, state=RecordDict(), run_config=config))


class Leaving(StubGrid):
    """Nodes of which all but ``left`` have gone once the run in ``folder`` has finished a round."""

    def __init__(self, nodes: int, left: int, folder: Path) -> None:
        super().__init__(nodes)
        self._left, self._folder = left, folder

    def get_node_ids(self) -> Iterable[int]:
        return list(self.nodes)[: self._left] if checkpoint.rounds(self._folder / "checkpoints") else list(self.nodes)


def test_a_node_is_called_as_its_key_and_no_stranger_takes_part(settings, tmp_path, monkeypatch):
    """Of three nodes one goes under another's name, and one has a key that the site does not know."""
    known = {1000: Registered(name="node-000", weight=5.0), 1001: Registered(name="ward-7")}
    (tmp_path / "nodes.json").write_bytes(roster.dumped(known))
    monkeypatch.setenv(roster.VARIABLE, str(tmp_path / "nodes.json"))
    run_in_process(settings(**{"num-server-rounds": 1, "min-nodes": 1}), nodes=3)
    assert failures(tmp_path / "run") == [
        "a node under a name other than its key's: expected 'ward-7', got 'node-001'",
        "a node that the site does not know: got 'node-002'. Run bouquet site register.",
    ]
    (start,) = [line for line in lines(tmp_path / "run") if line["phase"] == "start"]
    assert (start["names"], start["nodes"]) == ("proven", ["node-000"])


def test_a_declared_weight_is_the_sites_and_not_the_nodes(settings, tmp_path, monkeypatch):
    """What a node says of its own weight changes nothing where the site has a roster."""

    def merged(name: str, weights: tuple[float, float], claimed: float = 1.0) -> str:
        known = {1000 + node: Registered(name=f"node-{node:03d}", weight=weights[node]) for node in range(2)}
        (tmp_path / "nodes.json").write_bytes(roster.dumped(known))
        changes = {"run-name": name, "num-server-rounds": 1, "train.weighting": "declared", "evaluation.every": 0}
        run_in_process(settings(**changes), nodes=2, node_config={1: {"weight": claimed}})
        return json.loads((tmp_path / name / "summary.json").read_text())["adapter_digest"]

    monkeypatch.setenv(roster.VARIABLE, str(tmp_path / "nodes.json"))
    alike = merged("alike", (1.0, 1.0))
    assert merged("claimed", (1.0, 1.0), claimed=9.0) == alike
    assert merged("weighed", (1.0, 9.0)) != alike


def test_a_node_of_another_name_draws_other_batches(settings, tmp_path):
    digests = []
    for number, name in enumerate(("node-001", "node-001", "ward-1")):
        changes = {"run-name": f"run-{number}", "num-server-rounds": 1, "evaluation.every": 0}
        run_in_process(settings(**changes), nodes=2, node_config={1: {"name": name}})
        digests.append(json.loads((tmp_path / f"run-{number}/summary.json").read_text())["adapter_digest"])
    assert digests[0] == digests[1] != digests[2]


def test_a_node_that_cannot_answer_the_roll_call_is_asked_again(settings, tmp_path):
    calls = []

    def fails_once(content: RecordDict) -> RecordDict:
        calls.append(1)
        return GONE if len(calls) == 1 else content

    # It is asked again after a second.
    changes = {"min-nodes": 2, "round.wait": 30.0, "evaluation.every": 0}
    run_in_process(settings(**changes), nodes=2, tamper={1: fails_once}, tampered="query")
    assert failures(tmp_path / "run") == ["gone"]
    assert rounds_of(tmp_path / "run", "node-001") == [1, 2]


def test_a_round_that_does_not_count_is_tried_again_with_growing_pauses(settings, tmp_path, monkeypatch):
    pauses, sleep = [], time.sleep

    def note(seconds: float) -> None:
        pauses.append(seconds)
        sleep(min(seconds, 0.01))

    monkeypatch.setattr(time, "sleep", note)
    changes = {"round.retries": 3, "round.wait": 3.0, "round.max-failures": 0, "evaluation.every": 0}
    with pytest.raises(QuorumError, match=r"round 1 failed 4 times; .* start again with resume = true"):
        conducted(StubGrid(2, lambda node: "out of memory"), settings(**changes))
    assert [seconds for seconds in pauses if seconds >= 1] == [1.0, 2.0, 3.0], "round.wait is the longest"
    assert [line["round"] for line in lines(tmp_path / "run") if line["phase"] == "void"] == [1] * 4


def test_a_run_with_too_few_nodes_left_leaves_its_adapter_and_resumes(settings, tmp_path):
    changes = {"num-server-rounds": 3, "min-nodes": 3, "evaluation.every": 0}
    began = time.monotonic()
    with pytest.raises(QuorumError, match=r"too few nodes: expected 3 within 0.3 s \(min-nodes, round.wait\), got 2"):
        conducted(Leaving(3, 2, tmp_path / "run"), settings(**changes))
    assert time.monotonic() - began >= 0.3
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert (summary["ended"], summary["rounds"]) == ("too few nodes", 1)
    assert Run.read(tmp_path / "run").stopped.ended == TOO_FEW
    assert (tmp_path / "run/adapter/adapter_model.safetensors").exists()
    conducted(StubGrid(3), settings(**changes, resume=True))
    assert [line["round"] for line in lines(tmp_path / "run") if line["phase"] == "merge"] == [1, 2, 3]
    assert Run.read(tmp_path / "run").state == "finished"


def test_from_four_on_a_change_far_above_the_others_median_is_refused():
    """The largest of three is nobody's to judge; and whoever changes as much as the others times the ratio may."""
    state = State({Key("l", "A"): torch.zeros(4, 8), Key("l", "B"): torch.zeros(8, 4)}, 1.0)

    def refused(sizes: list[float]) -> dict[str, str]:
        scrutiny = Scrutiny(FedIT(), state, max_norm=1e4, max_ratio=20.0)
        for node, size in enumerate(sizes):
            moved = {key: tensor + size for key, tensor in state.adapter.items()}
            scrutiny.examine(f"node-{node}", Update(moved, 1.0, 1.0))
        return scrutiny.outsized()

    assert FEWEST == 4
    assert refused([1.0, 1.0, 21.0]) == refused([1.0, 1.0, 1.0, 19.9]) == {}
    said = refused([1.0, 1.0, 1.0, 21.0])
    assert list(said) == ["node-3"]
    expected = "expected a norm of at most 20 times the others' median, 8 (round.max-ratio), got 168"
    assert said["node-3"] == f"an update that changes too much: {expected}"


def test_of_updates_that_cannot_be_merged_the_largest_is_left_out(settings, tmp_path):
    """Each is in range; the factors of their product are not."""
    config = settings(**{"rule.name": "flexlora", "round.max-norm": 1e12, "num-server-rounds": 1, "seed": SEED})
    conducted(Nodes(config, (1, 2, HOSTILE), SPOILS["the largest that is read"]), config)
    (reason,) = failures(tmp_path / "run")
    assert reason.startswith("its change, the largest, cannot be merged: a state out of range (model.layers.0")
    (merge,) = [line for line in lines(tmp_path / "run") if line["phase"] == "merge"]
    assert (merge["nodes"], merge["asked"]) == (2, 3)
    assert rounds_of(tmp_path / "run", f"node-{HOSTILE}", "failure") == [1]


class Unlike(StubGrid):
    """Nodes of which some have another base model than the rest."""

    def __init__(self, nodes: int, others: Collection[int]) -> None:
        super().__init__(nodes)
        self._others = others

    def _reply(self, message: Message) -> Message:
        reply = super()._reply(message)
        if message.metadata.message_type == MessageType.QUERY and message.metadata.dst_node_id in self._others:
            reply.content.config_records["node"]["base"] = "0123456789abcdef"
        return reply


def test_who_has_another_base_than_the_coordinator_takes_no_part(settings, tmp_path):
    """Though most nodes have it: a coordinator that has the model knows which one is meant."""
    conducted(Unlike(3, {2, 3}), settings(**{"num-server-rounds": 1, "min-nodes": 1, "evaluation.every": 0}))
    assert len(failures(tmp_path / "run")) == 2
    for said in failures(tmp_path / "run"):
        assert re.fullmatch(
            r"a node whose base model differs from the run's \(model.name = 'embedded'\): expected the weights and "
            r"words [0-9a-f]{16}, got 0123456789abcdef. Give every machine the same files of one model.revision.",
            said,
        )


@pytest.mark.parametrize(("others", "left"), [({3}, ["node-0001", "node-0002"]), ({2, 3}, ["node-0002", "node-0003"])])
def test_a_coordinator_without_the_model_goes_by_most_nodes(others, left, settings, tmp_path):
    config = read_config(settings(**{"model.name": "nobody/has-this", "min-nodes": 3}))
    with Record(config, RUN_ID) as record:
        nodes = server_app.nodes.Nodes(Unlike(3, others), Recipe.around(FedIT(), config), record)
        nodes.summon()
        nodes.admit()
    assert sorted(nodes.names.values()) == left
