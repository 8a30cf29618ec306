"""What a private node trains on: one record more in its data is one more there, and nothing else changes."""

import csv
import json
from collections import Counter
from itertools import chain
from pathlib import Path
from types import MappingProxyType

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from client_app.units import Units, Wanted, node_units
from common.config.node import NodeConfig
from common.config.privacy import PrivacyConfig
from common.config.run import DataConfig, ModelConfig, TaskConfig
from common.sources import files, stable

SLOW = settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
CLASSIFY = TaskConfig(name="classify", labels=2)
PATIENT = {"unit": "patient", "unit-cap": 2}

fields = st.fixed_dictionaries(
    {
        "text": st.one_of(st.text(min_size=1, max_size=12), st.none(), st.integers()),
        "label": st.one_of(st.integers(-1, 3), st.sampled_from(["1", "x", None, True])),
        "patient": st.sampled_from(["a", "b", "c", 1, None]),
    }
)


def written(folder: Path, rows: list, kind: str) -> NodeConfig:
    """A node whose own file holds ``rows``; a row that is bytes is written as it is."""
    file = folder / f"data.{kind}"
    if kind == "csv":
        with file.open("w", newline="") as opened:
            out = csv.DictWriter(opened, ["text", "label", "patient"])
            out.writeheader()
            out.writerows(rows)
    elif kind == "json":
        file.write_text(json.dumps(rows))
    else:
        file.write_bytes(b"".join((r if isinstance(r, bytes) else json.dumps(r).encode()) + b"\n" for r in rows))
    return NodeConfig(data=str(file), name="ward")


def units(node: NodeConfig, task: TaskConfig = CLASSIFY, limit: int = 0, **privacy: object) -> Units:
    wanted = Wanted(
        DataConfig(limit=limit, holdout=0.3),
        task,
        ModelConfig(),
        PrivacyConfig.model_validate({"mode": "example"} | privacy),
        0,
    )
    node_units.cache_clear()
    return node_units(wanted, node, 20)


def distance(ours: Units, theirs: Units) -> int:
    """How many units one has and the other has not, in training and among the held out together."""
    total = 0
    for one, other in ((ours.train, theirs.train), (ours.heldout, theirs.heldout)):
        here, there = (Counter(map(repr, part)) for part in (one, other))
        total += (here - there).total() + (there - here).total()
    return total


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["jsonl", "csv", "json"])
@pytest.mark.parametrize("options", [{}, {"limit": 10}, {"score-noise": 2.0}, {"limit": 10, "score-noise": 2.0}])
@SLOW
@given(rows=st.lists(fields, max_size=12), more=fields, place=st.integers(0, 12))
def test_one_record_more_is_one_unit_more(kind, options, tmp_path, rows, more, place):
    before = units(written(tmp_path, rows, kind), **options)
    after = units(written(tmp_path, [*rows[:place], more, *rows[place:]], kind), **options)
    assert distance(before, after) <= 1
    # A record belongs to one part, whatever else is there.
    assert len(after.train) + len(after.heldout) >= len(before.train) + len(before.heldout)


@SLOW
@given(rows=st.lists(fields, max_size=12), more=st.lists(fields, min_size=1, max_size=4))
def test_one_person_more_is_one_unit_more_and_no_unit_exceeds_its_cap(tmp_path, rows, more):
    new = [{**record, "patient": "new"} for record in more]
    before, after = (units(written(tmp_path, part, "jsonl"), **PATIENT) for part in (rows, [*new, *rows]))
    assert distance(before, after) <= 1
    assert all(1 <= len(unit) <= 2 for unit in after.train)


def test_one_person_is_one_unit_however_the_name_is_written(tmp_path):
    def persons(*names: object) -> int:
        rows = [{"text": f"note {n}", "label": 0, "patient": name} for n, name in enumerate(names)]
        return len(units(written(tmp_path, rows, "jsonl"), **PATIENT).train)

    assert persons(7, 7.0, "7", " 7", "007") == 1
    assert persons("P7", "p7", "P7 ") == 1
    assert persons("NA", "nan", float("nan"), "null", " ", "", None) == 0
    assert persons("NA", "a", "b") == 2


def test_a_number_too_long_for_python_does_not_end_an_array(tmp_path):
    rows = [{"text": f"note {n}", "label": 0} for n in range(3)]
    node = written(tmp_path, rows, "json")
    file = tmp_path / "data.json"
    file.write_text(file.read_text().replace('"note 1"', "9" * 5000))
    assert len(units(node).train) == 3 - 1 + 1  # its digits are text


