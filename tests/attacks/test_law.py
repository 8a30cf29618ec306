"""The law: for neighbouring data and any run and message, all that a node emits is equal, but for noised values."""

import math

import pytest
from flwr.app import ArrayRecord, ConfigRecord, RecordDict

from common.adapter.values import Key, State
from common.wire import message as wire
from tests.attacks.hostile import (
    CLASSIFY,
    INSTRUCT,
    LOCAL,
    RECORDS,
    TEXT,
    emitted,
    failure,
    heard,
    neighbours,
    start,
    task,
    turned,
    whole,
)

USUAL = [{**record, "answer": f"{n}"} for n, record in enumerate(RECORDS)]
PAIRS = {
    "one more": (USUAL, [*USUAL, USUAL[0]]),
    "one that is broken": (USUAL, [*USUAL[:3], '{"text": ', *USUAL[3:]]),
    "one that is odd": (USUAL, [{"text": 5, "label": "x", "answer": None, "age": "old"}, *USUAL]),
    "one that is long": (USUAL, [*USUAL, {"text": "x = 1\n" * 500, "label": 1, "answer": "y " * 500, "age": 1}]),
    "one and none": ([], USUAL[:1]),
    "two and one": (USUAL[:1], USUAL[:2]),
    "other data": (USUAL, [{"text": f"class C{n}: pass", "label": 1, "answer": "no", "age": 9} for n in range(70)]),
}

RUNS = {
    "as usual": {},
    "the change": LOCAL,
    "planned": {"privacy.noise-multiplier": 0.0, "privacy.expected-batch": 4},
    "hardly a batch": {"privacy.expected-batch": 1},
    "one at a time": {"train.batch-size": 1},
    "several steps": {"train.steps": 2, "train.schedule": "linear", "train.warmup": 0.5},
    "automatic": {"privacy.clipping": "automatic"},
    "hooks": {"gradient.name": "hooks"},
    "nf4": {"model.quantization": "nf4"},
    "dropout": {"lora.dropout": 0.5},
    "the least clip": {"privacy.clip": 1e-4},
    "the largest clip": {"privacy.clip": 1e4},
    "the largest rate": {"train.learning-rate": 10.0},
    "pulled back": {
        "objective.name": "fedprox",
        "objective.fedprox.mu": 1.0,
        "optimizer.adamw.weight-decay": 0.1,
        "train.clip-norm": 1.0,
    },
    "limited": {"data.limit": 3},
    "held out": {"data.holdout": 0.9},
    "short": {"task.max-length": 4},
    "resumed": {"resume": True},
    "without a name": {"run-name": ""},
    "declared": {"train.weighting": "declared"},
    "counted": {"train.weighting": "examples"},
    "counted steps": {"train.steps": 0},
    "counted steps of the change": LOCAL | {"train.steps": 0, "train.epochs": 3},
    "pooled": {"data.pooled": True},
    "dealt": {"data.partition": "iid"},
    "another source": {"data.source": "/etc/passwd"},
    "a class": task(CLASSIFY),
    "a class of the change": task(CLASSIFY) | LOCAL,
    "a class, a head at home": task(CLASSIFY) | {"task.head": "local", "rule.name": "fedsa-lora"},
    "a class of another field": task(CLASSIFY) | {"task.label": "age", "task.labels": 37},
    "an answer": task(INSTRUCT),
    "an answer of the change": task(INSTRUCT) | LOCAL,
    **{f"up in {codec}": {"wire.up": codec} for codec in ("fp16", "bf16", "int8", "nf4")},
    **{f"the change up in {codec}": LOCAL | {"wire.up": codec} for codec in ("bf16", "int8")},
    **{
        f"by {rule}": {"rule.name": rule}
        for rule in ("fedit", "rolora", "fedsa-lora", "fedsvd", "flora", "fedex-lora", "florist", "local", "lora-fair")
    },
    "by ravan": {"rule.name": "ravan", "lora.rank": 4, "rule.ravan.scales": 0},
    "by fed-sb": {"rule.name": "fed-sb"},
    "the change by ravan": LOCAL | {"rule.name": "ravan", "lora.rank": 4},
    "the change by fedsa-lora": LOCAL | {"rule.name": "fedsa-lora"},
    "not private": {"privacy.mode": "none"},
    "noised elsewhere": {"privacy.mode": "update-central"},
}
REFUSED = {"counted", "counted steps", "pooled", "a class of another field", "not private", "noised elsewhere"}
TASKS = {"text": TEXT, "classify": CLASSIFY, "instruct": INSTRUCT}


def pair(folder, name, run):
    """Neighbours whose operators allow the task of the run, as it should be."""
    settings = TASKS[run.get("task.name", "text")] | {"head": ["shared", "local"]}
    return neighbours(folder, *PAIRS[name], task=settings)


