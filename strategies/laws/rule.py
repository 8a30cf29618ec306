"""The laws of a rule: what stands on other axes and would be ignored by it, or does not suit it."""

from common.adapter import ranks
from common.adapter.structure import LORA
from common.adapter.structures import STRUCTURES
from common.error import BouquetError
from common.method import AUTO, listed
from strategies.choices import Choices
from strategies.inits import INITS
from strategies.rules import RULES
from strategies.rules.mean import MeanRule
from strategies.rules.rule import Rule


def check(choices: Choices) -> None:
    """Raise :class:`BouquetError` where another choice would be ignored by the rule, or does not suit it."""
    _check_neighbours(choices)
    _check_form(choices)
    _check_ranks(choices)


def _check_neighbours(choices: Choices) -> None:
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
    """Whether some of the layers mean to a rule what all of them do, and none is trained with another."""
    return not (rule.thins or rule.scattered or rule.structure.common())


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
