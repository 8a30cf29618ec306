"""Optimizers of factors against their papers: what they promise of a layer, whatever is in B and what in A."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from scipy.ndimage import convolve1d
from torch import Tensor, nn

from common.adapter.structure import Pair
from strategies.optimizers import AdamW, AlLora, Group, LaLora, LoraPlus, LoraRite, Muon, Natural, Optimizer
from strategies.optimizers.la_lora import smoothed
from strategies.optimizers.natural import natural
from strategies.optimizers.riemannian import precondition

D_OUT, D_IN, RANK, SCALE = 24, 18, 3, 2.0
EMPTY = Group([], 0.01)


def drawn(seed: int, b: Sequence[int] = (D_OUT, RANK), a: Sequence[int] = (RANK, D_IN)) -> Pair:
    generator = torch.Generator().manual_seed(seed)
    factors = (nn.Parameter(torch.randn(*size, dtype=torch.float64, generator=generator)) for size in (b, a))
    return Pair(*factors, SCALE)


def target(seed: int = 9) -> Tensor:
    return torch.randn(D_OUT, D_IN, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def layer(pair: Pair) -> Tensor:
    return pair.scale * (pair.b @ pair.a).detach()


def descended(optimizer: Optimizer, pair: Pair, steps: int, rate: float = 0.01) -> Tensor:
    """The layer after so many steps towards a target."""
    built = optimizer.build([pair], Group([pair.b, pair.a], rate), EMPTY)
    for _ in range(steps):
        built.zero_grad()
        (pair.scale * pair.b @ pair.a - target()).square().sum().backward()
        built.step()
    return layer(pair)


def in_another_gauge(pair: Pair, seed: int = 3) -> Pair:
    """The same layer: B T and T^-1 A."""
    turn = torch.randn(RANK, RANK, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    turn += 2 * torch.eye(RANK, dtype=torch.float64)
    with torch.no_grad():
        return Pair(nn.Parameter(pair.b @ turn), nn.Parameter(torch.linalg.solve(turn, pair.a)), pair.scale)


@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("seed", range(3))
def test_lora_rite_moves_the_layer_alike_in_every_gauge(seed, steps):
    one, other = drawn(seed), in_another_gauge(drawn(seed))
    torch.testing.assert_close(layer(one), layer(other))
    start = layer(one)
    moved = descended(LoraRite(), one, steps)
    torch.testing.assert_close(descended(LoraRite(), other, steps), moved, rtol=1e-5, atol=1e-5)
    assert float((moved - start).norm()) > 0.1


def test_adamw_does_not():
    one, other = drawn(0), in_another_gauge(drawn(0))
    assert float((descended(AdamW(), one, 5) - descended(AdamW(), other, 5)).norm()) > 0.1


def test_lora_rites_first_step_is_adams_in_the_others_basis():
    """With no moments yet: B moves along ``G U (U^T G^T G U / d)^(-1/2) U^T`` in the layer."""
    pair, rate, eps = drawn(0), 0.01, 1e-6
    gradient = 2 * SCALE * (layer(pair) - target())
    basis = torch.linalg.svd(pair.a.detach(), full_matrices=False).Vh.T
    plain = gradient @ basis
    values, vectors = torch.linalg.eigh(plain.T @ plain / D_OUT)
    expected = plain @ vectors @ torch.diag((values + eps) ** -0.5) @ vectors.T @ basis.T
    pair.a.requires_grad_(False)
    start = layer(pair)
    moved = descended(LoraRite(eps=eps), pair, 1, rate)
    torch.testing.assert_close(moved - start, -rate * SCALE * expected, rtol=1e-6, atol=1e-9)


def test_lora_rite_leaves_zero():
    pair = drawn(0)
    with torch.no_grad():
        pair.b.zero_()
    assert descended(LoraRite(), pair, 3).isfinite().all()
    assert layer(pair).any()


@pytest.mark.parametrize("seed", range(3))
def test_a_riemannian_gradient_is_the_layers_own_on_what_the_other_factor_spans(seed):
    pair = drawn(seed)
    gradient = target(seed)
    pair.b.grad, pair.a.grad = SCALE * gradient @ pair.a.detach().T, SCALE * pair.b.detach().T @ gradient
    precondition(pair, 1e-14)
    projector_a = torch.linalg.pinv(pair.a.detach()) @ pair.a.detach()
    projector_b = pair.b.detach() @ torch.linalg.pinv(pair.b.detach())
    torch.testing.assert_close(pair.b.grad @ pair.a.detach() / SCALE, gradient @ projector_a)
    torch.testing.assert_close(pair.b.detach() @ pair.a.grad / SCALE, projector_b @ gradient)


def test_lora_plus_moves_b_its_ratio_further_than_a():
    """Adam's first step is the rate, whatever the gradient."""
    pair, start = drawn(0), drawn(0)
    descended(LoraPlus(ratio=8.0), pair, 1, 0.08)
    torch.testing.assert_close((pair.a - start.a).abs(), torch.full_like(pair.a, 0.01), rtol=1e-4, atol=0)
    torch.testing.assert_close((pair.b - start.b).abs(), torch.full_like(pair.b, 0.08), rtol=1e-4, atol=0)


