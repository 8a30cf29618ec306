"""Real Flower processes on this machine: a federation with TLS and node keys gives the adapter of the simulation."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from client_app import audit, worker
from common.privacy import accounting, ledger
from deploy.bundles import bundle
from deploy.flower import app_alone
from deploy.settings import read as settings_of
from deploy.simulation import one_program
from deploy.simulation.workers import Workers
from deploy.site.folder import Site
from deploy.site.superlink import statuses
from strategies import read_config
from tests.support.ports import free_port, free_ports
from tests.support.processes import CORES, Federation, Process, bouquet, federation, simulate, wait_for

NODES = 3
SMALL = (
    "data.limit=40 lora.rank=32 train.steps=2 train.batch-size=4 evaluation.limit=8 "
    f'evaluation.prompt="" round.deadline=240.0 min-nodes={NODES}'
)
# A is drawn on both sides, at a rank from which on a decomposition would depend on the threads.
SETTINGS = f'num-server-rounds=1 rule.name="ffa-lora" {SMALL}'

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wards(tmp_path_factory) -> Iterator[Federation]:
    folder = tmp_path_factory.mktemp("federation")
    with federation(folder, NODES, own) as running:
        yield running


def own(node: int) -> list[str]:
    """The settings of a node. The first starts a process for each message, the others keep a warm worker."""
    return [f"partition-id={node}", f"num-partitions={NODES}", *(["warm=600.0"] if node else [])]


def test_a_federation_over_grpc_gives_the_simulations_adapter(wards, tmp_path):
    """And that of a run in one program, though the coordinator has other threads and instructions than any of them."""
    runs = tmp_path / "runs"
    run = wards.submit("deployed", SETTINGS, runs)
    assert wards.wait(run) == "finished:completed", (wards.folder / "superexec.log").read_text()[-4000:]
    deployed = json.loads((runs / "deployed/summary.json").read_text())
    simulated = simulate(tmp_path / "user", NODES, SETTINGS, runs, "simulated")
    own = settings_of(SETTINGS.split()) | {"run-name": "in-one-program"}
    with Workers(NODES, CORES, 0.0) as workers:
        assert one_program.simulate(workers, NODES, runs, own) == 0
    together = json.loads((runs / "in-one-program/summary.json").read_text())
    assert deployed["adapter_digest"] == simulated["adapter_digest"] == together["adapter_digest"]
    assert simulated["after"] == together["after"]
    assert deployed["after"]["all"] < deployed["before"]["all"]
    (start,) = [event for event in _events(runs / "deployed") if event["phase"] == "start"]
    assert start["names"] == "proven"
    assert (deployed["bytes_up"], deployed["bytes_down"]) == (simulated["bytes_up"], simulated["bytes_down"])
    # What Flower says besides: heartbeats, and asking for messages.
    assert wards.wire.up == pytest.approx(deployed["bytes_up"], abs=400_000)
    assert wards.wire.down - NODES * wards.bundle_bytes() == pytest.approx(deployed["bytes_down"], abs=400_000)


def test_code_that_a_node_does_not_know_never_runs_there(wards, tmp_path):
    """Bouquet with one line more, which would leave a trace: it is refused as bytes, before anything is imported."""
    trace = tmp_path / "trace"
    settings = f'{SETTINGS} round.wait=5.0 run-directory="{tmp_path}"'
    with app_alone() as app:
        with (app / "client_app/app.py").open("a") as file:
            file.write(f"\nopen({str(trace)!r}, 'w').close()\n")
        assert wards.wait(wards.start_run(app, f'{settings} run-name="unknown"')) == "finished:failed"
        assert not (tmp_path / "unknown").exists(), "the coordinator's own list"
        wards.allow("coordinator", app=app)
        unknown = bundle.of_app(app)
        assert wards.wait(wards.start_run(app, f'{settings} run-name="foreign"')) == "finished:failed"
    assert "a bundle that is not allowed here" in wards.log("node-000").read_text()
    assert unknown in wards.log("node-000").read_text(), "by its digest"
    assert not trace.exists()
    assert '"during": "roll call"' in (tmp_path / "foreign/metrics.jsonl").read_text()


def test_only_a_registered_node_with_the_right_root_gets_in(wards, tmp_path):
    """No key, another site's root, another site's key, and a key that is in use already."""
    wait_for(lambda: _statuses(wards, "node-000") == "online", "the node that has the key", pause=1.0)
    other = tmp_path / "other"
    bouquet("site", "create", str(other), "--address", "127.0.0.1", "--nodes", "stranger")
    root, key = wards.site / "ca/ca.crt", wards.site / "kits/node-000/node.key"
    attempts = {
        "no key": (root, None),
        "wrong root": (other / "ca/ca.crt", key),
        "unknown key": (root, other / "kits/stranger/node.key"),
        "key in use": (root, key),
    }
    running = {name: _supernode(wards, tmp_path / f"{name}.log", *attempt) for name, attempt in attempts.items()}
    try:
        for name, process in running.items():
            wait_for(lambda process=process: process.popen.poll() is not None, f"{name} to be refused")
            assert process.popen.returncode != 0, process.log.read_text()
    finally:
        for process in running.values():
            process.stop()
    assert "CERTIFICATE_VERIFY_FAILED" in running["wrong root"].log.read_text()


def test_a_revoked_node_is_shut_out_and_a_rotated_key_comes_back(wards):
    first, second = wards.nodes["node-001"], wards.nodes["node-002"]
    bouquet("site", "revoke", str(wards.site), "node-002")
    wait_for(lambda: second.popen.poll() is not None, "the revoked node to be shut out", 90)
    second.start()
    wait_for(lambda: second.popen.poll() is not None, "the revoked node to be refused")
    assert second.popen.returncode != 0

    first.stop()
    bouquet("site", "rotate", str(wards.site), "node-001")
    bouquet("site", "register", str(wards.site))
    first.start()
    wait_for(lambda: "online" in _statuses(wards, "node-001"), "the node with the new key", pause=3.0)


@pytest.mark.exhaustive
def test_a_node_whose_budget_is_spent_leaves_the_run_over_grpc(wards, tmp_path):
    private = {"privacy.mode": "example", "privacy.accountant": "rdp", "privacy.expected-batch": 8}
    private |= {"rule.name": "fed-sb", "train.weighting": "uniform", "privacy.records": 400, "data.partition": "iid"}
    trained_on, steps, rounds = 40, 2, 2  # data.limit of the 400
    release = accounting.plan(read_config(private).privacy, trained_on, steps, rounds)
    once, twice = (accounting.epsilon([release] * turns, 1e-5, "rdp") for turns in (1, 2))
    allowed = 'rules = ["fed-sb"]\nmodels = ["embedded"]\nparts = ["R"]\n[task]\nname = "text"\n'
    (tmp_path / "policy.toml").write_text(allowed + '[privacy]\nmodes = ["example"]\n')
    state = tmp_path / "state"
    bouquet("site", "add", str(wards.site), "frugal")
    limits = [f"privacy-epsilon={(once + twice) / 2}", f"policy={tmp_path}/policy.toml", f"state-directory={state}"]
    place = ["--port", str(free_ports(2)), "partition-id=2", "num-partitions=3", "warm=600.0"]
    bouquet("site", "kit", str(wards.site), "frugal", *place, *limits)
    wards.allow("kits/frugal")
    bouquet("site", "register", str(wards.site))
    node = Process([str(wards.site / "kits/frugal/start.sh")], tmp_path / "frugal.log")
    try:
        wait_for(lambda: "online" in _statuses(wards, "frugal"), "the frugal node", pause=3.0)
        asked = " ".join(f"{key}={json.dumps(value)}" for key, value in private.items())
        settings = f"num-server-rounds={rounds} evaluation.every=0 {SMALL} {asked}"
        run = wards.submit("private", settings, tmp_path / "runs")
        assert wards.wait(run) == "finished:completed", (wards.folder / "superexec.log").read_text()[-4000:]
    finally:
        node.stop()
        worker.stop(state)
    events = _events(tmp_path / "runs/private")
    whole, rest = [event["nodes"] for event in events if event["phase"] == "merge"]
    assert rest == whole - 1 >= 2
    (refused,) = [event for event in events if event["phase"] == "failure"]
    assert (refused["node"], refused["round"]) == ("frugal", 2)
    assert refused["reason"].startswith("the privacy budget of this node is spent")
    (row,) = ledger.read(state, Path(f"{state}.witness/head"))
    assert (row.run, row.round, row.release, row.epsilon) == ("private", 1, release, once)
    bouquet("ledger", "--directory", str(state), "--witness", f"{state}.witness/head", "verify")
    sent = [json.loads(line) for line in audit.path(state).read_text().splitlines()]
    assert [line["epsilon"] for line in sent if line["tensors"]] == [once]


def _events(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def _supernode(wards: Federation, log: Path, root: Path, key: Path | None) -> Process:
    authentication = ["--auth-supernode-private-key", str(key)] if key else []
    command = ["flower-supernode", "--superlink", f"127.0.0.1:{wards.fleet}", "--root-certificates", str(root)]
    return Process([*command, *authentication, "--port", str(free_port()), "--max-retries", "1"], log)


def _statuses(wards: Federation, name: str) -> str:
    site = Site.open(wards.site)
    return statuses(site).get(site.facts.nodes[name].id, "")
