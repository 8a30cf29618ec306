"""`bouquet doctor`: every check passes where all is well, and says what to do where it is not."""

import os
import re
import shutil
from pathlib import Path

import pytest

from common.error import BouquetError
from deploy.command import main
from deploy.doctor import machine
from deploy.doctor.check import Check, WarningError, examine
from deploy.doctor.installed import bundles, installed, units
from deploy.site.folder import Site


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
    with pytest.raises(BouquetError, match=r"bitsandbytes does not work here \(cuda:7\).*Run python -m bitsandbytes"):
        machine.quantisation(["cpu", "cuda:7"])


def test_a_full_or_closed_disk_is_named(tmp_path):
    with pytest.raises(BouquetError, match=r"the disk is nearly full .*Make room, or choose another state-directory"):
        machine.disk(tmp_path / "state", least=10**18)
    with pytest.raises(BouquetError, match=r"a state directory that cannot be written \(/proc/x\)"):
        machine.disk(Path("/proc/x"))


def test_what_is_installed_is_looked_at(site, kit, tmp_path):
    assert str(kit) in installed(site / "kits/ward-1")
    (kit / "superexec.sh").write_text("")
    with pytest.raises(WarningError, match=r"what is installed differs from the kit and .*a different superexec.sh"):
        installed(site / "kits/ward-1")
    (tmp_path / "state").chmod(0o755)
    with pytest.raises(BouquetError, match=r"a folder that is not reserved for its user .*mode 755. Run sudo bouquet"):
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
    expected = (
        rf"a file that has changed since it was installed \({file}\): expected [\w-]+, mode {mode:o}, got .*mode 400"
    )
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
    with pytest.raises(
        WarningError, match=rf"the units of this machine differ from those .*a missing or different {wrong}"
    ):
        units(kit, folder)


def test_the_coordinators_disk_is_where_its_state_lies(site, tmp_path, capsys):
    assert main(["doctor", "coordinator", str(site)]) == 0
    assert re.search(rf"^ok    disk .* free in {tmp_path}/coordinator$", capsys.readouterr().out, re.MULTILINE)


def test_a_folder_that_is_no_kit_is_named(tmp_path, capsys):
    assert main(["doctor", "node", str(tmp_path)]) == 2
    assert "a kit cannot be read" in capsys.readouterr().err
