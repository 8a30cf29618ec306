"""Kind 3: from the file to the engine, one record more is one unit more, and changes none of the others."""

import random
from collections import Counter

import pandas
import pytest

from tests.attacks.hostile import CLASSIFY, RECORDS, TEXT, Node, neighbours, task
from tests.attacks.taps import units

FIRST, LAST = 0, -1
SEVEN = range(7)
CLASSES = task(CLASSIFY)

# What the coordinator asks for, of a node with data of its own.
RUNS = {
    "as usual": {},
    "half held out": {"data.holdout": 0.5},
    "almost all held out": {"data.holdout": 0.99},
    "a little held out": {"data.holdout": 0.01},
    "one record": {"data.limit": 1},
    "a few records": {"data.limit": 4},
    "another seed": {"seed": 12345, "data.limit": 5},
    "long texts": {"task.max-length": 512},
    "no text": {"task.max-length": 4},
    "dealt evenly": {"data.partition": "iid"},
    "dealt by a field": {"data.partition": "natural", "data.partition-field": "age"},
}

# What one record more may be like.
MORE = {
    "another": {"text": "def more(x):\n    return 2 * x\n", "label": 1, "age": 50},
    "a copy": RECORDS[3],
    "a long one": {"text": "x = 1\n" * 200, "label": 0, "age": 51},
    "one of other fields": {"text": "y = 2", "note": "new", "label": 1},
    "a number": {"text": 12, "label": 0, "age": 52},
    "a fraction for a number": {"text": "z = 3", "label": 0, "age": 52.5},
    "a word for a number": {"text": "z = 3", "label": "one", "age": "old"},
    "nothing for a number": {"text": "z = 3", "label": None, "age": None},
    "a list": {"text": ["z", "=", "3"], "label": [0], "age": [1, 2]},
}


def apart_by(less, more):
    """The units that one of two nodes has and the other has not."""
    assert less is not None, "a node that does not train"
    assert more is not None, "a node that one more record keeps from training"
    return less - more, more - less


def assert_one_more(less, more, run=None):
    """Nothing of the smaller data set is missing from the larger one, which has at most one unit more."""
    missing, extra = apart_by(units(less, run), units(more, run))
    assert not missing
    assert extra.total() <= 1


def drawn(seed):
    """A data set of no particular kind, with duplicates and odd values, and one record more."""
    rng = random.Random(seed)

    def record():
        text = rng.choice(
            ["x = 1", f"def f{rng.randrange(9)}(): pass", str(rng.randrange(100)), "a " * rng.randrange(60)]
        )
        made = {"text": text, "label": rng.randrange(2), "age": rng.randrange(20, 40)}
        if rng.random() < 0.2:
            made[rng.choice(["text", "label", "age", "more"])] = rng.choice([None, 3, 2.5, "old", "", True])
        return made

    records = [record() for _ in range(rng.randrange(3, 12))]
    records += rng.choices(records, k=rng.randrange(3))
    place = rng.randrange(len(records) + 1)
    return records, [*records[:place], record(), *records[place:]]


@pytest.mark.parametrize("run", RUNS)
def test_one_record_more_is_one_unit_more(run, tmp_path):
    for number, one in enumerate(MORE.values()):
        less, more = neighbours(tmp_path / str(number), RECORDS, [*RECORDS, one])
        assert_one_more(less, more, RUNS[run])


@pytest.mark.parametrize("one", MORE)
@pytest.mark.parametrize("settings", [TEXT, CLASSIFY], ids=lambda settings: settings["name"])
def test_wherever_it_stands(one, settings, tmp_path):
    for place in (0, 4, 8):
        records = [*RECORDS[:place], MORE[one], *RECORDS[place:]]
        less, more = neighbours(tmp_path / str(place), RECORDS, records, task=settings)
        assert_one_more(less, more, task(settings))


@pytest.mark.parametrize("seed", range(12))
def test_whatever_the_data_is(seed, tmp_path):
    rng = random.Random(seed)
    for turn in range(4):
        run = rng.choice(list(RUNS.values()))
        settings = rng.choice([TEXT, CLASSIFY])
        less, more = neighbours(tmp_path / str(turn), *drawn(4 * seed + turn), task=settings)
        assert_one_more(less, more, run | task(settings))


@pytest.mark.parametrize("form", ["csv", "json"])
@pytest.mark.parametrize("one", ["another", "a copy", "a fraction for a number", "a word for a number", "a number"])
def test_in_whatever_form_the_file_is(one, form, tmp_path):
    """A column of numbers in which one is a word is still a column of numbers to all other records."""
    for settings in (TEXT, CLASSIFY):
        less, more = neighbours(tmp_path / settings["name"], RECORDS, [*RECORDS, MORE[one]], form=form, task=settings)
        assert units(less, task(settings))
        assert_one_more(less, more, task(settings))


