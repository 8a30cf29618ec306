"""`bouquet site install`: installs a kit where its scripts and units expect it.

What a run's code could use to change what it may do belongs to root: scripts, units, policy, and the list of bundles.
"""

import ipaddress
import os
import pwd
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common import durable
from common.error import BouquetError
from deploy.bundles import bundle
from deploy.bundles.command import RELEASE, line
from deploy.site.folder import Site
from deploy.site.kit import mode_of, renew, write_scripts
from deploy.site.kit_facts import FILE as KIT_FILE
from deploy.site.kit_facts import KitFacts

UNITS = Path("/etc/systemd/system")
SHARED = "superexec.secret"
EGRESS = "egress.conf"
# The operator's own, once they lie there: a new kit does not change them.
KEPT = ("node.toml", "policy.toml")
# What a node takes of a packed kit; all else it makes itself.
OF_A_KIT = ("ca.crt", "kit.toml", "node.key", "node.pub", *KEPT)
LARGEST_FILE = 2**20
# What the coordinator's user has to read and nobody else may.
OF_THE_COORDINATOR = ("server.key", "nodes.json", SHARED)


def install(source: Path, units: Path = UNITS, replace: bool = False) -> list[str]:
    """Install an unpacked kit, a packed one, or the coordinator's folder of a site; returns what was done, by line.

    It can be run again, after a new kit or a new release. Raises :class:`BouquetError` on what cannot be installed, and
    unless ``replace`` says that it is meant, on a kit of another site or node than lies there.
    """
    with _unpacked(source) as kit:
        facts, done = of_this_machine(KitFacts.read(kit)), list[str]()
        there, me = Path(facts.installed), pwd.getpwuid(os.geteuid()).pw_name
        if os.geteuid() != 0 and {facts.user, facts.keys_user or facts.user} != {me}:
            raise BouquetError("only root can install for other users", where=facts.name, cure="Use sudo.")
        if not replace:
            _check_same(kit, facts)
        reach = egress(facts.superlink) if facts.is_node else ""  # before anything is changed
        for user, home in ((facts.user, facts.state), (facts.keys_user, facts.keys_state)):
            done += _user(user, home) if user else []
        _check_places(facts)
        for folder, user in facts.folders:
            _own_folder(Path(folder), user)
        kept = _copy(kit, there, facts)
        done += [f"kept {', '.join(kept)}: they are this machine's own"] if kept else []
        done.append(_allow(there / bundle.FILE))
        started = _units(there, units, reach)
    return [*done, f"installed {facts.name} in {there}", f"start it: systemctl enable --now {' '.join(started)}"]


def of_this_machine(facts: KitFacts) -> KitFacts:
    """A kit's facts as they are installed: a node starts its own programs, and none that somebody else names."""
    return facts.model_copy(update={"programs": str(Path(sys.executable).parent)}) if facts.is_node else facts


def _check_same(kit: Path, facts: KitFacts) -> None:
    """Raise :class:`BouquetError` where the kit of another site or node is installed already, or by another root."""
    there = Path(facts.installed)
    if not (there / KIT_FILE).exists():
        return
    own, root = KitFacts.read(there), there / "ca.crt"
    same_root = not root.exists() or root.read_bytes() == (kit / "ca.crt").read_bytes()
    if (own.site, own.name) != (facts.site, facts.name) or not same_root:
        raise BouquetError(
            "another kit is installed here",
            where=str(there),
            expected=f"{own.name} of {own.site}, by the same root",
            got=f"{facts.name} of {facts.site}" + ("" if same_root else ", by another root"),
            cure="To replace it: bouquet site install --replace.",
        )


def _check_places(facts: KitFacts) -> None:
    """Whether what a kit names is its own: no user that may do more, no folder that something else is in."""
    for name in {facts.user, facts.keys_user} - {""}:
        found = pwd.getpwnam(name)
        if found.pw_uid == 0:
            raise BouquetError("a kit that runs as root", where=facts.name, expected="an unprivileged user", got=name)
        if os.geteuid() == 0 and Path(found.pw_shell).name not in ("nologin", "false"):
            raise BouquetError(
                "a kit that runs as a user who logs in here",
                where=facts.name,
                expected="a user without a shell",
                got=name,
            )
    for folder, user in facts.folders:
        place = Path(folder)
        if place.exists() and place.stat().st_uid != pwd.getpwnam(user).pw_uid and any(place.iterdir()):
            raise BouquetError("a folder that is in use", where=folder, expected=f"one of {user}'s, or an empty one")
    there = Path(facts.installed)
    if there.exists() and any(there.iterdir()) and not (there / KIT_FILE).exists():
        raise BouquetError("a folder that is in use", where=str(there), expected="an installed kit, or an empty folder")


@contextmanager
def _unpacked(source: Path) -> Iterator[Path]:
    """The kit's folder, whatever was named. Of a packed kit the plain files that a node needs are taken."""
    if (source / "site.json").exists():
        renew(site := Site.open(source))
        yield site.coordinator
        return
    if source.is_dir():
        yield source
        return
    with tempfile.TemporaryDirectory() as folder:
        try:
            with tarfile.open(source) as tar:
                for member in tar:
                    file, name = tar.extractfile(member) if member.isfile() else None, Path(member.name)
                    if file is None or name.name not in OF_A_KIT or member.size > LARGEST_FILE:
                        continue
                    durable.write(Path(folder) / name.name, file.read(), durable.PRIVATE)
        except (OSError, tarfile.TarError) as error:
            raise BouquetError("a kit cannot be read", where=str(source), got=str(error)) from error
        yield Path(folder)


