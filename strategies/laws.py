"""The laws between the axes: which choices go together, and what would fit where they clash."""

from common.adapter import ranks
from common.adapter.structure import LORA
from common.adapter.structures import STRUCTURES
from common.adapter.values import FACTORS
from common.error import BouquetError
from common.method import AUTO, listed
from common.tasks import TASKS
from common.tasks.embed import Embed
from strategies import objective_laws
from strategies.choices import Choices
from strategies.gradients import GRADIENTS
from strategies.inits import INITS
from strategies.means import Weighted
from strategies.optimizers import OPTIMIZERS
from strategies.rules import RULES
from strategies.rules.rule import MeanRule, Rule


def check(choices: Choices) -> None:
    """Raise :class:`BouquetError` where two choices clash."""
    _check_rule(choices)
    _check_form(choices)
    _check_ranks(choices)
    _check_init(choices)
    _check_node(choices)
    objective_laws.check(choices)
    _check_optimizer_state(choices)
    _check_privacy(choices)
    _check_task(choices)


def _check_rule(choices: Choices) -> None:
    """What stands on other axes and would be ignored, or is the rule's own to choose."""
    flat, rule = choices.config.methods, choices.rule
    mean, optimizer = flat["mean.name"], flat["server-optimizer.name"]
    if not isinstance(rule, MeanRule) and (mean, optimizer) != ("weighted", "none"):
        raise BouquetError(
            f"the rule '{rule.name}' needs more than a mean",
            where=f"mean.name = '{mean}', server-optimizer.name = '{optimizer}'",
            expected="mean.name = 'weighted' and server-optimizer.name = 'none'",
            cure=f"Rules that support these are {', '.join(n for n, r in RULES.items() if issubclass(r, MeanRule))}.",
        )
    if not rule.suits(rule.adapter):
        raise BouquetError(
            f"the rule '{rule.name}' does not support this structure",
            where="adapter.name",
            expected=f"'{AUTO}', or {listed([name for name, kind in STRUCTURES.items() if rule.suits(kind())])}",
            got=rule.adapter.name,
            cure=f"Rules that support it are {', '.join(n for n, r in RULES.items() if r.suits(rule.adapter))}.",
        )
    if choices.config.train.blocks and not _can_rest(rule):
        raise BouquetError(
            f"the rule '{rule.name}' chooses what a node trains by all that the model has",
            where="train.blocks",
            expected=f"0, or one of {listed([name for name, kind in RULES.items() if _can_rest(kind())])}",
            got=str(choices.config.train.blocks),
        )
    if flat["keep.name"] not in (AUTO, rule.keeps):
        raise BouquetError(
            f"the rule '{rule.name}' requires another choice",
            where="keep.name",
            expected=f"'{rule.keeps}' or '{AUTO}'",
            got=str(flat["keep.name"]),
        )


def _check_ranks(choices: Choices) -> None:
    """Layers of fewer slots than others."""
    lora, rule, shared_out = choices.config.lora, choices.rule, choices.init.shares_out
    if shared_out and (lora.rank_pattern or not rule.structure.plain):
        raise BouquetError(
            f"the init '{choices.init.name}' shares out the slots of a plain LoRA between all layers",
            where="init.name, lora.rank-pattern, adapter.name",
            expected="lora.rank-pattern = '' and adapter.name = 'lora'",
            got=f"'{lora.rank_pattern}', '{rule.structure.name}'",
        )
    if not lora.rank_pattern and not shared_out:
        return
    if above := {name: rank for name, rank in ranks.read(lora.rank_pattern).items() if rank > lora.rank}:
        raise BouquetError(
            "a layer of more slots than the adapter has",
            where="lora.rank-pattern",
            expected=f"at most {lora.rank} (lora.rank)",
            got=", ".join(f"{name}={rank}" for name, rank in above.items()),
        )
    if not _takes_any_rank(rule):
        raise BouquetError(
            f"the rule '{rule.name}' with the structure '{rule.structure.name}' counts slots across layers",
            where="lora.rank-pattern, init.name",
            expected="one rank for all, or one of "
            f"{listed([name for name, kind in RULES.items() if _takes_any_rank(kind())])} with "
            f"{listed([name for name, kind in STRUCTURES.items() if not kind.nested])}",
            got=lora.rank_pattern or choices.init.name,
        )


def _takes_any_rank(rule: Rule) -> bool:
    """Whether nothing but a node's rank, which cuts all layers, counts slots of more than one layer."""
    lowers = type(rule).next_rank is not Rule.next_rank
    return not (rule.scattered or rule.settled or lowers or rule.structure.nested)


def _can_rest(rule: Rule) -> bool:
    """Whether some of the layers mean to a rule what all of them do."""
    return not (rule.thins or rule.scattered)