@pytest.mark.parametrize("run", RUNS)
def test_whatever_the_run_neighbours_say_the_same(run, tmp_path):
    less, more = pair(tmp_path, "one more", RUNS[run])
    said = heard(less, RUNS[run])
    assert said == heard(more, RUNS[run])
    assert (said[1]["records"] == ["failure"]) == (run in REFUSED)


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("run", ["as usual", "the change", "a class", "an answer", "by fedsa-lora"])
def test_whatever_the_data_neighbours_say_the_same(run, name, tmp_path):
    less, more = pair(tmp_path, name, RUNS[run])
    assert heard(less, RUNS[run]) == heard(more, RUNS[run])


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("run", RUNS)
def test_whatever_both_are(run, name, tmp_path):
    less, more = pair(tmp_path, name, RUNS[run])
    assert heard(less, RUNS[run]) == heard(more, RUNS[run])


def message(**arrays):
    return RecordDict({"state": ArrayRecord(), "config": ConfigRecord({"prompt": "def "}), **arrays})


LAYER = Key("model.layers.0.self_attn.q_proj", "B")
STATES = {
    "of NaN": lambda state: turned(state, lambda key, tensor: tensor.fill_(math.nan)),
    "of infinities": lambda state: turned(state, lambda key, tensor: tensor.fill_(math.inf)),
    "huge": lambda state: turned(state, lambda key, tensor: tensor + 1e30),
    "tiny": lambda state: turned(state, lambda key, tensor: tensor * 1e-38),
    "of zeros": lambda state: turned(state, lambda key, tensor: tensor.zero_()),
    "of large factors": lambda state: turned(state, lambda key, tensor: tensor + 100.0),
    "of no tensors": lambda state: State({}, state.scale, 0),
    "of one tensor": lambda state: State({LAYER: state.adapter[LAYER]}, state.scale, 0),
    "of other shapes": lambda state: turned(state, lambda key, tensor: tensor[:1]),
    "of a larger rank": lambda state: start({"lora.rank": 16}),
    "of a tiny scale": lambda state: turned(state, lambda key, tensor: tensor, scale=1e-300),
    "of a huge scale": lambda state: turned(state, lambda key, tensor: tensor, scale=1e300),
    "of slots": lambda state: turned(state, lambda key, tensor: tensor, slots=(0, 5)),
    "of another round": lambda state: turned(state, lambda key, tensor: tensor, round=10**9),
    "beyond any round": lambda state: turned(state, lambda key, tensor: tensor, round=2**31),
}


@pytest.mark.parametrize("mode", ["example", "update-local"])
@pytest.mark.parametrize("state", STATES)
def test_whatever_the_state_neighbours_say_the_same(state, mode, tmp_path):
    run = {"privacy.mode": mode}
    less, more = pair(tmp_path, "other data", run)
    sent = STATES[state](start(run))
    said = [[emitted(node, node.ask(kind, run, state=sent)) for kind in ("train", "evaluate")] for node in (less, more)]
    assert said[0] == said[1]


MESSAGES = {
    "empty": RecordDict(),
    "without a state": RecordDict({"config": ConfigRecord({"prompt": "def "})}),
    "of an empty state": message(),
    "of an update": RecordDict(
        {"state": wire.pack_update(wire.Update({LAYER: start().adapter[LAYER]}, 1.0, 1.0), "ffa-lora", 0, "x")}
    ),
    "of another rule": RecordDict({"state": whole(start(), "fedit"), "config": ConfigRecord()}),
    "of two states": message(more=whole(start(), "ffa-lora")),
    "of questions": RecordDict(
        {
            "state": whole(start(), "ffa-lora"),
            "config": ConfigRecord({"prompt": "def ", "limit": 1, "examples": True, "file": "/etc/passwd"}),
        }
    ),
}


@pytest.mark.parametrize("kind", ["query", "train", "evaluate"])
@pytest.mark.parametrize("name", MESSAGES)
def test_whatever_the_message_neighbours_say_the_same(name, kind, tmp_path):
    less, more = pair(tmp_path, "other data", {})
    said = [emitted(node, node.ask(kind, content=MESSAGES[name])) for node in (less, more)]
    assert said[0] == said[1]


def test_a_node_that_says_nothing_at_all_is_not_what_makes_them_equal(tmp_path):
    for number, run in enumerate(("as usual", "the change", "a class", "an answer", "by fedsa-lora")):
        less, _ = pair(tmp_path / str(number), "one more", RUNS[run])
        assert [failure(less.ask(kind, RUNS[run])) for kind in ("query", "train", "evaluate")] == [""] * 3
