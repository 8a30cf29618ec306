"""What a node's loss has beside the loss of its examples."""

from common.method import Registry
from strategies.objectives.fedprox import FedProx
from strategies.objectives.fedspeed import FedSpeed
from strategies.objectives.group_sparsity import GroupSparsity
from strategies.objectives.objective import Figures, Objective, Plain
from strategies.objectives.orthogonal import Orthogonal
from strategies.objectives.sam import Sam
from strategies.objectives.scaffold import Scaffold

OBJECTIVES = Registry[Objective](
    "objective",
    Plain,
    FedProx,
    FedSpeed,
    Scaffold,
    Sam,
    Orthogonal,
    GroupSparsity,
    default="none",
    chooses="What a node's loss has beside the loss of its examples.",
)

__all__ = [
    "OBJECTIVES",
    "FedProx",
    "FedSpeed",
    "Figures",
    "GroupSparsity",
    "Objective",
    "Orthogonal",
    "Plain",
    "Sam",
    "Scaffold",
]
