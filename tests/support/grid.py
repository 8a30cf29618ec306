"""Flower's messaging in one process: a grid whose nodes are ClientApp contexts, every message serialised both ways."""

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, Context, Message, MessageType, MetricRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from client_app.app import app as client_app
from common import wire
from common.adapter.values import Update
from common.config.run import ModelConfig
from common.models import base
from common.version import fingerprint
from server_app.run import conduct

RUN_ID = 1
# What a simulation allows; without it a node is one of a deployment, and a policy of its own is all that holds.
OPEN = str(Path(__file__).with_name("open_policy.toml"))
# Everything that a node with a budget has to name, as wide as the tests' private runs need it.
NAMED = str(Path(__file__).with_name("budget_policy.toml"))
SCORE = {"loss": 2.0, "correct": 1, "count": 2}
Tamper = Callable[[RecordDict], RecordDict | None]


def with_budget(folder: Path, epsilon: float, policy: str = NAMED) -> dict[str, Any]:
    """The config of a node with a budget, whose state directory is ``folder``."""
    return {"privacy-epsilon": epsilon, "state-directory": str(folder), "policy": policy}


def pose_as_an_app() -> None:
    """Flower makes messages only inside an app that it has started."""
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, RUN_ID, 1


def introduction(name: str, rank: int = 8) -> dict[str, Any]:
    """What a node of this code, over the embedded model, says of itself."""
    return {"name": name, "rank": rank, "code": fingerprint(), "base": base.digest(ModelConfig()), "where": "here"}


def asks_for_score(message: Message) -> bool:
    """Whether a node is to score the state that it is sent to train from."""
    return message.content.config_records["config"].get("score") is True


def with_its_score(content: RecordDict, change: Callable[[RecordDict], RecordDict | None]) -> RecordDict:
    """A reply in which the score that comes with it, if one does, is changed as that of an evaluation would be."""
    if "score" not in content:
        return content
    told = {"score": "metrics", "tallies": "tallies", "sample": "sample"}
    score = RecordDict({name: content[own] for own, name in told.items() if own in content})
    kept = {name: record for name, record in content.items() if name not in told}
    changed = {"score" if name == "metrics" else name: record for name, record in (change(score) or {}).items()}
    return RecordDict({**kept, **changed})


def travelled(content: RecordDict) -> RecordDict:
    """A copy that has been through Flower's own serialisation."""
    return recorddict_from_proto(recorddict_to_proto(content))


def flowers_bytes(content: RecordDict) -> int:
    """The size of a message's content as Flower serialises it."""
    return len(recorddict_to_proto(content).SerializeToString())


class OneProcessGrid(Grid):
    """What Flower asks of a grid and nobody here uses."""

    def set_run(self, run: Any) -> None:
        raise AssertionError("not used")

    @property
    def run(self) -> Any:
        raise AssertionError("not used")

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        raise AssertionError("not used")

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        return self.pull_messages(self.push_messages(messages))


