"""Central evaluation: the coordinator scores a state on held-out data of its own, if it is given any."""

from collections.abc import Callable

from common import tasks
from common.adapter.values import State
from common.config.run import RunConfig
from common.error import BouquetError
from common.models import adapted, base, lengths
from common.sources import dealing
from common.sources.records import fields
from common.tasks import Score
from strategies import RULES, build


def central(config: RunConfig) -> Callable[[State], Score]:
    """A function that scores a state on ``evaluation.source``; alone on this side, it loads the base model.

    Raises :class:`BouquetError` where there is no global model to score.
    """
    if config.task.head == "local" or RULES[config.rule.name].personal:
        raise BouquetError(
            "there is no global model to score centrally",
            where=f"evaluation.source, rule.name = '{config.rule.name}', task.head = '{config.task.head}'",
            cure="Leave evaluation.source empty: every node scores its own model.",
        )
    blocks, tokenizer = build(config).blocks, base.load_tokenizer(config.model)
    found = dealing.read(config.evaluation.source)
    tasks.build(config.task).check(fields(found), where=config.evaluation.source)
    task = lengths.fitted(config.task, config.model, found, tokenizer)
    encoded, _ = tasks.encoded(task, found, tokenizer)
    examples = [example for record in encoded for example in record][: config.evaluation.limit or None]

    def score(state: State) -> Score:
        model = adapted.load(config.model, config.lora, config.task, "auto", blocks)
        model.install(state.adapter, state.scale, state.offset)
        return model.score(task, examples, int(tokenizer.pad_token_id), config.evaluation.batch_size)

    return score
