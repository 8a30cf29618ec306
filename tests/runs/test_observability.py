"""Where a run's figures go besides its record, and what a person reads of a run with many nodes."""

import json
import os
import socket
import subprocess
import sys
from typing import Any
from urllib.request import urlopen

import psutil
import pytest
from flwr.app import Context, RecordDict
from torch.utils.tensorboard import SummaryWriter

from common.error import BouquetError
from common.record import events
from server_app.record import FEW, Record
from server_app.run import conduct
from strategies import read_config
from tests.support import ROOT
from tests.support.grid import RUN_ID, StubGrid, run_in_process
from tests.support.outcome import lines
from tests.support.ports import free_port

MERGE = events.Merge(
    round=1,
    nodes=1,
    asked=2,
    loss=2.5,
    bytes_up=10,
    bytes_down=40,
    seconds=3.0,
    phases={"training": 3.0},
    formula_up=10,
    formula_down=40,
    peak_memory=10**9,
)
EVENTS = [
    events.Failure(round=1, node="node-002", during="train", reason="out of /secret/memory"),
    events.Train(round=1, node="node-000", loss=2.5, bytes_up=10, bytes_down=20),
    MERGE,
    events.AggregationError(round=1, overall=0.25, layers={"l": 0.25}),
    events.Evaluation(round=1, asked=2, bytes_down=2, seconds=1.0),
    events.HeldOut(round=1, loss=1.5, metric="perplexity", score=4.5),
    events.Void(round=2, asked=2, replies=0, needed=1, bytes_up=0, bytes_down=40),
    events.Late(round=1, node="node-002", during="train"),
]


def tell(record: Record) -> None:
    for event in EVENTS:
        record.event(event)


