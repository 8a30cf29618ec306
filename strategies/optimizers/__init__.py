"""How a node steps."""

from common.method import Registry
from strategies.optimizers.adamw import AdamW
from strategies.optimizers.adamw_8bit import AdamW8bit
from strategies.optimizers.lora_pro import LoraPro
from strategies.optimizers.optimizer import Group, Optimizer

OPTIMIZERS = Registry[Optimizer](
    "optimizer", AdamW, AdamW8bit, LoraPro, default="adamw", chooses="How a node steps along its gradients."
)

__all__ = ["OPTIMIZERS", "AdamW", "AdamW8bit", "Group", "LoraPro", "Optimizer"]
