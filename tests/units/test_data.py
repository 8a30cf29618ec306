"""Tasks and sources: from files to tokens, with every mistake named by file and line."""

import gzip
import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from torch.nn.functional import cross_entropy

from client_app.examples import node_examples
from common import tasks
from common.config.node import NodeConfig
from common.config.run import DataConfig, ModelConfig, TaskConfig
from common.error import BouquetError
from common.models import base
from common.sources import dealing, stdlib
from common.sources.fields import LeftOut
from common.sources.records import Placed
from common.tasks.task import IGNORED, Example
from tests.support.outputs import of_tokens


@pytest.fixture(scope="module")
def tokenizer():
    return base.load_tokenizer(ModelConfig())


def task(**settings):
    return tasks.build(TaskConfig.model_validate({key.replace("_", "-"): value for key, value in settings.items()}))


def data(**settings) -> DataConfig:
    return DataConfig.model_validate({key.replace("_", "-"): value for key, value in settings.items()})


def node(partition: int = 0, of: int = 2, **settings) -> NodeConfig:
    return NodeConfig.model_validate({"partition-id": partition, "num-partitions": of, **settings})


def write(path: Path, records: list[dict]) -> Path:
    text = "".join(json.dumps(record) + "\n" for record in records)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def said(found, field: str = "text") -> list:
    return [placed.found[field] for placed in found]


RECORDS = [{"text": f"example {i}", "label": i % 2, "ward": "abc"[i % 3]} for i in range(30)]


@pytest.mark.parametrize("form", ["jsonl", "jsonl.gz", "csv", "parquet", "folder"])
def test_a_source_is_a_file_or_a_folder_of_files(form, tmp_path):
    # What a table holds is text.
    expected = [{**record, "label": str(record["label"])} for record in RECORDS] if form == "csv" else RECORDS
    if form == "folder":
        write(tmp_path / "a.jsonl", RECORDS[:20])
        write(tmp_path / "b.jsonl", RECORDS[20:])
        source = tmp_path
    elif form.startswith("jsonl"):
        source = write(tmp_path / f"x.{form}", RECORDS)
    else:
        source = tmp_path / f"x.{form}"
        getattr(Dataset.from_list(RECORDS), f"to_{form}")(str(source))
    assert [placed.found for placed in dealing.read(str(source))] == expected


def test_a_line_that_is_not_json_is_named(tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "a"}\nnot json\n')
    with pytest.raises(
        BouquetError,
        match=rf"cannot be used \({bad}\): got 1 of 2: {bad}:2: a line is not JSON: expected one JSON .*, got not json",
    ):
        dealing.read(str(bad))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "/no/such/file.jsonl",
            r"there is no such file or folder \(data.source\): got /no/such/file.jsonl. Use an absolute",
        ),
        ("missing.csv", r"there is no such file or folder \(data.source\): got missing.csv"),
        (
            "nobody/nothing",
            r"there is no such file, folder or reachable hub data set \(data.source\): got 'nobody/nothing'",
        ),
    ],
)
def test_a_missing_source_is_named(source, message):
    with pytest.raises(BouquetError, match=message):
        dealing.read(source)
    with pytest.raises(BouquetError, match=message.replace("data.source", "evaluation.source")):
        dealing.read(source, "evaluation.source")


def test_a_file_of_unknown_form_is_refused(tmp_path):
    (tmp_path / "x.doc").write_text("hello")
    with pytest.raises(BouquetError, match=r"no file in a known format .*expected .jsonl, .json, .csv, .tsv, .txt"):
        dealing.read(str(tmp_path / "x.doc"))


