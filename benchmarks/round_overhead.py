"""What a round costs beyond training, on a real federation with TLS: cold nodes, nodes with a warm worker, and a peer.

    python -m benchmarks.round_overhead --rounds 3

The peer (``benchmarks/stock``) is Flower's own FedAvg over PEFT adapters, whose nodes load the base in every round.
"""

import argparse
import json
import statistics
import tempfile
from functools import partial
from pathlib import Path

from common.models import embedded
from common.record.events import Merge, Train
from common.record.run import Run
from common.sources import stdlib
from tests.support import ROOT
from tests.support.processes import Federation, federation

NODES, STEPS, BATCH = 2, 3, 4
TEXTS = 40
SETTINGS = (
    f"data.limit={TEXTS} train.steps={STEPS} train.batch-size={BATCH} evaluation.limit=4 evaluation.every=0 "
    f'evaluation.prompt="" min-nodes={NODES} round.deadline=300.0'
)


def node(warm: float, number: int) -> list[str]:
    """The node config of one node."""
    return [f"partition-id={number}", f"num-partitions={NODES}", f"warm={warm}"]


def bouquet(own: Federation, rounds: int) -> list[float]:
    """Seconds of every round of Bouquet's but the slowest node's training."""
    runs = own.folder / "runs"
    finish(own, own.submit("timed", f"{SETTINGS} num-server-rounds={rounds}", runs))
    run = Run.read(runs / "timed")
    training = {
        number: max(event.seconds or 0.0 for event in run.all(Train) if event.round == number)
        for number in range(1, rounds + 1)
    }
    return [event.seconds - training[event.round] for event in run.all(Merge)]


def stock(own: Federation, rounds: int) -> list[float]:
    """The same of the peer's."""
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
    """Print a line for cold nodes, one for warm ones, and one for the peer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    for name, warm, measure in (("cold", 0.0, bouquet), ("warm", 600.0, bouquet), ("stock FedAvg", 0.0, stock)):
        with (
            tempfile.TemporaryDirectory() as folder,
            federation(Path(folder), NODES, partial(node, warm)) as own,
        ):
            seconds = measure(own, options.rounds)
        each = ", ".join(f"{second:.1f}" for second in seconds)
        print(f"{name}: median {statistics.median(seconds):.1f} s a round beyond training ({each})", flush=True)


if __name__ == "__main__":
    main()
