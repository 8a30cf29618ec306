"""Who takes part in a round, and which updates count: late nodes, refused updates, too few replies."""

import re

import pytest
import torch
from flwr.app import ConfigRecord, RecordDict

from common import wire
from common.adapter.values import Key
from common.error import BouquetError
from common.record import checkpoint
from tests.support.grid import run_in_process
from tests.support.outcome import failures, lines
from tests.support.replies import replace_tensors


def poison(value: float):
    def change(tensors):
        key = next(iter(tensors))
        tensors[key] = tensors[key].clone()
        tensors[key][0, 0] = value
        return tensors

    return change


def other_rule(content: RecordDict) -> RecordDict:
    header, update = wire.unpack_update(content.array_records["update"], rule="fedit", round=0)
    content["update"] = wire.pack_update(update, "ffa-lora", 0, header.node)
    return content


def other_round(content: RecordDict) -> RecordDict:
    header, update = wire.unpack_update(content.array_records["update"], rule="fedit", round=0)
    content["update"] = wire.pack_update(update, "fedit", 7, header.node)
    return content


def other_node(content: RecordDict) -> RecordDict:
    _, update = wire.unpack_update(content.array_records["update"], rule="fedit", round=0)
    content["update"] = wire.pack_update(update, "fedit", 0, "node-000")
    return content


@pytest.mark.parametrize(
    ("tamper", "message"),
    [
        (
            replace_tensors(poison(float("nan"))),
            r"an update out of range \(model.layers.0.*:A\): expected values within 1e.06, got nan",
        ),
        (replace_tensors(poison(float("inf"))), r"an update out of range .*to inf"),
        (
            replace_tensors(lambda t: {k: v[:4] for k, v in t.items()}),
            r"does not fit the rule 'fedit' .*expected shape",
        ),
        (replace_tensors(lambda t: dict(list(t.items())[1:])), r"1 missing tensors, such as model.layers.0"),
        (
            replace_tensors(lambda t: t | {Key("lm_head", "W"): torch.ones(2, 2)}),
            r"1 unknown tensors, such as lm_head:W",
        ),
        (other_rule, r"a message of another rule .*expected fedit, got ffa-lora"),
        (other_round, r"an update of another round .*expected round 0, got round 7"),
        (other_node, r"an update signed by another node: expected node-001, got node-000"),
        (
            lambda content: RecordDict({name: content[name] for name in ("metrics", "score")}),
            r"a reply without an update",
        ),
        (lambda content: RecordDict({"failure": ConfigRecord({"reason": "out of memory"})}), r"out of memory"),
    ],
)
def test_a_bad_update_is_refused_with_its_reason_and_the_run_goes_on(tamper, message, settings, tmp_path):
    run_in_process(settings(**{"num-server-rounds": 1}), nodes=2, tamper={1: tamper})
    (reason,) = failures(tmp_path / "run")

    assert re.search(message, reason), reason
    merged = next(line for line in lines(tmp_path / "run") if line["phase"] == "merge")
    assert (merged["nodes"], merged["asked"]) == (1, 2)
    assert (tmp_path / "run/adapter/adapter_model.safetensors").exists()


def test_a_late_node_is_left_out_after_the_deadline(settings, tmp_path):
    run_in_process(
        settings(**{"num-server-rounds": 1, "round.deadline": 3.0}), nodes=2, tamper={0: lambda content: None}
    )
    assert failures(tmp_path / "run") == ["no reply within 3 s (round.deadline)"]


def test_too_few_replies_void_a_round_and_nothing_trained_is_lost(settings, tmp_path):
    calls = []

    def fails_from_the_second_round(content: RecordDict) -> RecordDict:
        calls.append(1)
        return content if len(calls) == 1 else RecordDict({"failure": ConfigRecord({"reason": "gone"})})

    with pytest.raises(BouquetError, match=r"round 2 failed 2 times.*start again with resume = true"):
        run_in_process(
            settings(**{"round.min-replies": 1.0, "round.retries": 1}), nodes=2, tamper={1: fails_from_the_second_round}
        )
    assert checkpoint.latest(tmp_path / "run/checkpoints", "fedit").round == 1


def test_a_node_with_bad_data_is_left_out_at_the_roll_call(settings, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "fine"}\n{"text": \n')
    run_in_process(settings(**{"num-server-rounds": 1, "min-nodes": 1}), nodes=2, node_config={1: {"data": str(bad)}})
    (reason,) = failures(tmp_path / "run")
    assert f"got 1 of 2: {bad}:2: a line is not JSON: expected one JSON object per line" in reason


def test_mixed_ranks_are_refused_at_the_roll_call(settings, tmp_path):
    run_in_process(settings(**{"num-server-rounds": 1, "min-nodes": 1}), nodes=2, node_config={1: {"lora-rank": 4}})
    (reason,) = failures(tmp_path / "run")
    assert "a rank that the rule 'fedit' cannot serve (node-001, lora-rank): expected 8 on every node, got 4" in reason
    assert "rules that allow smaller ranks are ravan, flora, flexlora" in reason


def test_a_node_that_runs_other_code_is_refused(settings, tmp_path, monkeypatch):
    monkeypatch.setattr("client_app.session.fingerprint", lambda: "0123456789abcdef")
    with pytest.raises(BouquetError, match="no node can take part"):
        run_in_process(settings(), nodes=2)
    assert re.search(
        r"code differs from the coordinator's \(node-000, .*expected the code of .*", failures(tmp_path / "run")[0]
    )


def test_two_nodes_of_one_name_do_not_both_take_part(settings, tmp_path):
    run_in_process(
        settings(**{"num-server-rounds": 1, "min-nodes": 1}),
        nodes=2,
        node_config={0: {"name": "twin"}, 1: {"name": "twin"}},
    )
    (reason,) = failures(tmp_path / "run")
    assert "two nodes with the same name: got 'twin'" in reason


def test_nobody_left_ends_the_run(settings):
    with pytest.raises(BouquetError, match="no node can take part"):
        run_in_process(settings(**{"data.source": "/no/such.jsonl"}), nodes=2)
