"""``LoraStrategy`` in Flower's own loop, as a Flower user would call it."""

import pytest
from flwr.app import ConfigRecord, RecordDict

from common import wire
from common.models import adapted
from strategies import Recipe
from strategies.strategy import LoraStrategy, choose
from tests.support.grid import InProcessGrid


@pytest.mark.parametrize("rule", ["fedit", "ffa-lora", "fedex-lora", "flora"])
def test_flowers_own_loop_gives_what_our_loop_gives(rule, settings):
    config = settings(**{"rule.name": rule})
    recipe = Recipe.read(config)
    grid = InProcessGrid(config, nodes=2)
    strategy = LoraStrategy(recipe)
    run = recipe.config
    spec = adapted.describe(run.model, run.lora, run.task)
    result = strategy.start(grid=grid, initial_arrays=strategy.initial_arrays(spec), num_rounds=2, timeout=60)
    _, state = wire.unpack_state(result.arrays, rule=rule)
    assert state.round == 2
    losses = [metrics["loss"] for metrics in result.evaluate_metrics_clientapp.values()]
    assert losses[1] < losses[0]
    assert result.train_metrics_clientapp[1]["steps"] == 3


def test_a_bad_reply_is_refused_in_flowers_own_loop_too(settings, caplog):
    config = settings()
    recipe = Recipe.read(config)
    grid = InProcessGrid(
        config, nodes=2, tamper={0: lambda content: RecordDict({"failure": ConfigRecord({"reason": "no disk"})})}
    )
    strategy = LoraStrategy(recipe)
    run = recipe.config
    arrays = strategy.initial_arrays(adapted.describe(run.model, run.lora, run.task))
    result = strategy.start(grid=grid, initial_arrays=arrays, num_rounds=1, timeout=60)
    assert wire.unpack_state(result.arrays, rule="fedit")[1].round == 1


def test_a_sample_is_repeatable_and_changes_from_round_to_round():
    nodes = list(range(100, 120))
    draws = [choose(nodes, 0.25, seed=3, round=step) for step in range(8)]
    assert draws == [choose(nodes, 0.25, seed=3, round=step) for step in range(8)]
    assert {len(draw) for draw in draws} == {5}
    assert len({tuple(draw) for draw in draws}) > 1
    assert choose(nodes, 0.001, seed=0, round=0)
