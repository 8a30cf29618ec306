"""A node's training of its adapter: every quantisation learns, and the base stays what it was."""

import math

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt

from client_app.training import Turn, schedule, steps_in_round, train
from common import tasks
from common.config.run import TrainConfig
from common.error import BouquetError
from strategies.objectives import FedProx, Plain
from tests.support.embedded import EXAMPLES, TEXT, base_digest, fresh, start, train_a_little
from tests.support.training import recipe_of, train_plainly


@pytest.mark.parametrize(
    ("quantization", "kind"), [("nf4", Linear4bit), ("int8", Linear8bitLt), ("none", torch.nn.Linear)]
)
def test_every_quantisation_learns_and_leaves_the_base_alone(quantization, kind):
    model = fresh(quantization)
    assert isinstance(model.network.get_submodule("base_model.model.model.layers.0.mlp.up_proj").base_layer, kind)
    if quantization == "nf4":
        weight = model.network.get_submodule("base_model.model.model.layers.0.mlp.up_proj").base_layer.weight
        assert weight.quant_state.quant_type == "nf4"
        assert weight.quant_state.nested
    start(model)
    before, task = base_digest(model), tasks.build(TEXT)
    loss = model.score(task, EXAMPLES, 4).loss
    train_a_little(model, steps=6)
    assert model.score(task, EXAMPLES, 4).loss < 0.8 * loss
    assert base_digest(model) == before


def test_an_evaluation_does_not_spoil_the_next_training():
    """On CPUs with bfloat16 units, bitsandbytes would repack the weights and drop the gradient."""
    plain, evaluated = fresh(), fresh()
    losses = []
    for model in (plain, evaluated):
        start(model)
        if model is evaluated:
            model.score(tasks.build(TEXT), EXAMPLES, 4)
        train_a_little(model)
        losses.append({key: tensor.sum().item() for key, tensor in model.tensors().items()})
    assert losses[0] == losses[1]


def test_only_what_is_named_is_trained():
    model = fresh()
    start(model)
    before = model.tensors()
    train_a_little(model, [key for key in model.keys if key.part == "B"])
    for key, tensor in model.tensors().items():
        assert torch.equal(tensor, before[key]) == (key.part == "A")


def test_checkpointing_and_accumulation_change_nothing_but_memory():
    plain, checkpointed = fresh("none"), fresh("none", **{"gradient-checkpointing": True})
    for model in (plain, checkpointed):
        start(model)
        train_a_little(model)
    for key, tensor in plain.tensors().items():
        torch.testing.assert_close(tensor, checkpointed.tensors()[key], rtol=1e-4, atol=1e-5)


def test_the_schedule_spans_all_rounds():
    config = TrainConfig.model_validate({"warmup": 0.1, "schedule": "cosine"})
    factor = schedule(config, 100)
    assert factor(0) < factor(5) < factor(10) == 1.0
    assert factor(99) < 0.01
    assert schedule(TrainConfig.model_validate({"schedule": "constant", "warmup": 0.0}), 10)(9) == 1.0
    assert schedule(TrainConfig.model_validate({"schedule": "linear", "warmup": 0.0}), 10)(5) == 0.5


def test_a_proximal_term_keeps_the_factors_near_where_they_started():
    moved = []
    for mu in (0.0, 100.0):
        model = fresh()
        before = start(model).adapter
        config = TrainConfig.model_validate({"steps": 8, "batch-size": 4, "learning-rate": 0.005, "clip-norm": 0.0})
        recipe = recipe_of(config, objective=FedProx(mu=mu) if mu else Plain())
        train(model, recipe, tasks.build(TEXT), EXAMPLES, Turn(0, model.keys, seed="s"))
        moved.append(sum(float((tensor - before[key]).square().sum()) for key, tensor in model.tensors().items()))
    assert 0 < moved[1] < 0.5 * moved[0]


def test_epochs_count_every_example():
    config = TrainConfig.model_validate({"steps": 0, "epochs": 2, "batch-size": 4, "accumulation": 2})
    assert steps_in_round(config, 17) == 6


def test_a_loss_that_is_not_finite_stops_the_round_with_a_reason():
    model = fresh()
    state = start(model)
    model.install({key: tensor * math.nan for key, tensor in state.adapter.items()}, state.scale, {})
    config = TrainConfig.model_validate({"steps": 1, "batch-size": 4})
    with pytest.raises(
        BouquetError, match=r"the training loss is not finite \(round 1, step .*Lower train.learning-rate"
    ):
        train_plainly(model, tasks.build(TEXT), EXAMPLES, config)
