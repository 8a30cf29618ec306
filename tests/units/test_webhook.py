"""A webhook hears what a person may have to act on, and a run does not depend on it."""

import json
import threading

import pytest

from client_app.policy import Policy
from client_app.spending import Spending
from common import webhook
from common.config.node import NodeConfig
from common.error import QuorumError
from common.record.events import SitOut, Void
from server_app.record import Record
from strategies import read_config


def test_a_webhook_hears_void_rounds_sitting_out_and_the_end_alone(settings, heard, tmp_path):
    def go() -> None:
        with Record(read_config(settings()), 1) as record:
            record.event(Void(round=3, asked=4, replies=1, needed=2, bytes_up=0, bytes_down=0))
            record.note(SitOut(round=4, node="ward-2", failures=3, rounds=5), "sits out")
            record.failure("train", 4, "ward-2", "the note of patient Smith cannot be read")
            raise QuorumError("too few nodes", got="patient Smith")

    with pytest.raises(QuorumError):
        go()
    assert {told["text"] for told in heard} == {
        "run run: round 3 does not count: 1 replied, 2 needed",
        "run run: ward-2 sits out 5 rounds after 3 failures in a row",
        "run run: stopped: too few nodes",
    }
    assert "Smith" not in json.dumps(heard)
    assert "secret" not in "".join(file.read_text() for file in (tmp_path / "run").iterdir() if file.is_file())


def test_a_webhook_that_is_away_is_told_without_its_address(settings, monkeypatch, capsys):
    monkeypatch.setenv(webhook.VARIABLE, "http://127.0.0.1:1/secret")
    with Record(read_config(settings()), 1) as record:
        record.event(Void(round=3, asked=4, replies=1, needed=2, bytes_up=0, bytes_down=0))
    assert "BOUQUET_WEBHOOK could not be notified: URLError" in (said := capsys.readouterr().err)
    assert "secret" not in said
    monkeypatch.setenv(webhook.VARIABLE, "file:///etc/passwd")
    webhook.tell("hello").join()
    assert "BOUQUET_WEBHOOK could not be notified: ValueError" in capsys.readouterr().err


@pytest.mark.slow
def test_a_node_tells_when_its_budget_nears_its_end(heard, tmp_path):
    private = {
        "privacy.mode": "example",
        "train.weighting": "uniform",
        "privacy.records": 400,
        "privacy.accountant": "rdp",
    }
    config = read_config(private)
    for limit in (100.0, 9.0):
        node = NodeConfig.from_flower({"privacy-epsilon": limit, "state-directory": str(tmp_path / f"{limit:g}")})
        spending = Spending(config, node, Policy.of(node), "fedit", "flu")
        release = spending.plan()
        for turn in range(5):
            spent = spending.charge(release, turn)
    for thread in threading.enumerate():
        if thread.daemon and thread is not threading.current_thread():
            thread.join(5)
    assert 7.2 < spent < 9.0
    assert heard
    assert all(told["text"].endswith("of epsilon 9 is spent") for told in heard)