def test_partitions_share_nothing_and_lose_nothing(tmp_path):
    source = str(write(tmp_path / "x.jsonl", RECORDS))
    for settings, nodes in (
        ({"partition": "iid"}, 4),
        ({"partition": "natural", "partition_field": "ward"}, 3),
        ({"partition": "dirichlet", "partition_field": "label", "dirichlet_alpha": 5.0}, 3),
    ):
        config = data(source=source, **settings)
        parts = [said(dealing.node_records(config, node(i, nodes), seed=0)) for i in range(nodes)]
        assert sorted(text for part in parts for text in part) == sorted(record["text"] for record in RECORDS)
    natural = dealing.node_records(data(source=source, partition_field="ward"), node(1, 3), seed=0)
    assert set(said(natural, "ward")) == {"b"}


def test_a_node_reads_its_own_file_whole(tmp_path):
    own = write(tmp_path / "own.jsonl", RECORDS[:7])
    assert len(dealing.node_records(data(source="stdlib"), node(3, 9, data=str(own)), seed=0)) == 7


def test_more_nodes_than_partitions_is_refused(tmp_path):
    source = str(write(tmp_path / "x.jsonl", RECORDS))
    with pytest.raises(
        BouquetError, match=r"more nodes than partitions .*expected at most 3 nodes, got partition-id 3"
    ):
        dealing.node_records(data(source=source, partition_field="ward"), node(3, 4), seed=0)


def test_a_partition_field_that_is_not_there_is_refused(tmp_path):
    source = str(write(tmp_path / "x.jsonl", RECORDS))
    with pytest.raises(
        BouquetError, match=r"no such field \(data.partition-field\): expected one of .*Did you mean 'ward'"
    ):
        dealing.node_records(data(source=source, partition_field="wards"), node(), seed=0)


def test_an_empty_partition_is_refused(tmp_path):
    source = write(tmp_path / "x.jsonl", RECORDS[:1])
    with pytest.raises(BouquetError, match=r"a node has too few examples .*expected at least 2.*got 1 record"):
        owned(data(partition="none", source=str(source)), node())


def test_the_embedded_data_is_code_without_docstrings_in_families():
    records = stdlib.records()
    families = {record["family"] for record in records}
    assert families == set(stdlib.FAMILIES)
    for family in families:
        assert sum(record["family"] == family for record in records) >= 50
    shown = next(
        record for record in records if record["text"].startswith("class Future") or "def run(" in record["text"]
    )
    assert '"""' not in shown["text"]


def test_text_is_cut_into_windows_and_every_token_is_learnt(tokenizer):
    text = "def spam(eggs):\n    return eggs\n" * 20
    examples = list(task(max_length=16).encode({"text": text}, tokenizer))
    assert all(len(example.tokens) <= 16 and example.labels == example.tokens for example in examples)
    joined = [token for example in examples for token in example.tokens[1:]]
    assert tokenizer.decode(joined) == text
    for nothing in (None, "", " \n"):
        with pytest.raises(LeftOut, match="without text"):
            task().encode({"text": nothing}, tokenizer)


def test_only_the_answer_is_learnt(tokenizer):
    record = {"instruction": "Say hello", "input": "politely", "output": "Good day"}
    (example,) = task(name="instruct").encode(record, tokenizer)
    learnt = [token for token, label in zip(example.tokens, example.labels, strict=True) if label != IGNORED]
    assert tokenizer.decode(learnt) == "Good day</s>"
    assert "politely" in tokenizer.decode(example.tokens)


def test_a_chat_template_is_used_where_there_is_one(tokenizer, monkeypatch):
    template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"
    )
    monkeypatch.setattr(tokenizer, "chat_template", template)
    (example,) = task(name="instruct").encode({"instruction": "Hi", "output": "Yo"}, tokenizer)
    assert tokenizer.decode(example.tokens) == "<user>Hi<bot>Yo</s>"


def test_a_prompt_that_leaves_no_room_is_left_out(tokenizer):
    with pytest.raises(LeftOut, match="without room for an answer"):
        task(name="instruct", max_length=8).encode({"instruction": "x " * 50, "output": "y"}, tokenizer)


