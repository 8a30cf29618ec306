"""A start that is taken from the base model and public data, for the rules that want one."""

from itertools import islice

from common import base, models, sources, tasks
from common.adapter import State
from common.config import RunConfig
from strategies import FedSB


def from_public_data(rule: FedSB, state: State, config: RunConfig) -> State:
    """LoRA-SB's start, from the gradient of the loss on the first examples of ``rule.source``.

    Here alone, and in central evaluation, the coordinator loads the base model; it needs as much memory again for the
    gradients of the adapted layers, in float32.
    """
    task = tasks.build(config.task)
    tokenizer = base.load_tokenizer(config.model)
    dataset = sources.read(rule.source)
    task.check(dataset.column_names, where=rule.source)
    encoded = (example for record in dataset for example in task.encode(record, tokenizer))
    model = models.load(config.model, config.lora, config.task, "auto", rule.blocks)
    model.install(state.adapter, state.scale, state.offset)
    gradients = model.gradients(task, list(islice(encoded, rule.examples)), int(tokenizer.pad_token_id))
    return rule.from_gradient(state, gradients.__getitem__)