def test_tensorboard_shows_what_the_record_holds(settings, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_in_process(settings(**{"tracking.to": "tensorboard", "num-server-rounds": 1}), nodes=2)
    shown = EventAccumulator(str(tmp_path / "run/tensorboard"))
    shown.Reload()
    (merge,) = [line for line in lines(tmp_path / "run") if line["phase"] == "merge"]
    (loss,) = shown.Scalars("merge/loss")
    assert (loss.step, loss.value) == (1, pytest.approx(merge["loss"]))
    assert {"train/loss/node-000", "heldout/perplexity", "aggregation-error/overall"} <= set(shown.Tags()["scalars"])


def test_prometheus_reads_the_figures_while_the_run_lasts_and_no_longer(settings, tmp_path):
    port = free_port()
    config = read_config(settings(**{"metrics.port": port}))
    with Record(config, 1) as record:
        tell(record)
        with urlopen(f"http://127.0.0.1:{port}/metrics") as page:
            said = dict(line.rsplit(" ", 1) for line in page.read().decode().splitlines() if line[0] != "#")
    expected = {
        "bouquet_round": 1,
        "bouquet_nodes_asked": 2,
        "bouquet_nodes_replied": 1,
        "bouquet_round_seconds": 3,
        'bouquet_loss{of="train"}': 2.5,
        'bouquet_loss{of="heldout"}': 1.5,
        "bouquet_aggregation_error": 0.25,
        'bouquet_bytes_total{direction="up"}': 10,
        'bouquet_bytes_total{direction="down"}': 82,
        'bouquet_failures_total{during="train"}': 1,
        "bouquet_late_replies_total": 1,
        "bouquet_void_rounds_total": 1,
        'bouquet_run_info{rule="fedit",run="run"}': 1,
    }
    assert {name: float(said[name]) for name in expected} == expected
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0


def test_nobody_listens_unless_asked(settings, tmp_path):
    def listening() -> list[Any]:
        return [each for each in psutil.Process().net_connections() if each.status == psutil.CONN_LISTEN]

    before = listening()
    with Record(read_config(settings()), 1) as record:
        record.event(MERGE)
        assert listening() == before
    assert {file.name for file in (tmp_path / "run").iterdir()} == {
        "config.json",
        "metrics.jsonl",
        "report.html",
        "run.log",
    }


def test_a_port_for_prometheus_that_is_taken_is_named(settings):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        config = read_config(settings(**{"metrics.port": taken.getsockname()[1]}))
        with pytest.raises(
            BouquetError, match=r"the port for Prometheus cannot be opened .*choose another metrics.port"
        ):
            Record(config, 1)


def test_a_tracker_that_is_not_installed_or_not_known_is_named(settings, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(BouquetError, match=r"a tracker that is not installed .*pip install 'bouquet\[tracking\]'"):
        Record(read_config(settings(**{"tracking.to": "mlflow"})), 1)
    with pytest.raises(BouquetError, match=r"tracking.to: expected a comma-separated list of tensorboard, mlflow"):
        read_config(settings(**{"tracking.to": "tensorboard,comet"}))


def test_a_tracker_that_breaks_down_does_not_end_the_run(settings, tmp_path, capsys, monkeypatch):
    def gone(*_: object) -> None:
        raise OSError("the service is gone")

    with Record(read_config(settings(**{"tracking.to": "tensorboard"})), 1) as record:
        record.event(MERGE)
        monkeypatch.setattr(SummaryWriter, "add_scalar", gone)
        tell(record)
    written = [line["phase"] for line in lines(tmp_path / "run")]
    assert written == ["opened", "merge", *(event.phase for event in EVENTS)]
    assert capsys.readouterr().out.count("tensorboard receives no more figures of this run") == 1

    with Record(read_config(settings(**{"tracking.to": "tensorboard", "run-name": "last"})), 1) as record:
        monkeypatch.setattr(SummaryWriter, "close", gone)
        record.event(events.Stalled(round=0, said="nothing came of it"))
    assert "tensorboard did not receive the run's last figures" in capsys.readouterr().out


def test_a_reason_is_said_in_full_once_even_an_empty_one(settings, capsys):
    with Record(read_config(settings()), 1) as record:
        for number in range(2):
            record.failure("train", number, "node-000", "")
            record.failure("train", number, "node-001", "a defect\nits traceback")
    said = capsys.readouterr().out
    assert (said.count("a defect"), said.count("its traceback")) == (2, 1)


TRACKED = """
import json, sys
from server_app.record import Record
from strategies import read_config
from tests.runs.test_observability import tell
with Record(read_config(json.loads(sys.argv[1])), 1) as record:
    tell(record)
"""


@pytest.mark.slow
def test_mlflow_and_wandb_get_figures_and_no_secret(settings, tmp_path):
    """Flower hands the ServerApp its token on the command line, which W&B would upload with everything else."""
    config = settings(**{"tracking.to": "mlflow,wandb", "data.source": "/secret/place", "metrics.port": 0})
    command = [sys.executable, "-c", TRACKED, json.dumps(config), "--token", "SECRET-TOKEN"]
    environment = {**os.environ, "WANDB_MODE": "offline", "WANDB_API_KEY": "SECRET" + "0" * 40}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    local = {"config.json", "metrics.jsonl", "report.html"}  # the run directory tells the settings, trackers do not
    kept = [file for file in (tmp_path / "run").rglob("*") if file.is_file() and file.suffix != ".log"]
    told = {file: file.read_bytes() for file in kept if file.name not in local}
    for secret in (b"SECRET", b"/secret/"):
        assert [file for file, content in told.items() if secret in content] == []
    assert any(b"merge/loss" in content for file, content in told.items() if file.suffix == ".wandb")

    import sqlite3

    with sqlite3.connect(tmp_path / "run/mlflow.db") as database:
        metrics = {key: (value, step) for key, value, step in database.execute("SELECT key, value, step FROM metrics")}
        settings_told = dict(database.execute("SELECT key, value FROM params"))
    assert metrics["merge/loss"] == (2.5, 1)
    assert metrics["train/loss/node-000"] == (2.5, 1)
    assert settings_told["rule.name"] == "fedit"
    assert "data.source" not in settings_told


def test_no_byte_is_counted_twice(settings, tmp_path):
    run_in_process(settings(**{"num-server-rounds": 1}), nodes=2)
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    for way in ("bytes_up", "bytes_down"):
        # What the exporter adds up: events of all nodes together.
        told = [line[way] for line in lines(tmp_path / "run") if way in line and "node" not in line]
        assert sum(told) == summary[way] > 0


def test_many_failing_nodes_do_not_flood_the_log(settings, tmp_path, capsys):
    """First all fail, and no round counts, then 30 of 40: a few lines a round, and every reason in the record."""
    calls: list[int] = []

    def failing(node: int) -> str:
        calls.append(node)
        return f"CUDA out of memory\nframe of {node}" if node > 10 or len(calls) <= 40 else ""

    changes = {"num-server-rounds": 3, "min-nodes": 40, "round.min-replies": 0.1, "evaluation.every": 0}
    config = settings(**changes, **{"round.max-failures": 3})
    grid = StubGrid(40, failing)
    conduct(grid, Context(run_id=RUN_ID, node_id=1, node_config={}, state=RecordDict(), run_config=config))
    said = capsys.readouterr().out.splitlines()
    assert len([line for line in lines(tmp_path / "run") if line["phase"] == "failure"]) > 90
    rounds = [line for line in said if line.startswith("round ")]
    assert [line.split()[1] for line in rounds] == ["1", "1/3", "2/3", "3/3"]
    assert len([line for line in said if "left out of train" in line]) <= FEW * 4
    assert len(said) < 60
