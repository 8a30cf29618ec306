"""The coordinator. On import, makes sure that ``common`` and ``strategies`` are Bouquet's own."""

from importlib.util import find_spec
from pathlib import Path

for _package in ("common", "strategies"):
    _found = find_spec(_package)
    _origin = Path(_found.origin).parent if _found and _found.origin else None
    if _origin != Path(__file__).parents[1] / _package:
        raise ImportError(
            f"'{_package}' is {_origin}, not Bouquet's own in {Path(__file__).parents[1]}; "
            f"uninstall or rename the other package called '{_package}'."
        )
