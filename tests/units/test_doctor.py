"""`bouquet doctor`: every check passes where all is well, and says what to do where it is not."""

import json
import os
import re
import shutil
import socket
import ssl
import threading
from collections.abc import Iterator
from concurrent import futures
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import pytest
from flwr.supercore.grpc_health import run_health_server_grpc_no_tls

from common.config.node import NodeConfig
from common.error import BouquetError
from common.privacy import accounting
from deploy.command import main
from deploy.doctor import job, machine, network
from deploy.doctor.budget import budget
from deploy.doctor.check import Check, WarningError, examine
from deploy.doctor.installed import bundles, installed, units
from deploy.site import certificates
from deploy.site.folder import Site
from strategies import read_config
from tests.support.processes import UNPRIVILEGED, free_port


@pytest.fixture
def site(tmp_path) -> Path:
    folder = tmp_path / "hospitals"
    ports = ["--fleet-port", str(free_port()), "--control-port", str(free_port())]
    place = [
        "--user",
        UNPRIVILEGED,
        "--installed",
        str(tmp_path / "etc/coordinator"),
        "--state",
        str(tmp_path / "coordinator"),
    ]
    assert main(["site", "create", str(folder), "--address", "localhost", "--nodes", "ward-1", *ports, *place]) == 0
    data = tmp_path / "notes.jsonl"
    data.write_text("".join(json.dumps({"text": f"def f{i}(self):\n    return {i}\n"}) + "\n" for i in range(20)))
    own = [f"data={data}", f"state-directory={tmp_path / 'state'}", "--port", str(free_port())]
    own += ["--installed", str(tmp_path / "etc/ward-1"), "--user", UNPRIVILEGED, "--keys-user", UNPRIVILEGED]
    assert main(["site", "kit", str(folder), "ward-1", *own]) == 0
    for kit in (folder, folder / "kits/ward-1.tar.gz"):
        assert main(["site", "install", str(kit), "--units", str(tmp_path / "units")]) == 0
    return folder


@pytest.fixture
def kit(site, tmp_path) -> Path:
    """The kit as it is installed."""
    return tmp_path / "etc/ward-1"


@pytest.fixture
def superlink(site) -> Iterator[str]:
    """What answers with the site's certificate at the port for nodes, and refuses every call without a node's key."""

    class Refuses(grpc.GenericRpcHandler):
        def service(self, handler_call_details):
            return grpc.unary_unary_rpc_method_handler(
                lambda _, context: context.abort(grpc.StatusCode.UNAUTHENTICATED, "no key")
            )

    server = grpc.server(futures.ThreadPoolExecutor(1), handlers=[Refuses()])
    pair = [((site / "coordinator/server.key").read_bytes(), (site / "coordinator/server.crt").read_bytes())]
    address = f"localhost:{Site.open(site).facts.fleet_port}"
    server.add_secure_port(address, grpc.ssl_server_credentials(pair))
    server.start()
    yield address
    server.stop(None).wait(5)


@pytest.fixture
def stuck(site) -> Iterator[str]:
    """What accepts connections at the port for nodes, shakes hands, and serves nobody."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(site / "coordinator/server.crt", site / "coordinator/server.key")
    context.set_alpn_protocols(["h2"])
    port = Site.open(site).facts.fleet_port
    kept = []
    with socket.create_server(("127.0.0.1", port)) as server:

        def answer() -> None:
            while True:
                try:
                    kept.append(context.wrap_socket(server.accept()[0], server_side=True))
                except ssl.SSLError:
                    continue
                except OSError:
                    break
            for link in kept:
                link.close()

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        yield f"localhost:{port}"
        server.shutdown(socket.SHUT_RDWR)
        thread.join(5)


def serving(port: int) -> grpc.Server:
    """A process of Flower's that says it is healthy."""
    return run_health_server_grpc_no_tls(f"127.0.0.1:{port}")


