"""Methods that are not built (docs/methods.md), taken literally, each in the smallest case where it goes wrong."""

import pytest
import torch
from torch import Tensor

from common.adapter.values import Key
from strategies.rules import FlexLora
from tests.support.factors import layer_of, product


def florg(last: Tensor, nodes: list[Tensor], shares: list[float]) -> Tensor:
    """FLoRG's next A (arXiv:2602.17095): the mean of A^T A, factored, and turned towards the last A (Procrustes)."""
    gram = sum(share * a.T @ a for share, a in zip(shares, nodes, strict=True))
    values, vectors = torch.linalg.eigh(gram)
    root = values.clamp_min(0).sqrt()[:, None] * vectors.T
    u, _, vh = torch.linalg.svd(last @ root.T, full_matrices=False)
    return u @ vh @ root


def test_florgs_broadcast_loses_what_lies_outside_of_the_last_rows():
    """Two nodes of one slot, of which one has learned another direction than the slot had: nothing of it arrives."""
    first, second = torch.eye(6)[:1], torch.eye(6)[1:2]
    sent = florg(first, [first, second], [0.5, 0.5])
    torch.testing.assert_close(sent, first / 2**0.5, rtol=0, atol=1e-6)
    mean = (first.T @ first + second.T @ second) / 2
    assert (sent.T @ sent - mean).norm() == pytest.approx(mean.norm() / 2**0.5)


def test_no_a_of_florg_takes_an_update_back():
    """A^T A has no negative direction, so that the opposite of an update is as far off as nothing at all."""
    a = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    update = a.T @ a
    nearest, vectors = torch.linalg.eigh(-update)
    best = vectors @ torch.diag(nearest.clamp_min(0)) @ vectors.T
    assert best.norm() < 1e-5 * update.norm()


def test_florg_squares_the_noise_of_privacy_into_a_bias():
    generator = torch.Generator().manual_seed(0)
    a, deviation = torch.randn(4, 8, generator=generator), 0.5
    noised = a + deviation * torch.randn(20_000, 4, 8, generator=generator)
    bias = (noised.mT @ noised).mean(0) - a.T @ a
    torch.testing.assert_close(bias, 4 * deviation**2 * torch.eye(8), rtol=0, atol=0.1)


def nearly_accurate(b: Tensor, a: Tensor, shares: Tensor) -> Tensor:
    """FLoRA-NA (arXiv:2509.26399): (sum u_k B_k)(sum v_k A_k) nearest to sum p_k B_k A_k, by least squares in turns.

    ``b`` is ``K x d_out x r``, ``a`` is ``K x r x d_in``.
    """
    ideal = torch.einsum("k,kor,kri->oi", shares, b, a)
    u, v = shares, shares
    for _ in range(200):
        products = (b @ torch.einsum("k,kri->ri", v, a)).flatten(1)
        u = torch.linalg.lstsq(products.T, ideal.flatten()).solution
        products = (torch.einsum("k,kor->or", u, b) @ a).flatten(1)
        v = torch.linalg.lstsq(products.T, ideal.flatten()).solution
    return torch.einsum("k,kor->or", u, b) @ torch.einsum("k,kri->ri", v, a)


def test_no_combination_of_the_nodes_factors_comes_nearer_than_the_svd():
    state, updates, ideal = layer_of(FlexLora())
    b, a = (torch.stack([update.tensors[Key("l", part)] for update in updates]).double() for part in "BA")
    shares = torch.tensor([update.weight for update in updates], dtype=torch.float64) / 6
    averaged = state.scale * torch.einsum("k,kor->or", shares, b) @ torch.einsum("k,kri->ri", shares, a)
    combined, cut = state.scale * nearly_accurate(b, a, shares), product(FlexLora().aggregate(state, updates))
    errors = [(matrix - ideal).norm().item() for matrix in (averaged, combined, cut)]
    assert errors[0] > errors[1] > 1.05 * errors[2]


@pytest.mark.parametrize(("zeta", "together"), [(1.0, False), (0.0, True)])
def test_nodes_of_fedsmoothlora_each_train_alone_for_ever(zeta, together):
    """arXiv:2605.29460 without a cut, on quadratics: with zeta = 1 a node starts where its last round ended."""
    optima = torch.tensor([[4.0, 0.0], [0.0, 4.0], [-4.0, -4.0]])
    backbone, learned, merged = torch.zeros(2), torch.zeros(3, 2), torch.zeros(2)
    alone = torch.zeros(3, 2)
    for turn in range(40):
        node = backbone + (zeta * (learned - merged) if turn else 0) + torch.zeros(3, 2)
        for _ in range(5):
            node = node - 0.05 * (node - optima)
            alone = alone - 0.05 * (alone - optima)
        learned = node - backbone
        merged = learned.mean(0)
        backbone = backbone + merged
    assert torch.allclose(node, alone, atol=1e-4) == (not together)
    apart = (node - node.mean(0)).norm() / (optima - optima.mean(0)).norm()
    assert apart > 0.99 if not together else apart < 0.3
