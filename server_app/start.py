"""What a start is made of besides the config: what an init has to see, and an existing adapter."""

from collections.abc import Callable
from functools import partial

from torch import Tensor

from common.adapter.algebra import squared_norm
from common.adapter.values import HEAD, Key, State, Tensors
from common.models import adapted, lengths, observed
from common.sources import dealing
from strategies import Recipe
from strategies.inits import PublicInit


def seen(recipe: Recipe, given: Tensors | None = None) -> Callable[[str], Tensor]:
    """By layer, what the recipe's init has to see of the base model; examples see it with the adapter ``given``.

    Here alone, and in central evaluation, the coordinator loads the base model; for gradients it needs as much memory
    again, for those of the adapted layers in float32.
    """
    config, init = recipe.config, recipe.init
    load = partial(adapted.load, config.model, config.lora, config.task, "auto", recipe.structure)
    if not isinstance(init, PublicInit):
        return partial(observed.weight, load())
    # Each record is an example or more, unless it is left out.
    found = dealing.read(init.source, f"init.{init.name}.source")[: 4 * init.examples]
    task, encoded, _ = lengths.encoded(config.task, config.model, found, init.source)
    examples = [example for record in encoded for example in record][: init.examples]
    # From a start that adds nothing, in all that is trained: an adapter lets a gradient reach its layer.
    model = load()
    state = Recipe.around(recipe.rule, config).start(model.spec, config.seed, given=given)
    model.install(state.adapter, state.scale, state.offset)
    look = observed.gradients if init.sees == "gradients" else observed.inputs
    return look(model, task, examples).__getitem__


def told(recipe: Recipe, given: Tensors, state: State) -> str:
    """What becomes of the adapter that a run starts from, in a sentence."""
    ranks = {key.layer: tensor.shape[1] for key, tensor in given.items() if key.part == "Q"}
    least, most = min(ranks.values()), max(ranks.values())
    rank = f"{most}" if least == most else f"{least} to {most}"
    head = " and a head" if any(key.part in HEAD for key in given) else ""
    said = f"starts from the adapter {recipe.config.model.adapter}: rank {rank} in {len(ranks)} layers{head}; "
    if not recipe.continues:
        return f"{said}it becomes the offset beneath the run's own start"
    if all(rank <= len(state.adapter[Key(layer, "A")]) for layer, rank in ranks.items()):
        return f"{said}it becomes the factors"
    share = _energy(given, state, list(ranks))
    return f"{said}{share:.1%} of its energy goes into the factors, the rest into the offset"


def _energy(given: Tensors, state: State, layers: list[str]) -> float:
    """The share of the squared singular values of an adapter that a state's factors have."""
    kept = whole = 0.0
    for layer in layers:
        b, a, q, p = (Key(layer, part) for part in "BAQP")
        kept += float(squared_norm(state.scale * state.adapter[b], state.adapter[a]))
        whole += float(squared_norm(given[q], given[p]))
    return kept / whole if whole else 1.0
