"""The nodes of a run: who is connected, who may take part, and what they answer."""

import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from common.config import RunConfig
from common.error import BouquetError
from common.version import ROOT, fingerprint
from server_app.record import Record, few
from strategies import RULES, Rule
from strategies.strategy import choose, raise_failure

POLL_SECONDS = 0.1
STEADY_SECONDS = 0.5
PROGRESS_SECONDS = 60.0
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
        # By name: failures in a row; the round in which a node may take part again; what this exchange has lost.
        self._streaks: Counter[str] = Counter()
        self._back: dict[str, int] = {}
        self._lost: set[str] = set()
        self._overdue: dict[str, tuple[str, str, int]] = {}
        self.failures: Counter[str] = Counter()
        self.late: Counter[str] = Counter()

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
                self._admit(node, *_introduction(message))
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
        able = [node for node in by_name if self._back.get(self._names[node], 0) <= draw]
        return choose(able or by_name, fraction, self._config.seed, draw) if by_name else []

    def exchange(self, messages: list[Message]) -> Iterator[tuple[str, Message]]:
        """Send messages and yield each node's reply as it comes; say who missed the deadline.

        Whoever reads a reply and cannot use it says so with :meth:`failed`.
        """
        if not messages:
            return
        self._lost.clear()
        waiting: dict[str, str] = {}
        for message in messages:
            waiting[self._push(message)] = self._names[message.metadata.dst_node_id]
        phase, draw = messages[0].metadata.message_type, int(messages[0].metadata.group_id)
        missed = set()
        for name, reply in self._collect(waiting):
            if reply is not None:
                yield name, reply
            else:
                missed.add(name)
                self.failed(phase, draw, name, f"no reply within {self._config.round.deadline:g} s (round.deadline)")
        self._overdue |= {overdue: (name, phase, draw) for overdue, name in waiting.items() if name in missed}
        self._count(waiting.values(), draw)

    def failed(self, phase: str, round: int, name: str, reason: str) -> None:
        """Record that a node did not do its part, and why."""
        self._lost.add(name)
        self.failures[name] += 1
        self._record.failure(phase, round, name, reason)

    def _count(self, asked: Iterable[str], draw: int) -> None:
        """After an exchange: who has failed so often in a row that it sits out for some rounds."""
        limit, pause = self._config.round.max_failures, self._config.round.sit_out
        for name in asked:
            if name not in self._lost:
                del self._streaks[name]
                continue
            self._streaks[name] += 1
            if limit and pause and self._streaks[name] >= limit:
                self._back[name] = draw + 1 + pause
                often = self._streaks[name]
                said = f"failed {often} times in a row: left out for {pause} rounds"
                self._record.note("sit-out", draw, name, said, failures=often, rounds=pause)

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
        able = ", ".join(name for name, rule in RULES.items() if rule.mixed_ranks)
        cure = f"Change lora-rank in its --node-config; rules that serve smaller ranks are {able}."
        self._rule.check_rank(rank, largest, where=f"{name}, lora-rank", cure=cure)
        if rank != largest and self._config.privacy.mode == "update-central":
            raise BouquetError(
                "a smaller rank under privacy.mode = 'update-central', which takes one mean over all nodes",
                where=f"{name}, lora-rank",
                expected=f"{largest} on every node",
                got=str(rank),
                cure="Change lora-rank in its --node-config.",
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
        said = time.monotonic()
        while any(not message_id.startswith("unsent") for message_id in waiting) and time.monotonic() < limit:
            # A few at a time: Flower hands over all that it is asked for at once.
            asked = [*waiting, *self._overdue]
            for first in range(0, len(asked), PULLED_TOGETHER):
                for reply in self._grid.pull_messages(asked[first : first + PULLED_TOGETHER]):
                    message_id = reply.metadata.reply_to_message_id
                    if name := waiting.pop(message_id, ""):
                        yield name, reply
                    else:
                        self._note_late(message_id, reply)
            if waiting and time.monotonic() - said > PROGRESS_SECONDS:
                self._record.say(f"    waiting for {few(waiting.values())}")
                said = time.monotonic()
            if waiting:
                time.sleep(POLL_SECONDS)
        for name in waiting.values():
            yield name, None

    def _note_late(self, message_id: str, reply: Message) -> None:
        """Count a reply that came after its deadline; nothing else is done with it."""
        name, phase, draw = self._overdue.pop(message_id, ("", "", 0))
        if name and not reply.has_error():
            self.late[name] += 1
            said = f"replied to {phase} of round {draw} after its deadline: not used"
            self._record.note("late", draw, name, said, during=phase)


def _introduction(message: Message) -> tuple[str, int]:
    """The name and rank in an answer to the roll call. Raises :class:`BouquetError`."""
    facts = message.content.config_records.get("node", ConfigRecord())
    name, rank = facts.get("name"), facts.get("rank")
    if not (isinstance(name, str) and re.fullmatch(r"\w[\w.-]{0,99}", name) and isinstance(rank, int) and rank > 0):
        raise BouquetError(
            "an answer to the roll call of unknown form",
            expected="a name of letters, digits, dots and hyphens, and a rank",
            got=f"{str(name)[:80]!r}, {rank!r}",
        )
    if facts.get("code") != fingerprint():
        raise BouquetError(
            "a node that runs other code than the coordinator",
            where=f"{name}, {facts.get('where')!s}",
            expected=f"the code of {ROOT} ({fingerprint()})",
            got=str(facts.get("code")),
            cure="Stop SuperLinks and SuperNodes of older checkouts; uninstall other copies of Bouquet.",
        )
    return name, rank
