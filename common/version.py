"""Which code this is: a fingerprint that distinguishes checkouts that have the same version number."""

import hashlib
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("common", "strategies", "client_app", "server_app")


@cache
def fingerprint() -> str:
    """SHA-256 over every module of the app, in the order of their paths; 16 hex digits."""
    sha = hashlib.sha256()
    for file in sorted(file for package in PACKAGES for file in (ROOT / package).rglob("*.py")):
        sha.update(file.relative_to(ROOT).as_posix().encode() + b"\0" + file.read_bytes())
    return sha.hexdigest()[:16]
