"""What the papers, and the published mistakes, say of the rules of slots, masks and clusters."""

from dataclasses import replace

import pytest
import torch

from common import wire
from common.adapter.algebra import digest
from common.adapter.spec import Spec
from common.adapter.values import Key, LayerShape
from common.error import BouquetError
from strategies.means import Trimmed
from strategies.rules import FLASC, FedIT, FedPLora, HetLora, LoraLego, Ravan
from strategies.rules.flasc import largest
from strategies.server_optimizers import FedAdam
from tests.support.factors import LAYERS, initial, layer_of, matrices, product, recipe, spec, started, trained


def test_hetlora_weighs_by_norm_pads_with_zeros_and_prunes_last_slots():
    rule = HetLora()
    state = initial(rule, Spec({"l": LayerShape(20, 16)}, {}, 4, 1.0), seed=0)
    a, b = Key("l", "A"), Key("l", "B")
    views = [rule.view(state, rank) for rank in (4, 2)]
    updates = [trained(rule, view, seed, 100.0**seed) for seed, view in enumerate(views)]
    norms = [torch.linalg.norm(matrices(update, "l")) for update in updates]
    merged = rule.aggregate(state, updates)
    share = norms[0] / sum(norms)
    ideal = share.float() * updates[0].tensors[a] + (1 - share.float()) * torch.cat(
        [updates[1].tensors[a], torch.zeros(2, 16)]
    )
    torch.testing.assert_close(merged.adapter[a], ideal, rtol=1e-5, atol=1e-6)
    assert torch.equal(rule.view(merged, 2).adapter[b], merged.adapter[b][:, :2])

    received = rule.aggregate(state, updates)
    shrunk = {key: tensor.clone() for key, tensor in received.adapter.items()}
    shrunk[b][:, 3:] *= 0.5
    assert rule.next_rank(received, shrunk) == 3
    sent = rule.send(received, shrunk)
    assert torch.equal(sent[a], shrunk[a][:3])
    shrunk[b][:, 3:] *= 4
    assert rule.next_rank(received, shrunk) == 4
    assert HetLora(smallest=4).next_rank(received, recipe(rule).install(state, {})) == 4
    assert HetLora(decay=2.0).penalty(received.adapter).item() == pytest.approx(
        2 * (received.adapter[b][:, 3:].norm() * received.adapter[a][3:].norm()).item(), rel=1e-5
    )


def test_fed_plora_averages_a_slot_over_those_who_trained_it():
    rule = FedPLora()
    state = started(rule)
    views = [rule.view(state, 1, draw) for draw in (0, 1, 2)]
    updates = [trained(rule, view, seed, seed + 1.0) for seed, view in enumerate(views)]
    merged = rule.aggregate(state, updates)
    for slot in range(3):
        owners = [update for update in updates if update.slots == (slot,)]
        for layer in LAYERS:
            a = Key(layer, "A")
            if not owners:
                assert torch.equal(merged.adapter[a][slot], state.adapter[a][slot])
                continue
            total = sum(owner.weight for owner in owners)
            ideal = sum(owner.weight / total * owner.tensors[a][0] for owner in owners)
            torch.testing.assert_close(merged.adapter[a][slot], ideal)
    assert len({view.slots for view in views}) > 1
    whole = [trained(rule, state, seed, seed + 1.0) for seed in range(3)]
    fedit = FedIT().aggregate(state, whole).adapter
    for key, tensor in rule.aggregate(state, whole).adapter.items():
        torch.testing.assert_close(tensor, fedit[key])


def test_ravan_averages_a_head_over_those_who_trained_it():
    rule = Ravan(heads=3)
    state = started(rule, rank=2)
    views = [rule.view(state, rank, draw) for draw, rank in enumerate((2, 2, 6, 4))]
    assert [len(view.slots) for view in views] == [1, 1, 0, 2]
    assert len({rule.view(state, 2, draw).slots for draw in range(20)}) == 3
    assert digest(views[0].adapter) == digest(state.adapter)
    updates = [trained(rule, view, seed, seed + 1.0) for seed, view in enumerate(views)]
    r = Key("wide", "R")
    assert [len(update.tensors[r]) for update in updates] == [2, 2, 6, 4]
    merged = rule.aggregate(state, updates)
    for head in range(3):
        owners = [(u, list(u.slots or range(3))) for u in updates if head in (u.slots or range(3))]
        total = sum(owner.weight for owner, _ in owners)
        ideal = sum(u.weight / total * u.tensors[r].split(2)[heads.index(head)] for u, heads in owners)
        torch.testing.assert_close(merged.adapter[r].split(2)[head], ideal)
    assert all(torch.equal(merged.adapter[key], state.adapter[key]) for key in state.adapter if key.part in "ABs")

    # Without the node that trained all, a head that nobody drew stays, to the bit.
    alone = rule.aggregate(state, updates[:1])
    (own,) = updates[0].slots
    for head, (after, before) in enumerate(zip(alone.adapter[r].split(2), state.adapter[r].split(2), strict=True)):
        assert torch.equal(after, before) == (head != own)
    assert digest(rule.model(state, updates[0]).adapter) == digest(alone.adapter)
    record = wire.pack_update(updates[0], "ravan", 1, "n", codec="int8", received=state.adapter)
    _, back = wire.unpack_update(record, rule="ravan", round=1, received=state.adapter)
    torch.testing.assert_close(back.tensors[r], updates[0].tensors[r], rtol=0, atol=0.05)


