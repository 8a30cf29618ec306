"""The nodes of a run: who is connected, who may take part, and what they answer."""

import time
from collections.abc import Iterator, Mapping

from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp import Grid

from common.config import RunConfig
from common.error import BouquetError
from common.version import ROOT, fingerprint
from server_app.record import Record
from strategies import RULES, Rule
from strategies.strategy import choose, raise_failure

POLL_SECONDS = 0.1
STEADY_SECONDS = 0.5
PULLED_TOGETHER = 8


class Nodes:
    """The roll of a run.

    Flower's node ids are new in every run; the names that nodes give themselves are not, so everything that must be
    repeatable goes by name. ``ranks`` are the nodes' ranks, which a rule may lower; ``equipped`` are the nodes that
    hold what is sent once.
    """

    def __init__(self, grid: Grid, rule: Rule, config: RunConfig, record: Record) -> None:
        self._grid = grid
        self._rule = rule
        self._config = config
        self._record = record
        self._names: dict[int, str] = {}
        self.ranks: dict[int, int] = {}
        self.equipped: set[int] = set()
        self._left_out: set[int] = set()
        self._called: dict[str, int] = {}

    def summon(self) -> None:
        """Wait until ``min-nodes`` are connected and nobody has come for a moment; send the roll call.

        Raises :class:`BouquetError` if too few come within ``round.wait``.
        """
        limit = time.monotonic() + self._config.round.wait
        connected: set[int] = set()
        steady = said = time.monotonic()
        while len(connected) < self._config.min_nodes or time.monotonic() - steady < STEADY_SECONDS:
            present = set(self._grid.get_node_ids())
            if present != connected:
                connected, steady = present, time.monotonic()
            if time.monotonic() > limit:
                raise BouquetError(
                    "too few nodes",
                    expected=f"{self._config.min_nodes} within {self._config.round.wait:g} s (min-nodes, round.wait)",
                    got=str(len(connected)),
                    cure="Start more flower-supernode, or a simulation with --federation-config 'num-supernodes=N'.",
                )
            if len(connected) < self._config.min_nodes and time.monotonic() - said > 10:
                self._record.say(f"waiting for nodes: {len(connected)} of {self._config.min_nodes}")
                said = time.monotonic()
            time.sleep(POLL_SECONDS)
        self._call_roll()

    def admit(self) -> None:
        """Take the answers to the roll call; leave out those that cannot take part, saying why.

        Raises :class:`BouquetError` if nobody is left.
        """
        answers = dict(self._collect({message_id: str(node) for message_id, node in self._called.items()}))
        self._called = {}
        for provisional, message in sorted(answers.items()):
            node = int(provisional)
            try:
                if message is None:
                    raise BouquetError("no answer to the roll call")
                raise_failure(message)
                facts = message.content.config_records["node"]
                if facts.get("code") != fingerprint():
                    raise BouquetError(
                        "a node that runs other code than the coordinator",
                        where=f"{facts['name']!s}, {facts.get('where')!s}",
                        expected=f"the code of {ROOT} ({fingerprint()})",
                        got=str(facts.get("code")),
                        cure="Stop SuperLinks and SuperNodes of older checkouts; uninstall other copies of Bouquet.",
                    )
                self._admit(node, str(facts["name"]), int(str(facts["rank"])))
            except BouquetError as reason:
                self._left_out.add(node)
                self._record.failure("roll call", 0, f"node {node:x}", str(reason))
        if not self._names:
            raise BouquetError("no node can take part; the reasons are above")

    @property
    def names(self) -> Mapping[int, str]:
        """The names that the nodes gave themselves."""
        return self._names

    @property
    def anyone(self) -> bool:
        """Whether a node is left that takes part."""
        return bool(self._names)

    def takes_part(self, node: int) -> bool:
        """Whether a node has not been dismissed."""
        return node in self._names

    def dismiss(self, name: str) -> None:
        """Ask a node that has refused for good no more."""
        node = next(node for node, own in self._names.items() if own == name)
        del self._names[node], self.ranks[node]
        self._left_out.add(node)

    def sample(self, fraction: float, draw: int) -> list[int]:
        """Nodes that are connected now, latecomers included: a sample by name, one ``draw`` one sample."""
        self._call_roll()
        self.admit()
        connected = set(self._grid.get_node_ids())
        by_name = sorted((node for node in self._names if node in connected), key=self._names.__getitem__)
        return choose(by_name, fraction, self._config.seed, draw) if by_name else []

    def exchange(self, messages: list[Message]) -> Iterator[tuple[str, Message]]:
        """Send messages and yield each node's reply as it comes; say who missed the deadline."""
        waiting: dict[str, str] = {}
        for message in messages:
            waiting[self._push(message)] = self._names[message.metadata.dst_node_id]
        for name, reply in self._collect(waiting):
            if reply is not None:
                yield name, reply
            else:
                limit = f"{self._config.round.deadline:g} s (round.deadline)"
                phase, draw = messages[0].metadata.message_type, int(messages[0].metadata.group_id)
                self._record.failure(phase, draw, name, f"no reply within {limit}")

    def _call_roll(self) -> None:
        for node in self._grid.get_node_ids():
            if node not in self._names and node not in self._left_out:
                limit = self._config.round.deadline
                call = Message(RecordDict(), dst_node_id=node, message_type=MessageType.QUERY, ttl=limit)
                self._called[self._push(call)] = node

    def _admit(self, node: int, name: str, rank: int) -> None:
        if name in self._names.values():
            raise BouquetError(
                "two nodes of one name",
                got=f"'{name}'",
                cure="Give each its own name or partition-id in --node-config.",
            )
        largest = self._config.lora.rank
        if rank > largest or (rank != largest and not self._rule.mixed_ranks):
            able = ", ".join(name for name, rule in RULES.items() if rule.mixed_ranks)
            raise BouquetError(
                f"a rank that the rule '{self._rule.name}' cannot serve",
                where=f"{name}, lora-rank",
                expected=f"at most {largest}" if self._rule.mixed_ranks else f"{largest} on every node",
                got=str(rank),
                cure=f"Change lora-rank in its --node-config; rules that serve smaller ranks are {able}.",
            )
        self._names[node] = name
        self.ranks[node] = rank

    def _push(self, message: Message) -> str:
        """Send one message; return its id, or a stand-in for one that Flower did not take, which nobody answers."""
        pushed = list(self._grid.push_messages([message]))
        return pushed[0] if pushed and pushed[0] else f"unsent {message.metadata.dst_node_id}"

    def _collect(self, waiting: dict[str, str]) -> Iterator[tuple[str, Message | None]]:
        """Replies as they come, by the name in ``waiting``; None for each that missed the deadline."""
        limit = time.monotonic() + self._config.round.deadline
        waiting = dict(waiting)
        while any(not message_id.startswith("unsent") for message_id in waiting) and time.monotonic() < limit:
            # A few at a time: Flower hands over all that it is asked for at once.
            asked = list(waiting)
            for first in range(0, len(asked), PULLED_TOGETHER):
                for reply in self._grid.pull_messages(asked[first : first + PULLED_TOGETHER]):
                    if name := waiting.pop(reply.metadata.reply_to_message_id, ""):
                        yield name, reply
            if waiting:
                time.sleep(POLL_SECONDS)
        for name in waiting.values():
            yield name, None
