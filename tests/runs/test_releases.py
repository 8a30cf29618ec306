"""What the release before has left is read, or refused in a sentence; and what one after this might leave is refused.

``tests/release_0_1_0`` was written by release 0.1.0: a run without its tensors, a site, and a node's config.
"""

import json
import shutil
import sqlite3
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from common import readable
from common.adapter.algebra import digest
from common.adapter.values import Key
from common.config.node import NodeConfig
from common.error import BouquetError, RefusalError
from common.privacy import ledger
from common.record import checkpoint
from common.record.run import Run
from deploy.command import main
from deploy.site import kit
from deploy.site.folder import Site
from tests.support.budgets import charge
from tests.support.grid import run_in_process

FORMER = Path(__file__).with_name("release_0_1_0")


@pytest.fixture
def former(tmp_path) -> Path:
    """A run directory of 0.1.0, with a checkpoint as it wrote them."""
    folder = tmp_path / "plain"
    shutil.copytree(FORMER / "run", folder)
    tensors = {Key("l", "A"): torch.ones(2, 3)}
    facts = {"round": 2, "scale": 0.5, "rule": "fedit", "digest": digest(tensors)}
    (folder / "checkpoints").mkdir()
    named = {str(key): tensor for key, tensor in tensors.items()}
    save_file(named, checkpoint.file_of(folder / "checkpoints", 2), metadata={"bouquet": json.dumps(facts)})
    return folder


def test_a_run_of_the_release_before_is_listed_and_reported(former, capsys):
    assert main(["runs", str(former.parent)]) == 0
    assert main(["report", str(former)]) == 0
    said = capsys.readouterr().out
    assert "fedit" in said
    assert "2/2" in said
    run = Run.read(former)
    assert (run.state, run.done, run.torn, run.nodes) == ("finished", 2, 0, ["node-000", "node-001"])
    assert run.tally.crossed == {"up": run.summary.bytes_up, "down": run.summary.bytes_down}
    assert readable.figure(run.scores[2]) in (former / "report.html").read_text()


def test_a_run_of_the_release_before_is_not_gone_on_with(former, settings, capsys):
    record = (former / "metrics.jsonl").read_text()
    with pytest.raises(
        BouquetError, match=r"no checkpoint of this run can be read .*Resume with the release and the rule"
    ):
        run_in_process(settings(**{"run-name": "plain", "resume": True}), nodes=2)
    assert "skipped: a checkpoint of another release" in capsys.readouterr().out
    assert (former / "metrics.jsonl").read_text().startswith(record)
    assert checkpoint.rounds(former / "checkpoints") == [2]


def test_a_former_site_is_read_and_its_coordinator_gets_new_scripts(tmp_path):
    folder = tmp_path / "hospitals"
    create = ["site", "create", str(folder), "--name", "hospitals", "--address", "127.0.0.1"]
    assert main([*create, "--nodes", "ward-1"]) == 0
    shutil.copy(FORMER / "site/site.json", folder / "site.json")
    (folder / "coordinator/kit.toml").unlink()  # 0.1.0 had none
    for file in folder.glob("coordinator/*.s*"):
        if file.suffix in {".sh", ".service"}:
            file.write_text("of 0.1.0")
    kit.renew(site := Site.open(folder))
    assert list(site.facts.nodes) == ["ward-1"]
    assert site.node("ward-1").weight == 1.0
    assert "bouquet-superexec" in (folder / "coordinator/superexec.sh").read_text()
    unit = (folder / "coordinator/bouquet-superlink.service").read_text()
    assert "ExecStart=/etc/bouquet/coordinator/superlink.sh" in unit
    assert "ReadWritePaths=/var/lib/bouquet" in unit


def test_a_former_site_is_installed_with_this_releases_scripts(tmp_path):
    folder = tmp_path / "hospitals"
    place = ["--installed", "/srv/coordinator", "--user", "fl", "--programs", "/srv/bin", "--state", "/srv/state"]
    assert main(["site", "create", str(folder), "--address", "127.0.0.1", "--fleet-port", "9999", *place]) == 0
    scripts = [file for file in (folder / "coordinator").iterdir() if file.suffix in {".sh", ".service"}]
    written = {file: file.read_text() for file in scripts}
    assert len(written) == 4
    for file in scripts:
        file.write_text("of another release")
    kit.renew(Site.open(folder))
    assert {file: file.read_text() for file in scripts} == written


def test_a_nodes_config_of_the_release_before_is_read_or_completed():
    """A budget needs a folder of its own now, which that release's kits name and its operators need not have."""
    node = NodeConfig.read(FORMER / "site/node.toml")
    assert (node.name, node.data, node.privacy_epsilon) == ("ward-1", "/data/notes.jsonl", 8.0)
    assert node.state == Path("/var/lib/bouquet/ward-1")
    with pytest.raises(
        BouquetError, match="state-directory: expected a folder of its own for privacy-epsilon, got none"
    ):
        NodeConfig.from_flower({"name": "ward-1", "privacy-epsilon": 8.0})


def test_a_ledger_of_a_later_release_stops_the_node(tmp_path):
    charge(tmp_path / "state")
    with sqlite3.connect(ledger.path(tmp_path / "state")) as connection:
        connection.execute("ALTER TABLE release ADD COLUMN mechanism_parameters TEXT")
    connection.close()
    with pytest.raises(RefusalError, match=r"the privacy ledger cannot be read .*table release has 16 columns but 15"):
        charge(tmp_path / "state")
