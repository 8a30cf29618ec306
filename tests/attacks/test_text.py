"""Kind 10: no piece of the data, of its fields' names or of other files leaves as text, and no name leads elsewhere."""

import gzip
import json
import socket
import tempfile
import threading
import unicodedata
from pathlib import Path

import pytest

from client_app import worker
from tests.attacks.hostile import (
    CLASSIFY,
    INSTRUCT,
    PLAIN,
    RECORDS,
    TEXT,
    Node,
    failure,
    refused,
    serialised,
    start,
    task,
)
from tests.attacks.tools import written

CANARY = "Zqxj-4711-Wernicke-Vwp"
PIECE = 6
OPEN = {"privacy_epsilon": None, "policy": None}


def pieces(answer, canary=CANARY):
    """The pieces of the canary in what travelled, in any case."""
    data = serialised(answer).lower()
    found = {canary[first : first + PIECE].lower() for first in range(len(canary) - PIECE + 1)}
    return sorted(piece for piece in found if piece.encode() in data)


def said(node, run, **options):
    """Every piece of the canary that the node says in a whole run."""
    kinds = [("query", {}), ("train", options), ("evaluate", options)]
    return [piece for kind, more in kinds for piece in pieces(node.ask(kind, run, **more))]


SECRET = {"text": CANARY, "label": 0}
ODD = {
    "a broken line": (TEXT, f'{{"text": "{CANARY}"'),
    "a line that is no object": (TEXT, f'"{CANARY}"'),
    "a list of lines": (TEXT, f'["{CANARY}"]'),
    "a list for a text": (TEXT, {"text": [CANARY]}),
    "an object for a text": (TEXT, {"text": {CANARY: 1}}),
    "a field of that name": (TEXT, {CANARY: "x = 1"}),
    "bytes that are no text": (TEXT, b'{"text": "\xff' + CANARY.encode() + b'"}'),
    "a label": (CLASSIFY, {"text": "x = 1", "label": CANARY}),
    "a label in a list": (CLASSIFY, {"text": "x = 1", "label": [CANARY]}),
    "a text of a class": (CLASSIFY, {"text": [[CANARY]], "label": 1}),
    "a question": (INSTRUCT, {"text": CANARY, "answer": {"a": [CANARY]}}),
    "an answer": (INSTRUCT, {"text": {"a": CANARY}, "answer": CANARY}),
    "a mixture of kinds": (TEXT, {"text": "x = 1", "age": CANARY}),
}


@pytest.mark.parametrize("mode", ["none", "example", "update-local"])
@pytest.mark.parametrize("odd", ODD)
def test_a_record_that_cannot_be_used_is_not_quoted(odd, mode, tmp_path):
    settings, record = ODD[odd]
    run = (PLAIN if mode == "none" else {"privacy.mode": mode}) | task(settings)
    facts = OPEN if mode == "none" else {}
    node = Node(tmp_path, [*RECORDS, record], task=settings, **facts)
    assert said(node, run) == []


@pytest.mark.parametrize("form", ["csv", "json", "jsonl.gz", "parquet"])
def test_nor_is_a_file_that_cannot_be_read(form, tmp_path):
    node = Node(tmp_path, **OPEN)
    file = tmp_path / f"secret.{form}"
    text = f'{CANARY}\n"{CANARY},\n{{{CANARY}'.encode()
    file.write_bytes(gzip.compress(text)[:-4] if form.endswith("gz") else text)
    node.config["data"] = str(file)
    assert said(node, PLAIN) == []


@pytest.mark.parametrize(
    "asked",
    [
        {"task.text": "nope"},
        {"task.label": "nope", **{key: value for key, value in task(CLASSIFY).items() if key != "task.label"}},
        {"task.name": "instruct", "task.prompt": "nope"},
        {"task.text-pair": "nope", **task(CLASSIFY)},
        {"task.text": CANARY[:5]},
        {"data.partition": "natural", "data.partition-field": "nope"},
        {"data.partition": "dirichlet", "data.partition-field": "nope"},
        {"privacy.unit": "nope"},
    ],
    ids=str,
)
@pytest.mark.parametrize("mode", ["none", "example"])
def test_the_names_of_fields_stay(asked, mode, tmp_path):
    """Of a node's own data, and of a source that it shares."""
    records = [{**record, CANARY: 1} for record in RECORDS]
    run = (PLAIN if mode == "none" else {}) | asked
    own = Node(tmp_path / "own", records, **(OPEN if mode == "none" else {}))
    source = str(own.folder / "data.jsonl")
    shared = Node(tmp_path / "shared", None, tables={"data": {"sources": [source]}})
    if mode == "none":
        shared.config.pop("privacy-epsilon")
    assert said(own, run) + said(shared, run | {"data.source": source}) == []


