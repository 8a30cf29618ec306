"""Run directories and adapter folders of trained-looking states, without the training."""

import json
from functools import partial
from pathlib import Path

import torch

from common.adapter.algebra import digest
from common.adapter.values import HEAD, Key, State, Tensors, Update
from common.config.run import RunConfig
from common.models import adapted, observed
from common.record import checkpoint
from common.record.export import export
from strategies import Recipe, read_config


def trained(config: RunConfig, rounds: int = 2, seed: int = 0) -> State:
    """The state after rounds in which three nodes made large random changes."""
    recipe = Recipe.build(config)
    spec = adapted.describe(config.model, config.lora, config.task, recipe.structure)
    places = (config.model, config.lora, config.task, "cpu", recipe.structure)
    seen = partial(observed.weight, adapted.load(*places)) if recipe.sees == "weights" else None
    state = recipe.start(spec, config.seed, seen)
    generator = torch.Generator().manual_seed(seed)

    def changed(tensors: Tensors) -> Tensors:
        return {
            key: tensor + (0.3 if key.part in HEAD else 0.05) * torch.randn(tensor.shape, generator=generator)
            for key, tensor in tensors.items()
        }

    for _ in range(rounds):
        sent = {key: tensor for key, tensor in state.adapter.items() if recipe.sends(state.round, key)}
        state = recipe.aggregate(state, [Update(changed(sent), 1.0, state.scale) for _ in range(3)])
    return state


def made(folder: Path, targets: str = "q_proj,v_proj") -> str:
    """An adapter of rank 8 of the embedded model, as a run would have left it."""
    config = read_config({"lora.targets": targets})
    export(trained(config), config, folder / "adapter", with_head=True)
    return str(folder / "adapter")


def run_directory(folder: Path, *, finished: bool = True, **settings: object) -> tuple[RunConfig, State]:
    """What a run with these settings leaves in ``folder``, and the state that it came to."""
    config = read_config({"run-name": folder.name, **settings})
    state = trained(config)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"run": folder.name, "config": config.to_flower()}))
    checkpoint.save(folder / "checkpoints", state, config.rule)
    if finished:
        figures = {"metric": "perplexity", "before": {"all": 90.25}, "after": {"all": 30.5}}
        summary = {"rounds": state.round, "adapter_digest": digest(state.adapter | state.offset), **figures}
        (folder / "summary.json").write_text(json.dumps(summary))
        export(state, config, folder / "adapter", with_head=True)
    return config, state


def dense(state: State, layer: str) -> torch.Tensor:
    """The whole update of one layer, ``d_out x d_in``, put together without the code under test."""
    adapter, offset = state.adapter, state.offset
    a, core = adapter[Key(layer, "A")], adapter.get(Key(layer, "R"))
    if core is not None:
        a = torch.block_diag(*core.split(core.shape[1])) @ a
    update = state.scale * adapter[Key(layer, "B")] @ a
    if Key(layer, "Q") in offset:
        update = update + offset[Key(layer, "Q")] @ offset[Key(layer, "P")]
    return update
