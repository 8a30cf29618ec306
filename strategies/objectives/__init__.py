"""What a node's loss has beside the loss of its examples."""

from common.method import Registry
from strategies.objectives.fedprox import FedProx
from strategies.objectives.fedspeed import FedSpeed
from strategies.objectives.objective import Figures, Objective, Plain
from strategies.objectives.sam import Sam

OBJECTIVES = Registry[Objective](
    "objective",
    Plain,
    FedProx,
    FedSpeed,
    Sam,
    default="none",
    chooses="What a node's loss has beside the loss of its examples.",
)

__all__ = ["OBJECTIVES", "FedProx", "FedSpeed", "Figures", "Objective", "Plain", "Sam"]
