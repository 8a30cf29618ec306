"""The reader of files: every form, every encoding, and what is wrong with a record said where it stands."""

import gzip
import json
from pathlib import Path

import pyarrow
import pytest

from common.config.node import NodeConfig
from common.config.run import DataConfig
from common.error import BouquetError
from common.sources import dealing, files, records, stable
from common.sources.fields import LeftOut, in_order, text, words

CAFE = {"text": "café", "label": "1"}


def written(file: Path, content: str | bytes) -> Path:
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


def found(file: Path) -> list:
    return [placed.found for placed in records.read(file)]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.csv", "text,label\ncafé,1\n"),
        ("x.csv", "text;label\r\ncafé;1\r\n"),
        ("X.CSV", "text , label\ncafé,1\n"),
        ("x.csv", "text|label\ncafé|1\n"),
        ("x.csv", "\ufefftext\tlabel\ncafé\t1\n"),
        ("x.csv", "text,label\ncafé,1\n".encode("cp1252")),
        ("x.csv", "text;label\ncafé;1\n".encode("utf-16")),
        ("x.csv", 'text,label,"a;b;c"\ncafé,1,\n'),
        ("x.tsv", "text\tlabel\ncafé\t1\n"),
        ("x.jsonl", '\ufeff{"text": "café", "label": "1"}\n\n'),
        ("x.jsonl", '{"text": "café", "label": "1"}'.encode("cp1252")),
        ("x.json", '[{"text": "café",\n "label": "1"}]'),
        ("x.json", '{"text": "café", "label": "1"}\n'),
        ("x.json", '[{"text": "café", "label": "1"}]'.encode("utf-16")),
        ("x.jsonl.gz", gzip.compress('{"text": "café", "label": "1"}\n'.encode(), mtime=0)),
    ],
)
def test_a_record_is_the_same_in_every_form(name, content, tmp_path):
    (record,) = found(written(tmp_path / name, content))
    assert {field: record[field] for field in CAFE} == CAFE


def test_zstandard_is_read(tmp_path):
    with pyarrow.output_stream(str(tmp_path / "x.jsonl.zst"), compression="zstd") as file:
        file.write(json.dumps(CAFE).encode())
    assert found(tmp_path / "x.jsonl.zst") == [CAFE]


def test_a_line_of_a_text_file_is_a_text(tmp_path):
    assert found(written(tmp_path / "x.txt", "one\r\n\ntwo, three")) == [{"text": "one"}, {"text": "two, three"}]


def test_bytes_that_are_not_utf8_change_no_other_line(tmp_path):
    lines = [b"text", "naïve".encode("cp1252"), "naïve".encode()]
    assert found(written(tmp_path / "x.csv", b"\n".join(lines))) == [{"text": "naïve"}] * 2


def test_words_are_words_and_an_empty_cell_is_no_value(tmp_path):
    rows = "text,label\nNA,None\nnull,0\n,nan\n007\n"
    assert found(written(tmp_path / "x.csv", rows)) == [
        {"text": "NA", "label": "None"},
        {"text": "null", "label": "0"},
        {"text": None, "label": "nan"},
        {"text": "007", "label": None},
    ]


WHOLE = gzip.compress(b'{"text": "a"}\n' * 9, mtime=0)
WRONG = [
    ("x.jsonl", '{"text": "a"}\n{torn\n', r":2: a line is not JSON: expected one JSON object per line, got {torn"),
    ("x.jsonl", "7\n", r":1: a record is not an object: expected one JSON object per record, got 7"),
    ("x.jsonl", '{"text": ' + "[" * 90 + "]" * 90 + "}", r":1: a record is nested too deeply: expected at most 50"),
    (
        "x.jsonl",
        '{"text": "a"}'.encode("utf-16"),
        r":1: a line is not JSON.* A UTF-16 file must be",
    ),
    ("x.json", '[{"text": "a"}, {"text"]', r"x.json: a file is not JSON: expected an array of objects, got Expecting"),
    ("x.json", '[{"text": "a"}, 7]', r", record 2: a record is not an object"),
    (
        "x.csv",
        "text,label\nHello, you,1\n",
        r":2: a row has more cells than the header: expected 2 .*, got 3",
    ),
    ("x.csv", 'text,label\n"open,1\n' + "more,1\n" * 9, r":\d+: a row is not CSV: got unexpected end of data"),
    (
        "x.csv",
        "text,label,text\na,1,b\n",
        r"x.csv: two columns with the same name: got text. Give each its own name",
    ),
    ("x.csv", "text,label\ra,1\rb,0\r", r"x.csv: the header of a table cannot be read"),
    ("x.txt", "a\na\0b\n", r":2: a line is not text: expected UTF-8, got zero bytes, as UTF-16 has"),
    ("x.parquet", "nothing", r"x.parquet: a file is not Parquet"),
    ("x.jsonl.gz", WHOLE[:-9], "x.jsonl.gz: a data file cannot be read to its end"),
    ("x.jsonl.zst", b"nothing", "x.jsonl.zst: a data file cannot be read to its end"),
]


