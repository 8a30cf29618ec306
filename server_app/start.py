"""What a start has to see of the base model: gradients of public data."""

from collections.abc import Callable

from torch import Tensor

from common import tasks
from common.models import adapted, base, lengths
from common.models.gradients import gradients
from common.sources import dealing
from common.sources.records import fields
from strategies import Recipe
from strategies.inits import GradientInit


def seen(recipe: Recipe, init: GradientInit) -> Callable[[str], Tensor]:
    """By layer, the gradient that ``init`` wants to see, by the frozen weight.

    Here alone, and in central evaluation, the coordinator loads the base model; it needs as much memory again for the
    gradients of the adapted layers, in float32.
    """
    config, source, count = recipe.config, init.source, init.examples
    tokenizer = base.load_tokenizer(config.model)
    # Each record is an example or more, unless it is left out.
    found = dealing.read(source, f"init.{init.name}.source")[: 4 * count]
    task = lengths.fitted(config.task, config.model, found, tokenizer)
    task.check(fields(found), where=source)
    encoded, _ = tasks.encoded(task, found, tokenizer)
    examples = [example for record in encoded for example in record][:count]
    # From LoRA's own start, where the model is the base model: an adapter lets a gradient reach its layer.
    model = adapted.load(config.model, config.lora, config.task, "auto", recipe.structure)
    state = Recipe.around(recipe.rule, config).start(model.spec, config.seed)
    model.install(state.adapter, state.scale, state.offset)
    return gradients(model, task, examples).__getitem__
