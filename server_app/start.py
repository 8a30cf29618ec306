"""A start that is taken from the base model and public data, for the rules that want one."""

from common import tasks
from common.adapter.values import State
from common.config.run import RunConfig
from common.models import adapted, base, lengths
from common.sources import dealing
from common.sources.records import fields
from strategies import FedSB


def from_public_data(rule: FedSB, state: State, config: RunConfig) -> State:
    """LoRA-SB's start, from the gradient of the loss on the first examples of ``rule.source``.

    Here alone, and in central evaluation, the coordinator loads the base model; it needs as much memory again for the
    gradients of the adapted layers, in float32.
    """
    tokenizer = base.load_tokenizer(config.model)
    # Each record is an example or more, unless it is left out.
    found = dealing.read(rule.source)[: 4 * rule.examples]
    task = lengths.fitted(config.task, config.model, found, tokenizer)
    task.check(fields(found), where=rule.source)
    encoded, _ = tasks.encoded(task, found, tokenizer)
    examples = [example for record in encoded for example in record][: rule.examples]
    model = adapted.load(config.model, config.lora, config.task, "auto", rule.blocks)
    model.install(state.adapter, state.scale, state.offset)
    gradients = model.gradients(task, examples, int(tokenizer.pad_token_id))
    return rule.from_gradient(state, gradients.__getitem__)
