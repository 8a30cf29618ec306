"""The documents say what the code does: what is generated is as the code has it now, and the rest names what exists."""

import re

import pytest

from common.config.renamed import RENAMED
from common.wire.codecs import CODECS
from deploy.command import main, rules_table
from deploy.config.catalogue import ORDER, node_entries, run_entries
from docs.generate.__main__ import TARGETS, stale
from docs.generate.tree import PACKAGES
from strategies import AXES
from tests.support import ROOT

README = (ROOT / "README.md").read_text()


def test_nothing_that_is_generated_is_stale():
    assert [file.name for file, _ in stale()] == []


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("pyproject.toml", 'rule.name = "fedit"'),
        ("README.md", "`fed-sb` | yes | yes"),
        ("README.md", "`lora-pro`"),
        ("README.md", "scrutiny.py"),
        ("docs/config.md", "`train.steps`"),
    ],
)
def test_a_generated_line_that_is_changed_is_put_right(name, line):
    text = (ROOT / name).read_text()
    changed = text.replace(line, "changed", 1)
    assert changed != text
    assert TARGETS[name](changed) == text


def test_bouquet_rules_prints_the_readmes_table(capsys):
    assert main(["rules"]) == 0
    assert capsys.readouterr().out.strip() == rules_table()
    assert rules_table() in README


def test_the_tree_names_every_module_and_every_method():
    tree = README.split("## The tree")[1]
    methods = {name: kind for axis in (*AXES, CODECS) for name, kind in axis.items()}
    of_methods = {f"{kind.__module__.replace('.', '/')}.py" for kind in methods.values()}
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            name = str(path.relative_to(ROOT))
            if path.name != "__init__.py" and name not in of_methods:
                assert path.name in tree, f"{name} is not in the README's tree"
    assert all(re.search(rf"\b{name}\b", tree) for name in methods)
    for name in re.findall(r"\b(\w+\.py)\b", tree):
        assert any(list((ROOT / package).rglob(name)) for package in PACKAGES), f"{name} is in the tree only"


def test_every_key_has_a_meaning_and_what_it_may_be():
    for entry in (*run_entries(), *node_entries()):
        assert entry.meaning.endswith("."), entry.key
        assert entry.range, entry.key


def test_every_key_that_the_documents_name_exists():
    known = {entry.key for entry in run_entries()}
    sections = "|".join(filter(None, ORDER))
    for document in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        keys = set(re.findall(rf"`((?:{sections})\.[a-z.-]+)`", document.read_text()))
        keys -= {key for key in keys if key.endswith((".py", ".jsonl"))}  # files
        if document.name == "config.md":
            keys -= set(RENAMED)
        assert keys <= known, document.name


def test_the_table_of_files_is_what_a_run_leaves():
    section = README.split("**What a run leaves**")[1].split("From Python")[0]
    named = set(re.findall(r"^\| `([\w.]+)/?` \|", section, flags=re.MULTILINE))
    left = {"adapter", "report.html", "metrics.jsonl", "checkpoints", "config.json", "summary.json", "run.log"}
    assert named == left
