"""Flower's messaging in one process: nodes that are answered for here, every message serialised both ways."""

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, Context, Message, MessageType, MetricRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto

from client_app.app import app as client_app
from client_app.link import pose
from common import wire
from common.adapter.values import Update
from common.config.run import ModelConfig
from common.models import base
from common.version import fingerprint
from deploy.simulation.grid import COORDINATOR, FIRST_NODE, LocalGrid, simulated_nodes
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
    pose(RUN_ID, COORDINATOR)


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


class InProcessGrid(LocalGrid):
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
        first_id: int = FIRST_NODE,
        tampered: str = "train",
        late: dict[int, float] | None = None,
    ) -> None:
        self.tamper = tamper or {}
        self.tampered, self.late = tampered, late or {}
        self.run_config = run_config
        self.contexts = simulated_nodes(RUN_ID, nodes, run_config, first_id)
        for partition, context in enumerate(self.contexts.values()):
            context.node_config |= {"policy": OPEN, **(node_config or {}).get(partition, {})}
        super().__init__(RUN_ID, self.contexts)
        self.ready: dict[str, float] = {}
        self.sent: list[Message] = []
        self.returned: list[tuple[str, RecordDict]] = []

    def post(self, message: Message) -> None:
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
            late = self.late.get(partition, 0.0) if tampered else 0.0
            self.ready[message.metadata.message_id] = time.monotonic() + late
            self.deliver(reply)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        now = time.monotonic()
        return super().pull_messages([name for name in message_ids if self.ready.get(name, now) <= now])


def run_in_process(run_config: dict[str, Any], nodes: int, **options: Any) -> InProcessGrid:
    """The whole ServerApp over an in-process grid."""
    grid = InProcessGrid(run_config, nodes, **options)
    conduct(
        grid, Context(run_id=RUN_ID, node_id=COORDINATOR, node_config={}, state=RecordDict(), run_config=run_config)
    )
    return grid


class AnsweringGrid(LocalGrid):
    """Nodes that answer at once, by :meth:`_reply`, when what they say is pulled: the grid itself holds none of it."""

    def __init__(self, nodes: Iterable[int]) -> None:
        super().__init__(RUN_ID, nodes)
        self._waiting: dict[str, Message] = {}

    def _reply(self, message: Message) -> Message:
        raise NotImplementedError

    def post(self, message: Message) -> None:
        self._waiting[message.metadata.message_id] = message

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
