"""Clipping of gradients of any size, of units of several examples, and after a computation that broke off."""

import math

import pytest
import torch
from torch import nn

from client_app.per_example import ENGINES, attach
from tests.test_per_example import EXAMPLES, brute_force, clipped_sum, fresh, losses, relative


def gradients_of(rows):
    """A layer and losses whose per-example gradients are exactly ``rows`` (N x d)."""
    layer = nn.Linear(rows.shape[1], 1, bias=False)
    return layer, lambda: layer(rows)[:, 0]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("clipping", ["flat", "automatic"])
@pytest.mark.parametrize(("size", "bound"), [(1e-24, 1e-30), (1e-42, 1e-44), (1e-30, 1.0), (1e30, 1.0), (3e38, 1e-30)])
def test_every_finite_gradient_is_clipped_whatever_its_size(engine, clipping, size, bound):
    """In float32 the squares of the smallest vanish, so that nothing is clipped, and those of the largest overflow."""
    rows = size * torch.rand(6, 4, generator=torch.Generator().manual_seed(0))
    layer, compute = gradients_of(rows)
    norms = rows.double().norm(dim=1)
    factors = bound / (norms + 0.01) if clipping == "automatic" else (bound / norms).clamp(max=1.0)
    with attach(engine, layer, bound, clipping) as attached:
        attached.add(compute())
        (got,) = attached.take().values()
        assert relative(got[0] / bound, (rows.double() * factors[:, None]).sum(0) / bound) < 1e-9
        for row in rows:
            attached.add(layer(row[None])[:, 0])
            assert float((attached.take()[layer.weight] / bound).norm()) <= 1 + 1e-6


def test_what_no_factor_can_bound_exactly_counts_as_zero():
    """A subnormal factor has few bits: what it scales would be up to half as long again."""
    rows = torch.logspace(29, 31, 200)[:, None].repeat(1, 4)
    layer, _ = gradients_of(rows)
    with attach("fast", layer, 1e-292) as engine:
        for row in rows:
            engine.add(layer(row[None])[:, 0])
            assert float((engine.take()[layer.weight] / 1e-292).norm()) <= 1 + 1e-6


@pytest.mark.parametrize("engine", ENGINES)
def test_the_gradients_of_a_unit_are_one_and_are_clipped_as_one(engine):
    model = fresh()
    parameters = model.train_only(model.keys)
    whose = torch.tensor([0, 1, 0, 2, 1, 0, 2])
    rows = brute_force(model, parameters, EXAMPLES)
    sums = torch.stack([rows[whose == unit].sum(0) for unit in range(3)])
    bound = float(sums.norm(dim=1).median())
    expected = (sums * (bound / sums.norm(dim=1)).clamp(max=1.0)[:, None]).sum(0)
    with attach(engine, model.network, bound) as attached:
        attached.add(losses(model, EXAMPLES), whose)
        got = torch.cat([tensor.flatten() for tensor in attached.take().values()])
        assert relative(got, expected) < 1e-5
        # One example that is not finite takes its unit with it, and no other.
        attached.add(losses(model, EXAMPLES) * torch.tensor([1, 1, 1, math.nan, 1, 1, 1]), whose)
        got = torch.cat([tensor.flatten() for tensor in attached.take().values()])
    expected = (sums * (bound / sums.norm(dim=1)).clamp(max=1.0)[:, None])[:2].sum(0)
    assert relative(got, expected) < 1e-5


def out_of_memory(*_):
    raise RuntimeError("out of memory")


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("broken", ["forward", "backward"])
def test_a_computation_that_breaks_off_leaves_nothing_behind(engine, broken):
    model = fresh()
    model.train_only(model.keys)
    expected = clipped_sum(model, EXAMPLES[:2], engine, 1.0)

    with attach(engine, model.network, 1.0) as attached:
        attached.add(losses(model, EXAMPLES[:2]))
        values = losses(model, EXAMPLES[2:])
        if broken == "backward":
            # Some layers have recorded by then.
            middle = model.network.base_model.model.model.layers[1]
            handle = middle.register_full_backward_pre_hook(out_of_memory)
            values = losses(model, EXAMPLES[2:])
            with pytest.raises(RuntimeError, match="out of memory"):
                attached.add(values)
            handle.remove()
        attached.forget()
        got = torch.cat([tensor.flatten() for tensor in attached.take().values()])
        assert torch.equal(got, expected)
        attached.add(losses(model, EXAMPLES[:2]))
        assert torch.equal(torch.cat([tensor.flatten() for tensor in attached.take().values()]), expected)
