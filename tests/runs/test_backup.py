"""The page's section on backups, command by command: of a coordinator with a run, and of a node with a budget."""

import json
import os
import re
import shlex
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from flwr.app import Context, RecordDict

from client_app.budget import Budget, Limits
from client_app.memory import Memory
from common.config.node import NodeConfig
from common.error import RefusalError
from common.privacy import ledger
from deploy.command import main
from server_app.run import conduct
from tests.support import ROOT
from tests.support.budgets import DELTA, PRIVACY, RELEASE
from tests.support.grid import RUN_ID, StubGrid
from tests.support.outcome import lines
from tests.support.processes import UNPRIVILEGED

PAGE = (ROOT / "docs/deploying.md").read_text()
SECTION = PAGE[PAGE.index("**Backup.**") : PAGE.index("**Two runs at once**")]
COMMANDS = re.findall(r"^    (.*)$", SECTION, flags=re.MULTILINE)
PLACES = ("etc/bouquet/coordinator", "etc/bouquet/ward-1", "var/lib/bouquet", "hospitals")


@pytest.fixture
def machine(tmp_path) -> Path:
    """A folder in the place of the root of a machine that is the coordinator and a node, installed as the page says."""
    etc, state, site = tmp_path / "etc/bouquet", tmp_path / "var/lib/bouquet", str(tmp_path / "hospitals")
    own, units = ["--user", UNPRIVILEGED, "--installed"], ["--units", str(tmp_path / "units")]
    create = ["site", "create", site, "--address", "127.0.0.1", "--nodes", "ward-1", "--state", str(state)]
    assert main([*create, *own, str(etc / "coordinator")]) == 0
    places = [f"state-directory={state}/ward-1", f"privacy-witness={witness_of(state / 'ward-1')}"]
    node = [*places, "--keys-user", UNPRIVILEGED, *own, str(etc / "ward-1")]
    assert main(["site", "kit", site, "ward-1", *node]) == 0
    for kit in (site, f"{site}/kits/ward-1.tar.gz"):
        assert main(["site", "install", kit, *units]) == 0
    for place in (state / "ward-1", witness_of(state / "ward-1").parent):
        os.chown(place, os.getuid(), os.getgid())  # whoever runs the tests charges
    return tmp_path


def witness_of(ward: Path) -> Path:
    """Where a kit has it, unless it names another place."""
    return ward.parents[1] / f"bouquet-witness/{ward.name}/head"


def charge(ward: Path, round: int = 0) -> ledger.Entry:
    own = Budget(ward, witness_of(ward), ward.name, Limits(0.0, DELTA, 0.0))
    return own.charge(RELEASE, PRIVACY, run="run", round=round, rule="fedit")


def walk(machine: Path, chosen: Callable[[str], bool]) -> None:
    """Run the page's commands on this machine; of units, see that they are there."""
    for command in filter(chosen, COMMANDS):
        here = re.sub(r"(?<= )/(?=etc|var)", f"{machine}/", command)
        program, action, *arguments = shlex.split(here)
        if program == "systemctl":
            assert action in {"stop", "start"}
            assert [unit for unit in arguments if not (machine / f"units/{unit}.service").exists()] == []
        else:
            subprocess.run([program, action, *arguments], cwd=machine, check=True, capture_output=True)


def restores(command: str) -> bool:
    return command.startswith("tar -xzf")


def files(machine: Path) -> dict[str, tuple[int, int, bytes]]:
    """Mode, owner and content of everything that lies in the places of the page."""
    found = sorted(file for place in PLACES for file in (machine / place).rglob("*"))
    return {
        str(file.relative_to(machine)): (
            file.stat().st_mode,
            file.stat().st_uid,
            file.read_bytes() if file.is_file() else b"",
        )
        for file in found
    }


def run(settings, directory: Path, rounds: int, **changes) -> str:
    """The digest of what a run of stub nodes ends with."""
    config = settings(
        **{"run-directory": str(directory), "num-server-rounds": rounds, "evaluation.every": 0, **changes}
    )
    conduct(StubGrid(2), Context(run_id=RUN_ID, node_id=1, node_config={}, state=RecordDict(), run_config=config))
    return json.loads((directory / config["run-name"] / "summary.json").read_text())["adapter_digest"]


def test_what_was_backed_up_is_put_back_and_the_run_goes_on(machine, settings, tmp_path):
    runs, ward = machine / "var/lib/bouquet/runs", machine / "var/lib/bouquet/ward-1"
    run(settings, runs, 2)
    Memory(ward, "run", "ward-1").clip = 2.0
    before = files(machine)
    walk(machine, lambda command: not restores(command))
    for place in PLACES:
        shutil.rmtree(machine / place)
    walk(machine, restores)
    assert files(machine) == before
    assert run(settings, runs, 4, resume=True) == run(settings, tmp_path / "other", 4, **{"run-name": "unbroken"})
    assert [line["round"] for line in lines(runs / "run") if line["phase"] == "merge"] == [1, 2, 3, 4]


def test_a_nodes_backup_has_no_ledger_and_leaves_the_one_that_is_there(machine):
    ward = machine / "var/lib/bouquet/ward-1"
    Memory(ward, "run", "ward-1").clip = 2.0
    charge(ward)
    walk(machine, lambda command: "ward-1" in command and not restores(command))
    with tarfile.open(machine / "ward-1-state.tar.gz") as tar:
        names = tar.getnames()
    assert any(name.endswith("runs/run/ward-1/clip") for name in names)
    assert any(name.endswith("etc/bouquet/ward-1/node.key") for name in names)
    assert [name for name in names if "ledger" in name or "witness" in name] == []
    Memory(ward, "run", "ward-1").clip = 3.0
    charge(ward, round=1)
    walk(machine, lambda command: "ward-1" in command and restores(command))
    assert Memory(ward, "run", "ward-1").clip == 2.0
    assert len(ledger.read(ward, witness_of(ward))) == 2
    assert charge(ward, round=2).number == 3

    # The disk of the state is lost, and the witness is not.
    shutil.rmtree(ward)
    walk(machine, lambda command: "ward-1" in command and restores(command))
    with pytest.raises(RefusalError, match=r"row 3\): expected digest .*, got 0 rows. What was spent is no longer"):
        charge(ward)


def test_a_ledger_out_of_another_copy_is_found_out(machine):
    """Of a snapshot of the whole disk, say, of which only the state was brought back."""
    ward, copy = machine / "var/lib/bouquet/ward-1", machine / "snapshot"
    charge(ward)
    shutil.copytree(machine / "var/lib/bouquet", copy)
    charge(ward, round=1)
    shutil.rmtree(machine / "var/lib/bouquet")
    copy.rename(machine / "var/lib/bouquet")
    with pytest.raises(RefusalError, match=r"row 2\): expected digest .*, got 1 rows. .*older copy forgets what"):
        charge(ward)


def test_the_witness_of_a_kit_lies_in_no_folder_that_is_backed_up(machine):
    node = machine / "hospitals/kits/ward-1/node.toml"
    assert main(["site", "kit", str(machine / "hospitals"), "ward-1", "data=/data/notes.jsonl"]) == 0
    witness = NodeConfig.read(node).witness
    assert witness == Path("/var/lib/bouquet-witness/ward-1/head")
    saved = {path for command in COMMANDS if command.startswith("tar -c") for path in re.findall(r" (/\S+)", command)}
    assert saved == {"/etc/bouquet/coordinator", "/var/lib/bouquet", "/etc/bouquet/ward-1", "/var/lib/bouquet/ward-1"}
    assert [path for path in saved if witness.is_relative_to(path)] == []
