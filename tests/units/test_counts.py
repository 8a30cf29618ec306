"""Nothing of a node's data is left out in silence: what became of its records is counted, told and shown."""

import json

import pytest

from common import tasks
from common.config.run import ModelConfig, TaskConfig
from common.error import BouquetError
from common.models import base, lengths
from common.sources.counts import Counts
from common.sources.records import Placed
from tests.support.grid import run_in_process

COUNTS = Counts(812, {"text": 38, "label": 2}, 120, 772, 128)


def test_counts_are_told_in_a_line():
    assert str(COUNTS) == "812 records, 40 left out (38 without text, 2 without a label), 120 cut at 128 tokens"
    assert str(Counts(1, {}, 0, 1, 128)) == "1 record"


def test_counts_travel_as_named_whole_numbers():
    assert Counts.read(COUNTS.numbers()) == COUNTS


@pytest.mark.parametrize(
    "change", [{"records": -1}, {"records": 10**13}, {"records": 7}, {"cut": 773}, {"cut": 0.5}, {"more": 1}]
)
def test_counts_of_a_node_that_do_not_fit_are_refused(change):
    with pytest.raises(BouquetError, match="malformed counts of a data set: expected consistent whole numbers from 0"):
        Counts.read(COUNTS.numbers() | change)


def test_what_a_node_leaves_out_is_in_the_log_the_record_and_the_report(settings, tmp_path):
    rows = [{"text": None if n < 3 else f"word {n} " * (40 if n == 9 else 2), "label": n % 2} for n in range(20)]
    rows += [{"text": "no label"}, {"text": 7, "label": "1"}]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"data.source": str(tmp_path / "x.jsonl"), "data.partition": "none", "num-server-rounds": 1}
    run_in_process(settings(**source, **{"task.name": "classify", "data.limit": 0}), nodes=2)
    said = "has 22 records, 4 left out (3 without text, 1 without a label), 1 cut at 32 tokens"
    assert f"    node-000 {said}\n    node-001 {said}" in (tmp_path / "run/run.log").read_text()
    events = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    told = [event for event in events if event["phase"] == "data"]
    counts = {"records": 22, "left_out": {"text": 3, "label": 1}, "cut": 1, "examples": 18, "length": 32}
    assert [(event["node"], event["counts"]) for event in told] == [("node-000", counts), ("node-001", counts)]
    assert "4 (3 without text, 1 without a label)" in (tmp_path / "run/report.html").read_text()


def fitted(name: str, words: list[int], **settings: object) -> int:
    task = TaskConfig.model_validate({"name": name, **settings})
    found = [Placed(str(n), {"text": "a " * n, "label": 0}) for n in words]
    return lengths.fitted(task, ModelConfig(), found, base.load_tokenizer(ModelConfig()), "stdlib").length


def test_an_open_length_is_what_the_records_need_within_the_positions():
    shortest = fitted("classify", [10] * 100)
    assert shortest % 8 == 0
    assert shortest < fitted("classify", [10] * 50 + [100] * 50) < 256
    # One of a thousand decides nothing.
    assert fitted("classify", [10] * 999 + [400]) == shortest
    assert fitted("classify", [3000] * 4) == base.positions(ModelConfig()) == 512
    assert fitted("classify", [10], **{"max-length": 64}) == 64


def test_an_open_length_is_no_records_doing_in_windows_and_private_runs():
    assert fitted("text", [3]) == fitted("text", [3000]) == 128
    task = TaskConfig(name="classify")
    assert lengths.bounded(task, ModelConfig(), private=True).max_length == 512
    assert tasks.build(lengths.bounded(TaskConfig(), ModelConfig(), private=True)).length == 128


def test_an_error_names_the_first_records_in_the_order_of_the_file():
    found = [Placed(f"x.csv:{n}", {"text": ["a"]}) for n in (12, 9, 10, 2)]
    task = tasks.build(TaskConfig())
    with pytest.raises(BouquetError, match=r"got 4 of 4: x.csv:2: .*; x.csv:9: .*; x.csv:10: .*; and 1 more. Set task"):
        tasks.encoded(task, found, base.load_tokenizer(ModelConfig()))
