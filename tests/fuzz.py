"""Messages that no honest machine sends, both ways: each is read or refused in our own words, and none takes memory.

    python -m tests.fuzz --messages 20000 --seed 7

A process of its own, since the most memory that a process has ever had is what it can be held to.
"""

import argparse
import json
import random
import resource
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, Message, MessageType, MetricRecord, RecordDict

from common.adapter.spec import Spec, check_form
from common.adapter.values import Key, LayerShape, check_range
from common.config.run import RunConfig
from common.error import BouquetError
from common.wire import message as wire
from common.wire.codecs import CODECS
from common.wire.header import FORM, payload_bytes
from strategies import Recipe, Rule
from strategies.rules import FLASC, FedIT, FedPLora, FLora, Ravan
from strategies.strategy import LoraStrategy
from tests.support.factors import trained
from tests.support.grid import pose_as_an_app
from tests.support.hostile import SEED, received

RULES: list[Rule] = [FedIT(), FLASC(), FedPLora(), FLora(), Ravan(heads=2)]
LAYERS = {f"model.layers.{number}.{name}": LayerShape(96, 64) for number in range(4) for name in ("up", "down")}
WHOLE = 4
TIMES, SPARE = 10, 8 * 2**20
"""What a message may take: ten times its own bytes, and room for one small header read and for the allocator."""
NUMBERS = [0, -1, 1, 2**31, 2**31 + 1, 2**63, 2**70, 10**40, 1e308, 1e-308, -1e308, 0.5, True, None, "1", [], "nan"]
TEXTS = ["", "node-000", "..", "\ud800"[:0] + "\u202enode", "x" * 5000, "fedit", "A", "\x00", "a/b:c"]

Bytes = dict[str, bytes]


def spec(rule: Rule) -> Spec:
    return Spec(LAYERS, {Key("classifier", "W"): (2, 64), Key("classifier", "b"): (2,)}, WHOLE, 2.0, rule.structure)


def flipped(parts: Bytes, draw: random.Random) -> None:
    """Some bits of one array."""
    name = draw.choice(sorted(parts))
    data = bytearray(parts[name])
    for _ in range(draw.choice([1, 1, 4, 64])):
        if data:
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    parts[name] = bytes(data)


def cut(parts: Bytes, draw: random.Random) -> None:
    name = draw.choice(sorted(parts))
    parts[name] = parts[name][: draw.randrange(len(parts[name]) + 1)]


def lengthened(parts: Bytes, draw: random.Random) -> None:
    parts[draw.choice(sorted(parts))] += draw.randbytes(draw.choice([1, 3, 4, 1000]))


def exchanged(parts: Bytes, draw: random.Random) -> None:
    """Arrays under other names, missing, or one too many."""
    names = ["header", "values", "mask", "model", ""]
    parts[draw.choice(names)] = parts.pop(draw.choice(sorted(parts)))
    if draw.random() < 0.3:
        parts[draw.choice(names)] = draw.randbytes(40)


def random_bytes(parts: Bytes, draw: random.Random) -> None:
    parts[draw.choice(sorted(parts))] = draw.randbytes(draw.choice([0, 1, 30, 3000]))


def bomb(parts: Bytes, draw: random.Random) -> None:
    """Much text in few bytes: blanks, brackets, or tensors by the hundred thousand."""
    parts["header"] = _bomb(draw.choice([b" ", b"[", b'["l","A",[1,1]],', b'{"a":', b'"']))


@cache
def _bomb(piece: bytes) -> bytes:
    # A piece at a time: what the attacker takes is not to hide what the reader does.
    deflate = zlib.compressobj()
    begun = deflate.compress(b'{"tensors":[')
    return begun + b"".join(deflate.compress(piece * 4096) for _ in range(4096)) + deflate.flush()


