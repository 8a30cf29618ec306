"""How a node computes its gradients."""

from common.adapter.structure import Structure
from common.method import AUTO, Registry
from strategies.gradients.engine import Engine
from strategies.gradients.fast import Fast
from strategies.gradients.gradient import Backward, Gradient
from strategies.gradients.hooks import Hooks
from strategies.gradients.zeroth import Zeroth

GRADIENTS = Registry[Gradient](
    "gradient",
    Backward,
    Fast,
    Hooks,
    Zeroth,
    default=AUTO,
    chooses="How a node computes its gradients; auto is backward or the structure's own, or fast for private examples.",
)


def knowing(structure: Structure) -> dict[str, type[Gradient]]:
    """The members by which what such a structure trains has a gradient."""
    return {name: kind for name, kind in GRADIENTS.items() if kind.knows(structure)}


__all__ = ["GRADIENTS", "Backward", "Engine", "Fast", "Gradient", "Hooks", "Zeroth", "knowing"]