def test_lora_rite_moves_nothing_far_beside_next_to_nothing():
    """A B that has had next to no gradient: the layer can only move as A does, and A would have to go to infinity."""
    pair = drawn(0)
    with torch.no_grad():
        pair.b.mul_(1e-9)
    start = pair.a.detach().clone()
    for _ in range(3):
        built = LoraRite().build([pair], Group([pair.b, pair.a], 0.01), EMPTY)
        gradient = 1e-9 * target()
        pair.b.grad, pair.a.grad = gradient @ pair.a.detach().T, pair.b.detach().T @ gradient
        built.step()
    torch.testing.assert_close(pair.a.detach(), start, rtol=0, atol=0.01)


@pytest.mark.parametrize("eta", [2.0, 8.0])
def test_allora_moves_each_row_of_b_by_how_far_it_is_from_zero(eta):
    pair = drawn(0)
    with torch.no_grad():
        pair.b[0] = 0
    start = Pair(nn.Parameter(pair.b.detach().clone()), nn.Parameter(pair.a.detach().clone()), SCALE)
    descended(AlLora(eta=eta), pair, 1, 0.01)
    torch.testing.assert_close((pair.a - start.a).abs(), torch.full_like(pair.a, 0.01), rtol=1e-4, atol=0)
    moved = (pair.b - start.b).abs()
    torch.testing.assert_close(moved[0], torch.full_like(moved[0], 0.01 * eta), rtol=1e-4, atol=0)
    for row in range(1, D_OUT):
        factor = 1 / np.sqrt(np.linalg.norm(start.b[row].detach().numpy()) + 1 / eta**2)
        torch.testing.assert_close(moved[row], torch.full_like(moved[row], 0.01 * factor), rtol=1e-4, atol=0)


def test_alloras_rows_are_measured_anew_in_every_step():
    pair = drawn(0)
    with torch.no_grad():
        pair.b.zero_()
    optimizer = AlLora(eta=8.0).build([pair], Group([pair.b, pair.a], 0.1), EMPTY)
    lengths = []
    for _ in range(3):
        before = pair.b.detach().clone()
        pair.b.grad = torch.ones_like(pair.b)
        optimizer.step()
        lengths.append(float((pair.b.detach() - before).abs().max()))
    assert lengths[0] > 2 * lengths[1] > 2 * lengths[2] > 0