def extreme(parts: Bytes, draw: random.Random) -> None:
    """Values of the right number that are very large or small, or no numbers."""
    value = draw.choice([1e6, 1.1e6, 1e20, 3e38, -3e38, 1e-45, 0.0, float("inf"), float("nan")])
    values = np.frombuffer(parts["values"][: len(parts["values"]) // 4 * 4], dtype=np.float32).copy()
    values[:: draw.choice([1, 7, 1000])] = value
    parts["values"] = values.tobytes() + parts["values"][4 * len(values) :]


def fields_of(parts: Bytes) -> dict[str, Any]:
    """What a header says, where it is still a small one."""
    fields: dict[str, Any] = json.loads(zlib.decompressobj().decompress(parts["header"], 2**18))
    return fields


def claimed(parts: Bytes, draw: random.Random) -> None:
    """A header that says something else: a number, a name, a shape, a tensor more or less."""
    fields = fields_of(parts)
    for _ in range(draw.choice([1, 1, 2, 5])):
        where = draw.choice(["field", "tensor", "shape", "more", "less", "name"])
        tensors = fields.get("tensors") if isinstance(fields.get("tensors"), list) else []
        if where == "field" or not tensors:
            fields[draw.choice([*fields, "rank", "slots", "held", "relative", "codec", "surprise"])] = draw.choice(
                [*NUMBERS, *TEXTS, *CODECS, [0, 0], list(range(9)), {"a": {}}]
            )
            continue
        tensor = draw.choice(tensors)
        if where == "more":
            tensors.insert(draw.randrange(len(tensors) + 1), [draw.choice(TEXTS), draw.choice("ABRsQPWb"), [8, 8]])
        elif where == "less":
            tensors.remove(tensor)
        elif isinstance(tensor, list) and len(tensor) == 3:
            tensor[0 if where == "name" else 2] = (
                draw.choice(TEXTS) if where == "name" else [draw.choice(NUMBERS) for _ in range(draw.randrange(4))]
            )
    parts["header"] = zlib.compress(json.dumps(fields).encode())


def sizes(parts: Bytes, draw: random.Random) -> None:
    """Shapes that hold as many values as there are, or a mask that stands for far more than was sent."""
    fields = fields_of(parts)
    count = 8 * len(parts.get("mask", b"x" * 4096)) if draw.random() < 0.5 else 2**31
    fields["tensors"] = [["l", "A", [count]]]
    parts["mask"] = bytes(count // 8) if count < 2**31 else b"\xff"
    parts["values"] = b""
    parts["header"] = zlib.compress(json.dumps(fields).encode())


ATTACKS: list[Callable[[Bytes, random.Random], None]] = [
    *(flipped, extreme, extreme, cut, lengthened, exchanged, random_bytes, bomb, claimed, claimed, sizes)
]


def spoilt(record: ArrayRecord, draw: random.Random) -> ArrayRecord:
    """A message of which something is wrong."""
    parts = {name: array.data for name, array in record.items()}
    for attack in draw.sample(ATTACKS, draw.choice([1, 1, 2])):
        try:
            attack(parts, draw)
        except (KeyError, ValueError, AttributeError, RecursionError, zlib.error):
            continue  # what one attack has spoilt, the next cannot read
    dtype, stype = draw.choice([("uint8", FORM)] * 9 + [("object", "numpy.ndarray"), ("float32", "torch.Tensor")])
    shape = draw.choice([(3,), (2**62,), (-1,), ()])
    return ArrayRecord({name: Array(dtype, shape, stype, data) for name, data in parts.items()})


class Receivers:
    """Both ends of one rule, each with a message as an honest machine sends it."""

    def __init__(self, rule: Rule, draw: random.Random) -> None:
        self.rule, self.spec = rule, spec(rule)
        config = RunConfig.model_validate({"seed": SEED, "wire": {"up": draw.choice(list(CODECS))}})
        recipe = Recipe.around(rule, config)
        self.strategy = LoraStrategy(recipe)
        self.state = recipe.start(self.spec, SEED)
        rank = WHOLE // 2 if rule.mixed_ranks and draw.random() < 0.5 else self.state.rank
        (self.down,) = self.strategy.messages(MessageType.TRAIN, self.state, [1], ranks={1: rank})
        view = received(self.down, recipe, self.spec)
        local = {key: tensor + 0.1 for key, tensor in view.adapter.items()}
        update = replace(trained(rule, view, 0, 1.0), tensors=rule.send(view, local))
        start = None if rule.relative else view.adapter
        self.up = wire.pack_update(
            update, rule.name, self.state.round, "node-1", codec=self.strategy.codec_up, received=start
        )

    def at_the_coordinator(self, record: ArrayRecord) -> None:
        reply = Message(RecordDict({"update": record, "metrics": MetricRecord({"loss": 1.0})}), reply_to=self.down)
        reply.metadata.__dict__["_src_node_id"] = 1
        accepted = self.strategy.accept(self.state, reply)
        check_range(self.strategy.merge(self.state, [accepted.update], 1))

    def at_the_node(self, record: ArrayRecord) -> None:
        _, state = wire.unpack_state(record, rule=self.rule.name, fits=partial(check_form, spec=self.spec))
        check_range(state)


def fuzz(messages: int, seed: int) -> tuple[Counter[str], list[str]]:
    """What became of so many messages each way, and those that were neither read nor refused, or took memory."""
    pose_as_an_app()
    draw = random.Random(seed)
    receivers = [Receivers(rule, draw) for rule in RULES for _ in range(4)]
    for own in receivers:  # what is sound is read, and what that takes is taken before anything is counted
        own.at_the_coordinator(own.up)
        own.at_the_node(own.down.content.array_records["state"])
    ends, faults = Counter[str](), []
    for number in range(messages):
        own = draw.choice(receivers)
        for where, record, read in (
            ("coordinator", own.up, own.at_the_coordinator),
            ("node", own.down.content.array_records["state"], own.at_the_node),
        ):
            sent, before = spoilt(record, draw), _peak()
            try:
                read(sent)
                end = "read"
            except BouquetError:
                end = "refused"
            except BaseException as error:
                end = "foreign"
                faults.append(f"{where}, message {number} of {own.rule.name}: {type(error).__name__}: {error}"[:300])
            if (taken := _peak() - before) > TIMES * payload_bytes(sent) + SPARE:
                faults.append(f"{where}, message {number}: {taken:,} bytes for {payload_bytes(sent):,}")
            ends[f"{where}: {end}"] += 1
    return ends, faults


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> int:
    parser = argparse.ArgumentParser(description="Send both ways what no honest machine sends.")
    parser.add_argument("--messages", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    ends, faults = fuzz(options.messages, options.seed)
    print(*(f"{end}  {count}" for end, count in sorted(ends.items())), *faults, sep="\n")
    return 1 if faults else 0


if __name__ == "__main__":
    raise SystemExit(main())
