"""One private step on the embedded model: its examples, its gradients, and a loop that does the same."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import replace
from functools import cache, partial

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from client_app.privacy import train_privately
from client_app.training import Turn
from common import tasks
from common.adapter.core import Core
from common.adapter.lora import Lora
from common.config.privacy import PrivacyConfig
from common.config.run import LoraConfig, ModelConfig, TaskConfig, TrainConfig
from common.models import adapted, base, observed
from common.tasks import Example
from strategies import Recipe
from strategies.gradients import GRADIENTS, Fast
from strategies.gradients.hooks import OpacusHooks
from strategies.rules import FedIT, Ravan
from tests.support.training import recipe_of

TEXT = tasks.build(TaskConfig())
LENGTHS = (30, 12, 25, 7, 30, 18, 3)
EXAMPLES = [Example([1, *range(10 + i, 9 + i + n)], [1, *range(10 + i, 9 + i + n)]) for i, n in enumerate(LENGTHS)]


LORA = Lora()
ENGINES = [name for name, gradient in GRADIENTS.items() if gradient.engine]


def attach(name, network, bound, clipping="flat", sequences=False):
    """The engine of this name on a network."""
    return GRADIENTS[name]().attach(network, bound, clipping, sequences)


@cache
def embedded(quantization):
    """The base as it is loaded, once a process."""
    return base.load(ModelConfig.model_validate({"quantization": quantization}), 0, torch.device("cpu"))


def fresh(quantization="nf4", rank=8, checkpointing=None, structure=LORA):
    """The embedded model with factors that all matter."""
    network = deepcopy(embedded(quantization))
    if checkpointing is not None:
        network.activation_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
    return scattered(adapted.LoraModel(network, LoraConfig(rank=rank), structure))


def scattered(model):
    generator = torch.Generator().manual_seed(1)
    structure = model.spec.structure
    rule = Ravan(heads=structure.blocks) if isinstance(structure, Core) else FedIT(adapter=structure)
    seen = partial(observed.weight, model) if structure.measured else None
    state = Recipe.around(rule).start(model.spec, 0, seen)
    noise = {key: 0.02 * torch.randn(t.shape, generator=generator) for key, t in state.adapter.items()}
    tensors = {key: t if key.part in structure.measured else t + noise[key] for key, t in state.adapter.items()}
    model.install(tensors, state.scale, {})
    model.network.train()
    return model


def losses(model, examples, task=TEXT):
    return task.losses(model.outputs(task.collate(examples, 0)))


def add(engine, model, examples, task=TEXT, units=None, factors=1.0):
    """Add the losses of examples, times ``factors``, to an engine's sum."""
    with model.padded() if isinstance(engine, OpacusHooks) else nullcontext():
        output = model.outputs(task.collate(examples, 0))
    engine.add(task.losses(output) * factors, units, output.rows)


def brute_force(model, parameters, examples, task=TEXT):
    """Every example's gradient by itself, in float64: rows of one long vector."""
    rows = []
    for example in examples:
        losses(model, [example], task).sum().backward()
        rows.append(torch.cat([parameter.grad.double().flatten() for parameter in parameters]))
        model.network.zero_grad(set_to_none=True)
    return torch.stack(rows)


def clipped_sum(model, examples, engine, bound, clipping="flat", split=4, task=TEXT):
    """What an engine makes of ``examples`` in two physical batches: one long vector."""
    with attach(engine, model.network, bound, clipping) as attached:
        for part in (examples[:split], examples[split:]):
            if part:
                add(attached, model, part, task)
        return torch.cat([tensor.flatten() for tensor in attached.take().values()])


def relative(got, expected):
    return float((got - expected).norm() / expected.norm())


def out_of_memory(*_):
    raise RuntimeError("out of memory")


PLAIN = TrainConfig.model_validate({"batch-size": 4, "learning-rate": 0.01, "clip-norm": 0.0})


PRIVATE = PrivacyConfig.model_validate({"mode": "example", "expected-batch": 4})


def train_here(model, examples, release, privacy=PRIVATE, config=PLAIN, task=TEXT, units=None):
    """One round on ``units``, or on ``examples`` of which each is one."""
    units = [[example] for example in examples] if units is None else units
    recipe = recipe_of(config, gradient=Fast())
    recipe = replace(recipe, config=recipe.config.model_copy(update={"privacy": privacy}))
    return train_privately(model, recipe, task, units, Turn(0, model.keys), release)


@contextmanager
def gradients() -> Iterator[list[torch.Tensor]]:
    """What the optimizer sees, of all that has a gradient: one long vector a step."""
    seen: list[torch.Tensor] = []

    def look(optimizer, *_):
        gradients = [parameter.grad for parameter in optimizer.param_groups[0]["params"]]
        seen.append(torch.cat([each.double().flatten() for each in gradients if each is not None]))

    handle = register_optimizer_step_pre_hook(look)
    yield seen
    handle.remove()


def within(value, expected, deviation):
    return abs(value - expected) <= 5 * deviation
