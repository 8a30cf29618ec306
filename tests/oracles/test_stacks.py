"""What the papers, and the published mistakes, say of the rules that stack and split; the algebra under them."""

from dataclasses import replace

import pytest
import torch

from common.adapter.algebra import break_even_rank, extend_offset, low_rank_svd, recompress
from common.adapter.spec import Spec
from common.adapter.values import Key, LayerShape
from common.error import BouquetError
from strategies.meter import aggregation_error
from strategies.rules import FedExLora, FedIT, FedMomentum, FlexLora, FLora, FLoRIST, LoraFair
from tests.support.factors import LAYERS, dense, initial, layer_of, matrices, product, spec, started, trained


def test_the_residual_of_fedex_has_its_rank_and_makes_the_merge_exact():
    rule = FedExLora()
    layers = {"layer": LayerShape(40, 30)}
    state = initial(rule, Spec(layers, {}, 3, 0.5), seed=0)
    updates = [trained(rule, state, seed, 1.0 + seed) for seed in range(4)]
    merged = rule.aggregate(state, updates)
    q, p = merged.offset[Key("layer", "Q")], merged.offset[Key("layer", "P")]
    assert q.shape == (40, 9)
    assert p.shape == (9, 30)
    assert torch.linalg.matrix_rank(q.double() @ p.double()) == 9


def test_the_residual_of_fedex_is_zero_when_all_nodes_share_a():
    rule, state = FedExLora(), started(FedExLora())
    updates = [trained(rule, state, seed, 1.0) for seed in range(3)]
    common = {key: tensor for key, tensor in updates[0].tensors.items() if key.part == "A"}
    updates = [replace(update, tensors=update.tensors | common) for update in updates]
    fresh = replace(state, offset={})
    merged = rule.aggregate(fresh, updates)
    for layer in LAYERS:
        product = merged.offset[Key(layer, "Q")] @ merged.offset[Key(layer, "P")]
        assert product.abs().max() < 1e-6


def test_fedex_stays_exact_as_nodes_change_and_its_offset_thin():
    rule = FedExLora()
    state = initial(rule, spec(rule), seed=0)
    for step in range(5):
        updates = [trained(rule, state, 100 * step + node, 1.0 + node) for node in range(step % 3 + 1)]
        total = sum(update.weight for update in updates)
        ideal = {layer: sum(u.weight / total * dense(rule.model(state, u))[layer] for u in updates) for layer in LAYERS}
        state = rule.aggregate(state, updates)
        for layer, shape in LAYERS.items():
            torch.testing.assert_close(dense(state)[layer], ideal[layer], rtol=1e-4, atol=1e-4)
            if Key(layer, "Q") in state.offset:
                assert state.offset[Key(layer, "Q")].shape[1] <= min(shape)


def test_low_rank_svd_and_recompress_are_exact():
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(12, 5, generator=generator), torch.randn(5, 9, generator=generator)
    u, s, vh = low_rank_svd(left.double(), right.double())
    torch.testing.assert_close(u @ torch.diag(s) @ vh, left.double() @ right.double())
    torch.testing.assert_close(s, torch.linalg.svdvals(left.double() @ right.double())[:5])
    doubled = recompress(torch.cat([left, left], 1), torch.cat([right, right], 0))
    assert doubled[0].shape[1] == 5
    torch.testing.assert_close(doubled[0] @ doubled[1], 2 * left @ right, rtol=1e-4, atol=1e-4)


def test_an_offset_is_added_once():
    first = {Key("l", "Q"): torch.ones(4, 1), Key("l", "P"): torch.ones(1, 4)}
    twice = extend_offset(extend_offset({}, first), first)
    torch.testing.assert_close(twice[Key("l", "Q")] @ twice[Key("l", "P")], torch.full((4, 4), 2.0))
    assert first[Key("l", "Q")].shape == (4, 1)


def test_the_error_of_flexlora_is_the_tail_of_the_spectrum_at_every_rank():
    state, updates, ideal = layer_of(FlexLora())
    merged = FlexLora().aggregate(state, updates)
    singular = torch.linalg.svdvals(ideal)
    for rank in (1, 2, 3):
        error = torch.linalg.norm(product(FlexLora().view(merged, rank)) - ideal)
        torch.testing.assert_close(error, singular[rank:].square().sum().sqrt(), rtol=1e-5, atol=1e-6)


def test_flora_equals_pefts_concatenation_and_restarts_from_zero():
    state, updates, ideal = layer_of(FLora())
    merged = FLora().aggregate(state, updates)
    assert not merged.adapter[Key("l", "B")].any()
    torch.testing.assert_close(
        merged.offset[Key("l", "Q")] @ merged.offset[Key("l", "P")], ideal.float(), rtol=1e-4, atol=1e-5
    )
    # Nine slots are past the break-even rank of eight: the product itself, beside an identity.
    assert torch.equal(merged.offset[Key("l", "P")], torch.eye(16))
    again = FLora().aggregate(merged, [trained(FLora(), merged, 9, 1.0)])
    assert not torch.equal(again.adapter[Key("l", "A")], merged.adapter[Key("l", "A")])


def test_the_weights_of_flora_count_once():
    """A published implementation puts p on both factors."""
    state, updates, ideal = layer_of(FLora(), shares=(1.0, 1.0))
    twice = sum(0.25 * state.scale * matrices(u, "l") for u in updates)
    assert torch.linalg.norm(twice - ideal) > 0.4 * torch.linalg.norm(ideal)
    torch.testing.assert_close(product(FLora().aggregate(state, updates)), ideal, rtol=1e-4, atol=1e-5)


