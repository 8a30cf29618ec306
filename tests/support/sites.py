"""Commands about a site, given and answered."""

import re
from pathlib import Path

from deploy.command import main

PRIVATE = re.compile(rb"BEGIN [A-Z ]*PRIVATE KEY")


def kit(site: Path, *settings: str, node: str = "ward-1") -> Path:
    assert main(["site", "kit", str(site), node, "data=/data/notes.jsonl", *settings]) == 0
    return site / "kits" / node


def refused(capsys, *arguments: object) -> str:
    assert main(["site", *map(str, arguments)]) == 2
    return capsys.readouterr().err
