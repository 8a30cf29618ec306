"""What a message costs: the bytes that Flower sends are those of the rule's formula; what is sent once is sent once."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from flwr.app import Context, Message, MessageType, RecordDict

from common import wire
from common.adapter.values import LayerShape
from common.wire import codecs
from server_app.run import conduct
from strategies import RULES, Recipe
from strategies.cost import planned_bytes, round_bytes
from strategies.inits import LoraSB
from strategies.rules import FedSB, Ravan
from strategies.strategy import LoraStrategy, Recipient
from tests.support.factors import after_a_round, trained
from tests.support.grid import RUN_ID, flowers_bytes, pose_as_an_app
from tests.support.hostile import SEED, Nodes

LAYERS = {f"model.layers.{number}.mlp.up_proj": LayerShape(1024, 640) for number in range(6)}
RANK, NODES = 16, 4
UNEVEN = "fedsrd"
"""Sends less, the more unevenly its changes matter: what is said is the most."""


@pytest.fixture(autouse=True)
def _in_an_app() -> None:
    pose_as_an_app()


@pytest.mark.parametrize("rule", [cls() for cls in RULES.values()], ids=list(RULES))
def test_flower_sends_what_the_codec_says_of_what_a_rule_sends(rule):
    state = after_a_round(rule, LAYERS, RANK, NODES)
    chosen = Recipe.around(rule)
    (message,) = LoraStrategy(chosen).messages(MessageType.TRAIN, state, [Recipient(1, equipped=True)])
    update = wire.pack_update(trained(rule, state, 5, 1.0), rule.name, state.round, "node-000")
    down, up = flowers_bytes(message.content), flowers_bytes(RecordDict({"update": update}))
    said = round_bytes(chosen, state, {"a": RANK}, ["a"])
    # A core, scalars or nothing at all is so small that the names of the layers count.
    slack = 1200 if said.up < 16_000 else 0
    assert down == pytest.approx(said.down, rel=0.02, abs=slack)
    assert up == pytest.approx(said.up, rel=0.02, abs=slack) or (up < said.up and rule.name == UNEVEN)


class Weighed(Nodes):
    """Nodes that answer without training; the bytes of each training message and its reply, as Flower has them."""

    def __init__(self, flat: dict[str, Any]) -> None:
        super().__init__(flat, (1, 3))
        self.weighed: list[tuple[int, int]] = []

    def _reply(self, message: Message) -> Message:
        down = flowers_bytes(message.content)
        reply = super()._reply(message)
        if message.metadata.message_type == MessageType.TRAIN:
            self.weighed.append((flowers_bytes(reply.content), down))
        return reply


PLANNED = {name: {"rule.name": name} for name in RULES} | {
    "fed-sb found by the nodes": {"rule.name": "fed-sb", "rule.fed-sb.start": "nodes"},
    "fedkseed": {"rule.name": "fedkseed", "adapter.seeded.seeds": 32},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANNED)
def test_a_whole_run_sends_what_was_planned(name, settings):
    """The round that costs most is what doctor and plan have said; where it is said at most, it is not more."""
    flat = settings(**PLANNED[name], **{"num-server-rounds": 3, "seed": SEED, "evaluation.every": 0})
    grid = Weighed(flat)
    conduct(grid, Context(run_id=RUN_ID, node_id=1, node_config={}, state=RecordDict(), run_config=flat))
    assert len(grid.weighed) == 6
    recipe = Recipe.read(flat)
    planned = planned_bytes(recipe, grid.spec, nodes=2)
    # Names and shapes of 42 layers, and the figures of a reply.
    slack = 4000
    for most, said in zip(map(max, zip(*grid.weighed, strict=True)), planned, strict=True):
        assert most <= 1.02 * said + slack
        if not recipe.rule.growth(2, RANK) and recipe.rule.name != UNEVEN:
            assert most >= 0.98 * said


@pytest.mark.parametrize("name", ["hetlora", "flexlora", "fed-plora", "ravan"])
def test_a_node_of_half_the_rank_sends_half(name):
    rule = RULES[name]()
    state = after_a_round(rule, LAYERS, RANK, NODES)
    view = rule.view(state, RANK // 2)
    update = wire.pack_update(trained(rule, view, 5, 1.0), rule.name, state.round, "node-000")
    chosen = Recipe.around(rule)
    half, whole = (round_bytes(chosen, state, {"a": rank}, ["a"]).up for rank in (RANK // 2, RANK))
    assert half == whole / 2
    slack = 1200 if rule.start_at == "orthonormal" else 0
    assert flowers_bytes(RecordDict({"update": update})) == pytest.approx(half, rel=0.02, abs=slack)


@pytest.mark.parametrize(("name", "share"), [("hetlora", 0.5), ("fslora", 0.5), ("fed-plora", 1.0), ("ravan", 1.0)])
def test_a_node_of_half_the_rank_gets_half_unless_slots_are_drawn(name, share):
    rule = RULES[name]()
    state = after_a_round(rule, LAYERS, RANK, NODES)
    chosen = Recipe.around(rule)
    full, half = (round_bytes(chosen, state, {"a": rank}, []).down for rank in (RANK, RANK // 2))
    assert half == share * full
    (message,) = LoraStrategy(chosen).messages(MessageType.TRAIN, state, [Recipient(1, rank=RANK // 2)])
    slack = 2000 if rule.start_at == "orthonormal" else 0
    assert flowers_bytes(message.content) == pytest.approx(half, rel=0.03, abs=slack)


@pytest.mark.parametrize(("name", "bits"), [("fp32", 32), ("bf16", 16), ("int8", 8 + 32 / 256), ("nf4", 4 + 32 / 64)])
def test_flower_sends_what_the_codec_says(name, bits):
    rule = RULES["fedit"]()
    state = after_a_round(rule, LAYERS, RANK, NODES)
    update = trained(rule, state, 5, 1.0)
    record = wire.pack_update(update, "fedit", state.round, "node-000", codec=name, received=state.adapter)
    count = sum(tensor.numel() for tensor in update.tensors.values())
    assert codecs.size_in_bytes(name, count) == pytest.approx(count * bits / 8, rel=0.001)
    assert flowers_bytes(RecordDict({"update": record})) == pytest.approx(count * bits / 8, rel=0.02)


def test_frames_that_cannot_be_drawn_are_sent_once():
    rule = FedSB()
    state = after_a_round(rule, LAYERS, RANK, NODES)
    strategy = LoraStrategy(replace(Recipe.around(rule), init=LoraSB(source="public.jsonl")))
    first, again = strategy.messages(MessageType.TRAIN, state, [Recipient(1), Recipient(2, equipped=True)])
    parts = [
        {part for _, part, _ in wire.unpack_state(m.content.array_records["state"], rule="fed-sb")[0].tensors}
        for m in (first, again)
    ]
    assert parts == [{"A", "B", "R"}, {"R"}]
    assert flowers_bytes(again.content) < flowers_bytes(first.content) / 20


def test_a_core_costs_the_same_however_wide_the_layer():
    for rule, cost in ((FedSB(), RANK**2), (Ravan(), RANK**2 // 4)):
        update = trained(rule, after_a_round(rule, LAYERS, RANK, NODES), 0, 1.0)
        assert sum(tensor.numel() for tensor in update.tensors.values()) == cost * len(LAYERS)


def test_what_a_coarse_codec_loses_of_one_message_it_owes_the_next():
    """Error feedback: the mean of what arrives goes to what was meant, although each message is far off."""
    generator = torch.Generator().manual_seed(0)
    meant = torch.randn(1000, generator=generator)
    owed, arrived = torch.zeros(1000), torch.zeros(1000)
    for _ in range(200):
        due = meant + owed
        got = codecs.decode(codecs.encode(due, "nf4"), "nf4", 1000)
        owed, arrived = due - got, arrived + got
    once = codecs.decode(codecs.encode(meant, "nf4"), "nf4", 1000)
    assert (arrived / 200 - meant).norm() < 0.02 * (once - meant).norm()
    assert math.isfinite(owed.abs().max())