def test_florist_keeps_its_share_of_the_energy_and_all_of_it_is_flora():
    state, updates, ideal = layer_of(FLoRIST())
    for energy in (0.5, 0.8, 0.95):
        merged = FLoRIST(energy=energy).aggregate(state, updates)
        lost = torch.linalg.norm(product(merged) - ideal).square() / torch.linalg.norm(ideal).square()
        assert 0 < lost <= 1 - energy
        kept = merged.offset[Key("l", "Q")].shape[1]
        spectrum = torch.linalg.svdvals(ideal).square()
        assert spectrum[: kept - 1].sum() < energy * spectrum.sum()
    torch.testing.assert_close(product(FLoRIST(energy=1.0).aggregate(state, updates)), ideal, rtol=1e-4, atol=1e-5)


def test_fedmomentum_leaves_the_smallest_offset():
    state, updates, ideal = layer_of(FedMomentum())
    merged = FedMomentum().aggregate(state, updates)
    singular = torch.linalg.svdvals(ideal)
    residual = merged.offset[Key("l", "Q")].double() @ merged.offset[Key("l", "P")].double()
    torch.testing.assert_close(torch.linalg.norm(residual), singular[3:].square().sum().sqrt(), rtol=1e-5, atol=1e-6)
    b, a = merged.adapter[Key("l", "B")], merged.adapter[Key("l", "A")]
    torch.testing.assert_close(b.norm(dim=0), a.norm(dim=1), rtol=1e-4, atol=1e-5)


def test_lora_fair_is_exact_where_every_a_lies_in_the_means_rows():
    rule = LoraFair(ridge=1e-9)
    state, updates, _ = layer_of(rule)
    a = Key("l", "A")
    mixes = [torch.randn(3, 3, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    common = updates[0].tensors[a]
    updates = [replace(u, tensors=u.tensors | {a: mix @ common}) for u, mix in zip(updates, mixes, strict=True)]
    ideal = sum(u.weight / 6 * state.scale * matrices(u, "l") for u in updates)
    torch.testing.assert_close(product(rule.aggregate(state, updates)), ideal, rtol=1e-3, atol=1e-4)


def test_the_truncated_fedex_loses_the_tail_of_its_residual():
    state, updates, ideal = layer_of(FedExLora())
    whole = FedExLora().aggregate(state, updates)
    residual = whole.offset[Key("l", "Q")].double() @ whole.offset[Key("l", "P")].double()
    singular = torch.linalg.svdvals(residual)
    for rank in (1, 3, 5):
        rule = FedExLora(residual_rank=rank)
        merged = rule.aggregate(state, updates)
        assert merged.offset[Key("l", "Q")].shape[1] == rank
        error = torch.linalg.norm(product(merged) - ideal)
        torch.testing.assert_close(error, singular[rank:].square().sum().sqrt(), rtol=1e-4, atol=1e-5)
        assert not rule.exact


def test_lora_fair_by_cosine_points_closer_to_the_ideal():
    state, updates, ideal = layer_of(LoraFair())

    def cosine(rule):
        matrix = product(rule.aggregate(state, updates))
        return ((matrix * ideal).sum() / matrix.norm() / ideal.norm()).item()

    near, far = (cosine(LoraFair(solver="cosine", ridge=ridge)) for ridge in (1e-6, 0.05))
    assert cosine(FedIT()) < far < near
    one = LoraFair(solver="cosine").aggregate(state, updates[:1])
    assert torch.equal(one.adapter[Key("l", "B")], updates[0].tensors[Key("l", "B")])
    with pytest.raises(BouquetError, match=r"rule.lora-fair.solver\): expected ridge or cosine, got sgd"):
        LoraFair(solver="sgd")


@pytest.mark.parametrize("ridge", [0.001, 0.003, 0.01])
def test_lora_fair_by_cosine_stands_where_the_papers_objective_is_flat(ridge):
    """1 - cos(D, B' Abar) + ridge |dB|, of dense matrices: the norm itself, not its square."""
    state, updates, ideal = layer_of(LoraFair(), shape=(60, 48))
    merged = LoraFair(solver="cosine", ridge=ridge).aggregate(state, updates)
    mean_b = FedIT().aggregate(state, updates).adapter[Key("l", "B")].double()
    a, step = merged.adapter[Key("l", "A")].double(), merged.adapter[Key("l", "B")].double() - mean_b

    def slope(step: torch.Tensor) -> torch.Tensor:
        step = step.detach().requires_grad_()
        matrix = (mean_b + step) @ a
        loss = 1 - (ideal * matrix).sum() / (ideal.norm() * matrix.norm()) + ridge * step.norm()
        (gradient,) = torch.autograd.grad(loss, step)
        return gradient.norm()

    assert step.norm() > 0
    assert slope(step) < 0.02 * slope(1e-3 * step)


def test_an_offset_beyond_the_break_even_rank_is_cut_to_its_energy():
    rule = FLora(offset_energy=0.9)
    state = initial(rule, Spec({"l": LayerShape(20, 16)}, {}, 4, 0.5), seed=0)
    updates = [trained(rule, state, seed, 1.0) for seed in range(3)]
    merged, whole = rule.aggregate(state, updates), FLora().aggregate(state, updates)
    assert break_even_rank(20, 16) == 8
    kept, all_of_it = merged.offset[Key("l", "Q")].shape[1], whole.offset[Key("l", "Q")].shape[1]
    assert kept < 8 < all_of_it == 16
    lost = torch.linalg.norm(product(merged) - product(whole)).square() / torch.linalg.norm(product(whole)).square()
    assert 0 < lost <= 0.1
    assert not rule.exact
    assert aggregation_error(rule, state, updates, merged)[""] == pytest.approx(lost.sqrt().item(), rel=1e-3)