@pytest.mark.parametrize(("name", "content", "said"), WRONG)
def test_what_is_broken_is_told_by_place_and_absent_in_private_runs(name, content, said, tmp_path):
    file = written(tmp_path / name, content)
    with pytest.raises(BouquetError, match=rf"records that cannot be used \({file}\): got 1 of \d+: .*{said}"):
        dealing.read(str(file))
    assert all(record == {"text": "a"} for record in stable.read(str(file)))


def test_files_of_several_forms_are_refused(tmp_path):
    for name in ("a.csv", "b.txt"):
        written(tmp_path / name, "text\n")
    with pytest.raises(
        BouquetError, match=r"files of several formats .*got .csv, .txt. Name one file, or keep only files"
    ):
        files.files(str(tmp_path))


@pytest.mark.parametrize(
    ("value", "said"),
    [(7, "7"), (1.0, "1.0"), (True, "True"), (0, "0"), (False, "False"), ("None", "None")],
)
def test_a_number_or_a_truth_value_is_its_text(value, said):
    assert text({"text": value}, "text") == said


@pytest.mark.parametrize("value", [None, "", " \n", float("nan")])
def test_nothing_is_no_text(value):
    with pytest.raises(LeftOut, match="without an answer"):
        text({"output": value}, "output", "answer")


@pytest.mark.parametrize(("value", "kind"), [([1], "a list"), ({"a": 1}, "an object"), (b"x", "bytes")])
def test_a_list_is_no_text(value, kind):
    said = rf"a field is not text \(field 'notes'\): expected text, .*, got {kind}. Set task.name=chat"
    with pytest.raises(BouquetError, match=said):
        words(value, "notes")


def test_numbers_are_in_order_by_number_and_words_by_the_alphabet():
    assert in_order(["10", "9", "9", "-1.5"]) == ["-1.5", "9", "10"]
    assert in_order(["10", "9", "ham"]) == ["10", "9", "ham"]


def test_records_that_belong_to_nobody_are_named(tmp_path):
    rows = [{"branch": None if n % 5 == 0 else "ab"[n % 2], "text": f"t {n}"} for n in range(20)]
    source = str(written(tmp_path / "x.jsonl", "".join(json.dumps(row) + "\n" for row in rows)))
    data = DataConfig.model_validate({"source": source, "partition-field": "branch"})
    said = (
        r"records without a value in the partition field \(data.partition-field = 'branch'\): .* got 4 of 20: "
        r".*x.jsonl:1; .*:6; .*:11; and 1 more. Correct them, name another field, or set data.partition = 'iid'"
    )
    with pytest.raises(BouquetError, match=said):
        dealing.own_records(data, NodeConfig.from_flower({"partition-id": 0, "num-partitions": 2}), 0)


def test_a_draw_that_cannot_be_had_says_what_to_change(tmp_path):
    source = str(written(tmp_path / "x.csv", "text,label\n" + "".join(f"t {n},{n % 2}\n" for n in range(6))))
    data = DataConfig.model_validate({"source": source, "partition": "dirichlet", "partition-field": "label"})
    said = r"cannot be divided among so many nodes .*dirichlet-alpha = 0.5.* at least 2 for each of 5 nodes, got 6"
    with pytest.raises(
        BouquetError, match=said + " records. Use fewer nodes, a larger data.dirichlet-alpha, more data"
    ):
        dealing.own_records(data, NodeConfig.from_flower({"partition-id": 0, "num-partitions": 5}), 0)
