"""What `bouquet site install` has put on this machine: that it is there, whose it is, and that it is the kit's."""

import pwd
import tempfile
from pathlib import Path

from common.error import BouquetError
from deploy.bundles import bundle
from deploy.doctor.check import WarningError
from deploy.site.install import KEPT, of_this_machine, taken
from deploy.site.kit import write_scripts
from deploy.site.kit_facts import KitFacts

CURE = "sudo bouquet site install, with the kit or the site's folder."


def installed(kit: Path) -> str:
    """Users, folders and files of an installed kit. ``kit`` is the installed one, or the one that it came from."""
    facts = of_this_machine(KitFacts.read(kit))
    there = Path(facts.installed)
    if not there.is_dir():
        raise BouquetError("the kit is not installed here", where=facts.name, expected=f"a folder {there}", cure=CURE)
    for folder, user in facts.folders:
        _folder(Path(folder), user)
    expected = [file for file in taken(kit, facts) if file.name not in KEPT]
    different = [file.name for file in expected if _differs(file, there / file.name)]
    if facts.is_node:
        with tempfile.TemporaryDirectory() as folder:
            facts.write(Path(folder))
            write_scripts(Path(folder), facts)
            different += [file.name for file in sorted(Path(folder).iterdir()) if _differs(file, there / file.name)]
    if different:
        raise WarningError(
            "what is installed is not the kit's and this release's",
            where=str(there),
            got=f"another {', '.join(different)}",
            cure=CURE,
        )
    return f"{there}, for {facts.user}" + (f" and {facts.keys_user}" if facts.keys_user else "")


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


def _folder(folder: Path, user: str) -> None:
    try:
        owner = pwd.getpwnam(user)
    except KeyError:
        raise BouquetError("a user that is not there", where=user, cure=CURE) from None
    try:
        found = folder.stat()
    except OSError as error:
        raise BouquetError("a folder is missing", where=str(folder), got=str(error.strerror), cure=CURE) from error
    if found.st_uid != owner.pw_uid or found.st_mode & 0o077:
        raise BouquetError(
            "a folder that is not kept for its user",
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
