"""Central evaluation: the coordinator scores a state on held-out data of its own, if it is given any."""

from collections.abc import Callable

from common.adapter.values import State
from common.error import BouquetError
from common.models import adapted, lengths
from common.sources import dealing
from common.tasks import Score
from strategies import Recipe


def central(recipe: Recipe) -> Callable[[State], Score]:
    """A function that scores a state on ``evaluation.source``; alone on this side, it loads the base model.

    Raises :class:`BouquetError` where there is no global model to score.
    """
    config = recipe.config
    if recipe.own_models:
        raise BouquetError(
            "there is no global model to score centrally",
            where=f"evaluation.source, rule.name = '{recipe.rule.name}', task.head = '{config.task.head}'",
            cure="Leave evaluation.source empty: every node scores its own model.",
        )
    source = config.evaluation.source
    found = dealing.read(source, "evaluation.source")
    task, encoded, _ = lengths.encoded(config.task, config.model, found, source)
    examples = [example for record in encoded for example in record][: config.evaluation.limit or None]

    def score(state: State) -> Score:
        model = adapted.load(config.model, config.lora, config.task, "auto", recipe.structure)
        model.resize(state.ranks)  # kept, it may have been a node's of a smaller rank
        model.install(state.adapter, state.scale, state.offset)
        return model.score(task, examples, config.evaluation.batch_size)

    return score
