"""What a federation does, of choices that go together. Built once, on either side, from the same run config."""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor

from common import tasks
from common.adapter.algebra import extend_offset, leading
from common.adapter.continued import continued
from common.adapter.draws import layer_seed, normal
from common.adapter.spec import Spec
from common.adapter.structures import STRUCTURES
from common.adapter.threads import one_thread
from common.adapter.values import FACTORS, HEAD, OFFSET, Key, LayerShape, State, Tensors, Update
from common.config.run import RunConfig
from common.error import BouquetError
from strategies import blocks, laws
from strategies.choices import Choices
from strategies.gradients import GRADIENTS
from strategies.inits import INITS
from strategies.keeps import KEEPS, LocalHead
from strategies.means import MEANS
from strategies.objectives import OBJECTIVES
from strategies.optimizers import OPTIMIZERS
from strategies.registries import chosen, read_config
from strategies.rules import RULES
from strategies.rules.mean import MeanRule
from strategies.rules.rule import Rule
from strategies.server_optimizers import SERVER_OPTIMIZERS


@dataclass(frozen=True, kw_only=True)
class Recipe(Choices):
    """What a federation does: choices that go together, and what follows from several of them at once.

    A long class: what follows from two axes stands here and nowhere else, so that nobody has to ask both.
    """

    @classmethod
    def read(cls, flat: Mapping[str, Any]) -> Self:
        """The recipe of Flower's flat run config. Raises :class:`ConfigError` with every mistake in it."""
        return cls.build(read_config(flat))

    @classmethod
    def build(cls, config: RunConfig) -> Self:
        """The recipe of a config. Raises :class:`BouquetError` on a value out of range, and on choices that clash."""
        flat = config.methods
        kind, given = RULES[config.rule], dict[str, Any]()
        if issubclass(kind, MeanRule):
            given = {"mean": MEANS.build(flat), "optimizer": SERVER_OPTIMIZERS.build(flat)}
        given["adapter"] = STRUCTURES.build(flat, chosen(flat, "adapter", kind().adapter.name))
        rule = RULES.build(flat, offset_energy=config.merge.offset_energy, **given)
        keeps = [KEEPS.build(flat, chosen(flat, "keep", rule.keeps))]
        structure = rule.structure
        gradient = "fast" if config.privacy.per_example else structure.gradient
        recipe = cls(
            rule=rule,
            init=INITS.build(flat, chosen(flat, "init", rule.start_at)),
            optimizer=OPTIMIZERS.build(flat, chosen(flat, "optimizer", structure.optimizer)),
            objective=OBJECTIVES.build(flat),
            gradient=GRADIENTS.build(flat, chosen(flat, "gradient", gradient)),
            keeps=(*keeps, LocalHead()) if config.task.head == "local" else tuple(keeps),
            config=config,
        )
        laws.check(recipe)
        return recipe

    @classmethod
    def around(cls, rule: Rule, config: RunConfig | None = None) -> Self:
        """A recipe of this rule, and of what it wants on the other axes."""
        return cls(
            rule=rule,
            init=INITS[rule.start_at](),
            optimizer=OPTIMIZERS[rule.structure.optimizer](),
            gradient=GRADIENTS[rule.structure.gradient](),
            keeps=(KEEPS[rule.keeps](),),
            config=config or RunConfig(),
        )

    @property
    def personal(self) -> bool:
        """Whether the adapter itself is each node's own, so that there is no global model."""
        return any(keep.personal for keep in self.keeps)

    @property
    def own_models(self) -> bool:
        """Whether each node has a model of its own: a personal adapter, or a head that stays."""
        return self.personal or _own_heads(self.config)

    @cached_property
    def constant(self) -> frozenset[str]:
        """Parts of the state that never change once the start is settled."""
        turns = (self.rule.settled, self.rule.settled + 1)
        moving = frozenset().union(*(self.rule.plan(turn).sent for turn in turns))
        return self.structure.parts - moving - (FACTORS if self.rule.reframes else frozenset())

    @cached_property
    def fixed(self) -> frozenset[str]:
        """The constant parts, with a head that is not shared and the start's offset where no round moves it.

        None travels more than once.
        """
        head = frozenset() if self.config.task.head == "shared" else HEAD
        offset = OFFSET if self._starts_over_one and not self.rule.moves_offset else frozenset()
        return self.constant | head | offset

    @property
    def _starts_over_one(self) -> bool:
        """Whether the start may have an offset: an adapter, or what takes off again what the init adds."""
        return bool(self.config.model.adapter) or self.init.taken_off()

    @property
    def continues(self) -> bool:
        """Whether the adapter that a run starts from (``model.adapter``) becomes the factors that it trains.

        Where a rule, an init or an objective needs another start, that stays, and the adapter is the offset under it.
        """
        plain = self.structure.plain and not self.rule.restarts and self.init.name == "drawn" and not self.rule.thins
        return plain and bool(self.config.model.adapter) and not self.objective.over

    @property
    def sees(self) -> str:
        """What the start has to see of the base model: for the init, or for what the structure measures."""
        return "weights" if self.structure.measured else self.init.sees

    @cached_property
    def drawn(self) -> frozenset[str]:
        """Parts that each side draws for itself with :meth:`draw`, so that they never travel to the nodes."""
        sent = OFFSET | (HEAD if self.config.model.adapter else frozenset())
        if self.continues or self.sees != "nothing" or self.rule.settled:
            sent |= FACTORS | self.structure.measured
        return (self.fixed | FACTORS if self.rule.restarts else self.fixed) - sent

    @property
    def sent_once(self) -> frozenset[str]:
        """Parts that a node cannot draw, and receives no more than once."""
        return self.fixed - self.drawn

    def left_out(self, equipped: bool) -> frozenset[str]:
        """The parts that a message to a node does not hold; one that is ``equipped`` has received the fixed ones.

        It has them to the bit, or it could not prove it: a codec that loses something carries them every time.
        """
        once = equipped and self.config.wire.down == "fp32"
        return self.drawn | self.fixed if once else self.drawn

    def start(
        self,
        spec: Spec,
        seed: int,
        seen: Callable[[str], Tensor] | None = None,
        given: Tensors | None = None,
    ) -> State:
        """The state before the first round; ``seen`` has what the init has to see of a layer, by its name.

        A start other than the base model is taken off again by the offset, unless the init means it. ``given`` is the
        adapter of ``model.adapter``: Q and P of its layers, and its head, if it has one. The model starts as the base
        with that adapter, exactly, whatever the rule and whatever its rank.
        """
        if bool(self.config.model.adapter) != (given is not None):
            raise BouquetError(
                "a start without the adapter that the run names, or with one that it does not name",
                where="model.adapter",
                expected=f"'{self.config.model.adapter}'",
                got="none" if given is None else "an adapter",
            )
        state = self._own_start(spec, seed, seen)
        if seen is not None and self.init.shares_out:
            values = {layer: seen(layer).double().norm(dim=1) for layer in spec.layers}
            kept = self.init.ranks(values, spec.rank)
            cut = {key: leading(key, t, kept.get(key.layer, spec.rank)) for key, t in state.adapter.items()}
            state = replace(state, adapter=cut)
        return self.rule.begin(state if given is None else self._continued(state, given))

    def _continued(self, state: State, given: Tensors) -> State:
        """``state`` with an adapter as the leading slots of its factors, or under them."""
        adapter, offset = dict(state.adapter), Tensors()
        for key, tensor in given.items():
            if key.part in HEAD:
                adapter[key] = tensor
            elif not self.continues:
                offset[key] = tensor
            elif key.part == "Q":
                a, b, p = (Key(key.layer, part) for part in "ABP")
                with one_thread():
                    adapter[b], adapter[a], *rest = continued(tensor, given[p], adapter[a], state.scale)
                if rest[0].numel():
                    offset[key], offset[p] = rest
        return replace(state, adapter=adapter, offset=extend_offset(state.offset, offset))

    def _own_start(self, spec: Spec, seed: int, seen: Callable[[str], Tensor] | None) -> State:
        """The start of the init, with a head that is drawn."""
        generator = torch.Generator().manual_seed(seed)
        adapter, offset = self.structure.common(), Tensors()
        linear = self.structure.trained in self.structure.linear_in
        scale = 1.0 if self.init.unit else spec.scale
        for layer, shape in spec.layers.items():
            rank = spec.rank_of(layer)
            sight = None if seen is None else seen(layer)
            b, a, core = self.init.factors(shape, rank, generator, sight)
            if linear and not self.init.moves:
                core = None  # what starts there and is taken off again is what starts at zero
            parts = dict(self.structure.start(b, a, core))
            if self.structure.measured and sight is not None:
                parts |= self.structure.measure(sight)
            for part, _ in self.structure.layer(shape, rank):
                adapter[Key(layer, part)] = parts[part]
            left, right = self.structure.factors(adapter, layer)
            if not self.init.moves and left.any() and right.any():
                offset[Key(layer, "Q")], offset[Key(layer, "P")] = -scale * left, right.clone()
        for key, size in spec.head.items():
            if len(size) > 1:
                adapter[key] = normal(size, 0.02, generator)
            else:  # a norm's weight, or a bias
                adapter[key] = torch.ones(size) if key.part == "W" else torch.zeros(size)
        return State(adapter, scale, offset=offset, seed=seed)

    def draw(self, spec: Spec, seed: int, round: int) -> Tensors:
        """The drawn parts of the state of ``round``: those of the start, or where a rule restarts the fresh factors."""
        start = self.rule.begin(self._own_start(spec, seed, None))
        drawn = {key: tensor for key, tensor in start.adapter.items() if key.part in self.drawn}
        if round and self.rule.restarts:
            for layer, shape in spec.layers.items():
                drawn |= self._restarted(layer, shape, spec.rank_of(layer), layer_seed(seed, round, layer))
        return drawn

    def _restarted(self, layer: str, shape: LayerShape, rank: int, seed: int) -> Tensors:
        """The fresh factors of a layer."""
        b, a, _ = self.init.factors(shape, rank, torch.Generator().manual_seed(seed), None)
        return {Key(layer, "B"): b, Key(layer, "A"): a}

    def resting(self, round: int, keys: Iterable[Key]) -> frozenset[str]:
        """The layers, of those of all ``keys``, that nobody trains or sends in ``round``."""
        layers = (key.layer for key in keys if key.part not in HEAD)
        count = self.config.train.blocks if round >= self.rule.settled else 0
        return blocks.resting(layers, count, self.config.seed, round)

    def trained(self, round: int, keys: Collection[Key]) -> list[Key]:
        """Of all keys of a model those that are trained in ``round``."""
        resting = self.resting(round, keys)
        return [key for key in keys if key.layer not in resting and self.trains(round, key)]

    def sent(self, round: int, keys: Collection[Key]) -> list[Key]:
        """Of all keys of a model those that are sent in ``round``."""
        resting = self.resting(round, keys)
        return [key for key in keys if key.layer not in resting and self.sends(round, key)]

    def trains(self, round: int, key: Key) -> bool:
        """Whether a tensor is trained in ``round``, if its layer does not rest."""
        return self.rule.trains(round, key) and not (key.part in HEAD and self.config.task.head == "frozen")

    def sends(self, round: int, key: Key) -> bool:
        """Whether a tensor is sent in ``round``, if its layer does not rest."""
        return self.rule.sends(round, key) and not (key.part in HEAD and self.config.task.head != "shared")

    def keeps_back(self, round: int, key: Key) -> bool:
        """Whether a tensor that is trained in ``round`` stays with the node."""
        return self.trains(round, key) and not self.sends(round, key) and any(keep.keeps(key) for keep in self.keeps)

    def install(self, state: State, kept: Tensors) -> Tensors:
        """Where a node starts: what it received, and what it has ``kept`` for itself."""
        tensors = dict(state.adapter)
        for keep in self.keeps:
            tensors = keep.start(tensors, kept)
        return tensors

    def kept(self, state: State, local: Tensors) -> Tensors:
        """What a node keeps for itself of what it has trained."""
        kept = Tensors()
        for keep in self.keeps:
            kept |= keep.finish(state.adapter, local, kept)
        return {key: tensor for key, tensor in kept.items() if self.keeps_back(state.round, key)}

    def send(self, received: State, local: Tensors) -> Tensors:
        """What leaves the machine."""
        return self.rule.send(self.shared(received), self._shared(received.round, local))

    def shared(self, state: State) -> State:
        """A state without a head that the nodes do not share, and without the layers that rest in its round."""
        return replace(state, adapter=self._shared(state.round, state.adapter))

    def check_form(self, state: State, update: Update) -> None:
        """Raise :class:`BouquetError` unless ``update`` is, by all but its values, one that ``state`` can lead to."""
        self.rule.check_form(self.shared(state), update)

    def aggregate(self, state: State, updates: Iterable[Update]) -> State:
        """The state of the next round, as :meth:`Rule.aggregate` makes it; what is not shared stays."""
        merged = self.rule.aggregate(self.shared(state), updates)
        adapter = {**state.adapter, **merged.adapter}
        if self.rule.restarts:  # what has rested is drawn anew with the rest, on both sides
            for layer in self.resting(state.round, state.adapter):
                b, a = adapter[Key(layer, "B")], adapter[Key(layer, "A")]
                shape = LayerShape(len(b), a.shape[1])
                adapter |= self._restarted(layer, shape, len(a), layer_seed(state.seed, merged.round, layer))
        return replace(merged, adapter=adapter)

    def _shared(self, round: int, tensors: Tensors) -> Tensors:
        own = frozenset() if self.config.task.head == "shared" else HEAD
        resting = self.resting(round, tensors)
        if not (own or resting):
            return tensors
        return {key: tensor for key, tensor in tensors.items() if key.part not in own and key.layer not in resting}


def own_models(config: RunConfig) -> bool:
    """Whether each node of a run has a model of its own, and the run has none."""
    return _own_heads(config) or KEEPS[chosen(config.methods, "keep", RULES[config.rule].keeps)]().personal


def _own_heads(config: RunConfig) -> bool:
    return config.task.head == "local" and bool(tasks.classes(config.task))
