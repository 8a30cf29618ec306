"""The laws between the axes: which choices go together, and what would fit where they do not."""

from common import tasks
from common.adapter.structures import STRUCTURES
from common.adapter.values import FACTORS
from common.error import BouquetError
from common.method import AUTO, listed
from common.tasks import TASKS
from common.tasks.embed import Embed
from strategies.choices import Choices
from strategies.gradients import GRADIENTS, Gradient
from strategies.inits import INITS
from strategies.means import Weighted
from strategies.objectives import OBJECTIVES
from strategies.optimizers import OPTIMIZERS
from strategies.rules import RULES
from strategies.rules.rule import MeanRule, Rule


def check(choices: Choices) -> None:
    """Raise :class:`BouquetError` where two choices clash."""
    _check_rule(choices)
    _check_init(choices)
    _check_node(choices)
    _check_memory(choices)
    _check_optimizer_state(choices)
    _check_privacy(choices)
    _check_task(choices)


def _check_rule(choices: Choices) -> None:
    """What stands on other axes and would be ignored, or is the rule's own to choose."""
    flat, rule = choices.config.methods, choices.rule
    mean, optimizer = flat["mean.name"], flat["server-optimizer.name"]
    if not isinstance(rule, MeanRule) and (mean, optimizer) != ("weighted", "none"):
        raise BouquetError(
            f"the rule '{rule.name}' takes more than a mean",
            where=f"mean.name = '{mean}', server-optimizer.name = '{optimizer}'",
            expected="mean.name = 'weighted' and server-optimizer.name = 'none'",
            cure=f"Rules that take these are {', '.join(n for n, r in RULES.items() if issubclass(r, MeanRule))}.",
        )
    if not rule.suits(rule.adapter):
        raise BouquetError(
            f"the rule '{rule.name}' does not know what to do with this structure",
            where="adapter.name",
            expected=f"'{AUTO}', or {listed([name for name, kind in STRUCTURES.items() if rule.suits(kind())])}",
            got=rule.adapter.name,
            cure=f"Rules that take it are {', '.join(n for n, r in RULES.items() if r.suits(rule.adapter))}.",
        )
    if flat["keep.name"] not in (AUTO, rule.keeps):
        raise BouquetError(
            f"the rule '{rule.name}' goes with another choice",
            where="keep.name",
            expected=f"'{rule.keeps}' or '{AUTO}'",
            got=str(flat["keep.name"]),
        )


def _check_init(choices: Choices) -> None:
    """A start that is not drawn has to fit the structure, and be every node's."""
    rule, init = choices.rule, choices.init
    if init.name == rule.start_at:
        return
    framed = INITS[rule.start_at].orthonormal
    if framed and not init.orthonormal:
        fitting = listed([name for name, kind in INITS.items() if kind.orthonormal])
        raise BouquetError(
            f"an init that does not fit what the rule '{rule.name}' trains",
            where="init.name",
            expected=f"'{AUTO}', or {fitting}",
            got=init.name,
        )
    still = "B" not in rule.structure.trained and not INITS[rule.start_at].zero
    if (init.zero and still) or (init.moves and not rule.structure.cored):
        raise BouquetError(
            f"the structure '{rule.structure.name}' cannot start there",
            where="init.name",
            expected=f"'{AUTO}', or another start than one whose B is zero and stays so, or that leaves the base model",
            got=init.name,
        )
    stays = listed([name for name, kind in INITS.items() if not kind.taken_off()])
    if rule.structure.nested and init.taken_off():
        raise BouquetError(
            f"the structure '{rule.structure.name}' trains leading slots without the others, of a start that is taken "
            "off the base with all of them",
            where="init.name",
            expected=f"'{AUTO}', or {stays}",
            got=init.name,
        )
    if rule.thins and init.taken_off():
        raise BouquetError(
            f"the rule '{rule.name}' sends some of the values of a start that is taken off the base with all of them",
            where="init.name",
            expected=f"'{AUTO}', or {stays}",
            got=init.name,
        )
    if rule.mixed_ranks or rule.restarts or rule.settled:
        raise BouquetError(
            f"the rule '{rule.name}' makes starts of its own, which its init has to agree with",
            where="init.name",
            expected=f"'{AUTO}' or '{rule.start_at}'",
            got=init.name,
        )


def _check_node(choices: Choices) -> None:
    """What a node does with what it trains."""
    fitting = [name for name, kind in OPTIMIZERS.items() if kind.knows(choices.structure)]
    if choices.optimizer.name not in fitting:
        raise BouquetError(
            f"the optimizer '{choices.optimizer.name}' does not know what the rule '{choices.rule.name}' trains",
            where="optimizer.name",
            expected=listed(fitting),
            got=choices.optimizer.name,
        )
    plan = choices.rule.plan(choices.rule.settled)
    if choices.optimizer.alternates() and not plan.trained >= FACTORS:
        raise BouquetError(
            f"the optimizer '{choices.optimizer.name}' trains both factors in turns, '{choices.rule.name}' does not",
            where="optimizer.name",
            expected=listed([name for name in fitting if not OPTIMIZERS[name].alternates()]),
            got=choices.optimizer.name,
        )
    if choices.optimizer.alternates() and not choices.gradient.rests:
        raise BouquetError(
            f"the gradient '{choices.gradient.name}' is of all that is trained, in every step",
            where=f"gradient.name, optimizer.name = '{choices.optimizer.name}'",
            expected=f"'{AUTO}', or {listed([n for n, kind in _gradients(choices.rule).items() if kind.rests])}",
            got=choices.gradient.name,
        )
    if choices.objective.remembers and not _averages_what_it_trains(choices):
        raise BouquetError(
            f"the objective '{choices.objective.name}' sends a correction that '{choices.rule.name}' would merge",
            where="objective.name",
            expected=f"{_forgetful()}, or a rule that averages what it trains",
            got=choices.objective.name,
        )