def _check_form(choices: Choices) -> None:
    """An adapter that PEFT keeps as something else than a LoRA has to be one that PEFT loads again."""
    structure, model = choices.structure, choices.config.model
    if structure.form == LORA:
        return
    if model.adapter:
        raise BouquetError(
            f"what the structure '{structure.name}' trains is kept as {structure.form}, which holds no LoRA beside it",
            where="adapter.name, model.adapter",
            expected=f"model.adapter = '', or {_one_lora()}",
            got=structure.name,
            cure="Merge the adapter into its base (bouquet export --form merged) and name that as model.name.",
        )
    if structure.measured and not (choices.init.zero and choices.init.sees == "nothing"):
        fitting = [name for name, kind in INITS.items() if kind.zero and kind.sees == "nothing"]
        raise BouquetError(
            f"the structure '{structure.name}' starts at the base's weights, and has no place for an offset",
            where="init.name",
            expected=f"'{AUTO}', or {listed(fitting)}",
            got=choices.init.name,
        )
    if model.quantization in structure.unloadable:
        raise BouquetError(
            f"PEFT loads no {structure.form} over a base that is held like this",
            where="adapter.name, model.quantization",
            expected=f"{_one_lora()}, or another quantization than {listed(sorted(structure.unloadable))}",
            got=f"{structure.name} over {model.quantization}",
        )


def _one_lora() -> str:
    return listed([name for name, kind in STRUCTURES.items() if kind.form == LORA])


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
    if (init.zero and "B" not in rule.structure.trained) or (init.moves and not rule.structure.cored):
        raise BouquetError(
            f"the structure '{rule.structure.name}' cannot start from this init",
            where="init.name",
            expected=f"'{AUTO}', or an init that neither leaves B at zero nor moves the base model",
            got=init.name,
        )
    stays = listed([name for name, kind in INITS.items() if not kind.taken_off()])
    if rule.structure.nested and init.taken_off():
        raise BouquetError(
            f"the structure '{rule.structure.name}' trains leading slots without the others, but the whole start is "
            "subtracted from the base",
            where="init.name",
            expected=f"'{AUTO}', or {stays}",
            got=init.name,
        )
    if rule.thins and init.taken_off():
        raise BouquetError(
            f"the rule '{rule.name}' sends only some values of a start that is subtracted from the base as a whole",
            where="init.name",
            expected=f"'{AUTO}', or {stays}",
            got=init.name,
        )
    if rule.mixed_ranks or rule.restarts or rule.settled:
        raise BouquetError(
            f"the rule '{rule.name}' makes starts of its own, which its init has to match",
            where="init.name",
            expected=f"'{AUTO}' or '{rule.start_at}'",
            got=init.name,
        )


def _check_node(choices: Choices) -> None:
    """What a node does with what it trains."""
    fitting = [name for name, kind in OPTIMIZERS.items() if kind.knows(choices.structure)]
    if choices.optimizer.name not in fitting:
        raise BouquetError(
            f"the optimizer '{choices.optimizer.name}' does not support what the rule '{choices.rule.name}' trains",
            where="optimizer.name",
            expected=listed(fitting),
            got=choices.optimizer.name,
        )
    if choices.optimizer.denoises and not choices.config.privacy.per_example:
        raise BouquetError(
            f"the optimizer '{choices.optimizer.name}' is about the noise in a step's gradients, and there is none",
            where=f"optimizer.name, privacy.mode = '{choices.config.privacy.mode}'",
            expected=f"privacy.mode = 'example', or {listed([n for n in fitting if not OPTIMIZERS[n].denoises])}",
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
            f"the gradient '{choices.gradient.name}' covers everything that is trained, in every step",
            where=f"gradient.name, optimizer.name = '{choices.optimizer.name}'",
            expected=f"'{AUTO}', or {listed([name for name, kind in GRADIENTS.items() if kind.rests])}",
            got=choices.gradient.name,
        )


def _check_optimizer_state(choices: Choices) -> None:
    """Moments are of the very factors that a node goes on with."""
    if choices.config.train.keeps_optimizer and not choices.rule.goes_on():
        raise BouquetError(
            f"a node's optimizer state cannot be kept under the rule '{choices.rule.name}', which gives the node "
            "other factors or another rank than it trained",
            where="train.optimizer-state",
            expected=f"'reset', or one of {listed([name for name, kind in RULES.items() if kind.goes_on()])}",
            got="kept",
        )


def _check_privacy(choices: Choices) -> None:
    privacy, rule, name = choices.config.privacy, choices.rule, choices.rule.name
    if privacy.per_example != (choices.gradient.engine is not None):
        raise BouquetError(
            "a gradient that does not fit the privacy mode",
            where=f"gradient.name, privacy.mode = '{privacy.mode}'",
            expected=listed([n for n, kind in GRADIENTS.items() if (kind.engine is not None) == privacy.per_example]),
            got=choices.gradient.name,
        )
    trained = rule.plan(rule.settled).trained | rule.plan(rule.settled + 1).trained
    if privacy.per_example and (loose := trained & rule.structure.loose):
        raise BouquetError(
            f"the rule '{name}' trains tensors outside linear layers, which have no gradient for each example",
            where="rule.name, privacy.mode = 'example'",
            expected=f"a rule that trains only {', '.join(sorted(trained - loose))}",
            got=", ".join(sorted(trained)),
            cure=f"Leave it out where rule.{name}.* has an option for that, or choose another rule.",
        )
    if privacy.on and (choices.objective.passes > 1 or choices.objective.remembers):
        raise BouquetError(
            f"the objective '{choices.objective.name}' releases more of the data than a private run accounts for",
            where=f"objective.name, privacy.mode = '{privacy.mode}'",
            expected=objective_laws.forgetful(),
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
            f"with the rule '{name}' the size of a message reveals what a node learned, and noise cannot hide a size",
            where="privacy.mode = 'update-local'",
            expected=rule.shrinks,
            cure="Choose another rule, or privacy.mode = 'example', whose training is private as a whole.",
        )


def _check_task(choices: Choices) -> None:
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
