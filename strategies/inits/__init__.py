"""Where the adapter starts."""

from common.method import AUTO, Registry
from strategies.inits.drawn import Drawn
from strategies.inits.init import GradientInit, Init, Start
from strategies.inits.lora_ga import LoraGA
from strategies.inits.lora_sb import LoraSB
from strategies.inits.orthonormal import Orthonormal

INITS = Registry[Init](
    "init",
    Drawn,
    Orthonormal,
    LoraSB,
    LoraGA,
    default=AUTO,
    chooses="Where the adapter starts; auto is the rule's own start.",
)

__all__ = ["INITS", "Drawn", "GradientInit", "Init", "LoraGA", "LoraSB", "Orthonormal", "Start"]
