"""Flower's side of a rule: which messages are sent, and what becomes of the replies.

A Flower user meets the usual grammar::

    strategy = FFALoraStrategy(fraction_train=1.0)
    strategy.start(grid=grid, initial_arrays=strategy.initial_arrays(spec), num_rounds=5)

Bouquet's own round loop uses the same messages and the same checks, with a deadline and a quorum around them.
"""

import random
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from logging import INFO, WARNING
from typing import NamedTuple, TypeVar

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from flwr.serverapp.strategy.strategy_utils import sample_nodes
from flwr.supercore import log

from common import wire
from common.adapter.spec import Spec
from common.adapter.values import State, Tensors, Update, check_values
from common.error import BouquetError, brief
from strategies.private_mean import PrivateMean
from strategies.recipe import Recipe
from strategies.replies import Metrics, explained, mean_metrics, raise_failure, read_metrics

T = TypeVar("T")
Weigh = Callable[[str], float]
"""A node's weight in the mean, by its name."""


class Recipient(NamedTuple):
    """A node that a message goes to: its name and rank where they are known, else its id and the federation's rank.

    One that is ``equipped`` holds the constant parts already.
    """

    node_id: int
    name: str = ""
    rank: int = 0
    equipped: bool = False


@dataclass(frozen=True)
class Sent:
    """What went to one node: its view of the state, and the tensors as they arrive there."""

    view: State
    tensors: Tensors


@dataclass(frozen=True)
class Reply:
    """One accepted update: who sent it, what, its metrics, and its bytes."""

    node: str
    update: Update
    metrics: Metrics
    bytes_up: int


