"""Certificates, keys and kits: who can read them, what they say, and that they stay where they belong."""

import json
import os
import pwd
import re
import shutil
import subprocess
import tarfile
import tomllib
import zipfile
from datetime import UTC, datetime, timedelta
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key

from common.config import roster
from common.config.node import NodeConfig
from common.config.roster import Registered
from common.error import BouquetError
from deploy.command import main
from deploy.flower import environment, program
from deploy.site.certificates import addresses_of, read_certificate
from deploy.site.folder import Site
from tests.support import ROOT
from tests.support.processes import UNPRIVILEGED, free_port

PRIVATE = re.compile(rb"BEGIN [A-Z ]*PRIVATE KEY")


@pytest.fixture
def site(tmp_path) -> Path:
    folder = tmp_path / "hospitals"
    create = ["site", "create", str(folder), "--address", "fl.example.org", "10.0.0.7", "--nodes", "ward-1", "ward-2"]
    assert main([*create, "--state", str(tmp_path / "state"), "--control-port", str(free_port())]) == 0
    return folder


def kit(site: Path, *settings: str, node: str = "ward-1") -> Path:
    assert main(["site", "kit", str(site), node, "data=/data/notes.jsonl", *settings]) == 0
    return site / "kits" / node


def refused(capsys, *arguments: object) -> str:
    assert main(["site", *map(str, arguments)]) == 2
    return capsys.readouterr().err


def test_the_certificate_is_for_every_address_and_signed_by_the_root(site):
    root, server = read_certificate(site / "ca/ca.crt"), read_certificate(site / "coordinator/server.crt")
    server.verify_directly_issued_by(root)
    assert addresses_of(server) == ["fl.example.org", "10.0.0.7", "localhost", "127.0.0.1"]
    assert root.extensions.get_extension_for_class(x509.BasicConstraints).value == x509.BasicConstraints(True, 0)
    assert not server.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert timedelta(days=824) < server.not_valid_after_utc - datetime.now(UTC) < timedelta(days=825)


def test_openssl_accepts_the_chain(site):
    chain = ["-CAfile", site / "ca/ca.crt", site / "coordinator/server.crt"]
    found = subprocess.run(
        ["openssl", "verify", "-x509_strict", "-verify_hostname", "fl.example.org", *chain], capture_output=True
    )
    assert found.returncode == 0, found.stderr


def test_private_keys_are_their_owners_alone_and_each_in_one_place(site):
    kit(site)
    found = {
        file.relative_to(site).as_posix(): file
        for file in site.rglob("*")
        if file.is_file() and PRIVATE.search(file.read_bytes())
    }
    assert set(found) == {
        "ca/ca.key",
        "coordinator/server.key",
        "kits/ward-1/node.key",
        "kits/ward-2/node.key",
    }
    secret = [*found.values(), site / "coordinator/superexec.secret", site / "site.json", site / "kits/ward-1.tar.gz"]
    assert {file.stat().st_mode & 0o777 for file in secret} == {0o600}
    assert {folder.stat().st_mode & 0o077 for folder in (site, site / "ca", site / "kits/ward-1")} == {0}


