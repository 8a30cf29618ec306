"""A budget in the small, for the tests of what it promises."""

import multiprocessing
import sqlite3
from pathlib import Path

from client_app.budget import Budget, Limits
from common.config.node import witness_of
from common.config.privacy import PrivacyConfig
from common.privacy import accounting, ledger
from common.privacy.accounting import Release
from common.privacy.ledger import DataSet

RECORDS = [{"text": f"note {number}", "label": number % 2} for number in range(20)]
NOTES = DataSet.of(RECORDS, ["text"])
# RDP is exact enough here, and costs a millisecond.
PRIVACY = PrivacyConfig.model_validate({"mode": "example", "accountant": "rdp", "noise-multiplier": 2.0})
RELEASE = Release(noise_multiplier=2.0, sample_rate=0.05, steps=10)
DELTA = 1e-5
FORK = multiprocessing.get_context("fork")
BROKEN = "the privacy ledger differs from what was written"


def cost(releases: int) -> float:
    return accounting.epsilon([RELEASE] * releases, DELTA, "rdp")


def budget(directory: Path, *, releases: int = 0, a_run: int = 0, node: str = "ward-3") -> Budget:
    """A budget that is enough for ``releases``, and ``a_run`` of them; 0 for no limit."""
    return Budget(directory, witness_of(directory), node, Limits(cost(releases), DELTA, cost(a_run)))


def charge(directory: Path, *, releases: int = 0, dataset: DataSet | None = None, run: str = "run", round: int = 0):
    own = budget(directory, releases=releases)
    return own.charge(RELEASE, PRIVACY, run=run, round=round, rule="ffa-lora", dataset=dataset)


def read(directory: Path) -> list[ledger.Entry]:
    return ledger.read(directory, witness_of(directory))


def read_head(directory: Path, number: int) -> str:
    with sqlite3.connect(ledger.path(directory)) as connection:
        (digest,) = connection.execute("SELECT digest FROM release WHERE number = ?", (number,)).fetchone()
    connection.close()
    return digest


def policy(tmp_path, text: str) -> str:
    file = tmp_path / "policy.toml"
    file.write_text(text)
    return str(file)
