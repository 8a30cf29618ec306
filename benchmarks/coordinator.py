"""The coordinator alone: CPU seconds and memory of a round with 10, 100 and 1,000 nodes that answer at once.

    python -m benchmarks.coordinator --nodes 10 100 1000

The server's own loop, its checks, its spool on the disk, the merge (FedIT), the checkpoint and the record run as they
do over gRPC; the nodes are stubs whose updates are as large as real ones, r = 8 on queries and values of Llama-3.2-1B's
shape. What the stubs and Flower's serialisation take is not counted. Each size is a process of its own.
"""

import argparse
import contextlib
import io
import multiprocessing
import resource
import statistics
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise
from pathlib import Path

from flwr.app import Context, Message, MessageType, RecordDict
from transformers import LlamaConfig

from common.record.events import Merge
from common.record.run import Run
from server_app.run import conduct
from strategies import read_config
from tests.support.grid import RUN_ID, StubGrid

SHAPE = LlamaConfig(
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=16,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=128256,
)


class TimedGrid(StubGrid):
    """Notes the CPU time at which each round begins, the stubs' own left out."""

    def __init__(self, nodes: int) -> None:
        super().__init__(nodes)
        self._stubs = 0.0
        self._begun: dict[tuple[str, str], float] = {}

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Messages of a new kind or round end the round before."""
        listed = list(messages)
        if listed and (kind := listed[0].metadata).message_type != MessageType.QUERY:
            self._begun.setdefault((kind.message_type, kind.group_id), time.process_time() - self._stubs)
        return super().push_messages(listed)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The replies; making them is not the coordinator's work."""
        started = time.process_time()
        replies = super().pull_messages(message_ids)
        self._stubs += time.process_time() - started
        return replies

    def rounds(self) -> list[float]:
        """Seconds of each round of training, from its first message to the first one after it."""
        begun = sorted(self._begun.items(), key=lambda item: item[1])
        return [after - at for ((kind, _), at), (_, after) in pairwise(begun) if kind == MessageType.TRAIN]


def measure(nodes: int, rounds: int) -> tuple[float, float, float]:
    """CPU seconds a round (median), bytes by which the peak memory grew, and bytes of one update."""
    with tempfile.TemporaryDirectory() as folder:
        SHAPE.save_pretrained(Path(folder) / "model")
        config = read_config({}).to_flower() | {
            "run-directory": folder,
            "run-name": "stubs",
            "num-server-rounds": rounds,
            "min-nodes": nodes,
            "model.name": str(Path(folder) / "model"),
            "lora.targets": "q_proj,v_proj",
            "evaluation.every": 0,
        }
        grid, before = TimedGrid(nodes), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        context = Context(run_id=RUN_ID, node_id=1, node_config={}, state=RecordDict(), run_config=config)
        with contextlib.redirect_stdout(io.StringIO()):
            conduct(grid, context)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        merge = Run.read(Path(folder) / "stubs").all(Merge)[-1]
    return statistics.median(grid.rounds()), grown * 1024.0, merge.bytes_up / nodes


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    print("| nodes | MB an update | CPU seconds a round | peak MB added |\n|---|---|---|---|")
    for nodes in options.nodes:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            seconds, grown, size = pool.submit(measure, nodes, options.rounds).result()
        print(f"| {nodes:,} | {size / 1e6:.1f} | {seconds:.2f} | {grown / 1e6:,.0f} |", flush=True)


if __name__ == "__main__":
    main()