@pytest.mark.parametrize("one", ["007", "1e3", "true", "", "2020-01-01", "null", "x"])
def test_text_that_looks_like_a_number_stays_text(one, tmp_path):
    numbers = [{"text": f"0{n}", "label": n % 2} for n in range(8)]
    for form in ("csv", "jsonl"):
        less, more = neighbours(tmp_path / form, numbers, [*numbers, {"text": one, "label": 1}], form=form)
        assert_one_more(less, more)


@pytest.mark.parametrize("partition", ["none", "iid", "natural"])
@pytest.mark.parametrize("place", [FIRST, LAST])
def test_a_source_that_nodes_share_is_dealt_out_record_by_record(partition, place, tmp_path):
    """The operators allow the source; which part of it is whose is the coordinator's to say."""
    run = {"data.partition": partition, "data.partition-field": "family"}
    families = [{**record, "family": "ab"[n % 2]} for n, record in enumerate(RECORDS)]
    for number, one in enumerate(
        [{**MORE["another"], "family": "a"}, {**families[2]}, {"text": "x = 1", "family": "b"}]
    ):
        folder = tmp_path / str(number)
        folder.mkdir(parents=True)
        whole = [one, *families] if place == FIRST else [*families, one]
        sources = []
        for name, records in (("less", families), ("more", whole)):
            node = Node(folder / name, records)
            sources.append(str(node.folder / "data.jsonl"))
        for part in range(2):
            nodes = [
                Node(
                    folder / f"{part}{place}{name}",
                    None,
                    tables={"data": {"sources": [source]}},
                    partition_id=part,
                    num_partitions=2,
                )
                for name, source in enumerate(sources)
            ]
            found = [units(node, run | {"data.source": source}) for node, source in zip(nodes, sources, strict=True)]
            if found != [None, None]:
                missing, extra = apart_by(*found)
                assert not missing
                assert extra.total() <= 1


@pytest.mark.parametrize("field", ["age", "text", "label"])
def test_no_field_of_the_coordinators_choice_moves_all_records_at_once(field, tmp_path):
    """A record with a new value of the field that deals them out must not turn the parts of all nodes by one."""
    run = {"data.partition": "natural", "data.partition-field": field}
    changed = []
    for name, records in (("less", RECORDS), ("more", [MORE["another"] | {field: -1}, *RECORDS])):
        owner = Node(tmp_path / f"{name} data", records)
        source = str(owner.folder / "data.jsonl")
        tables = {"data": {"sources": [source]}}
        node = Node(tmp_path / name, None, tables=tables, partition_id=1, num_partitions=8)
        changed.append(units(node, run | {"data.source": source}) or Counter())
    missing, extra = apart_by(*changed)
    assert missing.total() + extra.total() <= 1


def test_a_folder_of_files_is_read_record_by_record(tmp_path):
    less, more = neighbours(tmp_path, None, None)
    for node, records in ((less, RECORDS), (more, [*RECORDS, MORE["one of other fields"]])):
        folder = node.folder / "files"
        folder.mkdir()
        for name, part in (("a", records[:4]), ("b", records[4:])):
            inner = Node(folder / f"of {name}", part)
            (inner.folder / "data.jsonl").rename(folder / f"{name}.jsonl")
        node.config["data"] = str(folder)
    assert_one_more(less, more)


@pytest.mark.parametrize("one", ["one of other fields", "a fraction for a number", "nothing for a number"])
def test_nor_do_the_columns_of_one_table_have_a_say_in_another(one, tmp_path):
    """Where one record gives a column another type, or is the first to have it, in its own Parquet file."""
    less, more = neighbours(tmp_path, None, None)
    for node, records in ((less, RECORDS), (more, [*RECORDS, MORE[one]])):
        folder = node.folder / "files"
        folder.mkdir()
        for name, part in (("a", records[:4]), ("b", records[4:])):
            pandas.DataFrame.from_records(part).to_parquet(folder / f"{name}.parquet")
        node.config["data"] = str(folder)
    assert_one_more(less, more)


def test_a_file_that_cannot_be_read_to_its_end_is_what_could_be_read(tmp_path):
    less, more = neighbours(tmp_path, RECORDS, RECORDS)
    with (more.folder / "data.jsonl").open("ab") as file:
        file.write(b'{"text": "broken')
    assert_one_more(less, more)
