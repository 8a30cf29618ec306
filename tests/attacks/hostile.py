"""A coordinator that wants to know more than it may: whole nodes, asked anything at all, and all that they answer.

Whatever depends on how the node is built inside is here, so that the tests say only what an outsider sees.
"""

import hashlib
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import tomli_w
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.common.serde import recorddict_to_proto

from client_app.app import app
from common import wire
from common.adapter.values import State
from common.config.node import NodeConfig
from common.models import adapted
from common.privacy import accounting, ledger
from common.privacy.accounting import Release
from strategies import Recipe, read_config
from strategies.strategy import LoraStrategy, Recipient
from tests.attacks.tools import tiny_llama, written
from tests.support.budgets import DELTA
from tests.support.grid import pose_as_an_app, travelled
from tests.support.replies import packed

NODE_ID = 1000
SCORED = {"score": True}
"""What the config of a message says that asks for a score before the training."""
SHAPING = ("lora.rank", "lora.targets", "model.", "rule.", "task.", "seed", "wire.down")
RECORDS = [{"text": f"def f{n}(x):\n    return x + {n}\n", "label": n % 2, "age": 30 + n} for n in range(8)]
TEXT = {"name": "text", "text": "text"}
CLASSIFY = {"name": "classify", "text": "text", "label": "label", "labels": 2}
INSTRUCT = {"name": "instruct", "prompt": "text", "answer": "answer"}
# What a node with a budget has to name; as wide as these runs need it.
POLICY: dict[str, Any] = {
    "rules": ["*"],
    "models": [tiny_llama(), "embedded"],
    "privacy": {"modes": ["none", "example", "update-local"]},
}
LENGTHS = {"max-length": [4, 5, 8, 16, 32, 512]}
RUN = {
    "run-name": "run",
    "num-server-rounds": 3,
    "min-nodes": 1,
    "model.name": tiny_llama(),
    "model.quantization": "none",
    "lora.rank": 8,
    "lora.targets": "q_proj,v_proj",
    "task.max-length": 16,
    "data.partition": "none",
    "train.steps": 1,
    "train.batch-size": 8,
    "train.clip-norm": 0.0,
    "train.schedule": "constant",
    "train.weighting": "uniform",
    "privacy.mode": "example",
    "privacy.accountant": "rdp",
    "privacy.expected-batch": 8,
    "privacy.noise-multiplier": 5.0,
    "rule.name": "ffa-lora",
    "evaluation.prompt": "",
}
LOCAL = {"privacy.mode": "update-local"}
MANY_VALUES = {"lora.rank": 32, "lora.targets": "all-linear"}  # enough to tell a deviation by
PLAIN = {"privacy.mode": "none", "privacy.noise-multiplier": 0.0}