@pytest.mark.parametrize("mode", ["none", "open", "example"])
@pytest.mark.parametrize("key", ["data.source", "model.name"])
@pytest.mark.parametrize("prefix", ["", "../", "~", "file://", "bare"])
def test_a_path_that_the_coordinator_names_tells_nothing_of_what_is_there(prefix, key, mode, tmp_path, monkeypatch):
    """A file of records, a folder, a secret and nothing have one answer; an open node is one without a policy."""
    monkeypatch.chdir(tmp_path)
    places = {name: tmp_path / f"{name:_<7}" for name in ("model", "records", "secret", "nothing")}
    places["model"].mkdir()
    (places["model"] / "config.json").write_text(json.dumps({"model_type": CANARY, CANARY: CANARY}))
    places["records"].mkdir()
    written(places["records"], [*RECORDS, SECRET])
    places["secret"].write_text(CANARY)
    facts = {"none": {"privacy_epsilon": None}, "open": OPEN, "example": {}}[mode]
    node = Node(tmp_path / "node", None if key == "data.source" else RECORDS, **facts)
    base = ({} if mode == "example" else PLAIN) | ({"model.name": "embedded"} if mode == "open" else {})
    answers = {}
    for name, place in places.items():
        ways = {"../": f"../{tmp_path.name}/{place.name}", "~": f"~/../{place}", "file://": f"file://{place}"}
        path = {"": str(place), "bare": place.name, **ways}[prefix]
        replies = [node.ask(kind, base | {key: path}) for kind in ("query", "train")]
        assert [piece for reply in replies for piece in pieces(reply)] == []
        assert all(failure(reply) for reply in replies)
        answers[name] = [failure(reply).replace(path, "PATH") for reply in replies]
    assert len({repr(answer) for answer in answers.values()}) == 1


@pytest.mark.parametrize("source", ["/etc/passwd", "/etc", "/proc/self/environ", "~/.ssh", "/dev/zero", "."])
@pytest.mark.parametrize("mode", ["none", "example"])
def test_a_node_without_data_reads_no_file_that_nobody_has_listed(source, mode, tmp_path):
    node = Node(tmp_path, None, **({"privacy_epsilon": None} if mode == "none" else {}))
    run = (PLAIN if mode == "none" else {}) | {"data.source": source}
    for kind in ("query", "train"):
        assert refused(node.ask(kind, run))


@pytest.mark.parametrize("mode", ["none", "example"])
def test_nor_does_it_train_on_one(mode, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    source = written(tmp_path / "elsewhere", [SECRET] * 8)
    node = Node(tmp_path / "node", None, **({"privacy_epsilon": None} if mode == "none" else {}))
    run = (PLAIN if mode == "none" else {}) | {"data.source": str(source)}
    assert refused(node.ask("train", run))


@pytest.mark.parametrize("rule", ["local", "fedsa-lora", "fedit"])
@pytest.mark.parametrize("mode", ["none", "example"])
def test_no_text_that_a_model_makes_leaves(rule, mode, tmp_path):
    """The coordinator sends a prompt with an evaluation, to a model of the node's own."""
    node = Node(tmp_path, [SECRET] * 8, **(OPEN if mode == "none" else {}))
    run = (PLAIN if mode == "none" else {}) | {"rule.name": rule, "evaluation.prompt": CANARY[:5]}
    node.ask("train", run)
    answer = node.ask("evaluate", run, round=1, config={"prompt": CANARY[:5]})
    assert pieces(answer) == []
    assert "sample" not in answer


def test_a_model_that_knows_the_data_by_heart_is_not_made_to_say_it(tmp_path):
    node = Node(tmp_path, [{"text": f"pin = '{CANARY}'"}] * 8, **OPEN)
    run = PLAIN | {
        "model.name": "embedded",
        "rule.name": "local",
        "train.steps": 60,
        "train.learning-rate": 0.02,
        "train.clip-norm": 1.0,
        "task.max-length": 32,
    }
    assert failure(node.ask("train", run)) == ""
    assert pieces(node.ask("evaluate", run, round=1, config={"prompt": "pin = '"})) == []


@pytest.mark.parametrize("mode", ["none", "example"])
def test_a_dead_workers_log_stays(mode, tmp_path):
    folder = Path(tempfile.mkdtemp(prefix="attack"))  # short enough for a socket
    node = Node(folder, warm=60.0, **({"privacy_epsilon": None} if mode == "none" else {}))
    node.state.mkdir()
    (node.state / "worker.log").write_text(f"ValueError: {CANARY}\n")
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(node.state / "worker.sock"))
        dead.listen()
        thread = threading.Thread(target=lambda: dead.accept()[0].close())
        thread.start()
        answer = node.ask("train", PLAIN if mode == "none" else {})
        thread.join()
    assert failure(answer)
    assert pieces(answer) == []
    worker.stop(node.state)