def test_a_kit_holds_what_its_node_needs_and_nothing_of_others(site, tmp_path):
    folder = kit(site, "lora-rank=4", "state-directory=/srv/bouquet")
    with tarfile.open(site / "kits/ward-1.tar.gz") as tar:
        modes = {member.name: member.mode for member in tar}
    (tmp_path / "there").mkdir()
    subprocess.run(["tar", "-xf", site / "kits/ward-1.tar.gz", "-C", tmp_path / "there"], check=True)
    assert modes == {
        "ward-1/bouquet-ward-1-superexec.service": 0o644,
        "ward-1/bouquet-ward-1-supernode.service": 0o644,
        "ward-1/ca.crt": 0o644,
        "ward-1/compose.yaml": 0o644,
        "ward-1/kit.toml": 0o644,
        "ward-1/kubernetes.yaml": 0o644,
        "ward-1/node.key": 0o600,
        "ward-1/node.pub": 0o644,
        "ward-1/node.toml": 0o644,
        "ward-1/policy.toml": 0o644,
        "ward-1/start.sh": 0o755,
        "ward-1/superexec.sh": 0o755,
        "ward-1/supernode.sh": 0o755,
    }
    key = load_ssh_private_key((tmp_path / "there/ward-1/node.key").read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    node = NodeConfig.from_flower(tomllib.loads((folder / "node.toml").read_text()))
    assert (node.name, node.data, node.lora_rank, node.state_directory) == (
        "ward-1",
        "/data/notes.jsonl",
        4,
        "/srv/bouquet",
    )
    start = (folder / "supernode.sh").read_text()
    assert "--superlink fl.example.org:9092 --root-certificates ca.crt" in start
    for script in ("start.sh", "supernode.sh", "superexec.sh"):
        assert subprocess.run(["sh", "-n", folder / script]).returncode == 0


def test_no_key_goes_into_the_app_bundle(tmp_path):
    """Not even one that was put among the sources."""
    source = tmp_path / "app"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".git", ".venv", "runs", "__pycache__", ".*_cache"))
    for place in ("site", "common/site", "client_app/site"):
        assert main(["site", "create", str(source / place), "--address", "127.0.0.1", "--nodes", "ward-1"]) == 0
        kit(source / place)
    subprocess.run([program("flwr"), "build"], cwd=source, env=environment({}), capture_output=True, check=True)
    (bundle,) = source.glob("*.fab")
    with zipfile.ZipFile(bundle) as packed:
        assert "common/wire/message.py" in packed.namelist()
        assert [name for name in packed.namelist() if PRIVATE.search(packed.read(name))] == []
        assert not [name for name in packed.namelist() if name.endswith((".key", ".secret", ".tar.gz", ".crt"))]


def test_rotation_replaces_the_key_and_the_old_one_never_comes_back(site, tmp_path, capsys):
    old = Site.open(site).facts.nodes["ward-1"].public_key
    assert main(["site", "rotate", str(site), "ward-1"]) == 0
    facts = Site.open(site).facts
    assert facts.nodes["ward-1"].public_key != old
    assert facts.revoked == [old]
    (tmp_path / "old.pub").write_text(old)
    assert "a revoked key (ward-3). Make a new one." in refused(
        capsys, "add", site, "ward-3", "--public-key", tmp_path / "old.pub"
    )


def test_what_stays_of_a_revoked_node_is_its_public_key_and_its_kit(site, tmp_path, capsys):
    key = Site.open(site).facts.nodes["ward-2"].public_key
    kit(site, node="ward-2")
    Site.open(site).revoke("ward-2")
    assert Site.open(site).facts.revoked == [key]
    assert "ward-2" not in Site.open(site).facts.nodes
    assert (site / "kits/ward-2/node.key").exists()
    (tmp_path / "old.pub").write_text(key)
    again = ("add", site, "ward-2", "--public-key", tmp_path / "old.pub")
    assert "a revoked key (ward-2). Make a new one." in refused(capsys, *again)


def test_the_coordinators_door_for_flwr_opens_to_its_own_machine_only(site):
    started = (site / "coordinator/superlink.sh").read_text()
    assert re.search(r"--host 127\.0\.0\.1 --port \d+", started)
    assert '--fleet-api-address "${BOUQUET_LISTEN:-[::]:9092}"' in started


def test_a_new_certificate_comes_from_the_same_root(site):
    before = (site / "coordinator/server.crt").read_bytes(), (site / "ca/ca.crt").read_bytes()
    assert main(["site", "rotate", str(site), "--days", "30"]) == 0
    assert (site / "coordinator/server.crt").read_bytes() != before[0]
    assert (site / "ca/ca.crt").read_bytes() == before[1]
    read_certificate(site / "coordinator/server.crt").verify_directly_issued_by(read_certificate(site / "ca/ca.crt"))


def test_a_node_may_keep_its_private_key_to_itself(site, tmp_path, capsys):
    subprocess.run(["ssh-keygen", "-q", "-t", "ecdsa", "-b", "384", "-N", "", "-f", tmp_path / "own"], check=True)
    assert main(["site", "add", str(site), "ward-3", "--public-key", str(tmp_path / "own.pub")]) == 0
    assert not (kit(site, node="ward-3") / "node.key").exists()
    twice = refused(capsys, "add", site, "ward-4", "--public-key", tmp_path / "own.pub")
    assert "two nodes with one key (ward-4, ward-3). Give each its own." in twice


