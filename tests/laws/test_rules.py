"""Laws that every rule in the registry obeys, over random factors."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.adapter.algebra import digest
from common.adapter.values import HEAD, Key, State, Update
from common.error import BouquetError
from strategies import RULES
from strategies.keeps import LocalHead
from strategies.rules import Ravan
from tests.support.factors import LAWFUL, LAYERS, dense, initial, recipe, spec, started, trained


@pytest.mark.parametrize(
    "rule", [rule for rule in LAWFUL.values() if not rule.exact and rule.keeps == "nothing"], ids=lambda r: r.name
)
def test_rules_that_do_not_claim_to_be_exact_are_not(rule):
    """Or they should claim it."""
    state = started(rule)
    updates = [trained(rule, state, seed, 1.0) for seed in range(4)]
    merged = dense(rule.aggregate(state, updates))
    nodes = [dense(rule.model(state, update)) for update in updates]
    assert any(
        not torch.allclose(merged[layer], sum(n[layer] for n in nodes) / 4, rtol=1e-3, atol=1e-3) for layer in LAYERS
    )


def assert_same_model(one: State, two: State, tolerance: float = 1e-5) -> None:
    for layer, matrix in dense(one).items():
        torch.testing.assert_close(matrix, dense(two)[layer], rtol=tolerance, atol=tolerance)


# Rules that keep the product of the factors, but give the nodes other factors of it.
REFACTORING = {"fedsvd", "flora", "flexlora", "raflora", "florist", "fedmomentum", "lora-lego"}

rules = pytest.mark.parametrize("rule", LAWFUL.values(), ids=list(LAWFUL))
# FLoRIST cuts singular directions, FLASC and FedSRD values, even of one node's update: that is what they are for. Their
# oracles bound the cut.
keeping = pytest.mark.parametrize(
    "rule", [rule for name, rule in LAWFUL.items() if name not in ("florist", "flasc", "fedsrd")], ids=lambda r: r.name
)
weights = st.lists(st.floats(0.1, 1000), min_size=1, max_size=5)


@rules
@settings(deadline=None, max_examples=20)
@given(weights=weights, rank=st.integers(1, 4))
def test_exact_rules_equal_the_weighted_mean_of_the_nodes_models(rule, weights, rank):
    state = started(rule, rank)
    updates = [trained(rule, state, seed, weight) for seed, weight in enumerate(weights)]
    merged = dense(rule.aggregate(state, updates))
    matches = []
    for layer, matrix in merged.items():
        parts = [
            weight * dense(rule.model(state, update))[layer] for weight, update in zip(weights, updates, strict=True)
        ]
        ideal = sum(parts) / sum(weights)
        matches.append(torch.allclose(matrix, ideal, rtol=1e-4, atol=1e-4))
    if rule.exact:
        assert all(matches)


@keeping
def test_one_node_is_an_identity(rule):
    state = started(rule)
    update = trained(rule, state, 5, 17.3)
    merged = rule.aggregate(state, [update])
    if rule.name in REFACTORING:
        assert_same_model(merged, rule.model(state, update))
    else:
        assert digest(merged.adapter) == digest(rule.model(state, update).adapter)


@keeping
def test_identical_nodes_are_an_identity(rule):
    state = started(rule)
    update = trained(rule, state, 5, 1.0)
    merged = rule.aggregate(state, [update, replace(update, weight=3.0), update])
    if rule.name not in REFACTORING:
        assert digest(merged.adapter) == digest(rule.model(state, update).adapter)
    assert_same_model(merged, rule.model(state, update))


@rules
def test_the_order_of_the_nodes_does_not_matter(rule):
    state = started(rule)
    updates = [trained(rule, state, seed, seed + 1.0) for seed in range(4)]
    assert_same_model(rule.aggregate(state, updates), rule.aggregate(state, updates[::-1]))


@rules
def test_the_unit_of_weight_does_not_matter(rule):
    state = started(rule)
    updates = [trained(rule, state, seed, seed + 1.0) for seed in range(3)]
    scaled = [replace(update, weight=update.weight * 1000) for update in updates]
    assert_same_model(rule.aggregate(state, updates), rule.aggregate(state, scaled))


@rules
def test_arguments_are_not_modified(rule):
    state = started(rule)
    updates = [trained(rule, state, seed, 1.0) for seed in range(3)]
    before = [digest(state.adapter | state.offset), *(digest(update.tensors) for update in updates)]
    rule.aggregate(state, updates)
    assert [digest(state.adapter | state.offset), *(digest(update.tensors) for update in updates)] == before


@rules
def test_what_is_sent_is_what_the_plan_names(rule):
    state = started(rule)
    sent = {key.part for key in trained(rule, state, 0, 1.0).tensors}
    assert sent == rule.plan(state.round).sent | HEAD


@rules
def test_every_side_draws_the_same_and_what_is_constant_never_changes(rule):
    state, chosen = started(rule), recipe(rule)
    drawn = chosen.draw(spec(rule), 0, state.round)
    assert {key for key in state.adapter if key.part in chosen.drawn} == set(drawn)
    assert all(torch.equal(state.adapter[key], tensor) for key, tensor in drawn.items())
    first = chosen.start(spec(rule), seed=0)
    for key, tensor in state.adapter.items():
        if key.part in chosen.constant:
            assert torch.equal(tensor, first.adapter[key])
            assert not rule.sends(state.round, key)


@rules
def test_a_node_that_missed_rounds_installs_what_the_others_install(rule):
    state = initial(rule, spec(rule), seed=0)
    for step in range(3):
        state = rule.aggregate(state, [trained(rule, state, 10 * step + node, 1.0) for node in range(3)])
    late = recipe(rule).install(rule.view(state, state.rank), {})
    regular = recipe(rule).install(rule.view(rule.view(state, state.rank), state.rank), {})
    assert digest(late) == digest(regular)


@rules
def test_the_first_round_starts_from_the_base_on_every_side(rule):
    one, two, other = (initial(rule, spec(rule), seed) for seed in (0, 0, 1))
    assert digest(one.adapter) == digest(two.adapter) != digest(other.adapter)
    assert all(not matrix.any() for matrix in dense(one).values())
    for key, tensor in one.adapter.items():
        if key.part == "A" and rule.start_at == "drawn":
            assert tensor.abs().max() <= tensor.shape[1] ** -0.5


@rules
@pytest.mark.parametrize("head", ["shared", "local", "frozen"])
def test_the_head_is_averaged_kept_or_left_alone(rule, head):
    keeps = (LocalHead(),) if head == "local" else ()
    chosen, key = replace(recipe(rule, head=head), keeps=keeps), Key("classifier", "W")
    state = started(rule)
    view = rule.view(state, state.rank)
    locals_ = [{k: t + seed + 1 for k, t in view.adapter.items()} for seed in range(2)]
    updates = [Update(chosen.send(view, local), 1.0, state.scale) for local in locals_]
    assert (key in updates[0].tensors) == (head == "shared")
    assert chosen.trains(0, key) == (head != "frozen")
    assert (key in chosen.kept(view, locals_[0])) == (head == "local")
    merged = chosen.aggregate(state, updates).adapter[key]
    mean = sum(rule.model(state, update).adapter[key] for update in updates) / 2 if head == "shared" else None
    torch.testing.assert_close(merged, state.adapter[key] if mean is None else mean)


@rules
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda u: replace(u, weight=0.0),
            "an update has no weight: expected more than 0, at most 2.14748e.09, got 0.0",
        ),
        (lambda u: replace(u, weight=-1.0), "an update has no weight"),
        (lambda u: replace(u, weight=float("nan")), "an update has no weight"),
        (lambda u: replace(u, scale=9.0), "an update has another scale: expected [12].0, got 9.0"),
        (
            lambda u: replace(u, tensors={k: t * float("nan") for k, t in u.tensors.items()}),
            "an update out of range .*expected values within 1e.06, got nan",
        ),
        (lambda u: replace(u, tensors={}), "missing tensors, such as"),
        (lambda u: replace(u, tensors={k: t.flatten() for k, t in u.tensors.items()}), "an update does not fit"),
        (lambda u: replace(u, tensors=u.tensors | {Key("x", "B"): torch.ones(1)}), "1 unknown tensors, such as x:B"),
    ],
)
def test_an_update_that_breaks_the_contract_is_refused(rule, spoil, message):
    state = started(rule)
    good = trained(rule, state, 0, 1.0)
    with pytest.raises(BouquetError, match=message):
        rule.aggregate(state, [good, spoil(good)])


@rules
@pytest.mark.parametrize("value", [1e6, -1e6, 3e38, float("inf"), float("-inf")])
def test_an_update_is_refused_exactly_above_what_training_can_lead_to(rule, value):
    state = started(rule)
    good = trained(rule, state, 0, 1.0)
    spoilt = replace(good, tensors={key: torch.full_like(t, value) for key, t in good.tensors.items()})
    if abs(value) <= 1e6:
        rule.check(state, spoilt)
    else:
        with pytest.raises(BouquetError, match="an update out of range"):
            rule.check(state, spoilt)


@rules
def test_a_round_without_updates_is_refused(rule):
    with pytest.raises(BouquetError, match="a round without updates: expected at least one update, got none"):
        rule.aggregate(started(rule), [])


@rules
def test_a_rank_that_cannot_be_served_is_refused(rule):
    state = started(rule)
    too_many = f"at most {state.rank}" if rule.mixed_ranks else f"{state.rank} on every node"
    with pytest.raises(
        BouquetError, match=rf"cannot serve \(lora-rank\): expected {too_many}, got {state.rank + 1}. Change lora-rank"
    ):
        rule.view(state, state.rank + 1)
    if not rule.mixed_ranks:
        with pytest.raises(BouquetError, match=f"expected {state.rank} on every node, got 2"):
            rule.view(state, 2)


# A node of RAVAN has all slots, and trains some: its oracles are in oracles/test_slots.py.
mixed = pytest.mark.parametrize(
    "rule", [cls() for cls in RULES.values() if cls.mixed_ranks and cls is not Ravan], ids=lambda rule: rule.name
)


@mixed
def test_a_node_of_a_smaller_rank_gets_its_slots_to_the_bit(rule):
    state = started(rule)
    small = rule.view(state, 2, draw=1)
    assert small.rank == 2
    assert digest(rule.view(small, 2, draw=2).adapter) == digest(small.adapter)
    slots = list(small.slots or range(2))
    for layer in LAYERS:
        assert torch.equal(small.adapter[Key(layer, "A")], state.adapter[Key(layer, "A")][slots])
        assert torch.equal(small.adapter[Key(layer, "B")], state.adapter[Key(layer, "B")][:, slots])
    if rule.gets_all:
        assert_same_model(small, state)
    if rule.scattered:
        assert len({rule.view(state, 2, draw).slots for draw in range(20)}) == 3


@mixed
def test_exact_rules_are_exact_over_nodes_of_several_ranks(rule):
    state = initial(rule, spec(rule), seed=0)
    ranks, shares = (3, 1, 2), (1.0, 5.0, 2.0)
    views = [rule.view(state, rank, draw) for draw, rank in enumerate(ranks)]
    updates = [trained(rule, view, seed, share) for seed, (view, share) in enumerate(zip(views, shares, strict=True))]
    merged = rule.aggregate(state, updates)
    assert merged.rank == 3
    if rule.exact:
        for layer, matrix in dense(merged).items():
            models = [rule.model(view, update) for view, update in zip(views, updates, strict=True)]
            ideal = sum(share * dense(model)[layer] for share, model in zip(shares, models, strict=True)) / sum(shares)
            torch.testing.assert_close(matrix, ideal, rtol=1e-4, atol=1e-4)


@rules
def test_a_b_of_zeros_and_a_rank_above_a_layers_size_are_served(rule):
    state = initial(rule, spec(rule, rank=8), seed=0)
    update = Update(rule.send(state, dict(state.adapter)), 1.0, state.scale)
    merged = rule.aggregate(state, [update, update])
    assert all(not matrix.any() for matrix in dense(merged).values())
    assert all(torch.isfinite(tensor).all() for tensor in merged.adapter.values())
    moved = rule.aggregate(merged, [trained(rule, merged, seed, 1.0) for seed in range(2)])
    assert all(torch.isfinite(tensor).all() for tensor in (moved.adapter | moved.offset).values())
