"""What a round costs beyond training, on a real federation with TLS: cold nodes, and nodes with a warm worker.

python -m benchmarks.round_overhead --rounds 3
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path

from tests.processes import federation

NODES = 2
SETTINGS = (
    'data.limit=40 train.steps=3 train.batch-size=4 evaluation.limit=4 evaluation.every=0 evaluation.prompt="" '
    f"min-nodes={NODES} round.deadline=300.0"
)


def overheads(folder: Path, warm: float, rounds: int) -> list[float]:
    """Seconds of every round but the slowest node's training."""
    with federation(
        folder, NODES, lambda node: [f"partition-id={node}", f"num-partitions={NODES}", f"warm={warm}"]
    ) as own:
        run = own.submit("timed", f"{SETTINGS} num-server-rounds={rounds}", folder / "runs")
        status = own.wait(run, 900)
    if status != "finished:completed":
        raise SystemExit(f"the run ended as {status}")
    events = [json.loads(line) for line in (folder / "runs/timed/metrics.jsonl").read_text().splitlines()]
    training = {
        number: max(e["seconds"] for e in events if e["phase"] == "train" and e["round"] == number)
        for number in range(1, rounds + 1)
    }
    return [event["seconds"] - training[event["round"]] for event in events if event["phase"] == "merge"]


def main() -> None:
    """Print a line for cold nodes and one for warm ones."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    for name, warm in (("cold", 0.0), ("warm", 600.0)):
        with tempfile.TemporaryDirectory() as folder:
            seconds = overheads(Path(folder), warm, options.rounds)
        print(f"{name}: median {statistics.median(seconds):.1f} s a round beyond training ({seconds})")


if __name__ == "__main__":
    main()
