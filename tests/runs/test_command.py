"""The ``bouquet`` command, up to where Flower takes over."""

import fcntl
import json
import signal
import sqlite3
from pathlib import Path

import psutil
import pytest

from client_app.budget import Budget, Limits
from common.config.node import witness_of
from common.config.privacy import PrivacyConfig
from common.privacy import ledger
from common.privacy.accounting import Release
from common.record.run import Run
from deploy.command import main
from deploy.flower import program
from deploy.settings import located
from deploy.simulation.attempt import FLOWERS_LOG
from tests.support.processes import CORES, Process, wait_for


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["lora.rnak=4"], "lora.rnak: unknown key. Did you mean 'lora.rank'?"),
        (["lora.rank=0", "rule.name=fedex"], "2 mistakes in the run config:"),
        (["train.steps=many"], "train.steps: expected a whole number, got 'many'"),
        (["rule.florist.energy=all"], "rule.florist.energy: expected a number, got 'all'"),
        (["lora.rank"], "a setting cannot be read: expected key=value, or a .toml file, got lora.rank"),
    ],
)
def test_mistakes_are_told_before_anything_is_started(settings, message, capsys, tmp_path):
    assert main(["run", "--directory", str(tmp_path), *settings]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nodes", "0"], "an option that cannot be used (--nodes): expected 1 or more, got 0"),
        (["--cpus", "-1"], "an option that cannot be used (--cpus): expected 1 or more, got -1"),
        (["--gpus", "nan"], "an option that cannot be used (--gpus): expected 0 or more, got nan"),
        (["=5"], "a setting cannot be read: expected key=value, or a .toml file, got =5"),
        (["run-name=" + 100 * "\u4e2d"], "run-name: expected at most 100 letters, digits, dots and hyphens, and 200"),
        (["--directory", "/proc/x"], "a run directory cannot be written (/proc/x/"),
        (["bad.toml"], "a settings file cannot be read (bad.toml): got 'utf-8' codec can't decode"),
    ],
)
def test_what_cannot_be_run_is_told_at_once_in_a_sentence(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.toml").write_bytes(b"run-name = '\xff'")
    assert main(["run", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_second_run_of_a_name_leaves_the_log_of_the_first(tmp_path, capsys):
    log = tmp_path / "one" / FLOWERS_LOG
    log.parent.mkdir()
    log.write_text("started run 7\n")
    with log.open("a") as first:
        fcntl.flock(first, fcntl.LOCK_EX)
        assert main(["run", "--directory", str(tmp_path), "run-name=one"]) == 2
    assert f"this run is under way ({tmp_path}/one). Wait for it" in capsys.readouterr().err
    assert log.read_text() == "started run 7\n"


def test_simulations_are_in_the_users_home_if_not_beside_the_environment(monkeypatch, tmp_path):
    """A stand-in for `flwr` says where Flower would keep its SuperLink."""
    (tmp_path / "bin").mkdir()
    flwr = tmp_path / "bin/flwr"
    flwr.write_text(f'#!/bin/sh\necho "$FLWR_HOME" >> {tmp_path}/homes\n')
    flwr.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(tmp_path / "bin/python"))
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    for prefix, home in (("/proc/x", ".bouquet/flower"), (str(tmp_path), "flower")):
        monkeypatch.setattr("sys.prefix", prefix)
        assert main(["run", "--directory", str(tmp_path / "runs")]) == 1
        assert {Path(line).parent for line in (tmp_path / "homes").read_text().splitlines()} == {tmp_path / home}
        (tmp_path / "homes").unlink()


def test_an_interruption_while_the_command_is_imported_is_told(monkeypatch, capsys):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("deploy.command.import_module", interrupted)
    assert main(["run"]) == 130
    assert capsys.readouterr().err == "bouquet: interrupted\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    "way",
    [
        pytest.param([], id="by Flower", marks=pytest.mark.exhaustive),
        pytest.param(["--in-process"], id="in one program"),
    ],
)
def test_a_run_tells_each_round_and_ends_when_ended_from_outside(way, tmp_path):
    runs = tmp_path / "runs"
    # What 40 rounds print fits in a pipe's buffer: held back, it would come when all have ended.
    settings = ["num-server-rounds=40", "run-name=long", "data.limit=40", "train.steps=1", "train.batch-size=4"]
    options = [*way, "--nodes", "2", "--cpus", str(CORES), "--directory", str(runs)]
    command = [program("bouquet"), "run", *options, *settings]
    process = Process(command, tmp_path / "log", PYTHONUNBUFFERED="")
    try:
        wait_for(lambda: "\nround 1/40" in process.log.read_text(), "the first round's line")
        assert Run.read(runs / "long").running
        started = psutil.Process(process.popen.pid).children()
        process.popen.send_signal(signal.SIGTERM)
        assert process.popen.wait(60) == 130
    finally:
        process.kill()
    told = process.log.read_text()
    assert told.endswith("bouquet: interrupted\n")
    assert "Traceback" not in told
    wait_for(lambda: not Run.read(runs / "long").running, "the run to end", 60)
    assert not any(child.is_running() for child in started)
    assert not (runs / "long/summary.json").exists()


@pytest.mark.slow
def test_a_run_with_too_few_nodes_has_an_exit_code_and_says_why(tmp_path, capfd):
    """What it says is what the run said, whatever words are in it; Flower's own log is in the run's directory."""
    arguments = ["--nodes", "2", "--cpus", str(CORES), "--directory", str(tmp_path), "min-nodes=3", "round.wait=1.0"]
    assert main(["run", *arguments, "run-name=ERROR"]) == 3
    told = capfd.readouterr()
    assert f"run directory {tmp_path}/ERROR" in told.out
    assert "report: " in told.out
    assert (
        "bouquet: the run did not complete: too few nodes: expected 3 within 1 s (min-nodes, round.wait), got 2."
        in told.err
    )
    assert "Traceback" not in told.out + told.err
    assert "Traceback" in (tmp_path / "ERROR/flower.log").read_text()


SITE = [f"site {part}" for part in ("create", "add", "weigh", "kit", "register", "revoke", "rotate", "list")]
COMMANDS = ["run", "rules", "plan", "audit", "ledger", "compare", "runs", "watch", "report", "export"]
COMMANDS += ["chat", "serve", "site"]
DOCTOR = ["doctor", "doctor node", "doctor coordinator"]


@pytest.mark.parametrize("command", [*COMMANDS, *SITE, *DOCTOR])
def test_every_command_has_help_with_an_example(command, capsys):
    with pytest.raises(SystemExit):
        main([*command.split(), "--help"])
    assert f"bouquet {command}" in " ".join(capsys.readouterr().out.split("Example:")[1].split())


@pytest.fixture
def spent(tmp_path):
    """A state directory whose ledger has three releases."""
    privacy = PrivacyConfig.model_validate({"mode": "example", "accountant": "rdp", "noise-multiplier": 2.0})
    folder = tmp_path / "state"
    own = Budget(folder, witness_of(folder), "ward-3", Limits(0.0, 1e-5, 0.0))
    for turn in (1, 2, 3):
        own.charge(Release(2.0, 0.05, 10), privacy, run="flu", round=turn, rule="fedit")
    return folder


def test_the_ledger_is_shown_verified_and_exported(spent, capsys):
    def say(action):
        assert main(["ledger", action, "--directory", str(spent)]) == 0
        return capsys.readouterr().out

    rows = ledger.read(spent, witness_of(spent))
    shown = say("show")
    assert [line.split("│")[6].strip() for line in shown.splitlines() if "│ flu" in line] == ["1", "2", "3"]
    assert f"node: epsilon {rows[-1].epsilon:.4g} at delta 1e-05" in shown
    assert say("verify") == f"3 releases, none changed or missing; the last digest is {rows[-1].digest}\n"
    assert [ledger.Entry(**json.loads(line)) for line in say("export").splitlines()] == rows


def test_a_nodes_config_names_its_ledger_and_its_witness(spent, tmp_path, capsys):
    elsewhere = tmp_path / "elsewhere" / "head"
    witness_of(spent).parent.rename(elsewhere.parent)
    node = tmp_path / "node.toml"
    node.write_text(f'state-directory = "{spent}"\nprivacy-witness = "{elsewhere}"\n')
    for action, said in (("verify", "3 releases, none changed"), ("show", "node: epsilon"), ("export", '"flu"')):
        assert main(["ledger", action, "--node", str(node)]) == 0
        assert said in capsys.readouterr().out
    assert main(["ledger", "verify", "--directory", str(spent)]) == 2
    assert "the witness of the privacy ledger is missing" in capsys.readouterr().err
    node.write_text('state-directory = "state"\n')
    assert main(["ledger", "verify", "--node", str(node)]) == 2
    assert (
        f"1 mistake in the node config {node}:\n  state-directory: expected an absolute path" in capsys.readouterr().err
    )


def test_a_ledger_that_was_changed_is_told(spent, capsys):
    with sqlite3.connect(ledger.path(spent)) as connection:
        connection.execute("UPDATE release SET steps = 1 WHERE number = 2")
    connection.close()
    assert main(["ledger", "verify", "--directory", str(spent)]) == 2
    assert "bouquet: the privacy ledger differs from what was written" in capsys.readouterr().err


def test_a_ledger_that_is_not_there_is_told_and_not_made(tmp_path, capsys):
    assert main(["ledger", "show", "--directory", str(tmp_path)]) == 2
    assert "there is no ledger" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_files_of_this_machine_are_named_by_their_absolute_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("own.jsonl", "stdlib", "fedit"):
        (tmp_path / name).write_text("")
    flat = {"data.source": "own.jsonl", "evaluation.source": "", "model.name": "org/model", "rule.name": "fedit"}
    assert located(flat) == flat | {"data.source": str(tmp_path / "own.jsonl")}
    assert located({"data.source": "stdlib"}) == {"data.source": "stdlib"}


def test_settings_may_stand_on_both_sides_of_an_option(capsys):
    private = ["privacy.mode=example", "train.weighting=uniform"]
    assert main(["plan", "rule.name=ffa-lora", "--records", "5000", *private]) == 0
    assert "ffa-lora" in capsys.readouterr().out
    for wrong, message in (
        (["--recrods", "1"], "unrecognized arguments: --recrods 1"),
        (["--records", "abc"], "got 'abc'"),
    ):
        with pytest.raises(SystemExit):
            main(["plan", *private, *wrong])
        assert message in capsys.readouterr().err
