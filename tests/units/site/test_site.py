"""Certificates, keys and kits: who can read them, what they say, and that they stay where they belong."""

import json
import re
import shutil
import subprocess
import tarfile
import tomllib
import zipfile
from datetime import UTC, datetime, timedelta

import pytest
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
from tests.support.sites import PRIVATE, kit, refused


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
    assert "a public key of the wrong type" in refused(capsys, *add, tmp_path / "ed.pub")
    assert "a node with this name exists (ward-1)" in refused(capsys, "add", site, "ward-1")
    assert "a node's name that cannot be used" in refused(capsys, "add", site, "../ward")
    assert "Did you mean 'ward-1'?" in refused(capsys, "revoke", site, "ward1")
    assert "a site already exists" in refused(capsys, "create", site, "--address", "a")
    assert "there is no site here" in refused(capsys, "list", tmp_path / "nowhere")
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
    assert "a node name with another meaning (all)" in refused(capsys, "add", site, "all")
    file.write_text("{")
    with pytest.raises(BouquetError, match="the site's nodes cannot be read"):
        roster.of_this_site()
