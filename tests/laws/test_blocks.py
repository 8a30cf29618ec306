"""Laws of rounds in which some blocks rest, over every rule: what rests is neither trained nor sent, and stays."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from common.adapter.algebra import digest
from common.adapter.spec import Spec
from common.adapter.values import Key, LayerShape, State, Update
from common.error import BouquetError
from common.record import checkpoint
from common.wire.header import read_header
from strategies import RULES, Recipe
from strategies.blocks import block_of, resting
from strategies.cost import planned_bytes
from tests.support.grid import run_in_process
from tests.support.outcome import failures

SHAPES = {"q": LayerShape(8, 6), "down": LayerShape(6, 9)}
LAYERS = {f"model.layers.{block}.{name}": shape for block in range(5) for name, shape in SHAPES.items()}
BLOCKS = 2


def recipe(rule: str, **settings: Any) -> Recipe:
    return Recipe.read({"rule.name": rule, "rule.ravan.heads": 2, "train.blocks": BLOCKS, "seed": 3, **settings})


def can_rest(rule: str) -> bool:
    try:
        recipe(rule)
    except BouquetError:
        return False
    return True


rules = pytest.mark.parametrize("rule", [rule for rule in RULES if can_rest(rule)])


def update(chosen: Recipe, state: State, node: int) -> Update:
    """What a node sends that has moved all that it trains."""
    generator = torch.Generator().manual_seed(100 * state.round + node)
    trained = chosen.trained(state.round, state.adapter)
    local = {
        key: tensor + torch.randn(tensor.shape, generator=generator) if key in trained else tensor
        for key, tensor in state.adapter.items()
    }
    return Update(chosen.send(state, local), 1.0 + node, state.scale, state.slots)


def model(chosen: Recipe, state: State, layer: str) -> torch.Tensor:
    left, right = chosen.structure.factors(state.adapter, layer)
    whole = state.scale * left.double() @ right.double()
    if Key(layer, "Q") in state.offset:
        whole = whole + state.offset[Key(layer, "Q")].double() @ state.offset[Key(layer, "P")].double()
    return whole


@rules
def test_what_rests_stays_and_the_others_move(rule):
    chosen = recipe(rule)
    spec = Spec(LAYERS, {}, 4, 2.0, chosen.structure)
    state, moved = chosen.start(spec, 3), set[str]()
    for _ in range(12):
        rest = chosen.resting(state.round, state.adapter)
        assert len(rest) == (0 if state.round < chosen.rule.settled else (5 - BLOCKS) * len(SHAPES))
        updates = [update(chosen, state, node) for node in range(3)]
        assert {key.layer for each in updates for key in each.tensors} == (
            set(LAYERS) - rest if chosen.rule.plan(state.round).sent else set()
        )
        if rule == "local":
            return
        after = chosen.aggregate(state, updates)
        for layer in LAYERS:
            same = torch.allclose(model(chosen, after, layer), model(chosen, state, layer), rtol=1e-5, atol=1e-5)
            assert same or layer not in rest
            moved |= set() if same else {layer}
        state = after
        for key, tensor in chosen.draw(spec, 3, state.round).items():
            assert torch.equal(state.adapter[key], tensor)
    assert chosen.personal or moved == set(LAYERS)


@rules
def test_an_update_of_a_layer_that_rests_is_refused(rule):
    chosen = recipe(rule)
    state = chosen.start(Spec(LAYERS, {}, 4, 2.0, chosen.structure), 3)
    sent = chosen.rule.plan(chosen.rule.settled).sent
    if not sent:
        return
    for _ in range(chosen.rule.settled):
        state = chosen.aggregate(state, [update(chosen, state, 0)])
    whole = update(recipe(rule, **{"train.blocks": 0}), state, 0)
    with pytest.raises(BouquetError, match=r"an update does not fit the rule '.*': \d+ unknown tensors"):
        chosen.aggregate(state, [whole])


def test_blocks_are_the_seeds_and_come_alike_often():
    counts = Counter[str]()
    for turn in range(300):
        rest = resting(list(LAYERS), BLOCKS, 7, turn)
        assert rest == resting(list(LAYERS)[::-1], BLOCKS, 7, turn)
        assert {block_of(layer) for layer in rest}.isdisjoint({block_of(layer) for layer in set(LAYERS) - rest})
        counts.update({block_of(layer) for layer in LAYERS if layer not in rest})
    assert all(90 < count < 150 for count in counts.values())
    assert any(resting(LAYERS, BLOCKS, 7, turn) != resting(LAYERS, BLOCKS, 8, turn) for turn in range(4))
    assert resting(LAYERS, 0, 7, 0) == resting(LAYERS, 5, 7, 0) == resting(LAYERS, 9, 7, 0) == frozenset()


@pytest.mark.parametrize(
    ("layer", "block"),
    [
        ("model.layers.11.self_attn.q_proj", "model.layers.11"),
        ("transformer.h.3.attn.c_attn", "transformer.h.3"),
        ("encoder.block.0.layer.1.DenseReluDense.wi", "encoder.block.0"),
        ("lm_head", "lm_head"),
    ],
)
def test_a_block_is_named_up_to_its_first_number(layer, block):
    assert block_of(layer) == block


def test_what_is_planned_is_what_some_blocks_take():
    spec = Spec(LAYERS, {}, 4, 2.0)
    some, all_ = (planned_bytes(recipe("fedit", **{"train.blocks": count}), spec, 2) for count in (BLOCKS, 0))
    assert some.up == pytest.approx(all_.up * BLOCKS / 5, rel=0.01)
    assert some.down == all_.down


def settings_of(folder: Path, **more: Any) -> dict[str, Any]:
    data = folder / "records.jsonl"
    data.write_text("\n".join(json.dumps({"text": f"def f{n}(self): return self.y + {n * n}"}) for n in range(24)))
    short = {"train.steps": 2, "train.batch-size": 2, "evaluation.every": 0, "evaluation.limit": 2, "seed": 1}
    short |= {"train.schedule": "constant", "train.warmup": 0.0, "lora.targets": "q_proj,v_proj"}
    short |= {"model.quantization": "none", "evaluation.prompt": "", "task.max-length": 16, "data.partition": "iid"}
    return {"run-directory": str(folder), "run-name": "run", "data.source": str(data), **short, **more}


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        pytest.param({"rule.name": "flora", "lora.rank": 1}, id="xgblora"),
        pytest.param({"rule.name": "fedsa-lora"}, id="personal", marks=pytest.mark.exhaustive),
        pytest.param({"objective.name": "scaffold", "wire.up": "int8"}, id="memory", marks=pytest.mark.exhaustive),
        pytest.param({"train.optimizer-state": "kept"}, id="moments", marks=pytest.mark.exhaustive),
    ],
)
def test_a_run_sends_the_blocks_of_its_rounds_and_is_resumed(more, tmp_path):
    def run(name: str, rounds: int, resume: bool = False) -> State:
        flat = settings_of(tmp_path, **more, **{"train.blocks": 2, "num-server-rounds": rounds, "resume": resume})
        nodes = {number: {"state-directory": str(tmp_path / name)} for number in range(2)}
        grid = run_in_process(flat | {"run-name": name}, nodes=2, node_config=nodes)
        assert failures(tmp_path / name) == []
        chosen = Recipe.read(flat)
        for record in (content["update"] for kind, content in grid.returned if kind == "train"):
            sent = read_header(record, most=10_000).tensors
            assert len({block_of(layer) for layer, _, _ in sent}) == 2
        state = checkpoint.latest(tmp_path / name / "checkpoints", chosen.rule.name)
        assert state is not None
        return state

    whole = run("whole", 3)
    run("parted", 2)
    again = run("parted", 3, resume=True)
    assert digest(again.adapter | again.offset) == digest(whole.adapter | whole.offset)
