"""The published aggregation rules, one a file."""

from common.method import Registry
from strategies.rules.fed_plora import FedPLora
from strategies.rules.fed_sb import FedSB
from strategies.rules.fedex_lora import FedExLora
from strategies.rules.fedit import FedIT
from strategies.rules.fedkseed import FedKSeed
from strategies.rules.fedmomentum import FedMomentum
from strategies.rules.fedrot_lora import FedRotLora
from strategies.rules.fedsa_lora import FedSALora
from strategies.rules.fedsrd import FedSRD
from strategies.rules.fedsvd import FedSVD
from strategies.rules.ffa_lora import FFALora
from strategies.rules.flasc import FLASC
from strategies.rules.flexlora import FlexLora
from strategies.rules.flora import FLora
from strategies.rules.florist import FLoRIST
from strategies.rules.fslora import FSLora
from strategies.rules.hetlora import HetLora
from strategies.rules.local import Local
from strategies.rules.lora_fair import LoraFair
from strategies.rules.lora_lego import LoraLego
from strategies.rules.raflora import RaFLora
from strategies.rules.ravan import Ravan
from strategies.rules.rolora import RoLora
from strategies.rules.rule import Rule

RULES = Registry[Rule](
    "rule",
    FedIT,
    FFALora,
    RoLora,
    FedSALora,
    FedSB,
    FedSVD,
    Ravan,
    FedRotLora,
    FLora,
    FlexLora,
    RaFLora,
    FedExLora,
    LoraFair,
    FLoRIST,
    FedMomentum,
    HetLora,
    FedPLora,
    FSLora,
    FLASC,
    FedSRD,
    LoraLego,
    FedKSeed,
    Local,
    default="fedit",
    chooses="What a node trains and sends, how the server merges it, and what comes next.",
)

__all__ = [
    "FLASC",
    "RULES",
    "FFALora",
    "FLoRIST",
    "FLora",
    "FSLora",
    "FedExLora",
    "FedIT",
    "FedKSeed",
    "FedMomentum",
    "FedPLora",
    "FedRotLora",
    "FedSALora",
    "FedSB",
    "FedSRD",
    "FedSVD",
    "FlexLora",
    "HetLora",
    "Local",
    "LoraFair",
    "LoraLego",
    "RaFLora",
    "Ravan",
    "RoLora",
    "Rule",
]
