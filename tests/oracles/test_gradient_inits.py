"""Starts that see a gradient: what their papers promise of the first step, and that a 4-bit base stays as it is."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from common.adapter.spec import Spec
from common.adapter.structures import stacked
from common.adapter.values import Key, LayerShape, State
from common.config.run import LoraConfig, ModelConfig
from common.models import adapted, base
from common.models.observed import gradients
from strategies import Recipe
from strategies.inits import LoraGA, LoraSB, PublicInit
from strategies.rules import FedIT, FedSB, Rule
from tests.support.private_steps import EXAMPLES, TEXT

LAYER = LayerShape(40, 24)
RANK = 4
A, B = Key("l", "A"), Key("l", "B")


def gradient(seed: int = 0) -> Tensor:
    """With a spectrum that falls off, as gradients' do."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(LAYER, generator=generator) @ torch.diag(0.8 ** torch.arange(float(LAYER.d_in)))


def started(rule: Rule, init: PublicInit, seen: Tensor) -> State:
    recipe = replace(Recipe.around(rule), init=init)
    return recipe.start(Spec({"l": LAYER}, {}, RANK, 2.0, rule.structure), 0, lambda _: seen)


@pytest.mark.parametrize("seed", range(3))
def test_the_first_step_of_lora_ga_is_the_best_of_its_rank(seed):
    """It has the cosine with -G that the best rank-2r approximation of G has."""
    g = gradient(seed)
    state = started(FedIT(), LoraGA(source="public.jsonl"), g)
    a, b = state.adapter[A], state.adapter[B]
    # One small step of gradient descent: dB = -s G A^T, dA = -s B^T G.
    step = state.scale**2 * -(g @ a.T @ a + b @ b.T @ g)
    cosine = float((step * -g).sum() / step.norm() / g.norm())
    singular = torch.linalg.svdvals(g.double())
    best = float(singular[: 2 * RANK].square().sum().sqrt() / singular.square().sum().sqrt())
    assert cosine == pytest.approx(best, abs=1e-4)
    assert cosine <= best + 1e-6


@pytest.mark.parametrize("stable", [4.0, 16.0])
def test_the_size_of_lora_ga_goes_by_the_outputs_alone(stable):
    """zeta = d_out^(1/4) / sqrt(stable), whatever the size of the gradient."""
    small, large = (
        started(FedIT(), LoraGA(source="public.jsonl", stable=stable), size * gradient()) for size in (1e-3, 1e3)
    )
    zeta = LAYER.d_out**0.25 / stable**0.5
    for state in (small, large):
        a, b = state.adapter[A], state.adapter[B]
        torch.testing.assert_close(a @ a.T, zeta**2 * torch.eye(RANK), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(b.T @ b, zeta**2 * torch.eye(RANK), rtol=1e-4, atol=1e-5)


def test_lora_ga_starts_at_the_base_model():
    state = started(FedIT(), LoraGA(source="public.jsonl"), gradient())
    assert state.adapter[B].any()
    factors = stacked(state)
    assert float((factors[B] @ factors[A]).abs().max()) < 1e-6


@pytest.mark.parametrize("size", [(3, 24), (24, 3)])
def test_a_layer_smaller_than_twice_the_rank_has_slots_to_spare(size):
    """They are zero; what the gradient has is used."""
    recipe = replace(Recipe.around(FedIT()), init=LoraGA(source="public.jsonl"))
    state = recipe.start(Spec({"l": LayerShape(*size)}, {}, RANK, 2.0), 0, lambda _: torch.randn(size))
    factors = stacked(state)
    assert float((factors[B] @ factors[A]).abs().max()) < 1e-6
    assert state.adapter[A].any()


@pytest.mark.parametrize(
    ("rule", "init"), [(FedIT(), LoraGA(source="public.jsonl")), (FedSB(), LoraSB(source="public.jsonl"))]
)
def test_over_four_bits_a_whole_model_starts_where_its_init_says(rule, init):
    model = adapted.LoraModel(base.load(ModelConfig(), 0, torch.device("cpu")), LoraConfig(), rule.structure)
    recipe = Recipe.around(rule)
    base_model = recipe.start(model.spec, 0)
    model.install(base_model.adapter, base_model.scale, base_model.offset)
    seen = gradients(model, TEXT, EXAMPLES)
    batch = TEXT.collate(EXAMPLES, model.pad)

    def computed(state: State) -> tuple[Tensor, float]:
        model.install(state.adapter, state.scale, state.offset)
        model.network.eval()
        with torch.no_grad():
            return model.logits(batch), float(TEXT.losses(model.outputs(batch)).mean())

    before, loss = computed(base_model)
    after, moved = computed(replace(recipe, init=init).start(model.spec, 0, seen.__getitem__))
    if init.moves:
        assert moved < loss - 1e-3
    else:
        assert float((after - before).norm() / before.norm()) < 1e-5
