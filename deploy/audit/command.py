"""The command line of `bouquet audit`: whether the whole node keeps the promise of docs/privacy.md, on one's own data.

First what needs no statistics (:mod:`deploy.audit.invariants`), which finds most faults; then guessing, from what the
node sent, which canaries were in its data (:mod:`deploy.audit.trials`), which would find any, were it tried for long.
"""

import argparse
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from common.config.run import RunConfig
from common.error import BouquetError
from common.tasks import TASKS
from deploy import settings
from deploy.audit.finding import Finding
from deploy.settings import Commands
from strategies import Recipe, read_config

if TYPE_CHECKING:
    from deploy.audit.canaries import Canary, Record
    from deploy.audit.node import Bench

EXAMPLE = "Example: bouquet audit profiles/private.toml data.source=/data/notes.jsonl num-server-rounds=1 train.steps=5"
METHODS = ("one-run", "paired")
RUNS = {"one-run": 1, "paired": 100}


@dataclass(frozen=True)
class Wanted:
    """What is asked of an audit, apart from the run config."""

    method: str = "one-run"
    canaries: int = 200
    runs: int = 0
    confidence: float = 0.95
    policy: str = ""
    nodes: int = 1


def add_to(commands: Commands) -> None:
    """Add the subcommand."""
    parser = commands.add_parser("audit", help="try to break the promise of a private run", description=EXAMPLE)
    default = Wanted()
    parser.add_argument("--method", choices=METHODS, default=default.method, help="how canaries are searched for")
    parser.add_argument("--canaries", type=int, default=default.canaries, help="the number of canaries, for one-run")
    parser.add_argument("--runs", type=int, default=0, help="runs of the node: 1 for one-run, 100 pairs for paired")
    parser.add_argument(
        "--confidence", type=float, default=default.confidence, help="confidence of the lower bound on epsilon"
    )
    parser.add_argument(
        "--policy", default="", metavar="FILE", help="the node's own policy (default: one that allows everything)"
    )
    parser.add_argument("--nodes", type=int, default=1, help="divide the data among so many nodes, and audit the first")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="run config, or a TOML file of it")
    parser.set_defaults(work=_work)


def _work(options: argparse.Namespace) -> int:
    config = read_config(settings.located(settings.read(options.settings)))
    wanted = Wanted(**{name: getattr(options, name) for name in Wanted.__dataclass_fields__})
    started, held = time.monotonic(), True

    def say(text: str) -> None:
        print(f"{time.monotonic() - started:8.1f} s  {text}", flush=True)

    for finding in audit(config, wanted, say):
        say(str(finding))
        held &= finding.held
    say("no violation was found" if held else "THE PROMISE IS BROKEN")
    return 0 if held else 1


def audit(config: RunConfig, wanted: Wanted, say: Callable[[str], None]) -> Iterator[Finding]:
    """Audit a node of a run, one finding after the other; ``say`` hears of the work between them.

    Data, ledger and policy are temporary: the operator's own are read and never written. Raises :class:`BouquetError`
    where the run is not one that a node can be audited for, where the node refuses it, and where it fails.
    """
    _check(config, wanted)
    from common.sources import stable  # what reads data and knows models takes seconds to import
    from deploy.audit import trials
    from deploy.audit.canaries import Maker, usable
    from deploy.audit.node import Bench, checked

    with tempfile.TemporaryDirectory(prefix="bouquet-audit-") as folder:
        own = list(stable.read(config.data.source))
        bench = Bench(config, Path(folder), wanted.policy, wanted.nodes)
        checked(node := bench.node(own))
        session, units = node.session, len(node.units.train)
        release = session.spending.plan()
        say(
            f"{config.privacy.mode}, {config.rule}, {units} units to train on; {config.num_server_rounds} rounds "
            f"of {release.steps} steps, sampling rate {release.sample_rate:.3g}, noise {release.noise_multiplier:.4g}"
        )
        # As planned for the whole run, whatever part of it is tried.
        privacy = config.privacy.model_copy(update={"noise_multiplier": release.noise_multiplier})
        bench.config = config.model_copy(update={"privacy": privacy})
        maker = Maker(config, stable.node_records(session.config.data, session.node, config.seed))
        each = math.ceil(wanted.canaries / len(maker.kinds)) if wanted.method == "one-run" else 1
        canaries = [canary for kind in maker.kinds for canary in usable(bench, maker, kind, each)]
        if not canaries:
            raise BouquetError("the node trains on no canary", where="data.limit", cure="Raise it, or set it to 0.")
        say(f"{len(canaries)} canaries: {', '.join(dict.fromkeys(canary.kind for canary in canaries))}")
        yield from _invariants(bench, own, canaries)
        trial = trials.one_run if wanted.method == "one-run" else trials.paired
        yield trial(bench, own, canaries, wanted.runs or RUNS[wanted.method], wanted.confidence, say)
        if bench.failed:
            say(f"{bench.failed} times the node reported to its operator that training failed with its records")


def _invariants(bench: "Bench", own: Sequence["Record"], canaries: Sequence["Canary"]) -> Iterator[Finding]:
    """What has to hold of every run. Between any two data sets, as in update-local, only the form has to be one."""
    from deploy.audit import invariants

    first = list({canary.kind: canary for canary in canaries}.values())
    others = [
        *invariants.neighbours(own, first, bench.config.privacy.unit),
        *invariants.unreadable(own, bench.config),
    ]
    yield invariants.structure(bench, own, others)
    if not bench.config.privacy.per_example:
        return
    yield invariants.stability(bench, own, others)
    node = bench.node(own, **invariants.SHORT)
    state = node.initial()
    _, after = next(node.turns(state))
    companions = node.units.train[: 2 * bench.config.train.batch_size]
    yield invariants.bound(node, {"before training": state, "after a round": after}, companions, first)
    yield invariants.noise(node, state)


def _check(config: RunConfig, wanted: Wanted) -> None:
    """Raise :class:`BouquetError` unless this run can be audited in this way."""
    privacy = config.privacy
    Recipe.build(config)
    if not privacy.on:
        raise BouquetError("a run without privacy has no promise", where="privacy.mode", cure="Set it to 'example'.")
    if TASKS[config.task.name].sees:
        raise BouquetError(
            "an audit makes up its records, and none of them has an image",
            where="task.name",
            expected="a text-only task",
            got=config.task.name,
            cure="Audit the same run with task.name = 'instruct'.",
        )
    if privacy.central:
        raise BouquetError(
            "in update-central a node sends its change in the clear, and trusts the coordinator with it",
            where="privacy.mode",
            expected="example or update-local",
            got=privacy.mode,
            cure="The promise there concerns the mean of all nodes, which an audit of one node cannot test.",
        )
    if privacy.whole_change and wanted.method != "paired":
        raise BouquetError(
            "where a whole change is noised, one run says nothing about many canaries",
            where="--method",
            expected="paired",
            got=wanted.method,
        )
    for name, valid, expected in (
        ("canaries", wanted.canaries >= 1, "1 or more"),
        ("runs", wanted.runs >= 0 and (wanted.method == "one-run" or wanted.runs not in (1, 2, 3)), "4 or more pairs"),
        ("confidence", 0 < wanted.confidence < 1, "a share between 0 and 1"),
        ("nodes", wanted.nodes >= 1, "1 or more"),
    ):
        if not valid:
            raise BouquetError(
                "an option out of range", where=f"--{name}", expected=expected, got=f"{getattr(wanted, name)}"
            )
