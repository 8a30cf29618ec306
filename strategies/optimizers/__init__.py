"""How a node steps."""

from common.method import AUTO, Registry
from strategies.optimizers.adamw import AdamW
from strategies.optimizers.adamw_8bit import AdamW8bit
from strategies.optimizers.allora import AlLora
from strategies.optimizers.la_lora import LaLora
from strategies.optimizers.lora_plus import LoraPlus
from strategies.optimizers.lora_pro import LoraPro
from strategies.optimizers.lora_rite import LoraRite
from strategies.optimizers.muon import Muon
from strategies.optimizers.natural import Natural
from strategies.optimizers.optimizer import Group, Optimizer
from strategies.optimizers.riemannian import Riemannian
from strategies.optimizers.sgd import Sgd
from strategies.optimizers.svd_shrink import SvdShrink

OPTIMIZERS = Registry[Optimizer](
    "optimizer",
    AdamW,
    AdamW8bit,
    LoraPlus,
    LoraPro,
    Riemannian,
    LoraRite,
    AlLora,
    LaLora,
    Muon,
    Natural,
    SvdShrink,
    Sgd,
    default=AUTO,
    chooses="How a node steps along its gradients; auto is adamw, or the structure's own.",
)

__all__ = [
    "OPTIMIZERS",
    "AdamW",
    "AdamW8bit",
    "AlLora",
    "Group",
    "LaLora",
    "LoraPlus",
    "LoraPro",
    "LoraRite",
    "Muon",
    "Natural",
    "Optimizer",
    "Riemannian",
    "Sgd",
    "SvdShrink",
]
