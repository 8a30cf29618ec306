"""What the papers, and the published mistakes, say of rules for nodes of several ranks that go on with one model."""

from dataclasses import replace
from itertools import combinations

import pytest
import torch

from common.adapter.spec import Spec
from common.adapter.values import Key, LayerShape, State, Update
from common.error import BouquetError
from strategies.means import Median
from strategies.rules import FedIT, FlexLora, FSLora, RaFLora, Rule
from tests.support.factors import initial, layer_of, matrices, product, trained

A, B = Key("l", "A"), Key("l", "B")
LAYER = {"l": LayerShape(20, 16)}


def learned(rule: Rule, rank: int = 4) -> State:
    """A state with something in every slot."""
    state = initial(rule, Spec(LAYER, {}, rank, 0.5))
    return rule.aggregate(state, [trained(rule, state, seed, 1.0) for seed in (7, 8)])


def of_ranks(rule: Rule, state: State, ranks: tuple[int, ...]) -> list[Update]:
    """What nodes of such ranks send, node n with a weight of n + 1."""
    return [trained(rule, rule.view(state, rank), seed, seed + 1.0) for seed, rank in enumerate(ranks)]


def test_raflora_sums_the_papers_partitions_each_over_its_own_nodes():
    state, ranks = learned(RaFLora()), (1, 4, 3, 1)
    updates = of_ranks(RaFLora(), state, ranks)
    ideal = torch.zeros(20, 16, dtype=torch.float64)
    for low, high in ((0, 1), (1, 3), (3, 4)):
        holders = [update for rank, update in zip(ranks, updates, strict=True) if rank >= high]
        for node in holders:
            part = node.tensors[B][:, low:high].double() @ node.tensors[A][low:high].double()
            ideal += node.weight / sum(holder.weight for holder in holders) * state.scale * part
    merged = RaFLora().aggregate(state, updates)
    u, singular, vh = torch.linalg.svd(ideal)
    for rank in (1, 3, 4):
        best = u[:, :rank] * singular[:rank] @ vh[:rank]
        torch.testing.assert_close(product(RaFLora().view(merged, rank)), best, rtol=1e-5, atol=1e-5)
    b, a = merged.adapter[B], merged.adapter[A]
    torch.testing.assert_close(b.norm(dim=0), a.norm(dim=1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("rule", "kept"), [(FlexLora(), 0.5), (RaFLora(), 1.0)], ids=["flexlora", "raflora"])
def test_the_last_slots_collapse_under_flexlora_alone(rule, kept):
    """Two nodes of ranks 2 and 4 that learn nothing any more."""
    state = learned(FlexLora())
    found = [torch.linalg.svdvals(product(state))]
    for _ in range(3):
        views = [rule.view(state, rank) for rank in (2, 4)]
        state = rule.aggregate(state, [Update(view.adapter, 1.0, view.scale) for view in views])
        found.append(torch.linalg.svdvals(product(state)))
    for turn, singular in enumerate(found):
        torch.testing.assert_close(singular[:2], found[0][:2], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(singular[2:4], kept**turn * found[0][2:4], rtol=1e-5, atol=1e-5)


def test_slots_that_no_node_of_a_round_has_stay_under_raflora():
    state = learned(RaFLora())
    (update,) = updates = of_ranks(RaFLora(), state, (2,))
    rest = state.adapter[B][:, 2:].double() @ state.adapter[A][2:].double()
    ideal = state.scale * (matrices(update, "l") + rest)
    torch.testing.assert_close(product(RaFLora().aggregate(state, updates)), ideal, rtol=1e-5, atol=1e-5)


def test_raflora_is_flexlora_among_nodes_of_one_rank():
    state, updates, _ = layer_of(RaFLora())
    one, other = (product(rule.aggregate(state, updates)) for rule in (RaFLora(), FlexLora()))
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_a_node_of_raflora_does_not_say_which_slots_it_has():
    state = learned(RaFLora())
    updates = of_ranks(RaFLora(), state, (1, 2))
    lying = [replace(updates[0], slots=(3,)), updates[1]]
    one, other = (product(RaFLora().aggregate(state, sent)) for sent in (updates, lying))
    assert torch.equal(one, other)


def test_a_weight_of_next_to_nothing_decides_about_its_own_slots_alone():
    state = learned(RaFLora())
    small, large = of_ranks(RaFLora(), state, (3, 4))
    merged = RaFLora().aggregate(state, [small, Update(large.tensors, 1e-300, large.scale)])
    last = large.tensors[B][:, 3:].double() @ large.tensors[A][3:].double()
    ideal = state.scale * (matrices(small, "l") + last)
    torch.testing.assert_close(product(merged), ideal, rtol=1e-5, atol=1e-5)


def test_fsloras_sketches_have_the_adapter_as_mean_and_a_known_spread():
    state = learned(FedIT())
    # Slots of one size that are orthogonal to each other.
    b, a = (torch.linalg.qr(factor)[0] for factor in (state.adapter[B], state.adapter[A].T))
    state = replace(state, adapter={A: a.T.contiguous(), B: b})
    views = {view.slots: view for view in (FSLora().view(state, 2, draw) for draw in range(200))}
    assert set(views) == set(combinations(range(4), 2))
    sketches = torch.stack([product(view) for view in views.values()])
    torch.testing.assert_close(sketches.mean(0), product(state))
    variance = (sketches - product(state)).square().sum((1, 2)).mean()
    torch.testing.assert_close(variance, (4 / 2 - 1) * product(state).square().sum(), rtol=1e-5, atol=1e-6)


def test_fslora_moves_a_slot_by_the_share_of_those_who_trained_it():
    state = learned(FSLora())
    views = [FSLora().view(state, rank, draw) for draw, rank in enumerate((1, 4, 2))]
    updates = [trained(FSLora(), view, seed, seed + 1.0) for seed, view in enumerate(views)]
    merged = FSLora().aggregate(state, updates)
    for slot in range(4):
        a, b = state.adapter[A][slot].clone(), state.adapter[B][:, slot].clone()
        for update in updates:
            if slot in (slots := list(update.slots or range(4))):
                a += update.weight / 6 * update.tensors[A][slots.index(slot)]
                b += update.weight / 6 * update.tensors[B][:, slots.index(slot)]
        torch.testing.assert_close(merged.adapter[A][slot], a)
        torch.testing.assert_close(merged.adapter[B][:, slot], b)
    small = FSLora().model(state, updates[0])
    assert product(small).norm() > 0
    assert small.scale == 4 * state.scale


def test_fslora_among_nodes_of_full_rank_is_fedit():
    state = learned(FedIT())
    sent = [trained(FedIT(), state, seed, seed + 1.0) for seed in range(3)]
    changes = [{key: tensor - state.adapter[key] for key, tensor in update.tensors.items()} for update in sent]
    sketched = [Update(change, update.weight, update.scale) for change, update in zip(changes, sent, strict=True)]
    one, other = FSLora().aggregate(state, sketched), FedIT().aggregate(state, sent)
    for key, tensor in one.adapter.items():
        torch.testing.assert_close(tensor, other.adapter[key], rtol=1e-5, atol=1e-6)


def test_an_update_of_another_sketch_than_its_rank_makes_is_refused():
    state = learned(FSLora())
    good = trained(FSLora(), FSLora().view(state, 2), 0, 1.0)
    assert good.scale == 2 * state.scale
    with pytest.raises(BouquetError, match=r"an update has another scale: expected 1.0, got 0.5"):
        FSLora().aggregate(state, [replace(good, scale=state.scale)])
    with pytest.raises(BouquetError, match="names a slot that does not exist: expected 0 to 3, got 4"):
        FSLora().aggregate(state, [replace(good, slots=(1, 4))])
    with pytest.raises(BouquetError, match=r"different slots \(lora-rank\): expected 4 on every node, or mean.name"):
        FSLora(mean=Median()).view(state, 2)
