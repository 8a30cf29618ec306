"""What the documentation tells a reader to type, works."""

import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from deploy.command import parser
from deploy.settings import read as settings_of
from strategies import RULES, read_config
from tests.support import ROOT
from tests.support.factors import dense, started, trained
from tests.support.grid import run_in_process

DOCS = ROOT / "docs"
DOCUMENTS = (*DOCS.glob("*.md"), *ROOT.glob("*.md"))


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


def test_the_rule_that_adding_a_rule_writes_is_lawful_and_runs(settings, tmp_path, monkeypatch):
    (file,) = re.findall(
        r"<!-- rule -->\n```python\n(.*?)```", (DOCS / "adding-a-rule.md").read_text(), flags=re.DOTALL
    )
    (tmp_path / "ffb_lora.py").write_text(file)
    monkeypatch.syspath_prepend(tmp_path)
    rule = importlib.import_module("ffb_lora").FFBLora()
    monkeypatch.setitem(RULES, rule.name, type(rule))
    state = started(rule)
    updates = [trained(rule, state, seed, weight) for seed, weight in enumerate((1.0, 3.0))]
    one, two = (dense(rule.model(state, update)) for update in updates)
    for layer, merged in dense(rule.aggregate(state, updates)).items():
        torch.testing.assert_close(merged, (one[layer] + 3 * two[layer]) / 4)
    run_in_process(settings(**{"rule.name": rule.name}), nodes=2)
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["after"]["all"] < summary["before"]["all"]


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
