"""One choice on each axis, as a value."""

from dataclasses import dataclass, field

from common.adapter.structure import Structure
from common.config.run import RunConfig
from strategies.gradients import Backward, Gradient
from strategies.inits import Drawn, Init
from strategies.keeps import Keep
from strategies.objectives import Objective, Plain
from strategies.optimizers import AdamW, Optimizer
from strategies.rules.rule import Rule


@dataclass(frozen=True, kw_only=True)
class Choices:
    """A rule, and whatever else a federated fine-tuning has to choose.

    The mean and the server optimizer are their rule's own, and so is the structure. ``keeps`` is what stays on a node,
    one thing after the other; ``config`` has everything that is no choice of a method.
    """

    rule: Rule
    init: Init = field(default_factory=Drawn)
    optimizer: Optimizer = field(default_factory=AdamW)
    objective: Objective = field(default_factory=Plain)
    gradient: Gradient = field(default_factory=Backward)
    keeps: tuple[Keep, ...] = ()
    config: RunConfig = field(default_factory=RunConfig)

    @property
    def structure(self) -> Structure:
        """What is trained beside a frozen layer."""
        return self.rule.structure
