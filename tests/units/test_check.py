"""`bouquet check`: what a run would read and learn, before it starts."""

import json
import re

import pytest

from deploy.command import main

TICKETS = "kind;message\nham;Lunch at noon?\nspam;You have won\nham;\nspam;Buy it now, now\nham;See you\nham;Hello\n"
FIELDS = ["task.name=classify", "task.label=kind", "task.text=message"]


def test_it_says_what_each_node_has_and_shows_an_example(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tickets.csv").write_text(TICKETS)
    assert main(["check", "--nodes", "1", "data.source=tickets.csv", *FIELDS, "task.max-length=4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("data.partition=iid: the data has no field 'family'")
    assert lines[1] == "2 classes found in 'kind': ham, spam; set task.classes to name them yourself"
    assert lines[3].startswith("node-000: 6 records, 1 left out (1 without text), ")
    assert lines[3].endswith("cut at 4 tokens, 5 examples of at most 4 tokens")
    assert lines[4].split() == ["1", "to", "8", "tokens", "5", "█" * 30]
    assert [line.split() for line in lines[5:7]] == [["ham", "3", "█" * 18], ["spam", "2", "█" * 12]]
    assert lines[7].strip().endswith(("«ham»", "«spam»"))
    assert lines[8] == f"next: bouquet run --nodes 1 data.source=tickets.csv {' '.join(FIELDS)} task.max-length=4"


def test_what_is_learned_stands_between_marks_or_in_colour(tmp_path, capsys, monkeypatch):
    turns = [("user", "One?"), ("assistant", "First."), ("user", "Two?"), ("assistant", "Second.")]
    record = {"messages": [{"role": who, "content": said} for who, said in turns]}
    (tmp_path / "talks.jsonl").write_text(json.dumps(record) + "\n")
    command = ["check", "--nodes", "1", "task.name=chat", "task.max-length=128", f"data.source={tmp_path}/talks.jsonl"]
    assert main(command) == 0
    plain = capsys.readouterr().out
    assert "### Response:\n    «First.</s>»" in plain
    assert plain.split("\nnext:")[0].endswith("«Second.</s>»")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    assert main(command) == 0
    assert re.findall(r"\x1b\[1;32m(.*?)\x1b\[0m", capsys.readouterr().out) == ["First.</s>", "Second.</s>"]


def test_a_private_run_is_shown_as_its_nodes_read_it(tmp_path, capsys):
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"text": f"note {n}"}) + "\n" for n in range(40)))
    private = ["privacy.mode=example", "train.weighting=uniform", f"data.source={tmp_path / 'x.jsonl'}"]
    assert main(["check", "--nodes", "2", *private]) == 0
    said = capsys.readouterr().out
    counted = [int(line.split()[1]) for line in said.splitlines() if line.startswith("node-")]
    assert len(counted) == 2
    assert sum(counted) == 40


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"text": ["a"]}\n' * 2, "bouquet: records that cannot be used .*x.jsonl:1: a field is not text"),
        ('{"txt": "a"}\n' * 2, "expected a field 'text', got the fields txt. Did you mean 'txt'"),
    ],
)
def test_what_is_wrong_is_told_in_a_sentence(content, said, tmp_path, capsys):
    (tmp_path / "x.jsonl").write_text(content)
    assert main(["check", "--nodes", "1", f"data.source={tmp_path / 'x.jsonl'}"]) == 2
    assert re.search(said, capsys.readouterr().err)
