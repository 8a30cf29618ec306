"""What the papers, and the published mistakes, say of the rules that average over common frames."""

from dataclasses import replace

import pytest
import torch

from common.adapter.core import Core
from common.adapter.spec import Spec
from common.adapter.values import Key, LayerShape
from common.error import BouquetError
from strategies.inits import LoraSB
from strategies.rules import FedIT, FedRotLora, FedSB, FedSVD, FFALora, LoraFair, Ravan, RoLora
from strategies.rules.fedrot_lora import nearest_rotation
from tests.support.factors import LAYERS, dense, initial, layer_of, matrices, product, recipe, spec, started, trained


def test_fedit_misses_exactly_the_covariance_of_the_factors():
    rule, state = FedIT(), started(FedIT())
    updates = [trained(rule, state, seed, seed + 1.0) for seed in range(3)]
    merged = rule.aggregate(state, updates)
    total = sum(update.weight for update in updates)
    for layer in LAYERS:
        a, b = Key(layer, "A"), Key(layer, "B")
        ideal = sum(u.weight / total * matrices(u, layer) for u in updates)
        covariance = sum(
            u.weight / total * (u.tensors[b] - merged.adapter[b]).double() @ (u.tensors[a] - merged.adapter[a]).double()
            for u in updates
        )
        torch.testing.assert_close(dense(merged)[layer], state.scale * (ideal - covariance), rtol=1e-5, atol=1e-5)


def test_fedit_of_mirrored_factors_is_zero_although_the_ideal_is_not():
    rule, state = FedIT(), started(FedIT())
    one = trained(rule, state, 0, 1.0)
    two = replace(one, tensors={key: -tensor for key, tensor in one.tensors.items()})
    merged = dense(rule.aggregate(state, [one, two]))
    assert all(matrix.abs().max() < 1e-6 for matrix in merged.values())


def test_fedit_uses_every_reply_with_its_share():
    """A published baseline merged the first node only."""
    rule, state = FedIT(), started(FedIT())
    updates = [trained(rule, state, seed, weight) for seed, weight in ((0, 1.0), (1, 3.0))]
    merged = rule.aggregate(state, updates).adapter
    for key, tensor in updates[0].tensors.items():
        torch.testing.assert_close(merged[key], 0.25 * tensor + 0.75 * updates[1].tensors[key])


def test_ffa_lora_trains_a_b_of_one_common_a():
    rule = FFALora()
    state = started(rule)
    first = initial(rule, spec(rule), seed=0)
    assert all(torch.equal(state.adapter[k], first.adapter[k]) for k in state.adapter if k.part == "A")
    assert {key.part for key in state.adapter if key.part in "AB" and rule.trains(0, key)} == {"B"}
    assert sum(t.numel() for k, t in trained(rule, state, 0, 1.0).tensors.items() if k.part == "B") == sum(
        3 * shape.d_out for shape in LAYERS.values()
    )


def test_lora_fair_solves_its_ridge_problem_and_is_never_worse_than_fedit():
    rule = LoraFair(ridge=0.01)
    state, updates, ideal = layer_of(rule)
    merged, averaged = rule.aggregate(state, updates), FedIT().aggregate(state, updates)
    a, b = merged.adapter[Key("l", "A")].double(), merged.adapter[Key("l", "B")].double()
    step = b - averaged.adapter[Key("l", "B")].double()
    gradient = (b @ a - ideal / state.scale) @ a.T + 0.01 * step
    assert gradient.abs().max() < 1e-5
    assert torch.linalg.norm(product(merged) - ideal) < torch.linalg.norm(product(averaged) - ideal)


