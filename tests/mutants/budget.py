"""What budgets and their guards get wrong."""

from tests.mutants import Mutant

ACCOUNT = ("tests/oracles/test_accounting.py",)
LEDGER = ("tests/units/test_budget.py", "tests/units/test_ledger.py", "tests/runs/test_ledger_processes.py")
RUN = ("tests/runs/test_private_run.py",)
POLICY = ("tests/units/test_policy.py", "tests/runs/test_private_run.py")

SCORES = ("tests/runs/test_scoring.py",)

BUDGET = (
    Mutant(
        "a noised score is asked and paid for again where its round is tried again",
        "server_app/scoring.py",
        "done = sheet.asked if self._noised else sheet.scores.keys()",
        "done = sheet.scores.keys()",
        SCORES,
    ),
    Mutant(
        "private nodes pay for a round that is trained in vain",
        "server_app/rounds.py",
        "if self._scoring.open and may_end:",
        "if False:",
        SCORES,
    ),
    Mutant(
        "what noise covers in a score leaves among the figures of training",
        "client_app/policy.py",
        '"train": {("score", "merit"), ("score", "count")}',
        '"train": {(record, name) for record in ("score", "metrics") for name in ("merit", "count")}',
        POLICY,
    ),
    Mutant(
        "Opacus in Flower's examples: a fresh accountant each round",
        "client_app/budget.py",
        "total = accounting.epsilon([*(row.release for row in spent), release]",
        "total = accounting.epsilon([release]",
        LEDGER,
    ),
    Mutant(
        "what was spent is forgotten when the run ends",
        "client_app/budget.py",
        "            spent = book.counting(dataset)\n",
        "            spent = [row for row in book.counting(dataset) if row.run == run]\n",
        LEDGER,
    ),
    Mutant(
        "a run's limit is held to the rounds that it declares",
        "client_app/budget.py",
        "if limit and accounting.epsilon(releases, delta",
        "if limit and accounting.epsilon([release], delta",
        LEDGER,
    ),
    Mutant(
        "delta = 1 / batches: the coordinator's delta makes its run look cheap",
        "client_app/budget.py",
        "limit, delta = self._limits.run_epsilon, self._limits.delta",
        "limit, delta = self._limits.run_epsilon, privacy.delta",
        LEDGER,
    ),
    Mutant(
        "a node that is called otherwise has a new budget",
        "client_app/budget.py",
        "            spent = book.counting(dataset)\n",
        "            spent = [row for row in book.counting(dataset) if row.node == self._node]\n",
        LEDGER,
    ),
    Mutant(
        "a change is charged as if a record moved it by C",
        "client_app/budget.py",
        "        release = accounting.by_record(release, privacy.mode)\n",
        "",
        LEDGER,
    ),
    Mutant(
        "a data set that grew by one record has a new budget",
        "common/privacy/dataset.py",
        "self.members.isdisjoint(other.members)",
        "self.members != other.members",
        LEDGER,
    ),
    Mutant(
        "data that became CSV has a new budget",
        "common/privacy/dataset.py",
        "_number(text) or _moment(text) or text",
        "text",
        LEDGER,
    ),
    Mutant(
        "who names other fields has a new budget",
        "common/privacy/dataset.py",
        "len(scopes) == 1 and",
        "",
        LEDGER,
    ),
    Mutant(
        "the members of a data set are not looked at",
        "common/privacy/ledger.py",
        "if dataset.fingerprint != name or dataset.digests != kept.get(name):",
        "if name not in kept:",
        LEDGER,
    ),
    Mutant(
        "two processes both read the sum before either writes",
        "common/privacy/ledger.py",
        "            if _newest(connection) != head:",
        "            if _newest(connection).number > head.number + 10**6:",
        LEDGER,
    ),
    Mutant(
        "the writers take no turns",
        "common/owned.py",
        "        fcntl.flock(handle, fcntl.LOCK_EX)\n",
        "",
        LEDGER,
    ),
    Mutant(
        "the charge is not durable when the update leaves",
        "common/privacy/ledger.py",
        'connection.execute("COMMIT")',
        "pass",
        LEDGER,
    ),
    Mutant(
        "the release that passes the budget is still made",
        "client_app/budget.py",
        "if limit and total > limit:",
        "if limit and (spent and spent[-1].epsilon or 0) >= limit * 1.01:",
        LEDGER,
    ),
    Mutant(
        "a ledger that is gone starts at nothing",
        "common/privacy/ledger.py",
        "    if known and known.number:\n",
        "    if book.entries and known and known.number:\n",
        LEDGER,
    ),
    Mutant(
        "a witness that is gone is not missed",
        "common/privacy/ledger.py",
        "    if book.entries and known is None:\n",
        "    if False:\n",
        LEDGER,
    ),
    Mutant(
        "the witness is read after the rows",
        "common/privacy/ledger.py",
        "    book = _book(path(directory))\n",
        "    book = _book(path(directory))\n    known = _witness(witness) or known\n",
        LEDGER,
    ),
    Mutant(
        "a slower writer lowers the witness",
        "common/privacy/ledger.py",
        "        _testify(witness, Head(entry.number, entry.digest))\n",
        "    _testify(witness, Head(entry.number, entry.digest))\n    if True:\n",
        LEDGER,
    ),
    Mutant(
        "a changed row goes unnoticed",
        "common/privacy/ledger.py",
        " or entry.chained(previous) != entry:",
        ":",
        LEDGER,
    ),
    Mutant(
        "the ledger of the edition before counts for nobody's records",
        "common/privacy/ledger.py",
        "for entry in self.entries if entry.dataset not in apart]",
        "for entry in self.entries if not dataset or entry.dataset in self.datasets and entry.dataset not in apart]",
        LEDGER,
    ),
    Mutant(
        "a state folder that others may write to is used",
        "common/owned.py",
        "OTHERS = 0o077",
        "OTHERS = 0o007",
        LEDGER,
    ),
    Mutant(
        "the accountant runs under the lock",
        "client_app/budget.py",
        "            spent = book.counting(dataset)\n",
        "            spent = book.counting(dataset)\n"
        "            if spent:\n"
        '                with ledger.owned.locked(self._directory / "ledger.lock"):\n'
        "                    self._total(spent, release, privacy)\n",
        LEDGER,
    ),
    Mutant(
        "noise too small for the accountant keeps it busy for ever",
        "common/privacy/accounting.py",
        "noise == 0 or LEAST_NOISE <= noise <= MOST_NOISE",
        "0 <= noise <= MOST_NOISE",
        ACCOUNT,
    ),
    Mutant(
        "FedSVD's script: noise for the mean participation",
        "common/privacy/accounting.py",
        "sample_rate, steps * rounds, privacy.accountant",
        "sample_rate, max(1, steps * rounds // 2), privacy.accountant",
        ACCOUNT,
    ),
    Mutant(
        "no noise has a finite epsilon",
        "common/privacy/accounting.py",
        "    if history[0][0] == 0:\n        return math.inf\n",
        "    history = tuple((noise or 1.0, rate, steps) for noise, rate, steps in history)\n",
        ACCOUNT,
    ),
    Mutant(
        "Flower's LocalDpMod: the metrics pass as they are",
        "client_app/session.py",
        "MetricRecord({} if self.config.privacy.on else metrics)",
        "MetricRecord(metrics)",
        RUN,
    ),
    Mutant(
        "the weight in the mean is the number of examples",
        "common/config/run.py",
        'if self.train.weighting == "examples":',
        "if False:",
        ("tests/units/test_config.py",),
    ),
    Mutant(
        "an error message tells the data",
        "client_app/answer.py",
        "if isinstance(error, RefusalError) or _tells_details(context):",
        "if True:",
        RUN,
    ),
    Mutant(
        "a long record is clipped window by window",
        "client_app/units.py",
        "most = 1 if privacy.per_example else None",
        "most = None",
        RUN,
    ),
    Mutant(
        "a node with a budget takes part in a run without noise",
        "client_app/policy.py",
        "if not private.on and (node.privacy_epsilon or wanted.min_noise_multiplier):",
        "if not private.on and wanted.min_noise_multiplier:",
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
