"""`bouquet bundle`: the digest by which a node knows the code that it allows."""

import argparse
from importlib.metadata import version
from pathlib import Path

from common.error import BouquetError
from deploy.bundles import bundle
from deploy.settings import Commands, add_command

RELEASE = f"bouquet {version('bouquet')}"
EXAMPLE = """\
Example: bouquet bundle                      # this release's digest
         bouquet bundle > bundles.txt        # allow it, and nothing else
         bouquet bundle other.fab            # the digest of a bundle that somebody sent"""


def add_to(commands: Commands) -> None:
    """Add the subcommand."""
    parser = add_command(commands, "bundle", help="the digest of the code that a node allows", example=EXAMPLE)
    parser.add_argument("bundle", nargs="?", type=Path, help="a .fab file, or an app's folder (default: this release)")
    parser.set_defaults(work=_bundle)


def line(digest: str, note: str) -> str:
    """A line of a file of allowed bundles."""
    return f"{digest}  # {note}"


def _bundle(options: argparse.Namespace) -> int:
    place: Path | None = options.bundle
    if place is None:
        print(line(bundle.of_this_release(), RELEASE))
    elif place.is_dir():
        print(line(bundle.of_app(place), place.resolve().name))
    else:
        try:
            print(line(bundle.digest(place.read_bytes()), place.name))
        except OSError as error:
            raise BouquetError("a bundle cannot be read", where=str(place), got=str(error.strerror)) from error
    return 0
