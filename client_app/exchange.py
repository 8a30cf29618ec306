"""What a node receives and sends: a state that is checked, completed and installed, and an update that is packed."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from flwr.app import ArrayRecord, Message

from client_app.memory import Memory
from common import wire
from common.adapter import ranks
from common.adapter.algebra import digest, leading
from common.adapter.spec import Spec, check_form
from common.adapter.values import OFFSET, State, Tensors, Update, check_range
from common.config.node import NodeConfig
from common.config.run import RunConfig
from common.error import BouquetError
from common.models.adapted import LoraModel
from common.wire.codecs import CODECS
from strategies import Recipe


@dataclass(frozen=True)
class Exchange:
    """The two ends of a message on a node, between the wire and the model that ``load`` gives."""

    recipe: Recipe
    node: NodeConfig
    memory: Memory
    load: Callable[[], LoraModel]

    @property
    def config(self) -> RunConfig:
        """The run's."""
        return self.recipe.config

    @property
    def rank(self) -> int:
        """The rank this node starts with: its own, or what it had come down to when the run was broken off."""
        own = self.node.lora_rank or self.config.lora.rank
        return (self.config.resume and self.memory.rank) or own

    def receive(self, message: Message) -> tuple[LoraModel, State]:
        """The state in a message: checked, completed with what this side has of it, and installed in the model."""
        recipe, rule, model = self.recipe, self.recipe.rule, self.load()
        spec, record = self._whole(model), message.content.array_records["state"]
        most, fits = spec.most_tensors, partial(check_form, spec=spec)
        header, state = wire.unpack_state(record, rule=rule.name, most=most, fits=fits)
        if header.held:
            held = self._held(model, state, header)
            offset = {key: tensor for key, tensor in held.items() if key.part in OFFSET}
            factors = {key: tensor for key, tensor in held.items() if key not in offset}
            state = replace(state, adapter=factors | state.adapter, offset=offset | state.offset)
        if frames := {key: t for key, t in (state.adapter | state.offset).items() if key.part in recipe.sent_once}:
            self.memory.save("frames", frames, state.round)
        check_range(state)
        state = rule.view(state, state.rank)
        model.resize(state.ranks)
        self.install(model, state)
        return model, state

    def install(self, model: LoraModel, state: State) -> None:
        """Let the model start from ``state`` and from what the node keeps for itself."""
        # Before the first round nothing is kept: what there is, an attempt that did not count has left.
        kept = self.memory.load("personal", state.round) if state.round else {}
        kept = {key: tensor for key, tensor in kept.items() if self.recipe.keeps_back(state.round, key)}
        model.install(self.recipe.install(state, kept), state.scale, state.offset)

    def _held(self, model: LoraModel, state: State, header: wire.Header) -> Tensors:
        """What the message leaves out: drawn here, or received before; the coordinator's digest proves it the same."""
        drawn = self.recipe.draw(self._whole(model), self.config.seed, state.round)
        held = {key: leading(key, tensor, header.rank) for key, tensor in drawn.items()}
        sent, frames = state.adapter.keys() | state.offset.keys(), self.memory.load("frames", state.round)
        held |= {key: t for key, t in frames.items() if key.part in self.recipe.sent_once and key not in sent}
        if digest(held) != header.held:
            raise BouquetError(
                "this node's frozen tensors differ from the coordinator's",
                where=self.node.label,
                expected=f"digest {header.held[:16]}",
                got=digest(held)[:16],
                cure="Use the same torch version and the same seed on every machine.",
            )
        return held

    def _whole(self, model: LoraModel) -> Spec:
        """The adapter of the run's whole rank, of which this node may have a part."""
        lora = self.config.lora
        fewer = ranks.by_layer(lora.rank_pattern, model.spec.layers, lora.rank)
        return replace(model.spec, rank=lora.rank, scale=lora.scale, ranks=fewer)

    def pack(self, update: Update, state: State) -> ArrayRecord:
        """The update as it leaves. What a coarse codec loses of it is kept, and added to the next one."""
        rule, codec = self.recipe.rule, self.config.wire.up
        name, received = rule.name, None if rule.relative else state.adapter
        # Other slots in every round: what was lost of one is not owed to another.
        if not CODECS[codec].coarse or rule.relative or rule.reframes or update.slots:
            return wire.pack_update(update, name, state.round, self.node.label, codec=codec, received=received)
        owed = self.memory.load("feedback", state.round) if state.round else {}
        tensors = {
            key: tensor + owed[key] if key in owed and owed[key].shape == tensor.shape else tensor
            for key, tensor in update.tensors.items()
        }
        due = replace(update, tensors=tensors)
        record = wire.pack_update(due, name, state.round, self.node.label, codec=codec, received=received)
        _, arrived = wire.unpack_update(record, rule=name, round=state.round, received=received)
        left = {key: t - arrived.tensors[key] for key, t in tensors.items()}
        self.memory.save("feedback", owed | left, state.round + 1)
        return record
