"""How a node computes its gradients."""

from common.method import AUTO, Registry
from strategies.gradients.engine import Engine
from strategies.gradients.fast import Fast
from strategies.gradients.gradient import Backward, Gradient
from strategies.gradients.hooks import Hooks

GRADIENTS = Registry[Gradient](
    "gradient",
    Backward,
    Fast,
    Hooks,
    default=AUTO,
    chooses="How a node computes its gradients; auto is backward, or fast where every example is private.",
)

__all__ = ["GRADIENTS", "Backward", "Engine", "Fast", "Gradient", "Hooks"]
