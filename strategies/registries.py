"""Every axis that a run config chooses on, and the config read with all of them known."""

from collections.abc import Mapping, Sequence
from typing import Any

from common.adapter.structures import STRUCTURES
from common.config.renamed import renamed
from common.config.run import RunConfig
from common.method import AUTO, Option, Registry
from common.tasks import TASKS
from common.wire.codecs import CODECS
from strategies.gradients import GRADIENTS
from strategies.inits import INITS
from strategies.keeps import KEEPS
from strategies.means import MEANS
from strategies.objectives import OBJECTIVES
from strategies.optimizers import OPTIMIZERS
from strategies.rules import RULES
from strategies.server_optimizers import SERVER_OPTIMIZERS

AXES: tuple[Registry[Any], ...] = (
    RULES,
    MEANS,
    SERVER_OPTIMIZERS,
    STRUCTURES,
    INITS,
    OPTIMIZERS,
    OBJECTIVES,
    GRADIENTS,
    KEEPS,
)

NAMES: Mapping[str, Sequence[str]] = {
    "task.name": list(TASKS),
    "wire.up": list(CODECS),
    "wire.down": [name for name, codec in CODECS.items() if not codec.coarse],
}
"""What can be chosen where the choice is not one of an axis's members alone, by key."""


def defaults() -> dict[str, Option]:
    """The keys of all axes, and their defaults."""
    return {key: value for axis in AXES for key, value in axis.defaults().items()}


def chosen(flat: Mapping[str, Option], section: str, auto: str) -> str:
    """The name that a config gives for an axis, or ``auto`` where it leaves the choice open."""
    name = str(flat[f"{section}.name"])
    return auto if name == AUTO else name


def read_config(flat: Mapping[str, Any]) -> RunConfig:
    """Flower's flat run config, with the members of every axis and their hyperparameters known.

    A learning rate that is left open is the rule's own, or its structure's, from here on. Raises :class:`ConfigError`
    with every mistake.
    """
    flat = renamed(flat)
    config = RunConfig.from_flower(flat, AXES, NAMES)
    rule = RULES[config.rule]
    structure = STRUCTURES[chosen(config.methods, "adapter", rule().structure.name)]
    rate = config.train.learning_rate or rule.learning_rate or structure.learning_rate
    return config.model_copy(update={"train": config.train.model_copy(update={"learning_rate": rate})})
