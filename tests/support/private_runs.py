"""Private runs in the small."""

from common.config.node import witness_of
from common.privacy import ledger

PRIVATE = {
    "privacy.mode": "example",
    "privacy.accountant": "rdp",
    "privacy.expected-batch": 8,
    "train.weighting": "uniform",
    "rule.name": "ffa-lora",
    "privacy.records": 400,
    "num-server-rounds": 3,
}


def spent(tmp_path, *nodes: str) -> list[ledger.Entry]:
    """Every row of the nodes of a simulation, which share a state directory and have a folder in it each."""
    folders = [tmp_path / "state" / node for node in nodes or ("node-000", "node-001")]
    return [row for folder in folders for row in ledger.read(folder, witness_of(folder))]


# Of 400 records data.limit keeps a tenth, each by its own content.
KEPT = 40