class InProcessGrid(OneProcessGrid):
    """``tamper`` maps a partition id to a change of that node's replies to ``tampered`` messages.

    None stands for a reply that is lost; ``late`` keeps it for that many seconds.
    """

    def __init__(
        self,
        run_config: dict[str, Any],
        nodes: int,
        *,
        tamper: dict[int, Tamper] | None = None,
        node_config: dict[int, dict[str, Any]] | None = None,
        first_id: int = 1000,
        tampered: str = "train",
        late: dict[int, float] | None = None,
    ) -> None:
        pose_as_an_app()
        self.tamper = tamper or {}
        self.tampered, self.late = tampered, late or {}
        self.run_config = run_config
        self.contexts = {
            first_id + partition: Context(
                run_id=RUN_ID,
                node_id=first_id + partition,
                node_config={
                    "partition-id": partition,
                    "num-partitions": nodes,
                    "policy": OPEN,
                    **(node_config or {}).get(partition, {}),
                },
                state=RecordDict(),
                run_config=run_config,
            )
            for partition in range(nodes)
        }
        self.replies: dict[str, Message] = {}
        self.ready: dict[str, float] = {}
        self.sent: list[Message] = []
        self.returned: list[tuple[str, RecordDict]] = []

    def get_node_ids(self) -> Iterable[int]:
        return list(self.contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            message_id = f"message-{len(self.sent)}"
            message.metadata.__dict__["_message_id"] = message_id
            message.content = travelled(message.content)
            self.sent.append(message)
            context = self.contexts[message.metadata.dst_node_id]
            reply = client_app(message, context)
            content: RecordDict | None = travelled(reply.content)
            self.returned.append((message.metadata.message_type, travelled(reply.content)))
            partition = int(context.node_config["partition-id"])
            change = self.tamper.get(partition)
            tampered = message.metadata.message_type == self.tampered
            if change is not None and tampered:
                content = change(content)
            elif change is not None and self.tampered == MessageType.EVALUATE:
                content = with_its_score(content, change)
            if content is not None:
                reply.content = content
                self.replies[message_id] = reply
                self.ready[message_id] = time.monotonic() + (self.late.get(partition, 0.0) if tampered else 0.0)
            ids.append(message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        now = time.monotonic()
        ready = [name for name in message_ids if name in self.replies and self.ready[name] <= now]
        return [self.replies.pop(message_id) for message_id in ready]


def run_in_process(run_config: dict[str, Any], nodes: int, **options: Any) -> InProcessGrid:
    """The whole ServerApp over an in-process grid."""
    grid = InProcessGrid(run_config, nodes, **options)
    conduct(grid, Context(run_id=RUN_ID, node_id=1, node_config={}, state=RecordDict(), run_config=run_config))
    return grid


class AnsweringGrid(OneProcessGrid):
    """Nodes that answer at once, by :meth:`_reply`, when what they say is pulled: the grid itself holds none of it."""

    def __init__(self, nodes: Iterable[int]) -> None:
        pose_as_an_app()
        self.nodes = list(nodes)
        self._waiting: dict[str, Message] = {}
        self._pushed = 0

    def _reply(self, message: Message) -> Message:
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        return list(self.nodes)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            self._pushed += 1
            message.metadata.__dict__["_message_id"] = f"message-{self._pushed}"
            self._waiting[f"message-{self._pushed}"] = message
            ids.append(f"message-{self._pushed}")
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self._reply(self._waiting.pop(name)) for name in message_ids if name in self._waiting]


class StubGrid(AnsweringGrid):
    """Nodes that answer without training: what is left of a run is the coordinator.

    ``failing`` gives the reason of a node that replies with one instead.
    """

    def __init__(self, nodes: int, failing: Callable[[int], str] = lambda node: "") -> None:
        super().__init__(range(1, nodes + 1))
        self.failing = failing
        self._round, self._update = -1, Update({}, 1.0, 1.0)

    def _reply(self, message: Message) -> Message:
        node = message.metadata.dst_node_id
        name, kind = f"node-{node:04d}", message.metadata.message_type
        if kind == MessageType.QUERY:
            content = RecordDict({"node": ConfigRecord(introduction(name))})
        elif reason := self.failing(node):
            content = RecordDict({"failure": ConfigRecord({"reason": reason})})
        elif kind == MessageType.EVALUATE:
            content = RecordDict({"metrics": MetricRecord(SCORE)})
        else:
            record = wire.pack_update(self._made(message), "fedit", self._round, name)
            content = RecordDict({"update": record, "metrics": MetricRecord({"loss": 2.0})})
            if asks_for_score(message):
                content["score"] = MetricRecord(SCORE)
        return Message(travelled(content), reply_to=message)

    def _made(self, message: Message) -> Update:
        """The update of this round, which all nodes send."""
        if (number := int(message.metadata.group_id)) != self._round:
            _, state = wire.unpack_state(message.content.array_records["state"], rule="fedit")
            moved = {key: tensor + 1e-3 for key, tensor in state.adapter.items()}
            self._round, self._update = number, Update(moved, 1.0, state.scale)
        return self._update
