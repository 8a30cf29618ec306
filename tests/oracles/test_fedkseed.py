"""FedKSeed against its paper: what walks, what a slope is, what crosses, and that a replay is the node's own walk."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from client_app.training import Training, Turn, train
from common import tasks, wire
from common.adapter.draws import layer_seed, signs
from common.adapter.lora import Lora
from common.adapter.seeded import POOL, Seeded
from common.adapter.structures import stacked
from common.adapter.values import Key, State, Update
from common.config.run import LoraConfig, ModelConfig, RunConfig
from common.models import adapted
from common.models.adapted import LoraModel
from common.tasks import Example
from strategies import Recipe
from strategies.gradients import Zeroth
from strategies.rules import FedKSeed
from tests.support.factors import initial, spec, trained

PATH = [(7 * place) % 97 + 5 for place in range(24)]
EXAMPLES = [Example(PATH[start:], PATH[start:]) for start in range(4)]
SETTINGS = {"rule.name": "fedkseed", "adapter.seeded.seeds": 16, "train.batch-size": 2, "train.warmup": 0.0}


def wearing(structure: Seeded | Lora) -> LoraModel:
    lora = LoraConfig.model_validate({"rank": 2, "alpha": 4.0})
    return adapted.load(ModelConfig(quantization="none"), lora, RunConfig().task, "cpu", structure)


def learned(recipe: Recipe, seed: str = "node") -> tuple[LoraModel, State, Training]:
    """A round of a node's: its model, what it started from, and what it did."""
    model = wearing(recipe.structure)
    state = recipe.start(model.spec, 0)
    model.install(state.adapter, state.scale, state.offset)
    turn = Turn(0, [POOL], seed=seed)
    return model, state, train(model, recipe, tasks.build(recipe.config.task), EXAMPLES, turn)


def outputs(model: LoraModel) -> Tensor:
    model.network.eval()
    with torch.no_grad():
        return model.logits(tasks.build(RunConfig().task).collate(EXAMPLES, model.pad))


def finalised(word: int) -> int:
    """lowbias32, in integers of any length."""
    word ^= word >> 16
    word = word * 0x7FEB352D % 2**32
    word ^= word >> 15
    word = word * 0x846CA68B % 2**32
    return word ^ word >> 16


