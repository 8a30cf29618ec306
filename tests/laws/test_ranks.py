"""Laws of layers of several ranks, over every rule that takes them; and what PEFT makes of what a run leaves."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from common.adapter import ranks
from common.adapter.spec import Spec
from common.adapter.structures import STRUCTURES
from common.adapter.values import Key, LayerShape, State, Update
from common.config.section import ConfigError
from common.error import BouquetError
from common.models import adapted, base
from common.record import checkpoint
from common.wire.codecs import payload_size
from strategies import RULES, Recipe, read_config
from strategies.cost import planned_bytes, round_bytes
from tests.support.grid import run_in_process
from tests.support.outcome import events, failures

PATTERN = "q=2,1.down=1"
SHAPES = {"q": LayerShape(8, 6), "up": LayerShape(7, 9), "down": LayerShape(6, 9)}
LAYERS = {f"layers.{block}.{name}": shape for block in range(2) for name, shape in SHAPES.items()}
RANKS = {"layers.0.q": 2, "layers.1.q": 2, "layers.1.down": 1}
RANK = 4


def recipe(rule: str, **settings: Any) -> Recipe:
    return Recipe.read({"rule.name": rule, "lora.rank": RANK, "lora.rank-pattern": PATTERN, **settings})


def takes(rule: str) -> bool:
    try:
        recipe(rule)
    except BouquetError:
        return False
    return True


TAKING = [rule for rule in RULES if takes(rule)]
rules = pytest.mark.parametrize("rule", TAKING)


def spec(chosen: Recipe) -> Spec:
    return Spec(LAYERS, {}, RANK, 2.0, chosen.structure, ranks.by_layer(PATTERN, LAYERS, RANK))


def update(chosen: Recipe, state: State, seed: int, rank: int = RANK) -> Update:
    """What a node of this rank sends that has moved all that it trains."""
    view, generator = chosen.rule.view(state, rank), torch.Generator().manual_seed(seed)
    trained = chosen.trained(state.round, view.adapter)
    local = {
        key: tensor + torch.randn(tensor.shape, generator=generator) if key in trained else tensor
        for key, tensor in view.adapter.items()
    }
    return Update(chosen.send(view, local), 1.0 + seed, state.scale)


def test_the_first_name_that_fits_counts_and_no_layer_has_more_than_the_run():
    assert ranks.by_layer(PATTERN, LAYERS, RANK) == RANKS
    assert ranks.by_layer("1.q=3,q=2", LAYERS, RANK) == {"layers.1.q": 3, "layers.0.q": 2}
    assert ranks.by_layer("q=3", LAYERS, 2) == ranks.by_layer("", LAYERS, 2) == {}
    with pytest.raises(BouquetError, match=r"a rank for a layer that is not adapted \(lora.rank-pattern\): .* got dow"):
        ranks.by_layer("dow=2", LAYERS, RANK)
    said = r"every layer has fewer slots than the run's rank .*got at most 2, where lora.rank is 4. Set lora.rank = 2"
    with pytest.raises(BouquetError, match=said):
        ranks.by_layer("layers=2", LAYERS, RANK)


@pytest.mark.parametrize("text", ["q", "q=0", "q=-1", "q=2,", "q=2;v=3", "(a+)+=2", "q==2", "q=123456", "q =2"])
def test_what_is_no_pattern_is_refused_in_the_config(text):
    with pytest.raises(ConfigError, match=r"lora.rank-pattern: expected names of layers with their ranks, such as q_"):
        read_config({"lora.rank-pattern": text})


@rules
def test_every_layer_keeps_its_rank_through_rounds_and_views(rule):
    chosen = recipe(rule)
    state = chosen.start(spec(chosen), 0)
    for number in range(3):
        assert state.rank == RANK
        assert {layer: len(state.adapter[Key(layer, "A")]) for layer in LAYERS} == dict.fromkeys(LAYERS, RANK) | RANKS
        sizes = [RANK, RANK, 3] if chosen.rule.mixed_ranks else [RANK] * 3
        updates = [update(chosen, state, 10 * number + node, rank) for node, rank in enumerate(sizes)]
        if not updates[0].tensors:
            return
        state = chosen.aggregate(state, updates)
        for key, tensor in chosen.draw(spec(chosen), 0, state.round).items():
            assert torch.equal(state.adapter[key], tensor)
        assert all(tensor.isfinite().all() for tensor in state.adapter.values())


@rules
def test_an_update_of_the_whole_rank_in_a_capped_layer_is_refused(rule):
    chosen = recipe(rule)
    state = chosen.start(spec(chosen), 0)
    sent = update(chosen, state, 1)
    key = next((key for key in sent.tensors if key.layer == "layers.0.q"), None)
    if key is None:
        return
    wide = torch.zeros([RANK if size == 2 else size for size in sent.tensors[key].shape])
    with pytest.raises(BouquetError, match=r"an update does not fit the rule .* \(layers.0.q:.\): expected shape"):
        chosen.aggregate(state, [Update(sent.tensors | {key: wide}, 1.0, state.scale)])


@pytest.mark.parametrize("name", [name for name, kind in STRUCTURES.items() if not kind.nested])
def test_every_structure_has_layers_of_several_ranks(name):
    chosen = recipe("fedit", **{"adapter.name": name})
    state = chosen.start(spec(chosen), 0)
    assert {key: tuple(tensor.shape) for key, tensor in state.adapter.items()} == spec(chosen).factor_shapes()
    after = chosen.aggregate(state, [update(chosen, state, seed) for seed in range(2)])
    assert {key: tensor.shape for key, tensor in after.adapter.items()} == {
        key: tensor.shape for key, tensor in state.adapter.items()
    }


def test_what_is_planned_and_recorded_is_what_the_layers_hold():
    chosen = recipe("flexlora")
    state = chosen.start(spec(chosen), 0)
    values = sum(tensor.numel() for tensor in state.adapter.values())
    assert planned_bytes(chosen, spec(chosen), 2).up == payload_size(values, values, "fp32")
    small = sum(tensor.numel() for tensor in chosen.rule.view(state, 2).adapter.values())
    crossed = round_bytes(chosen, state, {"a": RANK, "b": 2}, ["b"])
    assert crossed.up == payload_size(small, small, "fp32")


EVA = {"init.name": "eva", "init.eva.source": "/public.jsonl", "lora.rank-pattern": ""}


def seen(layer: str) -> torch.Tensor:
    """Inputs of layers ``q`` vary in one direction, those of ``up`` in all alike, and of ``down`` somewhere between."""
    width, turn = SHAPES[layer.rpartition(".")[2]].d_in, {"q": 0.01, "up": 1.0, "down": 0.5}[layer.rpartition(".")[2]]
    return torch.eye(width) * torch.tensor([turn**place for place in range(width)])[:, None]


@pytest.mark.parametrize("rho", [1.0, 2.0, 4.0])
def test_eva_gives_slots_to_where_they_explain_the_most(rho):
    """Against the choice among all slots, by their share of their layer's variance."""
    chosen = recipe("ffa-lora", **EVA, **{"init.eva.rho": rho})
    whole = Spec(LAYERS, {}, RANK, 2.0, chosen.structure)
    state = chosen.start(whole, 0, seen)
    assert sum(state.ranks.values()) == len(LAYERS) * RANK / rho
    every = recipe("ffa-lora", **EVA).start(whole, 0, seen)
    explained = {layer: (seen(layer).norm(dim=1) ** 2 / seen(layer).square().sum()).tolist() for layer in LAYERS}
    for layer, rank in state.ranks.items():
        assert 1 <= rank <= RANK
        assert torch.equal(state.adapter[Key(layer, "A")], every.adapter[Key(layer, "A")][:rank])
        for other, more in state.ranks.items():  # no slot that is left out explains more than one that is in
            if rank > 1 and more < RANK:
                assert explained[layer][rank - 1] >= explained[other][more]
    if rho == 2:
        assert {layer.rpartition(".")[2]: rank for layer, rank in state.ranks.items()} == {"q": 1, "up": 3, "down": 2}