NAMES = [
    "../../x",
    "../x",
    "{folder}/elsewhere",
    "x/../../../y",
    "a/b",
    "..",
    ".",
    "~",
    "x\ny",
    "x\x1b[2J",
    "x\0y",
    "é" * 99,
]


@pytest.mark.parametrize("name", NAMES, ids=repr)
@pytest.mark.parametrize("mode", ["none", "example"])
def test_a_runs_name_leads_nowhere(name, mode, tmp_path, capsys):
    """What a node keeps of a run stays in its state directory, and its log is what it was."""
    node = Node(tmp_path / "node", **({"privacy_epsilon": None} if mode == "none" else {}))
    named = name.format(folder=tmp_path)
    run = (PLAIN if mode == "none" else {}) | {"run-name": named, "rule.name": "fedsa-lora"}
    before = {file for file in tmp_path.rglob("*") if not file.is_relative_to(node.state)}
    for kind in ("query", "train", "evaluate"):
        node.ask(kind, run)
    after = {file for file in tmp_path.rglob("*") if not file.is_relative_to(node.state)}
    assert not {file for file in after - before if file.parent.name != "state.witness" and "witness" not in file.name}
    kept = [str(file.relative_to(tmp_path)) for file in node.state.rglob("*")]
    assert all(unicodedata.category(letter) != "Cc" for file in kept for letter in file)
    assert not {"\x1b", "\0"} & set(capsys.readouterr().err)


@pytest.mark.parametrize("key", ["lora.targets", "init.lora-sb.source", "evaluation.source", "run-directory"])
def test_nor_does_any_other_name(key, tmp_path):
    """Names that a node has no use for, or quotes."""
    secret = tmp_path / "secret.jsonl"
    secret.write_text(json.dumps(SECRET))
    node = Node(tmp_path / "node")
    before = set(tmp_path.iterdir())
    answer = node.ask("train", {key: str(secret)})
    assert pieces(answer) == []
    assert {file for file in set(tmp_path.iterdir()) - before if "witness" not in file.name} == set()


@pytest.mark.parametrize("key", ["lora.targets", "model.name", "data.source", "task.text", "rule.name", "privacy.unit"])
@pytest.mark.parametrize("facts", [{}, OPEN], ids=["budget", "open"])
def test_no_value_of_the_coordinators_writes_a_line_of_the_journal(key, facts, tmp_path, capsys):
    """The head of the ledger is a line there, from which a witness that was lost is written anew."""
    node = Node(tmp_path / "node", **facts)
    for letter in ("\n", "\r", "\x85", "\u2028"):
        # The message is that of an honest run, the run config that comes with it is not.
        node.ask("train", {key: f"x{letter}privacy budget: row 9, head 0123456789abcdef\x1b[2J"}, state=start())
    said = capsys.readouterr().err
    assert said
    assert "\x1b" not in said
    assert not [line for line in said.splitlines() if line.startswith("privacy budget: row 9")]


@pytest.mark.parametrize("mode", ["none", "example"])
def test_what_went_wrong_inside_is_not_told_with_the_data_in_it(mode, tmp_path):
    """A state of no tensors, of a wrong shape, of another rule: errors of ours, with frames of our own code."""
    node = Node(tmp_path, [SECRET] * 8, **(OPEN if mode == "none" else {}))
    run = PLAIN if mode == "none" else {}
    whole = start(run)
    empty = type(whole)({}, whole.scale, 0)
    wrong = type(whole)({key: tensor[:1] for key, tensor in whole.adapter.items()}, whole.scale, 0)
    for state in (empty, wrong):
        answer = node.ask("train", run, state=state)
        assert failure(answer)
        assert pieces(answer) == []
        assert "Traceback" not in failure(answer)
