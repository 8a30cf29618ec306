"""What the papers, and the published mistakes, say of each rule."""

from dataclasses import replace

import pytest
import torch

from common.adapter import (
    Key,
    LayerShape,
    Spec,
    State,
    Update,
    extend_offset,
    low_rank_svd,
    recompress,
    stacked,
    weighted_mean,
)
from strategies import (
    RULES,
    FedExLora,
    FedIT,
    FedMomentum,
    FedRotLora,
    FedSVD,
    FFALora,
    FlexLora,
    FLora,
    FLoRIST,
    LoraFair,
    RoLora,
)
from strategies.fedrot_lora import nearest_rotation
from strategies.meter import aggregation_error
from tests.test_laws import LAYERS, dense, model_of, spec, started, trained


def matrices(update: Update, layer: str) -> torch.Tensor:
    return update.tensors[Key(layer, "B")].double() @ update.tensors[Key(layer, "A")].double()


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
    initial = rule.initial(spec(), seed=0)
    assert all(torch.equal(state.adapter[k], initial.adapter[k]) for k in state.adapter if k.part == "A")
    assert {key.part for key in state.adapter if key.part in "AB" and rule.trains(0, key)} == {"B"}
    assert sum(t.numel() for k, t in trained(rule, state, 0, 1.0).tensors.items() if k.part == "B") == sum(
        3 * shape.d_out for shape in LAYERS.values()
    )


def test_the_residual_of_fedex_has_rank_k_minus_1_times_r_and_makes_the_merge_exact():
    rule = FedExLora()
    layers = {"layer": LayerShape(40, 30)}
    state = rule.initial(Spec(layers, {}, 3, 0.5), seed=0)
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


def test_fedex_stays_exact_over_rounds_of_changing_nodes_and_the_offset_stays_thin():
    rule = FedExLora()
    state = rule.initial(spec(), seed=0)
    for step in range(5):
        updates = [trained(rule, state, 100 * step + node, 1.0 + node) for node in range(step % 3 + 1)]
        total = sum(update.weight for update in updates)
        ideal = {layer: sum(u.weight / total * dense(model_of(state, u))[layer] for u in updates) for layer in LAYERS}
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


def test_the_mean_needs_the_memory_of_one_update():
    seen = []

    def stream():
        for value in (1.0, 2.0, 6.0):
            seen.append(value)
            yield 1.0, {Key("l", "B"): torch.full((2,), value)}

    mean = weighted_mean(stream())
    torch.testing.assert_close(mean[Key("l", "B")], torch.full((2,), 3.0))
    assert seen == [1.0, 2.0, 6.0]


def layer_of(rule, shares=(1.0, 2.0, 3.0), rank=3, shape=(20, 16)):
    """One layer, one round: the state, the updates, and the ideal update as a matrix."""
    state = rule.initial(Spec({"l": LayerShape(*shape)}, {}, rank, 0.5), seed=0)
    updates = [trained(rule, state, seed, share) for seed, share in enumerate(shares)]
    models = [{**state.adapter, **update.tensors} for update in updates]
    ideal = sum(
        share / sum(shares) * state.scale * model[Key("l", "B")].double() @ model[Key("l", "A")].double()
        for share, model in zip(shares, models, strict=True)
    )
    return state, updates, ideal


def product(state: State) -> torch.Tensor:
    factors = stacked(state)
    return factors[Key("l", "B")].double() @ factors[Key("l", "A")].double()


def test_the_error_of_flexlora_is_the_tail_of_the_spectrum_at_every_rank():
    state, updates, ideal = layer_of(FlexLora())
    merged = FlexLora().aggregate(state, updates)
    singular = torch.linalg.svdvals(ideal)
    for rank in (1, 2, 3):
        error = torch.linalg.norm(product(FlexLora().view(merged, rank)) - ideal)
        torch.testing.assert_close(error, singular[rank:].square().sum().sqrt(), rtol=1e-5, atol=1e-6)


def test_flora_equals_pefts_concatenation_and_starts_the_next_round_from_zero():
    state, updates, ideal = layer_of(FLora())
    merged = FLora().aggregate(state, updates)
    assert not merged.adapter[Key("l", "B")].any()
    torch.testing.assert_close(
        merged.offset[Key("l", "Q")] @ merged.offset[Key("l", "P")], ideal.float(), rtol=1e-4, atol=1e-5
    )
    assert merged.offset[Key("l", "Q")].shape == (20, 9)
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


def test_lora_fair_solves_its_ridge_problem_and_is_never_worse_than_fedit():
    rule = LoraFair(ridge=0.01)
    state, updates, ideal = layer_of(rule)
    merged, averaged = rule.aggregate(state, updates), FedIT().aggregate(state, updates)
    a, b = merged.adapter[Key("l", "A")].double(), merged.adapter[Key("l", "B")].double()
    step = b - averaged.adapter[Key("l", "B")].double()
    gradient = (b @ a - ideal / state.scale) @ a.T + 0.01 * step
    assert gradient.abs().max() < 1e-5
    assert torch.linalg.norm(product(merged) - ideal) < torch.linalg.norm(product(averaged) - ideal)


def test_lora_fair_is_exact_where_the_rows_of_every_a_lie_in_those_of_the_mean():
    rule = LoraFair(ridge=1e-9)
    state, updates, _ = layer_of(rule)
    a = Key("l", "A")
    mixes = [torch.randn(3, 3, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    common = updates[0].tensors[a]
    updates = [replace(u, tensors=u.tensors | {a: mix @ common}) for u, mix in zip(updates, mixes, strict=True)]
    ideal = sum(u.weight / 6 * state.scale * matrices(u, "l") for u in updates)
    torch.testing.assert_close(product(rule.aggregate(state, updates)), ideal, rtol=1e-3, atol=1e-4)


def test_fedsvd_has_orthonormal_rows_and_keeps_the_product():
    state, updates, ideal = layer_of(FedSVD())
    merged = FedSVD().aggregate(state, updates)
    a = merged.adapter[Key("l", "A")]
    torch.testing.assert_close(a @ a.T, torch.eye(3), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(product(merged), ideal, rtol=1e-5, atol=1e-6)


def test_rolora_trains_b_first_and_in_turns():
    rule = RoLora()
    assert [sorted(rule.plan(step).trained) for step in range(4)] == [["B"], ["A"], ["B"], ["A"]]
    assert all(rule.plan(step).sent == rule.plan(step).trained for step in range(4))
    state = rule.initial(spec(), seed=0)
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


@pytest.mark.parametrize("rule", [cls() for cls in RULES.values() if not cls.personal], ids=lambda rule: rule.name)
def test_the_meter_reads_what_the_dense_matrices_say(rule):
    state = started(rule)
    updates = [trained(rule, state, seed, seed + 1.0) for seed in range(3)]
    merged = rule.aggregate(state, updates)
    read = aggregation_error(state, updates, merged)
    parts = [dense(model_of(state, update)) for update in updates]
    squares = []
    for layer, matrix in dense(merged).items():
        ideal = sum(update.weight / 6 * part[layer] for update, part in zip(updates, parts, strict=True))
        error, size = torch.linalg.norm(matrix - ideal), torch.linalg.norm(ideal)
        squares.append((error.square(), size.square()))
        assert read[layer] == pytest.approx((error / size).item(), abs=1e-5)
    overall = (sum(e for e, _ in squares) / sum(s for _, s in squares)).sqrt().item()
    assert read[""] == pytest.approx(overall, abs=1e-5)
    assert (read[""] < 1e-5) == rule.exact
