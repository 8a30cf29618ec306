"""What a message costs by the formula of its rule: ``Rule.formulas``, evaluated.

b   bytes a value            f   d_in + d_out of a layer      h   heads of a core
r   the node's rank          t   rounds done                  p   directions that an offset keeps of a round
K   nodes in a round         up, down   the rule's own shares
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import NamedTuple

import torch

from common.adapter.values import HEAD, Key, LayerShape, Spec, State
from common.config.ranges import CodecName
from common.config.run import RunConfig, WireConfig
from common.wire.codec import size_in_bytes
from strategies.rules.rule import Rule

MANY = 1 << 16


class RoundBytes(NamedTuple):
    """Bytes in one round, from the nodes and to them."""

    up: float
    down: float


def formula_bytes(rule: Rule, formula: str, state: State, *, rank: int, nodes: int, codec: CodecName) -> float:
    """The bytes of one node's message in the round after ``state``: every layer's by ``formula``, and a shared head.

    A node of a smaller ``rank`` has its share of them: of the factors, or of the heads of a core.
    It leaves out what the formula does: the message's header, and zeros that do not travel. What grows with the rounds
    is an offset, which costs no more than the layer itself.
    """
    each = size_in_bytes(codec, MANY) / MANY
    names = {"b": each, "r": state.rank, "K": nodes, "h": max(1, rule.blocks)}
    names |= {share: getattr(rule, share) for share in ("up", "down") if hasattr(rule, share)}
    compiled = compile(formula, f"<bytes of {rule.name}>", "eval")

    def layer(shape: LayerShape, kept: int, rounds: int) -> float:
        sizes = {"d_out": shape.d_out, "d_in": shape.d_in, "f": sum(shape), "p": kept / max(1, state.round)}
        # The formulas are constants of our own rules.
        return float(eval(compiled, {"__builtins__": {}}, names | sizes | {"t": rounds}))  # noqa: S307

    total = 0.0
    for (shape, kept), layers in _layers(state).items():
        # Rules alternate between two rounds at most.
        start, now = layer(shape, kept, state.round % 2), layer(shape, kept, state.round)
        if state.round > 1 and now > start:
            start = layer(shape, kept, 0)
            now = start + min(now - start, each * math.prod(shape))
        total += layers * now * rank / state.rank
    if rule.head == "shared":
        total += each * sum(tensor.numel() for key, tensor in state.adapter.items() if key.part in HEAD)
    return total


def round_bytes(
    rule: Rule, state: State, ranks: Mapping[str, int], replied: Iterable[str], wire: WireConfig
) -> RoundBytes:
    """What the round after ``state`` costs: down to all nodes, of these ``ranks``, and up from those that replied."""

    def messages(formula: str, sizes: Iterable[int], codec: CodecName) -> float:
        alike = Counter(sizes)
        return sum(
            number * formula_bytes(rule, formula, state, rank=rank, nodes=len(ranks), codec=codec)
            for rank, number in alike.items()
        )

    # Where slots are drawn anew, a node gets all of them, whatever it trains.
    reached = (state.rank if rule.scattered else rank for rank in ranks.values())
    up = messages(rule.formulas.up, (ranks[name] for name in replied), wire.up)
    return RoundBytes(up, messages(rule.formulas.down, reached, wire.down))


def planned_bytes(rule: Rule, spec: Spec, config: RunConfig, nodes: int) -> RoundBytes:
    """What a round of so many ``nodes`` costs one of the whole rank at most, over all rounds of a run.

    The same formulas as :func:`round_bytes`. How much of a round an offset keeps is not known before: at most all.
    """
    spec = replace(spec, blocks=rule.blocks)
    shapes = {**spec.factor_shapes(), **spec.head}
    ranks = {str(node): spec.rank for node in range(nodes)}
    last, rounds = config.num_server_rounds - 1, []
    # Rules alternate between two rounds, once they have settled, and what grows is largest at the end.
    for turn in {turn for turn in (*range(rule.settled + 2), last - 1, last) if 0 <= turn <= last}:
        offset = {Key(layer, "Q"): (shape.d_out, turn * nodes * spec.rank) for layer, shape in spec.layers.items()}
        adapter, kept = (
            {key: torch.empty(shape, device="meta") for key, shape in named.items()} for named in (shapes, offset)
        )
        state = State(adapter, spec.scale, turn, kept)
        rounds.append(round_bytes(rule, state, ranks, ranks, config.wire))
    return RoundBytes(max(turn.up for turn in rounds) / nodes, max(turn.down for turn in rounds) / nodes)


def _layers(state: State) -> Counter[tuple[LayerShape, int]]:
    """How many layers there are of each shape and rank of the offset."""
    shapes: Counter[tuple[LayerShape, int]] = Counter()
    for layer in state.layers():
        offset = state.offset.get(Key(layer, "Q"))
        shape = LayerShape(state.adapter[Key(layer, "B")].shape[0], state.adapter[Key(layer, "A")].shape[1])
        shapes[shape, 0 if offset is None else offset.shape[1]] += 1
    return shapes
