"""The laws of a task: examples that have a loss of their own, and what it compares with."""

from common import tasks
from common.error import BouquetError
from common.method import listed
from common.tasks import TASKS
from common.tasks.embed import Embed
from strategies.choices import Choices


def check(choices: Choices) -> None:
    """Raise :class:`BouquetError` where the task ties examples together that have to stand apart, or knows no start."""
    task, privacy = TASKS[choices.config.task.name], choices.config.privacy
    if privacy.per_example and not task.apart:
        raise BouquetError(
            f"in the task '{task.name}' an example's loss depends on the rest of its batch, so clipping does not "
            "bound what it adds",
            where="task.name, privacy.mode = 'example'",
            expected=listed([name for name, kind in TASKS.items() if kind.apart]),
            got=task.name,
            cure="Choose another task, or privacy.mode = 'update-local' or 'update-central'.",
        )
    if not choices.gradient.heads and tasks.classes(choices.config.task) and choices.config.task.head != "frozen":
        raise BouquetError(
            f"the gradient '{choices.gradient.name}' is of the adapter alone, and a head would never learn",
            where="task.head, gradient.name",
            expected="frozen",
            got=choices.config.task.head,
            cure="Set task.head = 'frozen', ask in words (task.name = 'instruct'), or choose another rule.",
        )
    if issubclass(task, Embed) and choices.config.task.negatives == "batch":
        _check_companions(choices)
    if task.compares and choices.config.model.adapter:
        raise BouquetError(
            f"the task '{task.name}' compares with the bare base, not with an adapter that the run starts from",
            where="task.name, model.adapter",
            expected="model.adapter = ''",
            got=choices.config.model.adapter,
            cure="Merge the adapter into its base (bouquet export --form merged) and name that as model.name.",
        )


def _check_companions(choices: Choices) -> None:
    """In-batch negatives need a batch, and tie its examples to each other."""
    privacy, size = choices.config.privacy, choices.config.train.batch_size
    if privacy.per_example:
        raise BouquetError(
            "with in-batch negatives an example's loss depends on the rest of its batch, so clipping does not bound "
            "what it adds",
            where="task.negatives, privacy.mode = 'example'",
            expected="own",
            got="batch",
            cure="Set task.negatives = 'own', which needs a negative in every record, or choose "
            "privacy.mode = 'update-local' or 'update-central'.",
        )
    if size < 2:
        raise BouquetError(
            "a batch of one record has no in-batch negatives",
            where="task.negatives = 'batch', train.batch-size",
            expected="2 or more; 32 learns more than 8",
            got=str(size),
            cure="Raise train.batch-size (train.accumulation gives no negatives), or set task.negatives = 'own'.",
        )