def test_a_sound_node_passes_every_check(kit, superlink, capsys):
    assert main(["doctor", "node", str(kit)]) == 0, capsys.readouterr().out
    said = capsys.readouterr().out
    checks = [
        line.split()[1]
        for line in said.splitlines()
        if not line.startswith(("kit:", "coordinator:", "nodes:", "/", "installed", "start"))
    ]
    assert checks == [
        "versions",
        "clock",
        "disk",
        "installed",
        "units",
        "bundles",
        "key",
        "root",
        "port",
        "superlink",
        "quantisation",
        "model",
        "data",
        "policy",
        "budget",
        "memory",
        "traffic",
    ]
    assert "20 records, 20 examples" in said
    assert "492 kB up" in said


def test_a_sound_coordinator_passes_every_check_started_or_not(site, capsys, request):
    assert main(["doctor", "coordinator", str(site)]) == 0
    assert f"port {Site.open(site).facts.fleet_port} is free" in capsys.readouterr().out
    request.getfixturevalue("superlink")
    assert main(["doctor", "coordinator", str(site)]) == 0
    assert "answers, TLSv1.3" in capsys.readouterr().out


def test_a_failed_check_does_not_hide_the_others_and_sets_the_exit_code(kit, capsys):
    (kit / "node.key").chmod(0o644)
    assert main(["doctor", "node", str(kit)]) == 1
    said = capsys.readouterr().out.splitlines()
    (key,) = [line for line in said if line.split()[1] == "key"]
    assert key.startswith("FAIL")
    assert "a key that others can read" in key
    assert f"expected mode 600, got 644. chmod 600 {kit / 'node.key'}." in key
    assert [line for line in said if line.startswith("ok    traffic")]


def test_a_warning_is_not_a_failure(capsys):
    def soon() -> str:
        raise WarningError("a thing ends soon", cure="Renew it.")

    assert examine([Check("thing", soon)])
    assert capsys.readouterr().out == "warn  thing         a thing ends soon. Renew it.\n"


def test_other_versions_are_named(tmp_path):
    tested = tmp_path / "constraints.txt"
    tested.write_text("flwr==1.38.0\ntorch==2.13.0\n")
    with pytest.raises(BouquetError, match=r"got flwr 1.39.0 \(tested: 1.38.0\). pip install -c constraints.txt"):
        machine.versions(tested)


def test_a_quantisation_that_does_not_work_is_named():
    with pytest.raises(BouquetError, match=r"bitsandbytes does not work here \(cuda:7\).*See python -m bitsandbytes"):
        machine.quantisation(["cpu", "cuda:7"])


def test_a_full_or_closed_disk_is_named(tmp_path):
    with pytest.raises(BouquetError, match=r"the disk is nearly full .*Make room, or choose another state-directory"):
        machine.disk(tmp_path / "state", least=10**18)
    with pytest.raises(BouquetError, match=r"a state directory that cannot be written \(/proc/x\)"):
        machine.disk(Path("/proc/x"))


def test_a_missing_or_foreign_key_is_named(kit):
    (kit / "node.key").write_text("nothing")
    with pytest.raises(BouquetError, match=r"a key that Flower cannot use .*Unpack the kit again"):
        network.node_key(kit / "node.key", kit / "node.pub")
    (kit / "node.key").write_bytes(certificates.make_node_key()[0])
    with pytest.raises(BouquetError, match=r"a private key of another pair .*expected that of .*node.pub. Unpack the"):
        network.node_key(kit / "node.key", kit / "node.pub")
    (kit / "node.key").unlink()
    with pytest.raises(BouquetError, match=r"a key cannot be read .*got No such file"):
        network.node_key(kit / "node.key", kit / "node.pub")


def signed(folder: Path, days: int, addresses: list[str], ca: Path) -> Path:
    root = certificates.Signed((ca / "ca.crt").read_bytes(), (ca / "ca.key").read_bytes())
    file = folder / f"server-{days}.crt"
    file.write_bytes(certificates.issue(root, addresses, days).certificate)
    return file


