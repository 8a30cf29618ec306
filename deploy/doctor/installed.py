"""What `bouquet site install` has put on this machine: that it is there, whose it is, and that it is the kit's."""

import pwd
import tempfile
from collections.abc import Iterable
from pathlib import Path

from common.error import BouquetError
from deploy.bundles import bundle
from deploy.doctor.check import WarningError
from deploy.site.install import EGRESS, KEPT, UNITS, egress, of_this_machine, secrets, taken
from deploy.site.kit import mode_of, write_scripts
from deploy.site.kit_facts import KitFacts

CURE = "Run sudo bouquet site install, with the kit or the site's folder."


def installed(kit: Path) -> str:
    """Users, folders and files of an installed kit. ``kit`` is the installed one, or the one that it came from."""
    facts = of_this_machine(KitFacts.read(kit))
    there = Path(facts.installed)
    if not there.is_dir():
        raise BouquetError("the kit is not installed here", where=facts.name, expected=f"a folder {there}", cure=CURE)
    for folder, user in facts.folders:
        _folder(Path(folder), user)
    expected = [file.name for file in taken(kit, facts)]
    different = [name for name in expected if name not in KEPT and _differs(kit / name, there / name)]
    if facts.is_node:
        with tempfile.TemporaryDirectory() as folder:
            facts.write(Path(folder))
            write_scripts(Path(folder), facts)
            made = sorted(Path(folder).iterdir())
            different += [file.name for file in made if _differs(file, there / file.name)]
            expected += [*KEPT, *(file.name for file in made)]
    _rights(there, facts, [*expected, bundle.FILE])
    if different:
        raise WarningError(
            "what is installed differs from the kit and this release",
            where=str(there),
            got=f"a different {', '.join(different)}",
            cure=CURE,
        )
    return f"{there}, for {facts.user}" + (f" and {facts.keys_user}" if facts.keys_user else "")


def units(kit: Path, folder: Path = UNITS) -> str:
    """The units as systemd has them, and where they let the SuperNode go."""
    facts = of_this_machine(KitFacts.read(kit))
    ours = sorted(Path(facts.installed).glob("*.service"))
    wrong = [unit.name for unit in ours if _differs(unit, folder / unit.name)]
    if facts.is_node:
        file = folder / f"bouquet-{facts.name}-supernode.service.d" / EGRESS
        if not file.exists() or file.read_text() != egress(facts.superlink):
            wrong.append(f"{file.parent.name}/{EGRESS}")
    if wrong or not ours:
        raise WarningError(
            "the units of this machine differ from those of the kit",
            where=str(folder),
            got=f"a missing or different {', '.join(wrong) or 'unit'}",
            cure=CURE,
        )
    return f"{len(ours)} in {folder}"


def bundles(kit: Path) -> str:
    """Whether runs of the release that is installed here may run here."""
    file = Path(KitFacts.read(kit).installed) / bundle.FILE
    found = bundle.allowed(file)
    if (ours := bundle.of_this_release()) not in found:
        raise BouquetError(
            "this release may not run here",
            where=str(file),
            expected=ours,
            got=f"{len(found)} other bundles",
            cure=f"bouquet bundle >> {file}.",
        )
    return f"this release, and {len(found) - 1} others, may run here"


def _rights(there: Path, facts: KitFacts, names: Iterable[str]) -> None:
    """Raise :class:`BouquetError` where a file is missing, another's, or of another mode than it was installed with."""
    own = secrets(facts)
    for name in sorted({*names, *own}):
        owner, mode = own.get(name, ("", mode_of(name)))
        expected = (pwd.getpwnam(owner) if owner else pwd.getpwuid(there.stat().st_uid)).pw_name
        try:
            found = (there / name).stat()
        except OSError as error:
            raise BouquetError(
                "a file is missing", where=str(there / name), got=str(error.strerror), cure=CURE
            ) from error
        if (found.st_uid, found.st_mode & 0o777) != (pwd.getpwnam(expected).pw_uid, mode):
            raise BouquetError(
                "a file that has changed since it was installed",
                where=str(there / name),
                expected=f"{expected}, mode {mode:o}",
                got=f"user {found.st_uid}, mode {found.st_mode & 0o777:o}",
                cure=CURE,
            )


def _folder(folder: Path, user: str) -> None:
    try:
        owner = pwd.getpwnam(user)
    except KeyError:
        raise BouquetError("a user that does not exist", where=user, cure=CURE) from None
    try:
        found = folder.stat()
    except OSError as error:
        raise BouquetError("a folder is missing", where=str(folder), got=str(error.strerror), cure=CURE) from error
    if found.st_uid != owner.pw_uid or found.st_mode & 0o077:
        raise BouquetError(
            "a folder that is not reserved for its user",
            where=str(folder),
            expected=f"{user}, mode 700",
            got=f"user {found.st_uid}, mode {found.st_mode & 0o777:o}",
            cure=CURE,
        )


def _differs(file: Path, other: Path) -> bool:
    """Whether the kit has another file than the machine, as far as whoever asks can read both."""
    try:
        return file.read_bytes() != other.read_bytes()
    except PermissionError:
        return False
    except OSError:
        return True
