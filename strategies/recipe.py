"""What a federation does, of choices that go together. Built once, on either side, from the same run config."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor

from common import tasks
from common.adapter.algebra import extend_offset
from common.adapter.continued import continued
from common.adapter.draws import layer_seed, normal
from common.adapter.spec import Spec
from common.adapter.structures import STRUCTURES
from common.adapter.threads import one_thread
from common.adapter.values import FACTORS, HEAD, OFFSET, Key, State, Tensors, Update
from common.config.run import RunConfig
from common.error import BouquetError
from strategies import laws
from strategies.choices import Choices
from strategies.gradients import GRADIENTS
from strategies.inits import INITS
from strategies.keeps import KEEPS, LocalHead
from strategies.means import MEANS
from strategies.objectives import OBJECTIVES
from strategies.optimizers import OPTIMIZERS
from strategies.registries import chosen, read_config
from strategies.rules import RULES
from strategies.rules.rule import MeanRule, Rule
from strategies.server_optimizers import SERVER_OPTIMIZERS


@dataclass(frozen=True, kw_only=True)
class Recipe(Choices):
    """What a federation does: choices that go together, and what follows from several of them at once."""

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

        Where a rule or an init needs a start of its own, that stays, and the adapter is the offset under it.
        """
        plain = self.structure.plain and not self.rule.restarts and self.init.name == "drawn" and not self.rule.thins
        return plain and bool(self.config.model.adapter)

    @cached_property
    def drawn(self) -> frozenset[str]:
        """Parts that each side draws for itself with :meth:`draw`, so that they never travel to the nodes."""
        sent = OFFSET | (HEAD if self.config.model.adapter else frozenset())
        if self.continues or self.init.sees != "nothing" or self.rule.settled:
            sent |= FACTORS
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
            b, a, core = self.init.factors(shape, spec.rank, generator, None if seen is None else seen(layer))
            if linear and not self.init.moves:
                core = None  # what starts there and is taken off again is what starts at zero
            parts = self.structure.start(b, a, core)
            for part, _ in self.structure.layer(shape, spec.rank):
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
                generator = torch.Generator().manual_seed(layer_seed(seed, round, layer))
                drawn[Key(layer, "B")], drawn[Key(layer, "A")], _ = self.init.factors(shape, spec.rank, generator, None)
        return drawn

    def trains(self, round: int, key: Key) -> bool:
        """Whether a tensor is trained in ``round``."""
        return self.rule.trains(round, key) and not (key.part in HEAD and self.config.task.head == "frozen")

    def sends(self, round: int, key: Key) -> bool:
        """Whether a tensor is sent in ``round``."""
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
        return self.rule.send(self.shared(received), self._shared(local))

    def shared(self, state: State) -> State:
        """A state without a head that the nodes do not share."""
        return replace(state, adapter=self._shared(state.adapter))

    def check_form(self, state: State, update: Update) -> None:
        """Raise :class:`BouquetError` unless ``update`` is, by all but its values, one that ``state`` can lead to."""
        self.rule.check_form(self.shared(state), update)

    def aggregate(self, state: State, updates: Iterable[Update]) -> State:
        """The state of the next round, as :meth:`Rule.aggregate` makes it; a head that is not shared stays."""
        merged = self.rule.aggregate(self.shared(state), updates)
        return replace(merged, adapter={**state.adapter, **merged.adapter})

    def _shared(self, tensors: Tensors) -> Tensors:
        if self.config.task.head == "shared":
            return tensors
        return {key: tensor for key, tensor in tensors.items() if key.part not in HEAD}


def own_models(config: RunConfig) -> bool:
    """Whether each node of a run has a model of its own, and the run has none."""
    return _own_heads(config) or KEEPS[chosen(config.methods, "keep", RULES[config.rule].keeps)]().personal


def _own_heads(config: RunConfig) -> bool:
    return config.task.head == "local" and bool(tasks.classes(config.task))