def test_certificates_that_will_not_do_are_named(site, tmp_path):
    ca = site / "ca"
    with pytest.raises(BouquetError, match=r"an expired certificate .*Renew it: bouquet site rotate"):
        network.certificate(signed(tmp_path, 0, ["a"], ca), ca / "ca.crt")
    with pytest.raises(WarningError, match=r"a certificate ends soon .*got 9 days left. Renew it"):
        network.certificate(signed(tmp_path, 10, ["a"], ca), ca / "ca.crt")
    with pytest.raises(BouquetError, match=r"a certificate for other addresses .*expected b, got a, localhost"):
        network.certificate(signed(tmp_path, 100, ["a"], ca), ca / "ca.crt", ["a", "b"])
    other = certificates.make_authority("other", 100)
    (tmp_path / "other.crt").write_bytes(other.certificate)
    with pytest.raises(BouquetError, match=r"a certificate of another root .*signed by .*other.crt"):
        network.certificate(signed(tmp_path, 100, ["a"], ca), tmp_path / "other.crt")
    (tmp_path / "bad.crt").write_text("nothing")
    with pytest.raises(BouquetError, match=r"a certificate cannot be read .*Copy it again from the kit"):
        network.certificate(tmp_path / "bad.crt")


def test_a_clock_that_is_behind_is_named(site, monkeypatch):
    class Yesterday(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.now(UTC) - timedelta(days=2)

    monkeypatch.setattr(network, "datetime", Yesterday)
    with pytest.raises(BouquetError, match=r"a certificate from the future .*Set the clock"):
        network.certificate(site / "ca/ca.crt")


@pytest.mark.parametrize(
    ("answer", "raised", "message"),
    [
        ("#!/bin/sh\necho yes\n", None, "synchronised"),
        ("#!/bin/sh\necho no\n", WarningError, "the clock is not synchronised. timedatectl set-ntp true"),
        (None, WarningError, "nobody here knows whether the clock is right"),
    ],
)
def test_the_clock_is_asked_of_systemd(answer, raised, message, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path) + (os.pathsep + "/bin" if answer else ""))
    if answer:
        (tmp_path / "timedatectl").write_text(answer)
        (tmp_path / "timedatectl").chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.defpath}")
    if raised is None:
        assert machine.clock() == message
    else:
        with pytest.raises(raised, match=message):
            machine.clock()


def test_a_superlink_that_is_away_or_someone_elses_is_named(site, superlink, tmp_path):
    assert "TLSv1.3" in network.superlink(superlink, site / "ca/ca.crt")
    other = tmp_path / "other.crt"
    other.write_bytes(certificates.make_authority("other", 100).certificate)
    with pytest.raises(BouquetError, match=r"the SuperLink's certificate is refused .*unable to get local issuer"):
        network.superlink(superlink, other)
    with pytest.raises(BouquetError, match=r"the SuperLink cannot be reached .*refused. Is it started"):
        network.superlink(f"localhost:{free_port()}", site / "ca/ca.crt")


def test_a_superlink_that_listens_and_serves_nobody_is_named(site, stuck, monkeypatch):
    monkeypatch.setattr(network, "TIMEOUT", 1.0)
    with pytest.raises(BouquetError, match=r"something listens for nodes and serves nobody .*DEADLINE_EXCEEDED"):
        network.superlink(stuck, site / "ca/ca.crt")


def test_a_node_that_runs_already_is_asked_for_its_health(capsys):
    port = free_port()
    with socket.create_server(("127.0.0.1", port)):
        with pytest.raises(BouquetError, match=r"by one that no longer serves .*UNAVAILABLE"):
            network.healthy_or_free(port)
        server = serving(port + 1)
        try:
            assert network.healthy_or_free(port) == f"port {port} is in use, 127.0.0.1:{port + 1} serves"
            assert main(["doctor", "health", f"127.0.0.1:{port + 1}"]) == 0
        finally:
            server.stop(None).wait(5)
        assert main(["doctor", "health", f"127.0.0.1:{port + 1}"]) == 1
    assert "nobody says that it serves" in capsys.readouterr().out