class Counting:
    """A tokenizer that counts what it is given."""

    def __init__(self, tokenizer):
        self._tokenizer, self.texts = tokenizer, 0

    def __call__(self, *arguments, **options):
        self.texts += 1
        return self._tokenizer(*arguments, **options)

    def __getattr__(self, name):
        return getattr(self._tokenizer, name)


def test_a_record_is_tokenised_once_a_process_by_what_stands_in_it(tokenizer):
    """In whatever order and place it comes; not for another task, and not as another record in its place."""
    counting = Counting(tokenizer)
    long = {"instruction": "x " * 50, "output": "y"}
    found = [Placed(f"a:{n}", {"instruction": f"Say {n}", "output": "yes"}) for n in range(3)] + [Placed("a:3", long)]
    asked = task(name="instruct", max_length=24)
    first, counts = tasks.encoded(asked, found, counting)
    assert (len(first[0]), counts.left_out) == (1, {"room": 1})
    once = counting.texts
    moved = [Placed(f"b:{n}", placed.found) for n, placed in enumerate(reversed(found))]
    again, counted = tasks.encoded(asked, moved, counting)
    assert again == first[::-1]
    assert counted == counts
    assert counting.texts == once
    tasks.encoded(asked, [Placed("a:0", {"instruction": "Say 0", "output": "no"})], counting)
    assert counting.texts > once
    once = counting.texts
    tasks.encoded(task(name="instruct", max_length=25), found[:1], counting)
    assert counting.texts > once


@pytest.mark.parametrize("label", [2, -1, "positive", 0.5, "1.5", "NA"])
def test_a_label_out_of_range_is_refused(label, tokenizer):
    with pytest.raises(
        BouquetError, match=r"a label is out of range \(field 'label'\): expected a whole number from 0 to 1"
    ):
        task(name="classify").encode({"text": "x", "label": label}, tokenizer)


def test_a_field_that_the_data_lacks_is_named():
    what = r"the task needs a field that the data lacks .*expected a field 'text', got the fields txt, label"
    with pytest.raises(BouquetError, match=what):
        task().check(["txt", "label"], where="x.jsonl")


def test_padding_is_not_learnt_and_not_counted():
    batch = task().collate([Example([1, 5, 6], [1, 5, 6]), Example([1, 7], [1, 7])], pad=0)
    assert batch["labels"].tolist() == [[1, 5, 6], [1, 7, IGNORED]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    logits = torch.randn(2, 3, 9, generator=torch.Generator().manual_seed(0))
    score = task().score(of_tokens(logits, batch["labels"]))
    assert score.count == 3
    alone = cross_entropy(logits[0, :2], torch.tensor([5, 6]), reduction="sum") + cross_entropy(
        logits[1, :1], torch.tensor([7])
    )
    assert score.loss == pytest.approx(alone.item(), rel=1e-6)


def owned(config: DataConfig, owner: NodeConfig):
    return node_examples(config, owner, TaskConfig.model_validate({"max-length": 64}), ModelConfig(), 0, ())


def test_pooled_training_has_all_nodes_examples_and_nothing_held_out(tmp_path):
    source = str(write(tmp_path / "x.jsonl", RECORDS))
    nodes = [node(number, of=3) for number in range(3)]
    alone = [owned(data(source=source, partition="iid", holdout=0.2, limit=8), each) for each in nodes]
    pooled = owned(data(source=source, partition="iid", holdout=0.2, limit=8, pooled=True), nodes[1])
    assert pooled.train == [example for part in alone for example in part.train]
    assert pooled.heldout == alone[1].heldout
    assert not {str(example.tokens) for example in pooled.train} & {
        str(example.tokens) for part in alone for example in part.heldout
    }


def test_a_node_with_its_own_data_cannot_pool(tmp_path):
    file = str(write(tmp_path / "x.jsonl", RECORDS))
    with pytest.raises(BouquetError, match=r"cannot train on the others' \(node-000, data.pooled = true\)"):
        owned(data(source=file, pooled=True), node(data=file))
