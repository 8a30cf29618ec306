"""Rules at the width of real layers, where a bound, a tolerance or a scale shows that small layers hide."""

from dataclasses import replace

import pytest
import torch

from common.adapter.algebra import recompress
from common.adapter.spec import Spec
from common.adapter.values import Key, LayerShape, State
from strategies.meter import aggregation_error
from strategies.rules import FedMomentum, FlexLora
from strategies.rules.stack import RestartRule, Stack
from tests.support.factors import LAWFUL, WIDE, after_a_round, initial, product, recipe, trained

A, B = Key("l", "A"), Key("l", "B")
RANK = 8
SHARES = (1.0, 2.0, 3.0, 4.0, 5.0)

rules = pytest.mark.parametrize("rule", LAWFUL.values(), ids=list(LAWFUL))


def relative(one: torch.Tensor, two: torch.Tensor) -> float:
    return (torch.linalg.norm(one - two) / torch.linalg.norm(two)).item()


@rules
def test_exact_rules_are_exact_and_the_meter_says_what_the_others_lose(rule):
    state = after_a_round(rule, WIDE, RANK, nodes=3)
    updates = [trained(rule, state, seed, share) for seed, share in enumerate(SHARES)]
    merged = rule.aggregate(state, updates)
    models = [product(rule.model(state, update)) for update in updates]
    ideal = sum(share / sum(SHARES) * model for share, model in zip(SHARES, models, strict=True))
    if rule.exact:
        assert relative(product(merged), ideal) < 1e-5
    elif rule.keeps == "nothing":
        lost = relative(product(merged), ideal)
        assert 1e-3 < lost < 1
        assert aggregation_error(rule, state, updates, merged)["l"] == pytest.approx(lost, rel=1e-3)


def looks_drawn_as_in_peft(a: torch.Tensor) -> bool:
    """Uniform within 1 / sqrt(d_in): kaiming's bound for a = sqrt 5."""
    bound = a.shape[1] ** -0.5
    return 0.98 * bound < a.abs().max() <= bound and abs(a.std() / bound - 3**-0.5) < 0.01


@rules
def test_a_start_has_the_sizes_of_pefts(rule):
    head = Key("classifier", "W")
    spec = Spec({"l": LayerShape(96, 1024)}, {head: (6, 512)}, RANK, 2.0, rule.structure)
    start = initial(rule, spec, seed=0)
    if rule.start_at == "orthonormal":
        torch.testing.assert_close(start.adapter[A] @ start.adapter[A].T, torch.eye(RANK), rtol=0, atol=1e-6)
    else:
        assert looks_drawn_as_in_peft(start.adapter[A])
    assert start.adapter[head].std().item() == pytest.approx(0.02, rel=0.05)
    if isinstance(rule, RestartRule):
        assert looks_drawn_as_in_peft(recipe(rule).draw(spec, 0, 3)[A])


@pytest.mark.parametrize("rule", [FedMomentum(), FlexLora(), LAWFUL["hetlora"]], ids=lambda rule: rule.name)
def test_a_slot_that_starts_anew_is_drawn_as_at_the_start_each_round(rule):
    layers = {"l": LayerShape(96, 1024)}
    state = initial(rule, Spec(layers, {}, RANK, 2.0), seed=0)
    drawn = []
    for turn in range(2):
        state = rule.aggregate(state, [trained(rule, rule.view(state, 2), turn, 1.0)])
        assert not state.adapter[B][:, 2:].any()
        assert looks_drawn_as_in_peft(state.adapter[A][2:])
        drawn.append(state.adapter[A][2:])
    assert not torch.equal(*drawn)
    again = rule.aggregate(
        initial(rule, Spec(layers, {}, RANK, 2.0), seed=0), [trained(rule, rule.view(state, 2), 0, 1.0)]
    )
    assert torch.equal(again.adapter[A][2:], drawn[0])


def learns(state: State) -> torch.Tensor:
    """Which slots have a gradient: a factor's is a multiple of the other."""
    return state.adapter[A].any(dim=1) | state.adapter[B].any(dim=0)


@pytest.mark.parametrize(
    "rule",
    [rule for rule in LAWFUL.values() if rule.keeps == "nothing" and rule.start_at == "drawn"],
    ids=lambda rule: rule.name,
)
def test_no_slot_dies_with_one_small_or_idle_reply(rule):
    state = after_a_round(rule, WIDE, RANK, nodes=2)
    small = rule.view(state, 1 if rule.mixed_ranks else RANK, draw=0)
    narrow = trained(rule, small, 1, 1.0)
    held = {key: torch.zeros_like(t) if rule.relative else small.adapter[key] for key, t in narrow.tensors.items()}
    still = replace(narrow, tensors=held)
    empty = replace(narrow, tensors={key: t * (key.part != "B") for key, t in narrow.tensors.items()})
    for update in (narrow, still, empty):
        alone = rule.aggregate(state, [update])
        assert learns(alone).all()
        twice = rule.aggregate(alone, [trained(rule, rule.view(alone, RANK), 2, 1.0)])
        assert learns(twice).all()


@pytest.mark.parametrize("name", ["fedmomentum", "flexlora", "hetlora"])
def test_to_start_a_slot_anew_leaves_the_model_as_it_was(name):
    rule = LAWFUL[name]
    state = after_a_round(rule, WIDE, RANK, nodes=2)
    update = trained(rule, rule.view(state, 2), 1, 1.0)
    whole = product(rule.model(rule.view(state, 2), update))
    torch.testing.assert_close(product(rule.aggregate(state, [update])), whole, rtol=1e-4, atol=1e-5)


def test_the_cut_is_float64s_at_a_layer_of_4096():
    """At float32's epsilon, times the width, whatever is below 1 / 2,000 of the largest would be lost."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(4096, 6, dtype=torch.float64, generator=generator))[0] for _ in range(2))
    singular = 10.0 ** -torch.arange(0, 9, 1.5, dtype=torch.float64)
    thin = recompress(torch.cat([left * singular] * 2, dim=1), torch.cat([right.T] * 2))
    assert thin[0].shape == (4096, 6)
    inner = left.T @ thin[0] @ thin[1] @ right
    torch.testing.assert_close(inner.diagonal(), 2 * singular, rtol=1e-5, atol=0)

    stack = Stack(torch.cat([left * singular] * 2, dim=1), torch.cat([right.T] * 2), torch.ones(12))
    split = FedMomentum().split(stack, 4, 1.0, seed=0)
    assert split.q is not None
    assert split.q.shape == (4096, 2)
    assert FedMomentum().split(stack, 9, 1.0, seed=0).q.shape == (4096, 0)
