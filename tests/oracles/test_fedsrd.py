"""What the paper, and its published code, say of FedSRD."""

import pytest
import torch

from common.adapter.spec import Spec
from common.adapter.values import Key, LayerShape, State, Tensors, Update
from strategies.rules import FedSRD
from strategies.rules.fedsrd import kurtosis
from tests.support.factors import initial, product, trained

A, B = Key("l", "A"), Key("l", "B")
WHOLE = FedSRD(least=0.0, reach=0.0)
"""Sends all that has changed."""


def begun() -> State:
    return initial(WHOLE, Spec({"l": LayerShape(40, 30)}, {}, 4, 0.5))


def learned() -> State:
    return WHOLE.aggregate(begun(), [trained(WHOLE, begun(), seed, 1.0) for seed in (7, 8)])


def of_kurtosis(fourth: int, count: int) -> torch.Tensor:
    """Values of which one in ``fourth`` is off the middle, to either side alike."""
    values = torch.full((count,), 5.0)
    values[: count // fourth] = torch.arange(count // fourth) % 2 * 2.0 + 4
    return values


@pytest.mark.parametrize(("fourth", "share"), [(1, 0.15), (2, 1 - 0.85 - 0.0693147), (3, 1 - 0.95986), (10, 0.04)])
def test_the_share_that_is_sent_follows_from_the_kurtosis(fourth, share):
    importance = of_kurtosis(fourth, 60_000)
    assert kurtosis(importance) == pytest.approx(fourth)
    sent = FedSRD()._thinned(torch.ones(60_000), importance)
    assert int(sent.count_nonzero()) == round(share * 60_000)
    assert sent.sum().item() == pytest.approx(60_000, rel=1e-6)
    assert not FedSRD()._thinned(torch.zeros(60_000), importance).any()


def test_those_values_are_sent_that_change_the_product_most():
    state = learned()
    local = {
        key: t + torch.randn(t.shape, generator=torch.Generator().manual_seed(3)) for key, t in state.adapter.items()
    }
    sent = FedSRD(least=0.9, reach=0.0).send(state, local)
    for key in (A, B):
        change = local[key] - state.adapter[key]
        effects = torch.empty_like(change)
        for place in torch.cartesian_prod(*map(torch.arange, change.shape)).tolist():
            one = torch.zeros_like(change)
            one[tuple(place)] = change[tuple(place)]
            effects[tuple(place)] = (local[B] @ one if key == A else one @ state.adapter[A]).norm()
        kept = sent[key] != 0
        assert int(kept.sum()) == round(0.1 * change.numel())
        assert effects[kept].min() >= effects[~kept].max()
        torch.testing.assert_close(sent[key].abs().sum(), change.abs().sum())
        ratio = sent[key][kept] / change[kept]
        torch.testing.assert_close(ratio, torch.full_like(ratio, ratio[0].item()))


def mean_of_products(state: State, updates: list[Update]) -> torch.Tensor:
    models = [{key: state.adapter[key].double() + update.tensors[key] for key in (A, B)} for update in updates]
    total = sum(update.weight for update in updates)
    return sum(u.weight / total * m[B] @ m[A] for u, m in zip(updates, models, strict=True))


def factors(state: State) -> Tensors:
    return {key: tensor.double() for key, tensor in state.adapter.items()}


@pytest.mark.parametrize("turn", ["B", "A"])
def test_the_server_refits_one_factor_to_the_mean_of_the_products(turn):
    state = begun() if turn == "B" else learned()
    updates = [trained(WHOLE, state, seed, seed + 1.0) for seed in range(3)]
    ideal, before, after = mean_of_products(state, updates), factors(state), factors(WHOLE.aggregate(state, updates))
    change = ideal - before[B] @ before[A]
    if turn == "B":
        torch.testing.assert_close(after[B], before[B] + change @ torch.linalg.pinv(before[A]), rtol=1e-4, atol=1e-5)
        assert torch.equal(after[A], before[A])
        slope = (after[B] @ after[A] - ideal) @ after[A].T
    else:
        torch.testing.assert_close(after[A], before[A] + torch.linalg.pinv(before[B]) @ change, rtol=1e-4, atol=1e-5)
        assert torch.equal(after[B], before[B])
        slope = after[B].T @ (after[B] @ after[A] - ideal)
    assert slope.abs().max() < 1e-3  # no nearer product with the other factor as it is


def test_the_first_round_of_fedsrd_is_not_lost():
    """The published turns begin with A, whose change is B^+ D, and B is zero."""
    assert product(FedSRD().aggregate(begun(), [trained(FedSRD(), begun(), 0, 1.0)])).norm() > 0.1


def test_a_direction_that_is_next_to_nothing_blows_nothing_up():
    state = learned()
    state.adapter[B][:, 3] = state.adapter[B][:, 2] * (1 + 1e-6)
    merged = WHOLE.aggregate(state, [trained(WHOLE, state, seed, 1.0) for seed in range(2)])
    assert merged.adapter[A].abs().max() < 100
