"""Bouquet as a product: the wheel beside foreign packages, and a site installed for users without rights."""

import json
import os
import pwd
import re
import shutil
import subprocess
import sys
import tempfile
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.command import main
from deploy.flower import SIMULATION, app_alone, environment, program
from tests.support import ROOT
from tests.support.ports import free_port, free_ports
from tests.support.processes import CORES, Process, quiet, wait_for

pytestmark = pytest.mark.slow
COLLIDING = ("common", "strategies", "client_app", "server_app", "deploy")
CODE, KEYS = "daemon", "nobody"


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The wheel in an environment of its own, which finds what it depends on in this one."""
    folder = tmp_path_factory.mktemp("installed")
    wheels, own = folder / "wheels", folder / "venv"
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(wheels), str(ROOT)]
    built = subprocess.run(build, capture_output=True, text=True)
    if built.returncode:
        pytest.skip(f"a wheel cannot be built here: {built.stderr[-300:]}")
    venv.create(own, symlinks=True)
    (packages,) = own.glob("lib/python*/site-packages")
    (wheel,) = wheels.glob("*.whl")
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(packages)
        names = {name.split("/")[0] for name in packed.namelist()}
        assert {name for name in names if not name.endswith(".dist-info")} == {"bouquet"}, "one import name"
        entries = packed.read(next(name for name in packed.namelist() if name.endswith("entry_points.txt"))).decode()
    (here,) = {Path(place) for place in sys.path if place.endswith("site-packages")}
    (packages / "others.pth").write_text(f"{here}\n")
    for name, function in re.findall(r"^([\w-]+) = bouquet:(\w+)$", entries, re.M):
        script = own / "bin" / name
        script.write_text(f"#!{own}/bin/python\nimport sys\nfrom bouquet import {function}\nsys.exit({function}())\n")
        script.chmod(0o755)
    for other in (*Path(sys.executable).parent.glob("fl*wer*"), Path(program("flwr")), *_flowers_own()):
        script = own / "bin" / other.name
        script.write_text(re.sub(r"^#!.*", f"#!{own}/bin/python", other.read_text(), count=1))
        script.chmod(0o755)
    return own


def _flowers_own() -> Iterator[Path]:
    yield from (file for file in Path(sys.executable).parent.glob("flwr-*") if file.is_file())


def test_the_wheel_runs_beside_foreign_packages_of_our_names(installed, tmp_path):
    """From another folder, with a ``common`` and a ``deploy`` first on the path that cannot even be imported."""
    for name in COLLIDING:
        (tmp_path / "foreign" / name).mkdir(parents=True)
        (tmp_path / "foreign" / name / "__init__.py").write_text("raise RuntimeError('a foreign package')\n")
    own = environment(SIMULATION | {"PYTHONPATH": str(tmp_path / "foreign"), "HF_HUB_OFFLINE": "1"})
    own["PATH"] = f"{installed}/bin{os.pathsep}{own['PATH']}"

    def bouquet(*arguments: str) -> str:
        ran = subprocess.run(
            [installed / "bin/bouquet", *arguments], cwd=tmp_path, env=own, capture_output=True, text=True, timeout=240
        )
        assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
        return ran.stdout

    settings = ["num-server-rounds=1", "data.limit=40", "train.steps=1", "run-name=one", 'evaluation.prompt=""']
    assert "round 1/1" in bouquet("run", "--nodes", "2", "--cpus", str(CORES), *settings)
    assert "round 1/1" in bouquet("run", "--in-process", "--nodes", "1", *settings, "run-name=two")
    assert (tmp_path / "runs/one/adapter/adapter_model.safetensors").exists()
    assert "fedit" in bouquet("rules")
    code = "from bouquet import FFALoraStrategy; print(FFALoraStrategy().rule.name)"
    python = subprocess.run(
        [installed / "bin/python", "-c", code], cwd=tmp_path, env=own, capture_output=True, text=True
    )
    assert python.stdout.strip() == "ffa-lora", python.stderr


@pytest.mark.exhaustive
@pytest.mark.skipif(os.getuid() != 0, reason="only root can give files to other users")
@pytest.mark.skipif(not shutil.which("setpriv"), reason="setpriv is not here")
def test_the_page_is_followed_for_users_without_rights():
    """Create, install, start what the units start as their users, register, install: a run of one node completes."""
    if subprocess.run([*_interpreter_in_view(), "true"], capture_output=True).returncode:
        pytest.skip("the interpreter is closed to other users here, and no mount can open it")
    folder = Path(tempfile.mkdtemp(prefix="bouquet-"))
    folder.chmod(0o755)
    site, units, fleet = folder / "hospitals", folder / "units", free_port()
    programs = ["--programs", str(Path(sys.executable).parent)]
    ports = ["--fleet-port", str(fleet), "--control-port", str(free_ports(3))]
    running: list[Process] = []
    data = folder / "notes.jsonl"
    data.write_text("".join(json.dumps({"text": f"def f{i}(self):\n    return {i}\n"}) + "\n" for i in range(40)))

    def bouquet(*arguments: str) -> None:
        assert main(["site", *arguments]) == 0

    def start(unit: str) -> None:
        running.append(Process(_as_systemd_would(units / f"{unit}.service"), folder / f"{unit}.log"))

    try:
        place = [*programs, "--user", CODE, "--installed", str(folder / "etc/coordinator")]
        create = ["--address", "127.0.0.1", "--nodes", "ward-1", "--state", str(folder / "var/coordinator")]
        bouquet("create", str(site), *create, *ports, *place)
        place = [*programs, "--user", CODE, "--keys-user", KEYS, "--installed", str(folder / "etc/ward-1")]
        own = [f"data={data}", f"state-directory={folder}/var/ward-1", "--port", str(free_ports(3))]
        bouquet("kit", str(site), "ward-1", *place, *own)
        bouquet("install", str(site), "--units", str(units))
        bouquet("install", str(site / "kits/ward-1.tar.gz"), "--units", str(units))
        for name in ("superlink", "superexec"):
            start(f"bouquet-{name}")
        wait_for(lambda: main(["site", "register", str(site)]) == 0, "the SuperLink", 60, pause=1.0)
        bouquet("install", str(site), "--units", str(units))
        assert main(["doctor", "coordinator", str(site)]) == 0
        for name in ("supernode", "superexec"):
            start(f"bouquet-ward-1-{name}")
        config = 'num-server-rounds=1 min-nodes=1 train.steps=1 run-name="one" round.wait=120.0'
        run = ["hospitals", "--stream", "--run-config", f'{config} run-directory="{folder}/var/coordinator/runs"']
        with app_alone() as app:
            subprocess.run(
                [program("flwr"), "run", str(app), *run],
                env=quiet(FLWR_HOME=str(site / "flower")),
                capture_output=True,
                timeout=240,
            )
        summary = folder / "var/coordinator/runs/one/summary.json"
        assert summary.exists(), "".join(file.read_text()[-2000:] for file in folder.glob("*.log"))
        assert json.loads(summary.read_text())["ended"] == "as asked"
        assert summary.stat().st_uid == pwd.getpwnam(CODE).pw_uid
        assert _denied(CODE, folder / "etc/ward-1/node.key")
        assert _denied(KEYS, folder / "var/ward-1")
    finally:
        for process in running:
            process.stop()
        shutil.rmtree(folder)


def _as_systemd_would(unit: Path) -> list[str]:
    """The command of a unit, as its user, in its groups, with its environment and nothing else."""
    lines = [line.partition("=")[::2] for line in unit.read_text().splitlines() if "=" in line]
    facts = dict(lines)
    user = pwd.getpwnam(facts["User"])
    groups = [f"--groups={facts['SupplementaryGroups']}"] if "SupplementaryGroups" in facts else ["--clear-groups"]
    settings = [setting for key, value in lines if key == "Environment" for setting in value.split()]
    drop = ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", *groups, "--no-new-privs"]
    return [
        *_interpreter_in_view(),
        *drop,
        "env",
        "-i",
        "HF_HUB_OFFLINE=1",
        "OMP_NUM_THREADS=1",
        *settings,
        facts["ExecStart"],
    ]


def _interpreter_in_view() -> list[str]:
    """A view of the file system in which no closed home lies above this interpreter, where one does."""
    base = Path(sys.base_prefix)
    closed = [place for place in reversed(base.parents) if not place.stat().st_mode & 0o001]
    if not closed:
        return []
    show = 'mount --bind "$1" /mnt && mount -t tmpfs -o mode=755 none "$2" && mkdir -p "$1" && mount --bind /mnt "$1"'
    return ["unshare", "--mount", "sh", "-c", f'{show} && shift 2 && exec "$@"', "sh", str(base), str(closed[0])]


def _denied(user: str, place: Path) -> bool:
    """Whether a user can neither read a file nor list a folder."""
    who = pwd.getpwnam(user)
    drop = ["setpriv", f"--reuid={who.pw_uid}", f"--regid={who.pw_gid}", "--clear-groups"]
    command = ["ls" if place.is_dir() else "cat", str(place)]
    return subprocess.run([*drop, *command], capture_output=True).returncode != 0
