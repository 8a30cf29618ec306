"""Where the adapter starts."""

from common.method import AUTO, Registry
from strategies.inits.drawn import Drawn
from strategies.inits.eva import Eva
from strategies.inits.init import Init, PublicInit, Start
from strategies.inits.lora_ga import LoraGA
from strategies.inits.lora_sb import LoraSB
from strategies.inits.lu import LU
from strategies.inits.nystrom import Nystrom
from strategies.inits.olora import OLora
from strategies.inits.orthonormal import Orthonormal
from strategies.inits.pissa import Pissa

INITS = Registry[Init](
    "init",
    Drawn,
    Orthonormal,
    Pissa,
    OLora,
    Nystrom,
    LU,
    Eva,
    LoraSB,
    LoraGA,
    default=AUTO,
    chooses="Where the adapter starts; auto is the rule's own start.",
)

__all__ = [
    "INITS",
    "LU",
    "Drawn",
    "Eva",
    "Init",
    "LoraGA",
    "LoraSB",
    "Nystrom",
    "OLora",
    "Orthonormal",
    "Pissa",
    "PublicInit",
    "Start",
]
