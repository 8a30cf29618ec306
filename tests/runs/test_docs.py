"""What the documentation tells a reader to type, works."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.command import parser
from deploy.settings import read as settings_of
from strategies import read_config
from tests.support import ROOT

DOCS = ROOT / "docs"
DOCUMENTS = (*DOCS.glob("*.md"), *ROOT.glob("*.md"))


@pytest.mark.exhaustive
@pytest.mark.slow
def test_the_commands_of_your_data_work_one_after_the_other(tmp_path):
    blocks = re.findall(r"<!-- run -->\n```sh\n(.*?)```", (DOCS / "your-data.md").read_text(), flags=re.DOTALL)
    assert len(blocks) == 4
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    script = "set -e\n" + "".join(blocks)
    finished = subprocess.run(
        ["bash", "-c", script],
        cwd=tmp_path,
        env={**os.environ, "PATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    said = finished.stdout
    assert finished.returncode == 0, said
    assert said.count("\nround ") == 2
    assert "2 classes found in 'kind': card, transfer" in said
    assert "«Yes, since noon.</s>»" in said or "«No.</s>»" in said
    assert "held-out accuracy" in said
    assert f"\nnext: bouquet chat {tmp_path}/runs/tickets\n" in said
    assert (tmp_path / "runs/tickets/adapter/adapter_model.safetensors").is_file()
    assert "epsilon" in said


def commands() -> Iterator[tuple[str, str]]:
    """Every line of the documents that is a bouquet command, and the document; what is left out there is left out."""
    for document in DOCUMENTS:
        text = document.read_text().replace("\\\n", " ")
        for line in re.findall(r"^ *(?:\.venv/bin/)?bouquet +(.*)$", text, flags=re.MULTILINE):
            yield document.name, re.sub(r" \.\.\.(?=\s|$)", "", line)


@pytest.mark.parametrize(("document", "line"), sorted(set(commands())))
def test_every_command_of_the_documents_is_understood(document, line, monkeypatch):
    monkeypatch.chdir(ROOT)
    options = parser().parse_args(shlex.split(line, comments=True))
    if options.command in ("run", "plan"):
        read_config(settings_of(options.settings))


def test_links_between_the_documents_lead_somewhere():
    for document in DOCUMENTS:
        for link in re.findall(r"\]\((?!https?:)([^)#]+)", document.read_text()):
            assert (document.parent / link).exists(), f"{document.name}: {link}"
