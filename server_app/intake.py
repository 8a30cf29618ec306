"""The replies of one round, from the nodes to the merge: an error in one of them refuses it alone."""

from collections.abc import Callable

from flwr.app import Message

from common.adapter.values import State, check_range
from common.error import BouquetError, DiskError, RefusalError, brief
from common.record.events import Against, Camps, Train
from server_app.nodes import Nodes
from server_app.record import Record
from server_app.scrutiny import Scrutiny
from server_app.spool import Spool
from server_app.transport import state_bytes
from strategies.meter import Meter
from strategies.replies import Metrics, explained
from strategies.strategy import LoraStrategy, Reply


class Intake:
    """What has come of one round that started from ``state``; the updates themselves lie in ``spool``."""

    def __init__(self, nodes: Nodes, strategy: LoraStrategy, record: Record, state: State, spool: Spool) -> None:
        config = strategy.recipe.config
        self._nodes = nodes
        self._strategy = strategy
        self._record = record
        self._state = state
        self._spool = spool
        self.round = state.round + 1
        self._fraction = config.fraction_train
        self._private = config.privacy.on
        # Where the coordinator noises the mean, no single node's figure is kept, and none decides about another.
        self._noised = config.privacy.central
        ratio = 0.0 if self._noised else config.round.max_ratio
        self._counted = strategy.weigh is None and config.train.weighting == "examples"
        weight = config.round.max_weight if strategy.weigh is None else 0.0
        self._scrutiny = Scrutiny(strategy.rule, state, config.round.max_norm, ratio, weight)
        self._told: dict[str, tuple[float, Metrics]] = {}
        self.bytes_up = 0

    @property
    def told(self) -> list[tuple[float, Metrics]]:
        """The weight and the figures of each node whose update counts, in the order of their names."""
        return [self._told[name] for name in self._spool.names]

    @property
    def needed(self) -> int:
        """How many updates the round needs; a node that declines for good lowers it."""
        return self._nodes.quorum(self._fraction)

    def take(self, messages: list[Message], hear: Callable[[str, Message], None]) -> None:
        """Send ``messages`` and keep what comes back and can be merged; ``hear`` is told every reply by its name."""
        down = {self._nodes.names[message.metadata.dst_node_id]: state_bytes(message) for message in messages}
        for name, message in self._nodes.exchange(messages):
            node_id = message.metadata.src_node_id
            hear(name, message)
            try:
                reply = self._strategy.accept(self._state, message)
                if reply.node != name:
                    raise BouquetError("an update signed by another node", expected=name, got=brief(reply.node))
                if self._counted:
                    _check_count(reply)
                norm = self._scrutiny.examine(name, reply.update)
            except Exception as reason:  # a boundary: what is raised here is the doing of this reply
                # The node may have lost what it was sent once.
                self._nodes.equipped.discard(node_id)
                self._nodes.failed("train", self.round, name, explained(reason))
                if isinstance(reason, RefusalError):
                    self._nodes.dismiss(name)
                continue
            self._keep(node_id, reply)
            self._record.event(self._told_of(reply, down[name], norm))
        for name, refusal in self._scrutiny.outsized().items():
            self._refuse(name, refusal)
        if not self._noised:
            self._tell_against()

    def merge(self, asked: int, meter: Meter | None = None) -> State | None:
        """The merged state; None where fewer updates are left than a round needs.

        Updates that are sound each by itself may still have no mean that can be computed: the one that changes most is
        left out then, and the others are merged. A ``meter`` notes the updates on their way.
        """
        while len(self._spool) >= self.needed:
            try:
                updates = self._spool if meter is None else meter.watch(self._spool)
                merged = self._strategy.merge(self._state, updates, asked)
                check_range(merged)
                return merged
            except Exception as reason:
                if isinstance(reason, DiskError) or self._noised:
                    raise
                said = f"its change, the largest, cannot be merged: {explained(reason)}"
                self._refuse(self._scrutiny.largest(), said)
        return None

    def _keep(self, node_id: int, reply: Reply) -> None:
        rule, update = self._strategy.rule, reply.update
        if self._state.round >= rule.settled:
            self._nodes.equipped.add(node_id)
        if update.rank and not update.slots:
            self._nodes.ranks[node_id] = update.rank
        self._spool.put(reply.node, update)
        # An honest node in a private run tells none.
        self._told[reply.node] = update.weight, {} if self._private else reply.metrics
        self.bytes_up += reply.bytes_up

    def _told_of(self, reply: Reply, bytes_down: int, norm: float) -> Train:
        """What the record has of an update: of a node's own figures those it knows, and none of a private run."""
        figures = {} if self._private else reply.metrics
        return Train(
            round=self.round,
            node=reply.node,
            bytes_up=reply.bytes_up,
            bytes_down=bytes_down,
            norm=None if self._noised else norm,
            weight=None if self._noised else reply.update.weight,
            loss=figures.get("loss"),
            steps=figures.get("steps"),
            tokens=figures.get("tokens"),
            examples=figures.get("examples"),
            seconds=figures.get("seconds"),
            peak_memory=figures.get("peak-memory"),
        )

    def _refuse(self, name: str, reason: str) -> None:
        """Take an update out of the round after all."""
        self._scrutiny.forget(name)
        self._spool.drop(name)
        self._nodes.failed("train", self.round, name, reason)

    def _tell_against(self) -> None:
        """Say which nodes' changes point against the others', with the cosine."""
        named, camp = self._scrutiny.against()
        for name, cosine in named.items():
            said = f"went against the other nodes (cosine {cosine:.2f}); it is still merged"
            self._record.note(Against(round=self.round, node=name, cosine=cosine), said)
        if camp:
            self._record.event(Camps(round=self.round, smaller=camp, nodes=len(self._spool)))
            self._record.say(f"    the nodes fall into two camps: {camp} of {len(self._spool)} go against the others")


def _check_count(reply: Reply) -> None:
    """Raise :class:`BouquetError` where a node counts for more or fewer examples than it says it has."""
    if (told := reply.metrics.get("examples", reply.update.weight)) != reply.update.weight:
        raise BouquetError(
            "a weight that is not the number of examples",
            where=reply.node,
            expected=f"{told:g}, as in its metrics",
            got=f"{reply.update.weight:g}",
        )
