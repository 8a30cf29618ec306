"""Five nodes that answer at once, of which one is hostile."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict

from common import wire
from common.adapter.algebra import leading
from common.adapter.spec import Spec
from common.adapter.values import Key, State, Update
from common.models import adapted
from strategies import Recipe
from tests.support.grid import AnsweringGrid, asks_for_score, introduction, travelled, with_its_score
from tests.support.replies import bare, packed

HONEST, HOSTILE = (1, 2, 3, 4), 5
SEED = 3


def received(message: Message, recipe: Recipe, spec: Spec) -> State:
    """What a node has after a message of the seed :data:`SEED`: what was sent, and what it draws for itself."""
    header, state = wire.unpack_state(message.content.array_records["state"], rule=recipe.rule.name)
    drawn = recipe.draw(spec, SEED, state.round)
    held = {key: leading(key, tensor, header.rank) for key, tensor in drawn.items()}
    return State(held | state.adapter, state.scale, state.round, state.offset, slots=state.slots)


def score_of(node: int) -> MetricRecord:
    """What a node scores of whatever state."""
    return MetricRecord({"loss": 2.0 + node / 10, "correct": node, "count": 10 * node})


class Nodes(AnsweringGrid):
    """Nodes that answer at once, each with a change of its own; what node :data:`HOSTILE` says is spoilt."""

    def __init__(self, flat: dict[str, Any], nodes: Iterable[int], spoil: "Spoil | None" = None) -> None:
        super().__init__(nodes)
        self.spoil = spoil
        self.recipe = Recipe.read(flat)
        config, self.rule = self.recipe.config, self.recipe.rule
        self.spec = adapted.describe(config.model, config.lora, config.task, self.rule.structure)

    def _reply(self, message: Message) -> Message:
        node, kind = message.metadata.dst_node_id, message.metadata.message_type
        content = self._honest(node, message)
        if node == HOSTILE and self.spoil is not None:
            if self.spoil.kind == kind:
                content = self.spoil(content)
            elif self.spoil.kind == MessageType.EVALUATE:
                content = with_its_score(content, self.spoil)
        return Message(travelled(content), reply_to=message)

    def _honest(self, node: int, message: Message) -> RecordDict:
        if message.metadata.message_type == MessageType.QUERY:
            rank = 4 if self.rule.mixed_ranks and node == 2 else 8
            return RecordDict({"node": ConfigRecord(introduction(f"node-{node}", rank))})
        if message.metadata.message_type == MessageType.EVALUATE:
            return RecordDict({"metrics": score_of(node)})
        state = received(message, self.recipe, self.spec)
        generator = torch.Generator().manual_seed(100 * state.round + node)
        local = {
            key: tensor + 0.01 * torch.randn(tensor.shape, generator=generator)
            if self.rule.trains(state.round, key)
            else tensor
            for key, tensor in state.adapter.items()
        }
        update = Update(self.rule.send(state, local), 10.0 * node, state.scale, state.slots)
        record = wire.pack_update(update, self.rule.name, state.round, f"node-{node}")
        content = RecordDict({"update": record, "metrics": MetricRecord({"loss": 2.0, "examples": 10 * node})})
        if asks_for_score(message):
            content["score"] = score_of(node)
        return content


class Spoil:
    """One kind of hostile reply, to messages of one kind."""

    def __init__(self, change: Callable[[RecordDict], RecordDict], kind: str = MessageType.TRAIN) -> None:
        self.change, self.kind = change, kind

    def __call__(self, content: RecordDict) -> RecordDict:
        return self.change(content)


def update(change: Callable[[wire.Header, dict[Key, torch.Tensor]], ArrayRecord]) -> Spoil:
    """A reply whose update is packed anew."""

    def spoilt(content: RecordDict) -> RecordDict:
        header = wire.read_header(content.array_records["update"])
        _, sent = wire.unpack_update(content.array_records["update"], rule=header.rule, round=header.round)
        content["update"] = change(header, dict(sent.tensors))
        return content

    return Spoil(spoilt)


def with_header(**changes: Any) -> Spoil:
    return update(lambda header, tensors: packed(header, tensors, **changes))


def with_values(change: Callable[[torch.Tensor], torch.Tensor]) -> Spoil:
    return update(lambda header, tensors: packed(header, {key: change(t) for key, t in tensors.items()}))


def both(weight: float) -> Spoil:
    """A weight, and as many examples."""
    heavy, counted = with_header(weight=weight), with_figures(MessageType.TRAIN, examples=weight)
    return Spoil(lambda content: counted(heavy(content)))


def with_figures(kind: str, **figures: Any) -> Spoil:
    def spoilt(content: RecordDict) -> RecordDict:
        content["metrics"] = MetricRecord({**content.metric_records["metrics"], **figures})
        return content

    return Spoil(spoilt, kind)


def answer(content: RecordDict, kind: str = MessageType.TRAIN) -> Spoil:
    return Spoil(lambda _: content, kind)


def at_the_roll_call(**facts: Any) -> Spoil:
    return answer(RecordDict({"node": ConfigRecord(introduction("node-5") | facts)}), MessageType.QUERY)


LONG = "x" * 2_000_000


SPOILS = {
    "nothing": answer(RecordDict()),
    "bytes": answer(RecordDict({"update": ArrayRecord({"header": bare(b"PK\x03\x04"), "values": bare(b"")})})),
    "numpy": answer(RecordDict({"update": ArrayRecord({"header": Array(torch.ones(3).numpy()), "values": bare(b"")})})),
    "one array more": update(lambda h, t: ArrayRecord({**packed(h, t), "weights": bare(bytes(90))})),
    "NaN": with_values(lambda tensor: tensor * float("nan")),
    "finite 1e20": with_values(lambda tensor: torch.full_like(tensor, 1e20)),
    "finite 3e38": with_values(lambda tensor: torch.full_like(tensor, 3e38)),
    "the largest that is read": with_values(lambda tensor: torch.full_like(tensor, 9e5)),
    "a thousand times the change": with_values(lambda tensor: 1e3 * tensor + 10),
    "a weight of 1e18": with_header(weight=1e18),
    "a weight of 1.7e308": with_header(weight=1.7e308),
    "a weight far above the others": both(2.0**31),
    "a weight that is not its number of examples": with_header(weight=500.0),
    "another scale": with_header(scale=1e3),
    "another round": with_header(round=7),
    "another rule": with_header(rule="hetlora2"),
    "another's name": with_header(node="node-1"),
    "slots of its own": with_header(slots=[0, 1]),
    "no slots": update(lambda h, t: packed(h, {k: v[..., :1] for k, v in t.items()}, slots=[])),
    "no tensors": update(lambda h, t: packed(h, {})),
    "a tensor of the base": update(lambda h, t: packed(h, {**t, Key("model.embed_tokens", "W"): torch.ones(4, 4)})),
    "a negative loss": with_figures(MessageType.TRAIN, loss=-1.0),
    "a loss of 1e300": with_figures(MessageType.TRAIN, loss=1e300),
    "an infinite loss": with_figures(MessageType.TRAIN, loss=float("inf")),
    "a list for a loss": with_figures(MessageType.TRAIN, loss=[1.0, 2.0]),
    "a long reason": answer(RecordDict({"failure": ConfigRecord({"reason": LONG})})),
    "bytes for a reason": answer(RecordDict({"failure": ConfigRecord({"reason": b"\x00" * 999, "refused": "no"})})),
    "a count of 1e18": with_figures(MessageType.EVALUATE, count=10**18, correct=1),
    "a count far above the others": with_figures(MessageType.EVALUATE, count=10**9, correct=1, loss=0.0),
    "a negative held-out loss": with_figures(MessageType.EVALUATE, loss=-5.0),
    "more right than counted": with_figures(MessageType.EVALUATE, correct=51),
    "NaN right": with_figures(MessageType.EVALUATE, correct=float("nan")),
    "a score without a count": answer(RecordDict({"metrics": MetricRecord({"loss": 1.0})}), MessageType.EVALUATE),
    "no name": at_the_roll_call(name=""),
    "a path for a name": at_the_roll_call(name="../../etc"),
    "a look-alike": at_the_roll_call(name="n\u043ede-1"),
    "another's name at the roll call": at_the_roll_call(name="NODE-1"),
    "the name of all": at_the_roll_call(name="all"),
    "a rank of 0": at_the_roll_call(rank=0),
    "a rank of 2^62": at_the_roll_call(rank=2**62),
    "no rank": at_the_roll_call(rank="8"),
    "a long name": at_the_roll_call(name=LONG),
    "other code": at_the_roll_call(code=LONG),
    "another base": at_the_roll_call(base=LONG),
    "no base": at_the_roll_call(base=[1]),
}