def _user(name: str, home: str) -> list[str]:
    """A user without a shell or a password, if there is none of this name."""
    try:
        pwd.getpwnam(name)
        return []
    except KeyError:
        command = ["useradd", "--system", "--user-group", "--no-create-home", "--home-dir", home]
        made = subprocess.run(
            [*command, "--shell", "/usr/sbin/nologin", name], capture_output=True, text=True, check=False
        )
    if made.returncode:
        raise BouquetError("a user cannot be created", where=name, got=made.stderr.strip())
    return [f"created the user {name}"]


def _own_folder(folder: Path, user: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    owner = pwd.getpwnam(user)
    os.chown(folder, owner.pw_uid, owner.pw_gid)


def _copy(kit: Path, there: Path, facts: KitFacts) -> list[str]:
    """The kit's files with their owners and modes; returns the names of those that were there and stay."""
    there.mkdir(parents=True, exist_ok=True)
    there.chmod(0o755)
    kept = [name for name in KEPT if (there / name).exists()]
    for file in taken(kit, facts):
        if file.name not in kept:
            durable.write(there / file.name, file.read_bytes(), durable.PRIVATE)
            (there / file.name).chmod(mode_of(file.name))
    if facts.is_node:
        facts.write(there)
        (there / KIT_FILE).chmod(mode_of(KIT_FILE))
        write_scripts(there, facts)
        if not (there / SHARED).exists():
            durable.write(there / SHARED, os.urandom(48), durable.PRIVATE)
    group = pwd.getpwnam(facts.user).pw_gid
    for name, (owner, mode) in secrets(facts).items():
        _keep(there / name, pwd.getpwnam(owner).pw_uid if owner else os.geteuid(), group, mode)
    return kept


def secrets(facts: KitFacts) -> dict[str, tuple[str, int]]:
    """The secrets of an installed kit, with the owner of each (empty: whoever installs) and its mode.

    All else belongs to whoever installs; the group is that of the user who runs the code of runs.
    """
    if facts.is_node:
        return {SHARED: ("", 0o640), "node.key": (facts.keys_user or facts.user, 0o600)}
    return dict.fromkeys(OF_THE_COORDINATOR, (facts.user, 0o600))


def taken(kit: Path, facts: KitFacts) -> list[Path]:
    """The files of a kit that are installed as they are.

    Root makes a node's scripts and units itself: a kit comes from somebody else.
    """
    wanted = {*OF_A_KIT} - {KIT_FILE}
    return [file for file in sorted(kit.iterdir()) if file.is_file() and (file.name in wanted or not facts.is_node)]


def _keep(file: Path, user: int, group: int, mode: int) -> None:
    if file.exists():  # a node that has made its own key may not have put it here yet
        file.chmod(mode)
        os.chown(file, user, group)


def _allow(file: Path) -> str:
    """Let the release that is installed here run; what was allowed before stays so."""
    found = bundle.allowed(file) if file.exists() else frozenset()
    if (ours := bundle.of_this_release()) in found:
        return f"{file} allows this release already"
    with file.open("a") as lines:
        lines.write(line(ours, RELEASE) + "\n")
    file.chmod(0o644)
    return f"{file} allows this release, and {len(found)} others"


def _units(there: Path, units: Path, reach: str) -> list[str]:
    """The kit's units where systemd finds them, with the SuperLink's addresses; returns their names."""
    names = []
    units.mkdir(parents=True, exist_ok=True)
    for unit in sorted(there.glob("*.service")):
        shutil.copy(unit, units / unit.name)
        names.append(unit.stem)
        if reach and unit.stem.endswith("supernode"):
            dropin = units / f"{unit.name}.d"
            dropin.mkdir(exist_ok=True)
            (dropin / EGRESS).write_text(reach)
    if units == UNITS and shutil.which("systemctl"):
        subprocess.run(["systemctl", "daemon-reload"], capture_output=True, check=False)
    return names


def egress(superlink: str) -> str:
    """Where a SuperNode may go: the SuperLink's addresses of today, and the resolvers that find them."""
    host, port = superlink.rsplit(":", 1)
    try:
        found = {str(entry[4][0]) for entry in socket.getaddrinfo(host.strip("[]"), int(port))}
    except OSError as error:
        raise BouquetError(
            "the SuperLink's name cannot be resolved",
            where=superlink,
            got=str(error),
            cure="Install again once it resolves, or when its address changes.",
        ) from error
    resolvers = _resolvers() if not _is_address(host.strip("[]")) else set()
    return f"[Service]\nIPAddressAllow={' '.join(sorted(found | resolvers))}\n"


def _resolvers() -> set[str]:
    try:
        lines = Path("/etc/resolv.conf").read_text().splitlines()
    except OSError:
        return set()
    named = [parts[1] for parts in map(str.split, lines) if len(parts) > 1 and parts[0] == "nameserver"]
    return {address for address in named if _is_address(address)}


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True