def test_what_is_installed_is_looked_at(site, kit, tmp_path):
    assert str(kit) in installed(site / "kits/ward-1")
    (kit / "superexec.sh").write_text("")
    with pytest.raises(WarningError, match=r"what is installed is not the kit's and .*another superexec.sh"):
        installed(site / "kits/ward-1")
    (tmp_path / "state").chmod(0o755)
    with pytest.raises(BouquetError, match=r"a folder that is not kept for its user .*mode 755. sudo bouquet"):
        installed(kit)
    shutil.rmtree(tmp_path / "coordinator")
    with pytest.raises(BouquetError, match=r"a folder is missing .*coordinator"):
        installed(site / "coordinator")
    shutil.rmtree(kit)
    with pytest.raises(BouquetError, match=r"the kit is not installed here \(ward-1\)"):
        installed(site / "kits/ward-1")
    (tmp_path / "etc/coordinator/bundles.txt").write_text("0" * 64)
    with pytest.raises(BouquetError, match=r"this release may not run here .*got 1 other bundles. bouquet bundle >>"):
        bundles(site / "coordinator")


@pytest.mark.parametrize(
    ("place", "name", "mode"),
    [
        ("ward-1", "node.key", 0o600),
        ("ward-1", "superexec.secret", 0o640),
        ("ward-1", "superexec.sh", 0o755),
        ("ward-1", "policy.toml", 0o644),
        ("coordinator", "server.key", 0o600),
        ("coordinator", "superexec.secret", 0o600),
        ("coordinator", "nodes.json", 0o600),
    ],
)
def test_a_file_that_who_needs_it_cannot_use_is_named(place, name, mode, site, tmp_path):
    file = tmp_path / "etc" / place / name
    kit = site / "coordinator" if place == "coordinator" else tmp_path / "etc/ward-1"
    file.chmod(0o400)
    expected = rf"a file that is not as it was installed \({file}\): expected [\w-]+, mode {mode:o}, got .*mode 400"
    with pytest.raises(BouquetError, match=expected):
        installed(kit)
    file.chmod(mode)
    assert str(file.parent) in installed(kit)
    if os.getuid() == 0:
        os.chown(file, 12345, -1)
        with pytest.raises(BouquetError, match=rf"expected [\w-]+, mode {mode:o}, got user 12345, mode {mode:o}"):
            installed(kit)
    file.unlink()
    with pytest.raises(BouquetError, match=r"a file is missing"):
        installed(kit)


def test_units_that_are_not_the_kits_are_named(kit, tmp_path):
    folder = tmp_path / "units"
    assert units(kit, folder) == f"2 in {folder}"
    (folder / "bouquet-ward-1-supernode.service.d/egress.conf").write_text("[Service]\nIPAddressAllow=any\n")
    (folder / "bouquet-ward-1-superexec.service").unlink()
    wrong = "bouquet-ward-1-superexec.service, bouquet-ward-1-supernode.service.d/egress.conf"
    with pytest.raises(WarningError, match=rf"the units of this machine are not those .*none or another {wrong}"):
        units(kit, folder)


def test_the_coordinators_disk_is_where_its_state_lies(site, tmp_path, capsys):
    assert main(["doctor", "coordinator", str(site)]) == 0
    assert re.search(rf"^ok    disk .* free in {tmp_path}/coordinator$", capsys.readouterr().out, re.MULTILINE)


def test_a_port_in_use_is_named(site):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(BouquetError, match=rf"a port in use \(port {port}\).*Stop it"):
            network.port_is_free(port, "Stop it.")


