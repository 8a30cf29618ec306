"""What a federation does, of choices that go together. Built once, on either side, from the same run config."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor

from common import tasks
from common.adapter.draws import layer_seed, normal
from common.adapter.spec import Spec
from common.adapter.values import FACTORS, HEAD, Key, State, Tensors, Update
from common.config.run import RunConfig
from strategies import laws
from strategies.choices import Choices
from strategies.gradients import GRADIENTS
from strategies.inits import INITS, GradientInit
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
        rule = RULES.build(flat, offset_energy=config.merge.offset_energy, **given)
        keeps = [KEEPS.build(flat, chosen(flat, "keep", rule.keeps))]
        private = "fast" if config.privacy.per_example else "backward"
        recipe = cls(
            rule=rule,
            init=INITS.build(flat, chosen(flat, "init", rule.init)),
            optimizer=OPTIMIZERS.build(flat),
            objective=OBJECTIVES.build(flat),
            gradient=GRADIENTS.build(flat, chosen(flat, "gradient", private)),
            keeps=(*keeps, LocalHead()) if config.task.head == "local" else tuple(keeps),
            config=config,
        )
        laws.check(recipe)
        return recipe

    @classmethod
    def around(cls, rule: Rule, config: RunConfig | None = None) -> Self:
        """A recipe of this rule, and of what it wants on the other axes."""
        return cls(rule=rule, init=INITS[rule.init](), keeps=(KEEPS[rule.keeps](),), config=config or RunConfig())

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
        """The constant parts, the head among them where it is not shared; none travels more than once."""
        return self.constant if self.config.task.head == "shared" else self.constant | HEAD

    @cached_property
    def drawn(self) -> frozenset[str]:
        """Parts that each side draws for itself with :meth:`draw`, so that they never travel to the nodes."""
        if self.rule.restarts:
            return self.fixed | FACTORS
        return self.fixed if not isinstance(self.init, GradientInit) and not self.rule.settled else self.fixed - FACTORS

    def start(self, spec: Spec, seed: int, seen: Callable[[str], Tensor] | None = None) -> State:
        """The state before the first round; ``seen`` has what the init has to see of a layer, by its name.

        A start other than the base model is taken off again by the offset, unless the init means it.
        """
        generator = torch.Generator().manual_seed(seed)
        adapter, offset = Tensors(), Tensors()
        scale = 1.0 if self.init.orthonormal else spec.scale
        for layer, shape in spec.layers.items():
            b, a, core = self.init.factors(shape, spec.rank, generator, None if seen is None else seen(layer))
            parts = self.structure.start(b, a, core)
            for part, _ in self.structure.layer(shape, spec.rank):
                adapter[Key(layer, part)] = parts[part]
            if not self.init.moves and b.any() and (right := self.structure.right(adapter, layer)).any():
                offset[Key(layer, "Q")], offset[Key(layer, "P")] = -scale * b, right
        for key, size in spec.head.items():
            if len(size) > 1:
                adapter[key] = normal(size, 0.02, generator)
            else:  # a norm's weight, or a bias
                adapter[key] = torch.ones(size) if key.part == "W" else torch.zeros(size)
        return self.rule.begin(State(adapter, scale, offset=offset, seed=seed))

    def draw(self, spec: Spec, seed: int, round: int) -> Tensors:
        """The drawn parts of the state of ``round``: those of the start, or where a rule restarts the fresh factors."""
        drawn = {key: tensor for key, tensor in self.start(spec, seed).adapter.items() if key.part in self.drawn}
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
    return config.task.head == "local" and tasks.classes(config.task) > 0
