"""LoRA-Pro against theorem 2.2: the layer's step is the nearest to full fine-tuning's that its factors can make."""

import pytest
import torch
from torch import Tensor, nn

from common.adapter.structure import Pair
from strategies.optimizers import Group, LoraPro
from strategies.optimizers.lora_pro import adjust

D_OUT, D_IN, RANK, SCALE = 12, 9, 3, 2.0
UNDAMPED = 1e-12


def pair_and_gradient(seed: int, trained: str = "BA") -> tuple[Pair, Tensor]:
    """Factors in float64 with their gradients, and the gradient by the layer's own weight that these come from."""
    generator = torch.Generator().manual_seed(seed)
    b, a, g = (
        torch.randn(shape, dtype=torch.float64, generator=generator)
        for shape in ((D_OUT, RANK), (RANK, D_IN), (D_OUT, D_IN))
    )
    pair = Pair(nn.Parameter(b), nn.Parameter(a), SCALE)
    pair.b.grad = SCALE * g @ a.T if "B" in trained else None
    pair.a.grad = SCALE * b.T @ g if "A" in trained else None
    return pair, g


def projector(columns: Tensor) -> Tensor:
    """On the span of the columns."""
    return columns @ torch.linalg.pinv(columns)


def of_the_layer(pair: Pair) -> Tensor:
    """What a small step along the factors' gradients is a step of the layer along: ``s B gA + s gB A``."""
    total = torch.zeros(len(pair.b), pair.a.shape[1], dtype=torch.float64)
    if pair.a.grad is not None:
        total += pair.scale * pair.b.detach() @ pair.a.grad
    if pair.b.grad is not None:
        total += pair.scale * pair.b.grad @ pair.a.detach()
    return total


@pytest.mark.parametrize("seed", range(5))
def test_the_layers_gradient_is_all_that_the_factors_can_reach(seed):
    pair, g = pair_and_gradient(seed)
    adjust(pair, UNDAMPED)
    p_b, p_a = projector(pair.b.detach()), projector(pair.a.detach().T)
    missed = (torch.eye(D_OUT) - p_b) @ g @ (torch.eye(D_IN) - p_a)
    torch.testing.assert_close(of_the_layer(pair), g - missed, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("seed", range(5))
def test_of_all_gradients_that_do_so_it_is_the_nearest_to_the_factors_own(seed):
    """X is free: B gains B E, A loses E A, and the layer's gradient stays."""
    pair, _ = pair_and_gradient(seed)
    own_b, own_a = pair.b.grad.clone(), pair.a.grad.clone()
    adjust(pair, UNDAMPED)
    layer = of_the_layer(pair)
    got_b, got_a = pair.b.grad.clone(), pair.a.grad.clone()
    least = (got_b - own_b).square().sum() + (got_a - own_a).square().sum()
    generator = torch.Generator().manual_seed(seed)
    for _ in range(20):
        shift = 1e-3 * torch.randn(RANK, RANK, dtype=torch.float64, generator=generator)
        pair.b.grad, pair.a.grad = got_b - pair.b.detach() @ shift, got_a + shift @ pair.a.detach()
        torch.testing.assert_close(of_the_layer(pair), layer)
        assert (pair.b.grad - own_b).square().sum() + (pair.a.grad - own_a).square().sum() > least


@pytest.mark.parametrize("seed", range(3))
def test_where_b_is_zero_a_keeps_its_gradient_and_b_takes_what_a_reaches(seed):
    pair, g = pair_and_gradient(seed)
    with torch.no_grad():
        pair.b.zero_()
    pair.a.grad = torch.zeros_like(pair.a)
    adjust(pair, UNDAMPED)
    assert not pair.a.grad.any()
    torch.testing.assert_close(of_the_layer(pair), g @ projector(pair.a.detach().T), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("trained", ["B", "A"])
def test_beside_a_frozen_factor_the_other_reaches_what_it_can(trained):
    pair, g = pair_and_gradient(0, trained)
    adjust(pair, UNDAMPED)
    reached = g @ projector(pair.a.detach().T) if trained == "B" else projector(pair.b.detach()) @ g
    torch.testing.assert_close(of_the_layer(pair), reached, rtol=1e-7, atol=1e-7)
    assert (pair.a.grad is None) == (trained == "B")
    assert (pair.b.grad is None) == (trained == "A")


@pytest.mark.parametrize("size", [1e-30, 1e-8])
def test_damping_bounds_what_a_factor_of_next_to_nothing_magnifies(size):
    """The noise of a private run has no part in B's span, and B starts at next to nothing."""
    pair, _ = pair_and_gradient(0)
    with torch.no_grad():
        pair.b[:, 1:].mul_(size)
    own = pair.b.grad.norm() + pair.a.grad.norm()
    adjust(pair, 1e-3)
    assert pair.b.grad.norm() + pair.a.grad.norm() < 1e4 * own


def least_squares(pair: Pair, g: Tensor, step_b: Tensor, step_a: Tensor) -> float:
    """Half the squared distance of the layer from a target at ``-g``, after a small step of its factors."""
    moved = pair.scale * (pair.b.detach() @ step_a + step_b @ pair.a.detach())
    return float((g + moved).square().sum() / 2)


@pytest.mark.parametrize("seed", range(4))
def test_no_other_step_lowers_least_squares_more(seed):
    """Along the factors' own gradients not even the best of all lengths does."""
    pair, g = pair_and_gradient(seed)
    own_b, own_a = pair.b.grad.clone(), pair.a.grad.clone()
    along = of_the_layer(pair)
    length = float((g * along).sum() / along.square().sum())
    adjust(pair, UNDAMPED)
    lowest = least_squares(pair, g, -pair.b.grad, -pair.a.grad)
    assert (
        lowest < least_squares(pair, g, -length * own_b, -length * own_a) < least_squares(pair, g, 0 * own_b, 0 * own_a)
    )
    generator = torch.Generator().manual_seed(seed)
    for size in (1e-3, 1e-2, 1e-1):
        other_b, other_a = (
            -own - size * torch.randn(own.shape, dtype=torch.float64, generator=generator)
            for own in (pair.b.grad, pair.a.grad)
        )
        assert lowest < least_squares(pair, g, other_b, other_a)


def test_torchs_adamw_steps_along_the_adjusted_gradients():
    pair, _ = pair_and_gradient(0)
    start_b, start_a = pair.b.detach().clone(), pair.a.detach().clone()
    optimizer = LoraPro(damping=1e-3).build([pair], Group([pair.b, pair.a], 0.01), Group([], 0.01))
    expected, _ = pair_and_gradient(0)
    adjust(expected, 1e-3)
    optimizer.step()
    for moved, start, gradient in ((pair.b, start_b, expected.b.grad), (pair.a, start_a, expected.a.grad)):
        torch.testing.assert_close(moved.detach(), start - 0.01 * gradient.sign(), rtol=0, atol=1e-6)