def test_a_port_of_another_program_is_named(site):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        threading.Thread(target=lambda: taken.accept()[0].close(), daemon=True).start()
        with pytest.raises(BouquetError, match=r"a port in use by another program .*with another --fleet-port"):
            network.ours_or_free(taken.getsockname()[1], site / "ca/ca.crt")


BAD = [
    ('{"text": "fine"}\n{"text": \n', "got 1 of 2: .*notes.jsonl:2: a line is not JSON"),
    ('{"text": "fine"}\n\n{"text": [5]}\n', "notes.jsonl:3: a field is not a text .field 'text'.: .*got a list. Set"),
    ('{"txet": "fine"}\n', "needs a field that the data lacks .*Did you mean 'txet'?"),
    ('{"text": {}}\n' * 5, "got 5 of 5: .*notes.jsonl:3: a field is not a text .*got an object.*; and 2 more"),
]


@pytest.mark.parametrize(("text", "message"), BAD)
def test_bad_data_is_named_by_line(text, message, tmp_path):
    file = tmp_path / "notes.jsonl"
    file.write_text(text)
    with pytest.raises(BouquetError, match=message):
        job.data(read_config({}), NodeConfig(data=str(file)))


def test_records_that_say_whose_they_are_are_counted(tmp_path):
    file = tmp_path / "notes.jsonl"
    records = [{"text": f"note {n}", "patient": None if n < 3 else n // 2} for n in range(9)]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    node = NodeConfig(data=str(file))

    def said(unit: str) -> str:
        return job.data(read_config(PRIVATE | {"privacy.unit": unit}), node)

    assert said("patient").endswith("; 3 have no 'patient' and are left out")
    assert "left out" not in said("record")
    with pytest.raises(
        BouquetError,
        match=rf"no record says whose it is \({file}, privacy.unit\): expected the field 'pateint', got .*Name the",
    ):
        said("pateint")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('max-bytes = "20 MB"', "1 mistake in the policy {}: max-bytes: expected a whole number, got '20 MB' Correct"),
        ("max-bytes = 20", "bytes of an update: expected at most 20 (max-bytes), got about 491,520"),
        ("max-byte = 20", "max-byte: unknown key. Did you mean 'max-bytes'? Correct them in the file."),
        ("rules = [", "cannot be read ({}): expected a TOML file, got Invalid value (at end of document). Correct it"),
    ],
)
def test_a_policy_that_will_not_do_is_one_line(text, told, tmp_path, capsys):
    file = tmp_path / "policy.toml"
    file.write_text(text)
    assert not examine([Check("policy", lambda: job.policy(read_config({}), NodeConfig(policy=str(file))))])
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("FAIL  policy")
    assert told.format(file) in line


def test_a_witness_or_a_ledger_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for key, place in (("privacy-witness", "file/head"), ("state-directory", "file/state")):
        facts = {"state-directory": str(tmp_path / "state"), "records": 40, key: str(tmp_path / place)}
        with pytest.raises(
            BouquetError,
            match=r"folder of the node's cannot be written .*/file.*, which is a file\. Give it to that user",
        ):
            budget(read_config(PRIVATE), NodeConfig.from_flower(facts))
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_a_bad_label_is_named_by_line(tmp_path):
    file = tmp_path / "labels.jsonl"
    file.write_text('{"text": "a", "label": 1}\n{"text": "b", "label": 7}\n')
    config = read_config({"task.name": "classify"})
    with pytest.raises(BouquetError, match=r"labels.jsonl:2: a label is out of range .*from 0 to 1, got 7"):
        job.data(config, NodeConfig(data=str(file)))


def test_a_missing_model_is_named_with_the_command_that_gets_it():
    with pytest.raises(BouquetError, match=r"not on this machine .*hf download some/model --revision main"):
        job.model(read_config({"model.name": "some/model"}))


def test_a_folder_without_weights_is_named(tmp_path):
    with pytest.raises(BouquetError, match=r"a model without weights .*expected \*.safetensors. Download it again"):
        job.model(read_config({"model.name": str(tmp_path)}))


