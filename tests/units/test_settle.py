"""What a look at local data settles before a run starts, and what is said of it."""

import json

import pytest

from common.config.section import ConfigError
from common.error import BouquetError
from deploy.settle import settled

CLASSIFY = {"task.name": "classify"}


@pytest.fixture
def source(tmp_path):
    """Writes the rows of a table, and says which settings name it."""

    def write(labels: list, **more: list) -> dict:
        columns = {"label": labels, **more}
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        lines = [json.dumps({"text": f"text {number}", **row}) for number, row in enumerate(rows)]
        (tmp_path / "x.jsonl").write_text("\n".join(lines))
        return {"data.source": str(tmp_path / "x.jsonl")}

    return write


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (["spam", "ham", "spam", None], "ham,spam"),
        ([1, 2, 2.0, "1"], "1,2"),
        ([10, 9, 8, 9, 10, 8], "8,9,10"),
        (["0", 1.0, 0, "1"], None),
        ([True, False, "true", None], None),
        ([0, 1, 2, 2, 1, 0], "0,1,2"),
    ],
)
def test_the_classes_are_those_of_the_labels(labels, classes, source):
    chosen, _ = settled(source(labels) | CLASSIFY, 2)
    assert chosen.get("task.classes") == classes


def test_each_choice_is_told_in_a_line(source):
    _, said = settled(source(["spam", "ham"] * 4) | CLASSIFY, 2)
    assert said == [
        "data.partition=iid: the data has no field 'family' (data.partition-field names another)",
        "2 classes found in 'label': ham, spam; set task.classes to name them yourself",
    ]


def test_what_the_user_has_set_stays(source):
    given = source(["spam", "ham"] * 4) | CLASSIFY | {"task.classes": "spam,ham", "data.partition": "none"}
    assert settled(given, 2) == (given, [])
    assert settled({"num-server-rounds": 1}, 2) == ({"num-server-rounds": 1}, [])


def test_data_are_dealt_by_the_field_only_if_it_has_a_value_for_each_node(source):
    families = source([0] * 4, family=["a", "b", "a", "b"])
    assert settled(families, 2) == (
        {**families, "data.partition": "natural"},
        ["data.partition=natural: each node has its own value of 'family'"],
    )
    chosen, said = settled(families, 3)
    assert chosen["data.partition"] == "iid"
    assert said == ["data.partition=iid: the field 'family' has 2 values, fewer than the 3 nodes"]


def test_nothing_of_a_private_run_goes_by_its_data(source):
    private = {"privacy.mode": "example", "train.weighting": "uniform"}
    chosen, said = settled(source(["spam", "ham"], family=["a", "b"]) | CLASSIFY | private, 2)
    assert chosen["data.partition"] == "iid"
    assert "task.classes" not in chosen
    assert said == ["data.partition=iid: each record is assigned to a node on its own"]


def test_a_field_that_holds_no_labels_is_refused(source):
    said = (
        r"a field that holds no labels \(task.label = 'label', .*\): .*, got 6 different ones in 6 records, such as 'a'"
    )
    with pytest.raises(BouquetError, match=said):
        settled(source(list("abcdef")) | CLASSIFY, 2)
    with pytest.raises(BouquetError, match=r"holds no labels .*none with a comma, got 2 .* such as 'yes, it is'"):
        settled(source(["no", "yes, it is"] * 3) | CLASSIFY, 2)


def test_one_label_alone_is_no_task(source):
    said = r"a field that holds only one label .*: expected two labels or more, got 'spam' in all of 4 records"
    with pytest.raises(BouquetError, match=said):
        settled(source(["spam"] * 4) | CLASSIFY, 2)


def test_labels_that_are_not_as_many_as_the_run_has_are_a_contradiction(source):
    chosen, _ = settled(source(["a", "b", "c"] * 3) | CLASSIFY | {"task.labels": 4}, 2)
    with pytest.raises(ConfigError, match=r"task.labels: expected 3, the number of names in task.classes, got 4"):
        settled(chosen, 2)


@pytest.mark.parametrize(
    ("flat", "said"),
    [
        (
            {"data.source": "/no/such/file.csv"},
            r"no such file or folder \(data.source\): got /no/such/file.csv",
        ),
        ({"data.source": "tickets.csv"}, r"there is no such file or folder \(data.source\): got tickets.csv"),
        ({"model.name": "/no/such/model"}, r"there is no such model folder \(model.name\): got /no/such/model"),
        ({"model.adapter": "/no/adapter"}, r"no such adapter folder \(model.adapter\): got /no/adapter. Use a PEFT"),
    ],
)
def test_what_is_not_there_is_told_before_anything_starts(flat, said):
    with pytest.raises(BouquetError, match=said):
        settled(flat, 2)


def test_broken_records_are_told_before_anything_starts(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n{torn\n')
    with pytest.raises(BouquetError, match=r"got 1 of 2: .*x.jsonl:2: a line is not JSON"):
        settled({"data.source": str(tmp_path / "x.jsonl")}, 2)
