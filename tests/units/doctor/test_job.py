"""Data, policy, model, memory and budget: what keeps a node from a run is named."""

import json

import pytest

from common.config.node import NodeConfig
from common.error import BouquetError
from common.privacy import accounting
from deploy.doctor import job
from deploy.doctor.budget import budget
from deploy.doctor.check import Check, WarningError, examine
from strategies import read_config

BAD = [
    ('{"text": "fine"}\n{"text": \n', "got 1 of 2: .*notes.jsonl:2: a line is not JSON"),
    ('{"text": "fine"}\n\n{"text": [5]}\n', "notes.jsonl:3: a field is not text .field 'text'.: .*got a list. Set"),
    ('{"txet": "fine"}\n', "needs a field that the data lacks .*Did you mean 'txet'?"),
    ('{"text": {}}\n' * 5, "got 5 of 5: .*notes.jsonl:3: a field is not text .*got an object.*; and 2 more"),
]


@pytest.mark.parametrize(("text", "message"), BAD)
def test_bad_data_is_named_by_line(text, message, tmp_path):
    file = tmp_path / "notes.jsonl"
    file.write_text(text)
    with pytest.raises(BouquetError, match=message):
        job.data(read_config({}), NodeConfig(data=str(file)))


def test_records_that_say_whose_they_are_are_counted(tmp_path):
    file = tmp_path / "notes.jsonl"
    records = [{"text": f"note {n}", "patient": None if n < 3 else n // 2} for n in range(9)]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    node = NodeConfig(data=str(file))

    def said(unit: str) -> str:
        return job.data(read_config(PRIVATE | {"privacy.unit": unit}), node)

    assert said("patient").endswith("; 3 have no 'patient' and are left out")
    assert "left out" not in said("record")
    with pytest.raises(
        BouquetError,
        match=r"no record says whom it belongs to .*: expected the field 'pateint', got .*Name the",
    ):
        said("pateint")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('max-bytes = "20 MB"', "1 mistake in the policy {}: max-bytes: expected a whole number, got '20 MB' Correct"),
        ("max-bytes = 20", "bytes of an update: expected at most 20 (max-bytes), got about 491,520"),
        ("max-byte = 20", "max-byte: unknown key. Did you mean 'max-bytes'? Correct them in the file."),
        ("rules = [", "cannot be read ({}): expected a TOML file, got Invalid value (at end of document). Correct it"),
    ],
)
def test_a_policy_that_will_not_do_is_one_line(text, told, tmp_path, capsys):
    file = tmp_path / "policy.toml"
    file.write_text(text)
    assert not examine([Check("policy", lambda: job.policy(read_config({}), NodeConfig(policy=str(file))))])
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("FAIL  policy")
    assert told.format(file) in line


def test_a_witness_or_a_ledger_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for key, place in (("privacy-witness", "file/head"), ("state-directory", "file/state")):
        facts = {"state-directory": str(tmp_path / "state"), "records": 40, key: str(tmp_path / place)}
        with pytest.raises(
            BouquetError,
            match=r"folders cannot be written to .*/file.*, which is a file\. Give it to that user",
        ):
            budget(read_config(PRIVATE), NodeConfig.from_flower(facts))
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_a_bad_label_is_named_by_line(tmp_path):
    file = tmp_path / "labels.jsonl"
    file.write_text('{"text": "a", "label": 1}\n{"text": "b", "label": 7}\n')
    config = read_config({"task.name": "classify"})
    with pytest.raises(BouquetError, match=r"labels.jsonl:2: a label is out of range .*from 0 to 1, got 7"):
        job.data(config, NodeConfig(data=str(file)))


def test_a_missing_model_is_named_with_the_command_that_gets_it():
    with pytest.raises(BouquetError, match=r"not on this machine .*hf download some/model --revision main"):
        job.model(read_config({"model.name": "some/model"}))


def test_a_folder_without_weights_is_named(tmp_path):
    with pytest.raises(BouquetError, match=r"a model without weights .*expected \*.safetensors. Download it again"):
        job.model(read_config({"model.name": str(tmp_path)}))


def test_too_little_memory_is_named():
    config = read_config({"train.batch-size": 65536, "task.max-length": 512})
    with pytest.raises(BouquetError, match=r"too little memory .*batch 65536, sequence 512.*Lower train.batch-size"):
        job.memory(config, NodeConfig())


def test_the_estimate_grows_with_batch_sequence_and_precision():
    def bytes_for(**changes: object) -> float:
        return job.estimate(read_config({key.replace("_", "."): value for key, value in changes.items()}), 8, gpu=True)

    small = bytes_for()
    assert bytes_for(**{"train.batch-size": 16}) > small
    assert bytes_for(**{"task.max-length": 256}) > small
    assert bytes_for(**{"model.quantization": "none"}) > bytes_for(**{"model.quantization": "int8"}) > small
    assert bytes_for(**{"model.gradient-checkpointing": True}) < small
    # An example is two rows.
    answers, pairs = (bytes_for(**{"task.max-length": 256, "task.name": name}) for name in ("instruct", "dpo"))
    assert pairs > answers


PRIVATE = {
    "privacy.mode": "example",
    "privacy.epsilon": 3.0,
    "privacy.accountant": "rdp",
    "privacy.expected-batch": 4,
    "train.steps": 2,
    "train.weighting": "uniform",
    "num-server-rounds": 4,
}


def test_the_budget_is_what_was_spent_and_what_the_run_will_cost(tmp_path):
    """To the figure that the ledger itself comes to, after the rounds that the doctor has foretold."""
    from client_app.budget import Budget, Limits

    file = tmp_path / "notes.jsonl"
    file.write_text("".join(json.dumps({"text": f"note {number}"}) + "\n" for number in range(40)))
    config = read_config(PRIVATE)
    facts = {"name": "ward-1", "data": str(file), "records": 40, "state-directory": str(tmp_path / "state")}
    node = NodeConfig.from_flower(facts)

    def limited(epsilon: float) -> NodeConfig:
        return node.model_copy(update={"privacy_epsilon": epsilon})

    said = budget(config, limited(3.0))
    assert said.endswith("at delta 1e-05 after the run, 0 before, out of 3")
    release = accounting.plan(config.privacy, 40, 2, 4)
    own = Budget(node.ledger, node.witness, "ward-1", Limits(0.0, 1e-5, 0.0))
    for turn in range(4):
        entry = own.charge(release, config.privacy, run="first", round=turn, rule="fedit")
    assert f"epsilon {entry.epsilon:.4g} at delta" in said

    assert "; the node has no limit" in budget(config, node)
    with pytest.raises(
        WarningError,
        match=r"budget of this node will not last .*at most 3.5, got .*enough for [123] of 4 rounds. Lower",
    ):
        budget(config, limited(3.5))
    with pytest.raises(BouquetError, match=r"budget of this node is spent .*at most 2.9.*with one round. bouquet led"):
        budget(config, limited(2.9))
    for text, reason in (
        (
            "max-epsilon = 0.5",
            r"what one run may cost this node is spent \(privacy.max-epsilon\): expected at most 0.5",
        ),
        (
            "min-noise-multiplier = 50.0",
            r"the noise multiplier: expected 50 or more \(min-noise-multiplier\), got less",
        ),
    ):
        strict = tmp_path / "policy.toml"
        strict.write_text(f"[privacy]\n{text}\n")
        with pytest.raises(BouquetError, match=reason):
            budget(config, limited(20.0).model_copy(update={"policy": str(strict)}))
    with pytest.raises(BouquetError, match=r"a run without privacy on a node with a budget .*Set privacy.mode=example"):
        budget(read_config({}), limited(3.0))