def task(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a run config for a task."""
    return {f"task.{key}": value for key, value in settings.items()}


class Node:
    """One machine with its own folder, data, budget and policy.

    ``records`` are objects or whole lines, None where the node has no ``data``. ``tables`` are added to its policy, and
    ``facts`` to its config, where None takes a key out.
    """

    def __init__(
        self,
        folder: Path,
        records: Sequence[Any] | None = RECORDS,
        *,
        form: str = "jsonl",
        task: Mapping[str, Any] = TEXT,
        tables: Mapping[str, Any] | None = None,
        **facts: Any,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.state = folder / "state"
        policy = {**POLICY, "task": LENGTHS | dict(task)}
        for key, value in (tables or {}).items():
            policy[key] = policy.get(key, {}) | value if isinstance(value, Mapping) else value
        (folder / "policy.toml").write_text(tomli_w.dumps(policy))
        assert tomllib.loads((folder / "policy.toml").read_text()) == policy
        own: dict[str, Any] = {
            "name": "ward-3",
            "records": len(RECORDS),
            "state-directory": str(self.state),
            "privacy-epsilon": 100.0,
            "policy": str(folder / "policy.toml"),
        }
        if records is not None:
            own["data"] = str(written(folder, records, form))
        own |= {key.replace("_", "-"): value for key, value in facts.items()}
        self.config = {key: value for key, value in own.items() if value is not None}

    def ask(
        self,
        kind: str = "train",
        run: Mapping[str, Any] | None = None,
        *,
        state: State | None = None,
        round: int | None = None,
        run_id: int = 1,
        config: Mapping[str, Any] | None = None,
        content: RecordDict | None = None,
    ) -> RecordDict:
        """What the node answers to a message of a run, as it travelled.

        ``state`` is the honest one where none is given; ``content`` is a message of any other form.
        """
        flat = run_config(run)
        message = _message(kind, flat, state, round, config)
        if content is not None:
            message.content = content
        message.content = travelled(message.content)
        message.metadata.__dict__["_message_id"] = "message"
        context = Context(run_id=run_id, node_id=NODE_ID, node_config=self.config, state=RecordDict(), run_config=flat)
        return travelled(app(message, context).content)

    def rows(self) -> list[ledger.Entry]:
        """What the node's ledger holds."""
        node = NodeConfig.from_flower(self.config)
        return ledger.read(node.ledger, node.witness)


def run_config(changes: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A small private run in Flower's flat form, with the coordinator's changes."""
    return read_config({}).to_flower() | RUN | dict(changes or {})


def start(run: Mapping[str, Any] | None = None) -> State:
    """The state that an honest coordinator would begin with; a node's shapes are known to it."""
    return _start(tuple(sorted(_shape(run_config(run)).items())))


def whole(state: State, rule: str) -> ArrayRecord:
    """A state with all that it holds, whatever that is; what a node would else draw for itself included."""
    tensors = state.adapter | state.offset
    named: Any = [(key.layer, key.part, list(tensor.shape)) for key, tensor in tensors.items()]
    slots = list(state.slots)
    header = wire.Header(
        kind="state", rule=rule, round=state.round, codec="fp32", scale=state.scale, slots=slots, tensors=named
    )
    return packed(header, tensors)


def turned(state: State, change: Callable[[Any, torch.Tensor], torch.Tensor], **others: Any) -> State:
    """A state with every tensor of it changed."""
    return replace(state, adapter={key: change(key, tensor.clone()) for key, tensor in state.adapter.items()}, **others)


def failure(answer: RecordDict) -> str:
    """Why the node did not do as it was asked; nothing where it did."""
    record = answer.config_records.get("failure")
    return "" if record is None else str(record["reason"])


def refused(answer: RecordDict) -> bool:
    """Whether a node declines for good."""
    return bool(failure(answer)) and bool(answer.config_records["failure"]["refused"])


def update(answer: RecordDict, run: Mapping[str, Any] | None = None, state: State | None = None) -> dict[str, Any]:
    """What an update changes of the state that it replies to, tensor by tensor, in float64."""
    assert "update" in answer.array_records, failure(answer)
    flat, state = run_config(run), state or start(run)
    received = state.adapter
    record = answer.array_records["update"]
    _, sent = wire.unpack_update(record, rule=flat["rule.name"], round=state.round, received=received)
    relative = Recipe.build(read_config(_shape(flat))).rule.relative
    return {
        str(key): tensor.double() - (0 if relative else received[key].double()) for key, tensor in sent.tensors.items()
    }


def emitted(node: Node, answer: RecordDict) -> dict[str, Any]:
    """Everything in an answer apart from the values of its arrays."""
    arrays = {
        f"{name}/{key}": (array.dtype, array.shape, array.stype, len(array.data))
        for name, record in answer.array_records.items()
        for key, array in record.items()
    }
    told = {name: dict(record) for name, record in [*answer.config_records.items(), *answer.metric_records.items()]}
    return {
        "records": list(answer),
        "arrays": arrays,
        "headers": [_digest(record["header"].data) for record in answer.array_records.values()],
        "told": repr(told).replace(str(node.folder), "FOLDER"),
        "bytes": len(serialised(answer)),
    }


def serialised(answer: RecordDict) -> bytes:
    """An answer as it travels."""
    return recorddict_to_proto(answer).SerializeToString()


def heard(node: Node, run: Mapping[str, Any] | None = None, **options: Any) -> list[dict[str, Any]]:
    """All that a node answers to a roll call, two rounds of training, a score with the second, and an evaluation."""
    calls: list[tuple[str, int, Any]] = [("query", 0, {}), ("train", 0, {}), ("train", 1, SCORED), ("evaluate", 2, {})]
    return [emitted(node, node.ask(kind, run, round=turn, config=wanted, **options)) for kind, turn, wanted in calls]


def neighbours(folder: Path, less: Any, more: Any, **options: Any) -> tuple[Node, Node]:
    """Two nodes that differ in their data only; their folders' names are equally long."""
    return Node(folder / "less", less, **options), Node(folder / "more", more, **options)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _message(kind: str, flat: Mapping[str, Any], state: State | None, round: int | None, config: Any) -> Message:
    pose_as_an_app()
    if kind == "query":
        return Message(RecordDict(), dst_node_id=NODE_ID, message_type=kind, group_id="0")
    told = ConfigRecord(config or {})
    own = state or start(flat)
    own = own if round is None else replace(own, round=round)
    if state is not None:
        content = RecordDict({"state": whole(own, flat["rule.name"]), "config": told})
        return Message(content, dst_node_id=NODE_ID, message_type=kind, group_id=str(own.round))
    strategy = LoraStrategy(Recipe.read(_shape(flat)))
    (message,) = strategy.messages(kind, own, [Recipient(NODE_ID)], config=told)
    return message


def _shape(flat: Mapping[str, Any]) -> dict[str, Any]:
    """What of a run config decides the shapes; where it makes no model, that of the usual run, by the same rule."""
    own = tuple((key, value) for key, value in sorted(flat.items()) if key.startswith(SHAPING))
    usual = {key: value for key, value in RUN.items() if key.startswith(SHAPING)} | {"rule.name": flat["rule.name"]}
    return dict(own) if _makes_a_model(own) else usual


@cache
def _makes_a_model(shape: tuple[tuple[str, Any], ...]) -> bool:
    try:
        _start(shape)
    except Exception:
        return False
    return True


@lru_cache(maxsize=64)
def _start(shape: tuple[tuple[str, Any], ...]) -> State:
    config = read_config(dict(shape))
    recipe = Recipe.build(config)
    spec = adapted.describe(config.model, config.lora, config.task, recipe.structure)
    return recipe.start(spec, config.seed)


def cost(releases, accountant="rdp"):
    """Epsilon of so many rounds in which every record takes part in the one step."""
    return accounting.epsilon([Release(RUN["privacy.noise-multiplier"], 1.0, 1)] * releases, DELTA, accountant)


def left(answers):
    """How many updates left a node."""
    return sum("update" in answer.array_records for answer in answers)
