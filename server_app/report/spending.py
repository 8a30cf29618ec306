"""What a private run has cost each node, as far as the coordinator can know it: an upper bound.

A node pays for every round that it was asked for, whether its reply arrived or not. The number of records that it
declares, and so its sampling rate, is its own; its ledger has the exact figure.
"""

from collections import Counter

from common.json_files import number
from common.privacy import accounting
from common.privacy.accounting import Release
from common.record.events import Asked
from common.record.run import Run

LEDGER = "in its ledger"


def epsilon_bounds(run: Run) -> dict[str, float | None]:
    """An upper bound of each node's epsilon in this run; None where its ledger alone can tell."""
    asked = Counter(name for event in run.all(Asked) for name in event.nodes)
    return {node: _bound(run, asked[node]) for node in run.nodes} if run.private else {}


def told(bounds: dict[str, float | None], node: str) -> str:
    """A node's bound as it is read."""
    bound = bounds.get(node)
    return LEDGER if bound is None else f"≤ {bound:.3g}"


def _bound(run: Run, asked: int) -> float | None:
    config = run.config
    epsilon, delta = number(config, "privacy.epsilon"), number(config, "privacy.delta")
    noise, accountant = number(config, "privacy.noise-multiplier"), config.get("privacy.accountant", "prv")
    if not epsilon or not delta or not run.rounds:
        return None
    if config["privacy.mode"] == "example":
        # The noise is what keeps to epsilon over all rounds; a round that was tried again comes on top.
        return None if noise or asked > run.rounds else epsilon if asked else 0.0
    noise = noise or accounting.noise_multiplier(epsilon, delta, 1.0, run.rounds, accountant)
    return accounting.epsilon([Release(noise, 1.0, 1)] * asked, delta, accountant)
