"""The embedded model with its adapter, at hand: loaded, started, and trained for a few steps."""

import hashlib

import torch

from common import tasks
from common.adapter.values import Key, State
from common.config.run import LoraConfig, ModelConfig, TaskConfig, TrainConfig
from common.models import adapted, base
from common.tasks import Example
from strategies.rules import FedIT
from tests.support.factors import initial
from tests.support.training import train_plainly

LORA = LoraConfig()
TEXT = TaskConfig()
EXAMPLES = [Example([1, *range(10 + i, 40 + i)], [1, *range(10 + i, 40 + i)]) for i in range(16)]


def fresh(quantization: str = "nf4", lora: LoraConfig = LORA, **settings: object) -> adapted.LoraModel:
    model = ModelConfig.model_validate({"quantization": quantization, **settings})
    return adapted.LoraModel(base.load(model, 0, torch.device("cpu")), lora)


def base_digest(model: adapted.LoraModel) -> str:
    """SHA-256 over everything that is neither adapter nor head."""
    sha = hashlib.sha256()
    for name, tensor in sorted(model.network.state_dict().items()):
        if "lora_" not in name:
            sha.update(name.encode() + tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def start(model: adapted.LoraModel, seed: int = 0) -> State:
    state = initial(FedIT(), model.spec, seed)
    model.install(state.adapter, state.scale, {})
    return state


def train_a_little(model: adapted.LoraModel, keys: list[Key] | None = None, steps: int = 4) -> float:
    config = TrainConfig.model_validate({"steps": steps, "batch-size": 4, "learning-rate": 0.01})
    task = tasks.build(TEXT)
    return train_plainly(model, task, EXAMPLES, config, keys or ()).loss
