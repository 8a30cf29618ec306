"""What budgets and their guards get wrong."""

from tests.mutants import Mutant

ACCOUNT = ("tests/test_accounting.py",)
LEDGER = ("tests/test_ledger.py",)
RUN = ("tests/test_private_run.py",)
POLICY = ("tests/test_policy.py", "tests/test_private_run.py")

BUDGET = (
    Mutant(
        "Opacus in Flower's examples: a fresh accountant each round",
        "client_app/ledger.py",
        "[*(row.release for row in spent), release], self._delta",
        "[release], self._delta",
        LEDGER,
    ),
    Mutant(
        "what was spent is forgotten when the run ends",
        "client_app/ledger.py",
        "if row.dataset in related]",
        "if row.run == run]",
        LEDGER,
    ),
    Mutant(
        "a data set that grew by one record has a new budget",
        "client_app/ledger.py",
        "ON dataset.id = other.dataset",
        "ON dataset.id = mine.dataset",
        LEDGER,
    ),
    Mutant(
        "two processes both read the sum before either writes",
        "client_app/ledger.py",
        '"BEGIN IMMEDIATE"',
        '"BEGIN DEFERRED"',
        LEDGER,
    ),
    Mutant(
        "the charge is not durable when the update leaves",
        "client_app/ledger.py",
        'connection.execute("COMMIT")',
        "pass",
        LEDGER,
    ),
    Mutant(
        "the release that passes the budget is still made",
        "client_app/ledger.py",
        "accountant)\n        if self._epsilon and total > self._epsilon:",
        "accountant)\n        if self._epsilon and (spent and spent[-1].epsilon or 0) >= self._epsilon * 1.01:",
        LEDGER,
    ),
    Mutant(
        "a ledger that is gone starts at nothing",
        "common/ledger.py",
        "    if witness.exists():\n",
        "    if rows and witness.exists():\n",
        LEDGER,
    ),
    Mutant(
        "a changed row goes unnoticed",
        "common/ledger.py",
        " or entry.chained(previous) != entry:",
        ":",
        LEDGER,
    ),
    Mutant(
        "FedSVD's script: noise for the mean participation",
        "common/accounting.py",
        "sample_rate, steps * rounds, privacy.accountant",
        "sample_rate, max(1, steps * rounds // 2), privacy.accountant",
        ACCOUNT,
    ),
    Mutant(
        "no noise has a finite epsilon",
        "common/accounting.py",
        "    if history[0][0] == 0:\n        return math.inf\n",
        "    history = tuple((noise or 1.0, rate, steps) for noise, rate, steps in history)\n",
        ACCOUNT,
    ),
    Mutant(
        "Flower's LocalDpMod: the metrics pass as they are",
        "client_app/session.py",
        "MetricRecord({} if self.private else metrics)",
        "MetricRecord(metrics)",
        RUN,
    ),
    Mutant(
        "the weight in the mean is the number of examples",
        "common/config.py",
        'if self.train.weighting == "examples":',
        "if False:",
        ("tests/test_config.py",),
    ),
    Mutant(
        "an error message tells the data",
        "client_app/answer.py",
        "WITHHELD if private else reason",
        "reason",
        RUN,
    ),
    Mutant(
        "a long record is clipped window by window",
        "client_app/session.py",
        'most = 1 if config.privacy.mode == "example" else None',
        "most = None",
        RUN,
    ),
    Mutant(
        "a node with a budget takes part in a run without noise",
        "client_app/policy.py",
        'if mode == "none" and (budget or wanted):',
        'if mode == "none" and wanted:',
        POLICY,
    ),
    Mutant(
        "delta = 1 / batches: the coordinator's delta makes its run look cheap",
        "client_app/policy.py",
        "config.num_server_rounds, delta, config.privacy.accountant",
        "config.num_server_rounds, config.privacy.delta, config.privacy.accountant",
        POLICY,
    ),
    Mutant(
        "what leaves is not looked at",
        "client_app/answer.py",
        "        session.check(message.metadata.message_type, content)\n",
        "",
        POLICY,
    ),
)