def test_ravan_refuses_a_rank_that_is_not_one_of_whole_heads():
    state = started(Ravan(heads=3), rank=2)
    with pytest.raises(BouquetError, match=r"not one of whole heads \(lora-rank\): expected a multiple of 2 .* got 3"):
        Ravan(heads=3).view(state, 3)
    with pytest.raises(BouquetError, match=r"different slots \(lora-rank\): expected 6 on every node, or mean.name"):
        Ravan(heads=3, mean=Trimmed()).view(state, 4)
    good = trained(Ravan(heads=3), Ravan(heads=3).view(state, 4), 0, 1.0)
    with pytest.raises(BouquetError, match="names a slot that does not exist: expected 0 to 2, got 3"):
        Ravan(heads=3).aggregate(state, [replace(good, slots=(0, 3))])
    with pytest.raises(
        BouquetError, match=r"does not fit the rule 'ravan'.*expected shape \(2, 2\), got shape \(4, 2\)"
    ):
        Ravan(heads=3).aggregate(state, [replace(good, slots=(1,))])


def test_an_update_with_slots_that_it_does_not_have_is_refused():
    rule = FedPLora()
    state = started(rule)
    view = rule.view(state, 2, draw=0)
    good = trained(rule, view, 0, 1.0)
    with pytest.raises(BouquetError, match="names other slots than it has: expected 2 different slots, got 1, 1"):
        rule.aggregate(state, [replace(good, slots=(1, 1))])
    with pytest.raises(BouquetError, match="names a slot that does not exist: expected 0 to 2, got 7"):
        rule.aggregate(state, [replace(good, slots=(1, 7))])


def test_flasc_without_masks_is_fedit_with_adam_to_the_bit():
    rule, fedit = FLASC(down=1.0, up=1.0, optimizer=FedAdam()), FedIT(optimizer=FedAdam())
    state = initial(fedit, spec(fedit), seed=0)
    for step in range(3):
        sent = [trained(fedit, state, 10 * step + seed, seed + 1.0) for seed in range(3)]
        changes = [
            replace(update, tensors={key: t - state.adapter[key] for key, t in update.tensors.items()})
            for update in sent
        ]
        one, two = rule.aggregate(state, changes), fedit.aggregate(state, sent)
        for key, tensor in one.adapter.items():
            torch.testing.assert_close(tensor, two.adapter[key], rtol=1e-5, atol=1e-6)
        state = one


def test_flasc_sends_the_largest_differences_over_all_layers():
    rule = FLASC(down=0.25, up=0.1)
    state = replace(started(FedIT()), round=1)
    received = rule.view(state, state.rank)
    count = sum(t.numel() for key, t in state.adapter.items() if key.part in "AB")
    kept = sum(int(t.count_nonzero()) for key, t in received.adapter.items() if key.part in "AB")
    assert kept == int(0.25 * count)
    for part in "AB":
        masked = {key: t for key, t in received.adapter.items() if key.part == part}
        threshold = min(t[t != 0].abs().min() for t in masked.values() if t.any())
        assert max((state.adapter[key] - t).abs().max() for key, t in masked.items()) <= threshold
    still = rule.send(received, received.adapter)
    assert not any(tensor.any() for tensor in still.values())
    update = trained(rule, state, 0, 1.0)
    assert sum(int(t.count_nonzero()) for key, t in update.tensors.items() if key.part in "AB") == int(0.1 * count)
    merged = rule.aggregate(state, [update])
    for key, tensor in update.tensors.items():
        torch.testing.assert_close(merged.adapter[key] - state.adapter[key], tensor, rtol=1e-4, atol=1e-5)
    assert largest({Key("l", "A"): torch.ones(4, 5)}, 0.5)[Key("l", "A")].sum() == 10


def test_flasc_lets_b_reach_the_nodes_however_small_it_is_beside_a():
    state = started(FedIT())
    small = replace(state, adapter={key: t * (1e-4 if key.part == "B" else 1) for key, t in state.adapter.items()})
    for part in "AB":
        values = torch.cat([t.flatten() for key, t in FLASC().view(small, 3).adapter.items() if key.part == part])
        assert int(values.count_nonzero()) == int(0.25 * len(values))


def test_lego_returns_equal_nodes_in_any_gauge_and_all_distinct_slots():
    rule = LoraLego()
    state, updates, _ = layer_of(rule)
    a, b = Key("l", "A"), Key("l", "B")
    first = updates[0]
    order, stretch = torch.tensor([2, 0, 1]), torch.tensor([-2.0, 0.1, 3.0])
    turned = {a: first.tensors[a][order] / stretch[:, None], b: first.tensors[b][:, order] * stretch}
    merged = rule.aggregate(state, [first, replace(first, tensors=turned, weight=5.0)])
    torch.testing.assert_close(product(merged), state.scale * matrices(first, "l"), rtol=1e-5, atol=1e-5)

    small = [rule.view(replace(state, round=0), 1) for _ in range(3)]
    single = [trained(rule, view, seed, seed + 1.0) for seed, view in enumerate(small)]
    ideal = sum(update.weight / 6 * state.scale * matrices(update, "l") for update in single)
    torch.testing.assert_close(product(rule.aggregate(state, single)), ideal, rtol=1e-4, atol=1e-5)