def settings_of(folder: Path, **more: Any) -> dict[str, Any]:
    data = folder / "records.jsonl"
    data.write_text("\n".join(json.dumps({"text": f"def f{n}(self): return self.y + {n * n}"}) for n in range(24)))
    short = {"train.steps": 2, "train.batch-size": 2, "evaluation.every": 0, "evaluation.limit": 4, "lora.rank": RANK}
    short |= {
        "lora.targets": "q_proj,v_proj",
        "lora.rank-pattern": "v_proj=2,layers.0.self_attn=1",
        "data.partition": "iid",
    }
    short |= {"model.quantization": "none", "evaluation.prompt": "", "task.max-length": 16, "num-server-rounds": 2}
    short |= {"evaluation.source": str(data), "evaluation.export": "last", "train.learning-rate": 0.02}
    return {"run-directory": str(folder), "run-name": "run", "data.source": str(data), **short, **more}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "ranks_of_nodes"),
    [
        ({"rule.name": "flexlora", "wire.up": "int8"}, (4, 2)),
        pytest.param({"rule.name": "fedit", "model.quantization": "nf4"}, (4, 4), marks=pytest.mark.exhaustive),
        pytest.param({"rule.name": "flora", "train.blocks": 2}, (4, 3), marks=pytest.mark.exhaustive),
        pytest.param({"rule.name": "fed-sb"}, (4, 4), marks=pytest.mark.exhaustive),
        pytest.param({"rule.name": "ffa-lora", "init.name": "eva", "init.eva.rho": 2.0}, (4, 4)),
        pytest.param({"rule.name": "fedit", "init.name": "pissa"}, (4, 4), marks=pytest.mark.exhaustive),
    ],
    ids=str,
)
def test_a_run_of_several_ranks_leaves_what_peft_loads(more, ranks_of_nodes, tmp_path):
    flat = settings_of(tmp_path, **more)
    if more.get("init.name") == "eva":
        flat |= {"lora.rank-pattern": "", "init.eva.source": flat["data.source"], "init.eva.examples": 8}
    own = {n: {"state-directory": str(tmp_path / "state"), "lora-rank": rank} for n, rank in enumerate(ranks_of_nodes)}
    run_in_process(flat, nodes=2, node_config=own)
    assert failures(tmp_path / "run") == []
    if more["model.quantization" if "model.quantization" in more else "rule.name"] == "nf4":
        return
    chosen, config = Recipe.read(flat), read_config(flat)
    state = checkpoint.latest(tmp_path / "run/checkpoints", chosen.rule.name)
    assert state is not None
    network = base.load(config.model, 0, torch.device("cpu"))
    whole = adapted.LoraModel(network, config.lora, chosen.structure)
    whole.resize(state.ranks)
    whole.install(state.adapter, state.scale, state.offset)
    tokens = torch.arange(5, 25)[None]
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    with torch.no_grad():
        expected = whole.network.eval()(**batch).logits
        plain = peft.PeftModel.from_pretrained(
            base.load(config.model, 0, torch.device("cpu")), tmp_path / "run/adapter"
        )
        torch.testing.assert_close(plain.eval()(**batch).logits, expected)
    assert events(tmp_path, "central")[-1]["score"] < events(tmp_path, "central")[0]["score"]