def test_mistakes_are_named(site, tmp_path, capsys):
    (tmp_path / "rsa.pub").write_text("not a key")
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / "ed"], check=True)
    add = ("add", site, "ward-3", "--public-key")
    assert "a public key cannot be read" in refused(capsys, *add, tmp_path / "rsa.pub")
    assert "a public key of another kind" in refused(capsys, *add, tmp_path / "ed.pub")
    assert "there is a node of this name (ward-1)" in refused(capsys, "add", site, "ward-1")
    assert "a node's name that cannot be used" in refused(capsys, "add", site, "../ward")
    assert "Did you mean 'ward-1'?" in refused(capsys, "revoke", site, "ward1")
    assert "there is a site already" in refused(capsys, "create", site, "--address", "a")
    assert "there is no site" in refused(capsys, "list", tmp_path / "nowhere")
    assert "a path that is not absolute (ward-1, data)" in refused(capsys, "kit", site, "ward-1", "data=notes.jsonl")
    inside = ("state-directory=/srv/x", "privacy-witness=/srv/x/head")
    assert "privacy-witness: expected a file outside the state-directory /srv/x" in refused(
        capsys, "kit", site, "ward-1", *inside
    )
    assert "lora-rnak: unknown key. Did you mean 'lora-rank'?" in refused(capsys, "kit", site, "ward-1", "lora-rnak=4")
    assert "an address that cannot be used" in refused(capsys, "create", tmp_path / "x", "--address", "a b")
    (site / "site.json").write_text("{")
    assert "a site cannot be read" in refused(capsys, "list", site)


def test_a_superlink_that_is_not_there_is_named_with_its_cure(site, capsys):
    message = refused(capsys, "register", site)
    assert "the SuperLink refused 'flwr supernode list' (127.0.0.1:" in message
    assert "Start the coordinator (coordinator/superlink.sh), or reach it: ssh -L" in message


def test_a_federation_that_does_not_exist_is_named_by_flower(site):
    own = environment({"FLWR_HOME": str(site / "flower")})
    run = subprocess.run([program("flwr"), "run", ROOT, "hospital"], env=own, capture_output=True, text=True)
    assert run.returncode != 0
    assert "SuperLink connection 'hospital' not found" in " ".join((run.stdout + run.stderr).replace("│", " ").split())


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd-analyze is not here")
def test_systemd_accepts_the_units_and_finds_little_exposed(site, tmp_path):
    folder = site / "kits/ward-2"
    place = ["--programs", "/usr/bin", "--user", "daemon", "--installed"]
    assert main(["site", "kit", str(site), "ward-2", *place, str(folder), "data=/data"]) == 0
    other = tmp_path / "other"
    create = ["site", "create", str(other), "--address", "127.0.0.1", *place, str(other / "coordinator")]
    assert main(create) == 0
    units = [*folder.glob("*.service"), *(other / "coordinator").glob("*.service")]
    assert len(units) == 4
    verified = subprocess.run(["systemd-analyze", "verify", *units], capture_output=True, text=True)
    assert (verified.returncode, verified.stderr) == (0, "")
    for unit in units:
        judged = subprocess.run(
            ["systemd-analyze", "security", "--offline=true", "--threshold=30", "--no-pager", unit],
            capture_output=True,
            text=True,
        )
        assert judged.returncode == 0, judged.stdout[-400:]


def test_the_node_s_key_and_the_code_of_runs_have_users_of_their_own(site):
    folder = kit(site)
    keys, code = (
        (folder / f"bouquet-ward-1-{part}.service").read_text().splitlines() for part in ("supernode", "superexec")
    )
    assert "User=bouquet-keys" in keys
    assert "User=bouquet" in code
    assert not [line for line in code if "node.key" in line]
    assert "node.key" not in (folder / "superexec.sh").read_text()
    for unit in (keys, code):
        assert "IPAddressDeny=any" in unit
        assert "IPAddressAllow=localhost" in unit
        assert {"Restart=always", "StartLimitIntervalSec=0"} <= {*unit}, "tried again until the SuperLink lets it in"


def test_compose_files_name_buildable_images_and_keep_secrets_apart(site):
    for file in (kit(site) / "compose.yaml", site / "coordinator/compose.yaml"):
        services = yaml.safe_load(file.read_text())["services"]
        for name, service in services.items():
            image = service["image"].split(":")[0].removeprefix("bouquet-")
            dockerfile = (ROOT / f"deploy/images/{image}.Dockerfile").read_text()
            assert "--constraint constraints.txt" in dockerfile
            assert dockerfile.rstrip().endswith("USER bouquet")
            assert service["read_only"]
            assert service["cap_drop"] == ["ALL"]
            assert all(place.endswith(":ro") for place in service["volumes"] if ":/kit" in place)
            assert name == "supernode" or not [place for place in service["volumes"] if "node.key" in place]
        assert "superexec" in services


