"""What messages cost: the size of the codec over the tensors that a recipe sends, wherever bytes are told or planned.

A message's header comes on top, some kilobytes a thousand tensors.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import NamedTuple

from common.adapter.algebra import break_even_rank
from common.adapter.spec import Spec
from common.adapter.values import FACTORS, Key, State, Tensors
from common.wire import codecs
from strategies.recipe import Recipe


class RoundBytes(NamedTuple):
    """Bytes in one round, from the nodes and to them."""

    up: float
    down: float


class Values(NamedTuple):
    """How many values a tensor has, and how many of them are not zero."""

    whole: int
    nonzero: int


Load = Mapping[Key, Values]
Shares = Mapping[str, float]
"""The share of its slots that a node has of a layer; of all others it has the whole."""


def round_bytes(recipe: Recipe, state: State, ranks: Mapping[str, int], replied: Iterable[str]) -> RoundBytes:
    """What the round after ``state`` costs: down to all nodes, of these ``ranks``, and up from those that replied."""
    load = {
        key: Values(tensor.numel(), int(tensor.count_nonzero()))
        for key, tensor in {**state.adapter, **state.offset}.items()
    }
    replies = Counter(ranks[name] for name in replied)
    up = sum(number * _up(recipe, load, state.round, _shares(state, rank)) for rank, number in replies.items())
    reached = Counter(state.rank if recipe.rule.gets_all else rank for rank in ranks.values())
    down = sum(number * _down(recipe, load, state.round, _shares(state, rank)) for rank, number in reached.items())
    return RoundBytes(up, down)


def _shares(state: State, rank: int) -> Shares:
    return {layer: min(1.0, rank / slots) for layer, slots in state.ranks.items()}


def planned_bytes(recipe: Recipe, spec: Spec, nodes: int, given: Tensors | None = None) -> RoundBytes:
    """What a round of so many ``nodes`` costs one of the whole rank at most, over all rounds of the recipe's run.

    How much of a round an offset keeps, and what is zero at first, is not known before: all of it, and nothing.
    ``given`` is the adapter that the run starts from, as :meth:`Recipe.start` takes it.
    """
    rule, last = recipe.rule, recipe.config.num_server_rounds - 1
    shapes = {**replace(spec, structure=recipe.structure).factor_shapes(), **spec.head}
    whole = {key: _full(math.prod(shape)) for key, shape in shapes.items()}
    there = {key.layer: q.shape[1] for key, q in (given or {}).items() if key.part == "Q"}
    started = {layer: max(0, q - recipe.continues * spec.rank_of(layer)) for layer, q in there.items()}
    rounds = []
    # Rules alternate between two rounds, once they have settled, and what grows is largest at the end.
    for turn in {turn for turn in (*range(rule.settled + 2), last - 1, last) if 0 <= turn <= last}:
        offset: dict[Key, Values] = {}
        for layer, (d_out, d_in) in spec.layers.items():
            if columns := started.get(layer, 0) + turn * rule.growth(nodes, spec.rank_of(layer)):
                most = columns * (d_out + d_in) if columns <= break_even_rank(d_out, d_in) else d_out * d_in
                offset[Key(layer, "Q")] = _full(most)
        load = {**whole, **offset}
        rounds.append(RoundBytes(_up(recipe, load, turn, {}), _down(recipe, load, turn, {})))
    return RoundBytes(max(turn.up for turn in rounds), max(turn.down for turn in rounds))


def _up(recipe: Recipe, load: Load, round: int, shares: Shares) -> int:
    # What a node trains is dense, whatever it received.
    dense = {key: _full(load[key].whole) for key in recipe.sent(round, load)}
    return _bytes(dense, shares, recipe.rule.density[0], recipe.config.wire.up)


def _down(recipe: Recipe, load: Load, round: int, shares: Shares) -> int:
    """A node gets the constant parts once: when they have settled."""
    without = recipe.left_out(equipped=round > recipe.rule.settled)
    sent = {key: values for key, values in load.items() if key.part not in without}
    return _bytes(sent, shares, recipe.rule.density[1], recipe.config.wire.down)


def _bytes(sent: Load, shares: Shares, density: float, codec: str) -> int:
    """The size of a message to or from a node that has these ``shares`` of the slots."""
    count = nonzero = 0.0
    for key, values in sent.items():
        slots = shares.get(key.layer, 1.0)
        kept = min(values.nonzero, density * values.whole) if key.part in FACTORS else values.nonzero
        count, nonzero = count + slots * values.whole, nonzero + slots * kept
    return codecs.payload_size(round(count), round(nonzero), codec)


def _full(count: int) -> Values:
    return Values(count, count)
