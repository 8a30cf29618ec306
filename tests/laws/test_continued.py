"""Whatever the rule and the ranks, a run that names an adapter starts from the base with that adapter."""

from dataclasses import replace

import pytest
import torch

from common.adapter.algebra import digest
from common.adapter.spec import Spec
from common.adapter.values import HEAD, Key, Tensors
from common.config.run import ModelConfig, RunConfig, TaskConfig
from common.error import BouquetError
from strategies import Recipe
from strategies.cost import planned_bytes, round_bytes
from strategies.inits import LoraGA
from strategies.rules import FedIT
from tests.support.factors import HEAD_SHAPES, LAWFUL, LAYERS, WIDE, dense, spec, trained

CONFIG = RunConfig(model=ModelConfig(adapter="/an/adapter"))
LEFT_ALONE = "small"

rules = pytest.mark.parametrize("rule", LAWFUL.values(), ids=list(LAWFUL))
ranks = pytest.mark.parametrize("rank", [1, 3, 5])


def given(rank: int) -> Tensors:
    """A random adapter of all layers but one, with a head."""
    generator = torch.Generator().manual_seed(rank)
    adapter = {key: torch.randn(shape, generator=generator) for key, shape in HEAD_SHAPES.items()}
    for layer, (d_out, d_in) in LAYERS.items():
        if layer != LEFT_ALONE:
            adapter[Key(layer, "Q")] = torch.randn(d_out, rank, generator=generator)
            adapter[Key(layer, "P")] = torch.randn(rank, d_in, generator=generator)
    return adapter


@rules
@ranks
def test_a_run_starts_from_the_base_with_its_adapter(rule, rank):
    adapter, recipe = given(rank), Recipe.around(rule, CONFIG)
    state = recipe.start(spec(rule), 0, given=adapter)
    for layer, update in dense(state).items():
        if layer == LEFT_ALONE:
            assert not update.any()
        else:
            whole = adapter[Key(layer, "Q")].double() @ adapter[Key(layer, "P")].double()
            torch.testing.assert_close(update, whole, rtol=0, atol=1e-6 * float(whole.abs().max()))
    assert all(torch.equal(state.adapter[key], adapter[key]) for key in HEAD_SHAPES)
    assert all(tensor.dtype == torch.float32 for tensor in (state.adapter | state.offset).values())


@rules
@ranks
def test_the_factors_have_what_fits_and_every_slot_can_learn(rule, rank):
    recipe = Recipe.around(rule, CONFIG)
    state = recipe.start(spec(rule), 0, given=given(rank))
    own = Recipe.around(rule).start(spec(rule), 0)
    if not recipe.continues:
        assert all(torch.equal(state.adapter[key], t) for key, t in own.adapter.items() if key not in HEAD_SHAPES)
        return
    assert bool(state.offset) == (rank > state.rank)
    for layer in LAYERS:
        assert state.adapter[Key(layer, "A")].any(dim=1).all()
    if rank <= state.rank:  # slot by slot, and the others as they would have been drawn
        adapter = given(rank)
        for layer in LAYERS:
            a = state.adapter[Key(layer, "A")]
            filled = rank if layer != LEFT_ALONE else 0
            assert torch.equal(a[filled:], own.adapter[Key(layer, "A")][filled:])
            assert not state.adapter[Key(layer, "B")][:, filled:].any()
            assert not filled or torch.equal(a[:filled], adapter[Key(layer, "P")])


def test_slots_of_zeros_start_anew():
    adapter = given(3)
    for key, tensor in adapter.items():
        if key.part in "QP":
            tensor[(slice(None), 1) if key.part == "Q" else 1] = 0
    state = Recipe.around(FedIT(), CONFIG).start(spec(FedIT()), 0, given=adapter)
    assert all(state.adapter[Key(layer, "A")].any(dim=1).all() for layer in LAYERS)


