"""Laws of an optimizer whose state a node keeps: over all of them, rounds that go on are one long round."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from client_app.memory import Memory
from client_app.optimizer_state import put, taken
from client_app.training import Training, Turn, train
from common import tasks
from common.adapter.values import Key, State, Tensors, Update
from common.config.run import LoraConfig, ModelConfig, RunConfig
from common.models import adapted
from common.models.adapted import LoraModel
from common.tasks import Example
from strategies import Recipe
from strategies.optimizers import OPTIMIZERS
from tests.support.cells import each
from tests.support.grid import run_in_process
from tests.support.outcome import failures
from tests.support.private_runs import PRIVATE

KEPT = {"train.optimizer-state": "kept"}
STEPS = 4
# Moments of torch's kind, of 8 bits, and of no kind of Adam's.
QUICK = {"adamw", "adamw-8bit", "lora-rite", "muon"}
# What is about the noise of a private step has AdamW's state.
PLAIN = [name for name, kind in OPTIMIZERS.items() if not kind.denoises]
optimizers = pytest.mark.parametrize("name", each(PLAIN, QUICK))
TEXT = [(7 * place) % 97 + 5 for place in range(24)]


@pytest.fixture(scope="module")
def model() -> LoraModel:
    """Of a rank at which some moments take 8 bits under ``adamw-8bit``, and some do not."""
    lora = LoraConfig.model_validate({"rank": 24, "alpha": 24.0})
    return adapted.load(ModelConfig(quantization="none"), lora, RunConfig().task, "cpu")


def recipe(rounds: int, optimizer: str, **settings: Any) -> Recipe:
    flat = {"num-server-rounds": rounds, "rule.name": "fedex-lora", "optimizer.name": optimizer, "train.batch-size": 1}
    flat |= {"train.steps": 2 * STEPS // rounds, "train.schedule": "constant", "train.warmup": 0.0}
    return Recipe.read(flat | settings)


def learned(model: LoraModel, recipe: Recipe, memory: Memory) -> tuple[State, Training]:
    """The state after all rounds of a federation of one node, which has one example."""
    assert recipe.rule.exact
    state, task = recipe.start(model.spec, 0), tasks.build(recipe.config.task)
    for number in range(recipe.config.num_server_rounds):
        model.install(state.adapter, state.scale, state.offset)
        kept = memory.load("kept", number)
        training = train(model, recipe, task, [Example(TEXT, TEXT)], Turn(number, model.keys, optimizer_state=kept))
        memory.save("kept", training.optimizer_state, number + 1)
        state = recipe.aggregate(state, [Update(recipe.send(state, model.tensors()), 3.0, state.scale)])
    return state, training


@optimizers
def test_two_rounds_of_n_steps_are_one_of_2n_where_the_state_is_kept(name, model, tmp_path):
    once, _ = learned(model, recipe(1, name), Memory(tmp_path, "once", "node"))
    twice, training = learned(model, recipe(2, name, **KEPT), Memory(tmp_path, "twice", "node"))
    for key, tensor in once.adapter.items():
        torch.testing.assert_close(twice.adapter[key], tensor, rtol=0, atol=1e-6)
    anew, _ = learned(model, recipe(2, name), Memory(tmp_path, "anew", "node"))
    far = [(anew.adapter[key] - tensor).abs().max() > 1e-4 for key, tensor in once.adapter.items()]
    assert (sum(far) > len(far) / 2) == bool(training.optimizer_state)
    kinds = Counter(tensor.dtype for tensor in training.optimizer_state.values())
    assert (kinds[torch.uint8] > 0) == name.endswith("8bit")


@optimizers
def test_what_a_node_keeps_comes_back_from_its_disk_as_it_was(name, model, tmp_path):
    _, training = learned(model, recipe(2, name, **KEPT), Memory(tmp_path, "run", "node"))
    back = Memory(tmp_path, "run", "node").load("kept", 2)
    assert {key: (tensor.dtype, tensor.shape) for key, tensor in back.items()} == {
        key: (tensor.dtype, tensor.shape) for key, tensor in training.optimizer_state.items()
    }
    assert all(torch.equal(back[key], tensor) for key, tensor in training.optimizer_state.items())


def test_a_parameter_of_another_shape_begins_anew_and_the_others_go_on():
    def parameters(*sizes: int) -> dict[Key, torch.nn.Parameter]:
        return {Key(f"l{n}", "A"): torch.nn.Parameter(torch.ones(size)) for n, size in enumerate(sizes)}

    def stepped(own: dict[Key, torch.nn.Parameter]) -> torch.optim.Optimizer:
        for parameter in own.values():
            parameter.grad = torch.ones_like(parameter)
        (optimizer := torch.optim.AdamW(own.values())).step()
        return optimizer

    kept = taken(stepped(old := parameters(2, 3)), old)
    optimizer = torch.optim.AdamW((own := parameters(2, 4)).values())
    put(optimizer, own, kept)
    first, second = own.values()
    assert float(optimizer.state[first]["step"]) == 1
    assert second not in optimizer.state


def test_a_state_that_is_neither_a_tensor_nor_a_number_is_refused():
    optimizer = torch.optim.SGD([parameter := torch.nn.Parameter(torch.ones(1))], lr=0.1)
    optimizer.state[parameter]["history"] = [1.0]
    with pytest.raises(TypeError, match="an optimizer's state that cannot be kept: history, a list"):
        taken(optimizer, {Key("l", "A"): parameter})


def files(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.rglob("*-state-*.safetensors"))


@pytest.mark.slow
@pytest.mark.parametrize("mode", [pytest.param({}, id="plain"), pytest.param(PRIVATE, id="private")])
def test_a_node_keeps_it_a_round_at_a_time_and_a_round_asked_for_again_starts_from_that_of_then(
    mode, settings, tmp_path, monkeypatch
):
    started: list[Tensors] = []

    def look(optimizer: torch.optim.Optimizer, parameters: Any, kept: Tensors) -> None:
        started.append(kept)
        put(optimizer, parameters, kept)

    monkeypatch.setattr("client_app.optimizer_state.put", look)
    config = settings(**mode, **KEPT, **{"min-nodes": 1, "evaluation.every": 0}) | {"num-server-rounds": 2}
    config["privacy.noise-multiplier"] = 4.0 if mode else 0.0
    run_in_process(config, nodes=1)
    assert failures(tmp_path / "run") == []
    assert files(tmp_path / "state") == ["adamw-state-0001.safetensors", "adamw-state-0002.safetensors"]
    (tmp_path / "run/checkpoints/round-0002.safetensors").unlink()
    run_in_process(config | {"resume": True}, nodes=1)
    first, second, again = started
    assert first == {}
    assert second
    assert second.keys() == again.keys()
    assert all(torch.equal(again[key], tensor) for key, tensor in second.items())
    assert {float(tensor) for key, tensor in second.items() if key.layer.startswith("step/")} == {3.0}
