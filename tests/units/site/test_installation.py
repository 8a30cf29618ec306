"""A kit is installed: what somebody else wrote into it names nothing that root would run, and secrets stay."""

import os
import pwd
from pathlib import Path

import pytest

from deploy.command import main
from tests.support.processes import UNPRIVILEGED
from tests.support.sites import refused


@pytest.fixture
def nearby(tmp_path) -> Path:
    """A site whose address can be resolved here."""
    folder = tmp_path / "nearby"
    assert main(["site", "create", str(folder), "--address", "127.0.0.1", "--nodes", "ward-1"]) == 0
    return folder


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
        ((f'user = "{UNPRIVILEGED}"', 'user = "root"'), "a kit that runs as root"),
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
        (
            ('site = "nearby"', 'site = "far"'),
            "expected ward-1 of nearby, by the same root, got ward-1 of far. To replace",
        ),
        (('name = "ward-1"', 'name = "ward-2"'), "by the same root, got ward-2 of nearby. To replace"),
    ):
        (kit / "kit.toml").write_text(facts.replace(*change))
        assert message in refused(capsys, *install)
    (kit / "kit.toml").write_text(facts)
    (kit / "ca.crt").write_bytes(root + b"\n")
    assert "got ward-1 of nearby, by another root. To replace" in refused(capsys, *install)
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
    assert "a kit that runs as a user who logs in here (ward-1): expected a user without a shell, got " in said
    assert not (tmp_path / "etc").exists()


def _elsewhere(kit: Path, units: Path, capsys) -> str:
    """What is said of a kit whose coordinator nobody finds; nothing is made of it."""
    file = kit / "kit.toml"
    file.write_text(file.read_text().replace("127.0.0.1:9092", "nowhere.invalid:9092"))
    said = refused(capsys, "install", kit, "--units", units)
    assert not units.exists()
    return said