def test_a_file_that_was_replaced_is_read_again(tmp_path):
    node = written(tmp_path, [{"text": "old", "label": 0}], "jsonl")
    before = files.stamp(node.data)
    assert files.stamp(node.data) == before
    written(tmp_path, [{"text": "new", "label": 0}], "jsonl")
    assert files.stamp(node.data) != before
    assert files.stamp("stdlib") == ()


def test_a_line_that_cannot_be_read_is_one_absent_record(tmp_path):
    good = [{"text": f"note {n}", "label": n % 2} for n in range(6)]
    broken = [
        b"{torn",
        b"[1, 2]",
        b"\xff\xfe",
        b'{"text": ' + b"[" * 5000,
        b'{"text": ' + b"[" * 90 + b"]" * 90 + b"}",
        b"7",
        b"9" * 5000,
        b"",
    ]
    whole = units(written(tmp_path, good, "jsonl"))
    for line in broken:
        assert distance(whole, units(written(tmp_path, [*good[:3], line, *good[3:]], "jsonl"))) == 0
    assert len(whole.train) == 6


def test_a_record_that_cannot_be_decoded_does_not_end_a_data_set(monkeypatch, tmp_path):
    class Torn(list):
        features = MappingProxyType({"text": None})

        def __getitem__(self, number):
            if number == 1:
                raise OSError("a torn picture")
            return super().__getitem__(number)

    rows = [{"text": f"note {n}", "label": 0} for n in range(4)]
    monkeypatch.setattr("common.sources.dealing.load_dataset", lambda source: Torn(rows))
    assert [record["text"] for record in stable.read("owner/data")] == ["note 0", "note 2", "note 3"]


def test_a_long_field_does_not_end_the_reading_of_a_table(tmp_path):
    rows = [{"text": "a", "label": 0}, {"text": "x" * 200_000, "label": 1}, {"text": "b", "label": 1}]
    assert len(units(written(tmp_path, rows, "csv")).train) == 3


def test_labels_of_a_table_are_numbers_though_another_row_has_none(tmp_path):
    rows = [{"text": "a", "label": 0}, {"text": "b", "label": 1}]
    alone = units(written(tmp_path, rows, "csv"))
    assert sorted(unit[0].labels for unit in alone.train) == [[0], [1]]
    assert distance(alone, units(written(tmp_path, [*rows, {"text": "c", "label": ""}], "csv"))) == 0


def test_the_declared_number_decides_the_share_not_the_true_one(tmp_path):
    rows = [{"text": f"note {n}", "label": 0} for n in range(200)]
    kept = len(units(written(tmp_path, rows, "jsonl"), limit=10).train)
    # A half of what is there, since ten of the twenty that are declared are a half.
    assert 70 <= kept <= 130


def test_dealing_out_gives_each_record_to_one_node_by_its_own_content(tmp_path):
    rows = [{"text": f"note {n}", "label": 0} for n in range(100)]
    source = written(tmp_path, rows, "jsonl").data
    config = DataConfig(source=source, partition="iid")

    def dealt() -> list[list[str]]:
        parts = (NodeConfig.from_flower({"partition-id": number, "num-partitions": 3}) for number in range(3))
        return [[record["text"] for record in stable.node_records(config, part, 0)] for part in parts]

    before = dealt()
    assert sorted(chain.from_iterable(before)) == sorted(row["text"] for row in rows)
    written(tmp_path, [{"text": "new", "label": 0}, *rows], "jsonl")
    after = dealt()
    assert sum(len(new) - len(old) for new, old in zip(after, before, strict=True)) == 1
    assert all(set(old) <= set(new) for new, old in zip(after, before, strict=True))


def test_equal_records_are_as_many_units(tmp_path):
    node = written(tmp_path, [{"text": "same", "label": 1}] * 3, "jsonl")
    assert len(units(node).train) == 3


def test_a_file_that_breaks_off_is_read_up_to_there(tmp_path):
    import gzip

    file = tmp_path / "data.jsonl.gz"
    whole = gzip.compress(b"".join(json.dumps({"text": f"note {n}", "label": 0}).encode() + b"\n" for n in range(5000)))
    file.write_bytes(whole[: len(whole) // 2])
    assert 0 < len(units(NodeConfig(data=str(file), name="ward")).train) < 5000


def test_what_is_left_out_and_why_is_in_the_nodes_own_log(tmp_path, capsys):
    rows = [{"text": "a note", "label": 0}] * 3 + [{"text": None, "label": 1}, {"text": "b"}, {"text": "c", "label": 9}]
    units(written(tmp_path, [*rows, {"text": "long " * 600, "label": 1}], "jsonl"))
    said = "4 of 7 records are used, 1 broken, 1 cut at 512 tokens, 1 without a label, 1 without text"
    assert f"ward: {said}; the coordinator is not told" in capsys.readouterr().err
