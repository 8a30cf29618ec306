"""The nodes of a run: who is connected, who may take part, and what they answer."""

import math
import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping

from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp import Grid

from common.adapter.values import State
from common.config.roster import Roster
from common.error import BouquetError, QuorumError, RefusalError
from common.record.events import Data
from server_app.introduction import introduction
from server_app.record import Record
from server_app.streaks import Streaks
from server_app.transport import POLL_SECONDS, Transport, is_unsent, state_bytes
from strategies import RULES, LoraStrategy, Recipe
from strategies.replies import explained, raise_failure
from strategies.strategy import Recipient, choose, share_of

STEADY_SECONDS = 0.5
# How long a round waits for newcomers to answer the roll call; who takes longer joins the next one.
LATECOMER_SECONDS = 5.0


class Nodes:
    """The roll of a run.

    Flower's node ids are new in every run of a simulation; the names of the nodes are not, so everything that must be
    repeatable goes by name. By the site's ``roster`` a name belongs to a key; without one, a node is called what it
    calls itself, and whoever takes a name first keeps it while it is connected. ``ranks`` are the nodes' ranks, which a
    rule may lower; ``equipped`` are the nodes that hold what is sent once.

    One class, though a long one: who is connected, admitted, asked and sitting out is one set of books.
    """

    def __init__(self, grid: Grid, recipe: Recipe, record: Record, roster: Roster | None = None) -> None:
        self._grid = grid
        self._transport = Transport(grid, record)
        self._rule = recipe.rule
        self._config = recipe.config
        self._record = record
        self._roster = roster
        self._names: dict[int, str] = {}
        # Whoever had a name last, by the name whatever its case; it may be gone.
        self._taken: dict[str, int] = {}
        # Which base model each node has, and which is the run's; empty until the first roll call is over.
        self._bases: dict[int, str] = {}
        self._base = ""
        self.ranks: dict[int, int] = {}
        self.equipped: set[int] = set()
        self._left_out: set[int] = set()
        # Roll calls that are not answered, by message, and when each ends.
        self._called: dict[str, tuple[int, float]] = {}
        # When to ask a node again that has failed to answer one, how long the next pause is, and why it has failed.
        self._again: dict[int, tuple[float, float]] = {}
        self._reasons: dict[int, str] = {}
        self._streaks = Streaks(recipe.config.round)

    def summon(self) -> None:
        """Wait until ``min-nodes`` are connected and nobody has come for a moment; send the roll call.

        Raises :class:`QuorumError` if too few come within ``round.wait``.
        """
        limit = time.monotonic() + self._config.round.wait
        connected: set[int] = set()
        steady = said = time.monotonic()
        while len(connected) < self._config.min_nodes or time.monotonic() - steady < STEADY_SECONDS:
            present = set(self._grid.get_node_ids())
            if present != connected:
                connected, steady = present, time.monotonic()
            if time.monotonic() > limit:
                raise self._too_few(len(connected))
            if len(connected) < self._config.min_nodes and time.monotonic() - said > 10:
                self._record.say(f"waiting for nodes: {len(connected)} of {self._config.min_nodes}")
                said = time.monotonic()
            time.sleep(POLL_SECONDS)
        self._call_roll()

    def admit(self) -> None:
        """Take the answers to the first roll call; leave out those that cannot take part, saying why.

        Once ``min-nodes`` have answered, the others have a moment: one that is silent does not hold up the rest.

        Raises :class:`BouquetError` if nobody is left.
        """
        self._hear_roll(patience := min(LATECOMER_SECONDS, self._config.round.deadline))
        while self._called and len(self._names) < self._config.min_nodes:
            self._hear_roll(patience)
        self._agree_on_base()
        if not self._names:
            raise BouquetError("no node can take part; the reasons are above")

    def gather(self) -> None:
        """Wait until ``min-nodes`` take part and are connected, newcomers and those that come back included.

        Raises :class:`QuorumError` if too few come within ``round.wait``.
        """
        began, pause = time.monotonic(), 1.0
        while (there := len(self._here())) < self._config.min_nodes:
            self._call_roll()
            self._hear_roll(LATECOMER_SECONDS)
            if len(self._here()) > there:
                continue
            if (left := began + self._config.round.wait - time.monotonic()) <= 0:
                raise self._too_few(there)
            self._record.say(f"waiting for nodes: {there} of {self._config.min_nodes}")
            time.sleep(min(pause, left))
            pause *= 2

    def quorum(self, fraction: float) -> int:
        """How many replies a round needs: a share of the nodes that belong to the run, whoever is connected."""
        belonging = share_of(len(self._names), fraction)
        return max(self._config.round.fewest_replies, math.ceil(self._config.round.min_replies * belonging))

    @property
    def names(self) -> Mapping[int, str]:
        """The nodes' names, by Flower's id."""
        return self._names

    def dismiss(self, name: str) -> None:
        """Ask a node that has refused for good no more."""
        node = next(node for node, own in self._names.items() if own == name)
        del self._names[node], self.ranks[node]
        self._left_out.add(node)

    def sample(self, fraction: float, draw: int) -> list[int]:
        """Nodes that are connected now, latecomers included: a sample by name, one ``draw`` one sample."""
        self._call_roll()
        self._hear_roll(LATECOMER_SECONDS)
        by_name = sorted(self._here(), key=self._names.__getitem__)
        able = [node for node in by_name if not self._streaks.sits_out(self._names[node], draw)]
        enough = len(able) >= min(len(by_name), self._config.min_nodes)
        return choose(able if enough else by_name, fraction, self._config.seed, draw) if by_name else []

    def _here(self) -> list[int]:
        """The nodes that take part and are connected."""
        connected = set(self._grid.get_node_ids())
        return [node for node in self._names if node in connected]

    def _too_few(self, there: int) -> QuorumError:
        return QuorumError(
            "too few nodes",
            expected=f"{self._config.min_nodes} within {self._config.round.wait:g} s (min-nodes, round.wait)",
            got=str(there),
            cure="Why others were left out is above; start more nodes, or a simulation with --nodes N.",
        )

    def exchange(self, messages: list[Message]) -> Iterator[tuple[str, Message]]:
        """Send messages and yield each node's reply as it comes; say who missed the deadline.

        Whoever reads a reply and cannot use it says so with :meth:`failed`.
        """
        if not messages:
            return
        self._streaks.begin()
        phase, draw = messages[0].metadata.message_type, int(messages[0].metadata.group_id)
        # Training makes the state of the next round.
        number = draw + 1 if phase == MessageType.TRAIN else draw
        deadline = self._config.round.deadline
        names = [self._names[message.metadata.dst_node_id] for message in messages]
        waiting = dict(zip(self._transport.push(messages), names, strict=True))
        # What is trained is about as large as what it was trained from; all else is small.
        size = max(map(state_bytes, messages)) if phase == MessageType.TRAIN else 0
        for name, reply in self._transport.collect(waiting, deadline, phase, draw, size):
            if reply is not None:
                yield name, reply
            else:
                self.failed(phase, number, name, f"no reply within {deadline:g} s (round.deadline)")
        for pause in self._streaks.count(waiting.values(), phase, number):
            said = f"failed {pause.failures} times in a row: left out for {pause.rounds} rounds"
            self._record.note(pause, said)

    def address(self, strategy: LoraStrategy, message_type: str, state: State, nodes: list[int]) -> list[Message]:
        """A message with ``state`` to each of ``nodes``, as its rank and what it has already want it."""
        recipients = [
            Recipient(node, self.names[node], self.ranks.get(node, 0), node in self.equipped) for node in nodes
        ]
        return strategy.messages(message_type, state, recipients, ttl=self._config.round.ttl)

    def failed(self, phase: str, round: int, name: str, reason: str) -> None:
        """Record that a node did not do its part, and why."""
        self._streaks.fail(name)
        self._record.failure(phase, round, name, reason)

    def _call_roll(self) -> None:
        """Ask who is there: every node that is neither admitted nor refused, nor has just been asked."""
        now, limit = time.monotonic(), self._config.round.deadline
        waiting = {node for node, _ in self._called.values()}
        there = [node for node in self._grid.get_node_ids() if self._again.get(node, (0.0, 0.0))[0] <= now]
        new = [node for node in there if not (node in self._names or node in self._left_out or node in waiting)]
        calls = [Message(RecordDict(), dst_node_id=node, message_type=MessageType.QUERY, ttl=limit) for node in new]
        for node, call in zip(new, self._transport.push(calls), strict=True):
            self._called[call] = node, now + limit

    def _hear_roll(self, limit: float) -> None:
        """Admit who answers within ``limit`` seconds. Who does not may do so later; who fails is asked again."""
        calls = {call: str(node) for call, (node, _) in self._called.items()}
        replies = dict(self._transport.collect(calls, limit))
        pending = self._pending()
        connected = set(self._grid.get_node_ids()) if replies else set()
        done = set()
        for provisional, message in sorted(replies.items()):
            node = int(provisional)
            try:
                if message is not None:
                    raise_failure(message)
                    name, rank, self._bases[node], counts = introduction(message)
                    self._admit(node, name, rank, connected)
                    if counts is not None and not self._config.privacy.on:
                        self._record.note(Data(round=0, node=self._names[node], counts=counts), f"has {counts}")
                elif node in pending:
                    continue
                else:
                    raise BouquetError("no answer to the roll call")
            except Exception as reason:  # a boundary: what is raised here is the doing of this answer
                if self._reasons.get(node) != (said := explained(reason)):
                    self._record.failure("roll call", 0, f"node {node:x}", said)
                self._reasons[node] = said
                if isinstance(reason, RefusalError):
                    self._left_out.add(node)
                pause = self._again.get(node, (0.0, 0.5))[1] * 2
                self._again[node] = time.monotonic() + pause, min(pause, self._config.round.wait)
            done.add(node)
        self._called = {call: asked for call, asked in self._called.items() if asked[0] not in done}

    def _agree_on_base(self) -> None:
        """The run's base model is the coordinator's, or, where it has none, most nodes'; other nodes are left out."""
        from common.models import base  # what knows models takes seconds to import

        by_name = sorted(self._names, key=self._names.__getitem__)
        most = Counter(self._bases[node] for node in by_name).most_common(1)
        self._base = base.digest(self._config.model) if base.is_here(self._config.model) else most[0][0] if most else ""
        for node in [node for node in by_name if self._bases[node] != self._base]:
            self._record.failure("roll call", 0, self._names[node], str(self._other_base(node)))
            self.dismiss(self._names[node])

    def _other_base(self, node: int) -> RefusalError:
        return RefusalError(
            "a node whose base model differs from the run's",
            where=f"model.name = '{self._config.model.name}'",
            expected=f"the weights and words {self._base}",
            got=self._bases[node],
            cure="Give every machine the same files of one model.revision.",
        )

    def _pending(self) -> set[int]:
        """The nodes whose answer may still come."""
        now = time.monotonic()
        return {node for call, (node, end) in self._called.items() if end > now and not is_unsent(call)}

    def _admit(self, node: int, name: str, rank: int, connected: Collection[int]) -> None:
        name = self._proven(node, name)
        if self._base and self._bases[node] != self._base:
            raise self._other_base(node)
        if (other := self._taken.get(name.casefold(), node)) != node and other in self._names:
            if other in connected:
                raise RefusalError(
                    "two nodes with the same name",
                    got=f"'{name}'",
                    cure="Give each its own name or partition-id in --node-config.",
                )
            del self._names[other], self.ranks[other]
        largest = self._config.lora.rank
        able = ", ".join(name for name, rule in RULES.items() if rule.mixed_ranks)
        cure = f"Change lora-rank in its --node-config; rules that allow smaller ranks are {able}."
        self._rule.check_rank(rank, largest, where=f"{name}, lora-rank", cure=cure)
        if rank != largest and self._config.privacy.central:
            raise BouquetError(
                "a smaller rank under privacy.mode = 'update-central', which takes one mean over all nodes",
                where=f"{name}, lora-rank",
                expected=f"{largest} on every node",
                got=str(rank),
                cure="Change lora-rank in its --node-config.",
            )
        self._names[node] = name
        self._taken[name.casefold()] = node
        self.ranks[node] = rank

    def _proven(self, node: int, claimed: str) -> str:
        """The name that goes with a node's key, where the site has a roster. Raises :class:`RefusalError`."""
        if self._roster is None:
            return claimed
        if node not in self._roster:
            raise RefusalError(
                "a node that the site does not know", got=f"'{claimed}'", cure="Run bouquet site register."
            )
        if (name := self._roster[node].name) != claimed:
            raise RefusalError("a node under a name other than its key's", expected=f"'{name}'", got=f"'{claimed}'")
        return name