class LoraStrategy(Strategy):
    """Any recipe as a Flower strategy.

    Its config says how tensors travel, and has the seed from which both sides draw what never travels, and which
    samples the nodes. ``private_mean`` is for linear rules: it stands in for the nodes' updates. ``weigh`` gives the
    nodes' weights; without it each has the one that it claims.
    """

    def __init__(
        self,
        recipe: Recipe,
        *,
        fraction_train: float = 1.0,
        fraction_evaluate: float = 1.0,
        min_available_nodes: int = 2,
        private_mean: PrivateMean | None = None,
        weigh: Weigh | None = None,
    ) -> None:
        self.recipe = recipe
        self.rule = recipe.rule
        self.codec_down, self.codec_up = recipe.config.wire.down, recipe.config.wire.up
        self.seed = recipe.config.seed
        self.private_mean = private_mean
        self.weigh = weigh
        self._fractions = {MessageType.TRAIN: fraction_train, MessageType.EVALUATE: fraction_evaluate}
        self._min_available_nodes = min_available_nodes
        # Flower hands `aggregate_train` the replies but not what they reply to.
        self._state: State | None = None
        self._asked = 0
        self._sent: dict[int, Sent] = {}

    def initial_arrays(self, spec: Spec, given: Tensors | None = None) -> ArrayRecord:
        """The state before the first round, whole and in float32, as ``start`` wants it.

        ``given`` is the adapter of ``model.adapter``, where the run names one (``common/record/peft_folder.py``).
        """
        return wire.pack_state(self.recipe.start(spec, self.seed, given=given), self.rule.name)

    def messages(
        self,
        message_type: str,
        state: State,
        recipients: Sequence[Recipient],
        *,
        config: ConfigRecord | None = None,
        ttl: float | None = None,
    ) -> list[Message]:
        """One message a node with its view of the state. A list: Flower's gRPC side takes no generator."""
        rule = self.rule
        records: dict[tuple[int, int, bool], ArrayRecord] = {}
        sent: dict[tuple[int, int, bool], Sent] = {}
        self._sent = {}
        messages = []
        for node_id, name, rank, equipped in recipients:
            rank = min(rank or state.rank, state.rank)  # an init may give no layer all that the run allows
            scattered = rule.scattered and rank != state.rank
            draw = zlib.crc32(f"{self.seed}/{name or node_id}/{state.round}".encode()) if scattered else 0
            kind = (rank, draw, equipped)
            if kind not in records:
                view = rule.view(state, *kind[:2])
                without = self.recipe.left_out(equipped)
                records[kind] = wire.pack_state(view, rule.name, codec=self.codec_down, without=without)
                sent[kind] = Sent(view, self._as_received(view, records[kind]))
            self._sent[node_id] = sent[kind]
            content = RecordDict({"state": records[kind], "config": config or ConfigRecord()})
            messages.append(
                Message(content, dst_node_id=node_id, message_type=message_type, group_id=str(state.round), ttl=ttl)
            )
        return messages

    def accept(self, state: State, message: Message) -> Reply:
        """The update in a reply to ``state``. Raises :class:`BouquetError` on anything the rule cannot merge.

        Whoever calls it must be ready for any other exception too: what a reply holds is the node's.
        """
        raise_failure(message)
        content = message.content
        if list(content.array_records) != ["update"]:
            raise BouquetError(
                "a reply without an update",
                expected="one record 'update'",
                got=brief(", ".join(content)) or "nothing",
            )
        record = content.array_records["update"]
        size, most = wire.payload_bytes(record), wire.most_bytes(state)
        if size > most:
            raise BouquetError("an oversized update", expected=f"at most {most:,} bytes", got=f"{size:,} bytes")
        sent = self._sent.get(message.metadata.src_node_id)
        if sent is None:
            raise BouquetError("a reply from a node that was not asked")

        def fits(update: Update) -> None:
            _check_sent(sent.view, update)
            self.recipe.check_form(state, update)

        header, update = wire.unpack_update(
            record,
            rule=self.rule.name,
            round=state.round,
            received=sent.tensors,
            most=len(state.adapter),
            fits=fits,
        )
        if self.weigh is not None:
            update = replace(update, weight=self.weigh(header.node))
        check_values(update.tensors, "an update")
        return Reply(header.node, update, read_metrics(message), size)

    def merge(self, state: State, updates: Iterable[Update], asked: int) -> State:
        """The state of the next round, from the checked ``updates`` of some of the ``asked`` nodes."""
        if self.private_mean is not None:
            updates = [self.private_mean(state, updates, asked)]
        return self.recipe.aggregate(state, updates)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Flower's hook: train messages for a sample of the nodes."""
        _, self._state = wire.unpack_state(arrays, rule=self.rule.name)
        messages = self._configure(MessageType.TRAIN, self._state, server_round, config, grid)
        self._asked = len(messages)
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Flower's hook: merge the acceptable replies, in the order of the nodes' names; refuse the others."""
        if self._state is None:
            raise BouquetError("aggregate_train before configure_train", cure="Use LoraStrategy through start().")
        accepted = []
        for message in replies:
            try:
                accepted.append(self.accept(self._state, message))
            except Exception as refusal:  # nothing that a node sends may end a run
                log(WARNING, "round %s: refused a reply: %s", server_round, explained(refusal))
        if not accepted:
            return None, None
        accepted.sort(key=lambda reply: reply.node)
        merged = self.merge(self._state, (reply.update for reply in accepted), self._asked)
        metrics = mean_metrics([(reply.update.weight, reply.metrics) for reply in accepted])
        return wire.pack_state(merged, self.rule.name), MetricRecord(dict(metrics))

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Flower's hook: evaluate messages for a sample of the nodes."""
        _, state = wire.unpack_state(arrays, rule=self.rule.name)
        return self._configure(MessageType.EVALUATE, state, server_round, config, grid)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Flower's hook: the mean of the nodes' metrics, weighted by what each one counted."""
        scored = []
        for message in replies:
            try:
                raise_failure(message)
                if metrics := read_metrics(message):  # nodes in a private run tell none
                    scored.append((metrics["count"], metrics))
            except Exception as refusal:  # see above
                log(WARNING, "round %s: refused a reply: %s", server_round, explained(refusal))
        return MetricRecord(dict(mean_metrics(scored))) if scored else None

    def summary(self) -> None:
        """Flower's hook: one line about the rule."""
        log(INFO, "\tBouquet rule %s (%s), codec %s", self.rule.name, self.rule.paper, self.codec_up)

    def _as_received(self, view: State, record: ArrayRecord) -> Tensors:
        """What a node starts from, for updates that come back as a difference from it."""
        if self.codec_up == "fp32" or self.codec_down == "fp32":
            return view.adapter
        return {**view.adapter, **wire.unpack_state(record, rule=self.rule.name)[1].adapter}

    def _configure(
        self, message_type: str, state: State, server_round: int, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        _, connected = sample_nodes(grid, self._min_available_nodes, 0)
        chosen = choose(sorted(connected), self._fractions[message_type], self.seed, server_round)
        return self.messages(message_type, state, [Recipient(node) for node in chosen], config=config)


def share_of(nodes: int, fraction: float) -> int:
    """How many of ``nodes`` a sample takes; at least one."""
    return max(1, int(fraction * nodes + 0.5))


def choose(nodes: Sequence[T], fraction: float, seed: int, round: int) -> list[T]:
    """A reproducible sample of ``nodes``, in their order; at least one."""
    size = share_of(len(nodes), fraction)
    picked = set(random.Random(f"{seed}/{round}").sample(range(len(nodes)), size))
    return [node for index, node in enumerate(nodes) if index in picked]


def _check_sent(view: State, update: Update) -> None:
    """Raise :class:`BouquetError` unless an update is of the slots that the node was sent, or of fewer ranks."""
    if update.slots != view.slots:
        slots = ", ".join(map(str, view.slots)) or "none"
        raise BouquetError(
            "an update with slots other than those sent", expected=slots, got=brief(", ".join(map(str, update.slots)))
        )
    if update.rank > view.rank:
        raise BouquetError(
            "an update with a larger rank than was sent", expected=f"at most {view.rank}", got=str(update.rank)
        )
