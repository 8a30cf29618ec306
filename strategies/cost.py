"""What a message costs by the formula of its rule: ``Rule.bytes_up`` and ``Rule.bytes_down``, evaluated.

b   bytes a value            f   d_in + d_out of a layer      h   heads of a core
r   the node's rank          t   rounds done                  p   directions that an offset keeps of a round
K   nodes in a round         up, down   the rule's own shares
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from common.adapter import HEAD, Key, State
from common.codec import CodecName, size_in_bytes
from common.config import WireConfig
from strategies.rule import Rule

MANY = 1 << 16


class RoundBytes(NamedTuple):
    """The bytes of all nodes in one round."""

    up: float
    down: float


def formula_bytes(rule: Rule, formula: str, state: State, *, rank: int, nodes: int, codec: CodecName) -> float:
    """The bytes of one node's message in the round after ``state``: every layer's by ``formula``, and a shared head.

    A node of a smaller ``rank`` has its share of them: of the factors, or of the heads of a core.
    It leaves out what the formula does: the message's header, zeros that do not travel, and that an offset past the
    break-even rank travels as its product.
    """
    each = size_in_bytes(codec, MANY) / MANY
    names = {"b": each, "r": state.rank, "K": nodes, "t": state.round, "h": max(1, rule.blocks)}
    names |= {share: getattr(rule, share) for share in ("up", "down") if hasattr(rule, share)}
    compiled = compile(formula, f"<bytes of {rule.name}>", "eval")
    total = 0.0
    for (d_out, d_in, kept), layers in _layers(state).items():
        sizes = {"d_out": d_out, "d_in": d_in, "f": d_out + d_in, "p": kept / max(1, state.round)}
        # The formulas are constants of our own rules.
        total += layers * eval(compiled, {"__builtins__": {}}, names | sizes) * rank / state.rank  # noqa: S307
    if rule.head == "shared":
        total += each * sum(tensor.numel() for key, tensor in state.adapter.items() if key.part in HEAD)
    return total


def round_bytes(
    rule: Rule, state: State, ranks: Mapping[str, int], replied: Iterable[str], wire: WireConfig
) -> RoundBytes:
    """What the round after ``state`` costs: down to all nodes, of these ``ranks``, and up from those that replied."""

    def message(formula: str, rank: int, codec: CodecName) -> float:
        return formula_bytes(rule, formula, state, rank=rank, nodes=len(ranks), codec=codec)

    up = sum(message(rule.bytes_up, ranks[name], wire.up) for name in replied)
    # Where slots are drawn anew, a node gets all of them, whatever it trains.
    reached = (state.rank if rule.scattered else rank for rank in ranks.values())
    return RoundBytes(up, sum(message(rule.bytes_down, rank, wire.down) for rank in reached))


def _layers(state: State) -> Counter[tuple[int, int, int]]:
    """How many layers there are of each d_out, d_in and rank of the offset."""
    shapes: Counter[tuple[int, int, int]] = Counter()
    for layer in state.layers():
        offset = state.offset.get(Key(layer, "Q"))
        kept = 0 if offset is None else offset.shape[1]
        shapes[state.adapter[Key(layer, "B")].shape[0], state.adapter[Key(layer, "A")].shape[1], kept] += 1
    return shapes