@rules
@ranks
def test_a_node_draws_or_is_sent_once_what_does_not_change(rule, rank):
    recipe = Recipe.around(rule, CONFIG)
    first = state = recipe.start(spec(rule), 0, given=given(rank))
    for turn in range(2):
        drawn = recipe.draw(spec(rule), 0, state.round)
        assert digest(drawn) == digest({k: t for k, t in state.adapter.items() if k.part in recipe.drawn})
        fixed = recipe.constant | (recipe.fixed & {"Q", "P"})
        for key, tensor in (state.adapter | state.offset).items():
            if key.part in fixed:
                assert torch.equal(tensor, (first.adapter | first.offset)[key])
        state = recipe.aggregate(state, [trained(rule, state, 10 * turn + node, 1.0) for node in range(3)])
    if not rule.moves_offset:
        assert recipe.fixed >= {"Q", "P"}
        assert digest(state.offset) == digest(first.offset)


@rules
@pytest.mark.parametrize("head", ["frozen", "local"])
def test_a_head_that_is_not_shared_is_the_adapters_too(rule, head):
    task = TaskConfig.model_validate({"name": "classify", "head": head})
    recipe = Recipe.around(rule, CONFIG.model_copy(update={"task": task}))
    state = recipe.start(spec(rule), 0, given=given(3))
    drawn = recipe.draw(spec(rule), 0, 0)
    assert recipe.sent_once >= HEAD
    assert digest(drawn) == digest({key: t for key, t in state.adapter.items() if key.part in recipe.drawn})
    assert all(torch.equal(state.adapter[key], given(3)[key]) for key in HEAD_SHAPES)


@rules
def test_a_view_of_fewer_slots_keeps_the_offset(rule):
    if not rule.mixed_ranks or rule.structure.name != "lora":
        return
    state = Recipe.around(rule, CONFIG).start(spec(rule), 0, given=given(5))
    small = rule.view(state, 2, draw=1)
    for key, tensor in state.offset.items():
        columns = tensor.shape[1 if key.part == "Q" else 0]
        assert torch.equal(small.offset[key][:, :columns] if key.part == "Q" else small.offset[key][:columns], tensor)


@rules
@ranks
def test_a_plan_covers_what_the_adapter_adds(rule, rank):
    recipe = Recipe.around(rule, CONFIG)
    wide = Spec(WIDE, {}, 3 * getattr(rule.structure, "blocks", 1), 2.0, rule.structure)
    adapter = {Key("l", "Q"): torch.ones(320, rank), Key("l", "P"): torch.ones(rank, 224)}
    planned = planned_bytes(recipe, wide, 3, adapter)
    state, names = recipe.start(wide, 0, given=adapter), ("a", "b", "c")
    first = round_bytes(recipe, state, dict.fromkeys(names, state.rank), names)
    assert first.down / 3 <= planned.down
    if state.offset:
        assert planned.down > planned_bytes(Recipe.around(rule), wide, 3).down


def test_an_init_that_sees_the_base_starts_over_the_adapter():
    seen = {layer: torch.randn(shape, generator=torch.Generator().manual_seed(0)) for layer, shape in LAYERS.items()}
    recipe = replace(Recipe.around(FedIT(), CONFIG), init=LoraGA(source="public.jsonl"))
    state, adapter = recipe.start(spec(FedIT()), 0, seen.__getitem__, given(3)), given(3)
    assert state.adapter[Key("wide", "B")].any()
    for layer in LAYERS.keys() - {LEFT_ALONE}:
        whole = adapter[Key(layer, "Q")].double() @ adapter[Key(layer, "P")].double()
        torch.testing.assert_close(dense(state)[layer], whole, rtol=0, atol=1e-5)


def test_an_adapter_is_read_where_the_run_names_one_and_nowhere_else():
    with pytest.raises(BouquetError, match=r"does not name \(model.adapter\): expected '/an/adapter', got none"):
        Recipe.around(FedIT(), CONFIG).start(spec(FedIT()), 0)
    with pytest.raises(BouquetError, match=r"does not name \(model.adapter\): expected '', got an adapter"):
        Recipe.around(FedIT()).start(spec(FedIT()), 0, given=given(1))
