"""What a round costs beyond scoring and training, on a real federation with TLS, and what the peer's costs.

    python -m benchmarks.round_overhead --rounds 5

Three kinds of node: Flower's SuperNode as it is, the same with a SuperExec that asks for tasks as often as a kit's, and
the kit's own. Each of them cold, and with a worker that keeps the model warm. The peer (``benchmarks/stock``) is
Flower's own FedAvg over PEFT adapters, whose nodes load the base in every round.
"""

import argparse
import json
import statistics
import tempfile
from collections import Counter, defaultdict
from functools import partial
from pathlib import Path

from common.models import embedded
from common.record.events import Evaluate, Merge, Train
from common.record.run import Run
from common.sources import stdlib
from deploy.flower import OFTEN
from deploy.site.kit_facts import KitFacts
from tests.support import ROOT
from tests.support.processes import Bare, Federation, federation

NODES, STEPS, BATCH = 2, 3, 4
TEXTS = 40
SETTINGS = (
    f"data.limit={TEXTS} train.steps={STEPS} train.batch-size={BATCH} evaluation.limit=4 "
    f'evaluation.prompt="" min-nodes={NODES} round.deadline=300.0'
)
STATES = {"cold": 0.0, "warm": 600.0}
((POLLS, SECONDS),) = OFTEN.items()


def node(warm: float, number: int) -> list[str]:
    """The node config of one node."""
    return [f"partition-id={number}", f"num-partitions={NODES}", f"warm={warm}"]


def supernode(seconds: str, kit: Path) -> tuple[list[str], dict[str, str]]:
    """Flower's SuperNode for a kit, whose own SuperExec asks for tasks every so many seconds."""
    facts = KitFacts.read(kit)
    command = ["flower-supernode", "--superlink", facts.superlink, "--root-certificates", str(kit / "ca.crt")]
    command += ["--auth-supernode-private-key", str(kit / "node.key"), "--node-config", str(kit / "node.toml")]
    return [*command, "--port", str(facts.port)], {POLLS: seconds, "FLWR_HOME": str(kit / "flower")}


def bouquet(own: Federation, rounds: int) -> list[float]:
    """Seconds of every round of Bouquet's but the slowest node's scoring and training."""
    runs = own.folder / "runs"
    finish(own, own.submit("timed", f"{SETTINGS} num-server-rounds={rounds}", runs))
    run = Run.read(runs / "timed")
    spent: dict[int, Counter[str]] = defaultdict(Counter)
    for event in run.all(Train):
        spent[event.round][event.node] += event.seconds or 0.0
    for event in run.all(Evaluate):  # it comes with the update of the next round
        spent[event.round + 1][event.node] += event.seconds or 0.0
    return [event.seconds - max(spent[event.round].values()) for event in run.all(Merge)]


def stock(own: Federation, rounds: int) -> list[float]:
    """The same of the peer's, which scores nothing."""
    texts, timings = own.folder / "texts.json", own.folder / "timings.json"
    texts.write_text(json.dumps([record["text"] for record in stdlib.records()[: NODES * TEXTS]]))
    places = f'model="{embedded.unpack()}" texts="{texts}" timings="{timings}"'
    settings = f"{places} rounds={rounds} steps={STEPS} batch-size={BATCH}"
    stock = ROOT / "benchmarks/stock"
    own.allow("coordinator", *(f"kits/{name}" for name in own.names), app=stock)
    finish(own, own.start_run(stock, settings))
    seconds = json.loads(timings.read_text())
    return [whole - training for whole, training in zip(seconds["whole"], seconds["training"], strict=True)]


def finish(own: Federation, run: str) -> None:
    """Wait for the end of a run, which must be a good one."""
    if (status := own.wait(run, 900)) != "finished:completed":
        raise SystemExit(f"the run ended as {status}")


def main() -> None:
    """Print a line for each kind of node, cold and warm, and one for the peer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    as_it_is = partial(supernode, "1.0")
    kinds: dict[str, Bare | None] = {
        "Flower's SuperNode": as_it_is,
        "Flower's, asked often": partial(supernode, SECONDS),
        "the kit's": None,
    }
    cells = [
        (f"{name}, {state}", kind, warm, bouquet) for name, kind in kinds.items() for state, warm in STATES.items()
    ]
    for name, kind, warm, measure in [*cells, ("stock FedAvg", as_it_is, 0.0, stock)]:
        with (
            tempfile.TemporaryDirectory() as folder,
            federation(Path(folder), NODES, partial(node, warm), kind) as own,
        ):
            seconds = measure(own, options.rounds)
        each = ", ".join(f"{second:.1f}" for second in seconds)
        print(f"{name}: median {statistics.median(seconds):.1f} s a round beyond training ({each})", flush=True)


if __name__ == "__main__":
    main()