def test_too_little_memory_is_named():
    config = read_config({"train.batch-size": 65536, "task.max-length": 512})
    with pytest.raises(BouquetError, match=r"too little memory .*batch 65536, sequence 512.*Lower train.batch-size"):
        job.memory(config, NodeConfig())


def test_the_estimate_grows_with_batch_sequence_and_precision():
    def bytes_for(**changes: object) -> float:
        return job.estimate(read_config({key.replace("_", "."): value for key, value in changes.items()}), 8, gpu=True)

    small = bytes_for()
    assert bytes_for(**{"train.batch-size": 16}) > small
    assert bytes_for(**{"task.max-length": 256}) > small
    assert bytes_for(**{"model.quantization": "none"}) > bytes_for(**{"model.quantization": "int8"}) > small
    assert bytes_for(**{"model.gradient-checkpointing": True}) < small
    # An example is two rows.
    answers, pairs = (bytes_for(**{"task.max-length": 256, "task.name": name}) for name in ("instruct", "dpo"))
    assert pairs > answers


PRIVATE = {
    "privacy.mode": "example",
    "privacy.epsilon": 3.0,
    "privacy.accountant": "rdp",
    "privacy.expected-batch": 4,
    "train.steps": 2,
    "train.weighting": "uniform",
    "num-server-rounds": 4,
}


def test_the_budget_is_what_was_spent_and_what_the_run_will_cost(tmp_path):
    """To the figure that the ledger itself comes to, after the rounds that the doctor has foretold."""
    from client_app.budget import Budget, Limits

    file = tmp_path / "notes.jsonl"
    file.write_text("".join(json.dumps({"text": f"note {number}"}) + "\n" for number in range(40)))
    config = read_config(PRIVATE)
    facts = {"name": "ward-1", "data": str(file), "records": 40, "state-directory": str(tmp_path / "state")}
    node = NodeConfig.from_flower(facts)

    def limited(epsilon: float) -> NodeConfig:
        return node.model_copy(update={"privacy_epsilon": epsilon})

    said = budget(config, limited(3.0))
    assert said.endswith("at delta 1e-05 after the run, 0 before, of 3")
    release = accounting.plan(config.privacy, 40, 2, 4)
    own = Budget(node.ledger, node.witness, "ward-1", Limits(0.0, 1e-5, 0.0))
    for turn in range(4):
        entry = own.charge(release, config.privacy, run="first", round=turn, rule="fedit")
    assert f"epsilon {entry.epsilon:.4g} at delta" in said

    assert "; the node has no limit" in budget(config, node)
    with pytest.raises(
        WarningError,
        match=r"budget of this node will not last .*at most 3.5, got .*enough for [123] of 4 rounds. Lower",
    ):
        budget(config, limited(3.5))
    with pytest.raises(BouquetError, match=r"budget of this node is spent .*at most 2.9.*with one round. bouquet led"):
        budget(config, limited(2.9))
    for text, reason in (
        (
            "max-epsilon = 0.5",
            r"what one run may cost this node is spent \(privacy.max-epsilon\): expected at most 0.5",
        ),
        (
            "min-noise-multiplier = 50.0",
            r"the noise multiplier: expected 50 or more \(min-noise-multiplier\), got less",
        ),
    ):
        strict = tmp_path / "policy.toml"
        strict.write_text(f"[privacy]\n{text}\n")
        with pytest.raises(BouquetError, match=reason):
            budget(config, limited(20.0).model_copy(update={"policy": str(strict)}))
    with pytest.raises(BouquetError, match=r"a run without privacy on a node with a budget .*Set privacy.mode=example"):
        budget(read_config({}), limited(3.0))


def test_a_folder_that_is_no_kit_is_named(tmp_path, capsys):
    assert main(["doctor", "node", str(tmp_path)]) == 2
    assert "a kit cannot be read" in capsys.readouterr().err