def _gradients(rule: Rule) -> dict[str, type[Gradient]]:
    """The ways to a gradient of what a rule trains."""
    return {name: kind for name, kind in GRADIENTS.items() if kind.knows(rule.structure)}


def _forgetful() -> str:
    """The objectives that let a node's round out as it is, once."""
    return listed([name for name, kind in OBJECTIVES.items() if not kind.remembers and kind.passes == 1])


def _check_memory(choices: Choices) -> None:
    """What a node remembers corrects a mean over all nodes, and makes one over some of them diverge."""
    share = choices.config.fraction_train
    if choices.objective.remembers and share < 1:
        raise BouquetError(
            f"the objective '{choices.objective.name}' corrects a mean over all nodes, and only some are asked",
            where="objective.name, fraction-train",
            expected="fraction-train = 1.0, or another objective",
            got=f"{share:g}",
        )


def _check_optimizer_state(choices: Choices) -> None:
    """Moments are of the very factors that a node goes on with."""
    if choices.config.train.keeps_optimizer and not _goes_on(choices.rule):
        raise BouquetError(
            f"a node's optimizer cannot go on under the rule '{choices.rule.name}', which gives it other factors or "
            "another rank than it trained",
            where="train.optimizer-state",
            expected=f"'reset', or one of {listed([name for name, kind in RULES.items() if _goes_on(kind)])}",
            got="kept",
        )


def _goes_on(rule: Rule | type[Rule]) -> bool:
    """Whether a round's factors are those of the round before, moved."""
    return not (rule.reframes or rule.restarts or rule.turns or rule.mixed_ranks)


def _averages_what_it_trains(choices: Choices) -> bool:
    """Whether the mean is of the very tensors that a node has trained, but for those that it keeps."""
    rule, kept = choices.rule, frozenset().union(*(keep.parts for keep in choices.keeps))
    plan = rule.plan(rule.settled)
    return isinstance(rule, MeanRule) and not rule.relative and plan.trained <= plan.sent | kept


def _check_privacy(choices: Choices) -> None:
    privacy, rule, name = choices.config.privacy, choices.rule, choices.rule.name
    if privacy.per_example != (choices.gradient.engine is not None):
        raise BouquetError(
            "a gradient that does not fit the privacy mode",
            where=f"gradient.name, privacy.mode = '{privacy.mode}'",
            expected=listed([n for n, k in _gradients(rule).items() if (k.engine is not None) == privacy.per_example]),
            got=choices.gradient.name,
        )
    trained = rule.plan(rule.settled).trained | rule.plan(rule.settled + 1).trained
    if privacy.per_example and (loose := trained & rule.structure.loose):
        raise BouquetError(
            f"the rule '{name}' trains what no linear layer holds, by which a single example has no gradient",
            where="rule.name, privacy.mode = 'example'",
            expected=f"a rule that trains {', '.join(sorted(trained - loose)) or 'linear layers'} alone",
            got=f"{', '.join(sorted(trained))} of '{rule.structure.name}'",
            cure=f"Leave it out where rule.{name}.* has an option for that, or choose another rule.",
        )
    if not choices.gradient.knows(rule.structure):
        raise BouquetError(
            f"the gradient '{choices.gradient.name}' is not one of what the rule '{name}' trains",
            where="gradient.name",
            expected=f"'{AUTO}', or {listed(list(_gradients(rule)))}",
            got=choices.gradient.name,
        )
    if privacy.on and (choices.objective.passes > 1 or choices.objective.remembers):
        raise BouquetError(
            f"the objective '{choices.objective.name}' lets more of the data out than a private run counts",
            where=f"objective.name, privacy.mode = '{privacy.mode}'",
            expected=_forgetful(),
            got=choices.objective.name,
        )
    if privacy.central and not rule.linear:
        linear = ", ".join(other for other, kind in RULES.items() if kind.linear)
        raise BouquetError(
            f"the rule '{name}' needs more of the updates than their mean, so no noise on the mean makes it private",
            where="privacy.mode = 'update-central'",
            expected=f"one of {linear}",
            got=name,
            cure="Choose another rule, or privacy.mode = 'example' or 'update-local', which fit every rule.",
        )
    if privacy.central and isinstance(rule, MeanRule) and rule.mean != Weighted():
        raise BouquetError(
            "a robust mean looks at every update, so no noise on the mean makes it private",
            where="privacy.mode = 'update-central', mean.name",
            expected="weighted",
            got=rule.mean.name,
        )
    if privacy.whole_change and rule.shrinks:
        raise BouquetError(
            f"with the rule '{name}' the size of a message tells what a node learned, and no noise covers a size",
            where="privacy.mode = 'update-local'",
            expected=rule.shrinks,
            cure="Choose another rule, or privacy.mode = 'example', whose training is private as a whole.",
        )


def _check_task(choices: Choices) -> None:
    task, privacy = TASKS[choices.config.task.name], choices.config.privacy
    if privacy.per_example and not task.apart:
        raise BouquetError(
            f"an example of the task '{task.name}' has a loss that depends on its companions, so no clipping bounds "
            "what it adds",
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
            f"the task '{task.name}' compares with the base, and not with an adapter on it that the run starts from",
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
            "with in-batch negatives an example has a loss that depends on its companions, so no clipping bounds what "
            "it adds",
            where="task.negatives, privacy.mode = 'example'",
            expected="own",
            got="batch",
            cure="Set task.negatives = 'own', for which every record needs a negative, or choose "
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
