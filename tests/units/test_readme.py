"""The README says what the code does."""

import re

from common.config.run import RunConfig
from deploy.command import main, rules_table
from tests.support import ROOT

PACKAGES = ("common", "strategies", "client_app", "server_app", "deploy")
README = (ROOT / "README.md").read_text()


def test_the_table_of_rules_is_the_codes(capsys):
    assert f"<!-- rules -->\n{rules_table()}\n<!-- /rules -->" in README
    assert main(["rules"]) == 0
    assert capsys.readouterr().out.strip() == rules_table()


def test_the_tree_names_every_module():
    tree = README.split("## The tree")[1]
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            if path.name != "__init__.py":
                assert path.name in tree, f"{path.relative_to(ROOT)} is not in the README's tree"
    for name in re.findall(r"\b(\w+\.py)\b", tree):
        assert any(list((ROOT / package).rglob(name)) for package in PACKAGES), f"{name} is in the tree only"


def test_every_key_that_the_documents_name_exists():
    known = set(RunConfig().to_flower())
    for document in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        keys = re.findall(
            r"`((?:model|lora|task|data|rule|merge|train|privacy|wire|evaluation|round|tracking|metrics)\.[a-z-]+)`",
            document.read_text(),
        )
        keys = [key for key in keys if key != "metrics.jsonl"]  # a file
        assert set(keys) <= known, document.name


def test_the_table_of_files_is_what_a_run_leaves():
    section = README.split("**What a run leaves**")[1].split("From Python")[0]
    named = set(re.findall(r"^\| `([\w.]+)/?` \|", section, flags=re.MULTILINE))
    left = {"adapter", "report.html", "metrics.jsonl", "checkpoints", "config.json", "summary.json", "run.log"}
    assert named == left