def test_signs_are_the_bits_of_the_hash_and_directions_are_apart():
    rows = signs(torch.arange(64), 1000, "l:A")
    one = signs(torch.tensor([7]), 33, "l:A")[0]
    assert torch.equal(rows[7, :33], one)
    seed = finalised(7 + layer_seed(0, 0, "l:A") % 2**31)
    words = [finalised(seed ^ finalised(place)) for place in (0, 1)]
    assert one.tolist() == [2 * (words[place // 32] >> place % 32 & 1) - 1 for place in range(33)]
    assert set(rows.unique().tolist()) == {-1.0, 1.0}
    products = rows @ rows.T / 1000 - torch.eye(64)
    assert float(products.abs().max()) < 5 / math.sqrt(1000)
    assert float((products.square().sum() / (64 * 63)).sqrt()) == pytest.approx(1 / math.sqrt(1000), rel=0.1)
    other = signs(torch.arange(64), 1000, "l:B")
    assert float((rows @ other.T / 1000).abs().max()) < 5 / math.sqrt(1000)


def test_what_the_server_rebuilds_is_where_the_node_is():
    """After a round of plain SGD under a schedule and a clip: over w_0 and the scalars alone, in another model."""
    recipe = Recipe.read(SETTINGS | {"train.steps": 8, "train.learning-rate": 0.01})
    node, state, _ = learned(recipe)
    update = Update(recipe.send(state, node.tensors()), 1.0, state.scale)
    reached = outputs(node)
    at = {
        (layer, part): getattr(module, f"lora_{part}")["default"].weight
        + getattr(module, f"lora_{part}")["default"]._walked.float()
        for layer, module in node.layers.items()
        for part in "AB"
    }
    merged = recipe.aggregate(state, [update])
    assert merged.adapter[POOL].count_nonzero() > 3
    factors = stacked(merged)
    plain = wearing(Lora())
    plain.install(factors, 1.0, {})
    torch.testing.assert_close(outputs(plain), reached, rtol=1e-4, atol=1e-4)
    for (layer, part), weight in at.items():
        scale = state.scale if part == "B" else 1.0
        torch.testing.assert_close(factors[Key(layer, part)], scale * weight, rtol=0, atol=1e-6)


def test_a_round_is_the_papers_algorithm():
    """A step moves w by rate times slope along one direction, found here from the losses of two whole adapters."""
    rate, epsilon = 1e-3, 1e-3
    settings = {"train.steps": 1, "train.schedule": "constant", "train.clip-norm": 0.0, "train.learning-rate": rate}
    recipe = Recipe.read(SETTINGS | settings | {"train.batch-size": len(EXAMPLES)})
    node, state, _ = learned(recipe)
    moved = node.tensors()[POOL]
    ((seed,),) = moved.nonzero().tolist()
    assert all(torch.equal(node.tensors()[key], tensor) for key, tensor in state.adapter.items() if key != POOL)
    losses = []
    for side in (epsilon, -epsilon):
        pool = torch.zeros(16).index_fill(0, torch.tensor([seed]), side)
        plain = wearing(Lora())
        plain.install(stacked(State(state.adapter | {POOL: pool}, state.scale)), 1.0, {})
        score = plain.score(tasks.build(recipe.config.task), EXAMPLES, len(EXAMPLES))
        losses.append(score.loss / score.count)
    slope = (losses[0] - losses[1]) / (2 * epsilon)
    assert float(moved[seed]) == pytest.approx(-rate * slope, rel=0.02)
    layer = next(iter(node.layers))
    start = state.adapter[Key(layer, "A")].double()
    directions = signs(torch.arange(16), start.numel(), f"{layer}:A")
    expected = start + (moved.double()[:, None] * directions).sum(0).view_as(start)
    _, factor = recipe.structure.factors(node.tensors(), layer)
    np.testing.assert_allclose(factor, expected, atol=1e-7)


def test_a_slope_is_the_central_difference_by_the_scalar_that_moves():
    scalars = [nn.Parameter(torch.tensor([value])) for value in (0.3, -0.2)]
    scalars[0].requires_grad_(False)
    start = scalars[1].detach().clone()

    def loss() -> Tensor:
        return (scalars[0] ** 2 + 3 * scalars[1] ** 2 + 2 * scalars[0] * scalars[1]).sum()

    value = Zeroth(epsilon=0.05).fill(loss, scalars)
    slope = float(6 * start + 0.6)
    assert scalars[0].grad is None
    assert float(scalars[1].grad) == pytest.approx(slope, rel=1e-4)
    assert float(value) == pytest.approx(float(loss().detach()) + 3 * 0.05**2, rel=1e-4)
    assert torch.equal(scalars[1].detach(), start), "where it began, to the bit"
    Zeroth(epsilon=0.05).fill(loss, scalars)
    assert float(scalars[1].grad) == pytest.approx(2 * slope, rel=1e-4)


def test_a_step_that_is_too_steep_is_clipped_and_not_skipped():
    """What the published code calls a clip leaves the step out."""
    settings = {"train.steps": 6, "train.schedule": "constant", "train.learning-rate": 0.01, "train.clip-norm": 1e-6}
    node, _, _ = learned(Recipe.read(SETTINGS | settings))
    moved = node.tensors()[POOL]
    steps = moved[moved != 0].abs() / 1e-8
    assert len(steps)
    torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-2)


def test_the_loss_is_looked_at_without_dropout():
    recipe = Recipe.read(SETTINGS | {"train.steps": 1})
    model = wearing(recipe.structure)
    seen = []
    next(iter(model.layers.values())).register_forward_pre_hook(lambda layer, _: seen.append(layer.training))
    state = recipe.start(model.spec, 0)
    model.install(state.adapter, state.scale, state.offset)
    train(model, recipe, tasks.build(recipe.config.task), EXAMPLES, Turn(0, [POOL]))
    assert seen == [False, False]


def test_nodes_draw_seeds_of_their_own_and_one_node_the_same_again():
    recipe = Recipe.read(SETTINGS | {"train.steps": 2})
    one, again, other = (learned(recipe, seed)[0].tensors()[POOL] for seed in ("one", "one", "other"))
    assert torch.equal(one, again)
    assert not torch.equal(one != 0, other != 0)


@pytest.mark.parametrize("seeds", [1024, 4096])
@pytest.mark.parametrize("width", [64, 4096])
def test_what_crosses_is_k_scalars_whatever_the_model(seeds, width):
    rule = FedKSeed(adapter=Seeded(seeds=seeds))
    recipe = Recipe.around(rule)
    state = State({POOL: torch.zeros(seeds), Key("l", "A"): torch.zeros(2, width)}, 2.0)
    update = Update(trained(rule, state, 0, 1.0).tensors, 1.0, 2.0)
    assert list(update.tensors) == [POOL]
    record = wire.pack_update(update, rule.name, 0, "node")
    sent = sum(len(array.data) for array in record.values())
    assert 4 * seeds <= sent <= 4 * seeds + 256
    assert sent < 18_000
    assert recipe.left_out(equipped=False) == {"A", "B"}


def test_a_mean_of_scalars_is_the_mean_of_the_factors():
    rule = FedKSeed(adapter=Seeded(seeds=32))
    state = initial(rule, spec(rule))
    updates = [trained(rule, state, seed, 1.0 + seed) for seed in range(3)]
    models = [rule.model(state, update) for update in updates]
    merged = rule.aggregate(state, updates)
    for layer in state.layers():
        factors = [rule.structure.factors(model.adapter, layer) for model in models]
        for side, factor in enumerate(rule.structure.factors(merged.adapter, layer)):
            mean = sum((1 + seed) / 6 * own[side] for seed, own in enumerate(factors))
            torch.testing.assert_close(factor, mean, rtol=1e-4, atol=1e-5)


@pytest.mark.exhaustive
def test_the_loss_falls_by_forward_passes_alone():
    settings = {"adapter.seeded.seeds": 1024, "train.steps": 300}
    _, _, training = learned(Recipe.read(SETTINGS | settings))
    _, _, short = learned(Recipe.read(SETTINGS | settings | {"train.steps": 10}))
    assert training.loss < 0.8 * short.loss
