"""Files private to one user: created so that nobody else can access them, and refused where somebody could."""

import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common import durable
from common.error import RefusalError

OTHERS = 0o077


def check(path: Path) -> bool:
    """Whether there is such a file or folder. Raises :class:`RefusalError` where it is not this user's alone."""
    try:
        facts = path.lstat()
    except FileNotFoundError:
        return False
    if stat.S_ISLNK(facts.st_mode):
        got = "a symbolic link"
    elif facts.st_uid != os.geteuid():
        got = "another user's"
    elif facts.st_mode & OTHERS:
        got = f"mode {stat.S_IMODE(facts.st_mode):04o}"
    else:
        return True
    raise RefusalError(
        "a file or folder that should be private to one user is open to others",
        where=str(path),
        expected="a file or folder of this user's own, closed to group and others, not a symbolic link",
        got=got,
        cure=f"Find out who changed it; then chmod go= {path}",
    )


def check_writable(folder: Path) -> None:
    """Raise :class:`RefusalError` where this user cannot write in a folder, which may be still to be made."""
    nearest = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise RefusalError(
            "one of the node's folders cannot be written to",
            where=str(folder),
            expected="a folder that its user may create or write to",
            got=f"no permission to write to {nearest}" if nearest.is_dir() else f"{nearest}, which is a file",
            cure="Give it to that user, or name another in the node config (state-directory, privacy-witness).",
        )


def make_folder(path: Path) -> None:
    """Make a folder of mode 0700, and what is missing above it. Raises :class:`RefusalError` as :func:`check` does."""
    if check(path):
        return
    if not path.parent.exists():
        make_folder(path.parent)
    path.mkdir(mode=0o700, exist_ok=True)
    durable.sync(path.parent)
    check(path)


def make_file(path: Path) -> None:
    """Make an empty file of mode 0600 where there is none. Raises :class:`RefusalError` as :func:`check` does."""
    if not check(path):
        os.close(os.open(path, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW, 0o600))
        durable.sync(path.parent)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock that a file stands for; it goes with the process that holds it."""
    check(path)
    handle = os.open(path, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
