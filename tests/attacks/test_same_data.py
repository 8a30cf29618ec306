"""Kind 6: what was spent on data is spent, in whatever form the same data comes again."""

import gzip
import json

import pytest
from datasets import Dataset

from tests.attacks.hostile import RECORDS, Node, cost, left, refused, task
from tests.attacks.tools import written


def spent(folder, records=RECORDS, **options):
    """A node whose budget is enough for two releases, which were made."""
    node = Node(folder, records, privacy_epsilon=cost(2), **options)
    answers = [node.ask("train", round=turn) for turn in range(2)]
    assert left(answers) == 2
    assert refused(node.ask("train", round=2))
    return node


def each(change):
    """Every record changed in one way."""
    return [change(dict(record)) for record in RECORDS]


FORMS = {
    "a field more": each(lambda record: {**record, "imported": "today"}),
    "an empty field more": each(lambda record: {**record, "note": None}),
    "a field less": each(lambda record: {"text": record["text"], "label": record["label"]}),
    "the text alone": each(lambda record: {"text": record["text"]}),
    "whole numbers as fractions": each(lambda record: {**record, "label": float(record["label"])}),
    "numbers as text": each(lambda record: {**record, "label": str(record["label"])}),
    "numbers as truths": each(lambda record: {**record, "label": bool(record["label"])}),
    "fields in another order": each(lambda record: dict(reversed(record.items()))),
    "in another order": RECORDS[::-1],
    "twice": RECORDS * 2,
    "one record more": [*RECORDS, {"text": "x = 1", "label": 0, "age": 3}],
    "one record less": RECORDS[1:],
    "spaces between": [json.dumps(record, indent=None, separators=(" , ", " : ")) for record in RECORDS],
    "escapes": [json.dumps(record).replace("x", "\\u0078") for record in RECORDS],
    "one broken line": [*RECORDS, "{"],
    "one empty cell": [{**RECORDS[0], "age": None}, *RECORDS[1:]],
    "a number as a field's name": each(lambda record: {**record, "7": 7}),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_same_data_in_another_form_is_the_same_data(form, tmp_path):
    node = spent(tmp_path)
    written(node.folder, FORMS[form], name="again")
    node.config["data"] = str(node.folder / "again.jsonl")
    assert all(refused(node.ask("train", round=turn)) for turn in range(2))


@pytest.mark.parametrize("form", ["csv", "json", "jsonl.gz", "parquet", "folder", "two files"])
def test_and_in_another_kind_of_file(form, tmp_path):
    node = spent(tmp_path)
    folder = tmp_path / "again"
    folder.mkdir()
    if form in ("csv", "json"):
        file = written(folder, RECORDS, form)
    elif form == "jsonl.gz":
        file = folder / "data.jsonl.gz"
        file.write_bytes(gzip.compress(written(folder, RECORDS).read_bytes()))
    elif form == "parquet":
        file = folder / "data.parquet"
        Dataset.from_list(RECORDS).to_parquet(file)
    else:
        inner = folder / "files"
        inner.mkdir()
        half = 4 if form == "two files" else 8
        for name, part in (("a", RECORDS[:half]), ("b", RECORDS[half:])):
            if part:
                written(inner, part, name=name)
        file = inner
    node.config["data"] = str(file)
    assert all(refused(node.ask("train", round=turn)) for turn in range(2))


@pytest.mark.parametrize(
    ("run", "facts"),
    [
        ({}, {"name": "ward-4"}),
        ({}, {"name": None}),
        ({}, {"name": None, "partition-id": 3, "num-partitions": 5}),
        ({"run-name": "another"}, {}),
        ({"run-name": ""}, {}),
        ({"seed": 7}, {}),
        ({}, {"weight": 2.0}),
        ({}, {"lora-rank": 1}),
        ({}, {"records": 80}),
        ({"data.limit": 3}, {}),
        ({"data.partition": "iid"}, {}),
        ({"task.max-length": 8}, {}),
        ({"rule.name": "fedit"}, {}),
        ({"privacy.mode": "update-local"}, {}),
    ],
    ids=str,
)
def test_another_name_for_the_node_or_the_run_is_no_fresh_budget(run, facts, tmp_path):
    node = spent(tmp_path)
    node.config |= facts
    node.config = {key: value for key, value in node.config.items() if value is not None}
    assert all(refused(node.ask("train", run, round=turn, run_id=9)) for turn in range(2))


def test_every_record_but_one_edited_is_still_counted_for_that_one(tmp_path):
    node = spent(tmp_path)
    edited = [RECORDS[0], *({**record, "text": record["text"] + "\n"} for record in RECORDS[1:])]
    written(node.folder, edited, name="again")
    node.config["data"] = str(node.folder / "again.jsonl")
    assert refused(node.ask("train", round=2))


def test_what_was_spent_under_one_task_is_spent_under_another(tmp_path):
    node = spent(tmp_path)
    other = Node(tmp_path, task={"name": "instruct", "prompt": "text", "answer": "text"}, privacy_epsilon=cost(2))
    run = task({"name": "instruct", "prompt": "text", "answer": "text"})
    assert other.state == node.state
    assert all(refused(other.ask("train", run, round=turn)) for turn in range(2))
