"""Flower's messaging within one program."""

import time
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from flwr.app import Context, Message, RecordDict
from flwr.serverapp import Grid

from client_app.link import pose
from deploy.simulation.workers import Errand, Workers

PAUSE_SECONDS = 0.05
COORDINATOR = 1
FIRST_NODE = 1000
"""Of the ids by which Flower knows the nodes, the first; a run's record names nodes by what they call themselves."""


def simulated_nodes(
    run_id: int, nodes: int, run_config: Mapping[str, Any], first: int = FIRST_NODE
) -> dict[int, Context]:
    """What each node of a simulation is told, by its id, as Flower's own simulation tells it."""
    return {
        first + partition: Context(
            run_id=run_id,
            node_id=first + partition,
            node_config={"partition-id": partition, "num-partitions": nodes},
            state=RecordDict(),
            run_config=dict(run_config),
        )
        for partition in range(nodes)
    }


class LocalGrid(Grid):
    """A grid without a network: :meth:`post` has a message answered, and :meth:`deliver` takes the reply.

    Replies may come from any thread.
    """

    def __init__(self, run_id: int, nodes: Iterable[int]) -> None:
        pose(run_id, COORDINATOR)
        self.nodes = list(nodes)
        self._replies: dict[str, Message] = {}
        self._pushed = 0

    @abstractmethod
    def post(self, message: Message) -> None:
        """Have a message answered."""

    def deliver(self, reply: Message) -> None:
        """Keep a reply until it is pulled."""
        self._replies[reply.metadata.reply_to_message_id] = reply

    def get_node_ids(self) -> Iterable[int]:
        return list(self.nodes)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        return [self._push(message) for message in messages]

    def _push(self, message: Message) -> str:
        self._pushed += 1
        # Flower's own grids name a message in this way.
        message.metadata.__dict__["_message_id"] = name = f"message-{self._pushed}"
        self.post(message)
        return name

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self._replies.pop(name) for name in message_ids if name in self._replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        waiting, replies = set(self.push_messages(messages)), list[Message]()
        limit = float("inf") if timeout is None else time.monotonic() + timeout
        while waiting and time.monotonic() < limit:
            came = list(self.pull_messages(waiting))
            waiting -= {reply.metadata.reply_to_message_id for reply in came}
            replies += came
            time.sleep(0 if came else PAUSE_SECONDS)
        return replies

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def set_run(self, run: Any) -> NoReturn:
        raise NotImplementedError("there is no SuperLink that would know the run")

    @property
    def run(self) -> NoReturn:
        raise NotImplementedError("there is no SuperLink that would know the run")


class WorkersGrid(LocalGrid):
    """A grid whose simulated nodes are answered for by worker processes; what is said there goes to ``log``."""

    def __init__(self, workers: Workers, nodes: Mapping[int, Context], run_id: int, log: Path) -> None:
        super().__init__(run_id, nodes)
        self._workers, self._contexts, self._log = workers, nodes, log

    def post(self, message: Message) -> None:
        context = self._contexts[message.metadata.dst_node_id]
        self._workers.take(Errand(message, context, self._log, self.deliver))
