"""What the papers, and the published mistakes, say of each rule."""

from dataclasses import replace

import torch

from common.adapter import Key, LayerShape, Spec, Update, extend_offset, low_rank_svd, recompress, weighted_mean
from strategies import FedExLora, FedIT, FFALora
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