@pytest.mark.parametrize("width", [4, 5, 17])
def test_la_loras_filter_is_the_binomial_one(width):
    rows = torch.randn(3, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = convolve1d(rows.numpy(), np.array([1, 4, 6, 4, 1]) / 16, axis=1, mode="reflect")
    torch.testing.assert_close(smoothed(rows), torch.from_numpy(expected))
    torch.testing.assert_close(smoothed(torch.ones(1, width)), torch.ones(1, width))


def test_la_loras_filter_keeps_so_much_of_white_noise():
    noise = torch.randn(64, 4096, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert float(smoothed(noise).var()) == pytest.approx(70 / 256, rel=0.01)


@pytest.mark.parametrize("filtered", [0, 1])
def test_la_lora_smooths_along_features_and_not_over_the_rank(filtered):
    pair = drawn(0)
    optimizer = LaLora(filter=filtered).build([pair], Group([pair.b, pair.a], 1.0), EMPTY)
    seen: list[tuple[Tensor, Tensor]] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append((pair.b.grad.clone(), pair.a.grad.clone())))
    pair.b.grad, pair.a.grad = torch.zeros_like(pair.b), torch.zeros_like(pair.a)
    pair.b.grad[9, 1], pair.a.grad[1, 9] = 16.0, 16.0
    optimizer.step()
    ((b, a),) = seen
    expected = [1.0, 4.0, 6.0, 4.0, 1.0] if filtered else [0.0, 0.0, 16.0, 0.0, 0.0]
    assert b[7:12, 1].tolist() == a[1, 7:12].tolist() == expected
    assert int(b.count_nonzero()) == int(a.count_nonzero()) == (5 if filtered else 1)


def test_la_lora_begins_with_b():
    assert [LaLora().rests(step) for step in range(4)] == [frozenset("A"), frozenset("B")] * 2


def muons(factor: nn.Parameter, rate: float) -> torch.optim.Optimizer:
    return torch.optim.Muon([factor], lr=rate, weight_decay=0.0, momentum=0.95)


def test_muon_is_torchs_for_matrices_and_adamw_for_the_rest():
    pair, other, bias = drawn(0), drawn(0), nn.Parameter(torch.ones(4))
    optimizer = Muon().build([pair], Group([pair.b, pair.a], 0.01), Group([bias], 0.02))
    theirs: list[Callable[[], object]] = [muons(other.b, 0.01).step, muons(other.a, 0.01).step]
    for _ in range(3):
        for own, factor in ((pair.b, other.b), (pair.a, other.a)):
            own.grad = factor.grad = torch.randn_like(own)
        bias.grad = torch.ones(4)
        optimizer.step()
        for step in theirs:
            step()
    torch.testing.assert_close(pair.b, other.b)
    torch.testing.assert_close(pair.a, other.a)
    torch.testing.assert_close(bias, torch.full((4,), 0.94), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("damping", [0.1, 1.0])
def test_a_natural_gradient_is_the_inverse_fisher_matrixs(damping):
    """Dense: lambda (lambda I + G G^T)^-1 g, with as many gradients as are remembered."""
    pair, memory = drawn(0), 3
    optimizer = Natural(memory=memory, damping=damping).build([pair], Group([pair.b, pair.a], 0.01), EMPTY)
    seen: list[Tensor] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append(pair.a.grad.clone()))
    given = [target(seed)[:RANK] for seed in range(5)]
    for gradient in given:
        pair.a.grad = gradient.clone()
        optimizer.step()
    for step, found in enumerate(seen):
        recent = torch.stack([each.flatten() for each in given[max(0, step + 1 - memory) : step + 1]], dim=1)
        ridge = damping * recent.square().sum(0).mean() * torch.eye(len(recent), dtype=torch.float64)
        expected = ridge @ torch.linalg.solve(ridge + recent @ recent.T, recent[:, -1])
        torch.testing.assert_close(found.flatten(), expected)
    assert "recent" not in optimizer.state.get(pair.b, {})


def test_a_natural_gradient_damps_what_gradients_share():
    shared, own = torch.zeros(2, 4, dtype=torch.float64), torch.zeros(2, 4, dtype=torch.float64)
    shared[0, 0], own[1, 1] = 1.0, 0.1
    recent = torch.stack([shared, shared, shared, shared + own])
    found = natural(recent, 0.01)
    assert found[1, 1] / found[0, 0] > 10 * own[1, 1] / shared[0, 0]
    assert not natural(torch.zeros(3, 2, 4), 1.0).any()
