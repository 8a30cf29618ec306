"""Clipping of gradients of any size, of units of several examples, and after a computation that broke off."""

import math

import pytest
import torch
from torch import nn

from client_app.clipping import Clip
from common.config.privacy import PrivacyConfig
from common.error import BouquetError
from tests.support.private_steps import (
    ENGINES,
    EXAMPLES,
    add,
    attach,
    brute_force,
    clipped_sum,
    fresh,
    losses,
    out_of_memory,
    relative,
)


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
        add(attached, model, EXAMPLES, units=whose)
        got = torch.cat([tensor.flatten() for tensor in attached.take().values()])
        assert relative(got, expected) < 1e-5
        # One example that is not finite takes its unit with it, and no other.
        add(attached, model, EXAMPLES, factors=torch.tensor([1, 1, 1, math.nan, 1, 1, 1]), units=whose)
        got = torch.cat([tensor.flatten() for tensor in attached.take().values()])
    expected = (sums * (bound / sums.norm(dim=1)).clamp(max=1.0)[:, None])[:2].sum(0)
    assert relative(got, expected) < 1e-5


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("broken", ["forward", "backward"])
def test_a_computation_that_breaks_off_leaves_nothing_behind(engine, broken):
    model = fresh()
    model.train_only(model.keys)
    expected = clipped_sum(model, EXAMPLES[:2], engine, 1.0)

    with attach(engine, model.network, 1.0) as attached:
        add(attached, model, EXAMPLES[:2])
        losses(model, EXAMPLES[2:])
        if broken == "backward":
            # Some layers have recorded by then.
            middle = model.network.base_model.model.model.layers[1]
            handle = middle.register_full_backward_pre_hook(out_of_memory)
            with pytest.raises(RuntimeError, match="out of memory"):
                add(attached, model, EXAMPLES[2:])
            handle.remove()
        attached.forget()
        got = torch.cat([tensor.flatten() for tensor in attached.take().values()])
        assert torch.equal(got, expected)
        add(attached, model, EXAMPLES[:2])
        assert torch.equal(torch.cat([tensor.flatten() for tensor in attached.take().values()]), expected)


def adaptive(quantile: float, batch: int = 400, start: float = 1.0, noise: float = 1.0) -> Clip:
    wanted = {"mode": "example", "clip": start, "clip-quantile": quantile, "expected-batch": batch}
    return Clip(PrivacyConfig.model_validate(wanted), noise)


def test_a_clip_finds_the_quantile_of_the_norms():
    """Norms spread evenly from 0 to 10: three quarters of them lie below 7.5."""
    norms = torch.linspace(0, 10, 400)
    for start in (0.1, 100.0):
        clip = adaptive(0.75, start=start)
        for _ in range(80):
            clip.follow(float((norms <= clip.norm).sum()) - len(norms) / 2)
        assert clip.norm == pytest.approx(7.5, rel=0.25)


def test_sum_and_count_together_cost_what_the_step_is_charged():
    """Two Gaussian mechanisms on one sample are one, of the root of the sum of their squared inverse multipliers."""
    clip = adaptive(0.5, batch=64)
    count = 0.05 * 64 / 0.5  # the count's noise over the half by which one unit moves it
    assert (clip.mechanism.noise_multiplier**-2 + count**-2) ** -0.5 == pytest.approx(1.0)
    assert adaptive(0.0).mechanism.noise_multiplier == 1.0


def test_the_count_is_noised_as_the_paper_has_it():
    steps = []
    for _ in range(400):
        clip = adaptive(0.5, batch=100)
        clip.follow(0.0)  # as many within as beyond: only the noise moves it
        steps.append(math.log(clip.norm) / -0.2 * 100)
    assert torch.tensor(steps).std() == pytest.approx(5.0, rel=0.15)  # 0.05 B


def test_a_clip_stays_where_no_quantile_is_asked_for_and_within_its_range():
    fixed = adaptive(0.0)
    fixed.follow(200.0)
    assert fixed.norm == 1.0
    clip = adaptive(0.9, start=1e4)
    for _ in range(20):
        clip.follow(-200.0)
    assert clip.norm == 1e4


def test_a_batch_too_small_to_count_is_refused():
    with pytest.raises(
        BouquetError, match=r"too small to noise its count .*expected an expected batch above 10, got 8"
    ):
        adaptive(0.5, batch=8)


def test_the_engine_counts_the_units_within_its_bound():
    network = nn.Linear(4, 1, bias=False)
    examples = torch.eye(4) * torch.tensor([0.5, 0.9, 2.0, float("nan")])[:, None]
    with attach("fast", network, 1.0) as engine:
        engine.add(network(examples)[:, 0])
        assert engine.take_surplus() == 2 - 4 / 2
        engine.add(network(examples)[:, 0], torch.tensor([0, 0, 1, 1]))
        # The first two are one unit of norm 1.03, and what is not finite is not within.
        assert engine.take_surplus() == -1.0
        assert engine.take_surplus() == 0.0