def test_fedsvd_has_orthonormal_rows_and_keeps_the_product():
    state, updates, ideal = layer_of(FedSVD())
    merged = FedSVD().aggregate(state, updates)
    a = merged.adapter[Key("l", "A")]
    torch.testing.assert_close(a @ a.T, torch.eye(3), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(product(merged), ideal, rtol=1e-5, atol=1e-6)


def test_fedsvd_of_half_a_balance_is_what_fedasks_two_sketches_come_to():
    """Y = sum p B (A Omega), Q R = Y, P = sum p A^T (B^T Q), U S Vh = P^T; then B = Q U S^(1/2), A = S^(1/2) Vh."""
    rule = FedSVD(balance=0.5)
    state, updates, _ = layer_of(rule)
    a = state.adapter[Key("l", "A")].double()
    omega = torch.randn(16, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    nodes = [(update.weight / 6, update.tensors[Key("l", "B")].double()) for update in updates]
    q, _ = torch.linalg.qr(sum(share * b @ (a @ omega) for share, b in nodes))
    u, singular, vh = torch.linalg.svd(sum(share * a.T @ (b.T @ q) for share, b in nodes).T, full_matrices=False)
    merged = rule.aggregate(state, updates).adapter
    ideal = q @ u * singular.sqrt(), singular.sqrt()[:, None] * vh
    sign = (merged[Key("l", "A")].double() * ideal[1]).sum(1).sign()
    torch.testing.assert_close(merged[Key("l", "B")].double(), ideal[0] * sign, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(merged[Key("l", "A")].double(), ideal[1] * sign[:, None], rtol=1e-5, atol=1e-6)


def test_a_direction_that_the_product_lacks_stays_within_reach():
    rule = FedSVD(balance=0.5)
    state, updates, _ = layer_of(rule)
    b = Key("l", "B")
    lacking = [replace(u, tensors={b: u.tensors[b] * torch.tensor([1.0, 1.0, 0.0])}) for u in updates]
    merged = rule.aggregate(state, lacking).adapter
    assert not merged[b][:, 2].abs().max() > 1e-6
    assert merged[Key("l", "A")][2].norm() == pytest.approx(1, rel=1e-5)


def test_rolora_trains_b_first_and_in_turns():
    rule = RoLora()
    assert [sorted(rule.plan(step).trained) for step in range(4)] == [["B"], ["A"], ["B"], ["A"]]
    assert all(rule.plan(step).sent == rule.plan(step).trained for step in range(4))
    state = initial(rule, spec(rule), seed=0)
    after = rule.aggregate(state, [trained(rule, state, 0, 1.0)])
    assert all(torch.equal(after.adapter[k], state.adapter[k]) for k in state.adapter if k.part == "A")
    late = rule.aggregate(after, [trained(rule, after, 1, 1.0)])
    assert all(torch.equal(late.adapter[k], after.adapter[k]) for k in after.adapter if k.part == "B")


def test_fedrot_turns_towards_the_reference_and_keeps_every_product():
    rule = FedRotLora(softness=1.0)
    state = replace(started(rule), round=2)
    generator = torch.Generator().manual_seed(0)
    local = {k: t + 0.5 * torch.randn(t.shape, generator=generator) for k, t in state.adapter.items()}
    sent = rule.send(state, local)
    for layer in LAYERS:
        a, b = Key(layer, "A"), Key(layer, "B")
        torch.testing.assert_close(sent[b] @ sent[a], local[b] @ local[a], rtol=1e-4, atol=1e-4)
        reference = state.adapter[a]
        assert torch.linalg.norm(sent[a] - reference) <= torch.linalg.norm(local[a] - reference) + 1e-6
    rotation = nearest_rotation(torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
    assert torch.linalg.det(rotation) > 0
    unturned = FedRotLora(softness=0.0).send(state, local)
    assert all(torch.equal(unturned[key], local[key]) for key in unturned)


@pytest.mark.parametrize("softness", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("turn", [1, 2])
def test_fedrots_mixture_is_a_rotation_within_its_softness(softness, turn):
    state = replace(started(FedRotLora()), round=turn)
    generator = torch.Generator().manual_seed(0)
    local = {k: t + 0.5 * torch.randn(t.shape, generator=generator) for k, t in state.adapter.items()}
    sent, whole = (FedRotLora(softness=share).send(state, local) for share in (softness, 1.0))
    for layer in LAYERS:
        a, b = Key(layer, "A"), Key(layer, "B")
        torch.testing.assert_close(sent[b] @ sent[a], local[b] @ local[a], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(torch.linalg.svdvals(sent[a]), torch.linalg.svdvals(local[a]), rtol=1e-4, atol=1e-4)
        key = a if turn % 2 == 0 else b
        far, near, nearest = (torch.linalg.norm(t[key] - state.adapter[key]) for t in (local, sent, whole))
        assert nearest < near < far


@pytest.mark.parametrize("turn", [1, 2])
def test_no_rotation_brings_a_node_of_fedrot_closer_than_its_whole_one(turn):
    state = replace(started(FedRotLora()), round=turn)
    generator = torch.Generator().manual_seed(0)
    local = {k: t + 0.5 * torch.randn(t.shape, generator=generator) for k, t in state.adapter.items()}
    sent = FedRotLora(softness=1.0).send(state, local)
    for layer in LAYERS:
        key = Key(layer, "A" if turn % 2 == 0 else "B")
        rows = [(t.T if key.part == "B" else t).double() for t in (sent[key], state.adapter[key])]
        least = torch.linalg.norm(rows[0] - rows[1])
        for _ in range(20):
            skew = 0.1 * torch.randn(3, 3, dtype=torch.float64, generator=generator)
            assert torch.linalg.norm(torch.linalg.matrix_exp(skew - skew.T) @ rows[0] - rows[1]) > least


def test_fed_sb_trains_a_core_between_fixed_orthonormal_frames():
    rule = FedSB()
    state = initial(rule, Spec({"l": LayerShape(20, 16)}, {}, 4, 2.0, structure=Core(blocks=1)), seed=0)
    a, b = state.adapter[Key("l", "A")], state.adapter[Key("l", "B")]
    torch.testing.assert_close(a @ a.T, torch.eye(4))
    torch.testing.assert_close(b.T @ b, torch.eye(4))
    updates = [trained(rule, state, seed, seed + 1.0) for seed in range(3)]
    assert {key.part: tensor.numel() for key, tensor in updates[0].tensors.items()} == {"R": 16}
    merged = rule.aggregate(state, updates)
    core = sum(update.weight / 6 * update.tensors[Key("l", "R")] for update in updates)
    torch.testing.assert_close(product(merged), (b @ core @ a).double(), rtol=1e-5, atol=1e-6)
    assert torch.equal(merged.adapter[Key("l", "A")], a)
    again = rule.aggregate(merged, [trained(rule, merged, 9, 1.0)])
    torch.testing.assert_close(again.adapter[Key("l", "R")], trained(rule, merged, 9, 1.0).tensors[Key("l", "R")])


def test_the_gradients_start_of_fed_sb_is_its_best_low_rank_step():
    chosen = replace(recipe(FedSB()), init=LoraSB(source="public.jsonl", step=0.01))
    form = Spec({"l": LayerShape(20, 16)}, {}, 4, 2.0, structure=Core())
    gradient = torch.randn(20, 16, generator=torch.Generator().manual_seed(3))
    start = chosen.start(form, 0, lambda layer: gradient)
    step = -0.01 * gradient.sign().double()
    tail = torch.linalg.svdvals(step)[4:].square().sum().sqrt()
    assert tail <= torch.linalg.norm(product(start) - step) <= 1.02 * tail
    a, b = start.adapter[Key("l", "A")], start.adapter[Key("l", "B")]
    torch.testing.assert_close(a @ a.T, torch.eye(4), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(b.T @ b, torch.eye(4), rtol=1e-5, atol=1e-5)
    assert not start.offset
    assert chosen.drawn == {"s"}
    assert chosen.fixed == {"A", "B", "s"}


def test_ravan_averages_the_products_of_scale_and_core():
    rule = Ravan(heads=2)
    state = initial(rule, Spec({"l": LayerShape(20, 16)}, {}, 4, 2.0, structure=Core(blocks=2)), seed=0)
    updates = [trained(rule, state, seed, 1.0) for seed in range(3)]
    merged = rule.aggregate(state, updates)
    assert torch.equal(merged.adapter[Key("l", "s")], torch.ones(2))
    a, b = state.adapter[Key("l", "A")], state.adapter[Key("l", "B")]
    generators = [torch.Generator().manual_seed(seed) for seed in range(3)]
    moved = [
        {
            key: tensor + torch.randn(tensor.shape, generator=generator)
            for key, tensor in state.adapter.items()
            if key.part in "Rs"
        }
        for generator in generators
    ]
    ideal = (
        sum(
            local[Key("l", "s")][head]
            * b[:, 2 * head : 2 * head + 2]
            @ local[Key("l", "R")][2 * head : 2 * head + 2]
            @ a[2 * head : 2 * head + 2]
            for local in moved
            for head in (0, 1)
        )
        / 3
    )
    torch.testing.assert_close(product(merged).float(), ideal, rtol=1e-4, atol=1e-5)
    with pytest.raises(BouquetError, match=r"the core's blocks \(lora.rank\): expected a multiple of 2, got 3"):
        initial(rule, Spec({"l": LayerShape(20, 16)}, {}, 3, 2.0, structure=Core(blocks=2)), seed=0)


def test_found_frames_span_what_was_learned_and_settle_in_two_rounds():
    rule = FedSB(start="nodes")
    state = initial(rule, Spec({"l": LayerShape(20, 16)}, {}, 4, 2.0, structure=Core(blocks=1)), seed=0)
    a, b, r = (Key("l", part) for part in "ABR")
    assert [sorted(rule.plan(step).sent) for step in range(4)] == [["B"], ["A"], ["R"], ["R"]]
    first = [trained(rule, state, seed, seed + 1.0) for seed in range(2)]
    mean = (first[0].tensors[b] + 2 * first[1].tensors[b]) / 3
    found = rule.aggregate(state, first)
    basis = found.adapter[b]
    torch.testing.assert_close(basis @ (basis.T @ mean), mean, rtol=1e-4, atol=1e-5)
    assert not product(found).any()
    second = [trained(rule, found, seed, 1.0) for seed in range(2)]
    settled = rule.aggregate(found, second)
    torch.testing.assert_close(
        product(settled).float(), basis @ (second[0].tensors[a] + second[1].tensors[a]) / 2, rtol=1e-4, atol=1e-5
    )
    for frame in (settled.adapter[a], settled.adapter[b].T):
        torch.testing.assert_close(frame @ frame.T, torch.eye(4), rtol=1e-4, atol=1e-5)
    later = rule.aggregate(settled, [trained(rule, settled, 5, 1.0)])
    assert torch.equal(later.adapter[a], settled.adapter[a])
    assert not torch.equal(later.adapter[r], settled.adapter[r])
    wide = initial(rule, Spec({"l": LayerShape(5, 3)}, {}, 8, 2.0, structure=Core(blocks=1)), seed=0)
    for step in range(3):
        wide = rule.aggregate(wide, [trained(rule, wide, step, 1.0)])
    assert all(torch.isfinite(tensor).all() for tensor in wide.adapter.values())
    with pytest.raises(BouquetError, match=r"init.lora-sb.source\): expected a file of public examples"):
        LoraSB()
