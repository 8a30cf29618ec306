"""What a node says about itself in the roll call."""

from flwr.app import ConfigRecord, Message

from common.config.ranges import is_node_name
from common.error import BouquetError, brief
from common.sources.counts import Counts
from common.version import ROOT, fingerprint


def introduction(message: Message) -> tuple[str, int, str, Counts | None]:
    """The name, the rank, the digest of the base and the counts of the data in an answer to the roll call.

    Raises :class:`BouquetError`.
    """
    facts = message.content.config_records.get("node", ConfigRecord())
    name, rank = facts.get("name"), facts.get("rank")
    if not (isinstance(name, str) and is_node_name(name) and isinstance(rank, int) and 0 < rank <= 2**31):
        raise BouquetError(
            "a malformed answer to the roll call",
            expected="a name of letters a to z, digits, dots and hyphens, other than 'all', and a rank",
            got=f"{brief(name)!r}, {brief(rank)!r}",
        )
    if facts.get("code") != fingerprint():
        raise BouquetError(
            "a node whose code differs from the coordinator's",
            where=f"{name}, {brief(facts.get('where'), 200)}",
            expected=f"the code of {ROOT} ({fingerprint()})",
            got=brief(facts.get("code")),
            cure="Stop SuperLinks and SuperNodes of older checkouts; uninstall other copies of Bouquet.",
        )
    told = message.content.metric_records.get("data")
    return name, rank, brief(facts.get("base")), Counts.read(told) if told else None
