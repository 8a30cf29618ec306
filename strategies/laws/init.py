"""The laws of a start: that it fits the structure, and is every node's."""

from common.error import BouquetError
from common.method import AUTO, listed
from strategies.choices import Choices
from strategies.inits import INITS


def check(choices: Choices) -> None:
    """Raise :class:`BouquetError` where a start does not fit the structure, or is not every node's."""
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
