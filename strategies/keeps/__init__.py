"""What a node keeps for itself between rounds."""

from common.method import AUTO, Registry
from strategies.keeps.keep import Keep
from strategies.keeps.parts import LocalHead, Nothing, PersonalAdapter, PersonalB

KEEPS = Registry[Keep](
    "keep",
    Nothing,
    PersonalB,
    PersonalAdapter,
    LocalHead,
    default=AUTO,
    chooses="What a node keeps for itself between rounds; auto is what the rule keeps.",
)

__all__ = ["KEEPS", "Keep", "LocalHead", "Nothing", "PersonalAdapter", "PersonalB"]