def test_a_container_has_as_many_gpus_as_the_node_names(site):
    for device, gpus in (("auto", 1), ("cuda:1", 1), ("cuda:0,cuda:1", 2), ("cuda:0+cuda:1,cuda:2+cuda:3", 4)):
        folder = kit(site, f"device={device}")
        compose = yaml.safe_load((folder / "compose.yaml").read_text())["services"]["superexec"]
        (reserved,) = compose["deploy"]["resources"]["reservations"]["devices"]
        workload = next(yaml.safe_load_all((folder / "kubernetes.yaml").read_text()))
        _, code = workload["spec"]["template"]["spec"]["containers"]
        assert reserved["count"] == code["resources"]["limits"]["nvidia.com/gpu"] == gpus


def test_the_kubernetes_manifests_fit_the_schema_and_keep_secrets_out(site):
    """Read by the published schema; not one cluster has run them."""
    image = "registry.example.org/bouquet-node@sha256:" + "0" * 64
    folders = {"ward-1": kit(site, "--port", "9123", "--image", image), "coordinator": site / "coordinator"}
    for folder in folders.values():
        text = (folder / "kubernetes.yaml").read_text()
        assert not PRIVATE.search(text.encode())
        documents = list(yaml.safe_load_all(text))
        for document in documents:
            kubernetes_validate.validate(document, "1.32", strict=True)
        (workload,) = [document for document in documents if document["kind"] == "StatefulSet"]
        assert workload["spec"]["replicas"] == 1
        pod = workload["spec"]["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"]
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        claims = {claim["metadata"]["name"] for claim in workload["spec"]["volumeClaimTemplates"]}
        assert not [volume for volume in pod["volumes"] if "hostPath" in volume]
        assert volumes["kit"]["secret"]["defaultMode"] == 0o440
        for container in (*pod["containers"], *pod.get("initContainers", [])):
            assert {mount["name"] for mount in container["volumeMounts"]} <= {*volumes, *claims}
            assert container["securityContext"]["readOnlyRootFilesystem"]
            assert container["resources"]["limits"]["memory"]
        for container in pod["containers"]:
            assert (folder / container["command"][1].removeprefix("/kit/")).exists()
            ports = {port["containerPort"] for port in container["ports"]}
            assert {container[probe]["grpc"]["port"] for probe in ("startupProbe", "livenessProbe")} <= ports
    documents = list(yaml.safe_load_all((folders["ward-1"] / "kubernetes.yaml").read_text()))
    link, code = documents[0]["spec"]["template"]["spec"]["containers"]
    assert {link["image"], code["image"]} == {image}
    assert code["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert (link["livenessProbe"]["grpc"]["port"], code["livenessProbe"]["grpc"]["port"]) == (9124, 9125)
    assert [mount["mountPath"] for mount in code["volumeMounts"] if mount["name"] == "data"] == ["/data"]
    assert {mount["name"] for mount in code["volumeMounts"]}.isdisjoint({"link"}), "the key is the SuperNode's alone"
    assert documents[1]["spec"]["egress"][1]["ports"] == [{"port": 9092, "protocol": "TCP"}]


@pytest.mark.skipif(not shutil.which("hadolint"), reason="hadolint is not here")
@pytest.mark.parametrize("name", ["coordinator", "node"])
def test_hadolint_accepts_the_dockerfiles(name):
    file = ROOT / f"deploy/images/{name}.Dockerfile"
    # Versions of Debian packages are the base image's.
    linted = subprocess.run(["hadolint", "--ignore", "DL3008", file], capture_output=True, text=True)
    assert linted.returncode == 0, linted.stdout


def test_the_coordinator_is_told_which_name_and_weight_go_with_a_key(site, capsys, monkeypatch):
    """Written whenever the site changes; what has no id at the SuperLink yet is not in it."""
    file = site / "coordinator/nodes.json"
    assert json.loads(file.read_text()) == {}
    opened = Site.open(site)
    for number, name in enumerate(("ward-1", "ward-2"), start=7):
        opened.node(name).id = number
    opened.save()
    assert main(["site", "weigh", str(site), "ward-2", "1200"]) == 0
    assert main(["site", "rotate", str(site), "ward-2"]) == 0
    assert Site.open(site).node("ward-2").weight == 1200, "a new key is the same node"
    opened = Site.open(site)
    opened.node("ward-2").id = 9
    opened.save()
    monkeypatch.setenv(roster.VARIABLE, str(file))
    known = roster.of_this_site()
    assert known == {7: Registered(name="ward-1"), 9: Registered(name="ward-2", weight=1200)}
    capsys.readouterr()
    assert "a weight that cannot be used (ward-1): expected a number above 0" in refused(
        capsys, "weigh", site, "ward-1", -1
    )
    assert "a node's name that means something else (all)" in refused(capsys, "add", site, "all")
    file.write_text("{")
    with pytest.raises(BouquetError, match="the site's nodes cannot be read"):
        roster.of_this_site()


@pytest.fixture
def nearby(tmp_path) -> Path:
    """A site whose address can be resolved here."""
    folder = tmp_path / "nearby"
    assert main(["site", "create", str(folder), "--address", "127.0.0.1", "--nodes", "ward-1"]) == 0
    return folder


@pytest.fixture
def place(tmp_path) -> list[str]:
    """Where the kit of these tests goes, for users that are there and may do nothing."""
    return ["--user", UNPRIVILEGED, "--keys-user", UNPRIVILEGED, "--installed", str(tmp_path / "etc/ward-1")]


def test_a_kit_from_somebody_else_names_nothing_that_root_would_run(nearby, place, tmp_path, capsys):
    """A hostile site: units and scripts of its own, lines in its facts, folders and users that are not the node's."""
    own = [f"state-directory={tmp_path}/state"]
    assert main(["site", "kit", str(nearby), "ward-1", *place, *own]) == 0
    kit, units, there = nearby / "kits/ward-1", tmp_path / "units", tmp_path / "etc/ward-1"
    facts = (kit / "kit.toml").read_text()
    assert "cannot be resolved (nowhere.invalid:9092)" in _elsewhere(kit, units, capsys)
    (kit / "kit.toml").write_text(facts)
    (kit / "evil.service").write_text("[Service]\nUser=root\nExecStart=/bin/sh\n")
    (kit / "supernode.sh").write_text("#!/bin/sh\nid >/tmp/evil\n")
    (kit / "bouquet-ward-1-supernode.service").write_text("[Service]\nExecStart=/bin/sh\n")
    assert main(["site", "install", str(kit), "--units", str(units)]) == 0
    assert sorted(unit.name for unit in units.glob("*.service")) == [
        "bouquet-ward-1-superexec.service",
        "bouquet-ward-1-supernode.service",
    ]
    assert "evil" not in (there / "supernode.sh").read_text()
    assert f"User={UNPRIVILEGED}" in (units / "bouquet-ward-1-supernode.service").read_text().splitlines()
    assert not (there / "evil.service").exists()
    busy = tmp_path / "busy"
    busy.mkdir()
    (busy / "file").write_text("somebody's")
    for change, message in (
        ((f'user = "{UNPRIVILEGED}"', 'user = "root"'), "a kit for root"),
        ((f'user = "{UNPRIVILEGED}"', 'user = "daemon\\nExecStartPre=/bin/sh"'), "a kit cannot be read"),
        ((f'state = "{tmp_path}/state"', 'state = "/srv/../etc"'), "a kit cannot be read"),
        ((f'state = "{tmp_path}/state"', f'state = "{tmp_path}/a b"'), "a kit cannot be read"),
        ((f'installed = "{there}"', f'installed = "{busy}"'), "a folder that is in use"),
    ):
        (kit / "kit.toml").write_text(facts.replace(*change))
        assert (kit / "kit.toml").read_text() != facts
        assert message in refused(capsys, "install", kit, "--units", units), message
    assert (busy / "file").exists()


def test_an_installed_kit_keeps_what_is_the_machines_own_and_its_secrets(nearby, place, tmp_path, capsys):
    own = [f"state-directory={tmp_path}/state"]
    assert main(["site", "kit", str(nearby), "ward-1", *place, *own]) == 0
    install = ["site", "install", str(nearby / "kits/ward-1.tar.gz"), "--units", str(tmp_path / "units")]
    assert main(install) == 0
    there = tmp_path / "etc/ward-1"
    (there / "policy.toml").write_text('rules = ["ffa-lora"]\n')
    secret, bundles = (there / "superexec.secret").read_bytes(), (there / "bundles.txt").read_text()
    egress = tmp_path / "units/bouquet-ward-1-supernode.service.d/egress.conf"
    assert egress.read_text() == "[Service]\nIPAddressAllow=127.0.0.1\n", "the SuperLink's address, and no other"
    ours = [there / name for name in ("supernode.sh", "superexec.sh", "policy.toml", "bundles.txt")]
    assert {file.stat().st_uid for file in ours} == {os.getuid()}, "not the user's who runs the code of runs"
    assert {file.stat().st_mode & 0o022 for file in ours} == {0}
    assert main(["site", "kit", str(nearby), "ward-1", *place, *own, "lora-rank=4"]) == 0
    capsys.readouterr()
    assert main(install) == 0
    assert "kept node.toml, policy.toml: they are this machine's own" in capsys.readouterr().out
    assert (there / "policy.toml").read_text() == 'rules = ["ffa-lora"]\n'
    assert "lora-rank" not in (there / "node.toml").read_text()
    assert ((there / "superexec.secret").read_bytes(), (there / "bundles.txt").read_text()) == (secret, bundles)
    assert (there / "superexec.secret").stat().st_mode & 0o777 == 0o640
    assert (there / "node.key").stat().st_mode & 0o777 == 0o600


def test_a_kit_of_another_site_node_or_root_takes_no_place_unless_told(nearby, place, tmp_path, capsys):
    own = [f"state-directory={tmp_path}/state", "--programs", "/tmp/evil/bin"]
    assert main(["site", "kit", str(nearby), "ward-1", *place, *own]) == 0
    kit, there = nearby / "kits/ward-1", tmp_path / "etc/ward-1"
    facts, root = (kit / "kit.toml").read_text(), (kit / "ca.crt").read_bytes()
    install = ["install", kit, "--units", tmp_path / "units"]
    assert main(["site", *map(str, install)]) == 0
    assert "/tmp/evil" not in (there / "kit.toml").read_text()
    assert "/tmp/evil" not in (tmp_path / "units/bouquet-ward-1-supernode.service").read_text()
    for change, message in (
        (('site = "nearby"', 'site = "far"'), "expected ward-1 of nearby, by the same root, got ward-1 of far. If it"),
        (('name = "ward-1"', 'name = "ward-2"'), "by the same root, got ward-2 of nearby. If it"),
    ):
        (kit / "kit.toml").write_text(facts.replace(*change))
        assert message in refused(capsys, *install)
    (kit / "kit.toml").write_text(facts)
    (kit / "ca.crt").write_bytes(root + b"\n")
    assert "got ward-1 of nearby, by another root. If it is to take" in refused(capsys, *install)
    assert (there / "ca.crt").read_bytes() == root
    assert main(["site", *map(str, install), "--replace"]) == 0
    assert (there / "ca.crt").read_bytes() != root


@pytest.mark.skipif(os.getuid() != 0, reason="only root installs for others")
def test_a_kit_for_somebody_who_logs_in_is_refused(nearby, tmp_path, capsys, monkeypatch):
    quiet = ("/nologin", "/false")
    person = next((user for user in pwd.getpwall() if user.pw_uid and not user.pw_shell.endswith(quiet)), None)
    if person is None:
        pytest.skip("no user but root has a shell here")
    place = ["--user", person.pw_name, "--keys-user", UNPRIVILEGED, "--installed", str(tmp_path / "etc/ward-1")]
    assert main(["site", "kit", str(nearby), "ward-1", *place, f"state-directory={tmp_path}/state"]) == 0
    said = refused(capsys, "install", nearby / "kits/ward-1", "--units", tmp_path / "units")
    assert "a kit for somebody who logs in here (ward-1): expected a user without a shell, got " in said
    assert not (tmp_path / "etc").exists()


def _elsewhere(kit: Path, units: Path, capsys) -> str:
    """What is said of a kit whose coordinator nobody finds; nothing is made of it."""
    file = kit / "kit.toml"
    file.write_text(file.read_text().replace("127.0.0.1:9092", "nowhere.invalid:9092"))
    said = refused(capsys, "install", kit, "--units", units)
    assert not units.exists()
    return said
